"""`prefkern bench`: runs the benchmark, which is a separate package, `prefkern_bench`.

The benchmark compares prefkern with its peers and needs their packages, so it is not part of the
installed library. If it is missing, the command says what to install and returns 2.
"""

from __future__ import annotations

import importlib.util

from prefkern.cli.arguments import fail, spelled
from prefkern.version import install_line


def main(argv: list[str]) -> int:
    """Run the benchmark and return its exit status; 2 if the benchmark is not installed."""
    if importlib.util.find_spec("prefkern_bench") is None:
        return fail(
            "bench",
            f"the benchmark (prefkern_bench) is not installed: {install_line('bench')}",
        )
    from prefkern_bench import main

    return main(spelled(argv, "-"))
