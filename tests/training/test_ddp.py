"""Two ranks under DDP against one process: every parameter's gradient, before the optimiser's step.

One launch by torchrun, as users do it, runs all cases. One process gets the same pairs in the same
order, as joint batches.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from support import tiny

pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")

from prefkern.training import reference_cache
from support.ddp import CASES, LONG, OTHERS, RESUMES, gradients_of, launch
from support.reference_sums import precomputing, sums, sums_from_logits
from support.resumed import STEPS
from support.training import assert_same_weights, lora


def assert_same_gradients(folder: Path, case: str) -> None:
    expected = gradients_of(folder, case, ranks=1)
    first, second = (torch.load(folder / f"rank{rank}.pt")[case] for rank in range(2))
    assert len(first["gradients"]) == len(second["gradients"]) == len(expected["gradients"]) > 0
    tolerance = 0.05 if "bf16" in case else 1e-4
    for mine, others, joint in zip(
        first["gradients"], second["gradients"], expected["gradients"], strict=True
    ):
        assert_same_weights(mine, others, atol=0, rtol=0)
        assert mine.keys() == joint.keys()
        pushed = 0
        for name, gradient in joint.items():
            scale = gradient.norm().clamp(min=1e-4)
            assert (mine[name] - gradient).norm() <= tolerance * scale, name
            pushed += bool(gradient.norm() > 1e-3)
        assert pushed >= len(joint) / 3
    rel = 0.05 if "bf16" in case else 1e-4
    times = ("epoch", "runtime", "per_second")
    for log in (first["logs"], second["logs"]):
        for mine, joint in zip(log, expected["logs"], strict=True):
            for name in (name for name in joint if not name.endswith(times)):
                assert mine[name] == pytest.approx(joint[name], rel=rel, abs=rel / 10), name
    for state in (first["state"], second["state"]):
        assert state.keys() == expected["state"].keys()
        for name, value in expected["state"].items():
            torch.testing.assert_close(state[name], value, rtol=rel, atol=1e-5)
    assert case != "kto" or expected["logs"][0]["kl"] > 0.1


@pytest.fixture(scope="module")
def ranks(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    cases = [case for case in CASES if case not in LONG or request.config.getoption("--long")]
    launch(folder, *cases, *OTHERS)
    return folder


@pytest.mark.parametrize("case", CASES)
@pytest.mark.long(case=[*LONG])
def test_gradients_are_those_of_the_joint_batch(ranks, case):
    assert_same_gradients(ranks, case)


def test_every_adapter_weight_is_compared(ranks):
    names = torch.load(ranks / "rank0.pt")["lora, checkpointed"]["gradients"][0].keys()
    model = peft.get_peft_model(tiny.model(), lora())
    assert names == {name for name, weight in model.named_parameters() if weight.requires_grad}


@pytest.mark.skipif(not RESUMES, reason="this transformers loads no optimiser on two CPU ranks")
def test_two_ranks_resume_bit_for_bit(ranks):
    for rank in range(2):
        whole, resumed = torch.load(ranks / f"rank{rank}.pt")["resumed"]
        assert whole["steps"] == resumed["steps"] == STEPS // 2
        assert_same_weights(whole["weights"], resumed["weights"], atol=0, rtol=0)
        assert whole["logs"] == resumed["logs"]


@pytest.mark.skipif(not RESUMES, reason="this transformers loads no optimiser on two CPU ranks")
def test_two_ranks_resume_on_a_stream(ranks):
    for rank in range(2):
        whole, resumed = torch.load(ranks / f"rank{rank}.pt")["resumed stream"]
        assert len(whole["losses"]) == 8 and resumed["losses"] == whole["losses"]
        assert_same_weights(whole["weights"], resumed["weights"], atol=0, rtol=0)


def test_ranks_with_different_numbers_of_batches_are_refused(ranks):
    """Such ranks would wait for each other for ever."""
    for rank in range(2):
        trained, evaluated = torch.load(ranks / f"rank{rank}.pt")["refused"]
        assert "'train' has 5 pairs, which leave 1 for the last batches of 2 on 2" in trained
        assert "'eval' has 7 pairs, which leave 3" in evaluated


def test_ranks_share_a_cache_of_reference_sums(ranks, monkeypatch):
    """The first attempt dies on both, the second goes on, the third finds all, as with one rank."""
    outcomes = [torch.load(ranks / f"rank{rank}.pt")["cached"] for rank in range(2)]
    # Of 6 pairs that are left after the first shard, each rank has two batches of 2.
    assert [outcome["rows"] for outcome in outcomes] == [[8, 0]] * 2
    monkeypatch.setattr(reference_cache, "_SHARD_PAIRS", 4)
    found, rows = precomputing(ranks / "cached")
    assert rows == 0
    for outcome in outcomes:
        for attempt in outcome["sums"]:
            assert torch.equal(attempt, sums(found.train_dataset))
    torch.testing.assert_close(
        sums(found.train_dataset).double(),
        sums_from_logits(tiny.model(seed=1), found.train_dataset),
        atol=1e-4,
        rtol=1e-6,
    )
