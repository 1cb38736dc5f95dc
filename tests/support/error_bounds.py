"""Bounds on the errors of tiles against float64, per token and per element: derived, not chosen.

The bounds are to first order in the unit roundoff u (2^-24 for float32 tiles). A sum of n terms, in
any order, has an error of at most sqrt(n) u times the sum of their absolute values, up to a
constant (Higham and Mary 2019). The constant here is 1/4: with it, the worst of thousands of draws
reaches half of a bound.

- A logit: `d = u (sqrt(H) / 4 + 2) (sum_i |h_i W_vi| + |b_v|) |scale| / temperature`. A token takes
  the largest d over its vocabulary entries. The 2 is for the operations of the transform.
- A log-prob. The absolute values of `d logp / d z_v = [v = y] - p_v` sum to 2 (1 - p_y). So errors
  of logits change it by `2 (1 - p_y) d`, and the sum of V exponentials changes it by
  `(1 - p_y) (sqrt(V) / 4 + 4) u`. Later operations change it by `4 u |logp|`. Code that subtracts
  the label's own column instead of leaving it out, or rounds p before it computes 1 - p, has an
  error of u / (1 - p_y) times as much.
- A gradient. `D_i = c sum_v e_v t_v W_vi` with e_y = 1 - p_y and e_v = -p_v. Each factor has a
  relative error of `e = 4 d + 2 (sqrt(V) / 4 + 4) u`, and a softcap's slope t = 1 - tanh^2 has an
  absolute error of `2 d / cap + 4 u`. So the error is within `c (e + ...) sum_v |e_v W_vi|`. This
  is the sum of absolute values, because entries may cancel. For the head's gradient the sum is over
  tokens.
- A result in a half dtype is rounded once more.

Float64, the truth, has the same errors with u = 2^-53, but without the factor (1 - p_y), because
its log_softmax subtracts. This is added to the bounds; it matters if 1 - p_y is below 1e-8.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from prefkern import reference

# Below this float32 has no significant digits.
LEAST = 1e-36
TRUTH = 2.0**-50


@dataclass
class TokenBounds:
    """Error bounds for the logits and log-probs of M tokens, and the factors of gradients."""

    logit: Tensor  # (M,) d
    logps: Tensor  # (M,)
    shares: Tensor  # (M, V) |e_v|, the truth
    relative: Tensor  # (M,) relative error of a share
    scale: float  # c
    floor: float  # absolute error of the truth's own shares
    unit: float  # u

    def of_states(self, grad: Tensor, weight: Tensor) -> Tensor:  # (M,), (V, R) -> (M, R)
        """The bound for the gradient of states that were multiplied by this weight."""
        size = weight.double().abs()
        error = self.relative.unsqueeze(1) * (self.shares @ size) + self.floor * size.sum(0)
        return self.scale * grad.double().abs().unsqueeze(1) * error + LEAST

    def of_entries(self, grad: Tensor, states: Tensor) -> Tensor:  # (M,), (M, R) -> (V, R)
        """The bound for the gradient of the weight of these states; with ones, of a bias."""
        pushed = self.scale * grad.double().abs()
        relative = self.relative + math.sqrt(len(grad)) / 4 * self.unit
        error = self.shares * (pushed * relative).unsqueeze(1) + self.floor * pushed.unsqueeze(1)
        return error.T @ states.double().abs() + LEAST


def token_bounds(
    hidden: Tensor,  # (M, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (M,), all of them scored
    bias: Tensor | None = None,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    lora_hidden: Tensor | None = None,  # (M, R)
    lora_weight: Tensor | None = None,  # (V, R)
    unit: float = 2.0**-24,
) -> TokenBounds:
    """The bounds for these tokens, from their float64 truth, which holds logits in memory."""
    hidden, weight = hidden.double(), weight.double()
    V, width = weight.shape
    sizes = hidden.abs() @ weight.abs().T
    extra = {}
    if lora_hidden is not None and lora_weight is not None:
        extra = {"lora_hidden": lora_hidden.double(), "lora_weight": lora_weight.double()}
        sizes = sizes + lora_hidden.double().abs() @ lora_weight.double().abs().T
        width += lora_weight.shape[1]
    if bias is not None:
        bias = bias.double()
        sizes = sizes + bias.abs()
    c = abs(logit_scale) / temperature
    z = reference.logits(
        hidden, weight, bias, logit_scale=logit_scale, softcap=softcap, temperature=temperature,
        **extra,
    )  # fmt: skip
    label_logit = z.gather(1, labels.unsqueeze(1))
    others = z.scatter(1, labels.unsqueeze(1), -math.inf)
    # 1 - p_y, computed without a subtraction.
    rest = (others - label_logit).exp().sum(1)
    miss = rest / (1 + rest)
    miss = torch.where(rest.isinf(), 1.0, miss)
    logps = torch.where(rest.isinf(), label_logit[:, 0] - z.logsumexp(1), -torch.log1p(rest))
    size = c * sizes.amax(1)
    if softcap is not None:
        # The rounding of tanh itself is relative to the cap.
        size = size + softcap / temperature
    logit = unit * (math.sqrt(width) / 4 + 2) * size
    many = math.sqrt(V) / 4 + 4
    # The difference of two logits before exp is also rounded; it is at most the sum of both sizes.
    bound = miss * (2 * logit + many * unit) + 4 * unit * logps.abs()
    relative = 4 * logit + 2 * many * unit
    if softcap is not None:
        relative = relative + 2 * logit * temperature / softcap + 4 * unit
    shares = z.softmax(1).scatter(1, labels.unsqueeze(1), miss.unsqueeze(1))
    floor = TRUTH * (1 + (size.max().item() if len(size) else 0))
    return TokenBounds(logit, bound + floor, shares, relative, c, floor, unit)
