"""Backward: from the gradients of log-probs, and of a divergence, to those of states and the head.

`passes` has the mathematics. With a frozen head no product is left: D, and K, are scaled and
written to their places. With a trained head `second_pass` walks the vocabulary once more, as its
outer loop, so that each tile of dW is finished in float32 and rounded once. A token's row of a tile
is what forward kept, or it is computed from the logits again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prefkern.ops.operands import (
    Buffers,
    Head,
    Raised,
    Transform,
    add_product,
    are_own,
    product,
    take,
)
from prefkern.ops.passes import Gathered, token_slices
from prefkern.ops.plan import Gradients, Plan, slices
from prefkern.ops.shards import VocabShard, add_up
from prefkern.ops.tile_ops import TileOps


def backward(
    grads: Sequence[Tensor],  # (N,) d loss / d logp and, with a divergence, d loss / d kl, float32
    head: Head | None,  # None if the head is frozen: backward has no product then
    reference: Head | None,  # with a divergence
    rows: Tensor | None,  # (N,)
    labels: Tensor | None,  # (N,); as head
    gathered: Gathered,
    states: Sequence[tuple[torch.Size, torch.dtype]],  # of hidden, and an adapter's: (M, H), (M, R)
    transform: Transform,
    plan: Plan,
    ops: TileOps,
    needs: Gradients,
    shard: VocabShard | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight, bias and an adapter's tensors, in their dtypes; or None."""
    of_head = HeadGradients()
    if plan.trains_head:
        assert head is not None and labels is not None
        dkl = grads[1] if plan.has_divergence else None
        given = (rows, labels, gathered, transform, plan, ops, needs, shard is not None)
        of_head = second_pass(grads[0], dkl, head, reference, *given)
    derivatives = [x for x in (gathered.derivative, gathered.kl_derivative) if x is not None]
    terms = list(zip(derivatives, grads, strict=False))
    if of_head.states is not None:
        terms = [(of_head.states, torch.ones_like(grads[0]))]
    if shard is not None and needs.states and plan.tokens > 0:
        # Each rank's entries give a part of it: added in float32, and rounded once.
        shape = terms[0][0].shape
        joined = scattered(terms, None, shape, terms[0][0].dtype, ops)
        add_up(shard, joined)
        terms = [(joined, torch.ones_like(grads[0]))]

    def of_states(columns: slice, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        parts = [(values[:, columns], scale) for values, scale in terms]
        return scattered(parts, rows, shape, dtype, ops)

    dhidden = dlora_hidden = None
    own = plan.hidden_size - plan.state_columns.start
    if needs.hidden:
        dhidden = of_states(slice(0, own), *states[0])
    if needs.lora_hidden:
        dlora_hidden = of_states(slice(own, own + states[1][0][1]), *states[1])
    return dhidden, of_head.weight, of_head.bias, dlora_hidden, of_head.lora_weight


def scattered(
    terms: list[tuple[Tensor, Tensor]],  # (N, H) and the (N,) that scales it: one, or two
    rows: Tensor | None,  # (N,)
    shape: torch.Size,  # (M, H)
    dtype: torch.dtype,
    ops: TileOps,
) -> Tensor:  # (M, H)
    """The sum of the scaled terms at the tokens' places, 0 where not scored."""
    (values, scale), *others = terms
    make = torch.empty if rows is None else torch.zeros
    out = make(shape, dtype=dtype, device=values.device)
    ops.scatter_scaled(values, scale, rows, out, *(others[0] if others else ()))
    return out


@dataclass(frozen=True)
class HeadGradients:
    """The results of `second_pass`; None if not asked for."""

    weight: Tensor | None = None  # (V, H)
    bias: Tensor | None = None  # (V,)
    lora_weight: Tensor | None = None  # (V, R)
    states: Tensor | None = None  # (N, width of the plan's state_columns) float32


@dataclass(frozen=True)
class _Factors:
    """The factors that turn u, and a reference's u, into the loss's gradient; (N,) each."""

    policy: Tensor  # r
    reference: Tensor | None
    label: Tensor | None  # the gradient at the label; None if no tile is made again
    scale: Tensor | None  # (): results of products with them must be multiplied by it; None: 1

    @staticmethod
    def of(
        dlogps: Tensor,  # (N,) g
        dkl: Tensor | None,  # (N,) k
        gathered: Gathered,
        factor: float,  # c
        dtype: torch.dtype,  # of the operands
        makes_tiles: bool,
    ) -> _Factors:
        assert gathered.share is not None and gathered.label_value is not None
        # r = c a (k - g), and -c a_r k of the reference; u_y is -(1 - p_y) t_y / a.
        policy = gathered.share * (dlogps * -factor)
        reference, label = None, policy * gathered.label_value if makes_tiles else None
        if dkl is not None and gathered.ref_share is not None and gathered.difference is not None:
            assert label is not None
            label += gathered.difference * (dkl * factor)
            reference = gathered.ref_share * (dkl * -factor)
            policy = gathered.share * ((dkl - dlogps) * factor)
        scale = None
        if dtype == torch.float16:
            # A power of two above the largest factor: divided by it, all factors fit into float16.
            largest = policy.abs().amax()
            if reference is not None:
                largest = torch.maximum(largest, reference.abs().amax())
            scale = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent)
            policy, reference, label = (
                None if x is None else x / scale for x in (policy, reference, label)
            )
        assert policy is not None
        return _Factors(policy, reference, label, scale)


def second_pass(
    dlogps: Tensor,  # (N,) d loss / d logp, float32
    dkl: Tensor | None,  # (N,) d loss / d kl; None without a divergence
    head: Head,
    reference: Head | None,  # with a divergence
    rows: Tensor | None,  # (N,)
    labels: Tensor,  # (N,)
    gathered: Gathered,
    transform: Transform,
    plan: Plan,
    ops: TileOps,
    gradients: Gradients,
    is_shard: bool = False,
) -> HeadGradients:
    """Gradients of weight, bias and an adapter's weight, in their dtypes; and of the states.

    From all tokens, kept or not. The states' gradient is computed only with a divergence. In a
    shard of the vocabulary some labels are of another shard.
    """
    assert plan.backward_tiles is not None
    assert gathered.unit is not None and gathered.kept is not None
    tiles, columns = plan.backward_tiles, plan.trained_columns
    operands, device = head.operands, head.hidden.device
    dtype, wide = operands.of_gradients, operands.wide
    lora_weight = None if head.low_rank is None else head.low_rank.weight
    make = torch.zeros_like if plan.tokens == 0 else torch.empty_like
    dweight = make(head.weight) if gradients.weight else None
    dbias = make(head.bias) if gradients.bias and head.bias is not None else None
    dlora = make(lora_weight) if gradients.lora_weight and lora_weight is not None else None
    dstates = None
    if plan.states_in_backward and gradients.states:
        size = (plan.tokens, plan.state_columns.width)
        make_states = torch.empty if plan.vocab_size > 0 else torch.zeros
        dstates = make_states(size, dtype=wide, device=device)
    if plan.tokens == 0:
        return HeadGradients(dweight, dbias, dlora, dstates)
    walk, target, is_direct = token_slices(plan, tiles.token_tile), None, False
    forward_tile = plan.forward_tiles.vocab_tile
    if gradients.weights:
        # One product whose result is rounded anyway is made where it belongs.
        if operands.rounds and len(walk) == 1 and dlora is None and dweight is not None:
            is_direct = dweight.dtype == dtype and columns.width == dweight.shape[1]
        shape = (tiles.vocab_tile, columns.width)
        target = dweight if is_direct else torch.empty(shape, dtype=wide, device=device)
    # With a divergence, kept tokens need a tile too: it is made from both models' u.
    is_pair = reference is not None
    has_logits = plan.kept_tokens < plan.tokens
    has_scratch = is_pair or has_logits
    buffers = ref_buffers = None
    if has_scratch:
        by_entry, row = operands.by_entry(plan), operands.row_of_tiles(plan, tiles)
        buffers = Buffers(tiles, operands, device, True, by_entry=by_entry, row=row)
    if is_pair and has_logits:
        ref_buffers = Buffers(tiles, operands, device, False)
    # Copies of a tile's weights, if a product for logits or for states needs them in float32.
    raises = has_logits or dstates is not None
    raised = Raised([head] if raises else [], tiles.vocab_tile, device)
    ref_raised = Raised([reference] if is_pair and has_logits else [], tiles.vocab_tile, device)
    factors = _Factors.of(dlogps, dkl, gathered, transform.factor, dtype, has_scratch)
    label_terms = None
    if operands.rounds:
        # Operands are 0 there. These terms are the largest of most rows of dW, and as operands they
        # would be rounded, and the rows of hidden that r scales too.
        assert gathered.label_value is not None
        label_terms = factors.policy * gathered.label_value
        factors = replace(factors, label=torch.zeros_like(label_terms))

    for entries in slices(0, plan.vocab_size, tiles.vocab_tile):
        size = entries.stop - entries.start
        w = ref_w = None
        if raises:
            w = raised.of(head.weight_rows(entries))
        options = {"start": entries.start, **transform.keywords()}
        tile_of_weights = None
        if target is not None:
            tile_of_weights = target[entries] if is_direct else target[:size]
        dbias_tile = torch.zeros(size, dtype=wide, device=device) if gradients.bias else None
        for tokens in walk:
            y, n = labels[tokens], tokens.stop - tokens.start
            is_kept, h = tokens.stop <= plan.kept_tokens, None
            if is_kept and not is_pair:
                own = None if tile_of_weights is None else head.rows(rows, tokens, columns)
                for part, factor in gathered.kept_parts(tokens, entries, forward_tile):
                    # Kept rows are not changed: r goes into the rows of hidden.
                    r = factors.policy[tokens]
                    r = r if factor is None else r * factor
                    weights = gathered.kept[tokens, part]
                    place = slice(part.start - entries.start, part.stop - entries.start)
                    if tile_of_weights is not None and own is not None:
                        h = None  # that of the part before is freed first
                        h = (own * r.unsqueeze(1)).to(dtype)
                        add = product if tokens.start == 0 else add_product
                        add(weights.t(), h, tile_of_weights[place])
                    if dbias_tile is not None:
                        _add_column_sums(weights, r, dbias_tile[place])
                continue
            # r goes into the tile before it is rounded; hidden is not scaled.
            assert buffers is not None
            tile, weights = buffers.views(n, size)
            assert weights is not None
            pair = {} if reference is None else _reference_of(gathered, factors, tokens)
            bias = None
            if is_kept:
                assert gathered.ref_kept is not None
                tile = gathered.kept[tokens, entries]
                pair |= {"ref_tile": gathered.ref_kept[tokens, entries], "is_kept": True}
                if tile_of_weights is not None:
                    h = head.rows(rows, tokens, columns).to(dtype)
            else:
                if reference is not None and ref_buffers is not None:
                    if ref_w is None:
                        ref_w = ref_raised.of(reference.weight_rows(entries))
                    ref_tile, _ = ref_buffers.views(n, size)
                    ref_h = reference.rows_for_logits(rows, tokens)
                    reference.operands.logits(ref_h, ref_w.t(), ref_tile)
                    pair |= {"ref_tile": ref_tile, "ref_bias": reference.bias_of(entries)}
                assert w is not None
                h, bias = head.rows(rows, tokens), head.bias_of(entries)
                operands.logits(h.to(operands.of_logits), w.t(), tile)
                h = columns.of(h.to(dtype))
            assert factors.label is not None
            numbers = (gathered.unit[tokens], factors.policy[tokens], factors.label[tokens])
            ops.remake_weights(tile, y, bias, *numbers, weights, **pair, **options)
            # dW_v = sum_t dz_tv h_t,  dh_t = sum_v dz_tv W_v,  db_v = sum_t dz_tv
            if tile_of_weights is not None:
                assert h is not None
                add = product if tokens.start == 0 else add_product
                add(weights.t(), h, tile_of_weights)
            if dstates is not None and w is not None:
                add = product if entries.start == 0 else add_product
                add(weights, plan.state_columns.of(w), dstates[tokens])
            if dbias_tile is not None:
                dbias_tile += weights.sum(0, dtype=wide)
            del h
        if factors.scale is not None:
            for tile in (tile_of_weights, dbias_tile):
                if tile is not None:
                    tile.mul_(factors.scale)
        if dbias is not None and dbias_tile is not None:
            if label_terms is not None:
                # Before it is rounded: where a head's bias fits the labels, the two cancel.
                local = labels - entries.start
                of_tile = are_own(local, size)
                dbias_tile.index_add_(0, local[of_tile], label_terms[of_tile])
            dbias[entries] = dbias_tile
        if tile_of_weights is not None and not is_direct:
            if dweight is not None:
                dweight[entries] = tile_of_weights[:, : dweight.shape[1]]
            if dlora is not None:
                start = plan.hidden_size - columns.start
                dlora[entries] = tile_of_weights[:, start : start + dlora.shape[1]]
        # The tile's copies of weights must be freed before the next ones are made.
        del w, ref_w
    if dstates is not None and factors.scale is not None:
        dstates.mul_(factors.scale)
    if label_terms is not None and is_shard:
        own = are_own(labels, plan.vocab_size).nonzero()[:, 0]
        labels, label_terms = labels[own], label_terms[own]
        rows = own if rows is None else rows[own]
    if label_terms is not None and len(labels) > 0:
        _add_label_terms(dweight, dlora, label_terms, head, rows, labels)
    return HeadGradients(dweight, dbias, dlora, dstates)


def _add_label_terms(
    dweight: Tensor | None,  # (V, H), in place, as is the next one
    dlora: Tensor | None,  # (V, R)
    terms: Tensor,  # (N,) the loss's gradient at each label
    head: Head,
    rows: Tensor | None,  # (N,)
    labels: Tensor,  # (N,)
) -> None:
    """Add the terms at the labels, in float32."""
    entries, places = labels.unique(return_inverse=True)
    tokens = slice(0, len(labels))

    def add(out: Tensor, values: Tensor) -> None:  # (V, W), (N, W)
        sums = values.new_zeros((len(entries), values.shape[1])).index_add_(0, places, values)
        out[entries] = sums.add_(out[entries]).to(out.dtype)

    def add_products(out: Tensor, states: Tensor) -> None:  # (V, W), (M, W)
        # As many columns as a MiB holds: there are four such blocks, and the tiles are alive.
        for columns in slices(0, out.shape[1], max(2**18 // len(labels), 1)):
            part = take(states[:, columns], rows, tokens).to(head.operands.compute_dtype)
            add(out[:, columns], part * terms.unsqueeze(1))

    if dweight is not None:
        add_products(dweight, head.hidden)
    if dlora is not None and head.low_rank is not None:
        add_products(dlora, head.low_rank.hidden)


def _reference_of(gathered: Gathered, factors: _Factors, tokens: slice) -> dict[str, Any]:
    """The unit and the factors of a reference's tile."""
    assert gathered.ref_unit is not None and factors.reference is not None
    return {"ref_unit": gathered.ref_unit[tokens], "ref_factor": factors.reference[tokens]}


def _add_column_sums(weights: Tensor, factor: Tensor, out: Tensor) -> None:
    """`out_v += sum_t factor_t weights_tv`; if weights have 8 bits, the factor has 16."""
    if weights.dtype == out.dtype:
        out.addmv_(weights.t(), factor)
        return
    if weights.device.type == "cpu":
        # A product of half-precision operands would round the sums. In parts of about a MiB.
        for part in slices(0, weights.shape[0], max(2**18 // weights.shape[1], 1)):
            out.addmv_(weights[part].to(out.dtype).t(), factor[part])
        return
    high = factor.to(weights.dtype)
    low = (factor - high).to(weights.dtype)
    sums = torch.empty((out.shape[0], 2), dtype=torch.float32, device=out.device)
    product(weights.t(), torch.stack([high, low], 1), sums)
    out += sums.sum(1)
