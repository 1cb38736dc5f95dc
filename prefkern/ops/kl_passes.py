"""The passes over pairs of tiles: a policy's log-probs, and its divergence from a reference.

For each token, with z the policy's transformed logits, x the reference's, p and r their softmax:

    kl = sum_v r_v (log r_v - log p_v) = sum_v r_v (x_v - z_v) - (lse_r - lse_p)

A tile of z and the tile of x over the same words are made in float32, folded into two states (see
`passes`; the label y is left out of their sums) and `cross = sum_{v != y} exp(x_v - m_r) (x_v -
z_v)`, and forgotten. The gradients are the policy's alone:

    d logp / d z_v = [v = y] - p_v        d kl / d z_v = p_v - r_v

so that with A and A_r the sums of `exp(z_v - m) t_v W_v` and `exp(x_v - m_r) t_v W_v` over v != y,
accumulated in the same pass when asked, and a = exp(m - M) / s for either state,

    D = d logp / d h = c ((1 - p_y) t_y W_y - a A)
    K = d kl / d h   = c (a A - a_r A_r + (p_y - r_y) t_y W_y)

and backward is `g D + k K`, without a product. `backward` is the second pass, where the head trains.

Numerics are those of `passes`. Policy and reference go through the same operations in the same
order, so equal models give a divergence and a K of exactly 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from prefkern.ops.fold_state import Folded, FoldState, clear, finish
from prefkern.ops.operands import Buffers, Head, Transform, add_product, product
from prefkern.ops.plan import Plan, Tiles, slices


@dataclass(frozen=True)
class FoldedPair:
    """The end of a fold of pairs: (N,) float32 each, but for the derivatives."""

    policy: Folded
    reference: Folded
    kl: Tensor
    label_difference: Tensor  # p_y - r_y
    derivatives: tuple[Tensor, Tensor] | None  # D and K, (N, H) float32, of "one_pass"


def forward(
    policy: Head,
    reference: Head,
    rows: Tensor | None,  # (N,) which of the M tokens are scored; None: all
    labels: Tensor,  # (N,)
    transform: Transform,
    plan: Plan,
    ops: ModuleType,
) -> FoldedPair:
    """Fold all pairs of tiles; with plan.structure "one_pass" also accumulate D and K."""
    N, H = labels.shape[0], policy.hidden.shape[1]
    device, wide = policy.hidden.device, policy.operands.wide
    one_pass = plan.structure == "one_pass"
    state = FoldState.empty(N, device, dtype=wide)
    ref_state = FoldState.empty(N, device, dtype=wide)
    clear(*state.sums())
    clear(*ref_state.sums())
    cross = torch.zeros(N, dtype=wide, device=device)
    derivatives = None
    if one_pass:
        derivatives = (
            torch.empty((N, H), dtype=wide, device=device),
            torch.empty((N, H), dtype=wide, device=device),
        )
    # Both second products are with the policy's weight, hence of its operands.
    buffers = Buffers(plan.forward_tiles, policy.operands, device, one_pass)
    ref_buffers = Buffers(plan.forward_tiles, policy.operands, device, one_pass)

    for tokens in slices(0, N, plan.forward_tiles.token_tile):
        part, ref_part = state[tokens], ref_state[tokens]
        h, ref_h = policy.rows(rows, tokens), reference.rows(rows, tokens)
        rescale = torch.empty_like(part.maximum) if one_pass else None
        ref_rescale = torch.empty_like(part.maximum) if one_pass else None
        for words in slices(0, policy.weight.shape[0], plan.forward_tiles.vocab_tile):
            shape = h.shape[0], words.stop - words.start
            ref_tile, ref_weights = ref_buffers.views(*shape)
            # A tile's copy of the reference's weight must be gone before the policy's is made.
            product(ref_h, reference.words(words).t(), ref_tile)
            w = policy.words(words)
            tile, weights = buffers.views(*shape)
            product(h, w.t(), tile)
            ops.fold_kl(
                tile,
                ref_tile,
                labels[tokens],
                policy.bias_of(words),
                reference.bias_of(words),
                part.maximum,
                part.total,
                part.label_logit,
                part.label_slope,
                ref_part.maximum,
                ref_part.total,
                ref_part.label_logit,
                cross[tokens],
                rescale,
                ref_rescale,
                weights,
                ref_weights,
                start=words.start,
                **transform.keywords(),
            )
            if derivatives is not None:
                for sums, factor, factors in (
                    (derivatives[0][tokens], rescale, weights),
                    (derivatives[1][tokens], ref_rescale, ref_weights),
                ):
                    assert factors is not None
                    if words.start == 0:
                        product(factors, w, sums)
                    else:
                        ops.rescale_rows(sums, factor)
                        add_product(factors, w, sums)
            del w
        del h, ref_h
        if derivatives is not None:
            label_rows = policy.weight.index_select(0, labels[tokens])
            _finish_derivatives(
                derivatives[0][tokens],
                derivatives[1][tokens],
                label_rows.to(policy.operands.compute_dtype).to(wide),
                part,
                ref_part,
                transform.factor,
            )
            del label_rows

    folded, ref_folded = finish(state), finish(ref_state)
    return FoldedPair(
        folded,
        ref_folded,
        _divergence(state, ref_state, folded, ref_folded, cross),
        _label_difference(folded, ref_folded),
        derivatives,
    )


def _divergence(
    state: FoldState, ref_state: FoldState, folded: Folded, ref_folded: Folded, cross: Tensor
) -> Tensor:
    """kl, from terms that are all small where both models are confident of the label."""
    # kl = sum_{v != y} r_v (x_v - z_v) + r_y (x_y - z_y) - (M_r - M) - (log s_r - log s)
    gap = ref_state.label_logit - state.label_logit
    confident = (state.label_logit >= state.maximum) & (ref_state.label_logit >= ref_state.maximum)
    # M_r - M is the label's gap there, and r_y gap - gap = -(1 - r_y) gap.
    own = torch.where(
        confident,
        -ref_folded.miss * gap,
        # A label that the reference rules out has no part in it, and no gap.
        torch.where(ref_folded.hit > 0, ref_folded.hit * gap, 0.0)
        - (ref_folded.maximum - folded.maximum),
    )
    kl = ref_folded.rest * cross + own - (ref_folded.log_total - folded.log_total)
    # A divergence is not negative: where rounding carried it below 0, 0 is nearer to the truth.
    # The gradient is formed of the probabilities, and knows nothing of the bound.
    return kl.clamp(min=0.0)


def _label_difference(folded: Folded, ref_folded: Folded) -> Tensor:
    """p_y - r_y, from whichever of p_y and 1 - p_y is the smaller number."""
    return torch.where(
        folded.miss < 0.5, ref_folded.miss - folded.miss, folded.hit - ref_folded.hit
    )


def _finish_derivatives(
    dlogps: Tensor,  # (n, H), in: A, out: D
    dkl: Tensor,  # (n, H), in: A_r, out: K
    label_rows: Tensor,  # (n, H) float32, W_y
    state: FoldState,
    ref_state: FoldState,
    factor: float,
) -> None:
    folded, ref_folded = finish(state), finish(ref_state)
    dlogps.mul_(folded.rest.unsqueeze(1))
    dkl.mul_(ref_folded.rest.unsqueeze(1))
    # K = c (a A - a_r A_r + (p_y - r_y) t_y W_y): rounded products, subtracted, so that equal ones
    # leave nothing.
    torch.sub(dlogps, dkl, out=dkl)
    difference = _label_difference(folded, ref_folded)
    dkl.mul_(factor).addcmul_(label_rows, (factor * difference * state.label_slope).unsqueeze(1))
    # D = c ((1 - p_y) t_y W_y - a A)
    share = (factor * folded.miss * state.label_slope).unsqueeze(1)
    dlogps.mul_(-factor).addcmul_(label_rows, share)


def backward(
    dlogps: Tensor,  # (N,) d loss / d logp, float32
    dkl: Tensor,  # (N,) d loss / d kl, float32
    policy: Head,
    reference: Head,
    rows: Tensor | None,  # (N,)
    labels: Tensor,  # (N,)
    maximum: Tensor,  # (N,) M of the policy
    total: Tensor,  # (N,) s of the policy
    ref_maximum: Tensor,  # (N,)
    ref_total: Tensor,  # (N,)
    miss: Tensor,  # (N,) 1 - p_y
    label_difference: Tensor,  # (N,) p_y - r_y
    transform: Transform,
    plan: Plan,
    ops: ModuleType,
    needs: tuple[bool, bool, bool],  # gradients of the policy's hidden, weight, bias
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden (M, H), weight (V, H) and bias (V,), in their dtypes."""
    assert plan.backward_tiles is not None
    # d loss / d z_v = g ([v = y] - p_v) + k (p_v - r_v), as one factor of each distribution
    coefficient = (dkl - dlogps) / total
    ref_coefficient = -dkl / ref_total
    label_gradient = dlogps * miss + dkl * label_difference
    ref_buffers = Buffers(plan.backward_tiles, policy.operands, dlogps.device, False)

    def of_words(words: slice) -> _TileGradient:
        ref_w = reference.words(words)

        def of_tokens(tokens: slice, tile: Tensor, dlogits: Tensor) -> None:
            ref_tile, _ = ref_buffers.views(tile.shape[0], tile.shape[1])
            product(reference.rows(rows, tokens), ref_w.t(), ref_tile)
            ops.kl_gradient(
                tile,
                ref_tile,
                labels[tokens],
                policy.bias_of(words),
                reference.bias_of(words),
                maximum[tokens],
                ref_maximum[tokens],
                coefficient[tokens],
                ref_coefficient[tokens],
                label_gradient[tokens],
                dlogits,
                start=words.start,
                **transform.keywords(),
            )

        return of_tokens

    return _second_pass(policy, rows, labels.shape[0], plan.backward_tiles, needs, of_words)


# Turns the raw products of some tokens, (n, v), into the loss's gradient with respect to them.
_TileGradient = Callable[[slice, Tensor, Tensor], None]


def _second_pass(
    head: Head,
    rows: Tensor | None,  # (N,)
    count: int,  # N
    tiles: Tiles,
    needs: tuple[bool, bool, bool],  # gradients of hidden, weight, bias
    of_words: Callable[[slice], _TileGradient],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Recompute each tile, turn it into its gradient, and take the products with that.

    `of_words(words)` is asked once for each tile of the vocabulary, and what it returns holds all
    that belongs to those words.
    """
    H = head.hidden.shape[1]
    device, wide = head.hidden.device, head.operands.wide
    needs_hidden, needs_weight, needs_bias = needs
    dhidden = torch.zeros((count, H), dtype=wide, device=device) if needs_hidden else None
    dweight = torch.empty_like(head.weight) if needs_weight else None
    dbias = torch.empty_like(head.bias) if needs_bias and head.bias is not None else None
    buffers = Buffers(tiles, head.operands, device, True)
    dweight_buffer = None
    if needs_weight:
        dweight_buffer = torch.empty((tiles.vocab_tile, H), dtype=wide, device=device)

    for words in slices(0, head.weight.shape[0], tiles.vocab_tile):
        w = head.words(words)
        of_tokens = of_words(words)
        size = w.shape[0]
        dweight_tile = None if dweight_buffer is None else dweight_buffer[:size].zero_()
        dbias_tile = torch.zeros(size, dtype=wide, device=device) if needs_bias else None
        for tokens in slices(0, count, tiles.token_tile):
            h = head.rows(rows, tokens)
            tile, dlogits = buffers.views(h.shape[0], size)
            assert dlogits is not None
            product(h, w.t(), tile)
            of_tokens(tokens, tile, dlogits)
            # dW_v = sum_t dz_tv h_t,  dh_t = sum_v dz_tv W_v,  db_v = sum_t dz_tv
            if dweight_tile is not None:
                add_product(dlogits.t(), h, dweight_tile)
            if dhidden is not None:
                add_product(dlogits, w, dhidden[tokens])
            if dbias_tile is not None:
                dbias_tile += dlogits.sum(0, dtype=wide)
            del h
        if dweight is not None and dweight_tile is not None:
            dweight[words] = dweight_tile
        if dbias is not None and dbias_tile is not None:
            dbias[words] = dbias_tile
        # A tile's copies of weights must be gone before the next ones are made.
        del w, of_tokens
    if dhidden is not None:
        shape, dtype = head.hidden.shape, head.hidden.dtype
        dhidden = scatter_rows([(dhidden, None)], rows, shape, dtype, tiles.token_tile)
    return dhidden, dweight, dbias


def scatter_rows(
    terms: Sequence[tuple[Tensor, Tensor | None]],  # (N, H) and what scales it, (N,), float32
    rows: Tensor | None,  # (N,)
    shape: torch.Size,  # (M, H)
    dtype: torch.dtype,
    token_tile: int,
) -> Tensor:  # (M, H)
    """The sum of the terms, rounded once, at the rows' places; 0 where not scored."""
    (first, first_scale), *others = terms
    make = torch.empty if rows is None else torch.zeros
    out = make(shape, dtype=dtype, device=first.device)
    for tokens in slices(0, first.shape[0], token_tile):
        part = first[tokens]
        if first_scale is not None:
            part = part * first_scale[tokens].unsqueeze(1)
        for values, scale in others:
            assert scale is not None
            part = part.addcmul(values[tokens], scale[tokens].unsqueeze(1))
        if rows is None:
            out[tokens] = part
        else:
            out.index_copy_(0, rows[tokens], part.to(out.dtype))
    return out
