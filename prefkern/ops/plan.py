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

A call with the divergence from a reference has the same structures over pairs of tiles
(`make_kl_plan`), and keeps no probabilities. With H_ref the reference's width, one product of its
is 2NH_refV, and "forward" takes one of each head, "one_pass" two more of the policy's (8NHV in all
at equal widths) and "two_pass" one of the reference's and three of the policy's (12NHV).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

Structure = Literal["forward", "one_pass", "two_pass"]

MIB = 2**20
# Below this a tile no longer makes a product worth calling.
MIN_TOKEN_TILE = 16
MIN_VOCAB_TILE = 128
# Where that does not fit (8 MiB and H of 8192), words are given up to this. A workspace too small
# for it, below 8 MiB, gets the tile above.
_FEWEST_WORDS = 16
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
    traffic: float  # bytes that a walk over all tiles moves, per token, hidden unit and word


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
    ref_hidden_size: int | None = None  # of the reference's head, in a call with a divergence
    rank: int = 0  # of a LoRA adapter on the head
    state_columns: Columns = Columns(0, 0)  # those of D
    trained_columns: Columns = Columns(0, 0)  # those of dW

    @property
    def operations(self) -> int:
        """Matrix-product operations of forward and backward together."""
        return self.forward_operations + self.backward_operations

    @property
    def operations_nhv(self) -> float:
        """`operations` in units of NHV."""
        return self.operations / max(self.tokens * self.hidden_size * self.vocab_size, 1)

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


def slices(start: int, stop: int, step: int) -> Iterator[slice]:
    """`start : stop` in slices of `step`, the last one shorter."""
    return (slice(at, min(at + step, stop)) for at in range(start, stop, step))


@dataclass(frozen=True)
class Head:
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
        if not self.rank:
            return self.hidden_size
        width = self.hidden_size + self.rank
        return width + padding(width)

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
        """Bytes of a word's copies on their way to the product."""
        return self._copies(self.weight_dtype) + self._joined()

    def columns(self, own: bool, low_rank: bool) -> Columns:
        """Those that a gradient is asked of: the head's own, an adapter's, both or none."""
        start = 0 if own else self.hidden_size
        return Columns(start, self.width if low_rank else self.hidden_size)

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
    head: Head,
    gradients: Gradients,
    backend: str,
    workspace_mb: float,
    has_softcap: bool = False,
    with_stats: bool = False,
    with_reference: bool = False,
    product_row: int | None = None,
    kept: int | None = None,
) -> Plan:
    """The plan of one call.

    Args:
        with_reference: a reference's tokens go through the same head.
        product_row: bytes a token of the kernel in which product and fold are one, where that is
            to be used and nothing needs a gradient; None: it is not.
        kept: how many tokens' probabilities a trained head keeps; None: as many as is best.
    """
    size = _Sizes(tokens, vocab_size, head, backend, has_softcap, with_stats, with_reference)
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
        forward_operations=column * (head.width * (1 + with_reference) + state_columns.width),
        backward_operations=column * trained_columns.width
        + 2 * recomputed * vocab_size * head.width,
        saved_bytes=head.wide_size * tokens * (state_columns.width + 3 * gradients.head),
        product_in_kernel=product_row is not None and structure == "forward",
        rank=head.rank,
        state_columns=state_columns,
        trained_columns=trained_columns,
    )


@dataclass(frozen=True)
class _Sizes:
    """What tiles of a call cost in bytes, and which of them fit."""

    tokens: int
    vocab_size: int
    head: Head
    backend: str
    has_softcap: bool
    with_stats: bool
    with_reference: bool

    def kept_bytes(self, kept: int) -> int:
        return kept * kept_row(self.vocab_size) * self.head.operand_size

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
        if self.backend == "torch":
            logit += wide * self.has_softcap + (2 * wide + 1) * self.with_stats
        # A token: its rows of hidden, its label's row of the weight as stored, rounded and in
        # float32, its state.
        token = head.hidden_row + head.width * (2 * wide + head.compute_dtype.itemsize) + 32 * wide
        if self.with_reference:
            token += head.hidden_row + 16 * wide
        if kept:
            # Its maximum after each tile, and no tile is so narrow that these would add up.
            token += wide * (self.vocab_size // _LEAST_KEPT_TILE + 1)
        return choose_tiles(
            self.tokens,
            self.vocab_size,
            budget - self.kept_bytes(kept),
            logit=logit,
            token=token,
            word=head.weight_row,
            # The weight is read once for each token tile, the accumulator read and written once
            # for each vocabulary tile.
            traffic=(2, 8),
            min_vocab_tile=_LEAST_KEPT_TILE if kept else MIN_VOCAB_TILE,
        )

    def backward(self, budget: int, kept: int, gradients: Gradients) -> Tiles:
        """The largest tiles of the head's gradient."""
        head = self.head
        width = head.columns(gradients.weight, gradients.lora_weight).width
        logit, wide = 0, head.wide_size
        if kept < self.tokens:
            logit = wide + (wide * self.has_softcap if self.backend == "torch" else 0)
            if head.operand_size != wide:
                logit += head.operand_size
        # Its rows of hidden, and the same scaled, in float32 and rounded.
        scaled = width * (wide + (head.operand_size if head.operand_size != wide else 0))
        return choose_tiles(
            self.tokens,
            self.vocab_size,
            budget - self.kept_bytes(kept),
            logit=logit,
            token=head.hidden_row + scaled + 16 * wide,
            word=head.weight_row + (wide * width if gradients.weights else 0),
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
        # Per token, hidden unit and word, of what depends on the choice.
        operations = 2 * (size.tokens - kept) / max(size.tokens, 1)
        moved = forward.traffic + backward.traffic
        cost = operations + _OPERATIONS_A_BYTE * moved
        if best is None or cost < best[0]:
            best = cost, kept, forward, backward
    assert best is not None
    return best[1:]


def make_kl_plan(
    *,
    tokens: int,
    vocab_size: int,
    policy: Head,
    reference: Head,
    gradients: Gradients,  # the policy's
    backend: str,
    workspace_mb: float,
    has_softcap: bool,
) -> Plan:
    """The plan of a call with log-probs and their divergence."""
    structure: Structure = "forward"
    if gradients.hidden or gradients.head:
        structure = "two_pass" if gradients.head else "one_pass"
    # Bytes a logit: both float32 tiles, and what a backend holds beside them. Backward needs one
    # tile for its second products, forward one for each of its two.
    wide = policy.wide_size
    forward_logit = backward_logit = 2 * wide
    if backend == "torch":
        forward_logit += wide + (wide if has_softcap else 0)
        backward_logit += wide if has_softcap else 0
    if policy.operand_size != wide:
        forward_logit += 2 * policy.operand_size
        backward_logit += policy.operand_size
    hidden_rows = policy.hidden_row + reference.hidden_row
    # Two accumulators, and the label's row of the weight as stored and in float32.
    accumulator_rows = policy.hidden_size * (3 * wide + policy.compute_dtype.itemsize)

    budget = int(workspace_mb * MIB)
    product = 2 * tokens * policy.hidden_size * vocab_size
    ref_product = 2 * tokens * reference.hidden_size * vocab_size
    forward_tiles = choose_tiles(
        tokens,
        vocab_size,
        budget,
        logit=forward_logit,
        token=hidden_rows + accumulator_rows + 32 * wide,
        # One head's tile of weight at a time.
        word=max(policy.weight_row, reference.weight_row),
    )
    backward_tiles = None
    backward_operations = 0
    if gradients.head:
        backward_tiles = choose_tiles(
            tokens,
            vocab_size,
            budget,
            logit=backward_logit,
            token=hidden_rows + 32 * wide,
            word=policy.weight_row
            + reference.weight_row
            + (wide * policy.hidden_size if gradients.weight else 0),
        )
        backward_operations = product * (1 + gradients.weight + gradients.hidden) + ref_product
    return Plan(
        backend=backend,
        structure=structure,
        tokens=tokens,
        hidden_size=policy.hidden_size,
        vocab_size=vocab_size,
        trains_hidden=gradients.hidden,
        trains_head=gradients.head,
        forward_tiles=forward_tiles,
        backward_tiles=backward_tiles,
        kept_tokens=0,
        kept_bytes=0,
        forward_operations=product * (3 if structure == "one_pass" else 1) + ref_product,
        backward_operations=backward_operations,
        saved_bytes={
            "forward": 0,
            "one_pass": 2 * wide * tokens * policy.hidden_size,
            "two_pass": 6 * wide * tokens,
        }[structure],
        ref_hidden_size=reference.hidden_size,
    )


def choose_tiles(
    tokens: int,
    vocab_size: int,
    budget: int,
    *,
    logit: int,
    token: int,
    word: int,
    traffic: tuple[int, int] = (2, 8),
    min_vocab_tile: int = MIN_VOCAB_TILE,
) -> Tiles:
    """Tile sizes within `budget` bytes that move least memory.

    A tile of n tokens and v words costs `n v logit + n token + v word` bytes. A walk over all tiles
    moves `traffic[0]` bytes an element of the weight for each of its N/n token tiles and
    `traffic[1]` bytes an element of `[N, H]` for each of its V/v vocabulary tiles: per NHV,
    `traffic[0] / n + traffic[1] / v`, of which the least is taken over n in powers of two.
    """
    smallest = min(MIN_TOKEN_TILE, max(tokens, 1))
    for least in (min_vocab_tile, _FEWEST_WORDS):
        best: Tiles | None = None
        n = smallest
        while True:
            v = max(budget - n * token, 0) // max(n * logit + word, 1)
            v = vocab_size if v >= vocab_size else v // least * least
            if v > 0:
                moved = traffic[0] / n + (traffic[1] / v if v < vocab_size else 0)
                if best is None or moved < best.traffic:
                    best = Tiles(n, v, n * v * logit + n * token + v * word, moved)
            if n >= tokens:
                break
            n = min(2 * n, tokens)
        if best is not None:
            return best
    n, v = smallest, min(min_vocab_tile, vocab_size)
    return Tiles(n, v, n * v * logit + n * token + v * word, traffic[0] / n + traffic[1] / v)
