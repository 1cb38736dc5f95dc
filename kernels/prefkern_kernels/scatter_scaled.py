"""`out[rows[t]] = scale[t] values[t]`, rounded once: from D to the gradient of hidden.

With a divergence a token has two terms; their sum is rounded once. One program a token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launches import count
from .primitives import check_rows, check_vectors, on_device_of, round_to
from .tiles import row_config


@triton.jit
def _scatter_scaled_kernel(
    values_ptr,
    stride_vn,
    scale_ptr,
    others_ptr,
    stride_on,
    other_scale_ptr,
    rows_ptr,
    out_ptr,
    stride_un,
    n_columns,
    HAS_OTHERS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One token: scale its row of values and write it to its place."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + token) if HAS_ROWS else token
    scale = tl.load(scale_ptr + token)
    for block in range(0, n_columns, BLOCK_H):
        columns = block + tl.arange(0, BLOCK_H)
        mask = columns < n_columns
        value = tl.load(values_ptr + token * stride_vn + columns, mask=mask, other=0.0) * scale
        if HAS_OTHERS:
            other = tl.load(others_ptr + token * stride_on + columns, mask=mask, other=0.0)
            value += other * tl.load(other_scale_ptr + token)
        value = round_to(value, out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * stride_un + columns, value, mask=mask)


def scatter_scaled(
    values: torch.Tensor,  # (n, H) float32
    scale: torch.Tensor,  # (n,) float32
    rows: torch.Tensor | None,  # (n,) int64, no two the same; None: 0, 1, ...
    out: torch.Tensor,  # (m, H), in any dtype; other rows stay as they are
    others: torch.Tensor | None = None,  # (n, H) float32, the second term, if there is one
    other_scale: torch.Tensor | None = None,  # (n,) float32
) -> None:
    """Scale rows and put them in their places; one launch."""
    check_rows("values", values)
    if others is not None and other_scale is not None:
        check_rows("others", others)
        other_scale = other_scale.contiguous()
    check_rows("out", out)
    scale = scale.contiguous()
    check_vectors(rows=rows)
    n, h = values.shape
    if n == 0:
        return
    config = row_config(h)
    count("scatter_scaled")
    with on_device_of(values):
        _scatter_scaled_kernel[(n,)](
            values,
            values.stride(0),
            scale,
            others,
            0 if others is None else others.stride(0),
            other_scale,
            rows,
            out,
            out.stride(0),
            h,
            HAS_OTHERS=others is not None,
            HAS_ROWS=rows is not None,
            BLOCK_H=config.block,
            num_warps=config.num_warps,
        )
