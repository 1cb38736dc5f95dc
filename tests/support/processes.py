"""A process of its own for a test: this tree first on its path, one thread, Triton interpreting or not."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
# As pytest has it (pyproject.toml).
PYTHONPATH = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "bench", "tests"))


def environment(interprets: bool | None = None) -> dict[str, str]:
    """This process's environment with that path; `interprets` turns Triton's interpreter on or off."""
    made = {**os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    if interprets is not None:
        made.pop("TRITON_INTERPRET", None)
    if interprets:
        made["TRITON_INTERPRET"] = "1"
    return made
