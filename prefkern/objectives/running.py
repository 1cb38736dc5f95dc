"""Running mean and variance of batches: over all ranks, bias-corrected, fixed in evaluation.

A batch, over all ranks, enters with weight `w = (1 - momentum) / (1 - momentum^t)`, where t counts
the batches so far. For the first one w is 1, so that no arbitrary start pulls on the statistics.
Mean and variance are merged as those of two samples,

    mean'     = mean + w (m - mean)
    variance' = (1 - w) (variance + w (m - mean)^2) + w v

This equals the running mean of the first two moments, without their cancellation: batches of one
pair have a variance of 0 each and still add up to the spread of the data. Numbers that are not
finite are left out: a gradient scaler skips a step that overflows, and so must the statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from prefkern.devices import as_double, has_float64

# Relative to the mean. Numbers whose differences are below float32's precision have no spread:
# their z-scores would be rounding errors of size 1.
LEAST_SPREAD = 1e-6


class RunningStatistics(nn.Module):
    """Mean and variance over the batches of all ranks, in float64.

    Args:
        momentum: weight of earlier batches, in [0, 1); 1, if bias-corrected, is its limit: each
            batch so far has the same weight.
        mean, variance: the values before the first batch.
        bias_corrected: the first batch replaces those values (w as above); False: it is merged into
            them (w = 1 - momentum).
    """

    mean: Tensor
    variance: Tensor
    batches: Tensor

    def __init__(
        self,
        momentum: float,
        mean: float = 0.0,
        variance: float = 0.0,
        bias_corrected: bool = True,
    ) -> None:
        super().__init__()
        self.momentum = momentum
        self.bias_corrected = bias_corrected
        self.register_buffer("mean", torch.tensor(float(mean), dtype=torch.float64))
        self.register_buffer("variance", torch.tensor(float(variance), dtype=torch.float64))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, values: Tensor) -> None:  # (B,) of this rank
        """Merge a batch into the statistics, without a synchronisation. Every rank must call it.

        Raises RuntimeError in the recomputation of a checkpointed region.
        """
        if not torch.compiler.is_compiling() and _in_backward():
            raise RuntimeError(
                "activation checkpointing recomputed a loss with running statistics: they would "
                "move twice, and the gradient would be of another loss. Checkpoint the model, "
                "not the loss"
            )
        values = as_double(values.detach())
        finite = values.isfinite()
        values = torch.where(finite, values, 0.0)
        count, total = all_sum(torch.stack([finite.sum(dtype=torch.float64), values.sum()]))
        mean = total / count.clamp(min=1)
        distances = torch.where(finite, values - mean, 0.0)
        variance = all_sum(distances.square().sum()) / count.clamp(min=1)
        self.batches += count > 0
        weight = torch.full_like(mean, 1 - self.momentum)
        if self.bias_corrected and self.momentum == 1:
            weight = 1 / self.batches.clamp(min=1).double()
        elif self.bias_corrected:
            weight = weight / (1 - torch.pow(self.momentum, self.batches.clamp(min=1).double()))
        weight = torch.where(count > 0, weight, 0.0)
        step = mean - self.mean
        # Not mul_, add_ or copy_: on float64 scalars, torch.compile (2.11 to 2.13) drops such calls
        # from its graph, since nothing uses their result.
        self.variance *= 1 - weight
        self.variance += weight * ((1 - weight) * step.square() + variance)
        self.mean += weight * step

    def spread(self) -> Tensor:
        """The standard deviation; 0 where it is within the rounding of the numbers."""
        spread = self.variance.sqrt()
        return torch.where(spread > LEAST_SPREAD * self.mean.abs(), spread, 0.0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RunningStatistics:
        # They stay where there is float64; see `prefkern.devices`.
        if not has_float64(fn(self.batches).device):
            return self
        # The device may change, the dtype may not: in half precision a running mean stops moving.
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = getattr(self, name)
            if after.dtype != buffer.dtype and not buffer.is_meta:
                setattr(self, name, buffer.to(after.device))
        return self


def _in_backward() -> bool:
    """Whether this thread runs a backward, which is where checkpointing recomputes a region."""
    return torch._C._current_graph_task_id() != -1


# Groups whose ranks have the same items as this one: of its sequences, and of its vocabulary.
_sharing: tuple[dist.ProcessGroup | None, dist.ProcessGroup | None] = (None, None)


@contextmanager
def counted_once(
    sequence_group: dist.ProcessGroup | None, vocab_group: dist.ProcessGroup | None
) -> Iterator[None]:
    """In this region the ranks of each group have the same items, which count once.

    They count on the rank that is the first of both groups. None: that of the region around it.
    """
    global _sharing
    before = _sharing
    _sharing = (sequence_group or before[0], vocab_group or before[1])
    try:
        yield
    finally:
        _sharing = before


def _has_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def all_sum(values: Tensor) -> Tensor:
    """The sum over ranks; the values themselves in a single process."""
    if _has_ranks():
        if any(group is not None and dist.get_rank(group) for group in _sharing):
            values = torch.zeros_like(values)
        dist.all_reduce(values)
    return values


def gather(values: Tensor) -> tuple[Tensor, slice]:
    """The (B, ...) values of all ranks in their order, and where this rank's lie among them."""
    if not _has_ranks():
        return values, slice(0, len(values))
    rank = dist.get_rank()
    # Ranks may hold different numbers of pairs: exchange the sizes first, and with them the first
    # rank of each group.
    firsts = [rank if group is None else dist.get_global_rank(group, 0) for group in _sharing]
    own = torch.tensor([len(values), *firsts], device=values.device)
    theirs = [torch.zeros_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(theirs, own)
    sizes, *heads = torch.stack(theirs).unbind(1)
    # The rank that counts a rank's items: the first of its first one's other group.
    counting = heads[1][heads[0]].tolist()
    counts = [size if counting[each] == each else 0 for each, size in enumerate(sizes.tolist())]
    padded = values.new_zeros(max(counts), *values.shape[1:])
    padded[: len(values)] = values
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    start = sum(counts[: counting[rank]])
    everything = torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])
    return everything, slice(start, start + len(values))
