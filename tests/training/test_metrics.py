"""The objective decides which metrics it has, not the name of a metric."""

from __future__ import annotations

import pytest
import torch

from prefkern import FusedPreferenceLoss
from prefkern.objectives import DPO, IPO, WPO, Adaptive, AlphaDPO, BetaDPO, WithNLL
from prefkern.training import context_parallel
from prefkern.training.metrics import item_values, token_count
from support.training import step_logs, trainer


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


MANY = 2**24 + 1


def test_tokens_are_counted_exactly(tmp_path, monkeypatch):
    """Beyond what float32 counts: in a batch, and over the steps between two logs, saved ones too."""
    ids = torch.zeros(1, 1, dtype=torch.int64).expand(1, MANY)
    for batch in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": torch.ones(1, MANY)}):
        batch = {name: value.long() for name, value in batch.items()}
        assert token_count(batch).tolist() == [MANY, 1]
    monkeypatch.setattr(context_parallel, "token_count", lambda batch: torch.tensor([MANY, 1]))
    given = {"objective": "simpo", "logging_steps": 3, "save_strategy": "steps", "save_steps": 2}
    given |= {"num_train_epochs": 2}
    whole = trainer(tmp_path / "a", **given)
    whole.train()
    assert [log["num_tokens"] for log in step_logs(whole)] == [3 * MANY, 6 * MANY]
    resumed = trainer(tmp_path / "b", **given)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert [log["num_tokens"] for log in step_logs(resumed)] == [3 * MANY, 6 * MANY]
