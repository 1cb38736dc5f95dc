"""What a preference loss returns: plain named values, shared by the fused path and the oracle.

All are float32, or float64 if the inputs are.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from prefkern.ops.outputs import TokenStats
from prefkern.ops.plan import Plan


@dataclass
class PreferenceOutput:
    """A preference loss, and what is worth logging with it.

    `loss`, `losses`, `chosen_logps` and `rejected_logps` are differentiable, so that you can add
    terms of your own. The rest is detached. Log-probs are sums over the scored tokens of a
    sequence, in nats, of which `ld_alpha` may weigh some less. A reward is the coefficient in force
    times the objective's score of a response (DPO: the log-ratio). Gradients are those of `losses`
    with respect to the log-probs: the push on a sequence, and on each token of weight 1 in it.
    """

    loss: Tensor  # scalar, mean over pairs
    losses: Tensor  # (B,)
    chosen_logps: Tensor  # (B,)
    rejected_logps: Tensor  # (B,)
    ref_chosen_logps: Tensor | None  # (B,)
    ref_rejected_logps: Tensor | None  # (B,)
    chosen_rewards: Tensor  # (B,)
    rejected_rewards: Tensor  # (B,)
    chosen_lengths: Tensor  # (B,) int64, scored tokens
    rejected_lengths: Tensor  # (B,) int64
    beta_chosen: Tensor  # (B,)
    beta_rejected: Tensor  # (B,)
    chosen_gradients: Tensor | None  # (B,); None under torch.compile
    rejected_gradients: Tensor | None  # (B,); None under torch.compile
    gold_logps: Tensor | None = None  # (B,), of a third response (TPO), differentiable
    gold_lengths: Tensor | None = None  # (B,) int64
    metrics: dict[str, Tensor] = field(default_factory=dict)  # the objective's own, (B,) each
    token_stats: TokenStats | None = None  # of the labels' shape, on request
    plan: Plan | None = None  # what ran; None for the oracle and under torch.compile


@dataclass
class UnpairedOutput:
    """A loss of single responses (KTO); its values are those of `PreferenceOutput`."""

    loss: Tensor  # scalar, mean over responses
    losses: Tensor  # (S,)
    logps: Tensor  # (S,), differentiable
    ref_logps: Tensor  # (S,)
    rewards: Tensor  # (S,)
    lengths: Tensor  # (S,) int64, scored tokens
    desirable: Tensor  # (S,) bool
    reference_point: Tensor  # scalar, KTO's z0
    metrics: dict[str, Tensor] = field(default_factory=dict)  # (S,) each
    token_stats: TokenStats | None = None
    plan: Plan | None = None
