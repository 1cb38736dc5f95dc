"""FSDP2 on four ranks, and HSDP on two replicas of two shards, against one process."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("peft")

from support.fsdp import launch, outcome_of

# A pair on each rank. Matrices of 4 rows on 4 ranks, and vectors, leave uneven shards.
CASES = (
    "full, reference",
    "lora, adapter off",
    "trained adapter",
    "tdpo, reference",
    "lora, precomputed, evaluated first",
)
HSDP = {
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("one")
    return {case: outcome_of(folder / case, case, ranks=1) for case in CASES}


@pytest.mark.long
@pytest.mark.parametrize(
    ("settings", "mesh"), [({}, (4,)), (HSDP, (2, 2))], ids=["four", "two by two"]
)
def test_gradients_are_those_of_the_joint_batch(tmp_path, one_process, settings, mesh):
    launch(tmp_path, 2, *CASES, count=4, **settings)
    for rank in range(4):
        found = torch.load(Path(tmp_path) / f"rank{rank}.pt")
        for case, expected in one_process.items():
            outcome = found[case]
            assert outcome["mesh"] == mesh
            assert len(outcome["steps"]) == len(expected["steps"]) == 2
            for mine, joint in zip(outcome["steps"], expected["steps"], strict=True):
                assert mine["gradients"].keys() == joint["gradients"].keys()
                for name, gradient in joint["gradients"].items():
                    scale = gradient.norm().clamp(min=1e-4)
                    assert (mine["gradients"][name] - gradient).norm() <= 1e-5 * scale, name
            for mine, joint in zip(outcome["logs"], expected["logs"], strict=True):
                names = [n for n in joint if not n.endswith(("epoch", "time", "per_second"))]
                for name in names:
                    assert mine[name] == pytest.approx(joint[name], rel=1e-5, abs=1e-5), name
            if outcome["is_own_reference"]:
                assert outcome["logs"][0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
