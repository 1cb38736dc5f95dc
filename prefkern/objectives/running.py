"""Running statistics of a batch's numbers: reduced over ranks, bias-corrected, frozen unless moved.

A batch of the whole world enters with weight `w = (1 - momentum) / (1 - momentum^t)`, t batches seen
with it: 1 for the first batch, so that nothing is pulled to an arbitrary start. Mean and variance
are merged as two samples would be,

    mean'     = mean + w (m - mean)
    variance' = (1 - w) (variance + w (m - mean)^2) + w v

which is the running mean of the first two moments without their cancellation: batches of one pair
have a variance of 0 each and still add up to the spread of the data. Numbers that are not finite
are left out: a step that overflows is skipped by a gradient scaler, and must not stay in here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Relative to the mean. Numbers that differ by less than float32 can tell have no spread: a z-score
# of them would be rounding errors blown up to 1.
LEAST_SPREAD = 1e-6


class RunningStatistics(nn.Module):
    """Mean and variance over the batches of all ranks, in float64.

    Args:
        momentum: share that the past keeps, in [0, 1).
        mean, variance: what holds before the first batch.
        bias_corrected: whether the first batch replaces those (w as above), or, if not, joins them
            (w = 1 - momentum).
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
        """Move by one batch; every rank must call it. Takes no synchronisation of its own.

        Raises RuntimeError in the recomputation of a checkpointed region.
        """
        if not torch.compiler.is_compiling() and _in_backward():
            raise RuntimeError(
                "a loss with running statistics was recomputed by activation checkpointing: they "
                "would be moved twice, and its gradient be of another loss. Checkpoint the model, "
                "not the loss"
            )
        finite = values.isfinite()
        values = torch.where(finite, values.detach().double(), 0.0)
        count, total = all_sum(torch.stack([finite.sum(dtype=torch.float64), values.sum()]))
        mean = total / count.clamp(min=1)
        distances = torch.where(finite, values - mean, 0.0)
        variance = all_sum(distances.square().sum()) / count.clamp(min=1)
        self.batches += count > 0
        weight = torch.full_like(mean, 1 - self.momentum)
        if self.bias_corrected:
            weight = weight / (1 - torch.pow(self.momentum, self.batches.clamp(min=1).double()))
        weight = torch.where(count > 0, weight, 0.0)
        step = mean - self.mean
        # Not by mul_, add_ or copy_, whose results are not used: of float64 scalars, the graphs of
        # torch.compile (2.11 to 2.13) are without such calls.
        self.variance *= 1 - weight
        self.variance += weight * ((1 - weight) * step.square() + variance)
        self.mean += weight * step

    def spread(self) -> Tensor:
        """The standard deviation; 0 where it is no more than the rounding of the numbers."""
        spread = self.variance.sqrt()
        return torch.where(spread > LEAST_SPREAD * self.mean.abs(), spread, 0.0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RunningStatistics:
        # Devices may change and dtypes not: in half precision a running mean stands still.
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = getattr(self, name)
            if after.dtype != buffer.dtype and not buffer.is_meta:
                setattr(self, name, buffer.to(after.device))
        return self


def _in_backward() -> bool:
    """Whether a backward is running in this thread, which is where regions are recomputed."""
    return torch._C._current_graph_task_id() != -1


def all_sum(values: Tensor) -> Tensor:
    """The sum over ranks, where there are any."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def gather(values: Tensor) -> tuple[Tensor, slice]:
    """The (B,) values of all ranks in their order, and where this rank's lie among them."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return values, slice(0, len(values))
    # Ranks may hold different numbers of pairs: tell the sizes first.
    size = torch.tensor([len(values)], device=values.device)
    sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    counts = torch.cat(sizes).tolist()
    padded = values.new_zeros(max(counts))
    padded[: len(values)] = values
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    start = sum(counts[: dist.get_rank()])
    everything = torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])
    return everything, slice(start, start + len(values))
