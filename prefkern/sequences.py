"""Which tokens are scored, and where each sequence's scored tokens begin.

The passes see only the N scored tokens, in their order: prompts, padding and whatever else is
masked are never multiplied. Sequences are then runs of those tokens, `offsets[s] : offsets[s + 1]`,
whether the batch came padded or packed; `sequence_sums` is the one place where a sequence's sum is
formed from per-token values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scored:
    """The scored tokens of a flat batch of M."""

    rows: Tensor | None  # (N,) int64 into the M tokens; None where all are scored
    labels: Tensor  # (N,) int64
    offsets: Tensor | None  # (S + 1,) int64 into the N tokens; None where not asked for
    count: int  # N


def select(
    labels: Tensor,  # (M,) int64
    ignore_index: int,
    vocab_size: int,
    bounds: Tensor | None = None,  # (S + 1,) where each sequence begins among the M tokens
) -> Scored:
    """Find the scored tokens and check their labels, with one device synchronisation in all.

    The synchronisation cannot be had for less: N decides the shapes of what follows. The check of
    the labels' range and of `bounds` rides on it.

    Raises ValueError for a label outside [0, vocab_size) that is not ignore_index, and for bounds
    that do not rise from 0 to M.
    """
    # What follows, kernels included, walks labels one by one: no strides, no expanded views.
    labels = labels.contiguous()
    mask = labels != ignore_index
    outside = mask & ((labels < 0) | (labels >= vocab_size))
    checks = [mask.sum(), outside.sum()]
    if bounds is not None:
        bounds = bounds.long()
        checks += [(bounds.diff() < 0).sum(), bounds[0], bounds[-1]]
    count, n_outside, *bound_checks = torch.stack(checks).tolist()
    if n_outside:
        first = labels[outside][0].item()
        raise ValueError(
            f"labels must be in [0, {vocab_size}) or equal ignore_index ({ignore_index}); "
            f"{n_outside} of {labels.numel()} are not, the first of them {first}"
        )
    if bounds is not None and bound_checks != [0, 0, labels.shape[0]]:
        raise ValueError(
            f"cu_seqlens must rise from 0 to the number of tokens, {labels.shape[0]}; "
            f"got {bounds.tolist()}"
        )
    offsets = None
    if bounds is not None:
        before = torch.cat([mask.new_zeros(1, dtype=torch.int64), mask.cumsum(0)])
        offsets = before.index_select(0, bounds)
    if count == labels.shape[0]:
        return Scored(None, labels, offsets, count)
    # A stable sort, and not nonzero, which would synchronise again.
    rows = mask.to(torch.uint8).sort(descending=True, stable=True).indices[:count]
    return Scored(rows, labels.index_select(0, rows), offsets, count)


def sequence_sums(
    values: Tensor,  # (N,) float32
    offsets: Tensor,  # (S + 1,) int64
) -> Tensor:  # (S,) float32
    """The sum of each sequence's values; 0 for an empty one. Added in float64, rounded once.

    Differentiable, deterministic, and without a synchronisation.
    """
    return _SequenceSums.apply(values, offsets)


class _SequenceSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(offsets)
        ctx.count = values.shape[0]
        if values.shape[0] == 0:
            return values.new_zeros(offsets.shape[0] - 1)
        sums = torch.segment_reduce(
            values.double(), "sum", offsets=offsets, initial=0.0, unsafe=True
        )
        return sums.to(values.dtype)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        (offsets,) = ctx.saved_tensors
        return spread(grads[0], offsets, ctx.count), None


def spread(values: Tensor, offsets: Tensor, count: int) -> Tensor:  # (S,) -> (N,)
    """Each sequence's value at each of its tokens."""
    return values.repeat_interleave(offsets.diff(), output_size=count)
