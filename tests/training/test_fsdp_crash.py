"""Runs under FSDP2 that are killed while they save go on from the last complete checkpoint, bit for bit.

Both state dict types, one rank killed or both (`support.fsdp_crash`, which forks all of the ranks).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("peft")

from support.ddp import RESUMES
from support.fsdp_crash import MOMENTS, RANKS, STEPS, folder_of
from support.processes import environment
from support.training import assert_same_weights

# Each of the others is of another file, or another side of what these are of.
SHORT = ("in the second rank's shard", "in FSDP's weights", "after the rename")
LONG = [moment for moment in MOMENTS if moment not in SHORT]

pytestmark = pytest.mark.skipif(
    not RESUMES, reason="this transformers loads no optimiser on two CPU ranks"
)


@pytest.fixture(scope="module")
def ran(request, tmp_path_factory) -> Path:
    """The folders of killed and resumed runs, by the moment's number, and of runs that were not."""
    folder = tmp_path_factory.mktemp("killed")
    every = request.config.getoption("--long")
    moments = [moment for moment in MOMENTS if every or moment in SHORT]
    done = subprocess.run(
        [sys.executable, "-m", "support.fsdp_crash", str(folder), *moments],
        env=environment(),
        timeout=600,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.long(moment=LONG)
def test_killed_and_resumed(ran, moment):
    _, _, case, kind, step = MOMENTS[moment]
    folder = ran / folder_of(moment)
    # A folder had a checkpoint's name only if it was complete.
    left = torch.load(folder / "problems.pt")
    assert f"checkpoint-{step}" in left
    assert set(left.values()) == {None}
    for rank in range(RANKS):
        resumed = torch.load(folder / f"found{rank}.pt")
        whole = torch.load(ran / f"{case}, {kind}" / f"found{rank}.pt")
        assert (resumed["begun"], whole["begun"]) == ([step], [0])
        assert resumed["step"] == whole["step"] == STEPS
        assert resumed["logs"] == whole["logs"]
        assert resumed["objective"] == whole["objective"]
        assert_same_weights(resumed["weights"], whole["weights"], atol=0, rtol=0)
    # Nothing of what was interrupted is left; at a limit of one, the best and the last.
    names = {path.name for path in folder.iterdir() if path.name.startswith((".", "check"))}
    assert names == {f"checkpoint-{step}" for step in (resumed["best"], STEPS)}
