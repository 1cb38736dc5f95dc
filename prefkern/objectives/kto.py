"""KTO: single responses, each desirable or not, in place of pairs.

A batch is S responses. In place of a pair's other half there is one reference point for all of
them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prefkern.objectives import citations
from prefkern.objectives.checks import (
    require_kind,
    require_not_negative,
    require_positive,
    require_vectors,
)
from prefkern.objectives.running import all_sum


@dataclass(frozen=True)
class Examples:
    """S responses, as an unpaired objective sees them.

    Args:
        logps: (S,) summed log-probs under the policy, nats.
        desirable: (S,) bool.
        ref_logps: (S,) the same log-probs under the reference.
        mismatched_log_ratios: (M,) log policy / reference of prompts paired with responses to
            other prompts of the batch; constants, and M may be 0.

    Half-precision inputs are raised to float32. Raises TypeError and ValueError as `Pairs` does.
    """

    logps: Tensor
    desirable: Tensor
    ref_logps: Tensor
    mismatched_log_ratios: Tensor

    def __post_init__(self) -> None:
        names = ["logps", "desirable", "ref_logps"]
        require_vectors(self, names, required=tuple(names), size="S")
        # M need not be S.
        mismatched = self.mismatched_log_ratios
        is_tensor = isinstance(mismatched, Tensor) and not (
            mismatched.dtype == torch.bool or mismatched.is_complex() or mismatched.is_nested
        )
        if not is_tensor or mismatched.layout != torch.strided or mismatched.ndim != 1:
            raise TypeError(
                f"mismatched_log_ratios must be a tensor of shape [M], got {mismatched!r}"
            )
        object.__setattr__(self, "mismatched_log_ratios", mismatched.detach().to(self.logps.dtype))


class ExampleLoss(NamedTuple):
    """Loss of each response; only `losses` carries a gradient."""

    losses: Tensor  # (S,)
    rewards: Tensor  # (S,) beta times log-ratio
    reference_point: Tensor  # scalar, z0


class UnpairedObjective(nn.Module):
    """An objective on single responses: `forward(Examples) -> ExampleLoss`."""

    papers: tuple[citations.Paper, ...] = ()
    needs_reference: bool = True
    # How many sequences of a batch are one item.
    responses: int = 1
    beta: float

    @property
    def title(self) -> str:
        """Its name in text."""
        return type(self).__name__

    def citations(self) -> tuple[citations.Paper, ...]:
        """The papers that it is from."""
        return self.papers

    def forward(self, examples: Examples) -> ExampleLoss:
        raise NotImplementedError(f"{type(self).__name__} does not define forward(examples)")


class KTO(UnpairedObjective):
    """KTO (Ethayarajh et al. 2024, Eq. 7), with r = log policy / reference of a response:

        lambda_D (1 - sigmoid(beta (r - z0)))   desirable
        lambda_U (1 - sigmoid(beta (z0 - r)))   undesirable

    z0 = max(0, mean of the mismatched log-ratios) is a constant, and 0 without any. In training the
    mean is over all ranks.

    Args:
        beta: strength of the pull to the reference, > 0.
        desirable_weight: lambda_D, >= 0.
        undesirable_weight: lambda_U, >= 0, not both 0.
    """

    papers = (citations.KTO,)

    def __init__(
        self,
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.beta = require_positive("beta", beta)
        self.desirable_weight = require_not_negative("desirable_weight", desirable_weight)
        self.undesirable_weight = require_not_negative("undesirable_weight", undesirable_weight)
        if not (desirable_weight or undesirable_weight):
            raise ValueError("desirable_weight and undesirable_weight are both 0")

    def forward(self, examples: Examples) -> ExampleLoss:
        require_kind("examples", examples, Examples)
        ratio = examples.logps - examples.ref_logps
        reference_point = self.reference_point(examples.mismatched_log_ratios)
        # 1 - sigmoid(x) = sigmoid(-x) avoids the difference. It is taken through its logarithm,
        # since torch's derivative of sigmoid, s (1 - s), is 0 in float32 from x = 17 on.
        desirable = F.logsigmoid(self.beta * (reference_point - ratio)).exp()
        undesirable = F.logsigmoid(self.beta * (ratio - reference_point)).exp()
        losses = torch.where(
            examples.desirable,
            self.desirable_weight * desirable,
            self.undesirable_weight * undesirable,
        )
        return ExampleLoss(losses, (self.beta * ratio).detach(), reference_point)

    @torch.no_grad()
    def reference_point(self, mismatched: Tensor) -> Tensor:  # (M,) -> ()
        totals = torch.stack([mismatched.sum(), torch.ones_like(mismatched).sum()])
        if self.training:
            totals = all_sum(totals)
        return (totals[0] / totals[1].clamp(min=1)).clamp(min=0)

    def extra_repr(self) -> str:
        names = ("beta", "desirable_weight", "undesirable_weight")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)
