"""Turn a pair of tiles of raw products into the loss's gradient with respect to the policy's.

The loss is a function of each token's log-prob and of its divergence from reference to policy,
`kl = sum_v r_v (log r_v - log p_v)`, with p the policy's distribution and r the reference's:

    d loss / d z_v        = g ([v = y] - p_v) + k (p_v - r_v),    g = d loss / d logp, k = d loss / d kl
    d loss / d (h . W_v)  = logit_scale / temperature * t_v * d loss / d z_v

with `p_v = exp(z_v - maximum) / sum` and `r_v = exp(x_v - ref_maximum) / ref_sum`. The caller gives
`coefficient = (k - g) / sum`, `ref_coefficient = -k / ref_sum` and, for the label's column,
`label_gradient = g (1 - p_y) + k (p_y - r_y)`, formed where neither difference cancels. Everything
is float32 until the one rounding to the output's dtype. `gradient` may be the policy's tile itself.

One program a token; a block of words reads only what it overwrites.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launches import count
from .primitives import check_rows, check_vectors, load_logits, on_device_of, round_to
from .tiles import pair_config


@triton.jit
def _kl_gradient_kernel(
    tile_ptr,
    stride_tn,
    ref_tile_ptr,
    stride_rn,
    labels_ptr,
    bias_ptr,
    ref_bias_ptr,
    maximum_ptr,
    ref_maximum_ptr,
    coefficient_ptr,
    ref_coefficient_ptr,
    label_gradient_ptr,
    gradient_ptr,
    stride_gn,
    start,
    n_words,
    logit_scale,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_REF_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One token: its rows of both tiles into its row of the gradient."""
    row = tl.program_id(0).to(tl.int64)
    local = tl.load(labels_ptr + row) - start
    maximum = tl.load(maximum_ptr + row)
    ref_maximum = tl.load(ref_maximum_ptr + row)
    coefficient = tl.load(coefficient_ptr + row)
    ref_coefficient = tl.load(ref_coefficient_ptr + row)
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
        x, _ref_slope = load_logits(
            ref_tile_ptr + row * stride_rn,
            ref_bias_ptr,
            words,
            mask,
            logit_scale,
            softcap,
            temperature,
            HAS_REF_BIAS,
            HAS_SOFTCAP,
        )
        z = tl.where(mask, z, -float("inf"))
        x = tl.where(mask, x, -float("inf"))
        # d logp / d z_v = [v = label] - p_v,  d kl / d z_v = p_v - r_v
        dz = coefficient * tl.exp(z - maximum) + ref_coefficient * tl.exp(x - ref_maximum)
        dz = tl.where(words == local, label_gradient, dz) * slope * (logit_scale / temperature)
        value = round_to(dz, gradient_ptr.dtype.element_ty)
        tl.store(gradient_ptr + row * stride_gn + words, value, mask=mask)


def kl_gradient(
    tile: torch.Tensor,  # (n, v) float32; overwritten where it is gradient as well
    ref_tile: torch.Tensor,  # (n, v) float32
    labels: torch.Tensor,  # (n,) int64
    bias: torch.Tensor | None,  # (v,)
    ref_bias: torch.Tensor | None,  # (v,)
    maximum: torch.Tensor,  # (n,) float32
    ref_maximum: torch.Tensor,  # (n,) float32
    coefficient: torch.Tensor,  # (n,) float32
    ref_coefficient: torch.Tensor,  # (n,) float32
    label_gradient: torch.Tensor,  # (n,) float32
    gradient: torch.Tensor,  # (n, v), out; may be the tile itself
    *,
    start: int,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
) -> None:
    """Turn a pair of tiles into `d loss / d (h . W_v + b_v)` of the policy; one launch."""
    check_rows("tile", tile)
    check_rows("ref_tile", ref_tile)
    check_rows("gradient", gradient)
    check_vectors(
        labels=labels,
        bias=bias,
        ref_bias=ref_bias,
        maximum=maximum,
        ref_maximum=ref_maximum,
        coefficient=coefficient,
        ref_coefficient=ref_coefficient,
        label_gradient=label_gradient,
    )
    n, v = tile.shape
    if n == 0:
        return
    config = pair_config(v)
    count("kl_gradient")
    with on_device_of(tile):
        _kl_gradient_kernel[(n,)](
            tile,
            tile.stride(0),
            ref_tile,
            ref_tile.stride(0),
            labels,
            bias,
            ref_bias,
            maximum,
            ref_maximum,
            coefficient,
            ref_coefficient,
            label_gradient,
            gradient,
            gradient.stride(0),
            start,
            v,
            float(logit_scale),
            float(softcap or 1.0),
            float(temperature),
            HAS_BIAS=bias is not None,
            HAS_REF_BIAS=ref_bias is not None,
            HAS_SOFTCAP=softcap is not None,
            BLOCK_V=config.block,
            num_warps=config.num_warps,
            # Contracted (fma), the two products of equal distributions would not cancel exactly.
            enable_fp_fusion=False,
        )
