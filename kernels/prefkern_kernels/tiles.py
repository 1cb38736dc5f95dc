"""Block sizes of the kernels, a static choice: nothing is tuned at a user's first call.

The fold and the gradient walk a row of a tile in blocks of `BLOCK_V` words, one program a token.
"""

from __future__ import annotations

from typing import NamedTuple

from .primitives import INTERPRET

# Each program costs a fixed time under the interpreter, each block little: one block a row there.
_LARGEST_BLOCK = 65536 if INTERPRET else 2048


class RowConfig(NamedTuple):
    """Launch configuration of a kernel that walks rows."""

    block: int
    num_warps: int


def row_config(row_size: int) -> RowConfig:
    """Blocks no longer than a row needs, with eight elements or so a thread."""
    block = 128
    while block < row_size and block < _LARGEST_BLOCK:
        block *= 2
    return RowConfig(block, min(max(block // 256, 1), 8))


def pair_config(row_size: int) -> RowConfig:
    """As `row_config`, for kernels that hold blocks of two rows at once: half as many elements."""
    block, num_warps = row_config(row_size)
    return RowConfig(block if INTERPRET else min(block, 1024), num_warps)
