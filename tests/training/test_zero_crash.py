"""Runs under ZeRO-2 and ZeRO-3 that are killed while they save go on bit for bit (`support.zero_crash`).

They need DeepSpeed (make test-zero).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("peft")
pytest.importorskip("deepspeed")

from support.fsdp_crash import assert_went_on
from support.processes import environment
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
    assert_went_on(folder, ran / f"{case}, {stage}", step)
