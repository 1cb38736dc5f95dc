"""What the trainer logs: each metric as a numerator and a weight for every pair (or response).

Both are summed over batches, steps and ranks, so that a mean is over pairs (tokens, desirable
responses, ...), however they were batched. Names are TRL's where TRL has the metric.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from prefkern.loss.diagnostics import gradient_balance
from prefkern.loss.outputs import PreferenceOutput, UnpairedOutput
from prefkern.objectives import Objective, UnpairedObjective
from prefkern.ops.outputs import TokenStats
from prefkern.ops.sequences import sequence_sums

# The tokens of all training batches so far, padding left out: TRL's name.
NUM_TOKENS = "num_tokens"
# Sums over tokens, of which a rank may have some alone.
OF_TOKENS = ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy")


@torch.no_grad()
def item_values(
    out: PreferenceOutput | UnpairedOutput,
    objective: Objective | UnpairedObjective,
    cu_seqlens: Tensor | None = None,  # (S + 1,)
) -> dict[str, Tensor]:
    """Each metric as [B, 2] (KTO: [S, 2]): an item's numerator and its weight.

    Per-token statistics have S rows; with `cu_seqlens` they are those of a packed batch.
    """
    if isinstance(out, UnpairedOutput):
        return _of_responses(out, cu_seqlens)
    assert isinstance(objective, Objective)
    return _of_pairs(out, objective, cu_seqlens)


def token_count(batch: Mapping[str, Any]) -> Tensor:  # (2,) int64
    """The real tokens of a batch, as a numerator and a weight: exact, as sums in float32 are not."""
    mask = batch.get("attention_mask")
    ids: Tensor = batch["input_ids"]
    count = ids.new_tensor(ids.numel()) if mask is None else mask.sum()
    return torch.stack([count, torch.ones_like(count)]).long()


def per_item(numerators: Tensor, weights: Tensor | None = None) -> Tensor:  # (B,) -> (B, 2)
    numerators = numerators.detach().float()
    weights = torch.ones_like(numerators) if weights is None else weights.float()
    return torch.stack([numerators, weights], dim=1)


def means(sums: dict[str, Tensor], zero: tuple[str, ...] = ()) -> dict[str, float]:
    """The metrics, from summed (2,) values; of weight 0 those in `zero` are 0, others are left out."""
    values = {name: total.tolist() for name, total in sums.items()}
    result = {name: total / weight for name, (total, weight) in values.items() if weight > 0}
    result |= {name: 0.0 for name in zero if name in values and name not in result}
    # Without pairs the margin is the difference of two means (as in TRL).
    if "rewards/margins" not in sums and {"rewards/chosen", "rewards/rejected"} <= result.keys():
        result["rewards/margins"] = result["rewards/chosen"] - result["rewards/rejected"]
    return result


def _of_pairs(
    out: PreferenceOutput, objective: Objective, cu_seqlens: Tensor | None
) -> dict[str, Tensor]:
    chosen, rejected = out.chosen_rewards, out.rejected_rewards
    values = {
        "rewards/chosen": per_item(chosen),
        "rewards/rejected": per_item(rejected),
        "rewards/accuracies": per_item(chosen > rejected),
        "rewards/margins": per_item(chosen - rejected),
        "logps/chosen": per_item(out.chosen_logps),
        "logps/rejected": per_item(out.rejected_logps),
    }
    if out.gold_logps is not None:
        values["logps/gold"] = per_item(out.gold_logps)
    balance = gradient_balance(out)
    values["gradients/log_balance"] = _where_finite(balance.log_balance)
    values["gradients/chosen_share"] = _where_finite(balance.chosen_share)
    adaptive = objective.adaptive
    if adaptive is not None:
        ratio = out.beta_chosen / out.beta_rejected
        values["adaptive/beta_ratio"] = per_item(ratio)
        if adaptive.clip is not None:
            # The ratio is beta_chosen / beta, up to the rounding of a product and a quotient.
            at_clip = ratio >= adaptive.k * adaptive.clip * (1 - 1e-6)
            values["adaptive/clip_fraction"] = per_item(at_clip)
    if (
        objective.moves_beta
        and out.ref_chosen_logps is not None
        and out.ref_rejected_logps is not None
    ):
        # The rewards above use the coefficients in force; these compare with plain DPO's.
        base = (out.chosen_logps - out.ref_chosen_logps) - (
            out.rejected_logps - out.ref_rejected_logps
        )
        values["rewards/base_margins"] = per_item(objective.beta * base)
        values["rewards/base_accuracies"] = per_item(base > 0)
    values |= {name: per_item(value) for name, value in out.metrics.items()}
    if out.token_stats is not None:
        sides = [out.chosen_lengths, out.rejected_lengths]
        sides += [] if out.gold_lengths is None else [out.gold_lengths]
        lengths = torch.cat(sides)
        pairs = len(out.losses)
        row = torch.arange(len(lengths), device=lengths.device)
        is_rejected = (row >= pairs) & (row < 2 * pairs)
        rows = _of_tokens(out.token_stats, lengths, row < pairs, is_rejected, cu_seqlens)
        # The responses of a pair are one item.
        values |= {name: value.view(len(sides), -1, 2).sum(0) for name, value in rows.items()}
    return values


def _of_responses(out: UnpairedOutput, cu_seqlens: Tensor | None) -> dict[str, Tensor]:
    desirable = out.desirable.float()
    values = {
        "rewards/chosen": per_item(out.rewards * desirable, desirable),
        "rewards/rejected": per_item(out.rewards * (1 - desirable), 1 - desirable),
        "logps/chosen": per_item(out.logps * desirable, desirable),
        "logps/rejected": per_item(out.logps * (1 - desirable), 1 - desirable),
        "kl": per_item(out.reference_point.expand_as(out.losses)),
        **{name: per_item(value) for name, value in out.metrics.items()},
    }
    if out.token_stats is not None:
        sides = (out.desirable, ~out.desirable)
        values |= _of_tokens(out.token_stats, out.lengths, *sides, cu_seqlens)
    return values


def _of_tokens(
    stats: TokenStats,  # (S, T) each, or (M,) with cu_seqlens
    lengths: Tensor,  # (S,)
    is_chosen: Tensor,  # (S,) bool
    is_rejected: Tensor,  # (S,) bool
    cu_seqlens: Tensor | None,  # (S + 1,)
) -> dict[str, Tensor]:  # (S, 2) each
    def sums(per_token: Tensor) -> Tensor:  # -> (S,)
        if cu_seqlens is None:
            return per_token.float().sum(1)
        return sequence_sums(per_token.float(), cu_seqlens.long())

    logits = sums(stats.mean_logit)
    chosen, rejected = is_chosen.float(), is_rejected.float()
    return {
        "entropy": per_item(sums(stats.entropy), lengths),
        "logits/chosen": per_item(logits * chosen, lengths * chosen),
        "logits/rejected": per_item(logits * rejected, lengths * rejected),
        "mean_token_accuracy": per_item(sums(stats.is_top1) * chosen, lengths * chosen),
    }


def _where_finite(values: Tensor) -> Tensor:  # (B,) -> (B, 2)
    """A pair without a finite value has weight 0."""
    finite = values.isfinite()
    return per_item(torch.where(finite, values, 0.0), finite)
