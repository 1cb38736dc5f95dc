"""Contrastive objectives without a reference: CPO, ORPO, SimPO; and SFT, which compares nothing.

Their adaptive coefficients are in policy space: there is no ratio to a reference.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from prefkern.objectives import citations
from prefkern.objectives.adaptive import Adaptive
from prefkern.objectives.base import Pairs
from prefkern.objectives.checks import (
    require_below,
    require_bool,
    require_not_negative,
    require_number,
    require_positive,
)
from prefkern.objectives.contrastive import Contrastive
from prefkern.objectives.scores import below_one, log1mexp


class CPO(Contrastive):
    """CPO (Xu et al. 2024; AdaDPO, Table 3): `-logsigmoid(b_w L_w - b_l L_l) - nll_weight L_w / n_w`.

    Args:
        beta: scale of the log-probs, > 0.
        nll_weight: weight of the chosen response's NLL per token, >= 0.
        adaptive: per-pair coefficients, in policy space.
        label_smoothing: probability that a preference is flipped, in [0, 0.5), as in Liger.
    """

    papers = (citations.CPO,)
    score = "log_prob"

    def __init__(
        self,
        beta: float = 0.1,
        nll_weight: float = 1.0,
        adaptive: Adaptive | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.set_options(
            beta=require_positive("beta", beta),
            nll_weight=require_not_negative("nll_weight", nll_weight),
            adaptive=adaptive,
            label_smoothing=require_below("label_smoothing", label_smoothing, 0.5),
        )


class ORPO(Contrastive):
    """ORPO (Hong et al. 2024; AdaDPO's Table 3 puts beta inside the sigmoid).

    `-nll_weight log P_w - logsigmoid(b_w o_w - b_l o_l)`. The adaptive ratio is
    `P_w (1 - P_w) / (P_l (1 - P_l))` to the exponent; P is a probability per token already, so
    exponents "length" and 1 are the same.

    Args:
        beta: scale of the log-odds, > 0.
        nll_weight: weight of the chosen response's NLL per token, >= 0.
        adaptive: per-pair coefficients, in policy space.
    """

    papers = (citations.ORPO,)
    score = "log_odds"

    def __init__(
        self, beta: float = 0.1, nll_weight: float = 1.0, adaptive: Adaptive | None = None
    ) -> None:
        super().__init__()
        self.set_options(
            beta=require_positive("beta", beta),
            nll_weight=require_not_negative("nll_weight", nll_weight),
            adaptive=adaptive,
        )

    def log_ratio(self, pairs: Pairs, adaptive: Adaptive) -> Tensor:
        # A balance on P has to cancel d o / d P = 1 / (P (1 - P)).
        n_chosen, n_rejected = pairs.lengths(self._name)
        chosen = below_one(pairs.chosen_logps / n_chosen)
        rejected = below_one(pairs.rejected_logps / n_rejected)
        alpha_chosen, alpha_rejected = adaptive.exponents or (1.0, 1.0)
        return alpha_chosen * (chosen + log1mexp(chosen)) - alpha_rejected * (
            rejected + log1mexp(rejected)
        )


class SimPO(Contrastive):
    """SimPO (Meng et al. 2024; alpha-DPO, Eq. 5): `-logsigmoid(b_w L_w / n_w - b_l L_l / n_l - gamma)`.

    Adaptive: `n_w exp(alpha_w L_w) / (n_l exp(alpha_l L_l))` (Table 3). With exponents of 0 on both
    sides the lengths drop out too: plain SimPO.

    Args:
        beta: scale of the log-probs per token, > 0.
        gamma: target margin, any number (the SimPO paper's gamma, not gamma / beta).
        adaptive: per-pair coefficients, in policy space.
        label_smoothing: probability that a preference is flipped, in [0, 0.5), as in Liger.
    """

    papers = (citations.SIMPO,)
    score = "mean_log_prob"
    counts_lengths = True
    gamma: float

    def __init__(
        self,
        beta: float = 2.0,
        gamma: float = 1.0,
        adaptive: Adaptive | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.set_options(
            beta=require_positive("beta", beta),
            gamma=require_number("gamma", gamma),
            adaptive=adaptive,
            label_smoothing=require_below("label_smoothing", label_smoothing, 0.5),
        )

    @property
    def fixed_margin(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.gamma


class SFT(Contrastive):
    """Supervised training on the chosen responses alone: `-L_w / n_w`.

    Args:
        token_mean: the mean over the chosen tokens of the batch at hand, as TRL's `sft` has it, in
            place of the mean over pairs of each response's mean.
    """

    papers = (citations.TRL,)
    score = "log_prob"
    link = "none"
    nll_weight = 1.0
    token_mean: bool

    def __init__(self, token_mean: bool = False) -> None:
        super().__init__()
        self.set_options(token_mean=require_bool("token_mean", token_mean))

    def nll(self, pairs: Pairs) -> Tensor:
        if not self.token_mean:
            return super().nll(pairs)
        pairs.lengths(self._name)
        assert pairs.chosen_lengths is not None
        # The mean over pairs divides by their number.
        tokens = pairs.chosen_lengths.sum().clamp(min=1)
        return -pairs.whole()[0] * len(pairs.chosen_logps) / tokens

    def pair_kernel_options(self) -> dict[str, Any] | None:
        # A pair's share depends on the others' lengths.
        return None if self.token_mean else super().pair_kernel_options()
