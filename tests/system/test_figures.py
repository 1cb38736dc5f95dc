"""The figures in the pages are those of the result files, as the script writes them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_pages_are_what_the_script_writes():
    check = [sys.executable, ROOT / "bench/readme.py", "--check"]
    assert subprocess.run(check, check=False).returncode == 0
