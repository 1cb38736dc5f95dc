"""Turn a tile of raw products into the loss's gradient with respect to them, after the fold.

    out_v = r u_v,    u_v = exp(z_v - unit) t_v,    out_y = label_gradient

t_v is the softcap's derivative and r the token's factor (see `finish`); r includes the transform's
constant factor, or the caller multiplies by it. `ref_tile` holds the reference's raw products over
the same entries. Then the loss also depends on the divergence `sum_v r_v (log r_v - log p_v)`, and
its gradient `p_v - r_v` adds the reference's probabilities with a factor of their own:

    out_v = r exp(z_v - unit) t_v + ref_factor exp(x_v - ref_unit) t_v

The caller computes `label_gradient`, in a form in which neither difference cancels.

With `is_kept` the tiles already hold u_v, and the reference's, from the fold. All numbers are
float32 and are rounded once, to the output's dtype. `weights` may be the tile itself.

One program a token; a block of entries reads only what it overwrites.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launches import count
from .primitives import check_rows, check_vectors, load_logits, on_device_of, round_to
from .tiles import pair_config, row_config


@triton.jit
def _exponentials(
    row_ptr,
    bias_ptr,
    unit,
    entries,
    mask,
    counts,
    logit_scale,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_KEPT: tl.constexpr,
):
    """A block of exp(z - unit), 0 for what does not count, and of slopes; or what a fold kept."""
    if IS_KEPT:
        kept = tl.load(row_ptr + entries, mask=counts, other=0.0).to(tl.float32)
        return kept, tl.full(kept.shape, 1.0, tl.float32)
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
    # The label's logit may lie far above the unit; its exponential is never computed.
    return tl.exp(tl.where(counts, z - unit, -float("inf"))), slope


@triton.jit
def _remake_weights_kernel(
    tile_ptr,
    stride_tn,
    labels_ptr,
    bias_ptr,
    unit_ptr,
    factor_ptr,
    label_gradient_ptr,
    weights_ptr,
    stride_wn,
    ref_tile_ptr,
    stride_rn,
    ref_bias_ptr,
    ref_unit_ptr,
    ref_factor_ptr,
    start,
    n_entries,
    logit_scale,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    HAS_REF_BIAS: tl.constexpr,
    IS_KEPT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One token: turn its row of the tile, or of both, into its row of weights."""
    row = tl.program_id(0).to(tl.int64)
    # Of 32 bits, so that each comparison with an entry is one instruction.
    local = (tl.load(labels_ptr + row) - start).to(tl.int32)
    unit = tl.load(unit_ptr + row)
    factor = tl.load(factor_ptr + row)
    label_gradient = tl.load(label_gradient_ptr + row)
    if HAS_REFERENCE:
        ref_unit = tl.load(ref_unit_ptr + row)
        ref_factor = tl.load(ref_factor_ptr + row)
    for block in range(0, n_entries, BLOCK_V):
        entries = block + tl.arange(0, BLOCK_V)
        mask = entries < n_entries
        counts = mask & (entries != local)
        e, slope = _exponentials(
            tile_ptr + row * stride_tn,
            bias_ptr,
            unit,
            entries,
            mask,
            counts,
            logit_scale,
            softcap,
            temperature,
            HAS_BIAS,
            HAS_SOFTCAP,
            IS_KEPT,
        )
        value = e * factor
        if HAS_REFERENCE:
            ref_e, _ref_slope = _exponentials(
                ref_tile_ptr + row * stride_rn,
                ref_bias_ptr,
                ref_unit,
                entries,
                mask,
                counts,
                logit_scale,
                softcap,
                temperature,
                HAS_REF_BIAS,
                HAS_SOFTCAP,
                IS_KEPT,
            )
            value += ref_e * ref_factor
        value = tl.where(entries == local, label_gradient, value * slope)
        value = round_to(value, weights_ptr.dtype.element_ty)
        tl.store(weights_ptr + row * stride_wn + entries, value, mask=mask)


def remake_weights(
    tile: torch.Tensor,  # (n, v) float32; overwritten if it is weights as well
    labels: torch.Tensor,  # (n,) int64
    bias: torch.Tensor | None,  # (v,)
    unit: torch.Tensor,  # (n,) float32
    factor: torch.Tensor,  # (n,) float32, r
    label_gradient: torch.Tensor,  # (n,) float32
    weights: torch.Tensor,  # (n, v), out; may be the tile itself
    *,
    ref_tile: torch.Tensor | None = None,  # (n, v), as tile; None: no reference
    ref_bias: torch.Tensor | None = None,  # (v,)
    ref_unit: torch.Tensor | None = None,  # (n,) float32
    ref_factor: torch.Tensor | None = None,  # (n,) float32
    is_kept: bool = False,  # the tiles hold u, in any dtype
    start: int,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
) -> None:
    """Turn a tile, or a pair of tiles, into the loss's gradient; one launch."""
    check_rows("tile", tile)
    check_rows("weights", weights)
    if ref_tile is not None:
        check_rows("ref_tile", ref_tile)
    check_vectors(
        labels=labels,
        bias=bias,
        unit=unit,
        factor=factor,
        label_gradient=label_gradient,
        ref_bias=ref_bias,
        ref_unit=ref_unit,
        ref_factor=ref_factor,
    )
    n, v = tile.shape
    if n == 0:
        return
    config = row_config(v) if ref_tile is None else pair_config(v)
    # Contracted (fma), the two products of equal distributions would not cancel exactly.
    options = {} if ref_tile is None else {"enable_fp_fusion": False}
    count("remake_weights")
    with on_device_of(tile):
        _remake_weights_kernel[(n,)](
            tile,
            tile.stride(0),
            labels,
            bias,
            unit,
            factor,
            label_gradient,
            weights,
            weights.stride(0),
            ref_tile,
            0 if ref_tile is None else ref_tile.stride(0),
            ref_bias,
            ref_unit,
            ref_factor,
            start,
            v,
            float(logit_scale),
            float(softcap or 1.0),
            float(temperature),
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=softcap is not None,
            HAS_REFERENCE=ref_tile is not None,
            HAS_REF_BIAS=ref_bias is not None,
            IS_KEPT=is_kept,
            BLOCK_V=config.block,
            num_warps=config.num_warps,
            **options,
        )
