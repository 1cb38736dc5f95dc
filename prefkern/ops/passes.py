"""The passes over tiles: from hidden states and the head to log-probs and gradients.

For token t with label y: `z_v = transform(h . W_v + b_v)`, `logp = z_y - logsumexp_v z_v`. Tiles of
raw products `(n, v)` are made in float32, folded into a state per token (`fold_state`), and
forgotten. With m the largest z_v, v != y, and a = exp(m - M) / s the share of `exp(z_v - m)`,

    D = d logp / d h = c ((1 - p_y) t_y W_y - a A),    A = sum_{v != y} exp(z_v - m) t_v W_v

where `c t_v` is the derivative of the transform, t_v = 1 without a softcap. `forward` accumulates A
when hidden needs a gradient, and backward is `g D`. The head's gradient is of the same numbers,

    dW_v = sum_t r_t u_tv h_t,    r = -g c a,    u_v = exp(z_v - m) t_v,    u_y = -total t_y

`forward` keeps u, unnormalised and rounded once, of the tokens that the plan has room for, and of
those the rows of hidden are scaled by r; `head_gradient` recomputes the others' as r u, and walks
the vocabulary outermost, so that each tile of dW is finished in float32 and rounded once.
Nothing kept is overwritten: a second backward with `retain_graph` reads the same.

All sums are in float32 (float64 for float64 inputs); nothing is accumulated by atomics, so two runs are bitwise equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from prefkern.ops.fold_state import FoldState, clear, finish, statistics
from prefkern.ops.operands import Buffers, Head, Operands, Transform, add_product, product
from prefkern.ops.plan import Gradients, Plan, kept_row, slices


@dataclass(frozen=True)
class HeadTerms:
    """What the head's gradient is made of, beside hidden: u, and what turns it into a gradient.

    u is relative to a unit of each token's own, m or a little more: see `prefkern_kernels.finish`.
    """

    unit: Tensor  # (N,)
    share: Tensor  # (N,) exp(unit - M) / s
    label_value: Tensor  # (N,) u_y
    kept: Tensor  # (kept tokens, V rounded up), u of the first tokens

    @staticmethod
    def empty(plan: Plan, operands: Operands, device: torch.device) -> HeadTerms:
        size = (3, plan.tokens)
        unit, share, label_value = torch.empty(size, dtype=operands.wide, device=device)
        row = kept_row(plan.vocab_size)
        kept = torch.empty((plan.kept_tokens, row), dtype=operands.dtype, device=device)
        return HeadTerms(unit, share, label_value, kept)


@dataclass(frozen=True)
class Passed:
    """What forward leaves: (N,) float32 each, unless said otherwise."""

    logps: Tensor
    stats: tuple[Tensor, Tensor, Tensor, Tensor] | None  # as `fold_state.statistics`
    derivative: Tensor | None  # D, (N, H)
    terms: HeadTerms | None
    ref_logps: Tensor | None


def forward(
    head: Head,
    rows: Tensor | None,  # (N,) which of the M tokens are scored; None: all
    labels: Tensor,  # (N,)
    transform: Transform,
    plan: Plan,
    ops: ModuleType,
    with_stats: bool = False,
    reference: Head | None = None,
    derivative: Tensor | None = None,
    terms: HeadTerms | None = None,
) -> Passed:
    """Fold all tiles, and gather what the plan's gradients need.

    A reference's hidden states go through the same tiles of the same weight, which is then read
    once for both. `derivative` and `terms` are room for what is gathered, if there is some already.
    """
    if plan.product_in_kernel:
        return _product_in_kernel(head, rows, labels, transform, plan, ops)
    N, columns = labels.shape[0], plan.state_columns
    device, wide = head.hidden.device, head.operands.wide
    tiles = plan.forward_tiles
    logps = torch.empty(N, dtype=wide, device=device)
    ref_logps = torch.empty_like(logps) if reference is not None else None
    if plan.trains_hidden and derivative is None:
        derivative = torch.empty((N, columns.width), dtype=wide, device=device)
    if plan.trains_head and terms is None:
        terms = HeadTerms.empty(plan, head.operands, device)
    state = FoldState.empty(tiles.token_tile, device, with_stats, wide)
    ref_state = FoldState.empty(tiles.token_tile, device, dtype=wide)
    buffers = Buffers(tiles, head.operands, device, plan.trains_hidden, plan.kept_tokens < N)
    stats = []

    for tokens in token_slices(plan, tiles.token_tile):
        n = tokens.stop - tokens.start
        part, ref_part = state[:n], ref_state[:n]
        y = labels[tokens]
        h = head.rows(rows, tokens)
        ref_h = reference.rows(rows, tokens) if reference is not None else None
        accumulator = derivative[tokens] if derivative is not None else None
        kept = None
        if terms is not None and tokens.stop <= plan.kept_tokens:
            kept = terms.kept[tokens, : plan.vocab_size]
        rescale = torch.empty_like(part.maximum)
        maxima = None
        if kept is not None:
            tile_count = -(-plan.vocab_size // tiles.vocab_tile)
            maxima = torch.empty((tile_count, n), dtype=wide, device=device)
        for words in slices(0, plan.vocab_size, tiles.vocab_tile):
            w, bias = head.words(words), head.bias_of(words)
            options = {"start": words.start, "first": words.start == 0, **transform.keywords()}
            place = kept[:, words] if kept is not None else None
            tile, weights = buffers.views(n, words.stop - words.start, place)
            if ref_h is not None:
                product(ref_h, w.t(), tile)
                ops.fold(tile, y, bias, *ref_part.sums(), None, None, **options)
            product(h, w.t(), tile)
            ops.fold(tile, y, bias, *part.sums(), rescale, weights, *part.moments(), **options)
            if maxima is not None:
                maxima[words.start // tiles.vocab_tile] = part.maximum
            if accumulator is not None:
                assert weights is not None
                if words.start == 0:
                    product(weights, columns.of(w), accumulator)
                else:
                    ops.rescale_rows(accumulator, rescale)
                    add_product(weights, columns.of(w), accumulator)
            # A tile's copy of the weight must be gone before the next one is made.
            del w
        del h, ref_h
        for_head = (None, None, None)
        if terms is not None:
            for_head = (terms.unit[tokens], terms.share[tokens], terms.label_value[tokens])
        indices, label_rows = y, None
        if accumulator is not None:
            indices, label_rows = head.label_rows(y)
            label_rows = columns.of(label_rows)
        ops.finish(
            *part.sums(),
            indices,
            logps[tokens],
            *for_head,
            accumulator,
            label_rows,
            factor=transform.factor,
            compute_dtype=head.operands.compute_dtype,
            operand_dtype=head.operands.dtype,
        )
        if ref_logps is not None:
            ops.finish(*ref_part.sums(), y, ref_logps[tokens])
        if kept is not None:
            unit, _, label_value = for_head
            ops.settle(kept, maxima, unit, label_value, y, tiles.vocab_tile)
        if with_stats:
            stats.append(statistics(part, finish(part), plan.vocab_size))
    joined = None
    if with_stats:
        joined = _joined(stats, logps)
    return Passed(logps, joined, derivative, terms, ref_logps)


def _product_in_kernel(
    head: Head,
    rows: Tensor | None,  # (N,)
    labels: Tensor,  # (N,)
    transform: Transform,
    plan: Plan,
    ops: ModuleType,
) -> Passed:
    """Log-probs alone, by the kernel in which product and fold are one: no logit is written."""
    device = head.hidden.device
    logps = torch.empty(plan.tokens, dtype=torch.float32, device=device)
    state = FoldState.empty(plan.forward_tiles.token_tile, device)
    for tokens in token_slices(plan, plan.forward_tiles.token_tile):
        part, y = state[: tokens.stop - tokens.start], labels[tokens]
        clear(*part.sums())
        ops.product_fold(
            head.rows(rows, tokens), head.weight, head.bias, y, *part.sums(), **transform.keywords()
        )
        ops.finish(*part.sums(), y, logps[tokens])
    return Passed(logps, None, None, None, None)


def hidden_gradient(
    grad: Tensor,  # (N,) d loss / d logp, float32
    derivative: Tensor,  # (N, H) D, or an adapter's part of it
    rows: Tensor | None,  # (N,)
    shape: torch.Size,  # (M, H)
    dtype: torch.dtype,
    ops: ModuleType,
) -> Tensor:  # (M, H)
    """g D at the tokens' places, 0 where not scored."""
    make = torch.empty if rows is None else torch.zeros
    dhidden = make(shape, dtype=dtype, device=grad.device)
    ops.scatter_scaled(derivative, grad, rows, dhidden)
    return dhidden


def head_gradient(
    grad: Tensor,  # (N,) d loss / d logp, float32
    head: Head,
    rows: Tensor | None,  # (N,)
    labels: Tensor,  # (N,)
    terms: HeadTerms,
    transform: Transform,
    plan: Plan,
    ops: ModuleType,
    gradients: Gradients,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of weight (V, H), bias (V,) and an adapter's weight (V, R), in their dtypes.

    Of kept tokens and of others.
    """
    assert plan.backward_tiles is not None
    tiles, columns = plan.backward_tiles, plan.trained_columns
    device, dtype, wide = head.hidden.device, head.operands.dtype, head.operands.wide
    lora_weight = None if head.low_rank is None else head.low_rank.weight
    make = torch.zeros_like if plan.tokens == 0 else torch.empty_like
    dweight = make(head.weight) if gradients.weight else None
    dbias = make(head.bias) if gradients.bias and head.bias is not None else None
    dlora = make(lora_weight) if gradients.lora_weight and lora_weight is not None else None
    if plan.tokens == 0:
        return dweight, dbias, dlora
    buffer = None
    if gradients.weights:
        shape = (tiles.vocab_tile, columns.width)
        buffer = torch.empty(shape, dtype=wide, device=device)
    buffers = Buffers(tiles, head.operands, device, True, plan.kept_tokens < plan.tokens)
    r = terms.share * (grad * -transform.factor)
    scale = None
    if dtype == torch.float16:
        # A power of two above the largest |r|, so that float16 holds what is scaled by r.
        scale = torch.ldexp(torch.ones_like(r[0]), torch.frexp(r.abs().amax()).exponent)
        r = r / scale

    for words in slices(0, plan.vocab_size, tiles.vocab_tile):
        size = words.stop - words.start
        w, bias = None, head.bias_of(words)
        tile_of_weights = None if buffer is None else buffer[:size]
        dbias_tile = torch.zeros(size, dtype=wide, device=device) if gradients.bias else None
        for tokens in token_slices(plan, tiles.token_tile):
            is_kept = tokens.stop <= plan.kept_tokens
            h = None
            if is_kept:
                weights = terms.kept[tokens, words]
                if tile_of_weights is not None:
                    h = head.rows(rows, tokens, columns)
                    h = (h * r[tokens].unsqueeze(1)).to(dtype)
            else:
                # r goes into the tile before it is rounded, and hidden stays as it is.
                h = head.rows(rows, tokens)
                w = head.words(words) if w is None else w
                tile, weights = buffers.views(h.shape[0], size)
                assert weights is not None
                product(h, w.t(), tile)
                ops.remake_weights(
                    tile,
                    labels[tokens],
                    bias,
                    terms.unit[tokens],
                    terms.label_value[tokens],
                    r[tokens],
                    weights,
                    start=words.start,
                    **transform.keywords(),
                )
                h = columns.of(h)
            if tile_of_weights is not None:
                assert h is not None
                add = product if tokens.start == 0 else add_product
                add(weights.t(), h, tile_of_weights)
            if dbias_tile is not None and is_kept:
                _add_column_sums(weights, r[tokens], dbias_tile)
            elif dbias_tile is not None:
                dbias_tile += weights.sum(0, dtype=wide)
            del h
        if scale is not None:
            for tile in (tile_of_weights, dbias_tile):
                if tile is not None:
                    tile.mul_(scale)
        if dbias is not None and dbias_tile is not None:
            dbias[words] = dbias_tile
        if tile_of_weights is not None:
            if dweight is not None:
                dweight[words] = tile_of_weights[:, : dweight.shape[1]]
            if dlora is not None:
                start = plan.hidden_size - columns.start
                dlora[words] = tile_of_weights[:, start : start + dlora.shape[1]]
        # A tile's copy of the weight must be gone before the next one is made.
        del w
    return dweight, dbias, dlora


def token_slices(plan: Plan, token_tile: int) -> list[slice]:
    """The tokens in tiles, of which none holds both kept ones and others."""
    kept = plan.kept_tokens
    return [*slices(0, kept, token_tile), *slices(kept, plan.tokens, token_tile)]


def _add_column_sums(weights: Tensor, factor: Tensor, out: Tensor) -> None:
    """`out_v += sum_t factor_t weights_tv`, with the factor to 16 bits where operands have 8."""
    if weights.dtype == out.dtype:
        out.addmv_(weights.t(), factor)
        return
    high = factor.to(weights.dtype)
    low = (factor - high).to(weights.dtype)
    sums = torch.empty((out.shape[0], 2), dtype=torch.float32, device=out.device)
    product(weights.t(), torch.stack([high, low], 1), sums)
    out += sums.sum(1)


def _joined(
    stats: list[tuple[Tensor, Tensor, Tensor, Tensor]],
    logps: Tensor,  # (N,)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The statistics of all token tiles; empty ones where no token is scored."""
    if not stats:
        empty = torch.empty_like(logps)
        return empty, empty, empty.bool(), empty
    entropy, mean_logit, is_top1, collision = (
        torch.cat(parts) for parts in zip(*stats, strict=True)
    )
    return entropy, mean_logit, is_top1, collision
