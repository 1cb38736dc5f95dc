"""`prefkern bench`: prefkern beside its peers, in time, memory, operations and error.

Three suites: "operator" is log-probs and their gradients alone, "loss" a DPO step over them,
reference included, in a padded batch (both in `suites.py`), "step" the whole training step of a
model (`step.py`). The providers are in `providers.py`, the sizes in `shapes.py`.

Operations are matrix products, counted, in units of NHV (N scored tokens x hidden size x
vocabulary). Memory is the most alive beyond the inputs, gradients included: on CUDA by the caching
allocator's record, on a CPU by torch's operators. Times are medians, by events on CUDA, of rounds in
which every provider has its turn, and beside them stands how many times as long they are as a plain
product of the same operations, timed in the same rounds. Errors are against float64: the worst
absolute error of a log-prob in nats, of a token and of a sequence's sum, and the relative error
|x - truth| / |truth| of dH and dW.

A provider that is missing, refuses a shape or runs out of memory is a row that says so. On a machine
without a GPU shapes are smaller, and times mean little.
"""

from prefkern_bench.command import main
from prefkern_bench.report import environment

__all__ = ["environment", "main"]
