"""The passes over tiles: from hidden states and the head to log-probs, a divergence and gradients.

For token t with label y: `z_v = transform(h . W_v + b_v)`, `logp = z_y - logsumexp_v z_v`. Tiles of
raw products `(n, v)` are computed in float32 and folded into a state per token (`fold_state`); then
their memory is used again. With m the largest z_v, v != y, and a = exp(m - M) / s (`Folded.rest`),

    D = d logp / d h = c ((1 - p_y) t_y W_y - a A),    A = sum_{v != y} exp(z_v - m) t_v W_v

where `c t_v` is the derivative of the transform; t_v = 1 without a softcap. If hidden needs a
gradient, `forward` accumulates A, and backward is `g D`. The head's gradient comes from the same
numbers:

    dW_v = sum_t r_t u_tv h_t,    r = -g c a,    u_v = exp(z_v - m) t_v,    u_y = -total t_y

`forward` keeps u, unnormalised and rounded once, for the tokens that the plan has room for. For
these tokens `backward` scales the rows of hidden by r. For the others it computes r u again. The
vocabulary is its outer loop, so each tile of dW is finished in float32 and rounded once. Nothing
kept is overwritten: a second backward with `retain_graph` reads the same numbers.

A reference is an option. Through the policy's own head its log-probs are one more product. For a
divergence, `kl = sum_v r_v (log r_v - log p_v)` with the reference's logits x and probabilities
r_v, each tile has a second tile beside it, and `d kl / d z_v = p_v - r_v` adds a second term to
each gradient. A frozen head's forward accumulates

    K = d kl / d h = c (a A - a_r A_r + (p_y - r_y) t_y W_y),    A_r = sum_{v != y} exp(x_v - m_r) t_v W_v

and backward is `g D + k K`. A trained head's backward makes the tile `c ((k - g) a u_v - k a_r
u^r_v)`, with `c (g (1 - p_y) + k (p_y - r_y)) t_y` at the label, from both models' kept u or from
their logits. It multiplies this tile twice: for dW and for the gradient of hidden. Equal models
give a divergence and a K of exactly 0.

A shard of the vocabulary (`shards`) folds its entries alone. Then ranks join their states, and
each finishes its part of D and u from what is joined: a label of another rank has no row here, and
no term.

All sums are in float32 (float64 for float64 inputs). Nothing is accumulated by atomics, so two runs
are bitwise equal.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prefkern.ops.fold_state import (
    FoldState,
    clear,
    divergence,
    finish,
    label_difference,
    statistics,
)
from prefkern.ops.operands import (
    Buffers,
    Head,
    Operands,
    Raised,
    Transform,
    add_product,
    product,
)
from prefkern.ops.plan import Plan, kept_row, slices
from prefkern.ops.shards import VocabShard, join
from prefkern.ops.tile_ops import TileOps

_Numbers = tuple[Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Gathered:
    """What forward gathers for backward; None if the plan does not need it.

    u is relative to a unit, m or a little more, of each token: see `prefkern_kernels.finish`.
    """

    derivative: Tensor | None = None  # D, (N, width of the plan's state_columns)
    kl_derivative: Tensor | None = None  # K, as D
    # Of a trained head, (N,) each, and u:
    unit: Tensor | None = None
    share: Tensor | None = None  # exp(unit - M) / s
    label_value: Tensor | None = None  # u_y
    kept: Tensor | None = None  # (kept tokens, V rounded up), u of the first tokens
    # (kept tokens, tiles of forward) by which a tile's columns of `kept` are to be multiplied to be
    # relative to the unit; None: they are.
    kept_factors: Tensor | None = None
    # The same of a reference, with a divergence from it:
    ref_unit: Tensor | None = None
    ref_share: Tensor | None = None
    ref_label_value: Tensor | None = None
    ref_kept: Tensor | None = None
    difference: Tensor | None = None  # (N,) (p_y - r_y) t_y

    @staticmethod
    def empty(
        tokens: int,
        kept: int,
        vocab_size: int,
        state_width: int,  # 0: nothing is accumulated
        trains_head: bool,
        with_divergence: bool,
        operands: Operands,
        device: torch.device,
        kept_tiles: int = 0,  # 0: kept columns are brought to one unit
        by_entry: bool = False,  # `kept` lies in memory as such tiles
    ) -> Gathered:
        """Room for `tokens` tokens, of which `kept` are kept."""

        def room(is_wanted: bool, *shape: int, dtype: torch.dtype = operands.wide) -> Tensor | None:
            return torch.empty(shape, dtype=dtype, device=device) if is_wanted else None

        def of_head(is_wanted: bool) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
            return room(is_wanted, tokens), room(is_wanted, tokens), room(is_wanted, tokens)

        pairs, row = trains_head and with_divergence, kept_row(vocab_size)

        def of_kept(is_wanted: bool) -> Tensor | None:
            shape = (row, kept) if by_entry else (kept, row)
            x = room(is_wanted, *shape, dtype=operands.of_gradients)
            return x.t() if by_entry and x is not None else x

        return Gathered(
            room(state_width > 0, tokens, state_width),
            room(state_width > 0 and with_divergence, tokens, state_width),
            *of_head(trains_head),
            of_kept(trains_head),
            room(trains_head and kept_tiles > 0, kept, kept_tiles),
            *of_head(pairs),
            of_kept(pairs),
            room(pairs, tokens),
        )

    def tensors(self) -> tuple[Tensor | None, ...]:
        return tuple(vars(self).values())

    def first(self, tokens: int, kept: int) -> Gathered:
        """Views of the first tokens' part."""
        sizes = {"kept": kept, "kept_factors": kept, "ref_kept": kept}
        return Gathered(
            **{
                name: None if x is None else x[: sizes.get(name, tokens)]
                for name, x in vars(self).items()
            }
        )

    def kept_parts(
        self, tokens: slice, entries: slice, vocab_tile: int
    ) -> Iterator[tuple[slice, Tensor | None]]:
        """Some kept tokens' entries, in parts with one factor for each token; None: 1.

        Args:
            vocab_tile: of the forward pass.
        """
        if self.kept_factors is None:
            yield entries, None
            return
        at = entries.start
        while at < entries.stop:
            number = at // vocab_tile
            stop = min((number + 1) * vocab_tile, entries.stop)
            yield slice(at, stop), self.kept_factors[tokens, number]
            at = stop

    def numbers(self, tokens: slice, of_reference: bool = False) -> _Numbers:
        """unit, share and label_value of some tokens, of the policy or of the reference."""
        unit, share, label_value = self.unit, self.share, self.label_value
        if of_reference:
            unit, share, label_value = self.ref_unit, self.ref_share, self.ref_label_value
        if unit is None or share is None or label_value is None:
            return None, None, None
        return unit[tokens], share[tokens], label_value[tokens]


@dataclass(frozen=True)
class Passed:
    """What forward returns: (N,) float32 each, and what backward needs."""

    logps: Tensor
    ref_logps: Tensor | None
    kl: Tensor | None
    stats: tuple[Tensor, Tensor, Tensor, Tensor] | None  # as `fold_state.statistics`
    gathered: Gathered


@dataclass(frozen=True)
class _Side:
    """The policy or the reference in a walk over the vocabulary, for a tile of n tokens."""

    state: FoldState  # (n,)
    rescale: Tensor  # (n,)
    buffers: Buffers
    kept: Tensor | None  # (n, V), u
    maxima: Tensor | None  # (tiles, n); each tile's columns of u are relative to one
    factors: Tensor | None  # (n, tiles), see `Gathered.kept_factors`
    accumulator: Tensor | None  # (n, width of the plan's state_columns), A

    def views(self, entries: slice) -> tuple[Tensor, Tensor | None]:
        """The float32 tile of some entries, and what the second product reads."""
        place = self.kept[:, entries] if self.kept is not None else None
        size = entries.stop - entries.start
        tile, weights = self.buffers.views(self.rescale.shape[0], size, place)
        is_read = place is not None or self.accumulator is not None
        return tile, weights if is_read else None

    def as_reference(
        self, tile: Tensor, weights: Tensor | None, bias: Tensor | None
    ) -> dict[str, Any]:
        """Arguments of a fold of pairs, for this side as the reference."""
        return {
            "ref_tile": tile,
            "ref_bias": bias,
            "ref_maximum": self.state.maximum,
            "ref_total": self.state.total,
            "ref_label_logit": self.state.label_logit,
            "cross": self.state.cross,
            "ref_rescale": self.rescale,
            "ref_weights": weights,
        }

    def gather(
        self, number: int, weights: Tensor | None, w: Tensor, parts: Iterable[slice], ops: TileOps
    ) -> None:
        """Add the `number`-th tile's part to A, and store the maximum of its part of u."""
        if self.maxima is not None:
            self.maxima[number] = self.state.maximum
        if self.accumulator is None:
            return
        assert weights is not None
        if number > 0:
            ops.rescale_rows(self.accumulator, self.rescale)
        for part in parts:
            add = product if number == 0 and part.start == 0 else add_product
            add(weights[:, part], w[part], self.accumulator)


def _side(
    plan: Plan,
    tokens: slice,
    state: FoldState,  # (n,)
    buffers: Buffers,
    kept: Tensor | None,  # of all kept tokens
    factors: Tensor | None,  # of all kept tokens
    accumulator: Tensor | None,  # of all N tokens
) -> _Side:
    """The part of a tile of tokens in what a walk over all of them shares."""
    maxima = None
    if kept is not None:
        kept = kept[tokens, : plan.vocab_size] if tokens.stop <= plan.kept_tokens else None
    if kept is not None:
        count = -(-plan.vocab_size // plan.forward_tiles.vocab_tile)
        maxima = state.maximum.new_empty((count, tokens.stop - tokens.start))
    factors = None if factors is None or kept is None else factors[tokens]
    rescale = torch.empty_like(state.maximum)
    accumulator = None if accumulator is None else accumulator[tokens]
    if plan.vocab_size == 0:
        # A shard without entries: nothing is folded or added.
        clear(*state.sums(), *state.moments(), state.cross)
        if accumulator is not None:
            accumulator.zero_()
    return _Side(state, rescale, buffers, kept, maxima, factors, accumulator)


def forward(
    head: Head,
    reference: Head | None,
    rows: Tensor | None,  # (N,) which of the M tokens are scored; None: all
    labels: Tensor,  # (N,)
    transform: Transform,
    plan: Plan,
    ops: TileOps,
    with_stats: bool = False,
    gathered: Gathered | None = None,
    shard: VocabShard | None = None,
) -> Passed:
    """Fold all tiles, and gather what the plan's gradients need.

    A reference's hidden states go through the policy's head, unless the plan has a divergence from
    that reference. `gathered` is existing room for what backward needs; None: it is allocated. With
    a shard the heads have its rows, and labels are relative to its start.
    """
    if plan.product_in_kernel:
        return _product_in_kernel(head, rows, labels, transform, plan)
    N, columns, tiles = labels.shape[0], plan.state_columns, plan.forward_tiles
    logps = head.hidden.new_empty(N, dtype=head.operands.wide)
    ref_logps = torch.empty_like(logps) if reference is not None else None
    by_entry = head.operands.by_entry(plan) and gathered is None
    kl = torch.empty_like(logps) if plan.has_divergence else None
    if gathered is None:
        gathered = Gathered.empty(
            N,
            plan.kept_tokens,
            plan.vocab_size,
            0 if plan.states_in_backward or not plan.trains_hidden else columns.width,
            plan.trains_head,
            plan.has_divergence,
            head.operands,
            logps.device,
            # The rows of hidden that meet a tile are scaled in any case; a tile is rounded once.
            -(-plan.vocab_size // tiles.vocab_tile) if head.operands.rounds else 0,
            by_entry,
        )
    operands, wide = head.operands, head.operands.wide
    # A tile of tokens is finished when it is folded. Those of a shard wait for one another, and
    # then for the other ranks.
    size = tiles.token_tile if shard is None else N
    state = FoldState.empty(size, logps.device, with_stats, wide)
    ref_state = FoldState.empty(size, logps.device, dtype=wide, with_cross=plan.has_divergence)
    has_second = gathered.derivative is not None or plan.kept_tokens > 0
    has_scratch = plan.kept_tokens < N
    row = operands.row_of_tiles(plan, tiles)
    buffers = Buffers(tiles, operands, logps.device, has_second, has_scratch, by_entry, row)
    ref_buffers = buffers
    if plan.has_divergence:
        # A fold of pairs does not write it: the slope is the policy's.
        ref_state.label_slope.fill_(1.0)
        # The reference's second product is with the policy's weight, so of the policy's operands.
        ref_buffers = Buffers(tiles, operands, logps.device, has_second, has_scratch)
    heads = [each for each in (head, reference) if each is not None]
    raised = Raised(heads, tiles.vocab_tile, logps.device)
    stats, waiting = [], []

    def finish_tile(tokens: slice, policy: _Side, ref: _Side | None) -> None:
        y, is_shard = labels[tokens], shard is not None
        if kl is not None and ref is not None:
            given = (head, y, tokens, gathered, plan, transform, is_shard)
            kl[tokens] = _finish_pair(policy, ref, *given)
        numbers = gathered.numbers(tokens)
        _finish(policy, head, y, logps[tokens], numbers, plan, transform, ops, is_shard)
        if ref is not None and ref_logps is not None:
            numbers = gathered.numbers(tokens, of_reference=True)
            _finish(ref, head, y, ref_logps[tokens], numbers, plan, transform, ops, is_shard)
        if with_stats:
            vocab_size = plan.vocab_size if shard is None else shard.size
            stats.append(statistics(policy.state, finish(policy.state), vocab_size))

    for tokens in token_slices(plan, tiles.token_tile):
        y = labels[tokens]
        part = slice(0, tokens.stop - tokens.start) if shard is None else tokens
        rooms = state[part], buffers, gathered.kept, gathered.kept_factors, gathered.derivative
        policy, hidden = _side(plan, tokens, *rooms), head.rows_for_logits(rows, tokens)
        ref = ref_hidden = None
        if reference is not None:
            rooms = ref_state[part], ref_buffers, gathered.ref_kept, None, gathered.kl_derivative
            ref, ref_hidden = _side(plan, tokens, *rooms), reference.rows_for_logits(rows, tokens)
        for number, entries in enumerate(slices(0, plan.vocab_size, tiles.vocab_tile)):
            options = {"start": entries.start, "first": number == 0, **transform.keywords()}
            tile, weights = policy.views(entries)
            pair, ref_weights = {}, None
            if ref is not None and reference is not None and plan.has_divergence:
                assert ref_hidden is not None
                ref_tile, ref_weights = ref.views(entries)
                ref_w = raised.of(reference.weight_rows(entries))
                reference.operands.logits(ref_hidden, ref_w.t(), ref_tile)
                pair = ref.as_reference(ref_tile, ref_weights, reference.bias_of(entries))
            rounded, bias = head.weight_rows(entries), head.bias_of(entries)
            w = raised.of(rounded)
            if ref is not None and not plan.has_divergence:
                # One reading of the policy's weight serves both.
                assert ref_hidden is not None
                operands.logits(ref_hidden, w.t(), tile)
                ops.fold(tile, y, bias, *ref.state.sums(), None, None, **options)
            operands.logits(hidden, w.t(), tile)
            sums, moments = policy.state.sums(), policy.state.moments()
            ops.fold(tile, y, bias, *sums, policy.rescale, weights, *moments, **pair, **options)
            of_gradients = columns.of(operands.for_gradients(rounded, w))
            parts = list(operands.parts(entries.stop - entries.start, plan.vocab_size))
            policy.gather(number, weights, of_gradients, parts, ops)
            if ref is not None and plan.has_divergence:
                ref.gather(number, ref_weights, of_gradients, parts, ops)
            # The tile's copies of the weight must be freed before the next ones are made.
            del rounded, w, of_gradients
        if shard is None:
            finish_tile(tokens, policy, ref)
        else:
            waiting.append((tokens, policy, ref))
        # The next tokens' rows are made when these are gone.
        del policy, ref, hidden, ref_hidden
    if shard is not None and N > 0:
        of_reference = None if reference is None else ref_state
        has_slope = transform.softcap is not None
        factors = join(shard, labels, plan.vocab_size, has_slope, state, of_reference)
        accumulators = gathered.derivative, gathered.kl_derivative
        for accumulator, factor in zip(accumulators, factors, strict=False):
            if accumulator is not None:
                ops.rescale_rows(accumulator, factor)
        for each in waiting:
            finish_tile(*each)
    joined = _joined(stats, logps) if with_stats else None
    return Passed(logps, ref_logps, kl, joined, gathered)


def _finish(
    side: _Side,
    head: Head,
    labels: Tensor,  # (n,)
    logps: Tensor,  # (n,), out
    numbers: _Numbers,  # out
    plan: Plan,
    transform: Transform,
    ops: TileOps,
    is_shard: bool,
) -> None:
    """Finish a side: log-probs, D from A, and u relative to one unit, with the label's value."""
    indices, label_rows, derivative = labels, None, None
    if side.accumulator is not None and not plan.has_divergence:
        indices, label_rows = head.label_rows(labels, is_shard)
        derivative, label_rows = side.accumulator, plan.state_columns.of(label_rows)
    ops.finish(
        *side.state.sums(),
        indices,
        logps,
        *numbers,
        derivative,
        label_rows,
        factor=transform.factor,
        compute_dtype=head.operands.compute_dtype,
        operand_dtype=head.operands.of_gradients,
    )
    unit, _, label_value = numbers
    if side.kept is not None and side.maxima is not None and side.kept.numel():
        assert unit is not None and label_value is not None
        if side.factors is not None:
            side.factors.copy_(torch.exp(side.maxima - unit).t())
            return
        vocab_tile = plan.forward_tiles.vocab_tile
        if head.operands.rounds:
            # `backward` adds the labels' terms by themselves.
            label_value = torch.zeros_like(label_value)
        ops.settle(side.kept, side.maxima, unit, label_value, labels, vocab_tile)


def _finish_pair(
    policy: _Side,
    ref: _Side,
    head: Head,
    labels: Tensor,  # (n,)
    tokens: slice,
    gathered: Gathered,
    plan: Plan,
    transform: Transform,
    is_shard: bool,
) -> Tensor:  # (n,)
    """The divergence.

    Turns A and A_r into D and K, and stores a trained head's number at the label.
    """
    state, folded, ref_folded = policy.state, finish(policy.state), finish(ref.state)
    difference = label_difference(folded, ref_folded) * state.label_slope
    if gathered.difference is not None:
        gathered.difference[tokens] = difference
    d, k, c = policy.accumulator, ref.accumulator, transform.factor
    if d is not None and k is not None:
        d.mul_(folded.rest.unsqueeze(1))
        k.mul_(ref_folded.rest.unsqueeze(1))
        # K = c (a A - a_r A_r + (p_y - r_y) t_y W_y). Both products are rounded before they are
        # subtracted: equal ones give exactly 0.
        torch.sub(d, k, out=k)
        indices, rows = head.label_rows(labels, is_shard)
        rows = plan.state_columns.of(rows).index_select(0, indices)
        rows = rows.to(head.operands.compute_dtype).to(d.dtype)
        k.mul_(c).addcmul_(rows, (c * difference).unsqueeze(1))
        # D = c ((1 - p_y) t_y W_y - a A)
        d.mul_(-c).addcmul_(rows, (c * folded.miss * state.label_slope).unsqueeze(1))
    return divergence(state, ref.state, folded, ref_folded)


def _product_in_kernel(
    head: Head,
    rows: Tensor | None,  # (N,)
    labels: Tensor,  # (N,)
    transform: Transform,
    plan: Plan,
) -> Passed:
    """Log-probs alone, by the kernel with product and fold in one, which writes no logit."""
    import prefkern_kernels as kernels

    device = head.hidden.device
    logps = torch.empty(plan.tokens, dtype=torch.float32, device=device)
    state = FoldState.empty(plan.forward_tiles.token_tile, device)
    for tokens in token_slices(plan, plan.forward_tiles.token_tile):
        part, y = state[: tokens.stop - tokens.start], labels[tokens]
        clear(*part.sums())
        kernels.product_fold(
            head.rows(rows, tokens), head.weight, head.bias, y, *part.sums(), **transform.keywords()
        )
        kernels.finish(*part.sums(), y, logps[tokens])
    return Passed(logps, None, None, None, Gathered())


def token_slices(plan: Plan, token_tile: int) -> list[slice]:
    """The tokens in tiles; no tile has both kept tokens and others."""
    kept = plan.kept_tokens
    return [*slices(0, kept, token_tile), *slices(kept, plan.tokens, token_tile)]


def splits_tokens(plan: Plan) -> bool:
    """Whether the weight's gradient is a sum of products, of a tile of tokens each."""
    tiles = plan.backward_tiles
    return tiles is not None and len(token_slices(plan, tiles.token_tile)) > 1


def _joined(
    stats: list[tuple[Tensor, Tensor, Tensor, Tensor]],
    logps: Tensor,  # (N,)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The statistics of all token tiles; empty if no token is scored."""
    if not stats:
        empty = torch.empty_like(logps)
        return empty, empty, empty.bool(), empty
    entropy, mean_logit, is_top1, collision = (
        torch.cat(parts) for parts in zip(*stats, strict=True)
    )
    return entropy, mean_logit, is_top1, collision
