"""The objective decides which metrics it has, not the name of a metric."""

from __future__ import annotations

import pytest
import torch

from prefkern import FusedPreferenceLoss
from prefkern.objectives import DPO, IPO, WPO, Adaptive, AlphaDPO, BetaDPO, WithNLL
from prefkern.training.metrics import item_values


class _Renamed(BetaDPO):
    """A subclass that logs under names of its own."""

    def metrics(self, pairs, result):
        return {"mine/beta": result.beta_chosen}


class _Borrowed(DPO):
    """Plain DPO that logs under beta-DPO's name."""

    def metrics(self, pairs, result):
        return {"beta_dpo/beta": result.beta_chosen}


MOVING = {
    "adaptive": lambda: DPO(adaptive=Adaptive()),
    "adaptive, composed": lambda: WithNLL(WPO(IPO(adaptive=Adaptive()))),
    "beta-DPO": BetaDPO,
    "beta-DPO, renamed": _Renamed,
    "beta-DPO, composed": lambda: WithNLL(WPO(BetaDPO())),
    "beta-DPO, renamed and composed": lambda: WPO(WithNLL(_Renamed())),
}
FIXED = {
    "DPO": DPO,
    "DPO, composed": lambda: WithNLL(WPO(DPO())),
    "alpha-DPO": AlphaDPO,
    "DPO, under beta-DPO's name": _Borrowed,
}


@pytest.mark.parametrize("name", [*MOVING, *FIXED])
def test_rewards_at_the_given_beta_are_logged_where_pairs_train_with_another(name):
    objective = {**MOVING, **FIXED}[name]()
    generator = torch.Generator().manual_seed(0)
    hidden, ref_hidden = torch.randn(2, 4, 5, 8, generator=generator)
    weight = torch.randn(13, 8, generator=generator)
    labels = torch.randint(13, (4, 5), generator=generator)
    out = FusedPreferenceLoss(objective)(
        hidden, weight, labels, ref_hidden=ref_hidden, ref_weight=weight
    )
    values = item_values(out, objective)
    assert objective.moves_beta == (name in MOVING)
    assert ("rewards/base_margins" in values) == (name in MOVING)
    assert ("rewards/base_accuracies" in values) == (name in MOVING)
    if name in MOVING:
        rho = torch.stack([out.chosen_logps, out.rejected_logps]).detach() - torch.stack(
            [out.ref_chosen_logps, out.ref_rejected_logps]
        )
        expected = objective.beta * (rho[0] - rho[1])
        torch.testing.assert_close(values["rewards/base_margins"][:, 0], expected)
