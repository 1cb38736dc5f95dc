"""Turn a tile of raw products into the loss's derivative, once the fold has been finished.

    r u_v,    u_v = exp(z_v - unit) t_v,    u_label = label_value

with t_v the softcap's derivative and r the token's factor (see `finish`). All of it is float32 until
the one rounding to the output's dtype. `weights` may be the tile itself.

One program a token; a block of words reads only what it overwrites.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launches import count
from .primitives import check_rows, check_vectors, load_logits, on_device_of, round_to
from .tiles import row_config


@triton.jit
def _remake_weights_kernel(
    tile_ptr,
    stride_tn,
    labels_ptr,
    bias_ptr,
    unit_ptr,
    label_value_ptr,
    factor_ptr,
    weights_ptr,
    stride_wn,
    start,
    n_words,
    logit_scale,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One token: its row of the tile into its row of weights."""
    row = tl.program_id(0).to(tl.int64)
    local = tl.load(labels_ptr + row) - start
    unit = tl.load(unit_ptr + row)
    label_value = tl.load(label_value_ptr + row)
    factor = tl.load(factor_ptr + row)
    for block in range(0, n_words, BLOCK_V):
        words = block + tl.arange(0, BLOCK_V)
        mask = words < n_words
        z, slope = load_logits(
            tile_ptr + row * stride_tn,
            bias_ptr,
            words,
            mask,
            logit_scale,
            softcap,
            temperature,
            HAS_BIAS,
            HAS_SOFTCAP,
        )
        # The label's own logit may lie far above the unit: its exponential is never formed.
        z = tl.where(mask & (words != local), z - unit, -float("inf"))
        u = tl.where(words == local, label_value, tl.exp(z) * slope)
        value = round_to(u * factor, weights_ptr.dtype.element_ty)
        tl.store(weights_ptr + row * stride_wn + words, value, mask=mask)


def remake_weights(
    tile: torch.Tensor,  # (n, v) float32; overwritten where it is weights as well
    labels: torch.Tensor,  # (n,) int64
    bias: torch.Tensor | None,  # (v,)
    unit: torch.Tensor,  # (n,) float32
    label_value: torch.Tensor,  # (n,) float32
    factor: torch.Tensor,  # (n,) float32, r
    weights: torch.Tensor,  # (n, v), out; may be the tile itself
    *,
    start: int,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
) -> None:
    """Turn a tile into the loss's derivative; one launch."""
    check_rows("tile", tile)
    check_rows("weights", weights)
    check_vectors(labels=labels, bias=bias, unit=unit, label_value=label_value, factor=factor)
    n, v = tile.shape
    if n == 0:
        return
    config = row_config(v)
    count("remake_weights")
    with on_device_of(tile):
        _remake_weights_kernel[(n,)](
            tile,
            tile.stride(0),
            labels,
            bias,
            unit,
            label_value,
            factor,
            weights,
            weights.stride(0),
            start,
            v,
            float(logit_scale),
            float(softcap or 1.0),
            float(temperature),
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=softcap is not None,
            BLOCK_V=config.block,
            num_warps=config.num_warps,
        )
