"""Checks of a preference loss's arguments, beyond those of the operator.

The fused loss and the oracle share them, so that both refuse the same. As in `prefkern.ops.checks`,
nothing here takes memory or synchronises with a device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prefkern.objectives import Mixture, Objective, UnpairedObjective
from prefkern.ops import checks, plain
from prefkern.ops.shards import VocabShard

# The rows of a batch, by how many responses are one item.
_ROWS = {
    1: "[S, T], a row for each response",
    2: "[2B, T], B chosen rows and then their B rejected rows",
    3: "[3B, T], B chosen rows, then their B rejected rows, then their B gold rows",
}
_BOUNDS = {1: "[S + 1]", 2: "[2B + 1]", 3: "[3B + 1]"}


def bounds(labels: Tensor, cu_seqlens: Tensor | None, responses: int) -> Tensor:  # (S + 1,)
    """Where each sequence begins among the flat tokens, after checks of shapes and dtypes."""
    if cu_seqlens is None:
        if labels.ndim != 2 or labels.shape[0] == 0 or labels.shape[0] % responses:
            raise ValueError(
                f"labels must have shape {_ROWS[responses]} (or [M] with cu_seqlens), got "
                f"{list(labels.shape)}"
            )
        rows, length = labels.shape
        if length == 0:
            return torch.zeros(rows + 1, dtype=torch.int64, device=labels.device)
        return torch.arange(0, rows * length + 1, length, device=labels.device)
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be an int32 or int64 tensor, got {cu_seqlens!r}")
    checks.dense("cu_seqlens", cu_seqlens)
    if cu_seqlens.device.type == "meta":
        raise ValueError("cu_seqlens must hold numbers, got a tensor on meta")
    if labels.ndim != 1:
        raise ValueError(
            "with cu_seqlens the batch is packed: hidden must have shape [M, H] and labels [M], "
            f"got labels {list(labels.shape)}"
        )
    count = cu_seqlens.shape[0] - 1 if cu_seqlens.ndim == 1 else 0
    if count < responses or count % responses:
        raise ValueError(
            f"cu_seqlens must have shape {_BOUNDS[responses]}, got {list(cu_seqlens.shape)}"
        )
    return cu_seqlens.to(labels.device, torch.int64)


def reference(
    objective: Objective | UnpairedObjective,
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    ref_logps: Tensor | None,
    n_sequences: int,
    shard: VocabShard | None = None,
) -> None:
    """Check that a reference is given if needed, once and in full, and has the policy's tokens."""
    if ref_hidden is not None and ref_logps is not None and ref_weight is not None:
        raise ValueError("give either ref_hidden and ref_weight, or ref_logps, not both")
    reference_head(hidden, weight, ref_hidden, ref_weight, ref_bias, shard)
    needs_kls = isinstance(objective, Objective) and objective.needs_kls
    if needs_kls and ref_hidden is not None and ref_weight is not None:
        checks.same_entries(hidden, weight, ref_hidden, ref_weight)
    if ref_logps is not None:
        count = reference_sums(n_sequences, objective.responses)
        checks.vector("ref_logps", ref_logps, count, hidden.device)
    if needs_kls and ref_hidden is None:
        raise ValueError(
            f"{inner_name(objective, 'needs_kls')} needs the reference's distributions: give "
            "ref_hidden and ref_weight, ref_logps are not enough"
        )
    if objective.needs_reference and ref_hidden is None and ref_logps is None:
        raise ValueError(
            f"{inner_name(objective, 'needs_reference')} needs a reference: give ref_hidden and "
            "ref_weight, or ref_logps, sums computed earlier"
        )


def reference_sums(n_sequences: int, responses: int) -> int:
    """How many sums of a reference there are: none of gold responses."""
    return n_sequences // 3 * 2 if responses == 3 else n_sequences


def ld_alpha(
    value: float | None, objective: Objective | UnpairedObjective, over_ranks: bool = False
) -> None:
    """Check the weight of tokens beyond the shorter response's length (LD-DPO)."""
    if value is None:
        return
    plain.share("ld_alpha", value)
    is_paired = isinstance(objective, Objective)
    if not is_paired:
        raise ValueError(
            f"ld_alpha is {value!r}, and {type(objective).__name__} has no pairs, whose shorter "
            "response tells which tokens to weigh less; leave it out"
        )
    if objective.needs_kls:
        raise ValueError(
            f"ld_alpha is {value!r}, and {inner_name(objective, 'needs_kls')}'s divergences are "
            "sums over all tokens; leave it out"
        )
    if over_ranks:
        raise ValueError(
            f"ld_alpha is {value!r}, and with sequence_group a rank has some tokens of a response: "
            "which of them are beyond the shorter one's length is not known there; leave it out"
        )


def reference_head(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    shard: VocabShard | None = None,
) -> None:
    """Check that a reference's head is given in full or not at all, and fits the policy's."""
    if (ref_hidden is None) != (ref_weight is None):
        given, missing = ("ref_hidden", "ref_weight")
        if ref_hidden is None:
            given, missing = missing, given
        raise ValueError(f"{given} was given without {missing}; a reference needs both")
    if ref_bias is not None and ref_weight is None:
        raise ValueError("ref_bias was given without ref_weight")
    if ref_hidden is None or ref_weight is None:
        return
    checks.head(ref_hidden, ref_weight, ref_bias, prefix="ref_", shard=shard)
    if shard is not None and ref_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"ref_weight has {ref_weight.shape[0]} rows and weight {weight.shape[0]}: with vocab "
            "both have the rows of the same entries"
        )
    if ref_weight.shape[0] < weight.shape[0]:
        raise ValueError(
            f"ref_weight has {ref_weight.shape[0]} rows and weight {weight.shape[0]}: the "
            "reference must have a row for every vocabulary entry that labels may name"
        )
    checks.same_tokens(hidden, ref_hidden)


def unpaired(
    objective: Objective | UnpairedObjective,
    desirable: Tensor | None,
    mismatched_log_ratios: Tensor | None,
    n_sequences: int,
    hidden: Tensor,
) -> None:
    """Check what single responses need (KTO), and refuse it for pairs."""
    name = type(objective).__name__
    given = {"desirable": desirable, "mismatched_log_ratios": mismatched_log_ratios}
    for argument, value in given.items():
        if isinstance(objective, Objective):
            if value is not None:
                raise ValueError(f"{argument} was given, but {name} trains on pairs")
        elif value is None:
            raise ValueError(f"{name} needs {argument}, got None")
    if desirable is None or mismatched_log_ratios is None:
        return
    checks.vector("desirable", desirable, n_sequences, hidden.device)
    mismatched(mismatched_log_ratios, hidden.device)


def mismatched(log_ratios: Tensor, device: torch.device) -> None:
    """Check KTO's log-ratios, of which there may be any number."""
    if not isinstance(log_ratios, Tensor):
        raise TypeError(f"mismatched_log_ratios must be a tensor of shape [M], got {log_ratios!r}")
    checks.dense("mismatched_log_ratios", log_ratios)
    if log_ratios.ndim != 1:
        shape = list(log_ratios.shape)
        raise ValueError(f"mismatched_log_ratios must have shape [M], got {shape}")
    checks.vector("mismatched_log_ratios", log_ratios, len(log_ratios), device)


def margins(
    objective: Objective | UnpairedObjective,
    reward_margins: Tensor | None,  # (B,)
    n_sequences: int,
    device: torch.device,
) -> None:
    """Check a reward model's margins, if they are needed or given."""
    if reward_margins is not None:
        count = n_sequences // objective.responses
        checks.vector("reward_margins", reward_margins, count, device)
    elif isinstance(objective, Objective) and objective.needs_reward_margins:
        raise ValueError(
            f"{inner_name(objective, 'needs_reward_margins')} needs reward_margins, [B] margins of a "
            "reward model, got None"
        )


def inner_name(objective: Objective | UnpairedObjective, need: str) -> str:
    """The name of the innermost objective with a need, without its wrappers and its mixture."""
    if isinstance(objective, Mixture):
        return inner_name(next(x for x in objective.objectives if getattr(x, need)), need)
    inner = getattr(objective, "objective", None)
    return inner_name(inner, need) if isinstance(inner, Objective) else type(objective).__name__
