"""Fold a float32 tile of logits into each token's running maximum, sum and label logit.

For token t with label y and a tile of raw products `(n, v)` over the vocabulary's entries `start ...
start + v`:

    z_v     = transform(tile_v + b_v)
    m'      = max(m, max_{v != y} z_v)
    total'  = total exp(m - m') + sum_{v != y} exp(z_v - m')

and `label_logit = z_y` if y lies in the tile. The label's own term is left out of the sum: so a
confident token's `1 - p_y` is never a difference of near-equal numbers. With statistics, the fold
also keeps `shifted = sum_{v != y} exp(z_v - m) (z_v - m)`, `logit_sum = sum_v z_v`, `before` (the
largest logit ahead of the label) and `squares = sum_{v != y} exp(2 (z_v - m))`. Entropy, mean
logit, top-1 and `sum_v p_v^2` follow from them.

With `weights`, the row is written back as `exp(z_v - m') t_v` for a second product with the weight;
t_v is the softcap's derivative, and the label's column is 0. The accumulator of that product must
first be multiplied by `rescale = exp(m - m')`. `weights` may be the tile itself.

`ref_tile` holds a reference's raw products over the same entries. Its logits x are folded in the
same way into a state of their own, with one more sum:

    cross'  = cross exp(m_r - m_r') + sum_{v != y} exp(x_v - m_r') (x_v - z_v)

The divergence needs no more. With lse the logarithms of the whole sums it is

    sum_v r_v (log r_v - log p_v) = sum_v r_v (x_v - z_v) - (lse_r - lse_p)

`ref_weights` is `exp(x_v - m_r') t_v`. The t_v is the policy's there too, since only the policy has
a gradient.

The first tile of a token begins its state and ignores the old numbers. One program a token. A row
that fits into a program's registers (`tiles.fold_config`) is read once; longer rows, and rows of a
pair, are read twice, and the second time from memory if the rows of all running programs exceed the
L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launches import count
from .primitives import check_rows, check_vectors, load_logits, on_device_of, round_to
from .tiles import fold_config, pair_config


@triton.jit
def _store_label(label_logit_ptr, label_slope_ptr, z, slope, is_here, first):
    """The label's logit and slope, if it lies in the tile, (1,) each."""
    at = tl.arange(0, 1)
    # A token's first tile begins its state; a later one without the label leaves it as it is.
    is_stored = is_here | (first != 0)
    tl.store(label_logit_ptr + at, tl.where(is_here, z, -float("inf")), mask=is_stored)
    tl.store(label_slope_ptr + at, tl.where(is_here, slope, 1.0), mask=is_stored)


@triton.jit
def _without(left_out, z, mask):
    """A block of logits with -inf for what is left out, and beyond the tile."""
    return tl.where(mask & ~left_out, z, -float("inf"))


@triton.jit
def _first_reading(
    row_ptr,
    bias_ptr,
    label_logit_ptr,
    label_slope_ptr,
    local,
    first,
    n_entries,
    logit_scale,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SLOPE: tl.constexpr,
    HAS_STATS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Of a row in several blocks; stores the label's logit.

    Returns the maximum without the label, the largest logit ahead of it, and the sum.
    """
    offs_v = tl.arange(0, BLOCK_V)
    maximum = tl.full((BLOCK_V,), -float("inf"), tl.float32)
    before = tl.full((BLOCK_V,), -float("inf"), tl.float32)
    logit_sum = tl.zeros((BLOCK_V,), tl.float32)
    for block in range(0, n_entries, BLOCK_V):
        entries = block + offs_v
        mask = entries < n_entries
        z, slope = load_logits(
            row_ptr,
            bias_ptr,
            entries,
            mask,
            logit_scale,
            softcap,
            temperature,
            HAS_BIAS,
            HAS_SOFTCAP,
        )
        is_label = entries == local
        maximum = tl.maximum(maximum, _without(is_label, z, mask))
        if HAS_STATS:
            logit_sum += tl.where(mask, z, 0.0)
            before = tl.maximum(before, _without(entries >= local, z, mask))
        if (local >= block) & (local < block + BLOCK_V) & (local < n_entries):
            tl.store(label_logit_ptr, tl.sum(tl.where(is_label, z, 0.0), axis=0))
            if HAS_SLOPE:
                tl.store(label_slope_ptr, tl.sum(tl.where(is_label, slope, 0.0), axis=0))
    begins_elsewhere = (first != 0) & ((local < 0) | (local >= n_entries))
    tl.store(label_logit_ptr, -float("inf"), mask=begins_elsewhere)
    if HAS_SLOPE:
        tl.store(label_slope_ptr, 1.0, mask=begins_elsewhere)
    return tl.max(maximum, axis=0), tl.max(before, axis=0), tl.sum(logit_sum, axis=0)


@triton.jit
def _raise_maximum(maximum_ptr, old, tile_max):
    """Raise the running maximum to a tile's; what to subtract, and exp(old - new)."""
    new = tl.maximum(old, tile_max)
    tl.store(maximum_ptr, new)
    # If only the label's logit was seen, the maximum is -inf, and exp(-inf - 0) = 0.
    offset = tl.where(new == -float("inf"), 0.0, new)
    return offset, tl.exp(old - offset)


@triton.jit
def _add(running_ptr, factor, value, first):
    """`running = running factor + value`, from 0 if the tile is a token's first."""
    running = tl.load(running_ptr, mask=first == 0, other=0.0)
    tl.store(running_ptr, running * factor + value)


@triton.jit(do_not_specialize=["first"])
def _fold_kernel(
    tile_ptr,
    stride_tn,
    labels_ptr,
    bias_ptr,
    maximum_ptr,
    total_ptr,
    label_logit_ptr,
    label_slope_ptr,
    rescale_ptr,
    weights_ptr,
    stride_wn,
    shifted_ptr,
    logit_sum_ptr,
    before_ptr,
    squares_ptr,
    ref_tile_ptr,
    stride_rn,
    ref_bias_ptr,
    ref_maximum_ptr,
    ref_total_ptr,
    ref_label_logit_ptr,
    cross_ptr,
    ref_rescale_ptr,
    ref_weights_ptr,
    stride_un,
    start,
    first,
    n_entries,
    logit_scale,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_STATS: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    HAS_REF_BIAS: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One token: fold its row of the tile, or of both, and write its rows of weights."""
    row = tl.program_id(0).to(tl.int64)
    tile_row = tile_ptr + row * stride_tn
    offs_v = tl.arange(0, BLOCK_V)
    if ONE_BLOCK:
        # The whole row, in registers from here on, and the old state: asked for before the label,
        # which others wait for. Where a row is read twice, registers are worth more.
        z, slope = load_logits(
            tile_row,
            bias_ptr,
            offs_v,
            offs_v < n_entries,
            logit_scale,
            softcap,
            temperature,
            HAS_BIAS,
            HAS_SOFTCAP,
        )
        old = tl.load(maximum_ptr + row, mask=first == 0, other=-float("inf"))
        total = tl.load(total_ptr + row, mask=first == 0, other=0.0)
    # Of 32 bits, so that each comparison with an entry is one instruction.
    local = (tl.load(labels_ptr + row) - start).to(tl.int32)

    if ONE_BLOCK:
        # The label's logit, by a reading of its own, which nothing waits for before the end.
        label = local + tl.arange(0, 1)
        label_is_here = (label >= 0) & (label < n_entries)
        label_z, label_t = load_logits(
            tile_row,
            bias_ptr,
            label,
            label_is_here,
            logit_scale,
            softcap,
            temperature,
            HAS_BIAS,
            HAS_SOFTCAP,
        )
        mask = offs_v < n_entries
        others = _without(offs_v == local, z, mask)
        tile_max = tl.max(others, axis=0)
        if HAS_STATS:
            tile_logits = tl.sum(tl.where(mask, z, 0.0), axis=0)
            tile_before = tl.max(_without(offs_v >= local, z, mask), axis=0)
    else:
        tile_max, tile_before, tile_logits = _first_reading(
            tile_row,
            bias_ptr,
            label_logit_ptr + row,
            label_slope_ptr + row,
            local,
            first,
            n_entries,
            logit_scale,
            softcap,
            temperature,
            HAS_BIAS,
            HAS_SOFTCAP,
            True,
            HAS_STATS,
            BLOCK_V,
        )
        old = tl.load(maximum_ptr + row, mask=first == 0, other=-float("inf"))
    offset, factor = _raise_maximum(maximum_ptr + row, old, tile_max)
    if HAS_REFERENCE:
        ref_tile_row = ref_tile_ptr + row * stride_rn
        ref_tile_max, _ref_before, _ref_logits = _first_reading(
            ref_tile_row,
            ref_bias_ptr,
            ref_label_logit_ptr + row,
            ref_label_logit_ptr + row,
            local,
            first,
            n_entries,
            logit_scale,
            softcap,
            temperature,
            HAS_REF_BIAS,
            HAS_SOFTCAP,
            False,
            False,
            BLOCK_V,
        )
        ref_old = tl.load(ref_maximum_ptr + row, mask=first == 0, other=-float("inf"))
        ref_offset, ref_factor = _raise_maximum(ref_maximum_ptr + row, ref_old, ref_tile_max)

    # The sums and the weights: of the row in registers, or of a second reading.
    sums = tl.zeros((BLOCK_V,), tl.float32)
    shifted = tl.zeros((BLOCK_V,), tl.float32)
    squares = tl.zeros((BLOCK_V,), tl.float32)
    ref_sums = tl.zeros((BLOCK_V,), tl.float32)
    cross = tl.zeros((BLOCK_V,), tl.float32)
    for block in range(0, BLOCK_V if ONE_BLOCK else n_entries, BLOCK_V):
        entries = block + offs_v
        mask = entries < n_entries
        counts = mask & (entries != local)
        if not ONE_BLOCK:
            z, slope = load_logits(
                tile_row,
                bias_ptr,
                entries,
                mask,
                logit_scale,
                softcap,
                temperature,
                HAS_BIAS,
                HAS_SOFTCAP,
            )
        distance = others - offset if ONE_BLOCK else tl.where(counts, z - offset, -float("inf"))
        e = tl.exp(distance)
        sums += e
        if HAS_STATS:
            # exp is 0 from -104 down: the bound changes no product, and avoids 0 * -inf.
            shifted += e * tl.maximum(distance, -200.0)
            squares += e * e
        if HAS_REFERENCE:
            x, _ref_slope = load_logits(
                ref_tile_row,
                ref_bias_ptr,
                entries,
                mask,
                logit_scale,
                softcap,
                temperature,
                HAS_REF_BIAS,
                HAS_SOFTCAP,
            )
            ref_e = tl.exp(tl.where(counts, x - ref_offset, -float("inf")))
            ref_sums += ref_e
            # If both models rule an entry out (a logit of -inf in both), its difference is 0.
            cross += ref_e * tl.where(ref_e > 0, x - z, 0.0)
        if HAS_WEIGHTS:
            value = round_to(e * slope, weights_ptr.dtype.element_ty)
            tl.store(weights_ptr + row * stride_wn + entries, value, mask=mask)
            if HAS_REFERENCE:
                ref_value = round_to(ref_e * slope, ref_weights_ptr.dtype.element_ty)
                tl.store(ref_weights_ptr + row * stride_un + entries, ref_value, mask=mask)

    if ONE_BLOCK:
        _store_label(
            label_logit_ptr + row, label_slope_ptr + row, label_z, label_t, label_is_here, first
        )
    else:
        total = tl.load(total_ptr + row, mask=first == 0, other=0.0)
    tl.store(total_ptr + row, total * factor + tl.sum(sums, axis=0))
    if HAS_WEIGHTS:
        tl.store(rescale_ptr + row, factor)
    if HAS_STATS:
        moved = tl.where(total > 0, old - offset, 0.0) * total
        running = tl.load(shifted_ptr + row, mask=first == 0, other=0.0)
        running = (running + moved) * factor
        tl.store(shifted_ptr + row, running + tl.sum(shifted, axis=0))
        _add(logit_sum_ptr + row, 1.0, tile_logits, first)
        highest = tl.load(before_ptr + row, mask=first == 0, other=-float("inf"))
        tl.store(before_ptr + row, tl.maximum(highest, tile_before))
        _add(squares_ptr + row, factor * factor, tl.sum(squares, axis=0), first)
    if HAS_REFERENCE:
        _add(ref_total_ptr + row, ref_factor, tl.sum(ref_sums, axis=0), first)
        _add(cross_ptr + row, ref_factor, tl.sum(cross, axis=0), first)
        if HAS_WEIGHTS:
            tl.store(ref_rescale_ptr + row, ref_factor)


def fold(
    tile: torch.Tensor,  # (n, v) float32; overwritten if it is weights as well
    labels: torch.Tensor,  # (n,) int64, over the whole vocabulary
    bias: torch.Tensor | None,  # (v,)
    maximum: torch.Tensor,  # (n,) float32, in and out, as are the next ones
    total: torch.Tensor,  # (n,)
    label_logit: torch.Tensor,  # (n,)
    label_slope: torch.Tensor,  # (n,)
    rescale: torch.Tensor | None,  # (n,), out
    weights: torch.Tensor | None,  # (n, v), out; may be the tile itself
    shifted: torch.Tensor | None = None,  # (n,), in and out, as the next ones; None: no statistics
    logit_sum: torch.Tensor | None = None,  # (n,)
    before: torch.Tensor | None = None,  # (n,)
    squares: torch.Tensor | None = None,  # (n,)
    *,
    ref_tile: torch.Tensor | None = None,  # (n, v) float32, as tile; None: no reference
    ref_bias: torch.Tensor | None = None,  # (v,)
    ref_maximum: torch.Tensor | None = None,  # (n,), in and out, as are the next ones
    ref_total: torch.Tensor | None = None,  # (n,)
    ref_label_logit: torch.Tensor | None = None,  # (n,)
    cross: torch.Tensor | None = None,  # (n,)
    ref_rescale: torch.Tensor | None = None,  # (n,), out
    ref_weights: torch.Tensor | None = None,  # (n, v), out, with weights; may be ref_tile itself
    start: int,
    first: bool,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
) -> None:
    """Fold a tile, or a pair of tiles, into each token's running state; one launch."""
    rows = {"tile": tile, "weights": weights, "ref_tile": ref_tile, "ref_weights": ref_weights}
    for name, x in rows.items():
        if x is not None:
            check_rows(name, x)
    check_vectors(
        labels=labels,
        bias=bias,
        maximum=maximum,
        total=total,
        label_logit=label_logit,
        label_slope=label_slope,
        rescale=rescale,
        shifted=shifted,
        logit_sum=logit_sum,
        before=before,
        squares=squares,
        ref_bias=ref_bias,
        ref_maximum=ref_maximum,
        ref_total=ref_total,
        ref_label_logit=ref_label_logit,
        cross=cross,
        ref_rescale=ref_rescale,
    )
    n, v = tile.shape
    if n == 0:
        return
    config = fold_config(v) if ref_tile is None else pair_config(v)
    # For equal logits x - z must be 0. If the compiler contracts the transform's product into it
    # (fma), it is the product's rounding error.
    options = {} if ref_tile is None else {"enable_fp_fusion": False}
    count("fold")
    with on_device_of(tile):
        _fold_kernel[(n,)](
            tile,
            tile.stride(0),
            labels,
            bias,
            maximum,
            total,
            label_logit,
            label_slope,
            rescale,
            weights,
            0 if weights is None else weights.stride(0),
            shifted,
            logit_sum,
            before,
            squares,
            ref_tile,
            0 if ref_tile is None else ref_tile.stride(0),
            ref_bias,
            ref_maximum,
            ref_total,
            ref_label_logit,
            cross,
            ref_rescale,
            ref_weights,
            0 if ref_weights is None else ref_weights.stride(0),
            start,
            int(first),
            v,
            float(logit_scale),
            float(softcap or 1.0),
            float(temperature),
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=softcap is not None,
            HAS_WEIGHTS=weights is not None,
            HAS_STATS=shifted is not None,
            HAS_REFERENCE=ref_tile is not None,
            HAS_REF_BIAS=ref_bias is not None,
            ONE_BLOCK=ref_tile is None and v <= config.block,
            BLOCK_V=config.block,
            num_warps=config.num_warps,
            **options,
        )
