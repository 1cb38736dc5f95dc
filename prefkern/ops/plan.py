"""The tile plan: from a bound on temporary memory to tile sizes and a structure of passes.

Operations are counted in NHV (N scored tokens x H hidden x V vocabulary; one product of these is
2NHV). The cost of a call:

- Log-probs alone take 2NHV ("forward").
- If hidden needs a gradient (always, in training), forward also accumulates `D = d logp / d
  hidden`, as attention's forward accumulates `softmax(q K^T) V`. Backward is `g D`, without a
  product. This takes 2NHV more.
- If the head needs a gradient as well, `dW = sum_t g_t u_t h_t^T` takes 2NHV more; u_t is the
  derivative of logp with respect to the logits. Forward keeps u, unnormalised and in the operands'
  dtype, for as many tokens as the workspace holds. Backward computes the u of the others again: 2HV
  a token.

So a frozen head takes 4NHV. A trained head takes 6NHV if all tokens are kept ("one_pass": nothing
is recomputed), and up to 8NHV if none are ("two_pass"). In backward the vocabulary is the outer
loop: each tile of dW is finished in float32 and rounded once.

Tokens are walked in tiles of `token_tile`, the vocabulary in tiles of `vocab_tile`. Kept tokens and
tiles share one memory. The plan chooses both for the least time, of the products and of the bytes
that the walk moves (`_OPERATIONS_A_BYTE`). "forward" uses the tiles of a frozen head's "one_pass",
so that a reference pass adds in the same order as the policy's pass.

A reference is an option of the same passes. Through the policy's own head it is one more product.
With the divergence from it, through its own head of width H_ref, the tiles come in pairs:

- "forward" takes one product with each head.
- A frozen head's "one_pass" accumulates `d kl / d hidden` beside D: 8NHV at equal widths.
- A trained head computes the gradient of hidden in backward too, from the tile that it makes for
  dW: 8NHV if both models' probabilities are kept for all tokens, 12NHV if they are kept for none.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch

from prefkern.ops.cpu import packed_bytes

Structure = Literal["forward", "one_pass", "two_pass"]

MIB = 2**20
# Below this a tile no longer makes a product worth calling.
MIN_TOKEN_TILE = 16
MIN_VOCAB_TILE = 128
# If that does not fit (8 MiB and H of 8192), a tile may be as narrow as this. A workspace that is
# too small for it, below 8 MiB, gets the minimum above.
_NARROWEST_VOCAB_TILE = 16
# The longest row that the fold of the Triton backend reads once (`prefkern_kernels.tiles`). A wider
# tile saves traffic of the accumulator, which the second product hides; a second reading of every
# logit is not hidden.
FOLD_ENTRIES = 8192
# The widest tile of dW on a GPU. A wider one saves less than 1% of a call's time, and a float32
# copy of a whole `[V, H]` is never made.
_MOST_OF_A_GRADIENT = 32768
# Below so many tokens in a tile, its launches cost more than the second reading.
_LEAST_TOKENS_OF_A_FOLD = 2048
# The narrowest tile for kept tokens, whose maximum is stored after each tile.
_LEAST_KEPT_TILE = 1024
# Operations of a GPU in the time that it takes to move a byte (A100 156, H100 295, H200 184).
_OPERATIONS_A_BYTE = 200
# Of a CPU's core with bfloat16 units: a second product for the logits costs more than small tiles.
_OPERATIONS_A_BYTE_OF_CPU = 20
# The largest block of memory, in bytes, that glibc's allocator hands out twice. It maps a larger one
# afresh, page by page, at each allocation.
_LARGEST_BLOCK_OF_CPU = 31 * MIB
# A tile of logits, in bytes, that stays in the cache of a CPU from its product to the end of its fold.
_TILE_OF_CPU = 8 * MIB
# With so many tokens the tiles of a CPU's call lie in memory token by token, and not entry by entry.
TOKENS_BY_TOKEN = 384
# The share of kept tokens is a multiple of one eighth.
_EIGHTHS = 8


@dataclass(frozen=True)
class Tiles:
    """The sizes of a tile, and the temporary bytes at the peak of a pass over such tiles."""

    token_tile: int
    vocab_tile: int
    bytes: int
    traffic: float  # bytes that a walk over all tiles moves, in units of NHV


@dataclass(frozen=True)
class Columns:
    """The columns of a product's operands, [hidden, an adapter's part], that a gradient needs."""

    start: int
    stop: int

    @property
    def width(self) -> int:
        return self.stop - self.start

    def of(self, operand: torch.Tensor) -> torch.Tensor:  # (n, W) -> (n, width)
        return operand[:, self.start : self.stop]


@dataclass(frozen=True)
class Plan:
    """What a call runs and costs: structure, tiles, counted operations and bytes."""

    backend: str  # "triton" | "torch"
    structure: Structure
    tokens: int  # N, scored tokens
    hidden_size: int  # H
    vocab_size: int  # V
    trains_hidden: bool
    trains_head: bool
    forward_tiles: Tiles
    backward_tiles: Tiles | None  # for the head's gradient; None if backward needs no product
    kept_tokens: int  # of N: forward keeps their probabilities for backward
    kept_bytes: int
    forward_operations: int  # multiplications and additions of the matrix products
    backward_operations: int
    saved_bytes: int  # kept for backward beyond the inputs and the probabilities
    product_in_kernel: bool = False  # product and fold are one kernel, which writes no logit
    ref_hidden_size: int | None = None  # of the reference's head; None: there is no reference
    has_divergence: bool = False  # from that reference: tiles come in pairs
    rank: int = 0  # of a LoRA adapter on the head
    state_columns: Columns = Columns(0, 0)  # those of D
    trained_columns: Columns = Columns(0, 0)  # those of dW
    shard_bytes: int = 0  # of the states of all tokens, which ranks join; 0: the head is whole

    @property
    def states_in_backward(self) -> bool:
        """Whether backward computes the gradient of hidden; else forward gathers it."""
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
        """The plan of two calls: this one, and an earlier one for the reference's log-probs.

        `last_plan` returns it from then on.
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
        return self.kept_bytes + max(self.forward_tiles.bytes + self.shard_bytes, backward)


_local = threading.local()


def last_plan() -> Plan | None:
    """The plan of this thread's latest fused call (of any structure), or None before the first."""
    return getattr(_local, "plan", None)


def record(plan: Plan) -> None:
    _local.plan = plan


def recorder() -> Callable[[Plan], None]:
    """`record` for this thread, to be called from any: autograd's backward may have its own."""
    return functools.partial(vars(_local).__setitem__, "plan")


def kept_row(vocab_size: int) -> int:
    """Elements from one kept token to the next: V, rounded up so that rows are aligned."""
    return -(-vocab_size // 64) * 64


def padding(width: int) -> int:
    """Columns to add, so that rows of operands begin at multiples of 16 bytes."""
    return -width % 8


def operand_width(hidden_size: int, rank: int) -> int:
    """Columns of a product's operands: H, plus the rank of an adapter, padded."""
    width = hidden_size + rank
    return width + padding(width) if rank else width


def columns_of(hidden_size: int, rank: int, own: bool, low_rank: bool) -> Columns:
    """The head's own columns of the operands, an adapter's, both or none."""
    start = 0 if own else hidden_size
    return Columns(start, operand_width(hidden_size, rank) if low_rank else hidden_size)


def slices(start: int, stop: int, step: int) -> Iterator[slice]:
    """`start : stop` in slices of `step`, the last one shorter."""
    return (slice(at, min(at + step, stop)) for at in range(start, stop, step))


@dataclass(frozen=True)
class HeadSize:
    """A head's sizes and dtypes, and the bytes of its rows on their way to a product."""

    hidden_size: int
    compute_dtype: torch.dtype  # of the products' operands, before any upcast
    # Operands are raised to float32 tile by tile, since the device has no product of
    # half-precision operands with a float32 result.
    upcasts: bool
    # As given; autocast may round them to the compute dtype.
    hidden_dtype: torch.dtype
    weight_dtype: torch.dtype
    rank: int = 0  # of a LoRA adapter on the head
    # Those of the products for gradients are not raised, and their results are rounded.
    rounds: bool = False

    @property
    def width(self) -> int:
        """Columns of the products' operands: H, plus an adapter's rank, padded."""
        return operand_width(self.hidden_size, self.rank)

    @property
    def operand_size(self) -> int:
        """Bytes of an operand of the products for gradients."""
        return 4 if self.upcasts and not self.rounds else self.compute_dtype.itemsize

    @property
    def rounded_row(self) -> int:
        """Bytes of a row of such a product's result, before it is added to a float32 sum."""
        return self.width * self.compute_dtype.itemsize * self.rounds

    @property
    def packs(self) -> bool:
        """Whether logits are products of a CPU's bfloat16 units, which pack an operand."""
        return self.rounds and not self.upcasts

    @property
    def packed_bytes(self) -> int:
        """Bytes of what is packed at a time."""
        return packed_bytes(self.width) if self.packs else 0

    @property
    def wide_size(self) -> int:
        """Bytes of a float32 element, or of a float64 element if the call computes in float64."""
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
        """The columns that need a gradient: the head's own, an adapter's, both or none."""
        return columns_of(self.hidden_size, self.rank, own, low_rank)

    def _joined(self) -> int:
        """Bytes of an adapter's part of a row: gathered, rounded, and joined with the head's own."""
        joined = self.width * self.compute_dtype.itemsize + 3 * self.wide_size * self.rank
        return joined if self.rank else 0

    def _copies(self, dtype: torch.dtype) -> int:
        rounded = self.compute_dtype.itemsize if dtype != self.compute_dtype else 0
        return self.hidden_size * rounded + self.width * 4 * self.upcasts


@dataclass(frozen=True)
class Gradients:
    """Which gradients a call is asked for; the last two are an adapter's."""

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
    is_shard: bool = False,
) -> Plan:
    """The plan of one call.

    Args:
        gradients: those of `head`; a reference has none.
        reference: the head of a reference. It is `head` itself unless `with_divergence`.
        with_divergence: whether the call computes the divergence from that reference.
        product_row: bytes a token of the kernel that makes product and fold in one, if a call
            without gradients shall use it; None: it shall not.
        kept: how many tokens' probabilities a trained head keeps; None: the best number.
        is_shard: whether the head is one of several ranks' parts, with `vocab_size` entries, or 0.
    """
    pairs = reference if with_divergence else None
    in_backward = pairs is not None and gradients.head
    accumulates = gradients.states and not in_backward
    # A shard without entries has tiles as if it had one, and no walk.
    given = (head, reference, pairs, backend, has_softcap, with_stats, is_shard)
    size = _Sizes(tokens, max(vocab_size, 1), *given)
    budget = int(workspace_mb * MIB)
    if not gradients.head:
        kept, forward_tiles, backward_tiles = 0, size.forward(budget, kept=0), None
        if product_row is not None:
            # It writes no tile: the workspace holds rows and partial states of as many tokens as
            # fit.
            row = head.hidden_row + product_row + 64
            n = max(min(tokens, budget // row), 1)
            forward_tiles = Tiles(n, vocab_size, n * row, 2 / n)
    elif kept is None:
        kept, forward_tiles, backward_tiles = _cheapest(size, gradients, budget)
    else:
        forward_tiles = size.forward(budget, kept)
        backward_tiles = size.backward(budget, kept, gradients)
    # Operations for one column of the operands; a product with all of them takes `width` times
    # this.
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
        shard_bytes=size.shard_bytes,
    )


@dataclass(frozen=True)
class _Sizes:
    """The bytes of a call's tiles, and the largest tiles that fit."""

    tokens: int
    vocab_size: int
    head: HeadSize
    reference: HeadSize | None
    pairs: HeadSize | None  # the reference's, if a divergence needs tiles of both at once
    backend: str
    has_softcap: bool
    with_stats: bool
    is_shard: bool

    @property
    def shard_bytes(self) -> int:
        """Bytes of a shard's states of all tokens: they stay until all ranks have folded theirs."""
        vectors = 4 + 4 * self.with_stats + (self.reference is not None) * (4 + self.tiles_at_once)
        # As many again relative to the common maximum, and again as one message.
        return 3 * vectors * self.head.wide_size * self.tokens * self.is_shard

    @property
    def tiles_at_once(self) -> int:
        return 1 if self.pairs is None else 2

    @property
    def width(self) -> int:
        """Columns of the products that make the logits of a tile, or of a pair."""
        return self.head.width + (0 if self.pairs is None else self.pairs.width)

    def _most_of_a_fold(self, tokens: int) -> int:
        """The widest tile that a fold of so many tokens takes; pairs are read twice at any width."""
        if self.head.packs:
            # In few sizes: for each of them a product's blocks are compiled.
            entries = _TILE_OF_CPU // (self.head.wide_size * tokens)
            return entries // _LEAST_KEPT_TILE * _LEAST_KEPT_TILE or entries
        reads_once = self.backend == "triton" and self.pairs is None
        if reads_once and tokens >= _LEAST_TOKENS_OF_A_FOLD:
            return FOLD_ENTRIES
        return self._most_entries(tokens)

    def _most_entries(self, tokens: int) -> int:
        """The widest tile of so many tokens: its logits and its weights are a block each."""
        if not self.head.rounds:
            return self.vocab_size
        return _LARGEST_BLOCK_OF_CPU // (self.head.wide_size * max(tokens, self.head.width))

    def _most_of_a_gradient(self, tokens: int) -> int:
        """The widest tile of dW, and of what it is made of."""
        entries = self._most_entries(tokens)
        return min(entries, _MOST_OF_A_GRADIENT) if self.backend == "triton" else entries

    def kept_bytes(self, kept: int) -> int:
        row = kept_row(self.vocab_size) * self.head.operand_size
        # The maxima after each tile (see `forward`) of all kept tokens.
        row += self._maxima * self.is_shard
        return kept * row * self.tiles_at_once

    @property
    def _maxima(self) -> int:
        """Bytes of a token's maximum after each tile."""
        return self.head.wide_size * (self.vocab_size // _LEAST_KEPT_TILE + 1)

    def forward(self, budget: int, kept: int) -> Tiles:
        """The largest tiles of forward, with `kept` tokens' probabilities beside them."""
        head = self.head
        all_kept = 0 < kept == self.tokens
        # A logit: the float32 tile and, for the second product, a rounded copy. For a kept token
        # that copy is among the kept probabilities. In float32 the tile and the copy are one.
        wide = head.wide_size
        logit = 0 if all_kept and head.operand_size == wide else wide
        if head.operand_size != wide and not all_kept:
            logit += head.operand_size
        logit *= self.tiles_at_once
        if self.backend == "torch":
            logit += wide * self.has_softcap + (2 * wide + 1) * self.with_stats
            logit += wide * (self.pairs is not None)
        # A token: its rows of hidden; its label's row of the weight as stored, rounded and in
        # float32; its state.
        token = head.hidden_row + head.width * (2 * wide + head.compute_dtype.itemsize) + 32 * wide
        token += head.rounded_row
        if self.reference is not None:
            token += self.reference.hidden_row + 16 * wide
        if self.pairs is not None:
            # Both derivatives are finished at the same time.
            token += wide * head.width
        if kept:
            # Its maximum after each tile; no tile is so narrow that these would need much memory.
            token += self._maxima * self.tiles_at_once
        return choose_tiles(
            self.tokens,
            self.vocab_size,
            budget - self.kept_bytes(kept) - self.shard_bytes,
            logit=logit,
            token=token,
            # One head's rows at a time.
            entry=max(head.weight_row, 0 if self.pairs is None else self.pairs.weight_row),
            fixed=head.packed_bytes,
            # The weight is read once for each token tile, the accumulator read and written once
            # for each vocabulary tile.
            traffic=(2, 8),
            min_vocab_tile=_LEAST_KEPT_TILE if kept else MIN_VOCAB_TILE,
            most_entries=self._most_of_a_fold,
        )

    def backward(self, budget: int, kept: int, gradients: Gradients) -> Tiles:
        """The largest tiles of the head's gradient."""
        head, wide = self.head, self.head.wide_size
        width = head.columns(gradients.weight, gradients.lora_weight).width
        logit = 0
        if kept < self.tokens:
            logit = wide * self.tiles_at_once
            logit += wide * self.has_softcap if self.backend == "torch" else 0
        elif self.pairs is not None:
            # A tile is made of what both models kept.
            logit = wide
        if logit and head.operand_size != wide:
            # The tile that products read, and what torch adds two kept tiles in.
            logit += head.operand_size
            logit += wide if self.pairs is not None and self.backend == "torch" else 0
        # A token: its rows of hidden, and these scaled, in float32 and rounded.
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
            entry=entry + (wide * width + head.rounded_row if gradients.weights else 0),
            fixed=head.packed_bytes if kept < self.tokens else 0,
            # The tile of dW is read and written once for each token tile; hidden is read, scaled
            # and read again once for each vocabulary tile.
            traffic=(8, 6),
            most_entries=self._most_of_a_gradient,
        )


def _cheapest(size: _Sizes, gradients: Gradients, budget: int) -> tuple[int, Tiles, Tiles]:
    """The number of tokens to keep, and tiles that then fit, for the least time."""
    best: tuple[float, int, Tiles, Tiles] | None = None
    operations_a_byte = _OPERATIONS_A_BYTE_OF_CPU if size.head.rounds else _OPERATIONS_A_BYTE
    for eighths in range(_EIGHTHS, -1, -1):
        kept = size.tokens * eighths // _EIGHTHS
        rest = budget - size.kept_bytes(kept) - size.shard_bytes
        forward = size.forward(budget, kept)
        backward = size.backward(budget, kept, gradients)
        if kept and max(forward.bytes, backward.bytes) > rest:
            continue
        # The part that depends on the choice, per token, hidden unit and entry of the vocabulary.
        recomputed = (size.tokens - kept) / max(size.tokens, 1)
        operations = 2 * recomputed * size.width / size.head.width
        moved = forward.traffic + backward.traffic
        cost = operations + operations_a_byte * moved
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
    fixed: int = 0,
    traffic: tuple[int, int] = (2, 8),
    min_vocab_tile: int = MIN_VOCAB_TILE,
    most_entries: Callable[[int], int] | None = None,
) -> Tiles:
    """Tile sizes within `budget` bytes, for the least memory traffic.

    A tile of n tokens and v entries of the vocabulary costs `n v logit + n token + v entry + fixed`
    bytes. A walk over all tiles moves `traffic[0]` bytes an element of the weight for each of its N/n
    token tiles, and `traffic[1]` bytes an element of `[N, H]` for each of its V/v vocabulary tiles.
    Per NHV this is `traffic[0] / n + traffic[1] / v`; n is tried in powers of two. `most_entries`
    bounds the entries of a tile of so many tokens; None: nothing else does.
    """
    smallest = min(MIN_TOKEN_TILE, max(tokens, 1))
    for least in (min_vocab_tile, _NARROWEST_VOCAB_TILE):
        best: Tiles | None = None
        n = smallest
        while True:
            v = max(budget - fixed - n * token, 0) // max(n * logit + entry, 1)
            v = v if most_entries is None else min(v, most_entries(n))
            v = vocab_size if v >= vocab_size else v // least * least
            if v > 0:
                moved = traffic[0] / n + (traffic[1] / v if v < vocab_size else 0)
                if best is None or moved < best.traffic:
                    best = Tiles(n, v, n * v * logit + n * token + v * entry + fixed, moved)
            if n >= tokens:
                break
            n = min(2 * n, tokens)
        if best is not None:
            return best
    n, v = smallest, min(min_vocab_tile, vocab_size)
    size = n * v * logit + n * token + v * entry + fixed
    return Tiles(n, v, size, traffic[0] / n + traffic[1] / v)
