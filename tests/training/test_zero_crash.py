"""Runs under ZeRO-2 and ZeRO-3 that are killed while they save go on bit for bit (`support.zero_crash`).

They need DeepSpeed (make test-zero).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("peft")
pytest.importorskip("deepspeed")

from support.fsdp_crash import RANKS, STEPS
from support.processes import environment
from support.training import assert_same_weights
from support.zero_crash import MOMENTS

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Path:
    """The folders of killed and resumed runs, by the moment's number, and of runs that were not."""
    folder = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, "-m", "support.zero_crash", str(folder), *MOMENTS],
        env={**environment(), "DS_ACCELERATOR": "cpu"},
        timeout=900,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed(ran, moment):
    _, _, case, stage, step = MOMENTS[moment]
    folder = ran / str([*MOMENTS].index(moment))
    # A folder had a checkpoint's name only if it was complete.
    left = torch.load(folder / "problems.pt")
    assert f"checkpoint-{step}" in left
    assert set(left.values()) == {None}
    for rank in range(RANKS):
        resumed = torch.load(folder / f"found{rank}.pt")
        whole = torch.load(ran / f"{case}, {stage}" / f"found{rank}.pt")
        assert (resumed["begun"], whole["begun"]) == ([step], [0])
        assert resumed["step"] == whole["step"] == STEPS
        assert resumed["logs"] == whole["logs"]
        assert resumed["objective"] == whole["objective"]
        assert_same_weights(resumed["weights"], whole["weights"], atol=0, rtol=0)
    # Nothing of what was interrupted is left; at a limit of one, the best and the last.
    names = {path.name for path in folder.iterdir() if path.name.startswith((".", "check"))}
    assert names == {f"checkpoint-{each}" for each in (resumed["best"], STEPS)}
