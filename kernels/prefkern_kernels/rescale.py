"""Multiply rows of the one-pass accumulator by `exp(m - m')`; only rows whose m rose are touched.

The accumulator `(n, H)` of `sum_v exp(z_v - m) W_v` is relative to a running maximum. After a
token's largest logit its factor stays 1, and a program that finds 1 returns at once. This saves
most of the traffic of a plain in-place product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launches import count
from .primitives import check_rows, check_vectors, on_device_of
from .tiles import row_config


@triton.jit
def _rescale_rows_kernel(
    accumulator_ptr,
    stride_an,
    factor_ptr,
    n_columns,
    BLOCK_H: tl.constexpr,
):
    """One token: its row of the accumulator, if its maximum rose."""
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(factor_ptr + row)
    if factor != 1.0:
        row_ptr = accumulator_ptr + row * stride_an
        for block in range(0, n_columns, BLOCK_H):
            columns = block + tl.arange(0, BLOCK_H)
            mask = columns < n_columns
            value = tl.load(row_ptr + columns, mask=mask, other=0.0)
            tl.store(row_ptr + columns, value * factor, mask=mask)


def rescale_rows(
    accumulator: torch.Tensor,  # (n, H) float32, in place
    factor: torch.Tensor,  # (n,) float32
) -> None:
    """Multiply each row by its factor; one launch."""
    check_rows("accumulator", accumulator)
    check_vectors(factor=factor)
    n, h = accumulator.shape
    if n == 0:
        return
    config = row_config(h)
    count("rescale_rows")
    with on_device_of(accumulator):
        _rescale_rows_kernel[(n,)](
            accumulator,
            accumulator.stride(0),
            factor,
            h,
            BLOCK_H=config.block,
            num_warps=config.num_warps,
        )
