"""Processes that compute a batch together: their pairs count once.

Under tensor parallelism and context parallelism several processes have the same batch. Accelerate's
loaders know that: they give these processes, whose ranks follow one another, the same pairs. What is
gathered or summed over all processes has each pair as often as there are processes to a batch.
"""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from torch import Tensor


def ranks_a_batch(accelerator: Accelerator) -> int:
    """How many processes compute each batch together."""
    given: Any = accelerator.parallelism_config
    return 1 if given is None else given.tp_size * given.cp_size


def shares_batches(accelerator: Accelerator) -> bool:
    """Whether all processes have the same batch, and compute it together."""
    count = ranks_a_batch(accelerator)
    return count > 1 and count == accelerator.num_processes


def gathered_once(values: Tensor, accelerator: Accelerator) -> Tensor:  # (B, ...)
    """Values of all ranks' pairs, each pair once, without those that pad the ranks' last batch."""
    if shares_batches(accelerator):
        return values
    if ranks_a_batch(accelerator) == 1:
        return accelerator.gather_for_metrics(values)  # pyright: ignore[reportReturnType]
    gathered: Any = accelerator.gather(values)
    by_rank = gathered.unflatten(0, (-1, len(values)))
    gathered = by_rank[:: ranks_a_batch(accelerator)].flatten(0, 1)
    state = accelerator.gradient_state
    padded = state.end_of_dataloader and state.remainder > 0
    return gathered[: state.remainder] if padded else gathered
