"""The ways to compute one DPO step that `prefkern bench` measures beside one another.

Each takes the same `Problem` and returns the loss and the policy's sequence log-probs; autograd does
the rest. The reference's log-probs are part of the step and go through the reference's own head.

- `Prefkern`: `FusedPreferenceLoss`.
- `Eager`: logits in memory, log-softmax in float32, autograd; of the scored tokens only, which is
  kinder to it than what a model's `forward` does.
- `Liger`: `LigerFusedLinearDPOLoss`, compiled on a GPU and not on a CPU; it computes dW for a
  frozen head, too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import prefkern
from prefkern.objectives import DPO, Pairs

IGNORE_INDEX = -100
BETA = 0.1


class Problem(NamedTuple):
    """The inputs of one step; `hidden` and, for a trainable head, `weight` require gradients."""

    hidden: Tensor  # (2B, T, H)
    weight: Tensor  # (V, H)
    labels: Tensor  # (2B, T)
    ref_hidden: Tensor  # (2B, T, H)
    ref_weight: Tensor  # (V, H)
    softcap: float | None


class Provider:
    """One way to compute the step. `sums` are the policy's sequence log-probs, chosen first."""

    def loss(self, problem: Problem, compiled: bool) -> tuple[Tensor, Tensor]:  # (), (2B,)
        raise NotImplementedError

    def token_logps(self, problem: Problem) -> Tensor | None:  # (2B, T)
        """Per-token log-probs, or None where the provider does not return them."""
        return None


class Prefkern(Provider):
    def __init__(self, workspace_mb: float | None) -> None:
        self.workspace_mb = workspace_mb
        self.loss_fn = prefkern.FusedPreferenceLoss(DPO(BETA), workspace_mb=workspace_mb)

    def loss(self, problem: Problem, compiled: bool) -> tuple[Tensor, Tensor]:
        out = self.loss_fn(
            problem.hidden,
            problem.weight,
            problem.labels,
            ref_hidden=problem.ref_hidden,
            ref_weight=problem.ref_weight,
            softcap=problem.softcap,
        )
        return out.loss, torch.cat([out.chosen_logps, out.rejected_logps])

    def token_logps(self, problem: Problem) -> Tensor:
        logps = prefkern.linear_logprobs(
            problem.hidden,
            problem.weight,
            problem.labels,
            softcap=problem.softcap,
            workspace_mb=self.workspace_mb,
        )
        assert isinstance(logps, Tensor)
        return logps


class Eager(Provider):
    """What one writes without a fused loss."""

    def loss(self, problem: Problem, compiled: bool) -> tuple[Tensor, Tensor]:
        sums = self.token_logps(problem).sum(-1)
        with torch.no_grad():
            reference = problem._replace(hidden=problem.ref_hidden, weight=problem.ref_weight)
            ref_sums = self.token_logps(reference).sum(-1)
        return DPO(BETA)(Pairs(*sums.chunk(2), *ref_sums.chunk(2))).losses.mean(), sums

    def token_logps(self, problem: Problem) -> Tensor:
        scored = problem.labels != IGNORE_INDEX
        logits = problem.hidden[scored] @ problem.weight.T  # (N, V)
        if problem.softcap is not None:
            logits = problem.softcap * torch.tanh(logits / problem.softcap)
        log_probs = logits.float().log_softmax(-1)
        logps = log_probs.gather(-1, problem.labels[scored].unsqueeze(-1)).squeeze(-1)
        return torch.zeros(scored.shape, device=logps.device).masked_scatter(scored, logps)


class Liger(Provider):
    def __init__(self) -> None:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

        self.loss_class = LigerFusedLinearDPOLoss

    def loss(self, problem: Problem, compiled: bool) -> tuple[Tensor, Tensor]:
        if problem.softcap is not None:
            raise NotImplementedError("has no softcap")
        loss_fn = self.loss_class(ignore_index=IGNORE_INDEX, beta=BETA, compiled=compiled)
        loss, (chosen_logps, rejected_logps, *_) = loss_fn(
            problem.weight,
            problem.hidden,
            problem.labels,
            ref_input=problem.ref_hidden,
            ref_weight=problem.ref_weight,
        )
        return loss, torch.cat([chosen_logps, rejected_logps])
