"""MADPO: DPO with a weight for each pair, from the margin of a reward model (Eq. 4 and 5)."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from prefkern.objectives import citations
from prefkern.objectives.base import PairLoss, Pairs
from prefkern.objectives.checks import (
    LARGEST,
    is_number,
    require_one_of,
    require_positive,
    shown,
)
from prefkern.objectives.contrastive import Contrastive

# Margins are clamped to this: sigmoid is 0 or 1 long before, and c h stays finite.
MAX_MARGIN = 1e4


class MADPO(Contrastive):
    """Margin-adaptive DPO: `-w(h) logsigmoid(beta (rho_w - rho_l))`, h the reward margin.

    `w(h) = sigmoid(c(|h|) h) / sigmoid(h)` for h > -tau, and 1 below. c is above 1 at h = 0, 1 at
    |h| = tau, and falls to c_min: hard pairs count more, easy ones less. w is computed in log
    space.

    Args:
        beta: as in DPO, > 0.
        tau: margin from which a pair counts as easy, > 0.
        c_max: limit of c for small margins, > 1.
        c_min: limit of c for large ones, in [0, 1); None: 1 / c_max, as in the paper's runs.
        lam: steepness of the passage between them, > 0.
        mode: "full"; "amplify", w = 1 for |h| >= tau; "regularize", w = 1 for |h| < tau (Figure 3).
    """

    papers = (citations.MADPO,)
    needs_reward_margins = True
    tau: float
    c_max: float
    c_min: float
    lam: float
    mode: str

    def __init__(
        self,
        beta: float = 0.1,
        tau: float = 7.0,
        c_max: float = 4.0,
        c_min: float | None = None,
        lam: float = 1.0,
        mode: Literal["full", "amplify", "regularize"] = "full",
    ) -> None:
        super().__init__()
        if not (is_number(c_max) and 1 < c_max <= LARGEST):
            raise ValueError(
                f"c_max must be a finite number > 1, at most {LARGEST:g}, got {shown(c_max)}"
            )
        if c_min is not None and not (is_number(c_min) and 0 <= c_min < 1):
            raise ValueError(f"c_min must be None or in [0, 1), got {shown(c_min)}")
        self.set_options(
            beta=require_positive("beta", beta),
            tau=require_positive("tau", tau),
            c_max=float(c_max),
            c_min=1 / float(c_max) if c_min is None else float(c_min),
            lam=require_positive("lam", lam),
            mode=require_one_of("mode", mode, ("full", "amplify", "regularize")),
        )

    @torch.no_grad()
    def weight(self, pairs: Pairs) -> Tensor:
        h = pairs.margins(self._name).to(pairs.chosen_logps.dtype).clamp(-MAX_MARGIN, MAX_MARGIN)
        size = h.abs()
        # 1 / (1 + K exp(lam (|h| - tau))) = sigmoid(-(lam (|h| - tau) + log K))
        exponent = self.lam * (size - self.tau) + self._log_k
        c = self.c_min + (self.c_max - self.c_min) * torch.sigmoid(-exponent)
        weight = (F.logsigmoid(c * h) - F.logsigmoid(h)).exp()
        unweighted = h <= -self.tau
        if self.mode == "amplify":
            unweighted = unweighted | (size >= self.tau)
        if self.mode == "regularize":
            unweighted = unweighted | (size < self.tau)
        return torch.where(unweighted, 1.0, weight)

    def metrics(self, pairs: Pairs, result: PairLoss) -> dict[str, Tensor]:
        return {"madpo/weight": self.weight(pairs)}

    def pair_kernel_options(self) -> dict[str, Any] | None:
        options = super().pair_kernel_options()
        assert options is not None
        return {
            **options,
            "margin_weight": {
                "tau": self.tau,
                "c_min": self.c_min,
                "c_range": self.c_max - self.c_min,
                "log_k": self._log_k,
                "lam": self.lam,
                "max_margin": MAX_MARGIN,
                "amplifies": self.mode != "regularize",
                "damps": self.mode != "amplify",
            },
        }

    @property
    def _log_k(self) -> float:
        return math.log((self.c_max - 1) / (1 - self.c_min))
