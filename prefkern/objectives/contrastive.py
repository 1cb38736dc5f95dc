"""The contrastive objectives: a link of `delta`, AdaDPO's Eq. 8, for each of its Table 3's methods.

    delta = beta_chosen s_w - beta_rejected s_l - margin
    loss  = weight link(delta) - nll_weight L_w / n_w

A class declares what distinguishes it: the score s that a coefficient multiplies, the link, the
margin and the weight. The Triton pair kernel reads the same declarations (`pair_kernel_options`),
so that an objective of this form is one class here and one row of tests.

Letters: L a response's summed log-prob, R the reference's, rho = L - R, n its length in tokens,
P = exp(L/n) its probability per token, o = log P/(1 - P) its log-odds.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from prefkern.objectives.adaptive import MAX_LOG_RATIO, Adaptive
from prefkern.objectives.base import Objective, PairLoss, Pairs, weighed
from prefkern.objectives.checks import (
    require_below,
    require_bool,
    require_kind,
    require_not_negative,
    require_number,
    require_positive,
)

Score = Literal["log_ratio", "mean_log_ratio", "log_prob", "mean_log_prob", "log_odds"]
Link = Literal["logistic", "robust", "hinge", "square"]

# Log-odds are taken at P <= 1 - 1e-20, so that they and their slope 1 / (1 - P) stay finite.
LEAST_MISS = 1e-20
# IPO's delta is clamped to this, so that its square stays finite in float32.
MAX_SQUARED = 1e18


class Contrastive(Objective):
    """The common form. Subclasses declare the parts and check their own hyper-parameters."""

    score: Score = "log_ratio"
    link: ClassVar[Link] = "logistic"
    # The coefficient where there is no beta to tune (IPO).
    beta: float = 1.0
    label_smoothing: float = 0.0
    nll_weight: float = 0.0
    fixed_margin: float = 0.0
    length_penalty: float = 0.0

    @property
    def needs_reference(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        uses_ratio = self.adaptive is not None and self.adaptive.space == "ratio"
        return self._scores_ratios or uses_ratio

    def forward(self, pairs: Pairs) -> PairLoss:
        require_kind("pairs", pairs, Pairs)
        chosen, rejected = self.scores(pairs)
        beta_chosen, beta_rejected = self.coefficients(pairs)
        weighed_chosen = beta_chosen * chosen
        if self.adaptive is not None:
            weighed_chosen = weighed(beta_chosen, chosen)
        delta = weighed_chosen - beta_rejected * rejected - self.margin(pairs)
        losses = _linked(self.link, delta, self.label_smoothing)
        weight = self.weight(pairs)
        if weight is not None:
            losses = weight * losses
        if self.nll_weight:
            lengths, _ = pairs.lengths(f"{self._name}'s NLL term")
            losses = losses - self.nll_weight * (pairs.chosen_logps / lengths)
        return PairLoss(
            losses,
            beta_chosen,
            beta_rejected,
            weighed_chosen.detach(),
            (beta_rejected * rejected).detach(),
        )

    def scores(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """What the coefficients multiply, (B,) for each side."""
        chosen, rejected = pairs.chosen_logps, pairs.rejected_logps
        if self._scores_ratios:
            ref_chosen, ref_rejected = pairs.reference(self._name)
            chosen, rejected = chosen - ref_chosen, rejected - ref_rejected
        if self.score not in ("log_ratio", "log_prob"):
            n_chosen, n_rejected = pairs.lengths(self._name)
            chosen, rejected = chosen / n_chosen, rejected / n_rejected
        if self.score == "log_odds":
            # o = log P - log(1 - P)
            chosen, rejected = _below_one(chosen), _below_one(rejected)
            return chosen - log1mexp(chosen), rejected - log1mexp(rejected)
        return chosen, rejected

    @torch.no_grad()
    def coefficients(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """`beta_chosen` and `beta_rejected`, (B,) each, constants to autograd."""
        plain = torch.full_like(pairs.chosen_logps, self.beta)
        if self.adaptive is None:
            return plain, plain
        return self.beta * self.adaptive.coefficient(self.log_ratio(pairs, self.adaptive)), plain

    def log_ratio(self, pairs: Pairs, adaptive: Adaptive) -> Tensor:  # (B,)
        """`alpha_w x_w - alpha_l x_l` of Eq. 7."""
        chosen, rejected = pairs.chosen_logps, pairs.rejected_logps
        if adaptive.space == "ratio":
            ref_chosen, ref_rejected = pairs.reference("an adaptive coefficient in ratio space")
            chosen, rejected = chosen - ref_chosen, rejected - ref_rejected
        if adaptive.exponents is None:
            n_chosen, n_rejected = pairs.lengths('exponent="length"')
            return chosen / n_chosen - rejected / n_rejected
        # An exponent of 0 leaves a log-prob out even where it is -inf.
        terms = zip(adaptive.exponents, (chosen, rejected), strict=True)
        powers = [alpha * x if alpha else torch.zeros_like(x) for alpha, x in terms]
        return powers[0] - powers[1]

    def margin(self, pairs: Pairs) -> Tensor | float:
        """What is subtracted from delta: a number, or (B,), a constant to autograd."""
        if not self.length_penalty:
            return self.fixed_margin
        if pairs.chosen_lengths is None or pairs.rejected_lengths is None:
            raise ValueError(f"{self._name} needs chosen_lengths and rejected_lengths, got None")
        difference = (pairs.chosen_lengths - pairs.rejected_lengths).to(pairs.chosen_logps.dtype)
        return self.fixed_margin + self.length_penalty * difference

    def weight(self, pairs: Pairs) -> Tensor | None:
        """The factor of each pair's loss, (B,), a constant to autograd; None for 1."""
        return None

    def pair_kernel_options(self) -> dict[str, Any] | None:
        adaptive = self.adaptive
        if adaptive is None:
            # Exponents of 0 and no clip: the plain objective.
            adaptive = Adaptive(space="policy", exponent=0.0, clip=None)
        return {
            "score": self.score,
            "link": self.link,
            "beta": self.beta,
            "label_smoothing": self.label_smoothing,
            "margin": self.fixed_margin,
            "length_penalty": self.length_penalty,
            "nll_weight": self.nll_weight,
            "ratio_space": adaptive.space == "ratio",
            "exponents": adaptive.exponents,
            "counts_lengths": False,
            "clip": adaptive.clip,
            "k": adaptive.k,
            "max_log_ratio": MAX_LOG_RATIO,
            "least_miss": LEAST_MISS,
            "max_squared": MAX_SQUARED,
        }

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self._options)

    @property
    def _name(self) -> str:
        return type(self).__name__

    @property
    def _scores_ratios(self) -> bool:
        """Whether the score is of log-ratios to the reference, and not of the policy alone."""
        return self.score in ("log_ratio", "mean_log_ratio")

    def _set(self, **options: Any) -> None:
        """Keep checked hyper-parameters under their own names."""
        adaptive = options.get("adaptive")
        if not (adaptive is None or isinstance(adaptive, Adaptive)):
            raise TypeError(f"adaptive must be an Adaptive or None, got {adaptive!r}")
        self._options = tuple(options)
        for name, value in options.items():
            setattr(self, name, value)
        if adaptive is not None and not self._scores_ratios:
            self.adaptive = replace(adaptive, space="policy")


class DPO(Contrastive):
    """DPO (Rafailov et al. 2023, Eq. 7), and AdaDPO with `adaptive=Adaptive()` (Eq. 6, Listing 1).

    `-logsigmoid(beta_chosen rho_w - beta_rejected rho_l)`.

    Args:
        beta: strength of the pull to the reference, > 0.
        label_smoothing: probability that a preference is flipped (cDPO, Mitchell 2023), in [0, 0.5).
        adaptive: per-pair coefficients; None is plain DPO.
    """

    def __init__(
        self, beta: float = 0.1, label_smoothing: float = 0.0, adaptive: Adaptive | None = None
    ) -> None:
        super().__init__()
        self._set(
            beta=require_positive("beta", beta),
            label_smoothing=require_below("label_smoothing", label_smoothing, 0.5),
            adaptive=adaptive,
        )


class RobustDPO(Contrastive):
    """Robust DPO (Chowdhury et al. 2024): unbiased where labels are flipped at a known rate.

    `(-(1 - e) logsigmoid(delta) + e logsigmoid(-delta)) / (1 - 2e)`, delta as in DPO.

    Args:
        beta: as in DPO, > 0.
        label_smoothing: e, the rate at which preferences were flipped, in [0, 0.5).
        adaptive: per-pair coefficients.
    """

    link = "robust"

    def __init__(
        self, beta: float = 0.1, label_smoothing: float = 0.1, adaptive: Adaptive | None = None
    ) -> None:
        super().__init__()
        self._set(
            beta=require_positive("beta", beta),
            label_smoothing=require_below("label_smoothing", label_smoothing, 0.5),
            adaptive=adaptive,
        )


class Hinge(Contrastive):
    """Hinge loss on DPO's margin (SLiC, Zhao et al. 2023; RSO, Liu et al. 2024): `max(0, 1 - delta)`.

    Args:
        beta: as in DPO, > 0.
        adaptive: per-pair coefficients.
    """

    link = "hinge"

    def __init__(self, beta: float = 0.1, adaptive: Adaptive | None = None) -> None:
        super().__init__()
        self._set(beta=require_positive("beta", beta), adaptive=adaptive)


class IPO(Contrastive):
    """IPO (Azar et al. 2024, Eq. 17): `(b_w rho_w - b_l rho_l - 1 / (2 tau))^2`, b = 1 when plain.

    Args:
        tau: strength of the regularisation, > 0 (TRL calls it beta).
        length_normalized: rho / n in place of rho, as TRL does.
        adaptive: per-pair coefficients b.
    """

    link = "square"
    tau: float
    length_normalized: bool

    def __init__(
        self,
        tau: float = 0.1,
        length_normalized: bool = False,
        adaptive: Adaptive | None = None,
    ) -> None:
        super().__init__()
        self._set(
            tau=require_positive("tau", tau),
            length_normalized=require_bool("length_normalized", length_normalized),
            adaptive=adaptive,
        )

    @property
    def score(self) -> Score:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "mean_log_ratio" if self.length_normalized else "log_ratio"

    @property
    def fixed_margin(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        return 1 / (2 * self.tau)


class RDPO(Contrastive):
    """R-DPO (Park et al. 2024): DPO with a term of the lengths, `delta - alpha (n_w - n_l)`.

    The sign is that of AdaDPO's Table 3. Park et al. write `delta + a (n_w - n_l)`, from a reward
    that loses a with each token: `alpha = -a` here.

    Args:
        beta: as in DPO, > 0.
        alpha: margin for each token by which the chosen response is longer, any number.
        adaptive: per-pair coefficients.
    """

    alpha: float

    def __init__(
        self, beta: float = 0.1, alpha: float = -0.05, adaptive: Adaptive | None = None
    ) -> None:
        super().__init__()
        self._set(
            beta=require_positive("beta", beta),
            alpha=require_number("alpha", alpha),
            adaptive=adaptive,
        )

    @property
    def length_penalty(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.alpha


class CPO(Contrastive):
    """CPO (Xu et al. 2024; AdaDPO, Table 3): `-logsigmoid(b_w L_w - b_l L_l) - nll_weight L_w / n_w`.

    Args:
        beta: scale of the log-probs, > 0.
        nll_weight: weight of the chosen response's NLL per token, >= 0.
        adaptive: per-pair coefficients, in policy space.
    """

    score = "log_prob"

    def __init__(
        self, beta: float = 0.1, nll_weight: float = 1.0, adaptive: Adaptive | None = None
    ) -> None:
        super().__init__()
        self._set(
            beta=require_positive("beta", beta),
            nll_weight=require_not_negative("nll_weight", nll_weight),
            adaptive=adaptive,
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

    score = "log_odds"

    def __init__(
        self, beta: float = 0.1, nll_weight: float = 1.0, adaptive: Adaptive | None = None
    ) -> None:
        super().__init__()
        self._set(
            beta=require_positive("beta", beta),
            nll_weight=require_not_negative("nll_weight", nll_weight),
            adaptive=adaptive,
        )

    def log_ratio(self, pairs: Pairs, adaptive: Adaptive) -> Tensor:
        # A balance on P has to cancel d o / d P = 1 / (P (1 - P)).
        n_chosen, n_rejected = pairs.lengths(self._name)
        chosen = _below_one(pairs.chosen_logps / n_chosen)
        rejected = _below_one(pairs.rejected_logps / n_rejected)
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
    """

    score = "mean_log_prob"
    gamma: float

    def __init__(
        self, beta: float = 2.0, gamma: float = 1.0, adaptive: Adaptive | None = None
    ) -> None:
        super().__init__()
        self._set(
            beta=require_positive("beta", beta),
            gamma=require_number("gamma", gamma),
            adaptive=adaptive,
        )

    @property
    def fixed_margin(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.gamma

    def log_ratio(self, pairs: Pairs, adaptive: Adaptive) -> Tensor:
        log_ratio = super().log_ratio(pairs, adaptive)
        if adaptive.exponents == (0.0, 0.0):
            return log_ratio
        n_chosen, n_rejected = pairs.lengths(self._name)
        counts = n_chosen.to(log_ratio.dtype).log() - n_rejected.to(log_ratio.dtype).log()
        return log_ratio + counts

    def pair_kernel_options(self) -> dict[str, Any] | None:
        options = super().pair_kernel_options()
        assert options is not None
        counts = self.adaptive is not None and self.adaptive.exponents != (0.0, 0.0)
        return {**options, "counts_lengths": counts}


def log1mexp(x: Tensor) -> Tensor:
    """`log(1 - exp(x))` for x < 0, without cancellation at either end (Maechler 2012)."""
    is_small = x > -math.log(2)
    # Each branch gets only arguments that suit it: a NaN in the other one would reach autograd.
    near = torch.where(is_small, x, -1.0)
    far = torch.where(is_small, -1.0, x)
    return torch.where(is_small, (-torch.expm1(near)).log(), torch.log1p(-far.exp()))


def _below_one(log_probability: Tensor) -> Tensor:
    return log_probability.clamp(max=-LEAST_MISS)


def _linked(link: Link, delta: Tensor, label_smoothing: float) -> Tensor:
    if link == "hinge":
        return F.relu(1 - delta)
    if link == "square":
        return delta.clamp(-MAX_SQUARED, MAX_SQUARED).square()
    losses = -F.logsigmoid(delta)
    if not label_smoothing:
        return losses
    flipped = -F.logsigmoid(-delta)
    if link == "robust":
        kept = 1 - label_smoothing
        return (kept * losses - label_smoothing * flipped) / (1 - 2 * label_smoothing)
    # Not `losses + label_smoothing (flipped - losses)`: where delta overflows, that is inf - inf.
    return (1 - label_smoothing) * losses + label_smoothing * flipped
