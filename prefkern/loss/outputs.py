"""What a preference loss returns: plain named values, shared by the fused path and the oracle.

What is called float32 is float64 of float64 inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from prefkern.ops.outputs import TokenStats
from prefkern.ops.plan import Plan


@dataclass
class PreferenceOutput:
    """A preference loss and what one wants to log beside it.

    `loss` and `losses` are differentiable, and so are `chosen_logps` and `rejected_logps`, so that
    a term of one's own may be added. The rest is detached. Log-probs are sums over the scored
    tokens of a sequence, in nats; rewards are the coefficient in force times what the objective
    scores a response by (DPO: the log-ratio); gradients are those of `losses` with respect to the
    log-probs, so what a sequence is pushed by.
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
    metrics: dict[str, Tensor] = field(default_factory=dict)  # the objective's own, (B,) each
    token_stats: TokenStats | None = None  # of the labels' shape, on request
    plan: Plan | None = None  # what ran; None for the oracle and under torch.compile


@dataclass
class UnpairedOutput:
    """A loss of single responses (KTO); what is said of `PreferenceOutput` holds here as well."""

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
