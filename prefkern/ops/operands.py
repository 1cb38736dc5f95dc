"""What the passes over tiles are made of: operands, products with a float32 result, tile buffers.

Products of half-precision operands have a float32 result, whether by the GPU's own (`out_dtype`) or
by raising the operands of a tile. What is said of float32 there and in the passes is float64's where
a call's inputs are float64 (`Operands.wide`): the same passes, so that they can be differentiated
numerically.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prefkern.ops.plan import Columns, HeadSize, Tiles, padding


@dataclass(frozen=True)
class Transform:
    """What the model does to its raw logits: scale, tanh softcap, temperature, in this order."""

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
    """How a call's operands reach the products.

    `compute_dtype` is what a plain linear layer would multiply in (autocast's dtype under
    autocast); `upcasts` says that the device has no product of such operands with a float32 result,
    so that tiles of them are raised to float32 instead.
    """

    compute_dtype: torch.dtype
    upcasts: bool

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.upcasts else self.compute_dtype

    @property
    def wide(self) -> torch.dtype:
        """What tiles, sums and results are in."""
        return wide_of(self.compute_dtype)

    def prepare(self, x: Tensor) -> Tensor:
        """Round to the compute dtype, as autocast would, then raise if need be."""
        return x.to(self.compute_dtype).to(self.dtype)


def operands_of(hidden: Tensor) -> Operands:
    """How a call with these hidden states multiplies, autocast included."""
    device = hidden.device.type
    # Autocast leaves float64 as it is.
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return operands_for(torch.get_autocast_dtype(device), device)
    return operands_for(hidden.dtype, device)


def operands_for(dtype: torch.dtype, device_type: str) -> Operands:
    # Only CUDA's libraries have products of half-precision operands with a float32 result.
    has_wide_product = device_type == "cuda" and torch.version.hip is None
    is_half = dtype in (torch.bfloat16, torch.float16)
    return Operands(dtype, upcasts=is_half and not has_wide_product)


def wide_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class LowRank:
    """What a LoRA adapter adds to a head's logits: `hidden @ weight.T`."""

    hidden: Tensor  # (..., R): scaling * lora_A(h), of all tokens
    weight: Tensor  # (V, R): lora_B

    @staticmethod
    def of(hidden: Tensor | None, weight: Tensor | None) -> LowRank | None:
        """The adapter, or None where there is none."""
        return None if hidden is None or weight is None else LowRank(hidden, weight)


@dataclass(frozen=True)
class Head:
    """Hidden states and the head that they go through.

    An adapter's term is part of the same product: `h W^T + l B^T = [h l] [W B]^T`. Rows of either
    side are put together tile by tile, to a width that is `plan.HeadSize.width`, zeros at the end.
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
        """A call's arguments, which multiply as the device and autocast have it.

        The tokens in one dimension, and numbers in memory as they are: kernels read it. A bias is
        walked without strides; of (V,) that is a small copy at most.
        """
        if low_rank is not None:
            low_rank = LowRank(_flat(low_rank.hidden), low_rank.weight.resolve_neg())
        if bias is not None:
            bias = bias.resolve_neg().contiguous()
        return Head(_flat(hidden), weight.resolve_neg(), bias, operands_of(hidden), low_rank)

    def detach(self) -> Head:
        """The same without gradients, as a reference's; it has no adapter."""
        bias = None if self.bias is None else self.bias.detach()
        return Head(self.hidden.detach(), self.weight.detach(), bias, self.operands)

    def through(self, clear: Callable[[Tensor], Tensor]) -> Head:
        """With what `clear` makes of all states, (M, ...) -> (M, ...)."""
        low_rank = self.low_rank
        if low_rank is not None:
            low_rank = LowRank(clear(low_rank.hidden), low_rank.weight)
        return replace(self, hidden=clear(self.hidden), low_rank=low_rank)

    @property
    def size(self) -> HeadSize:
        """What the plan must know of it."""
        return HeadSize(
            self.weight.shape[1],
            self.operands.compute_dtype,
            self.operands.upcasts,
            self.hidden.dtype,
            self.weight.dtype,
            0 if self.low_rank is None else self.low_rank.weight.shape[1],
        )

    def rows(
        self, rows: Tensor | None, tokens: slice, columns: Columns | None = None
    ) -> Tensor:  # (n, W), or (n, width of columns)
        """Some tokens' rows, all of them or those columns."""
        own = take(self.hidden, rows, tokens) if columns is None or columns.start == 0 else None
        if self.low_rank is None or (columns is not None and columns.stop == self.hidden.shape[1]):
            assert own is not None
            return self.operands.prepare(own)
        low_rank = take(self.low_rank.hidden, rows, tokens)
        return self._side_by_side(*([low_rank] if own is None else [own, low_rank]))

    def weight_rows(self, entries: slice) -> Tensor:  # (v, W)
        """The head's rows of some entries of the vocabulary."""
        if self.low_rank is None:
            return self.operands.prepare(self.weight[entries])
        return self._side_by_side(self.weight[entries], self.low_rank.weight[entries])

    def label_rows(self, labels: Tensor) -> tuple[Tensor, Tensor]:  # (n,), (V or n, W)
        """Indices, and the rows that they are into: each label's row of the head."""
        if self.low_rank is None:
            return labels, self.weight
        rows = self._side_by_side(self.weight[labels], self.low_rank.weight[labels])
        return torch.arange(labels.shape[0], device=labels.device), rows

    def bias_of(self, entries: slice) -> Tensor | None:  # (v,)
        return None if self.bias is None else self.bias[entries]

    def _side_by_side(self, *parts: Tensor) -> Tensor:
        """Operands of one product, with zeros up to the width that the whole head has."""
        assert self.low_rank is not None
        own, rank = self.hidden.shape[1], self.low_rank.weight.shape[1]
        parts = tuple(self.operands.prepare(part) for part in parts)
        return torch.cat([*parts, parts[0].new_zeros(parts[0].shape[0], padding(own + rank))], 1)


def same_head(head: Head, other: Head) -> bool:
    """Whether both go through the same numbers, in the same dtype."""
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


class Buffers:
    """One float32 tile, and the tile that the second product reads: the same where it can be.

    Args:
        second_product: there is one. scratch: not every tile has a place of its own (`views`).
    """

    def __init__(
        self,
        tiles: Tiles,
        operands: Operands,
        device: torch.device,
        second_product: bool,
        scratch: bool = True,
    ) -> None:
        size = tiles.token_tile * tiles.vocab_tile
        self._in_place = operands.dtype == operands.wide
        self._second_product = second_product
        self._tile = self._second = None
        if scratch or not self._in_place:
            self._tile = torch.empty(size, dtype=operands.wide, device=device)
        if scratch and second_product and not self._in_place:
            self._second = torch.empty(size, dtype=operands.dtype, device=device)

    def views(self, n: int, v: int, place: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The float32 tile `(n, v)` and the second product's operand, at `place` if one is given."""

        def part(buffer: Tensor | None) -> Tensor:
            assert buffer is not None
            return buffer[: n * v].view(n, v)

        if place is not None:
            return (place if self._in_place else part(self._tile)), place
        tile = part(self._tile)
        if not self._second_product:
            return tile, None
        return tile, tile if self._in_place else part(self._second)


def as_stored(x: Tensor | None) -> Tensor | None:
    """The same numbers, in memory too: that of `z.conj().imag` holds them negated, and kernels read it."""
    return None if x is None else x.resolve_neg()


def take(hidden: Tensor, rows: Tensor | None, tokens: slice) -> Tensor:
    return hidden[tokens] if rows is None else hidden.index_select(0, rows[tokens])


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`out = a @ b` in float32, without rounding to the operands' dtype on the way."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


def add_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`out += a @ b` in float32."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
