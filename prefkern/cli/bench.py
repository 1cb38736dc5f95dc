"""`prefkern bench`: the benchmark, which is a package of its own, `prefkern_bench`."""

from __future__ import annotations

import importlib.util

from prefkern.cli.arguments import fail


def main(argv: list[str]) -> int:
    """Run the benchmark; 2, with what to install, where it is missing."""
    if importlib.util.find_spec("prefkern_bench") is None:
        return fail(
            "bench",
            "the benchmark (prefkern_bench) is not installed: pip install '.[bench]' in a clone of "
            "prefkern",
        )
    from prefkern_bench.command import main

    return main(argv)
