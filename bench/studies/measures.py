"""What is measured of a policy on a set of pairs, from the sums of their log-probs alone.

`rho = log P/R`, policy over reference. Before the first step both are one model, so rho is also
what training has added to a response's log-prob.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prefkern.loss.diagnostics import objective_balance
from prefkern.objectives import Objective, Pairs


@torch.no_grad()
def measure(objective: Objective, pairs: Pairs) -> dict[str, float]:
    """One point of every curve; changes neither the objective's mode nor its statistics."""
    balance = objective_balance(objective, pairs)
    was_training = objective.training
    result = objective.eval()(pairs)
    objective.train(was_training)
    ref_chosen, ref_rejected = pairs.reference("the study")
    rho_chosen = pairs.chosen_logps - ref_chosen
    rho_rejected = pairs.rejected_logps - ref_rejected
    margins = rho_chosen - rho_rejected
    rewards = result.chosen_rewards - result.rejected_rewards
    chosen_lengths, rejected_lengths = pairs.lengths("the study")
    longer = (chosen_lengths - rejected_lengths).to(margins.dtype)
    values = {
        "loss": result.losses.mean(),
        "reward_accuracy": (rewards > 0).float().mean(),
        "reward_margin": rewards.mean(),
        "log_ratio_accuracy": (margins > 0).float().mean(),
        "log_ratio_margin": margins.mean(),
        "kl_margin": getattr(objective, "beta", 1.0) * margins.mean(),
        "chosen_change": rho_chosen.mean(),
        "rejected_change": rho_rejected.mean(),
        "shorter_accuracy": _accuracy(margins[longer < 0]),
        "length_bias": _accuracy(margins[longer > 0]) - _accuracy(margins[longer < 0]),
        "length_correlation": _correlation(margins, longer),
        "chosen_share": balance.chosen_share.nanmean(),
        "log_balance": balance.log_balance.nanquantile(0.5),
        "coefficient": (result.beta_chosen / result.beta_rejected).mean(),
    }
    return {name: value.item() for name, value in values.items()}


def _accuracy(margins: Tensor) -> Tensor:
    """Share of positive margins; a tie counts as one half, and no pair as one half."""
    if not len(margins):
        return margins.new_tensor(0.5)
    return (margins > 0).float().mean() + (margins == 0).float().mean() / 2


def _correlation(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's correlation; 0 where one of the two does not vary."""
    x, y = x - x.mean(), y - y.mean()
    size = x.norm() * y.norm()
    return torch.where(size > 0, (x * y).sum() / size.clamp(min=1e-30), 0.0)
