"""Fold a float32 tile of logits into each token's running maximum, sum and label logit.

For token t with label y and a tile of raw products `(n, v)` over words `start ... start + v`:

    z_v     = transform(tile_v + b_v)
    m'      = max(m, max_{v != y} z_v)
    total'  = total exp(m - m') + sum_{v != y} exp(z_v - m')

and `label_logit = z_y` where y lies in the tile. The label's own term is left out of the sum, so
that a confident token's `1 - p_y` is never a difference of near-equal numbers. When asked, also
`shifted = sum_{v != y} exp(z_v - m) (z_v - m)`, `logit_sum = sum_v z_v`, `before`, the largest logit
ahead of the label, and `squares = sum_{v != y} exp(2 (z_v - m))`: entropy, mean logit, top-1 and
`sum_v p_v^2` follow from them.

With `weights`, the row is written back as `exp(z_v - m') t_v` (t_v the softcap's derivative, 0 in
the label's column) for a second product with the weight, and `rescale = exp(m - m')` is what the
accumulator of that product must be multiplied by first. `weights` may be the tile itself.

The first tile of a token begins its state, whatever the vectors held.

One program a token; the row is read twice, the second time from cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launches import count
from .primitives import check_rows, check_vectors, load_logits, on_device_of, round_to
from .tiles import row_config


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
    start,
    first,
    n_words,
    logit_scale,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_STATS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One token: its row of the tile into its state, and its row of weights."""
    row = tl.program_id(0).to(tl.int64)
    tile_row = tile_ptr + row * stride_tn
    local = tl.load(labels_ptr + row) - start
    offs_v = tl.arange(0, BLOCK_V)

    # First reading: the maximum without the label, and the label's own logit.
    tile_max = tl.full((BLOCK_V,), -float("inf"), tl.float32)
    before_max = tl.full((BLOCK_V,), -float("inf"), tl.float32)
    logit_sum = tl.zeros((BLOCK_V,), tl.float32)
    for block in range(0, n_words, BLOCK_V):
        words = block + offs_v
        mask = words < n_words
        z, slope = load_logits(
            tile_row,
            bias_ptr,
            words,
            mask,
            logit_scale,
            softcap,
            temperature,
            HAS_BIAS,
            HAS_SOFTCAP,
        )
        is_label = words == local
        tile_max = tl.maximum(tile_max, tl.where(mask & ~is_label, z, -float("inf")))
        if HAS_STATS:
            logit_sum += tl.where(mask, z, 0.0)
            before_max = tl.maximum(before_max, tl.where(mask & (words < local), z, -float("inf")))
        if (local >= block) & (local < block + BLOCK_V) & (local < n_words):
            tl.store(label_logit_ptr + row, tl.sum(tl.where(is_label, z, 0.0), axis=0))
            tl.store(label_slope_ptr + row, tl.sum(tl.where(is_label, slope, 0.0), axis=0))

    old = tl.load(maximum_ptr + row, mask=first == 0, other=-float("inf"))
    new = tl.maximum(old, tl.max(tile_max, axis=0))
    # Where no logit but the label's has been seen the maximum is -inf, and exp(-inf - 0) = 0.
    offset = tl.where(new == -float("inf"), 0.0, new)
    factor = tl.exp(old - offset)

    # Second reading: the sum, and the weights.
    sums = tl.zeros((BLOCK_V,), tl.float32)
    shifted = tl.zeros((BLOCK_V,), tl.float32)
    squares = tl.zeros((BLOCK_V,), tl.float32)
    for block in range(0, n_words, BLOCK_V):
        words = block + offs_v
        mask = words < n_words
        z, slope = load_logits(
            tile_row,
            bias_ptr,
            words,
            mask,
            logit_scale,
            softcap,
            temperature,
            HAS_BIAS,
            HAS_SOFTCAP,
        )
        z = tl.where(mask & (words != local), z - offset, -float("inf"))
        e = tl.exp(z)
        sums += e
        if HAS_STATS:
            # exp is 0 from -104 down: the bound changes no product, and keeps 0 * -inf out.
            shifted += e * tl.maximum(z, -200.0)
            squares += e * e
        if HAS_WEIGHTS:
            value = round_to(e * slope, weights_ptr.dtype.element_ty)
            tl.store(weights_ptr + row * stride_wn + words, value, mask=mask)

    total = tl.load(total_ptr + row, mask=first == 0, other=0.0)
    tl.store(maximum_ptr + row, new)
    tl.store(total_ptr + row, total * factor + tl.sum(sums, axis=0))
    begins_elsewhere = (first != 0) & ((local < 0) | (local >= n_words))
    tl.store(label_logit_ptr + row, -float("inf"), mask=begins_elsewhere)
    tl.store(label_slope_ptr + row, 1.0, mask=begins_elsewhere)
    if HAS_WEIGHTS:
        tl.store(rescale_ptr + row, factor)
    if HAS_STATS:
        moved = tl.where(total > 0, old - offset, 0.0) * total
        running = tl.load(shifted_ptr + row, mask=first == 0, other=0.0)
        running = (running + moved) * factor
        tl.store(shifted_ptr + row, running + tl.sum(shifted, axis=0))
        running = tl.load(logit_sum_ptr + row, mask=first == 0, other=0.0)
        tl.store(logit_sum_ptr + row, running + tl.sum(logit_sum, axis=0))
        highest = tl.load(before_ptr + row, mask=first == 0, other=-float("inf"))
        tl.store(before_ptr + row, tl.maximum(highest, tl.max(before_max, axis=0)))
        running = tl.load(squares_ptr + row, mask=first == 0, other=0.0) * factor * factor
        tl.store(squares_ptr + row, running + tl.sum(squares, axis=0))


def fold(
    tile: torch.Tensor,  # (n, v) float32; overwritten where it is weights as well
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
    start: int,
    first: bool,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
) -> None:
    """Fold a tile into each token's running state; one launch."""
    check_rows("tile", tile)
    if weights is not None:
        check_rows("weights", weights)
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
    )
    n, v = tile.shape
    if n == 0:
        return
    config = row_config(v)
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
            BLOCK_V=config.block,
            num_warps=config.num_warps,
        )
