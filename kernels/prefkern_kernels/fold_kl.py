"""Fold a pair of float32 tiles, policy and reference, into two running states and their divergence.

For raw products over the same words, with z the policy's transformed logits and x the reference's,
each row is folded as `fold` does it, the label y left out:

    m'      = max(m, max_{v != y} z_v)                  m_r' of x in the same way
    total'  = total exp(m - m') + sum_{v != y} exp(z_v - m')
    cross'  = cross exp(m_r - m_r') + sum_{v != y} exp(x_v - m_r') (x_v - z_v)

and the label's logits are kept where y lies in the tiles. With lse the logarithms of the whole sums,
`sum_v r_v (log r_v - log p_v) = sum_v r_v (x_v - z_v) - (lse_r - lse_p)`: the divergence needs no
more than this.

With `weights` and `ref_weights`, the rows are written back as `exp(z_v - m') t_v` and
`exp(x_v - m_r') t_v` for two products with the policy's weight: t_v is the softcap's derivative at
the policy's logit in both, since only the policy has a gradient. They may be the tiles themselves.

One program a token; the rows are read twice, the second time from cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launches import count
from .primitives import check_rows, check_vectors, load_logits, on_device_of, round_to
from .tiles import pair_config


@triton.jit
def _first_reading(
    row_ptr,
    bias_ptr,
    local,
    n_words,
    logit_scale,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """A row's maximum without the label; the label's logit and slope, 0 where it is elsewhere."""
    offs_v = tl.arange(0, BLOCK_V)
    maximum = tl.full((BLOCK_V,), -float("inf"), tl.float32)
    label_logit = tl.zeros((BLOCK_V,), tl.float32)
    label_slope = tl.zeros((BLOCK_V,), tl.float32)
    for block in range(0, n_words, BLOCK_V):
        words = block + offs_v
        mask = words < n_words
        z, slope = load_logits(
            row_ptr,
            bias_ptr,
            words,
            mask,
            logit_scale,
            softcap,
            temperature,
            HAS_BIAS,
            HAS_SOFTCAP,
        )
        is_label = mask & (words == local)
        maximum = tl.maximum(maximum, tl.where(mask & ~is_label, z, -float("inf")))
        label_logit += tl.where(is_label, z, 0.0)
        label_slope += tl.where(is_label, slope, 0.0)
    return tl.max(maximum, axis=0), tl.sum(label_logit, axis=0), tl.sum(label_slope, axis=0)


@triton.jit
def _fold_kl_kernel(
    tile_ptr,
    stride_tn,
    ref_tile_ptr,
    stride_rn,
    labels_ptr,
    bias_ptr,
    ref_bias_ptr,
    maximum_ptr,
    total_ptr,
    label_logit_ptr,
    label_slope_ptr,
    ref_maximum_ptr,
    ref_total_ptr,
    ref_label_logit_ptr,
    cross_ptr,
    rescale_ptr,
    ref_rescale_ptr,
    weights_ptr,
    stride_wn,
    ref_weights_ptr,
    stride_un,
    start,
    n_words,
    logit_scale,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_REF_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One token: its rows of both tiles into its states, and its rows of weights."""
    row = tl.program_id(0).to(tl.int64)
    tile_row = tile_ptr + row * stride_tn
    ref_tile_row = ref_tile_ptr + row * stride_rn
    local = tl.load(labels_ptr + row) - start

    tile_max, label_logit, label_slope = _first_reading(
        tile_row,
        bias_ptr,
        local,
        n_words,
        logit_scale,
        softcap,
        temperature,
        HAS_BIAS,
        HAS_SOFTCAP,
        BLOCK_V,
    )
    ref_tile_max, ref_label_logit, _ref_label_slope = _first_reading(
        ref_tile_row,
        ref_bias_ptr,
        local,
        n_words,
        logit_scale,
        softcap,
        temperature,
        HAS_REF_BIAS,
        HAS_SOFTCAP,
        BLOCK_V,
    )
    if (local >= 0) & (local < n_words):
        tl.store(label_logit_ptr + row, label_logit)
        tl.store(ref_label_logit_ptr + row, ref_label_logit)
        if HAS_SOFTCAP:
            tl.store(label_slope_ptr + row, label_slope)

    old = tl.load(maximum_ptr + row)
    new = tl.maximum(old, tile_max)
    ref_old = tl.load(ref_maximum_ptr + row)
    ref_new = tl.maximum(ref_old, ref_tile_max)
    # Where no logit but the label's has been seen the maximum is -inf, and exp(-inf - 0) = 0.
    offset = tl.where(new == -float("inf"), 0.0, new)
    factor = tl.exp(old - offset)
    ref_offset = tl.where(ref_new == -float("inf"), 0.0, ref_new)
    ref_factor = tl.exp(ref_old - ref_offset)

    # Second reading: the sums, and the weights.
    offs_v = tl.arange(0, BLOCK_V)
    sums = tl.zeros((BLOCK_V,), tl.float32)
    ref_sums = tl.zeros((BLOCK_V,), tl.float32)
    cross = tl.zeros((BLOCK_V,), tl.float32)
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
        x, _ref_slope = load_logits(
            ref_tile_row,
            ref_bias_ptr,
            words,
            mask,
            logit_scale,
            softcap,
            temperature,
            HAS_REF_BIAS,
            HAS_SOFTCAP,
        )
        kept = mask & (words != local)
        e = tl.exp(tl.where(kept, z - offset, -float("inf")))
        ref_e = tl.exp(tl.where(kept, x - ref_offset, -float("inf")))
        sums += e
        ref_sums += ref_e
        # A word that neither model can say, of logit -inf in both, is no difference.
        cross += ref_e * tl.where(ref_e > 0, x - z, 0.0)
        if HAS_WEIGHTS:
            value = round_to(e * slope, weights_ptr.dtype.element_ty)
            tl.store(weights_ptr + row * stride_wn + words, value, mask=mask)
            ref_value = round_to(ref_e * slope, ref_weights_ptr.dtype.element_ty)
            tl.store(ref_weights_ptr + row * stride_un + words, ref_value, mask=mask)

    total = tl.load(total_ptr + row) * factor + tl.sum(sums, axis=0)
    ref_total = tl.load(ref_total_ptr + row) * ref_factor + tl.sum(ref_sums, axis=0)
    tl.store(maximum_ptr + row, new)
    tl.store(total_ptr + row, total)
    tl.store(ref_maximum_ptr + row, ref_new)
    tl.store(ref_total_ptr + row, ref_total)
    tl.store(cross_ptr + row, tl.load(cross_ptr + row) * ref_factor + tl.sum(cross, axis=0))
    if HAS_WEIGHTS:
        tl.store(rescale_ptr + row, factor)
        tl.store(ref_rescale_ptr + row, ref_factor)


def fold_kl(
    tile: torch.Tensor,  # (n, v) float32; overwritten where it is weights as well
    ref_tile: torch.Tensor,  # (n, v) float32; overwritten where it is ref_weights as well
    labels: torch.Tensor,  # (n,) int64, over the whole vocabulary
    bias: torch.Tensor | None,  # (v,)
    ref_bias: torch.Tensor | None,  # (v,)
    maximum: torch.Tensor,  # (n,) float32, in and out, as are the next ones
    total: torch.Tensor,  # (n,)
    label_logit: torch.Tensor,  # (n,)
    label_slope: torch.Tensor,  # (n,)
    ref_maximum: torch.Tensor,  # (n,)
    ref_total: torch.Tensor,  # (n,)
    ref_label_logit: torch.Tensor,  # (n,)
    cross: torch.Tensor,  # (n,)
    rescale: torch.Tensor | None,  # (n,), out
    ref_rescale: torch.Tensor | None,  # (n,), out
    weights: torch.Tensor | None,  # (n, v), out; may be the tile itself
    ref_weights: torch.Tensor | None,  # (n, v), out, with weights; may be ref_tile itself
    *,
    start: int,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
) -> None:
    """Fold a pair of tiles into each token's running states; one launch."""
    check_rows("tile", tile)
    check_rows("ref_tile", ref_tile)
    if weights is not None:
        check_rows("weights", weights)
    if ref_weights is not None:
        check_rows("ref_weights", ref_weights)
    check_vectors(
        labels=labels,
        bias=bias,
        ref_bias=ref_bias,
        maximum=maximum,
        total=total,
        label_logit=label_logit,
        label_slope=label_slope,
        ref_maximum=ref_maximum,
        ref_total=ref_total,
        ref_label_logit=ref_label_logit,
        cross=cross,
        rescale=rescale,
        ref_rescale=ref_rescale,
    )
    n, v = tile.shape
    if n == 0:
        return
    config = pair_config(v)
    count("fold_kl")
    with on_device_of(tile):
        _fold_kl_kernel[(n,)](
            tile,
            tile.stride(0),
            ref_tile,
            ref_tile.stride(0),
            labels,
            bias,
            ref_bias,
            maximum,
            total,
            label_logit,
            label_slope,
            ref_maximum,
            ref_total,
            ref_label_logit,
            cross,
            rescale,
            ref_rescale,
            weights,
            0 if weights is None else weights.stride(0),
            ref_weights,
            0 if ref_weights is None else ref_weights.stride(0),
            start,
            v,
            float(logit_scale),
            float(softcap or 1.0),
            float(temperature),
            HAS_BIAS=bias is not None,
            HAS_REF_BIAS=ref_bias is not None,
            HAS_SOFTCAP=softcap is not None,
            HAS_WEIGHTS=weights is not None,
            BLOCK_V=config.block,
            num_warps=config.num_warps,
            # x - z with the transform's product contracted into it (fma) is the product's rounding
            # error, and not 0, where the two logits are equal.
            enable_fp_fusion=False,
        )
