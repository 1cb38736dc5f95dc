"""The tile plan: from a bound on temporary memory to tile sizes and a structure of passes.

Operations are counted in NHV (N scored tokens x H hidden x V vocabulary; one product of these is
2NHV). What a call takes:

- Log-probs alone: 2NHV ("forward").
- Hidden needs a gradient (always, in training): forward also accumulates `D = d logp / d hidden`,
  as attention's forward accumulates `softmax(q K^T) V`, and backward is `g D`, without a product:
  2NHV more.
- The head needs one as well: `dW = sum_t g_t u_t h_t^T`, with u_t the derivative of logp with
  respect to the logits: 2NHV more, if forward has kept u. It keeps unnormalised probabilities, in
  the operands' dtype, for as many tokens as the workspace holds; those of the rest are recomputed
  in backward, 2NHV of their share.

So a frozen head takes 4NHV and a trained one 6NHV if all tokens are kept ("one_pass": nothing is
recomputed), up to 8NHV if none is ("two_pass"). In backward the vocabulary is outermost: dW is
finished a tile at a time in float32 and rounded once.

Tokens are walked in tiles of `token_tile`, the vocabulary in tiles of `vocab_tile`, and how many
tokens are kept is weighed against the size of tiles: both spend the same memory. What is least is
the time of the products and of the bytes that the walk moves (`_OPERATIONS_A_BYTE`). "forward" uses
the tiles that a frozen head's "one_pass" has, so that a reference pass adds in the same order as
the policy's pass.

A reference is an option of the same passes. Through the policy's own head it is one product more.
With the divergence from it, over a head of its own of width H_ref, the tiles come in pairs:

- "forward" takes one product of each head.
- A frozen head's "one_pass" accumulates `d kl / d hidden` beside D: 8NHV at equal widths.
- A trained head takes the gradient of hidden in backward as well, from the very tile that it makes
  for dW: 8NHV where both models' probabilities are kept, 12NHV where none are.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch

Structure = Literal["forward", "one_pass", "two_pass"]

MIB = 2**20
# Below this a tile no longer makes a product worth calling.
MIN_TOKEN_TILE = 16
MIN_VOCAB_TILE = 128
# Where that does not fit (8 MiB and H of 8192), a tile may be as narrow as this. A workspace too small
# for it, below 8 MiB, gets the tile above.
_NARROWEST_VOCAB_TILE = 16
# The narrowest tile of kept tokens, whose maximum is remembered tile by tile.
_LEAST_KEPT_TILE = 1024
# What a GPU multiplies in the time that it takes to move a byte (A100 156, H100 295, H200 184).
_OPERATIONS_A_BYTE = 200
# Shares of the tokens that may be kept.
_EIGHTHS = 8


@dataclass(frozen=True)
class Tiles:
    """A tile's sizes and the temporary bytes that a pass over such tiles holds at its peak."""

    token_tile: int
    vocab_tile: int
    bytes: int
    traffic: float  # bytes that a walk over all tiles moves, in units of NHV


@dataclass(frozen=True)
class Columns:
    """Of a product's operands, [hidden, an adapter's part], the columns that a gradient has."""

    start: int
    stop: int

    @property
    def width(self) -> int:
        return self.stop - self.start

    def of(self, operand: torch.Tensor) -> torch.Tensor:  # (n, W) -> (n, width)
        return operand[:, self.start : self.stop]


@dataclass(frozen=True)
class Plan:
    """What a call runs: structure, tiles, counted operations and bytes."""

    backend: str  # "triton" | "torch"
    structure: Structure
    tokens: int  # N, scored tokens
    hidden_size: int  # H
    vocab_size: int  # V
    trains_hidden: bool
    trains_head: bool
    forward_tiles: Tiles
    backward_tiles: Tiles | None  # of the head's gradient; None where backward needs no product
    kept_tokens: int  # of N, those whose probabilities forward keeps for backward
    kept_bytes: int
    forward_operations: int  # multiplications and additions of the matrix products
    backward_operations: int
    saved_bytes: int  # kept for backward beyond the inputs and the probabilities
    product_in_kernel: bool = False  # product and fold are one kernel, which writes no logit
    ref_hidden_size: int | None = None  # of the reference's head; None: there is no reference
    has_divergence: bool = False  # from that reference, so that tiles come in pairs
    rank: int = 0  # of a LoRA adapter on the head
    state_columns: Columns = Columns(0, 0)  # those of D
    trained_columns: Columns = Columns(0, 0)  # those of dW

    @property
    def states_in_backward(self) -> bool:
        """The gradient of hidden is a product of backward, and not gathered in forward."""
        return self.trains_hidden and self.trains_head and self.has_divergence

    @property
    def operations(self) -> int:
        """Matrix-product operations of forward and backward together."""
        return self.forward_operations + self.backward_operations

    @property
    def operations_nhv(self) -> float:
        """`operations` in units of NHV."""
        return self.operations / max(self.tokens * self.hidden_size * self.vocab_size, 1)

    def after(self, reference: Plan) -> Plan:
        """The plan of both calls, where a reference's log-probs were a call of their own before.

        It is what `last_plan` has from then on.
        """
        both = replace(
            self,
            forward_operations=self.forward_operations + reference.forward_operations,
            ref_hidden_size=reference.hidden_size,
        )
        record(both)
        return both

    @property
    def workspace_bytes(self) -> int:
        """Most temporary bytes held at once, beyond inputs, outputs and `[N, H]` gradients."""
        backward = self.backward_tiles.bytes if self.backward_tiles else 0
        return self.kept_bytes + max(self.forward_tiles.bytes, backward)


_local = threading.local()


def last_plan() -> Plan | None:
    """The plan of this thread's latest fused call (of any structure), or None before the first."""
    return getattr(_local, "plan", None)


def record(plan: Plan) -> None:
    _local.plan = plan


def recorder() -> Callable[[Plan], None]:
    """`record` for the thread that asks, from any thread: autograd's backward may have its own."""
    return functools.partial(vars(_local).__setitem__, "plan")


def default_workspace_mb(device: torch.device) -> float:
    """The bound where none is given: 64 MiB on a CPU, 1/128 of a GPU's memory (at least 256)."""
    if device.type != "cuda":
        return 64.0
    total = torch.cuda.get_device_properties(device).total_memory
    return max(256.0, total / 128 / MIB)


def kept_row(vocab_size: int) -> int:
    """Elements from one kept token to the next: V, rounded up so that rows are aligned."""
    return -(-vocab_size // 64) * 64


def padding(width: int) -> int:
    """Columns to add, so that rows of operands begin where libraries want them: at 16 bytes."""
    return -width % 8


def operand_width(hidden_size: int, rank: int) -> int:
    """Columns of a product's operands: H, and what an adapter of that rank adds, padded."""
    width = hidden_size + rank
    return width + padding(width) if rank else width


def columns_of(hidden_size: int, rank: int, own: bool, low_rank: bool) -> Columns:
    """Of those columns, the head's own, an adapter's, both or none."""
    start = 0 if own else hidden_size
    return Columns(start, operand_width(hidden_size, rank) if low_rank else hidden_size)


def slices(start: int, stop: int, step: int) -> Iterator[slice]:
    """`start : stop` in slices of `step`, the last one shorter."""
    return (slice(at, min(at + step, stop)) for at in range(start, stop, step))


@dataclass(frozen=True)
class HeadSize:
    """A head as the plan sees it: what its rows cost on their way to a product."""

    hidden_size: int
    compute_dtype: torch.dtype  # of the products' operands, before any upcast
    # Operands are raised to float32 tile by tile, since the device has no product of
    # half-precision operands with a float32 result.
    upcasts: bool
    # As they are given, which autocast may round to the compute dtype.
    hidden_dtype: torch.dtype
    weight_dtype: torch.dtype
    rank: int = 0  # of a LoRA adapter on the head

    @property
    def width(self) -> int:
        """Columns of the products' operands: H, and what an adapter adds, made even."""
        return operand_width(self.hidden_size, self.rank)

    @property
    def operand_size(self) -> int:
        return 4 if self.upcasts else self.compute_dtype.itemsize

    @property
    def wide_size(self) -> int:
        """Bytes of a float32 element, which is float64 where that is computed in."""
        return max(self.compute_dtype.itemsize, 4)

    @property
    def hidden_row(self) -> int:
        """Bytes of a token's gathered row, and of its rounded and raised copies."""
        gathered = self.hidden_size * self.hidden_dtype.itemsize
        return gathered + self._copies(self.hidden_dtype) + self._joined()

    @property
    def weight_row(self) -> int:
        """Bytes of the copies of a row of the weight on its way to the product."""
        return self._copies(self.weight_dtype) + self._joined()

    def columns(self, own: bool, low_rank: bool) -> Columns:
        """Those that a gradient is asked of: the head's own, an adapter's, both or none."""
        return columns_of(self.hidden_size, self.rank, own, low_rank)

    def _joined(self) -> int:
        """Bytes of an adapter's part of a row, gathered, raised and beside the head's own."""
        return (self.width * self.operand_size + 3 * self.wide_size * self.rank) if self.rank else 0

    def _copies(self, dtype: torch.dtype) -> int:
        rounded = self.compute_dtype.itemsize if dtype != self.compute_dtype else 0
        return self.hidden_size * (rounded + 4 * self.upcasts)


@dataclass(frozen=True)
class Gradients:
    """Whose gradients a call is asked for; the last two are an adapter's."""

    hidden: bool
    weight: bool
    bias: bool
    lora_hidden: bool = False
    lora_weight: bool = False

    @property
    def states(self) -> bool:
        return self.hidden or self.lora_hidden

    @property
    def head(self) -> bool:
        return self.weights or self.bias

    @property
    def weights(self) -> bool:
        return self.weight or self.lora_weight


def make_plan(
    *,
    tokens: int,
    vocab_size: int,
    head: HeadSize,
    gradients: Gradients,
    backend: str,
    workspace_mb: float,
    has_softcap: bool = False,
    with_stats: bool = False,
    reference: HeadSize | None = None,
    with_divergence: bool = False,
    product_row: int | None = None,
    kept: int | None = None,
) -> Plan:
    """The plan of one call.

    Args:
        gradients: those of `head`; a reference has none.
        reference: the head of a reference, which is `head` itself unless `with_divergence`.
        with_divergence: from that reference to the policy.
        product_row: bytes a token of the kernel in which product and fold are one, where that is
            to be used and nothing needs a gradient; None: it is not.
        kept: how many tokens' probabilities a trained head keeps; None: as many as is best.
    """
    pairs = reference if with_divergence else None
    in_backward = pairs is not None and gradients.head
    accumulates = gradients.states and not in_backward
    size = _Sizes(tokens, vocab_size, head, reference, pairs, backend, has_softcap, with_stats)
    budget = int(workspace_mb * MIB)
    if not gradients.head:
        kept, forward_tiles, backward_tiles = 0, size.forward(budget, kept=0), None
        if product_row is not None:
            # Nothing of the size of a tile: as many tokens as their rows and partial states allow.
            row = head.hidden_row + product_row + 64
            n = max(min(tokens, budget // row), 1)
            forward_tiles = Tiles(n, vocab_size, n * row, 2 / n)
    elif kept is None:
        kept, forward_tiles, backward_tiles = _cheapest(size, gradients, budget)
    else:
        forward_tiles = size.forward(budget, kept)
        backward_tiles = size.backward(budget, kept, gradients)
    # Of a column of the operands: a product with all of them takes `width` of these.
    column = 2 * tokens * vocab_size
    state_columns = head.columns(gradients.hidden, gradients.lora_hidden)
    trained_columns = head.columns(gradients.weight, gradients.lora_weight)
    recomputed = tokens - kept if gradients.head else 0
    structure: Structure = "forward"
    if gradients.states or gradients.head:
        structure = "two_pass" if recomputed else "one_pass"
    ref_width = 0 if reference is None else reference.width
    derivatives = size.tiles_at_once * accumulates
    return Plan(
        backend=backend,
        structure=structure,
        tokens=tokens,
        hidden_size=head.hidden_size,
        vocab_size=vocab_size,
        trains_hidden=gradients.states,
        trains_head=gradients.head,
        forward_tiles=forward_tiles,
        backward_tiles=backward_tiles,
        kept_tokens=kept,
        kept_bytes=size.kept_bytes(kept),
        forward_operations=column * (head.width + ref_width + state_columns.width * derivatives),
        backward_operations=column * (trained_columns.width + state_columns.width * in_backward)
        + 2 * recomputed * vocab_size * size.width,
        saved_bytes=head.wide_size
        * tokens
        * (state_columns.width * derivatives + (7 if pairs else 3) * gradients.head),
        product_in_kernel=product_row is not None and structure == "forward",
        ref_hidden_size=None if reference is None else reference.hidden_size,
        has_divergence=pairs is not None,
        rank=head.rank,
        state_columns=state_columns,
        trained_columns=trained_columns,
    )


@dataclass(frozen=True)
class _Sizes:
    """What tiles of a call cost in bytes, and which of them fit."""

    tokens: int
    vocab_size: int
    head: HeadSize
    reference: HeadSize | None
    pairs: HeadSize | None  # the reference's, where a divergence needs tiles of both at once
    backend: str
    has_softcap: bool
    with_stats: bool

    @property
    def tiles_at_once(self) -> int:
        return 1 if self.pairs is None else 2

    @property
    def width(self) -> int:
        """Columns of the products that make the logits of a tile, or of a pair."""
        return self.head.width + (0 if self.pairs is None else self.pairs.width)

    def kept_bytes(self, kept: int) -> int:
        row = kept_row(self.vocab_size) * self.head.operand_size
        return kept * row * self.tiles_at_once

    def forward(self, budget: int, kept: int) -> Tiles:
        """The largest tiles of forward, with `kept` tokens' probabilities beside them."""
        head = self.head
        all_kept = 0 < kept == self.tokens
        # A logit: the float32 tile and, for the second product, a rounded copy. The latter of a
        # kept token has its place among the kept ones; in float32 the two are one.
        wide = head.wide_size
        logit = 0 if all_kept and head.operand_size == wide else wide
        if head.operand_size != wide and not all_kept:
            logit += head.operand_size
        logit *= self.tiles_at_once
        if self.backend == "torch":
            logit += wide * self.has_softcap + (2 * wide + 1) * self.with_stats
            logit += wide * (self.pairs is not None)
        # A token: its rows of hidden, its label's row of the weight as stored, rounded and in
        # float32, its state.
        token = head.hidden_row + head.width * (2 * wide + head.compute_dtype.itemsize) + 32 * wide
        if self.reference is not None:
            token += self.reference.hidden_row + 16 * wide
        if self.pairs is not None:
            # Both derivatives are finished at once.
            token += wide * head.width
        if kept:
            # Its maximum after each tile, and no tile is so narrow that these would add up.
            maxima = self.vocab_size // _LEAST_KEPT_TILE + 1
            token += wide * maxima * self.tiles_at_once
        return choose_tiles(
            self.tokens,
            self.vocab_size,
            budget - self.kept_bytes(kept),
            logit=logit,
            token=token,
            # One head's rows at a time.
            entry=max(head.weight_row, 0 if self.pairs is None else self.pairs.weight_row),
            # The weight is read once for each token tile, the accumulator read and written once
            # for each vocabulary tile.
            traffic=(2, 8),
            min_vocab_tile=_LEAST_KEPT_TILE if kept else MIN_VOCAB_TILE,
        )

    def backward(self, budget: int, kept: int, gradients: Gradients) -> Tiles:
        """The largest tiles of the head's gradient."""
        head, wide = self.head, self.head.wide_size
        width = head.columns(gradients.weight, gradients.lora_weight).width
        logit = 0
        if kept < self.tokens or self.pairs is not None:
            logit = wide * self.tiles_at_once
            logit += wide * self.has_softcap if self.backend == "torch" else 0
            if head.operand_size != wide:
                logit += head.operand_size
        # Its rows of hidden, and the same scaled, in float32 and rounded.
        scaled = width * (wide + (head.operand_size if head.operand_size != wide else 0))
        token, entry = head.hidden_row + scaled + 16 * wide, head.weight_row
        if self.pairs is not None:
            token += self.pairs.hidden_row + 16 * wide
            entry += self.pairs.weight_row
        return choose_tiles(
            self.tokens,
            self.vocab_size,
            budget - self.kept_bytes(kept),
            logit=logit,
            token=token,
            entry=entry + (wide * width if gradients.weights else 0),
            # The tile of dW is read and written once for each token tile; hidden is read, scaled
            # and read again once for each vocabulary tile.
            traffic=(8, 6),
        )


def _cheapest(size: _Sizes, gradients: Gradients, budget: int) -> tuple[int, Tiles, Tiles]:
    """How many tokens to keep, and the tiles that then fit, for the least time."""
    best: tuple[float, int, Tiles, Tiles] | None = None
    for eighths in range(_EIGHTHS, -1, -1):
        kept = size.tokens * eighths // _EIGHTHS
        rest = budget - size.kept_bytes(kept)
        forward = size.forward(budget, kept)
        backward = size.backward(budget, kept, gradients)
        if kept and max(forward.bytes, backward.bytes) > rest:
            continue
        # Per token, hidden unit and entry of the vocabulary, of what depends on the choice.
        recomputed = (size.tokens - kept) / max(size.tokens, 1)
        operations = 2 * recomputed * size.width / size.head.width
        moved = forward.traffic + backward.traffic
        cost = operations + _OPERATIONS_A_BYTE * moved
        if best is None or cost < best[0]:
            best = cost, kept, forward, backward
    assert best is not None
    return best[1:]


def choose_tiles(
    tokens: int,
    vocab_size: int,
    budget: int,
    *,
    logit: int,
    token: int,
    entry: int,
    traffic: tuple[int, int] = (2, 8),
    min_vocab_tile: int = MIN_VOCAB_TILE,
) -> Tiles:
    """Tile sizes within `budget` bytes that move least memory.

    A tile of n tokens and v entries of the vocabulary costs `n v logit + n token + v entry` bytes. A walk over all tiles
    moves `traffic[0]` bytes an element of the weight for each of its N/n token tiles and
    `traffic[1]` bytes an element of `[N, H]` for each of its V/v vocabulary tiles: per NHV,
    `traffic[0] / n + traffic[1] / v`, of which the least is taken over n in powers of two.
    """
    smallest = min(MIN_TOKEN_TILE, max(tokens, 1))
    for least in (min_vocab_tile, _NARROWEST_VOCAB_TILE):
        best: Tiles | None = None
        n = smallest
        while True:
            v = max(budget - n * token, 0) // max(n * logit + entry, 1)
            v = vocab_size if v >= vocab_size else v // least * least
            if v > 0:
                moved = traffic[0] / n + (traffic[1] / v if v < vocab_size else 0)
                if best is None or moved < best.traffic:
                    best = Tiles(n, v, n * v * logit + n * token + v * entry, moved)
            if n >= tokens:
                break
            n = min(2 * n, tokens)
        if best is not None:
            return best
    n, v = smallest, min(min_vocab_tile, vocab_size)
    return Tiles(n, v, n * v * logit + n * token + v * entry, traffic[0] / n + traffic[1] / v)
