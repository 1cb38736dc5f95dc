"""Where the device's own allocator refuses, a call runs in half the workspace, or says what fits.

test_memory.py puts an allocator of its own in place of the device's, and refuses at every place.
Here the device itself has no more: a GPU's caching allocator, or a CPU's malloc.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from support.machine import DEVICE, HAS_GPU
from support.processes import ROOT, environment

# Under the interpreter every tile is an array of numpy's, which memory runs out for elsewhere.
REAL = ["torch", "triton"] if HAS_GPU else ["torch"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux bounds a process's address space")
@pytest.mark.parametrize("backend", REAL)
def test_the_device_has_no_more_memory(backend: str) -> None:
    made = environment(interprets=False)
    # The process gives freed blocks back, so that what is left can be said.
    made = {name: value for name, value in made.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-m", "support.refused", DEVICE, backend],
        cwd=ROOT, env=made, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    halved, refused = done.stdout.splitlines()[:2]
    assert halved.startswith("halved: out of memory in the ")
    assert "trying once more with workspace_mb=" in halved
    assert refused.startswith("refused: out of memory in the ") and "Tried: " in refused
    least = "The least that these tokens need is "
    assert least in refused or "No workspace_mb makes it smaller" in refused
