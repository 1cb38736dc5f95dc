"""BCO: a binary classifier of responses, whose logit is the reward less a running shift.

The loss of a pair is a sum of two terms, each with a slope of its own. It is not a function of one
difference (AdaDPO's Eq. 8), so no coefficient balances the gradients of its two responses, and
there is no adaptive form.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prefkern.objectives.base import Objective, PairLoss, Pairs
from prefkern.objectives.checks import require_bool, require_kind, require_positive, require_share
from prefkern.objectives.running import RunningStatistics


class BCO(Objective):
    """BCO (Jung et al. 2024): `-logsigmoid(beta rho_w - delta) - logsigmoid(delta - beta rho_l)`.

    delta is beta times the running mean of rho over the chosen and rejected responses of all ranks,
    a constant to the gradient. Training moves it before it scores a batch; evaluation does not.

    Args:
        beta: as in DPO, > 0.
        reward_shift: False sets delta to 0, as TRL 1.16's DPOTrainer does.
        momentum: weight of earlier batches in the mean, in [0, 1]; 1 is the mean of all batches so
            far, as in TRL's earlier releases.
    """

    def __init__(self, beta: float = 0.1, reward_shift: bool = True, momentum: float = 1.0) -> None:
        super().__init__()
        self.beta = require_positive("beta", beta)
        self.reward_shift = require_bool("reward_shift", reward_shift)
        self.momentum = require_share("momentum", momentum)
        if self.reward_shift:
            self.statistics = RunningStatistics(self.momentum)

    def forward(self, pairs: Pairs) -> PairLoss:
        require_kind("pairs", pairs, Pairs)
        self.follow(pairs.chosen_logps.device)
        if self.observes:
            self.observe(pairs)
        rho_chosen, rho_rejected = self._log_ratios(pairs)
        shift = self.shift(pairs)
        betas = rho_chosen.new_full(rho_chosen.shape, self.beta)
        return PairLoss(
            -F.logsigmoid(self.beta * (rho_chosen - shift))
            - F.logsigmoid(self.beta * (shift - rho_rejected)),
            betas,
            betas,
            (self.beta * rho_chosen).detach(),
            (self.beta * rho_rejected).detach(),
        )

    @property
    def observes(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.training and self.reward_shift

    def observe(self, pairs: Pairs) -> None:
        chosen, rejected = self._log_ratios(pairs)
        # A pair's mean: if one response overflowed, both are left out.
        self.statistics.update((chosen.double() + rejected.double()).detach() / 2)

    def _log_ratios(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        ref_chosen, ref_rejected = pairs.reference("BCO")
        return pairs.chosen_logps - ref_chosen, pairs.rejected_logps - ref_rejected

    @torch.no_grad()
    def shift(self, pairs: Pairs) -> Tensor:  # (B,)
        """delta / beta, the same for all pairs."""
        logps = pairs.chosen_logps
        if not self.reward_shift:
            return torch.zeros_like(logps)
        return self.statistics.mean.to(logps.dtype).expand_as(logps)

    def metrics(self, pairs: Pairs, result: PairLoss) -> dict[str, Tensor]:
        return {"bco/delta": self.beta * self.shift(pairs)} if self.reward_shift else {}

    def extra_repr(self) -> str:
        names = ("beta", "reward_shift", "momentum")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)
