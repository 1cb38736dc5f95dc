"""Tile configurations, a table per device: nothing is tuned at a user's first call.

Kernels that walk a row of a tile, one program a token, take their blocks from `row_config` and
`pair_config`. `product_fold` takes its tiles from `PRODUCTS`, by architecture or by a device's own
name, and by class of product. Other devices get `FALLBACK`: small tiles, read by pointers, which
fit every GPU. A `Choice` lists its candidates, the one in use first, and says where their order was
measured. If `measured` is empty, the order is a guess from registers and bytes. `autotune` measures
it on your own device; its file is preferred to this table.

`tests/kernels/test_compile_ahead.py` asserts that the candidate in use compiles without spills with
Triton 3.6.0, 3.7.1 and 3.9.0, and every other candidate with at least one of them.
`bench/COMPILE.md` has their registers and shared memory. So a thread has at most 128 accumulators,
and at most 64 with a bias or a softcap.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton

from .primitives import INTERPRET

# Under the interpreter a program costs a fixed time and a block little: there, one block a row.
_LARGEST_BLOCK = 65536 if INTERPRET else 2048
# The longest row that a fold holds in registers. `prefkern.ops.plan` makes tiles no wider.
FOLD_BLOCK = 8192
# Below this H a product takes little time beside the fold of its logits.
_WIDE = 2048
# Entries of a tile that the end of the vocabulary cuts.
_TAIL_BLOCK = 64


class RowConfig(NamedTuple):
    """Launch configuration of a kernel that walks rows."""

    block: int
    num_warps: int


def row_config(row_size: int) -> RowConfig:
    """Blocks no longer than a row needs, with about eight elements a thread."""
    block = 128
    while block < row_size and block < _LARGEST_BLOCK:
        block *= 2
    return RowConfig(block, min(max(block // 256, 1), 8))


def fold_config(row_size: int) -> RowConfig:
    """The block of a whole row, held in registers and so read once; for longer rows `row_config`.

    A thread has at most 16 elements. With 32, two programs of a row of 16,384 need all registers of
    a multiprocessor, and most variants of the kernel spill some of them with one of the supported
    versions of Triton.
    """
    if INTERPRET or row_size > FOLD_BLOCK:
        return row_config(row_size)
    block = max(triton.next_power_of_2(row_size), 128)
    return RowConfig(block, min(max(block // 256, 1), 16))


def pair_config(row_size: int) -> RowConfig:
    """As `row_config`, for kernels that hold blocks of two rows at once: an eighth of the elements.

    With more elements ptxas spills 8 bytes of a fold of pairs on some of sm_80, sm_90 and sm_100
    (Triton 3.7.1).
    """
    block, num_warps = row_config(row_size)
    return RowConfig(block if INTERPRET else min(block, 256), num_warps)


class ProductConfig(NamedTuple):
    """Tiles and launch configuration of `product_fold`."""

    block_n: int
    block_v: int
    block_h: int
    num_warps: int
    num_stages: int
    by_descriptor: bool = False  # operands by TMA, from compute capability 9.0 on
    flatten: bool = False  # the tiles of a strip in one pipeline, no draining between them
    specialize: bool = False  # loads, products and folds in warps of their own
    tiles: int = 4  # tiles of the vocabulary in a split
    group: int = 8  # token blocks that walk the vocabulary together

    def parts(self, vocab_size: int) -> list[VocabPart]:
        """Whole tiles, and smaller ones for the rest: a large tile with a mask spills."""
        whole = vocab_size - vocab_size % self.block_v
        tail = self._replace(
            block_v=min(self.block_v, _TAIL_BLOCK), flatten=False, specialize=False, tiles=1
        )
        parts = [VocabPart(0, whole, self), VocabPart(whole, vocab_size, tail)]
        return [part for part in parts if part.start < part.stop]

    def splits(self, vocab_size: int) -> int:
        """How many parts of the vocabulary are folded apart, at any number of tokens."""
        return sum(part.splits for part in self.parts(vocab_size))


class VocabPart(NamedTuple):
    """Consecutive entries that one launch folds."""

    start: int
    stop: int
    config: ProductConfig

    @property
    def splits(self) -> int:
        return -(-(self.stop - self.start) // (self.config.block_v * self.config.tiles))


class ProductClass(NamedTuple):
    """Products that share their configurations."""

    operands: str  # "half", "tf32" or "float32"
    wide: bool  # H >= 2048
    plain: bool  # no bias and no softcap


class Choice(NamedTuple):
    """Candidates for a class of products, the one in use first."""

    candidates: tuple[ProductConfig, ...]
    measured: str = ""  # device, versions and date; empty: not measured
    # Whether the first one was measured to beat the library's product with a fold after it.
    beats_library: bool = False


def _choices(
    table: dict[tuple[str, bool], tuple[ProductConfig, ...]],  # by operands and `plain`
) -> dict[ProductClass, Choice]:
    """The same candidates at both widths; at a small H strips are longer."""
    choices = {}
    for (operands, plain), candidates in table.items():
        narrow = tuple(c._replace(tiles=4 * c.tiles) for c in candidates)
        choices[ProductClass(operands, True, plain)] = Choice(candidates)
        choices[ProductClass(operands, False, plain)] = Choice(narrow)
    return choices


_Config = ProductConfig
# Products of true float32 operands run on the ordinary units: registers limit their tiles.
_FLOAT32 = (_Config(64, 64, 32, 8, 2), _Config(64, 64, 16, 8, 2))

PRODUCTS: dict[str, dict[ProductClass, Choice]] = {
    "sm_80": _choices(
        {
            ("half", True): (
                _Config(128, 128, 64, 8, 3),
                _Config(128, 128, 32, 8, 4),
                _Config(64, 256, 64, 8, 3),
            ),
            ("half", False): (_Config(128, 128, 64, 8, 3), _Config(128, 128, 32, 8, 4)),
            ("tf32", True): (_Config(128, 128, 32, 8, 3),),
            ("tf32", False): (_Config(128, 128, 32, 8, 3),),
            ("float32", True): _FLOAT32,
            ("float32", False): _FLOAT32,
        }
    ),
    # The compiler cannot specialise the warps of these kernels for Hopper: Triton 3.7.1 fails on
    # 128 x 128 tiles of four warps, 3.6.0 accepts only those, and both ignore the option on other
    # tiles. Flattened tiles of 128 x 256 need no draining between them, but with Triton 3.9.0 they
    # spill 224 bytes.
    "sm_90": _choices(
        {
            ("half", True): (
                _Config(128, 256, 64, 8, 3, by_descriptor=True),
                _Config(128, 256, 64, 8, 4, by_descriptor=True, flatten=True),
                _Config(128, 256, 64, 8, 3, by_descriptor=True, flatten=True),
                _Config(256, 128, 64, 8, 4, by_descriptor=True, flatten=True),
                _Config(128, 128, 64, 8, 4, by_descriptor=True, flatten=True),
                _Config(128, 128, 64, 4, 3, by_descriptor=True),
                _Config(128, 256, 64, 8, 3),
                _Config(128, 128, 64, 8, 3),
            ),
            ("half", False): (
                _Config(128, 128, 64, 8, 4, by_descriptor=True, flatten=True),
                _Config(128, 128, 64, 8, 3, by_descriptor=True),
                _Config(128, 128, 64, 8, 3),
            ),
            ("tf32", True): (
                _Config(128, 128, 32, 8, 4, by_descriptor=True, flatten=True),
                _Config(128, 128, 32, 8, 3),
            ),
            ("tf32", False): (
                _Config(128, 128, 32, 8, 4, by_descriptor=True, flatten=True),
                _Config(128, 128, 32, 8, 3),
            ),
            ("float32", True): _FLOAT32,
            ("float32", False): _FLOAT32,
        }
    ),
    # Specialised loops are flattened as well, since Triton 3.6.0 fails on those that are not. With
    # both a bias and a softcap they spill.
    "sm_100": _choices(
        {
            ("half", True): (
                _Config(128, 256, 64, 8, 4, by_descriptor=True),
                _Config(128, 256, 64, 8, 4, True, True, True),
                _Config(128, 256, 64, 8, 3, True, True, True),
                _Config(128, 128, 64, 4, 4, True, True, True),
                _Config(128, 256, 64, 8, 3),
            ),
            ("half", False): (_Config(128, 128, 64, 8, 4, by_descriptor=True),),
            ("tf32", True): (
                _Config(128, 128, 32, 8, 4, True, True, True),
                _Config(128, 128, 32, 8, 3, by_descriptor=True),
            ),
            ("tf32", False): (_Config(128, 128, 32, 8, 3, by_descriptor=True),),
            ("float32", True): _FLOAT32[:1],
            ("float32", False): _FLOAT32[:1],
        }
    ),
    "gfx942": _choices(
        {
            ("half", True): (_Config(64, 128, 64, 8, 2), _Config(128, 64, 64, 8, 2)),
            ("half", False): (_Config(64, 128, 64, 8, 2), _Config(128, 64, 64, 8, 2)),
            ("float32", True): _FLOAT32[1:],
            ("float32", False): _FLOAT32[1:],
        }
    ),
}

FALLBACK = Choice((_Config(64, 128, 32, 8, 3),))
# Few programs, each with large blocks.
_INTERPRETED = Choice((_Config(64, 512, 512, 8, 1),))
_FALLBACK_FLOAT32 = Choice(_FLOAT32[1:])


def product_class(dtype: torch.dtype, tf32: bool, hidden_size: int, plain: bool) -> ProductClass:
    """The class of a product; `tf32` is the result of `allows_tf32`."""
    single = "tf32" if tf32 else "float32"
    operands = single if dtype == torch.float32 else "half"
    return ProductClass(operands, hidden_size >= _WIDE, plain)


def product_choice(name: str, arch: str, product: ProductClass) -> Choice:
    """The table's choice for a device: by its own name, by its architecture, or the fallback."""
    for key in (name, arch):
        choice = PRODUCTS.get(key, {}).get(product)
        if choice is not None:
            return choice
    return _FALLBACK_FLOAT32 if product.operands == "float32" else FALLBACK


def product_choice_of(device: torch.device, product: ProductClass) -> Choice:
    """The table's choice for this device."""
    if INTERPRET:
        return _INTERPRETED
    return product_choice(*device_names(device), product)


@functools.cache
def device_names(device: torch.device) -> tuple[str, str]:
    """A device's name and architecture ("sm_90", "gfx942"); its type, if it is not a GPU."""
    if device.type != "cuda":
        return device.type, device.type
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.name, properties.gcnArchName.split(":")[0]
    return properties.name, f"sm_{properties.major}{properties.minor}"


def allows_tf32() -> bool:
    """Whether torch's own float32 products may round their operands to TF32."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"
