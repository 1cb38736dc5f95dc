"""BCO: a binary classifier of responses, whose logit is the reward less a running shift.

The loss of a pair is a sum of two terms, one of each response: as in `two_sided`, an adaptive
coefficient multiplies the chosen log-ratio.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prefkern.devices import as_double, back
from prefkern.objectives import citations
from prefkern.objectives.adaptive import Adaptive
from prefkern.objectives.base import PairLoss, Pairs, weighed
from prefkern.objectives.checks import require_bool, require_kind, require_positive, require_share
from prefkern.objectives.contrastive import Contrastive
from prefkern.objectives.running import RunningStatistics


class BCO(Contrastive):
    """BCO (Jung et al. 2024): `-logsigmoid(b_w rho_w - delta) - logsigmoid(delta - b_l rho_l)`.

    delta is the running mean of the rewards b_w rho_w and b_l rho_l of all ranks, a constant to the
    gradient. Training moves it before it scores a batch; evaluation does not.

    Args:
        beta: as in DPO, > 0.
        reward_shift: False sets delta to 0, as TRL 1.16's DPOTrainer does.
        momentum: weight of earlier batches in the mean, in [0, 1]; 1 is the mean of all batches so
            far, as in TRL's earlier releases.
        adaptive: per-pair coefficients.
    """

    papers = (citations.BCO,)
    reward_shift: bool
    momentum: float

    def __init__(
        self,
        beta: float = 0.1,
        reward_shift: bool = True,
        momentum: float = 1.0,
        adaptive: Adaptive | None = None,
    ) -> None:
        super().__init__()
        self.set_options(
            beta=require_positive("beta", beta),
            reward_shift=require_bool("reward_shift", reward_shift),
            momentum=require_share("momentum", momentum),
            adaptive=adaptive,
        )
        if self.reward_shift:
            self.statistics = RunningStatistics(self.momentum)

    def forward(self, pairs: Pairs) -> PairLoss:
        require_kind("pairs", pairs, Pairs)
        self.follow(pairs.chosen_logps.device)
        if self.observes:
            self.observe(pairs)
        beta_chosen, beta_rejected = self.coefficients(pairs)
        chosen, rejected = self.scores(pairs)
        chosen, rejected = weighed(beta_chosen, chosen), beta_rejected * rejected
        shift = self.shift(pairs)
        return PairLoss(
            -F.logsigmoid(chosen - shift) - F.logsigmoid(shift - rejected),
            beta_chosen,
            beta_rejected,
            chosen.detach(),
            rejected.detach(),
        )

    @property
    def observes(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.training and self.reward_shift

    @torch.no_grad()
    def observe(self, pairs: Pairs) -> None:
        # The rewards over beta, which may be changed later. 0 times an infinite log-ratio is NaN
        # here, and is left out.
        chosen, rejected = self.scores(pairs)
        if self.adaptive is not None:
            chosen = self.adaptive.coefficient(self.log_ratio(pairs, self.adaptive)) * chosen
        # A pair's mean: if one response overflowed, both are left out.
        self.statistics.update((as_double(chosen) + as_double(rejected)) / 2)

    @torch.no_grad()
    def shift(self, pairs: Pairs) -> Tensor:  # (B,)
        """delta, the same for all pairs."""
        logps = pairs.chosen_logps
        if not self.reward_shift:
            return torch.zeros_like(logps)
        return back(self.beta * self.statistics.mean, logps).expand_as(logps)

    def metrics(self, pairs: Pairs, result: PairLoss) -> dict[str, Tensor]:
        return {"bco/delta": self.shift(pairs)} if self.reward_shift else {}

    def pair_kernel_options(self) -> None:
        """None: a pair's loss depends on the others."""
