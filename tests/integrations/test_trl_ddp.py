"""TRL's trainers with prefkern's operator: two ranks that share a batch train as one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

import twins
from support.ranks import outcomes
from support.trl_ddp import ASKING, CASES, IS_ASKED, outcome

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    names = [name for name in CASES if IS_ASKED or name not in ASKING]
    return outcomes("trl_ddp", tmp_path_factory.mktemp("ranks"), 2, names)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_as_one(name: str, by_rank: list[dict], tmp_path: Path) -> None:
    if name in ASKING and not IS_ASKED:
        pytest.skip("fuse_head serves this trainer from TRL 1.16 on")
    true = outcome(name, tmp_path, ranks=1)
    assert len(true["gradients"]) == 2
    for found in by_rank:
        actual = found[name]
        for mine, theirs in zip(actual["gradients"], true["gradients"], strict=True):
            assert mine.keys() == theirs.keys()
            for key, gradient in theirs.items():
                torch.testing.assert_close(mine[key], gradient, atol=1e-6, rtol=1e-3)
        for mine, theirs in zip(actual["logs"], true["logs"], strict=True):
            for key in theirs.keys() - {"grad_norm"}:
                # What TRL's trainers log of a step is each rank's last batches': compare the loss.
                if key == "loss" or (name == "adadpo" and not key.endswith(twins._OF_TIME)):
                    assert mine[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-5), key
