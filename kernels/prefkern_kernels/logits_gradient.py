"""Turn a tile of raw products into the gradient of the loss with respect to it, transform included.

    d loss / d z_v        = g ([v = y] - p_v),             g = d loss / d logp
    d loss / d (h . W_v)  = logit_scale / temperature * t_v * d loss / d z_v

with `p_v = exp(z_v - maximum) / sum`. The caller gives `coefficient = -g / sum` and, for the
label's column, `label_gradient = g (1 - p_y)`, formed where `1 - p_y` does not cancel. Everything
is float32 until the one rounding to the output's dtype. `gradient` may be the tile itself.

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
def _logits_gradient_kernel(
    tile_ptr,
    stride_tn,
    labels_ptr,
    bias_ptr,
    maximum_ptr,
    coefficient_ptr,
    label_gradient_ptr,
    gradient_ptr,
    stride_gn,
    start,
    n_words,
    logit_scale,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One token: its row of the tile into its row of the gradient."""
    row = tl.program_id(0).to(tl.int64)
    local = tl.load(labels_ptr + row) - start
    maximum = tl.load(maximum_ptr + row)
    coefficient = tl.load(coefficient_ptr + row)
    label_gradient = tl.load(label_gradient_ptr + row)
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
        z = tl.where(mask, z, -float("inf"))
        # d logp / d z_v = [v = label] - p_v
        dz = tl.where(words == local, label_gradient, coefficient * tl.exp(z - maximum))
        dz = dz * slope * (logit_scale / temperature)
        value = round_to(dz, gradient_ptr.dtype.element_ty)
        tl.store(gradient_ptr + row * stride_gn + words, value, mask=mask)


def logits_gradient(
    tile: torch.Tensor,  # (n, v) float32; overwritten where it is gradient as well
    labels: torch.Tensor,  # (n,) int64
    bias: torch.Tensor | None,  # (v,)
    maximum: torch.Tensor,  # (n,) float32
    coefficient: torch.Tensor,  # (n,) float32
    label_gradient: torch.Tensor,  # (n,) float32
    gradient: torch.Tensor,  # (n, v), out; may be the tile itself
    *,
    start: int,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
) -> None:
    """Turn a tile into `d loss / d (h . W_v + b_v)`; one launch."""
    check_rows("tile", tile)
    check_rows("gradient", gradient)
    check_vectors(
        labels=labels,
        bias=bias,
        maximum=maximum,
        coefficient=coefficient,
        label_gradient=label_gradient,
    )
    n, v = tile.shape
    if n == 0:
        return
    config = row_config(v)
    count("logits_gradient")
    with on_device_of(tile):
        _logits_gradient_kernel[(n,)](
            tile,
            tile.stride(0),
            labels,
            bias,
            maximum,
            coefficient,
            label_gradient,
            gradient,
            gradient.stride(0),
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
