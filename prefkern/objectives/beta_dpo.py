"""beta-DPO: one beta for a batch, from how easy the batch is, and a draw that drops outliers."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prefkern.devices import as_double, back, sent
from prefkern.objectives import citations
from prefkern.objectives.base import Objective, PairLoss, Pairs
from prefkern.objectives.checks import (
    is_number,
    require_below,
    require_int,
    require_kind,
    require_not_negative,
    require_positive,
    shown,
)
from prefkern.objectives.running import RunningStatistics, gather


class BetaDPO(Objective):
    """beta-DPO (Wu et al. 2024b; MADPO, section 2.5): DPO at the batch's own beta.

    `beta_batch = max(beta (1 + m (mean h - h0)), beta_min)`, h = rho_w - rho_l of a pair, the mean
    over the kept pairs of all ranks. Training keeps a share of the batch: it draws pairs without
    replacement, in proportion to the normal density N(h; h0, sigma^2). The loss is the mean over
    the pairs drawn; the others have a loss of 0. h0 and sigma are running statistics (mean 0 and
    spread 1 before the first batch). Evaluation keeps every pair and updates nothing. Its beta is
    that of the rank's own batch, so its loss depends on the batch's size.

    The draw depends on a seed and on the number of earlier draws, both in the state_dict: a resumed
    run draws the same pairs as an uninterrupted one.

    Args:
        beta: as in DPO, > 0.
        m: how strongly the batch's margin moves beta, >= 0.
        keep: share of a batch to train on, in (0, 1].
        momentum: weight of earlier batches in the statistics, in [0, 1).
        beta_min: lower bound of beta_batch, > 0.
    """

    papers = (citations.BETA_DPO,)

    def __init__(
        self,
        beta: float = 0.1,
        m: float = 0.6,
        keep: float = 1.0,
        momentum: float = 0.9,
        beta_min: float = 1e-3,
    ) -> None:
        super().__init__()
        self.beta = require_positive("beta", beta)
        self.m = require_not_negative("m", m)
        if not (is_number(keep) and 0 < keep <= 1):
            raise ValueError(f"keep must be in (0, 1], got {shown(keep)}")
        self.keep = float(keep)
        self.momentum = require_below("momentum", momentum, 1)
        self.beta_min = require_positive("beta_min", beta_min)
        self.statistics = RunningStatistics(self.momentum, variance=1.0, bias_corrected=False)
        self.seed = 0
        self.draws = 0
        # 1 for each kept pair of the last batch, else 0. Losses do not show it: a kept pair's may
        # underflow to 0, and a wrapper may add a term to a pair that was not kept.
        self._kept = torch.ones(0)

    @property
    def moves_beta(self) -> bool:
        return True

    def forward(self, pairs: Pairs) -> PairLoss:
        require_kind("pairs", pairs, Pairs)
        self.follow(pairs.chosen_logps.device)
        ref_chosen, ref_rejected = pairs.reference("BetaDPO")
        rho_chosen = pairs.chosen_logps - ref_chosen
        rho_rejected = pairs.rejected_logps - ref_rejected
        h = rho_chosen - rho_rejected
        beta, share = self._batch(h.detach())
        losses = -F.logsigmoid(beta * h)
        self._kept = torch.ones_like(h.detach())
        if share is not None:
            losses = share * losses
            self._kept = (share > 0).to(h.dtype)
        betas = beta.expand_as(h)
        return PairLoss(
            losses,
            betas,
            betas,
            (beta * rho_chosen).detach(),
            (beta * rho_rejected).detach(),
        )

    def metrics(self, pairs: Pairs, result: PairLoss) -> dict[str, Tensor]:
        return {"beta_dpo/beta": result.beta_chosen, "beta_dpo/kept": self._kept}

    def manual_seed(self, seed: int) -> None:
        """Start the draws over from a seed, an int, which must be the same on every rank."""
        self.seed, self.draws = require_int("seed", seed), 0

    def get_extra_state(self) -> dict[str, int]:
        return {"seed": self.seed, "draws": self.draws}

    def set_extra_state(self, state: Any) -> None:
        if not isinstance(state, dict) or {*state} != {"seed", "draws"}:
            raise TypeError(f"BetaDPO's state must have seed and draws, got {shown(state)}")
        self.seed, self.draws = (require_int(name, state[name]) for name in ("seed", "draws"))

    def extra_repr(self) -> str:
        names = ("beta", "m", "keep", "momentum", "beta_min")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    @torch.no_grad()
    def _batch(self, h: Tensor) -> tuple[Tensor, Tensor | None]:
        """The batch's beta, and the factor of each pair's loss: pairs / kept pairs, or 0."""
        everyone, mine = h, slice(0, len(h))
        if self.training:
            self.statistics.update(h)
            everyone, mine = gather(h)
        share = None
        # A pair whose h overflowed must not spoil the others' beta.
        counted = everyone.isfinite()
        if self.training and self.keep < 1:
            kept = self._draw(everyone)
            share = kept * (len(kept) / kept.sum())
            counted = counted & (kept > 0)
        mean = torch.where(counted, everyone, 0.0).sum() / counted.sum().clamp(min=1)
        beta = self.beta * (1 + self.m * (mean - back(self.statistics.mean, h)))
        return beta.clamp(min=self.beta_min), None if share is None else share[mine]

    def _draw(self, h: Tensor) -> Tensor:  # (B of all ranks,) -> the same, 1 where kept
        """Weighted sampling without replacement: the largest of log-weight plus Gumbel noise."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.draws) % 2**63)
        self.draws += 1
        uniform = torch.rand(len(h), generator=generator, dtype=torch.float64)
        gumbel = -torch.log(-torch.log(uniform.clamp(min=1e-300)))
        spread = self.statistics.spread()
        z = (as_double(h) - self.statistics.mean) / torch.where(spread > 0, spread, 1.0)
        keys = (-0.5 * z.square()).nan_to_num(nan=-math.inf) + sent(gumbel, z.device)
        # The 1e-6 makes 0.29 of 100 pairs 29, and not 28.
        count = max(int(self.keep * len(h) + 1e-6), 1)
        return torch.zeros_like(h).index_fill(0, keys.topk(count).indices.to(h.device), 1.0)
