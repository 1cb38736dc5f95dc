"""alpha-DPO: SimPO with a margin for each pair, a z-score of how far the policy has moved.

The stop-gradient in Eq. 12 makes the margin a constant; `AlphaDPO(alpha=0)` is SimPO. The
ablations in Table 2 are arguments: gamma = 0, `normalize=False` and `stop_gradient=False`. The
paper reports lower scores for each. Without both of the latter, Eq. 9 is
`-logsigmoid((1 - alpha) u + alpha u_ref - gamma)`, SimPO with a reference mixed in.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from prefkern.devices import back
from prefkern.objectives import citations
from prefkern.objectives.base import PairLoss, Pairs
from prefkern.objectives.checks import (
    require_below,
    require_bool,
    require_kind,
    require_not_negative,
    require_number,
    require_one_of,
    require_positive,
)
from prefkern.objectives.contrastive import Contrastive, Score
from prefkern.objectives.running import LEAST_SPREAD, RunningStatistics

# The gap is (policy) x the policy's difference of log-probs + (reference) x the reference's.
_GAPS = {
    "ratio": (1.0, -1.0),
    "policy": (1.0, 0.0),
    "reference": (0.0, 1.0),
    "inverse_reference": (0.0, -1.0),
}


class AlphaDPO(Contrastive):
    """alpha-DPO (Wu et al. 2024a, Eq. 12): `-logsigmoid(u - sg[gamma + alpha s Z])`.

    `u = beta (L_w / n_w - L_l / n_l)`, and Z is the z-score of the gap
    `(L_w / n_w - L_l / n_l) - (R_w / n_w - R_l / n_l)` under running statistics over the batches of
    all ranks. Training updates them before it scores a batch; evaluation does not. A spread of 0
    gives Z = 0.

    Args:
        beta: scale of the log-probs, > 0.
        gamma: target margin, any number.
        alpha: weight of Z, >= 0; 0 is SimPO.
        length_normalized: False leaves out every division by n (Appendix C.2).
        implicit_reference: of Table 2, "ratio" (Eq. 8: U (policy/reference)^alpha), "policy"
            (U policy^alpha), "reference" (U reference^alpha) or "inverse_reference".
        momentum: weight of earlier batches in the statistics, in [0, 1).
        scale_by_beta: s = beta, as in the authors' code, for which the paper gives its
            hyper-parameters; False: s = 1, as Eq. 12 is printed.
        normalize: False is Table 2's "w/o Normalization": the gap itself in place of its z-score.
        stop_gradient: False is Table 2's "w/o sg": the margin carries a gradient (that of the
            statistics is left out).
    """

    papers = (citations.ALPHA_DPO,)
    gamma: float
    alpha: float
    length_normalized: bool
    implicit_reference: str
    momentum: float
    scale_by_beta: bool
    normalize: bool
    stop_gradient: bool

    def __init__(
        self,
        beta: float = 10.0,
        gamma: float = 4.0,
        alpha: float = 0.05,
        length_normalized: bool = True,
        implicit_reference: Literal["ratio", "policy", "reference", "inverse_reference"] = "ratio",
        momentum: float = 0.9,
        scale_by_beta: bool = True,
        normalize: bool = True,
        stop_gradient: bool = True,
    ) -> None:
        super().__init__()
        self.set_options(
            beta=require_positive("beta", beta),
            gamma=require_number("gamma", gamma),
            alpha=require_not_negative("alpha", alpha),
            length_normalized=require_bool("length_normalized", length_normalized),
            implicit_reference=require_one_of(
                "implicit_reference", implicit_reference, tuple(_GAPS)
            ),
            momentum=require_below("momentum", momentum, 1),
            scale_by_beta=require_bool("scale_by_beta", scale_by_beta),
            normalize=require_bool("normalize", normalize),
            stop_gradient=require_bool("stop_gradient", stop_gradient),
        )
        if self.normalize:
            self.statistics = RunningStatistics(self.momentum)

    @property
    def score(self) -> Score:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "mean_log_prob" if self.length_normalized else "log_prob"

    @property
    def fixed_margin(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.gamma

    @property
    def needs_reference(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return _GAPS[self.implicit_reference][1] != 0

    @property
    def observes(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.training and self.normalize

    def forward(self, pairs: Pairs) -> PairLoss:
        require_kind("pairs", pairs, Pairs)
        self.follow(pairs.chosen_logps.device)
        if self.observes:
            self.observe(pairs)
        return super().forward(pairs)

    @torch.no_grad()
    def observe(self, pairs: Pairs) -> None:
        self.statistics.update(self.gap(pairs))

    def gap(self, pairs: Pairs) -> Tensor:  # (B,)
        """The number whose z-score is Z."""
        policy, reference = _GAPS[self.implicit_reference]
        chosen, rejected = pairs.chosen_logps, pairs.rejected_logps
        if not policy:
            # A log-prob may be -inf, and 0 times that is NaN.
            chosen, rejected = torch.zeros_like(chosen), torch.zeros_like(rejected)
        chosen, rejected = policy * chosen, policy * rejected
        if reference:
            ref_chosen, ref_rejected = pairs.reference(self._name)
            chosen, rejected = chosen + reference * ref_chosen, rejected + reference * ref_rejected
        if self.length_normalized:
            n_chosen, n_rejected = pairs.lengths(self._name)
            chosen, rejected = chosen / n_chosen, rejected / n_rejected
        return chosen - rejected

    def margin(self, pairs: Pairs) -> Tensor:
        if not self.alpha:
            # Z may be infinite, and 0 times that is NaN.
            return torch.full_like(pairs.chosen_logps, self.fixed_margin)
        z = self.gap(pairs)
        if self.normalize:
            mean, spread = back(self.statistics.mean, z), back(self.statistics.spread(), z)
            z = (z - mean) / torch.where(spread > 0, spread, 1.0)
            z = torch.where(spread > 0, z, 0.0)
        if self.stop_gradient:
            z = z.detach()
        return self.fixed_margin + self._gap_scale * z

    def metrics(self, pairs: Pairs, result: PairLoss) -> dict[str, Tensor]:
        return {"alpha_dpo/margin": self.margin(pairs).detach()}

    def pair_kernel_options(self) -> dict[str, Any] | None:
        options = super().pair_kernel_options()
        assert options is not None
        statistics = None
        if self.normalize:
            statistics = self.statistics.mean, self.statistics.variance
        return {
            **options,
            "gap": _GAPS[self.implicit_reference],
            "gap_scale": self._gap_scale,
            "gap_statistics": statistics,
            "least_spread": LEAST_SPREAD,
            "gap_trains": not self.stop_gradient,
        }

    @property
    def _gap_scale(self) -> float:
        scale = self.beta if self.scale_by_beta else 1.0
        return self.alpha * scale
