"""Running statistics of a batch's numbers: reduced over ranks, bias-corrected, frozen unless moved.

A batch of the whole world enters with weight `w = (1 - momentum) / (1 - momentum^t)`, t batches seen
with it: 1 for the first batch, so that nothing is pulled to an arbitrary start. Mean and variance
are merged as two samples would be,

    mean'     = mean + w (m - mean)
    variance' = (1 - w) (variance + w (m - mean)^2) + w v

which is the running mean of the first two moments without their cancellation: batches of one pair
have a variance of 0 each and still add up to the spread of the data.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


class RunningStatistics(nn.Module):
    """Mean and variance over the batches of all ranks.

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
        self.register_buffer("mean", torch.tensor(float(mean)))
        self.register_buffer("variance", torch.tensor(float(variance)))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, values: Tensor) -> None:  # (B,) of this rank
        """Move by one batch; every rank must call it. Takes no synchronisation of its own."""
        values = values.detach().double()
        count, total = all_sum(torch.stack([torch.ones_like(values).sum(), values.sum()]))
        mean = total / count
        variance = all_sum((values - mean).square().sum()) / count
        self.batches += 1
        weight: Tensor | float = 1 - self.momentum
        if self.bias_corrected:
            weight = weight / (1 - torch.pow(self.momentum, self.batches.double()))
        step = mean - self.mean
        self.variance.copy_(
            (1 - weight) * (self.variance + weight * step.square()) + weight * variance
        )
        self.mean.copy_(self.mean + weight * step)


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
