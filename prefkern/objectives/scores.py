"""The scores of responses: what a coefficient multiplies.

With rho = log P/R of a response, DPO's score is rho itself, from a penalty on the reverse KL to the
reference. Another f-divergence has the score f'(P/R) (f-DPO, Wang et al. 2024):

    reverse_kl         log t                    rho
    forward_kl         1 - 1/t                  1 - exp(-rho)
    js_divergence      log(2t / (1 + t))        log 2 + logsigmoid(rho)
    alpha_divergence   (t^(a-1) - 1) / (a - 1)  expm1((a - 1) rho) / (a - 1)

The forward KL is the alpha-divergence of a = 0, and the reverse KL its limit at a = 1. An exponent
is held below 60, as that of a ratio is.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from prefkern.objectives.adaptive import MAX_LOG_RATIO
from prefkern.objectives.checks import require_number, require_one_of

Score = Literal["log_ratio", "mean_log_ratio", "log_prob", "mean_log_prob", "log_odds"]
Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]

# Log-odds are taken at P <= 1 - 1e-20, so that they and their slope 1 / (1 - P) stay finite.
LEAST_MISS = 1e-20
# An alpha-divergence nearer to a = 1 is the reverse KL, as in TRL.
_LEAST_POWER = 1e-6


def divergence_options(kind: str, alpha: float | None) -> dict[str, Any]:
    """The two options of an f-divergence, checked. Alpha is 0.5 where it is not given."""
    require_one_of("f_divergence_type", kind, get_args(Divergence))
    if alpha is not None and kind != "alpha_divergence":
        raise ValueError(
            "f_alpha_divergence_coef is of f_divergence_type='alpha_divergence', "
            f"got {alpha!r} with {kind!r}"
        )
    if kind == "alpha_divergence":
        alpha = 0.5 if alpha is None else require_number("f_alpha_divergence_coef", alpha)
    return {"f_divergence_type": kind, "f_alpha_divergence_coef": alpha}


def derivative(kind: str, alpha: float | None) -> tuple[Literal["log", "js", "power"], float]:
    """f' as one of three forms, with the power e of `(t^e - 1) / e`."""
    if kind == "js_divergence":
        return "js", 0.0
    power = {"reverse_kl": 0.0, "forward_kl": -1.0}.get(kind, (alpha or 0.0) - 1)
    return ("log", 0.0) if abs(power) < _LEAST_POWER else ("power", power)


def ratio_score(rho: Tensor, form: str, power: float) -> Tensor:
    """f'(exp(rho)). Near 0 and far from it by two formulas, where the other one cancels."""
    if form == "log":
        return rho
    if form == "js":
        near, far, is_near = _parted(rho)
        # 2 sigmoid(rho) = 1 + tanh(rho / 2)
        value = torch.log1p(torch.tanh(near / 2))
        return torch.where(is_near, value, math.log(2) + F.logsigmoid(far))
    near, far, is_near = _parted((power * rho).clamp(max=MAX_LOG_RATIO))
    return torch.where(is_near, torch.expm1(near), far.exp() - 1) / power


def _parted(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x where it is within +-1 and where it is not, with a harmless number elsewhere."""
    # A NaN in the branch that is not taken would reach autograd.
    is_near = x.abs() < 1
    return torch.where(is_near, x, 0.0), torch.where(is_near, 1.0, x), is_near


def log_odds(log_probability: Tensor) -> Tensor:
    """`log P - log(1 - P)`."""
    bounded = below_one(log_probability)
    return bounded - log1mexp(bounded)


def below_one(log_probability: Tensor) -> Tensor:
    return log_probability.clamp(max=-LEAST_MISS)


def log1mexp(x: Tensor) -> Tensor:
    """`log(1 - exp(x))` for x < 0, without cancellation at either end (Maechler 2012)."""
    is_small = x > -math.log(2)
    # Each branch gets only arguments that suit it: a NaN in the other one would reach autograd.
    near = torch.where(is_small, x, -1.0)
    far = torch.where(is_small, -1.0, x)
    return torch.where(is_small, (-torch.expm1(near)).log(), torch.log1p(-far.exp()))
