"""The contrastive objectives: AdaDPO's Eq. 8 for each of its Table 3's methods, and their kin.

    a = beta_chosen s_w,   b = beta_rejected s_l,   delta = a - b - margin
    loss = weight link(delta) - nll_weight L_w / n_w          some links read a and b instead

A class declares what distinguishes it: the score s that a coefficient multiplies (`scores`), the
link (`links`), the margin and the weight. The Triton pair kernel reads the same declarations
(`pair_kernel_options`), so that an objective of this form is one class and one row of tests.

Here are the form and the methods of a log-ratio's difference; `two_sided` has those whose link
reads both sides, `reference_free` those without a reference.

Letters: L a response's summed log-prob, R the reference's, rho = L - R, n its length in tokens,
P = exp(L/n) its probability per token, o = log P/(1 - P) its log-odds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from prefkern.objectives import citations
from prefkern.objectives.adaptive import MAX_LOG_RATIO, Adaptive
from prefkern.objectives.base import Objective, PairLoss, Pairs, weighed
from prefkern.objectives.checks import (
    require_below,
    require_between,
    require_bool,
    require_kind,
    require_number,
    require_one_of,
    require_positive,
)
from prefkern.objectives.links import (
    LINKS_WITH_A_SHAPE,
    LINKS_WITH_SMOOTHING,
    LINKS_WITHOUT_A_MARGIN,
    MAX_SQUARED,
    Link,
    linked,
    product,
)
from prefkern.objectives.scores import (
    LEAST_MISS,
    Divergence,
    Score,
    derivative,
    divergence_options,
    log_odds,
    ratio_score,
)


class Contrastive(Objective):
    """The common form. Subclasses declare the parts and check their own hyper-parameters."""

    score: Score = "log_ratio"
    link: ClassVar[Link] = "logistic"
    # Whether Eq. 7's ratio is one of n P: the slope of a mean log-prob is 1 / n.
    counts_lengths: ClassVar[bool] = False
    # The coefficient where there is no beta to tune (IPO).
    beta: float = 1.0
    label_smoothing: float = 0.0
    nll_weight: float = 0.0
    fixed_margin: float = 0.0
    length_penalty: float = 0.0
    f_divergence_type: Divergence = "reverse_kl"
    f_alpha_divergence_coef: float | None = None
    _options: tuple[str, ...] = ()

    @property
    def needs_reference(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        uses_ratio = self.adaptive is not None and self.adaptive.space == "ratio"
        return self._scores_ratios or uses_ratio

    @property
    def shape(self) -> float:
        """The link's own number: see `links`."""
        return self.label_smoothing

    def forward(self, pairs: Pairs) -> PairLoss:
        require_kind("pairs", pairs, Pairs)
        chosen, rejected = self.scores(pairs)
        beta_chosen, beta_rejected = self.coefficients(pairs)
        weighed_chosen = beta_chosen * chosen
        if self.adaptive is not None:
            weighed_chosen = weighed(beta_chosen, chosen)
        weighed_rejected = beta_rejected * rejected
        delta = weighed_chosen - weighed_rejected - self.margin(pairs)
        losses = linked(self.link, delta, self.shape, (weighed_chosen, weighed_rejected))
        weight = self.weight(pairs)
        if weight is not None:
            losses = product(weight, losses) if weight.requires_grad else weight * losses
        if self.nll_weight:
            losses = losses + self.nll(pairs)
        return PairLoss(
            losses, beta_chosen, beta_rejected, weighed_chosen.detach(), weighed_rejected.detach()
        )

    def scores(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """What the coefficients multiply, (B,) for each side."""
        chosen, rejected = pairs.chosen_logps, pairs.rejected_logps
        if self._scores_ratios:
            ref_chosen, ref_rejected = pairs.reference(self._name)
            chosen, rejected = chosen - ref_chosen, rejected - ref_rejected
            form, power = derivative(self.f_divergence_type, self.f_alpha_divergence_coef)
            chosen, rejected = (ratio_score(rho, form, power) for rho in (chosen, rejected))
        if self.score not in ("log_ratio", "log_prob"):
            n_chosen, n_rejected = pairs.lengths(self._name)
            chosen, rejected = chosen / n_chosen, rejected / n_rejected
        if self.score == "log_odds":
            return log_odds(chosen), log_odds(rejected)
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
            powers = [chosen / n_chosen, rejected / n_rejected]
        else:
            # An exponent of 0 leaves a log-prob out even where it is -inf.
            terms = zip(adaptive.exponents, (chosen, rejected), strict=True)
            powers = [alpha * x if alpha else torch.zeros_like(x) for alpha, x in terms]
        log_ratio = powers[0] - powers[1]
        if not self._counts_lengths:
            return log_ratio
        n_chosen, n_rejected = (n.to(log_ratio.dtype) for n in pairs.lengths(self._name))
        return log_ratio + (n_chosen.log() - n_rejected.log())

    def citations(self) -> tuple[citations.Paper, ...]:
        papers = super().citations()
        is_plain = self.f_divergence_type == "reverse_kl"
        return papers if is_plain else citations.without_repeats([*papers, citations.F_DPO])

    def margin(self, pairs: Pairs) -> Tensor | float:
        """What is subtracted from delta: a number, or (B,)."""
        if not self.length_penalty:
            return self.fixed_margin
        if pairs.chosen_lengths is None or pairs.rejected_lengths is None:
            raise ValueError(f"{self._name} needs chosen_lengths and rejected_lengths, got None")
        difference = (pairs.chosen_lengths - pairs.rejected_lengths).to(pairs.chosen_logps.dtype)
        return self.fixed_margin + self.length_penalty * difference

    def weight(self, pairs: Pairs) -> Tensor | None:
        """The factor of each pair's loss, (B,); None for 1."""
        return None

    def nll(self, pairs: Pairs) -> Tensor:  # (B,)
        """The chosen response's negative log-likelihood per token, times its weight."""
        lengths, _ = pairs.lengths(f"{self._name}'s NLL term")
        return -self.nll_weight * (pairs.whole()[0] / lengths)

    def pair_kernel_options(self) -> dict[str, Any] | None:
        adaptive = self.adaptive
        if adaptive is None:
            # Exponents of 0 and no clip: the plain objective.
            adaptive = Adaptive(space="policy", exponent=0.0, clip=None)
        form, power = derivative(self.f_divergence_type, self.f_alpha_divergence_coef)
        return {
            "score": self.score,
            "divergence": form,
            "divergence_power": power,
            "link": self.link,
            "shape": self.shape,
            "beta": self.beta,
            "margin": self.fixed_margin,
            "length_penalty": self.length_penalty,
            "nll_weight": self.nll_weight,
            "ratio_space": adaptive.space == "ratio",
            "exponents": adaptive.exponents,
            "counts_lengths": self._counts_lengths,
            "clip": adaptive.clip,
            "k": adaptive.k,
            "max_log_ratio": MAX_LOG_RATIO,
            "least_miss": LEAST_MISS,
            "max_squared": MAX_SQUARED,
        }

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self._options)

    def set_options(self, **options: Any) -> None:
        """Keep hyper-parameters under their own names: attributes, and what `repr` shows.

        `adaptive` must be an Adaptive or None; without a reference its space is the policy's.
        """
        adaptive = options.get("adaptive")
        if not (adaptive is None or isinstance(adaptive, Adaptive)):
            raise TypeError(f"adaptive must be an Adaptive or None, got {adaptive!r}")
        self._options = tuple(options)
        for name, value in options.items():
            setattr(self, name, value)
        self._check_declarations()
        if adaptive is not None and not self._scores_ratios:
            self.adaptive = replace(adaptive, space="policy")

    def _check_declarations(self) -> None:
        """What a class declares: a score or link of another name would be taken for one of ours."""
        require_one_of("score", self.score, get_args(Score))
        require_one_of("link", self.link, get_args(Link))
        if self.link in LINKS_WITH_A_SHAPE:
            require_positive(f"shape of the link {self.link!r}", self.shape)
        if self.link in LINKS_WITHOUT_A_MARGIN and (self.fixed_margin or self.length_penalty):
            raise ValueError(
                f"the link {self.link!r} reads no margin, got fixed_margin {self.fixed_margin!r} "
                f"and length_penalty {self.length_penalty!r}; leave them 0"
            )
        if self.link not in LINKS_WITH_SMOOTHING and self.label_smoothing:
            raise ValueError(
                f"the link {self.link!r} has no label smoothing, got label_smoothing "
                f"{self.label_smoothing!r}; leave it 0"
            )

    @property
    def _name(self) -> str:
        return type(self).__name__

    @property
    def _scores_ratios(self) -> bool:
        """Whether the score is of log-ratios to the reference, and not of the policy alone."""
        return self.score in ("log_ratio", "mean_log_ratio")

    @property
    def _counts_lengths(self) -> bool:
        """Whether lengths enter the ratio: exponents of 0 leave the plain objective."""
        if self.adaptive is None or not self.counts_lengths:
            return False
        return self.adaptive.exponents != (0.0, 0.0)


class DPO(Contrastive):
    """DPO (Rafailov et al. 2023, Eq. 7), and AdaDPO with `adaptive=Adaptive()` (Eq. 6, Listing 1).

    `-logsigmoid(beta_chosen rho_w - beta_rejected rho_l)`.

    Args:
        beta: strength of the pull to the reference, > 0.
        label_smoothing: probability that a preference is flipped (cDPO, Mitchell 2023), in [0, 0.5).
        adaptive: per-pair coefficients; None is plain DPO.
        f_divergence_type, f_alpha_divergence_coef: the divergence from the reference: see `scores`.
    """

    papers = (citations.DPO,)

    def __init__(
        self,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        adaptive: Adaptive | None = None,
        f_divergence_type: Divergence = "reverse_kl",
        f_alpha_divergence_coef: float | None = None,
    ) -> None:
        super().__init__()
        self.set_options(
            beta=require_positive("beta", beta),
            label_smoothing=require_below("label_smoothing", label_smoothing, 0.5),
            adaptive=adaptive,
            **divergence_options(f_divergence_type, f_alpha_divergence_coef),
        )


class _OfLogRatios(Contrastive):
    """What LNDPO and Hinge have in common: a beta and a divergence, and nothing else."""

    def __init__(
        self,
        beta: float = 0.1,
        adaptive: Adaptive | None = None,
        f_divergence_type: Divergence = "reverse_kl",
        f_alpha_divergence_coef: float | None = None,
    ) -> None:
        super().__init__()
        self.set_options(
            beta=require_positive("beta", beta),
            adaptive=adaptive,
            **divergence_options(f_divergence_type, f_alpha_divergence_coef),
        )


class LNDPO(_OfLogRatios):
    """Length-normalised DPO (Lambert et al. 2024, Tulu 3): DPO on log-ratios per token.

    `-logsigmoid(b_w rho_w / n_w - b_l rho_l / n_l)`. As in SimPO, the adaptive ratio counts tokens,
    `n_w / n_l` times that of DPO.

    Args:
        beta: scale of the log-ratios per token, > 0.
        adaptive: per-pair coefficients.
        f_divergence_type, f_alpha_divergence_coef: the divergence from the reference: see `scores`.
    """

    papers = (citations.TULU3, citations.DPO)
    score = "mean_log_ratio"
    counts_lengths = True


class RobustDPO(Contrastive):
    """Robust DPO (Chowdhury et al. 2024): unbiased where labels are flipped at a known rate.

    `(-(1 - e) logsigmoid(delta) + e logsigmoid(-delta)) / (1 - 2e)`, delta as in DPO.

    Args:
        beta: as in DPO, > 0.
        label_smoothing: e, the rate at which preferences were flipped, in [0, 0.5).
        adaptive: per-pair coefficients.
        f_divergence_type, f_alpha_divergence_coef: the divergence from the reference: see `scores`.
    """

    papers = (citations.ROBUST_DPO,)
    link = "robust"

    def __init__(
        self,
        beta: float = 0.1,
        label_smoothing: float = 0.1,
        adaptive: Adaptive | None = None,
        f_divergence_type: Divergence = "reverse_kl",
        f_alpha_divergence_coef: float | None = None,
    ) -> None:
        super().__init__()
        self.set_options(
            beta=require_positive("beta", beta),
            label_smoothing=require_below("label_smoothing", label_smoothing, 0.5),
            adaptive=adaptive,
            **divergence_options(f_divergence_type, f_alpha_divergence_coef),
        )


class Hinge(_OfLogRatios):
    """Hinge loss on DPO's margin (SLiC, Zhao et al. 2023; RSO, Liu et al. 2024): `max(0, 1 - delta)`.

    Args:
        beta: as in DPO, > 0.
        adaptive: per-pair coefficients.
        f_divergence_type, f_alpha_divergence_coef: the divergence from the reference: see `scores`.
    """

    papers = (citations.SLIC, citations.RSO)
    link = "hinge"


class IPO(Contrastive):
    """IPO (Azar et al. 2024, Eq. 17): `(b_w rho_w - b_l rho_l - 1 / (2 tau))^2`, b = 1 when plain.

    Args:
        tau: strength of the regularisation, > 0 (TRL calls it beta).
        length_normalized: rho / n in place of rho, as TRL does.
        adaptive: per-pair coefficients b.
        f_divergence_type, f_alpha_divergence_coef: the divergence from the reference: see `scores`.
    """

    papers = (citations.IPO,)
    link = "square"
    tau: float
    length_normalized: bool

    def __init__(
        self,
        tau: float = 0.1,
        length_normalized: bool = False,
        adaptive: Adaptive | None = None,
        f_divergence_type: Divergence = "reverse_kl",
        f_alpha_divergence_coef: float | None = None,
    ) -> None:
        super().__init__()
        self.set_options(
            tau=require_positive("tau", tau),
            length_normalized=require_bool("length_normalized", length_normalized),
            adaptive=adaptive,
            **divergence_options(f_divergence_type, f_alpha_divergence_coef),
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

    papers = (citations.RDPO,)
    alpha: float

    def __init__(
        self, beta: float = 0.1, alpha: float = -0.05, adaptive: Adaptive | None = None
    ) -> None:
        super().__init__()
        self.set_options(
            beta=require_positive("beta", beta),
            alpha=require_number("alpha", alpha),
            adaptive=adaptive,
        )

    @property
    def length_penalty(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.alpha


class EXO(Contrastive):
    """EXO on pairs (Ji et al. 2024, Eq. 16): the reverse KL between policy and preference.

    `KL(q || p)`, q = (sigmoid(delta), sigmoid(-delta)) and p = (1 - e, e), delta as in DPO.

    Args:
        beta: as in DPO, > 0.
        label_smoothing: e, the preference's probability of the rejected response, in (0, 0.5).
        adaptive: per-pair coefficients.
        f_divergence_type, f_alpha_divergence_coef: the divergence from the reference: see `scores`.
    """

    papers = (citations.EXO,)
    link = "exo"

    def __init__(
        self,
        beta: float = 0.1,
        label_smoothing: float = 1e-3,
        adaptive: Adaptive | None = None,
        f_divergence_type: Divergence = "reverse_kl",
        f_alpha_divergence_coef: float | None = None,
    ) -> None:
        super().__init__()
        self.set_options(
            beta=require_positive("beta", beta),
            label_smoothing=require_between("label_smoothing", label_smoothing, 0.5),
            adaptive=adaptive,
            **divergence_options(f_divergence_type, f_alpha_divergence_coef),
        )


class DiscoPOP(Contrastive):
    """DiscoPOP (Lu et al. 2024, Eq. 5): a mixture of the logistic and the exponential loss.

    `-(1 - m) logsigmoid(delta) + m exp(-delta)`, m = sigmoid(delta / tau), delta as in DPO.

    Args:
        beta: as in DPO, > 0.
        tau: temperature of the mixture, > 0 (TRL and Liger call it discopop_tau).
        adaptive: per-pair coefficients.
        f_divergence_type, f_alpha_divergence_coef: the divergence from the reference: see `scores`.
    """

    papers = (citations.DISCOPOP,)
    link = "discopop"
    tau: float

    def __init__(
        self,
        beta: float = 0.1,
        tau: float = 0.05,
        adaptive: Adaptive | None = None,
        f_divergence_type: Divergence = "reverse_kl",
        f_alpha_divergence_coef: float | None = None,
    ) -> None:
        super().__init__()
        self.set_options(
            beta=require_positive("beta", beta),
            tau=require_positive("tau", tau),
            adaptive=adaptive,
            **divergence_options(f_divergence_type, f_alpha_divergence_coef),
        )

    @property
    def shape(self) -> float:
        return self.tau
