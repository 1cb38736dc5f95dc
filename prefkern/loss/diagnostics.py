"""The gradient balance of a preference loss: how hard it pushes each response of a pair.

AdaDPO's A.6 compares a pair's gradients on its two probabilities. With g the gradient of the loss
with respect to a log-prob L = log P,

    |dL/dP_w| / |dL/dP_l| = (|g_w| / |g_l|) (P_l / P_w)

For DPO this is P_l / P_w, for AdaDPO (beta_w / beta_l) P_l / P_w. It is returned as a logarithm,
since P is a sequence's probability, and e^-1000 is an ordinary value. The share of the push on
log-probs, `|g_w| / (|g_w| + |g_l|)`, is what the optimiser sees; for DPO it is 1/2. The trainer
logs both. By hand:

    out = loss_fn(...)
    prefkern.diagnostics.gradient_balance(out).log_balance.median()

`explain_nonfinite`, from `prefkern.loss.nonfinite`, finds where a NaN came from.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefkern.loss.nonfinite import explain_nonfinite
from prefkern.loss.outputs import PreferenceOutput
from prefkern.objectives import Objective, Pairs

__all__ = ["GradientBalance", "explain_nonfinite", "gradient_balance", "objective_balance"]


class GradientBalance(NamedTuple):
    """Numbers of each pair, (B,) each."""

    chosen_gradients: Tensor  # d loss / d chosen_logps
    rejected_gradients: Tensor  # d loss / d rejected_logps
    log_balance: Tensor  # log(|dL/dP_w| / |dL/dP_l|), nats; NaN where neither side is pushed
    chosen_share: Tensor  # |g_w| / (|g_w| + |g_l|); NaN where neither side is pushed


@torch.no_grad()
def gradient_balance(out: PreferenceOutput) -> GradientBalance:
    """The gradient balance of a computed loss (AdaDPO, A.6).

    Args:
        out: the output of `FusedPreferenceLoss` (or `prefkern.reference.preference_loss`). For TDPO
            the gradients are those through the log-probs alone, not through the divergences.

    Raises TypeError for an output without pairs (KTO).
    """
    if not isinstance(out, PreferenceOutput):
        raise TypeError(f"out must be a PreferenceOutput, got {type(out).__name__}")
    if out.chosen_gradients is None or out.rejected_gradients is None:
        raise ValueError(
            "out has no gradients, since it comes from a compiled call; call the loss outside of "
            "torch.compile, or use objective_balance on its log-probs"
        )
    return _balance(
        out.chosen_gradients, out.rejected_gradients, out.chosen_logps, out.rejected_logps
    )


def objective_balance(objective: Objective, pairs: Pairs) -> GradientBalance:
    """The gradient balance of an objective on given log-probs, for plots of its formula.

    Args:
        objective: any pairwise objective. It is evaluated, and not changed.
        pairs: its input, (B,) tensors; no gradient reaches them.

    Raises TypeError for arguments of other types.
    """
    if not isinstance(objective, Objective):
        raise TypeError(f"objective must be a pairwise objective, got {objective!r}")
    if not isinstance(pairs, Pairs):
        raise TypeError(f"pairs must be Pairs, got {pairs!r}")
    # Autograd cannot differentiate tensors made in inference mode: copy them outside of it.
    with torch.inference_mode(False), torch.enable_grad():
        values: dict[str, Any] = {
            name: None if value is None else value.detach().clone()
            for name, value in vars(pairs).items()
        }
        # Of a token of weight 1: with `ld_alpha` it is in two sums of its response.
        names = ("chosen_logps", "rejected_logps", "chosen_whole_logps", "rejected_whole_logps")
        read = [name for name in names if values[name] is not None]
        leaves = [values[name].requires_grad_() for name in read]
        # A copy: an objective remembers its last batch, and each module has a mode to keep.
        losses = copy.deepcopy(objective).eval()(Pairs(**values)).losses
        slopes = torch.autograd.grad(losses.sum(), leaves, materialize_grads=True)
        of = dict(zip(read, slopes, strict=True))
        chosen, rejected = (
            of[f"{side}_logps"] + of.get(f"{side}_whole_logps", 0.0)
            for side in ("chosen", "rejected")
        )
    return _balance(chosen, rejected, pairs.chosen_logps.detach(), pairs.rejected_logps.detach())


def _balance(
    chosen: Tensor, rejected: Tensor, chosen_logps: Tensor, rejected_logps: Tensor
) -> GradientBalance:
    # d / d P = (d / d log P) / P
    log_balance = chosen.abs().log() - rejected.abs().log() + rejected_logps - chosen_logps
    total = chosen.abs() + rejected.abs()
    share = chosen.abs() / total
    unpushed = total == 0
    log_balance = log_balance.masked_fill(unpushed, float("nan"))
    return GradientBalance(chosen, rejected, log_balance, share)
