"""What a plan promises: launches of each kernel, products and their operations.

Derived from the plan's tiles alone, by counting the walks that the docstrings of `prefkern.ops`
describe, and not from the code that walks.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from prefkern.ops.plan import Plan


@dataclass
class Promise:
    """Of one call or several."""

    launches: Counter[str] = field(default_factory=Counter)
    products: int = 0
    operations: int = 0

    def __add__(self, other: Promise) -> Promise:
        return Promise(
            self.launches + other.launches,
            self.products + other.products,
            self.operations + other.operations,
        )


def of_plan(
    plan: Plan, runs_backward: bool, product_parts: int = 0, sums_bias: bool = False
) -> Promise:
    """The promise of one call.

    Args:
        runs_backward: whether its backward runs, too.
        sums_bias: whether the bias's gradient is a product of kept rows with two columns each.
        product_parts: launches of the kernel with product and fold in one for a tile of tokens.
    """
    token_tiles, kept_tiles = _tiles(plan, plan.forward_tiles.token_tile)
    walks = -(-plan.vocab_size // plan.forward_tiles.vocab_tile)
    has_reference = plan.ref_hidden_size is not None
    # Tiles that are folded together: with a divergence the reference's beside the policy's.
    sides = 2 if plan.has_divergence else 1
    gathers = sides if plan.trains_hidden and not plan.states_in_backward else 0
    products = token_tiles * walks * (1 + has_reference + gathers)
    launches: Counter[str] = Counter()
    if plan.product_in_kernel:
        launches["_product_fold_kernel"] = token_tiles * product_parts
        launches["_merge_splits_kernel"] = launches["_finish_kernel"] = token_tiles
        return Promise(+launches, 0, 0)
    launches["_fold_kernel"] = token_tiles * walks * (1 + (has_reference and sides == 1))
    launches["_finish_kernel"] = token_tiles * (1 + has_reference)
    # Ranks bring their sums to a common maximum, all tokens at once.
    is_shard = plan.shard_bytes > 0
    launches["_rescale_rows_kernel"] = (token_tiles * (walks - 1) + is_shard) * gathers
    launches["_settle_kernel"] = kept_tiles * sides
    if not runs_backward:
        return _of(plan, launches, products, plan.forward_operations)
    gradients = (plan.state_columns.start < plan.hidden_size) + (
        plan.state_columns.stop > plan.hidden_size
    )
    if plan.trains_hidden and plan.tokens:
        # Ranks add up their parts of the states' gradient, in float32, before it is rounded.
        launches["_scatter_scaled_kernel"] = gradients + is_shard
    operations = plan.operations
    if plan.backward_tiles is not None and plan.tokens:
        all_tiles, kept_tiles = _tiles(plan, plan.backward_tiles.token_tile)
        walks = -(-plan.vocab_size // plan.backward_tiles.vocab_tile)
        made = all_tiles if plan.has_divergence else all_tiles - kept_tiles
        launches["_remake_weights_kernel"] = walks * made
        products += walks * (all_tiles - kept_tiles) * sides
        products += walks * all_tiles * (plan.trained_columns.width > 0)
        products += walks * all_tiles * plan.states_in_backward
        if sums_bias and not plan.has_divergence:
            products += walks * kept_tiles
            operations += 2 * 2 * plan.kept_tokens * plan.vocab_size
    return _of(plan, launches, products, operations)


def _of(plan: Plan, launches: Counter[str], products: int, operations: int) -> Promise:
    return Promise(+launches if plan.backend == "triton" else Counter(), products, operations)


def _tiles(plan: Plan, token_tile: int) -> tuple[int, int]:
    """Tiles of tokens in all, and of kept ones; no tile has both kinds."""
    kept = -(-plan.kept_tokens // token_tile)
    return kept + -(-(plan.tokens - plan.kept_tokens) // token_tile), kept


def differences(promised: Promise, seen: Any) -> list[str]:
    """Where a call did something else: `seen` has launches, products and operations."""
    found = []
    for name in sorted({*promised.launches, *seen.launches}):
        want, got = promised.launches[name], seen.launches[name]
        if want != got:
            found.append(f"{got} launches of {name}, the plan promises {want}")
    for name in ("products", "operations"):
        want, got = getattr(promised, name), getattr(seen, name)
        if want != got:
            found.append(f"{got} {name}, the plan promises {want}")
    return found
