"""The parts of the passes over tiles: operands, products with a float32 result, tile buffers.

Products of half-precision operands have a float32 result: a GPU's library has such a product
(`wide_products`), and so has a CPU with bfloat16 units (`cpu`). Elsewhere the operands of a tile are
raised to float32 first. On such a CPU the products for gradients are whole products of bfloat16
tensors: they add in float32 inside, and their result is rounded to bfloat16.

For float64 inputs the same passes compute in float64 wherever the text says float32
(`Operands.wide`), so that a test can differentiate them numerically.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prefkern.ops import cpu
from prefkern.ops.plan import (
    TOKENS_BY_TOKEN,
    Columns,
    HeadSize,
    Plan,
    Tiles,
    padding,
    slices,
)
from prefkern.ops.wide_products import HALVES, has_wide_product

# The most entries of the vocabulary that one rounded product for the gradient of hidden adds up.
_ENTRIES_OF_A_PRODUCT = 2048


@dataclass(frozen=True)
class Transform:
    """The model's transform of its raw logits: scale, tanh softcap, temperature, in this order."""

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def factor(self) -> float:
        """The constant part c of the transform's derivative."""
        return self.logit_scale / self.temperature

    def keywords(self) -> dict[str, Any]:
        return {
            "logit_scale": self.logit_scale,
            "softcap": self.softcap,
            "temperature": self.temperature,
        }


@dataclass(frozen=True)
class Operands:
    """The dtypes of a call's products.

    `compute_dtype` is the dtype in which a plain linear layer would multiply (autocast's dtype
    under autocast). `upcasts`: the device has no product of such operands with a float32 result, so
    tiles of them are raised to float32 first. `rounds`: but it is fast at such products with a
    rounded result, and those for gradients are made so, though not those for logits.
    """

    compute_dtype: torch.dtype
    upcasts: bool
    rounds: bool = False

    @property
    def of_logits(self) -> torch.dtype:
        """The dtype of the operands of the products that make logits."""
        return torch.float32 if self.upcasts else self.compute_dtype

    @property
    def of_gradients(self) -> torch.dtype:
        """The dtype of the operands of the other products, and of what is kept for them."""
        return self.compute_dtype if self.rounds else self.of_logits

    @property
    def wide(self) -> torch.dtype:
        """The dtype of tiles, sums and results."""
        return wide_of(self.compute_dtype)

    def by_entry(self, plan: Plan) -> bool:
        """Whether a call's tiles lie in memory entry by entry.

        Then `cpu.wide_product` packs the tokens and not the entries. That is faster with few tokens;
        with many of them the fold is faster token by token.
        """
        return self._has_choice(plan) and plan.tokens < TOKENS_BY_TOKEN

    def row_of_tiles(self, plan: Plan, tiles: Tiles) -> int | None:
        """Elements from one token of a tile to the next: as many in the last tile of a walk as in all.

        None: as many as the tile has entries. `cpu.wide_product` compiles its blocks for each number.
        """
        return tiles.vocab_tile if self._has_choice(plan) else None

    def _has_choice(self, plan: Plan) -> bool:
        """Whether `cpu.wide_product` makes the tiles, which torch then folds in any order."""
        return self.rounds and not self.upcasts and plan.backend == "torch"

    def unrounded(self) -> Operands:
        """The same, with products for gradients in float32 as well.

        A divergence needs them: its gradient is a difference of two sums, which are nearly equal
        where the models are.
        """
        return replace(self, rounds=False, upcasts=self.upcasts or self.rounds)

    def logits(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """`out = a @ b` in float32, without a rounding to the operands' dtype."""
        if a.dtype == torch.bfloat16 and a.device.type == "cpu":
            cpu.wide_product(a, b.t(), out)
        else:
            product(a, b, out)

    def for_gradients(self, rounded: Tensor, raised: Tensor) -> Tensor:
        """The operand of a product for gradients, of two copies: `Head.rows`' and `for_logits`'."""
        return rounded if self.rounds else raised

    def parts(self, entries: int, vocab_size: int) -> Iterator[slice]:
        """A tile's entries, in parts that one product for the gradient of hidden adds up.

        A sum that cancels afterwards (rows of the weight have a common part) would keep the error
        of one rounded product. The errors of several are independent, and partly cancel.
        """
        size = entries
        if self.rounds:
            size = min(_ENTRIES_OF_A_PRODUCT, max(vocab_size // 4, 256))
        return slices(0, entries, max(size, 1))


def operands_of(hidden: Tensor) -> Operands:
    """The operands of a call with these hidden states, autocast included."""
    device = hidden.device.type
    # Autocast leaves float64 as it is.
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return operands_for(torch.get_autocast_dtype(device), device)
    return operands_for(hidden.dtype, device)


def operands_for(dtype: torch.dtype, device_type: str) -> Operands:
    rounds = device_type == "cpu" and dtype == torch.bfloat16 and cpu.has_bfloat16_units()
    upcasts = dtype in HALVES and not has_wide_product(device_type, dtype)
    return Operands(dtype, upcasts, rounds)


def wide_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class LowRank:
    """A LoRA adapter of a head. It adds `hidden @ weight.T` to the logits."""

    hidden: Tensor  # (..., R): scaling * lora_A(h), of all tokens
    weight: Tensor  # (V, R): lora_B

    @staticmethod
    def of(hidden: Tensor | None, weight: Tensor | None) -> LowRank | None:
        """The adapter, or None where there is none."""
        return None if hidden is None or weight is None else LowRank(hidden, weight)


@dataclass(frozen=True)
class Head:
    """Hidden states and the head that they go through.

    An adapter's term is part of the same product: `h W^T + l B^T = [h l] [W B]^T`. Both sides are
    joined tile by tile, and zeros fill the rows up to the width `plan.HeadSize.width`.
    """

    hidden: Tensor  # (M, H), all tokens
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    operands: Operands
    low_rank: LowRank | None = None

    @staticmethod
    def of(
        hidden: Tensor,  # (..., H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        low_rank: LowRank | None = None,
    ) -> Head:
        """The head of a call's arguments, with the operands of the device and autocast.

        The tokens get one dimension. Kernels read memory, so a view that negates what is in memory
        is resolved. They also read a bias without strides, so it is made contiguous: at most a
        small copy.
        """
        if low_rank is not None:
            low_rank = LowRank(_flat(low_rank.hidden), low_rank.weight.resolve_neg())
        if bias is not None:
            bias = bias.resolve_neg().contiguous()
        return Head(_flat(hidden), weight.resolve_neg(), bias, operands_of(hidden), low_rank)

    def detach(self) -> Head:
        """The same without gradients and without an adapter, as for a reference."""
        bias = None if self.bias is None else self.bias.detach()
        return Head(self.hidden.detach(), self.weight.detach(), bias, self.operands)

    def unrounded(self) -> Head:
        """The same, with all products in float32; see `Operands.unrounded`."""
        return replace(self, operands=self.operands.unrounded())

    def through(self, clear: Callable[[Tensor], Tensor]) -> Head:
        """The same head, with `clear` applied to all states, (M, ...) -> (M, ...)."""
        low_rank = self.low_rank
        if low_rank is not None:
            low_rank = LowRank(clear(low_rank.hidden), low_rank.weight)
        return replace(self, hidden=clear(self.hidden), low_rank=low_rank)

    @property
    def size(self) -> HeadSize:
        """The sizes and dtypes that a plan needs."""
        return HeadSize(
            self.weight.shape[1],
            self.operands.compute_dtype,
            self.operands.upcasts,
            self.hidden.dtype,
            self.weight.dtype,
            0 if self.low_rank is None else self.low_rank.weight.shape[1],
            self.operands.rounds,
        )

    def rows(
        self, rows: Tensor | None, tokens: slice, columns: Columns | None = None
    ) -> Tensor:  # (n, W), or (n, width of columns)
        """The rows of some tokens in the compute dtype: all columns, or the given ones."""
        own = take(self.hidden, rows, tokens) if columns is None or columns.start == 0 else None
        if self.low_rank is None or (columns is not None and columns.stop == self.hidden.shape[1]):
            assert own is not None
            return own.to(self.operands.compute_dtype)
        low_rank = take(self.low_rank.hidden, rows, tokens)
        return self._side_by_side(*([low_rank] if own is None else [own, low_rank]))

    def rows_for_logits(self, rows: Tensor | None, tokens: slice) -> Tensor:  # (n, W)
        """The rows of some tokens, as the product for logits takes them."""
        return self.rows(rows, tokens).to(self.operands.of_logits)

    def weight_rows(self, entries: slice) -> Tensor:  # (v, W)
        """The head's rows of some entries of the vocabulary, in the compute dtype."""
        if self.low_rank is None:
            return self.weight[entries].to(self.operands.compute_dtype)
        return self._side_by_side(self.weight[entries], self.low_rank.weight[entries])

    def label_rows(
        self, labels: Tensor, is_shard: bool = False
    ) -> tuple[Tensor, Tensor]:  # (n,), (V or n, W)
        """Each label's row of the head: indices, and the rows that they index.

        In a shard of the vocabulary a label of another shard has a row of zeros.
        """
        if self.low_rank is None and not is_shard:
            return labels, self.weight
        indices = torch.arange(labels.shape[0], device=labels.device)
        if not is_shard:
            return indices, self._of_labels(labels)
        entries = self.weight.shape[0]
        if entries == 0:
            dtype = self.operands.compute_dtype
            return indices, self.hidden.new_zeros((len(labels), self.size.width), dtype=dtype)
        rows = self._of_labels(labels.clamp(0, entries - 1))
        return indices, rows.masked_fill_(~are_own(labels, entries).unsqueeze(1), 0.0)

    def _of_labels(self, labels: Tensor) -> Tensor:  # (n, W)
        if self.low_rank is None:
            return self.weight[labels]
        return self._side_by_side(self.weight[labels], self.low_rank.weight[labels])

    def bias_of(self, entries: slice) -> Tensor | None:  # (v,)
        return None if self.bias is None else self.bias[entries]

    def _side_by_side(self, *parts: Tensor) -> Tensor:
        """Join the operands of one product, with zeros up to the width of the whole head."""
        assert self.low_rank is not None
        own, rank = self.hidden.shape[1], self.low_rank.weight.shape[1]
        parts = tuple(part.to(self.operands.compute_dtype) for part in parts)
        return torch.cat([*parts, parts[0].new_zeros(parts[0].shape[0], padding(own + rank))], 1)


def are_own(labels: Tensor, entries: int) -> Tensor:  # (N,) -> (N,) bool
    """Which labels are entries of a shard of the vocabulary, relative to whose start they are."""
    return (labels >= 0) & (labels < entries)


def same_head(head: Head, other: Head) -> bool:
    """Whether both have the same weight and bias in memory, and hidden states of one dtype."""
    if head.hidden.dtype != other.hidden.dtype or head.low_rank is not None:
        return False
    if (head.bias is None) != (other.bias is None):
        return False
    pairs = [(head.weight, other.weight)]
    if head.bias is not None and other.bias is not None:
        pairs.append((head.bias, other.bias))
    return all(
        a is b
        or (a.data_ptr(), a.shape, a.stride(), a.dtype)
        == (b.data_ptr(), b.shape, b.stride(), b.dtype)
        for a, b in pairs
    )


def _flat(x: Tensor) -> Tensor:  # (..., H) -> (M, H)
    return x.resolve_neg().reshape(-1, x.shape[-1])


class Raised:
    """Room for float32 copies of weights, if the device's products for logits need them.

    Args:
        heads: those whose weights are copied, one at a time.
        entries: the largest number of rows.
    """

    def __init__(self, heads: Sequence[Head], entries: int, device: torch.device) -> None:
        self._room = None
        widths = [head.size.width for head in heads if head.operands.upcasts]
        if widths:
            self._room = torch.empty(entries * max(widths), dtype=torch.float32, device=device)

    def of(self, x: Tensor) -> Tensor:
        """The operand of a product for logits; it is overwritten by the next call's."""
        if self._room is None or x.dtype == self._room.dtype:
            return x
        return self._room[: x.numel()].view(x.shape).copy_(x)


class Buffers:
    """One float32 tile, and the tile that the second product reads; if possible they share memory.

    Args:
        second_product: whether there is one.
        scratch: whether some tiles have no place of their own (see `views`).
        by_entry: whether tiles lie in memory entry by entry, (v, n), and not token by token.
        row: elements from one token of a tile to the next; None: as many as it has entries.
    """

    def __init__(
        self,
        tiles: Tiles,
        operands: Operands,
        device: torch.device,
        second_product: bool,
        scratch: bool = True,
        by_entry: bool = False,
        row: int | None = None,
    ) -> None:
        self._by_entry, self._row = by_entry, row
        size = tiles.token_tile * tiles.vocab_tile
        self._in_place = operands.of_gradients == operands.wide
        self._second_product = second_product
        self._tile = self._second = None
        if scratch or not self._in_place:
            self._tile = torch.empty(size, dtype=operands.wide, device=device)
        if scratch and second_product and not self._in_place:
            self._second = torch.empty(size, dtype=operands.of_gradients, device=device)

    def views(self, n: int, v: int, place: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The float32 tile `(n, v)`, and the second product's operand, at `place` if given."""

        def part(buffer: Tensor | None) -> Tensor:
            assert buffer is not None
            if self._by_entry:
                return buffer[: n * v].view(v, n).t()
            row = self._row or v
            return buffer[: n * row].view(n, row)[:, :v]

        if place is not None:
            return (place if self._in_place else part(self._tile)), place
        tile = part(self._tile)
        if not self._second_product:
            return tile, None
        return tile, tile if self._in_place else part(self._second)


def as_stored(x: Tensor | None) -> Tensor | None:
    """The same numbers, also in memory, which kernels read: `z.conj().imag` is negated there."""
    return None if x is None else x.resolve_neg()


def take(hidden: Tensor, rows: Tensor | None, tokens: slice) -> Tensor:
    return hidden[tokens] if rows is None else hidden.index_select(0, rows[tokens])


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`out = a @ b` in float32, rounded to the operands' dtype only where they are half on a CPU."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.device.type == "cpu":
        out.copy_(torch.mm(a, b))
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


def add_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`out += a @ b`, as `product`."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    elif a.device.type == "cpu":
        out.add_(torch.mm(a, b))
    else:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
