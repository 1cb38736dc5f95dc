"""The tile plan: from a bound on temporary memory to tile sizes and a structure of passes.

Three structures, with operations counted in NHV (N scored tokens x H hidden x V vocabulary; one
product of these is 2NHV):

- "forward": log-probs only, 2NHV.
- "one_pass": hidden needs a gradient and the head does not (LoRA on the body). Forward also
  accumulates `D = d logp / d hidden`, as attention's forward accumulates `softmax(q K^T) V`;
  backward is then `g D`, without a product: 4NHV in all.
- "two_pass": the head (or its bias) trains. Forward is 2NHV; backward recomputes each tile, with
  the vocabulary outermost so that dW is finished one tile at a time: 6NHV more.

Tokens are walked in tiles of `token_tile`, the vocabulary in tiles of `vocab_tile`. A tile's sizes
are those that read least memory within the bound: every token tile reads the whole weight once,
and every vocabulary tile reads and writes the `[token_tile, H]` accumulator once. "forward" uses
the tiles of "one_pass", so that a reference pass adds in the same order as the policy's pass.

A call with the divergence from a reference has the same structures over pairs of tiles
(`make_kl_plan`). With H_ref the reference's width, one product of its is 2NH_refV, and "forward"
takes one of each head, "one_pass" two more of the policy's (8NHV in all at equal widths) and
"two_pass" one of the reference's and three of the policy's (12NHV).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Literal

import torch

Structure = Literal["forward", "one_pass", "two_pass"]

MIB = 2**20
# Below this a tile no longer makes a product worth calling; a smaller workspace gets this tile.
MIN_TOKEN_TILE = 16
MIN_VOCAB_TILE = 128


@dataclass(frozen=True)
class Tiles:
    """A tile's sizes and the temporary bytes that a pass over such tiles holds at its peak."""

    token_tile: int
    vocab_tile: int
    bytes: int


@dataclass(frozen=True)
class Plan:
    """What a call runs: structure, tiles, counted operations and bytes."""

    backend: str  # "triton" | "torch"
    structure: Structure
    tokens: int  # N, scored tokens
    hidden_size: int  # H
    vocab_size: int  # V
    forward_tiles: Tiles
    backward_tiles: Tiles | None  # of the recomputation; None where backward needs no product
    forward_operations: int  # multiplications and additions of the matrix products
    backward_operations: int
    saved_bytes: int  # kept for backward, beyond the inputs
    ref_hidden_size: int | None = None  # of the reference's head, in a call with a divergence

    @property
    def operations(self) -> int:
        """Matrix-product operations of forward and backward together."""
        return self.forward_operations + self.backward_operations

    @property
    def workspace_bytes(self) -> int:
        """Most temporary bytes held at once, beyond inputs, outputs and `[N, H]` gradients."""
        backward = self.backward_tiles.bytes if self.backward_tiles else 0
        return max(self.forward_tiles.bytes, backward)


_local = threading.local()


def last_plan() -> Plan | None:
    """The plan of this thread's latest fused call (of any structure), or None before the first."""
    return getattr(_local, "plan", None)


def record(plan: Plan) -> None:
    _local.plan = plan


def default_workspace_mb(device: torch.device) -> float:
    """The bound where none is given: 64 MiB on a CPU, 1/128 of a GPU's memory (at least 256)."""
    if device.type != "cuda":
        return 64.0
    total = torch.cuda.get_device_properties(device).total_memory
    return max(256.0, total / 128 / MIB)


def make_plan(
    *,
    tokens: int,
    hidden_size: int,
    vocab_size: int,
    compute_dtype: torch.dtype,
    upcasts: bool,
    backend: str,
    workspace_mb: float,
    hidden_needs_grad: bool,
    head_needs_grad: bool,
    weight_needs_grad: bool,
    has_softcap: bool,
    with_stats: bool,
    copies_weight: bool,
) -> Plan:
    """The plan of one call.

    Args:
        compute_dtype: dtype that the products' operands have, before any upcast.
        upcasts: operands are raised to float32 tile by tile, since the device has no product of
            half-precision operands with a float32 result.
        head_needs_grad: the weight or the bias needs a gradient; weight_needs_grad: the weight.
        copies_weight: a weight tile is copied to the operands' dtype.
    """
    structure = _structure(hidden_needs_grad, head_needs_grad)
    operand_size = 4 if upcasts else compute_dtype.itemsize
    # Bytes a logit: the float32 tile, and what a backend holds beside it.
    if backend == "torch":
        forward_logit = 4 + (4 if has_softcap else 0) + (9 if with_stats else 0)
        backward_logit = 4 + (4 if has_softcap else 0)
    else:
        forward_logit = backward_logit = 4
    if operand_size != 4:
        forward_logit += operand_size
        backward_logit += operand_size
    # Bytes a token: the gathered rows of hidden, in both dtypes where they are raised.
    hidden_row = hidden_size * (operand_size + (compute_dtype.itemsize if upcasts else 0))
    # The accumulator of D, and the label's row of the weight as stored and in float32.
    accumulator_row = hidden_size * (4 + 4 + compute_dtype.itemsize)
    weight_row = hidden_size * operand_size if copies_weight else 0

    budget = int(workspace_mb * MIB)
    product = 2 * tokens * hidden_size * vocab_size
    forward_tiles = choose_tiles(
        tokens,
        vocab_size,
        budget,
        logit=forward_logit,
        token=hidden_row + accumulator_row + 64,
        word=weight_row,
    )
    backward_tiles = None
    backward_operations = 0
    if structure == "two_pass":
        backward_tiles = choose_tiles(
            tokens,
            vocab_size,
            budget,
            logit=backward_logit,
            token=hidden_row + 64,
            word=weight_row + (4 * hidden_size if weight_needs_grad else 0),
        )
        backward_operations = product * (1 + weight_needs_grad + hidden_needs_grad)
    return Plan(
        backend=backend,
        structure=structure,
        tokens=tokens,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        forward_tiles=forward_tiles,
        backward_tiles=backward_tiles,
        forward_operations=product * (2 if structure == "one_pass" else 1),
        backward_operations=backward_operations,
        saved_bytes={
            "forward": 0,
            "one_pass": 4 * tokens * hidden_size,
            "two_pass": 3 * 4 * tokens,
        }[structure],
    )


@dataclass(frozen=True)
class Head:
    """One of the two heads of a call with a divergence: what its rows cost."""

    hidden_size: int
    compute_dtype: torch.dtype  # of the products' operands, before any upcast
    upcasts: bool  # operands are raised to float32 tile by tile
    copies_weight: bool  # a weight tile is copied on its way to the product

    @property
    def operand_size(self) -> int:
        return 4 if self.upcasts else self.compute_dtype.itemsize

    @property
    def hidden_row(self) -> int:
        """Bytes of a token's gathered row, in both dtypes where it is raised."""
        raised = self.compute_dtype.itemsize if self.upcasts else 0
        return self.hidden_size * (self.operand_size + raised)

    @property
    def weight_row(self) -> int:
        return self.hidden_size * self.operand_size if self.copies_weight else 0


def make_kl_plan(
    *,
    tokens: int,
    vocab_size: int,
    policy: Head,
    reference: Head,
    backend: str,
    workspace_mb: float,
    hidden_needs_grad: bool,
    head_needs_grad: bool,
    weight_needs_grad: bool,
    has_softcap: bool,
) -> Plan:
    """The plan of a call with log-probs and their divergence; what needs a gradient: the policy."""
    structure = _structure(hidden_needs_grad, head_needs_grad)
    # Bytes a logit: both float32 tiles, and what a backend holds beside them. Backward needs one
    # tile for its second products, forward one for each of its two.
    forward_logit = backward_logit = 8
    if backend == "torch":
        forward_logit += 4 + (4 if has_softcap else 0)
        backward_logit += 4 if has_softcap else 0
    if policy.operand_size != 4:
        forward_logit += 2 * policy.operand_size
        backward_logit += policy.operand_size
    hidden_rows = policy.hidden_row + reference.hidden_row
    # Two accumulators, and the label's row of the weight as stored and in float32.
    accumulator_rows = policy.hidden_size * (4 + 4 + 4 + policy.compute_dtype.itemsize)

    budget = int(workspace_mb * MIB)
    product = 2 * tokens * policy.hidden_size * vocab_size
    ref_product = 2 * tokens * reference.hidden_size * vocab_size
    forward_tiles = choose_tiles(
        tokens,
        vocab_size,
        budget,
        logit=forward_logit,
        token=hidden_rows + accumulator_rows + 128,
        # One head's tile of weight at a time.
        word=max(policy.weight_row, reference.weight_row),
    )
    backward_tiles = None
    backward_operations = 0
    if structure == "two_pass":
        backward_tiles = choose_tiles(
            tokens,
            vocab_size,
            budget,
            logit=backward_logit,
            token=hidden_rows + 128,
            word=policy.weight_row
            + reference.weight_row
            + (4 * policy.hidden_size if weight_needs_grad else 0),
        )
        backward_operations = product * (1 + weight_needs_grad + hidden_needs_grad) + ref_product
    return Plan(
        backend=backend,
        structure=structure,
        tokens=tokens,
        hidden_size=policy.hidden_size,
        vocab_size=vocab_size,
        forward_tiles=forward_tiles,
        backward_tiles=backward_tiles,
        forward_operations=product * (3 if structure == "one_pass" else 1) + ref_product,
        backward_operations=backward_operations,
        saved_bytes={
            "forward": 0,
            "one_pass": 2 * 4 * tokens * policy.hidden_size,
            "two_pass": 6 * 4 * tokens,
        }[structure],
        ref_hidden_size=reference.hidden_size,
    )


def _structure(hidden_needs_grad: bool, head_needs_grad: bool) -> Structure:
    if head_needs_grad:
        return "two_pass"
    return "one_pass" if hidden_needs_grad else "forward"


def choose_tiles(
    tokens: int, vocab_size: int, budget: int, *, logit: int, token: int, word: int
) -> Tiles:
    """Tile sizes within `budget` bytes that read least memory.

    A tile of n tokens and v words costs `n v logit + n token + v word` bytes. Walking all tiles
    reads the weight N/n times and the accumulators V/v times, reading and writing: the traffic is
    proportional to `1/n + 4/v`, of which the least is taken over n in powers of two.
    """
    best: tuple[float, int, int] | None = None
    n = MIN_TOKEN_TILE
    while True:
        n = min(n, max(tokens, 1))
        v = (budget - n * token) // (n * logit + word)
        if v >= MIN_VOCAB_TILE or v >= vocab_size:
            v = vocab_size if v >= vocab_size else v // MIN_VOCAB_TILE * MIN_VOCAB_TILE
            traffic = 1 / n + (4 / v if v < vocab_size else 0)
            if best is None or traffic < best[0]:
                best = traffic, n, v
        if n >= tokens:
            break
        n *= 2
    if best is None:
        best = 0.0, min(MIN_TOKEN_TILE, max(tokens, 1)), min(MIN_VOCAB_TILE, vocab_size)
    _, n, v = best
    return Tiles(n, v, n * v * logit + n * token + v * word)
