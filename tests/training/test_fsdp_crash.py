"""Runs under FSDP2 that are killed while they save go on from the last complete checkpoint, bit for bit.

Both state dict types, one rank killed or both (`support.fsdp_crash`, which forks all of the ranks).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("peft")

from support.ddp import RESUMES
from support.fsdp_crash import MOMENTS, assert_went_on, folder_of
from support.processes import environment

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
    assert_went_on(folder, ran / f"{case}, {kind}", step)
