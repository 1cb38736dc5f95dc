"""Bring the kept weights of a token to one unit, and put its label's value in its column.

`fold` writes a tile's weights relative to the maximum after that tile. If the maximum rose later,
or if the unit is not the maximum, the tile's part of the row is multiplied by `exp(maximum -
unit)`. For nearly all tiles this factor is 1, and only the label's element is written.

One program a token and tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launches import count
from .primitives import check_rows, check_vectors, on_device_of, round_to
from .tiles import row_config


@triton.jit
def _settle_kernel(
    kept_ptr,
    stride_kn,
    maxima_ptr,
    unit_ptr,
    label_value_ptr,
    labels_ptr,
    n_tokens,
    vocab_size,
    vocab_tile,
    BLOCK_V: tl.constexpr,
):
    """One token's part of one tile."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1).to(tl.int64)
    start = tile * vocab_tile
    n_entries = tl.minimum(vocab_tile, vocab_size - start)
    row_ptr = kept_ptr + row * stride_kn + start
    local = tl.load(labels_ptr + row) - start
    label_value = tl.load(label_value_ptr + row)
    factor = tl.exp(tl.load(maxima_ptr + tile * n_tokens + row) - tl.load(unit_ptr + row))
    dtype: tl.constexpr = kept_ptr.dtype.element_ty
    if factor != 1.0:
        for block in range(0, n_entries, BLOCK_V):
            entries = block + tl.arange(0, BLOCK_V)
            mask = entries < n_entries
            value = tl.load(row_ptr + entries, mask=mask, other=0.0).to(tl.float32) * factor
            value = tl.where(entries == local, label_value, value)
            tl.store(row_ptr + entries, round_to(value, dtype), mask=mask)
    elif (local >= 0) & (local < n_entries):
        tl.store(row_ptr + local, round_to(label_value, dtype))


def settle(
    kept: torch.Tensor,  # (n, V), in place
    maxima: torch.Tensor,  # (tiles, n) float32; each tile's columns are relative to one
    unit: torch.Tensor,  # (n,) float32; the columns shall be relative to it
    label_value: torch.Tensor,  # (n,) float32
    labels: torch.Tensor,  # (n,) int64
    vocab_tile: int,
) -> None:
    """Bring kept rows to one unit, the label's value included; one launch."""
    check_rows("kept", kept)
    check_vectors(maxima=maxima, unit=unit, label_value=label_value, labels=labels)
    n, vocab_size = kept.shape
    if n == 0:
        return
    config = row_config(min(vocab_tile, vocab_size))
    count("settle")
    with on_device_of(kept):
        _settle_kernel[(n, triton.cdiv(vocab_size, vocab_tile))](
            kept,
            kept.stride(0),
            maxima,
            unit,
            label_value,
            labels,
            n,
            vocab_size,
            vocab_tile,
            BLOCK_V=config.block,
            num_warps=config.num_warps,
        )
