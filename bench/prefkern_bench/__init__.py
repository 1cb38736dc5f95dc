"""`prefkern bench`: compares prefkern with its peers in time, memory, operations and error.

There are three suites. "operator" measures only log-probs and their gradients. "loss" measures a
DPO step on them, with its reference, in a padded batch. Both are in `suites.py`. "step" measures
the whole training step of a model (`step.py`). The providers are in `providers.py`, the sizes in
`shapes.py`.

Operations are the counted matrix products, in units of NHV (N scored tokens x hidden size x
vocabulary). Memory is the peak beyond the inputs, gradients included: on CUDA from the caching
allocator, on a CPU counted over torch's operators. Times are medians over rounds in which every
provider runs once, by events on CUDA. Each time is also given as a multiple of the time of a plain
product with as many operations, timed in the same rounds. Errors are against float64: the worst
absolute error of a log-prob in nats, for a token and for a sequence's sum, and the relative error
|x - truth| / |truth| of dH and dW.

If a provider is missing, refuses a shape or runs out of memory, its row says so. On a machine
without a GPU the shapes are smaller, and the times mean little.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prefkern_bench.report import environment

__all__ = ["environment", "main"]


def main(argv: list[str]) -> int:
    """Read the options, run the benchmark and print its tables; returns the exit status."""
    from prefkern_bench.options import parse

    # Help and errors need no torch.
    arguments = parse(argv)

    from prefkern_bench.command import measure

    return measure(arguments, shlex.join(["prefkern", "bench", *argv]))


def __getattr__(name: str) -> object:
    if name != "environment":
        raise AttributeError(f"module 'prefkern_bench' has no attribute {name!r}")
    from prefkern_bench.report import environment

    return environment
