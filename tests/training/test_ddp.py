"""Two ranks under DDP against one process: every parameter's gradient, before the optimiser's step.

One launch, by torchrun as users do it, runs all cases. The same pairs in the same order reach one process as joint batches.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version

from support import tiny

pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")

from test_reference_cache import precomputing, shards, sums, sums_from_logits
from test_resume import STEPS, run_of, told
from test_trainer import Record, assert_same_weights, lora, step_logs, trainer, weights

from prefkern.training import reference_cache

# Older ones hand torch.load the device "cpu:0", which it does not know.
RESUMES = Version(transformers.__version__) >= Version("5.23")
UNEVEN = {"accelerator_config": {"even_batches": False}}
# Pairs, a rank's batch, accumulated batches, and other options. The joint batch is of 4 or 8 pairs.
CASES = {
    "full": (8, 2, 1, dict),
    "tied head": (8, 2, 1, lambda: {"model": tiny.model("Gemma2", tie_word_embeddings=True)}),
    "lora": (8, 2, 1, lambda: {"peft_config": lora()}),
    "lora, checkpointed": (
        8,
        2,
        1,
        lambda: {"peft_config": lora(), "gradient_checkpointing": True},
    ),
    "accumulated": (8, 1, 2, lambda: {"objective_options": {"clip": 1.1}}),
    "ipo, bf16": (8, 2, 1, lambda: {"objective": "ipo", "bf16": True, "peft_config": lora()}),
    "statistics": (8, 2, 1, lambda: {"objective": "alphadpo", "objective_options": {"alpha": 0.5}}),
    "draws": (8, 2, 1, lambda: {"objective": "betadpo", "objective_options": {"keep": 0.5}}),
    # 7 pairs: the second rank's last batch is of one.
    "uneven": (7, 2, 1, lambda: {**UNEVEN, "max_length": 9}),
    "uneven, tied, accumulated": (
        7,
        2,
        2,
        lambda: {**UNEVEN, "model": tiny.model("Gemma2", tie_word_embeddings=True)},
    ),
    "uneven, statistics": (7, 2, 1, lambda: {**UNEVEN, "objective": "alphadpo"}),
    "uneven, lora, precomputed": (
        7,
        2,
        2,
        lambda: {**UNEVEN, "peft_config": lora(), "precompute_ref_log_probs": True},
    ),
}


def gradients_of(path: Path, case: str, ranks: int) -> dict:
    pairs, batch, accumulated, options = CASES[case]
    record, given = Record(), options()
    given.setdefault("model", tiny.model())
    if "peft_config" not in given:
        given["ref_model"] = tiny.model(seed=1)
    run = trainer(
        path,
        count=pairs,
        per_device_train_batch_size=batch if ranks == 2 else batch * 2 * accumulated,
        gradient_accumulation_steps=accumulated if ranks == 2 else 1,
        optim="sgd",
        # Large enough for the second step's gradients to depend on the first's.
        learning_rate=0.1,
        max_grad_norm=0.0,
        callbacks=[record],
        **given,
    )
    run.train()
    assert run.args.world_size == ranks
    return {"gradients": record.gradients, "logs": step_logs(run)}


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
    for log in (first["logs"], second["logs"]):
        for mine, joint in zip(log, expected["logs"], strict=True):
            for name in joint.keys() - {"epoch"}:
                assert mine[name] == pytest.approx(joint[name], rel=rel, abs=rel), name


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(
        [*launch, __file__, str(folder), *CASES, *OTHERS], env=environment, check=True, timeout=400
    )
    return folder


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_joint_batch(ranks, case):
    assert_same_gradients(ranks, case)


def test_every_adapter_weight_is_compared(ranks):
    names = torch.load(ranks / "rank0.pt")["lora"]["gradients"][0].keys()
    model = peft.get_peft_model(tiny.model(), lora())
    assert names == {name for name, weight in model.named_parameters() if weight.requires_grad}


@pytest.mark.skipif(not RESUMES, reason="this transformers loads no optimiser on two CPU ranks")
def test_two_ranks_resume_bit_for_bit(ranks):
    for rank in range(2):
        whole, resumed = torch.load(ranks / f"rank{rank}.pt")["resumed"]
        assert whole["steps"] == resumed["steps"] == STEPS // 2
        assert_same_weights(whole["weights"], resumed["weights"], atol=0, rtol=0)
        assert whole["logs"] == resumed["logs"]


def test_ranks_with_different_numbers_of_batches_are_refused(ranks):
    """They would wait for each other for ever."""
    for rank in range(2):
        trained, evaluated = torch.load(ranks / f"rank{rank}.pt")["refused"]
        assert "'train' has 5 pairs, which leave 1 for the last batches of 2 on 2" in trained
        assert "'eval' has 7 pairs, which leave 3" in evaluated


def test_ranks_share_a_cache_of_reference_sums(ranks, monkeypatch):
    """The first attempt dies on both, the second goes on, the third finds all, as one rank does."""
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


def _resumed(path: Path) -> list[dict]:
    """A run that is saved between two logs and one that goes on from there."""
    runs = []
    for resumes in (False, True):
        options = {"save_strategy": "no"} if resumes else {}
        run = run_of(path, "betadpo", **options)
        run.train(resume_from_checkpoint=str(path / "checkpoint-3") if resumes else None)
        steps = run.state.global_step
        runs.append({"steps": steps, "weights": weights(run.model), "logs": told(run)})
    return runs


def _refused(path: Path) -> list[str]:
    messages = []
    for options in ({"count": 5}, {"count": 8, "eval_dataset": tiny.dataset(7)}):
        sizes = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}
        with pytest.raises(ValueError) as raised:
            trainer(path, **UNEVEN, **sizes, **options)
        messages.append(str(raised.value))
    return messages


def _cached(path: Path) -> dict:
    path = path / "cached"
    with pytest.raises(KeyboardInterrupt):
        precomputing(path, dies_after=6)
    # Rank 0 writes.
    torch.distributed.barrier()
    assert shards(path).keys() == {"000000000-000000004"}
    torch.distributed.barrier()
    runs = [precomputing(path) for _ in range(2)]
    return {"rows": [rows for _, rows in runs], "sums": [sums(r.train_dataset) for r, _ in runs]}


OTHERS = {"refused": _refused, "cached": _cached}
if RESUMES:
    OTHERS["resumed"] = _resumed


if __name__ == "__main__":
    torch.set_num_threads(1)
    reference_cache._SHARD_PAIRS = 4
    folder = Path(sys.argv[1])
    outcomes = {
        case: OTHERS[case](folder) if case in OTHERS else gradients_of(folder, case, ranks=2)
        for case in sys.argv[2:]
    }
    torch.save(outcomes, folder / f"rank{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()
