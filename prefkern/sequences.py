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
    # () how many of the N tokens, the first ones, are really scored; None: all
    live: Tensor | None = None

    def masked(self, values: Tensor) -> Tensor:  # (N,) -> (N,)
        """Values of the scored tokens, 0 of those that are only there to fill the shape."""
        if self.live is None:
            return values
        is_live = torch.arange(self.count, device=values.device) < self.live
        return torch.where(is_live, values, values.new_zeros(()))


def select(
    labels: Tensor,  # (M,) int64
    ignore_index: int,
    vocab_size: int,
    bounds: Tensor | None = None,  # (S + 1,) where each sequence begins among the M tokens
) -> Scored:
    """Find the scored tokens and check their labels, with one device synchronisation in all.

    The synchronisation cannot be had for less: N decides the shapes of what follows. The check of
    the labels' range and of `bounds` rides on it.

    While a CUDA graph is captured nothing can be synchronised with: then all M tokens are computed,
    those that are scored first, and the checks are made on the device whenever the graph runs.

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
    if is_capturing(labels):
        return _select_all(labels, mask, outside, bounds)
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
    offsets = None if bounds is None else _scored_before(mask, bounds)
    if count == labels.shape[0]:
        return Scored(None, labels, offsets, count)
    rows = _scored_first(mask)[:count]
    return Scored(rows, labels.index_select(0, rows), offsets, count)


def is_capturing(x: Tensor) -> bool:
    """Whether what is done to x is being recorded into a CUDA graph."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _select_all(
    labels: Tensor,  # (M,)
    mask: Tensor,  # (M,) which are scored
    outside: Tensor,  # (M,) which are out of range
    bounds: Tensor | None,  # (S + 1,)
) -> Scored:
    """All tokens, those that are scored first, without a synchronisation."""
    _assert_on_device(~outside.any(), "labels must be in the vocabulary or equal ignore_index")
    offsets = None
    if bounds is not None:
        rises = (bounds.diff() >= 0).all() & (bounds[0] == 0) & (bounds[-1] == labels.shape[0])
        _assert_on_device(rises, "cu_seqlens must rise from 0 to the number of tokens")
        offsets = _scored_before(mask, bounds)
    rows = _scored_first(mask)
    labels = torch.where(mask, labels, 0).index_select(0, rows)
    return Scored(rows, labels, offsets, labels.shape[0], live=mask.sum())


def _assert_on_device(holds: Tensor, message: str) -> None:
    torch._assert_async(holds, message)  # pyright: ignore[reportPrivateImportUsage]


def _scored_first(mask: Tensor) -> Tensor:  # (M,)
    """The scored tokens' indices in their order, then the others'."""
    # A stable sort, and not nonzero, which would synchronise.
    return mask.to(torch.uint8).sort(descending=True, stable=True).indices


def _scored_before(mask: Tensor, bounds: Tensor) -> Tensor:  # (S + 1,)
    """How many tokens are scored ahead of each bound."""
    before = torch.cat([mask.new_zeros(1, dtype=torch.int64), mask.cumsum(0)])
    return before.index_select(0, bounds)


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
    """Each sequence's value at each of its tokens; 0 at tokens after the last sequence."""
    sequence = torch.searchsorted(
        offsets[1:], torch.arange(count, device=offsets.device), right=True
    )
    return torch.cat([values, values.new_zeros(1)]).index_select(0, sequence)
