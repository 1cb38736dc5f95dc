"""Which tokens are scored, and where each sequence's scored tokens begin.

The passes see only the N scored tokens, in their order. Prompts, padding and other masked tokens
are never multiplied. A sequence is a run of scored tokens, `offsets[s] : offsets[s + 1]`, in padded
and in packed batches. `sequence_sums` alone computes a sequence's sum from per-token values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prefkern.devices import as_double, back


@dataclass(frozen=True)
class Scored:
    """The scored tokens of a flat batch of M."""

    rows: Tensor | None  # (N,) int64 into the M tokens; None where all are scored
    labels: Tensor  # (N,) int64
    offsets: Tensor | None  # (S + 1,) int64 into the N tokens; None if no bounds were given
    count: int  # N
    # (): the first so many of the N tokens are really scored; None: all
    live: Tensor | None = None
    mask: Tensor | None = None  # (M,) which tokens are really scored; None: those of `rows`

    def masked(self, values: Tensor) -> Tensor:  # (N,) -> (N,)
        """Values of the scored tokens; 0 for tokens that only fill the shape."""
        if self.live is None:
            return values
        is_live = torch.arange(self.count, device=values.device) < self.live
        return torch.where(is_live, values, values.new_zeros(()))

    def cleared(self, hidden: Tensor) -> Tensor:  # (M, H) -> (M, H)
        """Hidden states, with 0 for tokens that only fill the shape.

        Such tokens may hold NaN, and NaN times a gradient of 0 is NaN.
        """
        if self.mask is None:
            return hidden
        return torch.where(self.mask.unsqueeze(1), hidden, hidden.new_zeros(()))

    def mixed(self) -> tuple[Scored, Tensor]:  # and (N,) the place of each token in it
        """The same tokens in an order of which each run is spread over all of them.

        A tile then has tokens of chosen and of rejected sequences. Gradients of the head from these
        nearly cancel; apart, their sums would be large, and so would the errors of their rounding.
        `offsets` do not apply to that order.
        """
        # The golden section: multiples of it, modulo 1, leave no large gap.
        step = max(round(self.count * 0.6180339887), 1)
        while math.gcd(step, self.count) > 1:
            step += 1
        order = torch.arange(self.count, device=self.labels.device) * step % max(self.count, 1)
        rows = order if self.rows is None else self.rows.index_select(0, order)
        places = torch.argsort(order)
        return replace(self, rows=rows, labels=self.labels.index_select(0, order)), places


def select(
    labels: Tensor,  # (M,) int64
    ignore_index: int,
    vocab_size: int,
    bounds: Tensor | None = None,  # (S + 1,) int64, where each sequence begins among the M tokens
    checks_bounds: bool = True,
) -> Scored:
    """Find the scored tokens and check their labels, with one device synchronisation in all.

    One synchronisation is needed: N decides the shapes of what follows. The same one fetches the
    check of the labels' range, and that of `bounds`, unless these are known to be right.

    While a CUDA graph is captured, synchronisation is not possible. Then all M tokens are computed,
    the scored ones first, and the checks run on the device at each replay.

    Raises ValueError for a label outside [0, vocab_size) that is not ignore_index, and for bounds
    that do not rise from 0 to M.
    """
    # Kernels read labels without strides, so views are made contiguous.
    labels = labels.contiguous()
    mask = labels != ignore_index
    # How many are scored before each token, and in all.
    before = torch.nn.functional.pad(mask.cumsum(0), (1, 0))
    # The range of scored labels; a label that is not scored counts as entry 0.
    masked_labels = labels * mask if labels.numel() else labels.new_zeros(1)
    least, largest = torch.aminmax(masked_labels)
    facts = [before[-1], least, largest]
    if bounds is not None and checks_bounds:
        facts += [bounds.diff().min(), bounds[0], bounds[-1]]
    if is_capturing(labels):
        return _select_all(masked_labels, mask, before, vocab_size, bounds, facts)
    count, least, largest, *rise = torch.stack(facts).tolist()
    if least < 0 or largest >= vocab_size:
        outside = labels[mask & ((labels < 0) | (labels >= vocab_size))]
        raise ValueError(
            f"labels must be in [0, {vocab_size}) or equal ignore_index ({ignore_index}); "
            f"{len(outside)} of {labels.numel()} are not, the first of them {outside[0].item()}"
        )
    if bounds is not None and rise and (rise[0] < 0 or rise[1:] != [0, labels.shape[0]]):
        raise ValueError(
            f"cu_seqlens must rise from 0 to the number of tokens, {labels.shape[0]}; "
            f"got {bounds.tolist()}"
        )
    offsets = None if bounds is None else before.index_select(0, bounds)
    if count == labels.shape[0]:
        return Scored(None, labels, offsets, count)
    # The k-th scored token is the first one with a count of k; nonzero would synchronise.
    rows = torch.searchsorted(before[1:], torch.arange(1, count + 1, device=labels.device))
    return Scored(rows, labels.index_select(0, rows), offsets, count)


def is_capturing(x: Tensor) -> bool:
    """Whether operations on x are being recorded into a CUDA graph."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _select_all(
    masked_labels: Tensor,  # (M,) labels, 0 where not scored
    mask: Tensor,  # (M,) which are scored
    before: Tensor,  # (M + 1,) how many are scored before each token
    vocab_size: int,
    bounds: Tensor | None,  # (S + 1,)
    facts: list[Tensor],  # as `select` has them
) -> Scored:
    """All tokens, the scored ones first, without a synchronisation."""
    live, least, largest, *rise = facts
    in_vocabulary = (least >= 0) & (largest < vocab_size)
    _assert_on_device(in_vocabulary, "labels must be in the vocabulary or equal ignore_index")
    if rise:
        rises = (rise[0] >= 0) & (rise[1] == 0) & (rise[2] == len(masked_labels))
        _assert_on_device(rises, "cu_seqlens must rise from 0 to the number of tokens")
    # A stable sort: the scored tokens in their order, then the others.
    rows = mask.to(torch.uint8).sort(descending=True, stable=True).indices
    offsets = None if bounds is None else before.index_select(0, bounds)
    return Scored(
        rows, masked_labels.index_select(0, rows), offsets, len(masked_labels), live, mask
    )


def _assert_on_device(holds: Tensor, message: str) -> None:
    torch._assert_async(holds, message)  # pyright: ignore[reportPrivateImportUsage]


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
        return back(_sums(values, offsets), values)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        (offsets,) = ctx.saved_tensors
        return spread(grads[0], offsets, ctx.count), None


def _sums(values: Tensor, offsets: Tensor) -> Tensor:  # (N,), (S + 1,) -> (S,) float64
    values = as_double(values)
    if values.shape[0] == 0:
        return values.new_zeros(offsets.shape[0] - 1)
    offsets = offsets.to(values.device)
    return torch.segment_reduce(values, "sum", offsets=offsets, initial=0.0, unsafe=True)


def pair_parts(offsets: Tensor, responses: int = 2) -> Tensor:  # (S + 1,) -> (2S + 1,)
    """Where the two parts of each sequence begin: as many tokens as both of its pair have; the rest.

    The first B sequences are chosen responses, the next their rejected ones, in the same order. Of
    three `responses` the last, gold one has no second part.
    """
    chosen, rejected, *gold = offsets.diff().chunk(responses)
    shared = torch.cat([torch.minimum(chosen, rejected).repeat(2), *gold])
    cuts = torch.stack([offsets[:-1], offsets[:-1] + shared], dim=1)
    return torch.cat([cuts.flatten(), offsets[-1:]])


def part_sums(
    values: Tensor,  # (N,) float32
    parts: Tensor,  # (2S + 1,) int64, from `pair_parts`
    alpha: float,
) -> tuple[Tensor, Tensor]:  # (S,) each
    """The sums of each sequence's values: with weight `alpha` on the second part, and with 1.

    As `sequence_sums`. A token's gradient is one of two numbers of its sequence.
    """
    return _PartSums.apply(values, parts, alpha)


class _PartSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, parts: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(parts)
        ctx.count, ctx.alpha = values.shape[0], alpha
        first, second = _sums(values, parts).view(-1, 2).unbind(1)
        # A weight of 0 leaves the second part out, even where it is -inf.
        weighed = first + alpha * second if alpha else first
        return back(weighed, values), back(first + second, values)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:
        (parts,) = ctx.saved_tensors
        weighed, whole = grads
        return spread_parts(weighed, whole, ctx.alpha, parts, ctx.count), None, None


def spread_parts(
    weighed: Tensor,  # (S,), the gradients of what `part_sums` returns
    whole: Tensor,  # (S,)
    alpha: float,
    parts: Tensor,  # (2S + 1,)
    count: int,
) -> Tensor:  # (N,)
    # d weighed / d value = 1 in the first part and alpha in the second; d whole / d value = 1.
    per_part = torch.stack([weighed + whole, alpha * weighed + whole], dim=1)
    return spread(per_part.flatten(), parts, count)


def spread(values: Tensor, offsets: Tensor, count: int) -> Tensor:  # (S,) -> (N,)
    """Each sequence's value at each of its tokens; tokens after the last sequence get any value."""
    tokens = torch.arange(count, device=offsets.device)
    return values.index_select(0, torch.searchsorted(offsets[1:-1], tokens, right=True))
