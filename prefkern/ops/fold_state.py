"""A token's fold state: sums over its logits, gathered tile by tile, and the results of them.

The state leaves the label's column out: with m the maximum over v != y so far, `total = sum_{v !=
y} exp(z_v - m)`. At the end, with M = max(m, z_y) and s the sum over all v relative to M,

    logp    = -log1p(total exp(m - z_y))           if z_y >= m: exact for confident tokens
    1 - p_y = total exp(m - M) / s                 without cancellation

The state is a value. `merge` makes the state of a vocabulary from the states of two parts of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass
class FoldState:
    """Sums over the logits of N tokens in a part of the vocabulary; (N,) float32 each.

    They do not depend on the kernel, the tiles or the rank that computed them, so the states of two
    parts of the vocabulary can be merged.
    """

    maximum: Tensor  # m, over v != y
    total: Tensor  # sum_{v != y} exp(z_v - m)
    label_logit: Tensor  # z_y; -inf where y is in another part
    label_slope: Tensor  # t_y; 1 where y is in another part
    # With statistics:
    shifted: Tensor | None = None  # sum_{v != y} exp(z_v - m) (z_v - m)
    logit_sum: Tensor | None = None  # sum_v z_v
    before: Tensor | None = None  # max_{v < y} z_v
    squares: Tensor | None = None  # sum_{v != y} exp(2 (z_v - m))
    # Of a reference, with a divergence:
    cross: Tensor | None = None  # sum_{v != y} exp(x_v - m) (x_v - z_v), z the policy's logits

    @staticmethod
    def empty(
        tokens: int,
        device: torch.device,
        with_stats: bool = False,
        dtype: torch.dtype = torch.float32,
        with_cross: bool = False,
    ) -> FoldState:
        """Room for a state. Its numbers are arbitrary until `clear` or a first `fold`."""
        size = (4 + 4 * with_stats + with_cross, tokens)
        vectors = [*torch.empty(size, dtype=dtype, device=device)]
        cross = vectors.pop() if with_cross else None
        return FoldState(*vectors, cross=cross)

    def sums(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.maximum, self.total, self.label_logit, self.label_slope

    def moments(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """The sums that statistics need beside `sums`."""
        return self.shifted, self.logit_sum, self.before, self.squares

    def __getitem__(self, tokens: slice) -> FoldState:
        """The state of some tokens, a view."""
        vectors = (*self.sums(), *self.moments(), self.cross)
        return FoldState(*(None if x is None else x[tokens] for x in vectors))  # pyright: ignore[reportArgumentType]

    def merge(self, other: FoldState) -> FoldState:
        """The state over both parts of the vocabulary, for the same tokens and labels.

        Either both states have statistics, or neither; the same holds for `cross`. The order does
        not matter.
        """
        maximum = torch.maximum(self.maximum, other.maximum)
        (mine, _), (others, _) = self.relative_to(maximum), other.relative_to(maximum)
        return FoldState(
            maximum,
            mine.total + others.total,
            torch.maximum(self.label_logit, other.label_logit),
            self.label_slope * other.label_slope,
            _of_both(torch.add, mine.shifted, others.shifted),
            _of_both(torch.add, self.logit_sum, other.logit_sum),
            _of_both(torch.maximum, self.before, other.before),
            _of_both(torch.add, mine.squares, others.squares),
            _of_both(torch.add, mine.cross, others.cross),
        )

    def relative_to(self, maximum: Tensor) -> tuple[FoldState, Tensor]:
        """The same state with its sums relative to a maximum that is not smaller.

        Also exp(m - maximum), by which the part's `A` is multiplied.
        """
        # If the parts hold no logit but the label's, this is exp(-inf - 0) = 0.
        offset = torch.where(maximum == -math.inf, 0.0, maximum)
        factor = torch.exp(self.maximum - offset)
        shifted = None
        if self.shifted is not None:
            # z - m' = (z - m) + (m - m'), for a part that has a logit besides the label's.
            moved = torch.where(self.total > 0, (self.maximum - offset) * self.total, 0.0)
            shifted = (self.shifted + moved) * factor
        part = replace(
            self,
            maximum=maximum,
            total=self.total * factor,
            shifted=shifted,
            squares=None if self.squares is None else self.squares * factor * factor,
            cross=None if self.cross is None else self.cross * factor,
        )
        return part, factor


def _of_both(
    function: Callable[[Tensor, Tensor], Tensor], mine: Tensor | None, others: Tensor | None
) -> Tensor | None:
    return None if mine is None or others is None else function(mine, others)


def clear(*vectors: Tensor | None) -> None:
    """Begin a state, given its vectors in their order; a first `fold` does it by itself."""
    beginnings = (-math.inf, 0.0, -math.inf, 1.0, 0.0, 0.0, -math.inf, 0.0, 0.0)
    for vector, beginning in zip(vectors, beginnings, strict=False):
        if vector is not None:
            vector.fill_(beginning)


def largest_total(dtype: torch.dtype) -> float:
    """The largest sum that one number of this dtype may stand for, with some room above."""
    return torch.finfo(dtype).max / 4


@dataclass(frozen=True)
class Folded:
    """The results of a finished fold, (N,) float32 each."""

    logps: Tensor
    maximum: Tensor  # M, over all v
    total: Tensor  # s = sum_v exp(z_v - M)
    rest: Tensor  # exp(m - M) / s; times `A` it is sum_{v != y} p_v t_v W_v
    miss: Tensor  # 1 - p_y
    hit: Tensor  # p_y
    log_total: Tensor  # log s


def finish(state: FoldState) -> Folded:
    """Combine the label's own logit with the fold over the others."""
    m, label = state.maximum, state.label_logit
    confident = label >= m
    top = torch.maximum(m, label)
    # If the label is the only entry, this is exp(-inf) = 0, and total is 0 too.
    drop = torch.exp(m - top)
    own = torch.exp(label - top)
    total = state.total * drop + own
    log_total = torch.where(confident, torch.log1p(state.total * drop), torch.log(total))
    # If the label's logit is the largest, label - top is 0; or NaN for inf, which has no softmax.
    logps = (label - top) - log_total
    miss = state.total * drop / total
    return Folded(logps, top, total, drop / total, miss, own / total, log_total)


def statistics(
    state: FoldState, folded: Folded, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Entropy, mean logit, is_top1 and log sum_v p_v^2, (N,) each, from a fold with statistics."""
    assert state.shifted is not None and state.logit_sum is not None
    assert state.before is not None and state.squares is not None
    # entropy = log s - sum_v p_v (z_v - M); for a confident token every term is small.
    drop = torch.exp(state.maximum - folded.maximum)
    moved = torch.where(
        state.total > 0, (state.maximum - folded.maximum) * state.total, torch.zeros_like(drop)
    )
    below = state.label_logit - folded.maximum
    own = torch.where(below > -math.inf, torch.exp(below) * below, torch.zeros_like(drop))
    spread = (state.shifted + moved) * drop + own
    entropy = torch.log(folded.total) - spread / folded.total
    # argmax takes the first maximum, so a tie with an earlier entry is not a top-1 prediction.
    is_top1 = (state.label_logit >= state.maximum) & (state.label_logit > state.before)
    # sum_v p_v^2 = (1 + others) / s^2; the 1 is the label's own term if its logit is the largest.
    # For a confident token both logarithms are then small numbers, computed from small numbers.
    others = state.squares * drop * drop
    collision = torch.where(
        state.label_logit >= state.maximum,
        torch.log1p(others) - 2 * torch.log1p(state.total * drop),
        torch.log(others + torch.exp(2 * below)) - 2 * torch.log(folded.total),
    )
    # It is the logarithm of a probability; rounding may put it above 0.
    return entropy, state.logit_sum / vocab_size, is_top1, collision.clamp(max=0.0)


def divergence(
    state: FoldState, ref_state: FoldState, folded: Folded, ref_folded: Folded
) -> Tensor:  # (N,)
    """`sum_v r_v (log r_v - log p_v)`; all terms are small if both models trust the label."""
    # kl = sum_{v != y} r_v (x_v - z_v) + r_y (x_y - z_y) - (M_r - M) - (log s_r - log s)
    assert ref_state.cross is not None
    gap = ref_state.label_logit - state.label_logit
    confident = (state.label_logit >= state.maximum) & (ref_state.label_logit >= ref_state.maximum)
    # Then M_r - M is the label's gap, and r_y gap - gap = -(1 - r_y) gap.
    own = torch.where(
        confident,
        -ref_folded.miss * gap,
        # A label that the reference rules out adds nothing, and its gap is not finite.
        torch.where(ref_folded.hit > 0, ref_folded.hit * gap, 0.0)
        - (ref_folded.maximum - folded.maximum),
    )
    kl = ref_folded.rest * ref_state.cross + own - (ref_folded.log_total - folded.log_total)
    # A divergence is not negative: if rounding puts it below 0, then 0 is nearer to the truth. The
    # gradient comes from the probabilities, and does not depend on this bound.
    return kl.clamp(min=0.0)


def label_difference(folded: Folded, ref_folded: Folded) -> Tensor:  # (N,)
    """p_y - r_y, computed from p_y or from 1 - p_y, whichever is smaller."""
    return torch.where(
        folded.miss < 0.5, ref_folded.miss - folded.miss, folded.hit - ref_folded.hit
    )
