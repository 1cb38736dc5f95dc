"""Contrastive objectives whose link reads both sides: NCA, SPPO and the two APO.

With a = b_w rho_w and b = b_l rho_l, their losses are not functions of a - b: they say where each
response's reward should be, not only how far apart. An adaptive coefficient multiplies the chosen
score as in AdaDPO's Eq. 8. But the two slopes of such a link differ, so that the gradients are
balanced only as far as these are equal.
"""

from __future__ import annotations

from prefkern.objectives import citations
from prefkern.objectives.adaptive import Adaptive
from prefkern.objectives.checks import require_positive
from prefkern.objectives.contrastive import Contrastive


class _TwoSided(Contrastive):
    """What they have in common: a beta, and nothing else."""

    def __init__(self, beta: float = 0.1, adaptive: Adaptive | None = None) -> None:
        super().__init__()
        self.set_options(beta=require_positive("beta", beta), adaptive=adaptive)


class NCA(_TwoSided):
    """NCA on pairs (Chen et al. 2024): raises the chosen reward and keeps both near 0.

    `-logsigmoid(a) - logsigmoid(-a) / 2 - logsigmoid(-b) / 2`, a = b_w rho_w, b = b_l rho_l.

    Args:
        beta: as in DPO, > 0.
        adaptive: per-pair coefficients.
    """

    papers = (citations.NCA,)
    link = "nca"


class SPPO(_TwoSided):
    """SPPO with hard labels (Wu et al. 2024, Eq. 4.7): log-ratios of `1 / (2 beta)` and its negative.

    `((a - 1/2)^2 + (b + 1/2)^2) / beta^2`, a = b_w rho_w, b = b_l rho_l: the paper's eta is
    1 / beta, and the probability that the chosen response wins is 1.

    Args:
        beta: 1 / eta, > 0.
        adaptive: per-pair coefficients.
    """

    papers = (citations.SPPO,)
    link = "squares"

    @property
    def shape(self) -> float:
        return self.beta


class APOZero(_TwoSided):
    """APO-zero (D'Oosterlinck et al. 2024, Eq. 7): the chosen reward up, the rejected one down.

    `sigmoid(-a) + sigmoid(b)`, a = b_w rho_w, b = b_l rho_l: for chosen responses that are better
    than the model's own.

    Args:
        beta: as in DPO, > 0.
        adaptive: per-pair coefficients.
    """

    papers = (citations.APO,)
    link = "apo_zero"


class APODown(_TwoSided):
    """APO-down (D'Oosterlinck et al. 2024, Eq. 8): both rewards down, the rejected one further.

    `sigmoid(a) + sigmoid(b - a)`, a = b_w rho_w, b = b_l rho_l: for chosen responses that are worse
    than the model's own.

    Args:
        beta: as in DPO, > 0.
        adaptive: per-pair coefficients.
    """

    papers = (citations.APO,)
    link = "apo_down"
