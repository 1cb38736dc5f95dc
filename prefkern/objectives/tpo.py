"""TPO (Saeidi et al. 2024): a pair's loss without a reference, and the NLL of a gold response.

    link(b_w s_w - b_l s_l - margin) - tpo_alpha L_g / n_g

L_g and n_g are of a third response to the same prompt, the gold one. The pair's part is of the
contrastive form, and the pair kernel computes it; the gold part is added in torch on every backend.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from prefkern.objectives import citations
from prefkern.objectives.adaptive import Adaptive
from prefkern.objectives.base import PairLoss, Pairs
from prefkern.objectives.checks import (
    require_below,
    require_bool,
    require_not_negative,
    require_number,
    require_one_of,
    require_positive,
)
from prefkern.objectives.contrastive import Contrastive
from prefkern.objectives.links import Link
from prefkern.objectives.scores import Score

TPOLoss = Literal["sigmoid", "hinge", "ipo", "tpo-l"]


class TPO(Contrastive):
    """TPO, with the four losses of TRL's `TPOConfig`.

    | loss_type | the pair's part |
    |---|---|
    | "sigmoid" | -logsigmoid(b_w L_w - b_l L_l) |
    | "hinge" | max(0, 1 - (b_w L_w - b_l L_l)) |
    | "ipo" | (b_w L_w / n_w - b_l L_l / n_l - 1 / (2 beta))^2, b = 1 when plain |
    | "tpo-l" | -logsigmoid(b_w L_w / n_w - b_l L_l / n_l - tpo_l_gamma) |

    Args:
        beta: scale of the log-probs, > 0; of "ipo" its tau.
        loss_type: the pair's part.
        label_smoothing: probability that a preference is flipped, in [0, 0.5), of "sigmoid" and
            "tpo-l".
        tpo_alpha: weight of the gold response's NLL per token, >= 0. At 0 no third response is
            needed.
        tpo_l_gamma: target margin of "tpo-l", any number; None: 0.5.
        token_mean: the mean of the NLL over the gold tokens of the batch at hand, as in TRL, in
            place of the mean over pairs of each response's mean.
        adaptive: per-pair coefficients, in policy space.
    """

    papers = (citations.TPO,)

    loss_type: TPOLoss
    tpo_alpha: float
    tpo_l_gamma: float | None
    token_mean: bool
    # beta under the name that it has in IPO, whose coefficient is 1.
    tau: float

    def __init__(
        self,
        beta: float = 0.01,
        loss_type: TPOLoss = "sigmoid",
        label_smoothing: float = 0.0,
        tpo_alpha: float = 1.0,
        tpo_l_gamma: float | None = None,
        token_mean: bool = False,
        adaptive: Adaptive | None = None,
    ) -> None:
        super().__init__()
        require_one_of("loss_type", loss_type, get_args(TPOLoss))
        beta = require_positive("beta", beta)
        if loss_type == "tpo-l":
            gamma = 0.5 if tpo_l_gamma is None else tpo_l_gamma
            tpo_l_gamma = require_number("tpo_l_gamma", gamma)
        elif tpo_l_gamma is not None:
            raise ValueError(
                f"tpo_l_gamma is of loss_type='tpo-l', got {tpo_l_gamma!r} with {loss_type!r}"
            )
        self.set_options(
            **{"tau" if loss_type == "ipo" else "beta": beta},
            loss_type=loss_type,
            label_smoothing=require_below("label_smoothing", label_smoothing, 0.5),
            tpo_alpha=require_not_negative("tpo_alpha", tpo_alpha),
            tpo_l_gamma=tpo_l_gamma,
            token_mean=require_bool("token_mean", token_mean),
            adaptive=adaptive,
        )

    @property
    def needs_gold(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.tpo_alpha > 0

    @property
    def score(self) -> Score:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "mean_log_prob" if self.counts_lengths else "log_prob"

    @property
    def counts_lengths(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.loss_type in ("ipo", "tpo-l")

    @property
    def link(self) -> Link:  # pyright: ignore[reportIncompatibleVariableOverride]
        others: dict[str, Link] = {"hinge": "hinge", "ipo": "square"}
        return others.get(self.loss_type, "logistic")

    @property
    def fixed_margin(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        return 1 / (2 * self.tau) if self.loss_type == "ipo" else self.tpo_l_gamma or 0.0

    def forward(self, pairs: Pairs) -> PairLoss:
        result = super().forward(pairs)
        gold = self.gold_terms(pairs)
        return result if gold is None else result.with_losses(result.losses + gold)

    def gold_terms(self, pairs: Pairs) -> Tensor | None:
        if not self.needs_gold:
            return None
        logps, lengths = pairs.gold(self._name)
        if self.token_mean:
            # The mean over pairs divides by their number.
            means = logps * len(logps) / lengths.sum().clamp(min=1)
        else:
            means = logps / lengths.clamp(min=1)
        return -self.tpo_alpha * means
