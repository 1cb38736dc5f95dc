"""Preference objectives in textbook form, one pair at a time: the oracles of the vectorised ones.

Each objective follows its paper: AdaDPO (Eq. 7, Table 3), alpha-DPO (Eq. 8-12), MADPO (Eq. 4, 5),
beta-DPO, IPO, R-DPO, CPO, ORPO, SimPO, robust DPO (arXiv 2403.00409), EXO (2402.00856, Eq. 16),
DiscoPOP (2406.08414, Eq. 5), NCA (2402.05369), SPPO (2405.00675, Eq. 4.7), APO (2408.06266, Eq. 7,
8), f-DPO (2309.16240), Omni-DPO (2506.10054), TPO (2405.16681, as in TRL), TDPO (2404.11999), KTO (2402.01306), BCO (2404.04656),
AOT (2406.05882) and WPO (2406.11827). Nothing here uses tensors, batches or autograd.

Numbers are decimals with at least 150 digits, so that formulas can be used as printed. 1 - P keeps
its digits at P = 1 - 1e-12, and exp(1e4) does not overflow. A central difference with a step of
1e-40 gives every digit of a double's derivative, also for the smallest doubles. `coefficients`
returns the terms that a paper puts under a stop-gradient. `loss` takes them as constants, and
`value_and_gradient` keeps them constant while it changes L_w and L_l.
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Callable, Iterable
from decimal import Decimal
from typing import NamedTuple

DIGITS = 150
STEP = Decimal("1e-40")


class Pair(NamedTuple):
    """Sequence log-probabilities L (policy) and R (reference), lengths n, of chosen and rejected."""

    L_w: float
    L_l: float
    R_w: float = 0.0
    R_l: float = 0.0
    n_w: float = 1
    n_l: float = 1
    # TDPO: KL(reference || policy), summed over the positions of each sequence.
    K_w: float = 0.0
    K_l: float = 0.0
    # MADPO: the reward model's margin.
    h: float = 0.0
    # TPO: log-probability and length of the gold response.
    L_g: float = 0.0
    n_g: float = 1


class Adaptive(NamedTuple):
    space: str = "ratio"  # or "policy"
    exponent: str | float | tuple[float, float] = "length"
    clip: float | None = 2.0
    k: float = 1.0


class Coefficients(NamedTuple):
    """The terms without gradient; the loss is `weight` f(beta_w x_w - beta_l x_l - offset)."""

    beta_w: Decimal
    beta_l: Decimal
    offset: Decimal = Decimal(0)
    weight: Decimal = Decimal(1)


Loss = Callable[[Pair, Coefficients], Decimal]
Objective = tuple[Coefficients, Loss]


def log1p(x: Decimal) -> Decimal:
    # 1 + x loses a tiny x. The next term of the series is below 1e-120 of its sum.
    return x - x * x / 2 + x**3 / 3 if abs(x) < Decimal("1e-40") else (1 + x).ln()


def nll(x: Decimal) -> Decimal:
    """-log sigmoid(x)."""
    return max(-x, Decimal(0)) + log1p((-abs(x)).exp())


def sigmoid(x: Decimal) -> Decimal:
    # exp(-x) may overflow, with an unclipped coefficient.
    return (-nll(x)).exp()


# Adaptive coefficients


def exponents(adaptive: Adaptive, length: tuple) -> tuple:
    if adaptive.exponent == "length":
        return length
    if isinstance(adaptive.exponent, tuple):
        return adaptive.exponent
    return adaptive.exponent, adaptive.exponent


def eq_7(p: Pair, adaptive: Adaptive) -> Decimal:
    """log of (P_w/R_w)^a_w / (P_l/R_l)^a_l, or of P_w^a_w / P_l^a_l in policy space."""
    a_w, a_l = exponents(adaptive, (1 / p.n_w, 1 / p.n_l))
    if adaptive.space == "policy":
        return a_w * p.L_w - a_l * p.L_l
    if adaptive.space == "ratio":
        return a_w * (p.L_w - p.R_w) - a_l * (p.L_l - p.R_l)
    raise ValueError(adaptive.space)


def cpo_ratio(p: Pair, adaptive: Adaptive) -> Decimal:
    return eq_7(p, adaptive._replace(space="policy"))


def mean_ratio(p: Pair, adaptive: Adaptive) -> Decimal:
    """Eq. 7 of a score that is a mean: log of n_w P_w^a_w / (n_l P_l^a_l), or of P/R.

    Exponents of 0 leave the plain objective, without lengths.
    """
    a_w, a_l = exponents(adaptive, (1 / p.n_w, 1 / p.n_l))
    if a_w == a_l == 0:
        return Decimal(0)
    return (p.n_w / p.n_l).ln() + eq_7(p, adaptive)


def simpo_ratio(p: Pair, adaptive: Adaptive) -> Decimal:
    return mean_ratio(p, adaptive._replace(space="policy"))


def orpo_ratio(p: Pair, adaptive: Adaptive) -> Decimal:
    """log of (P_w (1-P_w))^a_w / (P_l (1-P_l))^a_l; P is per token, so "length" is exponent 1."""
    a_w, a_l = exponents(adaptive, (Decimal(1), Decimal(1)))
    x_w, x_l = p.L_w / p.n_w, p.L_l / p.n_l
    return a_w * (x_w + log1p(-x_w.exp())) - a_l * (x_l + log1p(-x_l.exp()))


def betas(p: Pair, beta: Decimal, adaptive: Adaptive | None, log_ratio=eq_7) -> Coefficients:
    if adaptive is None:
        return Coefficients(beta, beta)
    ratio = log_ratio(p, adaptive).exp()
    if adaptive.clip is not None:
        ratio = min(ratio, adaptive.clip)
    return Coefficients(beta * adaptive.k * ratio, beta)


# Objectives: the coefficients, which are constant, and the loss as a function of the pair


def f_prime(rho: Decimal, f: str, alpha: Decimal | None) -> Decimal:
    """f'(t) of an f-divergence at t = P/R (f-DPO); TRL's form of the alpha-divergence."""
    t = rho.exp()
    return {
        "reverse_kl": lambda: rho,
        "forward_kl": lambda: 1 - 1 / t,
        "js_divergence": lambda: (2 * t / (1 + t)).ln(),
        "alpha_divergence": lambda: (t ** (alpha - 1) - 1) / (alpha - 1),
    }[f]()


class F(NamedTuple):
    """An f-divergence."""

    kind: str = "reverse_kl"
    alpha: Decimal | None = None


F_DPO = F()


def f_scores(p: Pair, f: F) -> tuple[Decimal, Decimal]:
    return f_prime(p.L_w - p.R_w, *f), f_prime(p.L_l - p.R_l, *f)


def rho_margin(p: Pair, c: Coefficients, f: F = F_DPO) -> Decimal:
    s_w, s_l = f_scores(p, f)
    return c.beta_w * s_w - c.beta_l * s_l - c.offset


def divergence(options: dict) -> F:
    alpha = options.pop("f_alpha_divergence_coef", None)
    return F(options.pop("f_divergence_type", "reverse_kl"), alpha)


def token_nll(p: Pair) -> Decimal:
    return -p.L_w / p.n_w


def dpo(p: Pair, *, beta, label_smoothing=Decimal(0), adaptive=None, **f) -> Objective:
    f = divergence(f)

    def loss(p: Pair, c: Coefficients) -> Decimal:
        d = rho_margin(p, c, f)
        return (1 - label_smoothing) * nll(d) + label_smoothing * nll(-d)

    return betas(p, beta, adaptive), loss


def lndpo(p: Pair, *, beta, adaptive=None, **f) -> Objective:
    f = divergence(f)

    def loss(p: Pair, c: Coefficients) -> Decimal:
        s_w, s_l = f_scores(p, f)
        return nll(c.beta_w * s_w / p.n_w - c.beta_l * s_l / p.n_l)

    return betas(p, beta, adaptive, mean_ratio), loss


def robust(p: Pair, *, beta, label_smoothing=Decimal(0), adaptive=None, **f) -> Objective:
    f = divergence(f)

    def loss(p: Pair, c: Coefficients) -> Decimal:
        d, e = rho_margin(p, c, f), label_smoothing
        return ((1 - e) * nll(d) - e * nll(-d)) / (1 - 2 * e)

    return betas(p, beta, adaptive), loss


def hinge(p: Pair, *, beta, adaptive=None, **f) -> Objective:
    # At exactly d = 1 a central difference gives half the slope, so do not test there.
    f = divergence(f)
    return betas(p, beta, adaptive), lambda p, c: max(Decimal(0), 1 - rho_margin(p, c, f))


def exo(p: Pair, *, beta, label_smoothing, adaptive=None, **f) -> Objective:
    """The KL of two probabilities: q of the policy, 1 - e and e of the preference."""
    f = divergence(f)

    def loss(p: Pair, c: Coefficients) -> Decimal:
        d, e = rho_margin(p, c, f), label_smoothing
        kept = sigmoid(d) * (-nll(d) - (1 - e).ln())
        return kept + sigmoid(-d) * (-nll(-d) - e.ln())

    return betas(p, beta, adaptive), loss


def discopop(p: Pair, *, beta, tau, adaptive=None, **f) -> Objective:
    f = divergence(f)

    def loss(p: Pair, c: Coefficients) -> Decimal:
        d = rho_margin(p, c, f)
        # The second term is sigmoid(d / tau) exp(-d), whose second factor may overflow.
        return sigmoid(-d / tau) * nll(d) + (-nll(d / tau) - d).exp()

    return betas(p, beta, adaptive), loss


def nca(p: Pair, *, beta, adaptive=None) -> Objective:
    def loss(p: Pair, c: Coefficients) -> Decimal:
        a, b = c.beta_w * (p.L_w - p.R_w), c.beta_l * (p.L_l - p.R_l)
        return nll(a) + nll(-a) / 2 + nll(-b) / 2

    return betas(p, beta, adaptive), loss


def sppo(p: Pair, *, beta, adaptive=None) -> Objective:
    """Eq. 4.7, eta = 1 / beta: log-ratios of eta (P - 1/2), P the probability to win, 1 and 0."""

    def loss(p: Pair, c: Coefficients) -> Decimal:
        eta = 1 / beta
        chosen = c.beta_w / beta * (p.L_w - p.R_w) - eta * (1 - Decimal("0.5"))
        rejected = c.beta_l / beta * (p.L_l - p.R_l) - eta * (0 - Decimal("0.5"))
        return chosen**2 + rejected**2

    return betas(p, beta, adaptive), loss


def apozero(p: Pair, *, beta, adaptive=None) -> Objective:
    def loss(p: Pair, c: Coefficients) -> Decimal:
        # 1 - sigmoid(x) is sigmoid(-x), which keeps its digits.
        return sigmoid(-c.beta_w * (p.L_w - p.R_w)) + sigmoid(c.beta_l * (p.L_l - p.R_l))

    return betas(p, beta, adaptive), loss


def apodown(p: Pair, *, beta, adaptive=None) -> Objective:
    def loss(p: Pair, c: Coefficients) -> Decimal:
        return sigmoid(c.beta_w * (p.L_w - p.R_w)) + sigmoid(-rho_margin(p, c))

    return betas(p, beta, adaptive), loss


def sft(p: Pair) -> Objective:
    return Coefficients(Decimal(1), Decimal(1)), lambda p, c: token_nll(p)


def omnidpo(p: Pair, *, beta, eta, tau, gamma, nll_weight, adaptive=None) -> Objective:
    """The authors' `uni_dpo_loss`, with averaged log-probs and every chosen score good enough."""

    def loss(p: Pair, c: Coefficients) -> Decimal:
        w, l = p.L_w / p.n_w, p.L_l / p.n_l
        d = c.beta_w * (w - p.R_w / p.n_w) - c.beta_l * (l - p.R_l / p.n_l)
        weight = sigmoid(eta * p.h) * sigmoid(tau - beta * (w - l)) ** gamma
        return weight * nll(d) - c.offset * w

    # A sign has no gradient.
    gated = nll_weight if p.R_w > p.L_w else Decimal(0)
    return betas(p, beta, adaptive, mean_ratio)._replace(offset=gated), loss


def ipo(p: Pair, *, tau, length_normalized=False, adaptive=None, **f) -> Objective:
    f = divergence(f)

    def loss(p: Pair, c: Coefficients) -> Decimal:
        rho_w, rho_l = f_scores(p, f)
        if length_normalized:
            rho_w, rho_l = rho_w / p.n_w, rho_l / p.n_l
        return (c.beta_w * rho_w - c.beta_l * rho_l - 1 / (2 * tau)) ** 2

    return betas(p, Decimal(1), adaptive), loss


def rdpo(p: Pair, *, beta, alpha, adaptive=None) -> Objective:
    # The sign is that of AdaDPO's Table 3. R-DPO's own paper (arXiv 2403.19159) adds the
    # difference.
    c = betas(p, beta, adaptive)._replace(offset=alpha * (p.n_w - p.n_l))
    return c, lambda p, c: nll(rho_margin(p, c))


def cpo(
    p: Pair, *, beta, nll_weight=Decimal(1), adaptive=None, label_smoothing=Decimal(0)
) -> Objective:
    def loss(p: Pair, c: Coefficients) -> Decimal:
        d, e = c.beta_w * p.L_w - c.beta_l * p.L_l, label_smoothing
        return (1 - e) * nll(d) + e * nll(-d) + nll_weight * token_nll(p)

    return betas(p, beta, adaptive, cpo_ratio), loss


def orpo(p: Pair, *, beta, nll_weight=Decimal(1), adaptive=None) -> Objective:
    def log_odds(x: Decimal) -> Decimal:
        return x - log1p(-x.exp())

    def loss(p: Pair, c: Coefficients) -> Decimal:
        d = c.beta_w * log_odds(p.L_w / p.n_w) - c.beta_l * log_odds(p.L_l / p.n_l)
        return nll(d) + nll_weight * token_nll(p)

    return betas(p, beta, adaptive, orpo_ratio), loss


def simpo(p: Pair, *, beta, gamma, adaptive=None, label_smoothing=Decimal(0)) -> Objective:
    c = betas(p, beta, adaptive, simpo_ratio)._replace(offset=gamma)

    def loss(p: Pair, c: Coefficients) -> Decimal:
        d, e = c.beta_w * p.L_w / p.n_w - c.beta_l * p.L_l / p.n_l - c.offset, label_smoothing
        return (1 - e) * nll(d) + e * nll(-d)

    return c, loss


def tpo(
    p: Pair,
    *,
    beta,
    loss_type="sigmoid",
    label_smoothing=Decimal(0),
    tpo_alpha=Decimal(1),
    tpo_l_gamma=Decimal("0.5"),
    adaptive=None,
) -> Objective:
    is_mean = loss_type in ("ipo", "tpo-l")

    def loss(p: Pair, c: Coefficients) -> Decimal:
        w, l, e = p.L_w, p.L_l, label_smoothing
        if is_mean:
            w, l = w / p.n_w, l / p.n_l
        d = c.beta_w * w - c.beta_l * l
        if loss_type == "hinge":
            pair = max(Decimal(0), 1 - d)
        elif loss_type == "ipo":
            pair = (d - 1 / (2 * beta)) ** 2
        else:
            d -= tpo_l_gamma if loss_type == "tpo-l" else 0
            pair = (1 - e) * nll(d) + e * nll(-d)
        return pair - tpo_alpha * p.L_g / p.n_g

    scale = Decimal(1) if loss_type == "ipo" else beta
    return betas(p, scale, adaptive, simpo_ratio if is_mean else cpo_ratio), loss


def implicit_gap(p: Pair, implicit_reference: str = "ratio", length_normalized: bool = True):
    """log of the implicit reference (alpha-DPO Eq. 8, Table 2) at alpha = 1, chosen over rejected."""
    n_w, n_l = (p.n_w, p.n_l) if length_normalized else (1, 1)
    policy = p.L_w / n_w - p.L_l / n_l
    reference = p.R_w / n_w - p.R_l / n_l
    return {
        "ratio": policy - reference,
        "policy": policy,
        "reference": reference,
        "inverse_reference": -reference,
    }[implicit_reference]


def alphadpo(
    p: Pair,
    *,
    beta,
    gamma,
    alpha,
    mean,
    std,
    length_normalized=True,
    implicit_reference="ratio",
    scale_by_beta=True,
    normalize=True,
    stop_gradient=True,
) -> Objective:
    def offset(p: Pair) -> Decimal:
        z = implicit_gap(p, implicit_reference, length_normalized)
        if normalize:
            z = (z - mean) / std if std else Decimal(0)
        return gamma + alpha * (beta if scale_by_beta else 1) * z

    def loss(p: Pair, c: Coefficients) -> Decimal:
        n_w, n_l = (p.n_w, p.n_l) if length_normalized else (1, 1)
        u = c.beta_w * p.L_w / n_w - c.beta_l * p.L_l / n_l
        return nll(u - (c.offset if stop_gradient else offset(p)))

    return Coefficients(beta, beta, offset(p)), loss


def madpo_c(h, tau, c_max, c_min=None, lam=1):
    """MADPO's coefficient c(h); `madpo_weight` uses c(|h|)."""
    h, tau, c_max, lam = map(exact, (h, tau, c_max, lam))
    c_min = 1 / c_max if c_min is None else exact(c_min)
    return c_min + (c_max - c_min) / (1 + (c_max - 1) / (1 - c_min) * (lam * (h - tau)).exp())


def madpo_weight(h, tau, c_max, c_min=None, lam=1, mode="full"):
    """Eq. 4, and Figure 3's Amp-Only ("amplify") and Reg-Only ("regularize")."""
    h, tau = exact(h), exact(tau)
    off = {"full": False, "amplify": abs(h) >= tau, "regularize": abs(h) < tau}[mode]
    if off or h <= -tau:
        return Decimal(1)
    return sigmoid(madpo_c(abs(h), tau, c_max, c_min, lam) * h) / sigmoid(h)


def madpo(p: Pair, *, beta, tau, c_max, c_min=None, lam=Decimal(1), mode="full") -> Objective:
    weight = madpo_weight(p.h, tau, c_max, c_min, lam, mode)
    return Coefficients(beta, beta, weight=weight), lambda p, c: nll(rho_margin(p, c))


def betadpo_beta(beta, m, mean_gap, h0, beta_min=1e-3):
    """MADPO, Section 2.5; the gap is rho_w - rho_l, without beta. The floor keeps beta positive."""
    beta, m, mean_gap, h0, beta_min = map(exact, (beta, m, mean_gap, h0, beta_min))
    return max(beta * (1 + m * (mean_gap - h0)), beta_min)


def betadpo(p: Pair, *, beta, m, mean_gap, h0, beta_min=1e-3) -> Objective:
    return dpo(p, beta=betadpo_beta(beta, m, mean_gap, h0, beta_min))


def bco(p: Pair, *, beta, mean, reward_shift=True, adaptive=None) -> Objective:
    """`mean` is that of the rewards of both responses so far, over beta; it shifts the rewards."""
    delta = beta * mean if reward_shift else Decimal(0)

    def loss(p: Pair, c: Coefficients) -> Decimal:
        a, b = c.beta_w * (p.L_w - p.R_w), c.beta_l * (p.L_l - p.R_l)
        return nll(a - c.offset) + nll(c.offset - b)

    return betas(p, beta, adaptive)._replace(offset=delta), loss


def smoothed(d: Decimal, label_smoothing: Decimal) -> Decimal:
    return (1 - label_smoothing) * nll(d) + label_smoothing * nll(-d)


def aot(p: Pair, *, beta, quantile, label_smoothing=Decimal(0), adaptive=None) -> Objective:
    """`quantile` is the batch's reference margin of the same place as this pair's policy margin."""

    def loss(p: Pair, c: Coefficients) -> Decimal:
        return smoothed(c.beta_w * p.L_w - c.beta_l * p.L_l - c.offset, label_smoothing)

    return betas(p, beta, adaptive)._replace(offset=quantile), loss


def aotunpaired(
    p: Pair, *, beta, rejected, chosen, lent, label_smoothing=Decimal(0), adaptive=None
) -> Objective:
    """A pair whose two responses may be compared with responses of other pairs.

    Its loss is the term of its chosen response, and the batch's gradient in its rejected response
    is of another term. That term is added here less its value.

    Args:
        rejected: the pair whose rejected response is compared with this chosen one.
        chosen: the pair whose chosen response is compared with this rejected one.
        lent: beta_w of that second term.
    """
    rejected, chosen, at = Pair(*rejected), Pair(*chosen), p
    term = p._replace(L_l=rejected.L_l, R_l=rejected.R_l, n_l=rejected.n_l)

    def loss(p: Pair, c: Coefficients) -> Decimal:
        def second(l: Decimal) -> Decimal:
            x = lent * (chosen.L_w - chosen.R_w) - beta * (l - at.R_l)
            return smoothed(x, label_smoothing)

        if rejected[:6] == at[:6]:
            return smoothed(rho_margin(p, c), label_smoothing)
        first = rho_margin(term._replace(L_w=p.L_w), c)
        return smoothed(first, label_smoothing) + second(p.L_l) - second(at.L_l)

    return betas(term, beta, adaptive), loss


def tdpo1(p: Pair, *, beta) -> Objective:
    return Coefficients(beta, beta), lambda p, c: nll(rho_margin(p, c) - beta * (p.K_l - p.K_w))


def tdpo2(p: Pair, *, beta, alpha) -> Objective:
    # sg(K_w) is the offset.
    c = Coefficients(beta, beta, offset=-beta * alpha * p.K_w)
    return c, lambda p, c: nll(rho_margin(p, c) - beta * alpha * p.K_l)


def kto_z0(mismatched: Iterable[float]) -> float:
    """An estimate of the KL: max(0, mean log ratio of prompts with responses to other prompts)."""
    ratios = list(mismatched)
    return max(0.0, math.fsum(ratios) / len(ratios))


def kto_desirable(p: Pair, *, beta, z0, lambda_d=Decimal(1)) -> Objective:
    """The chosen response as a single example."""

    def loss(p: Pair, c: Coefficients) -> Decimal:
        # 1 - sigmoid(x) is sigmoid(-x), which keeps its digits.
        return lambda_d * sigmoid(-c.beta_w * (p.L_w - p.R_w - z0))

    return Coefficients(beta, beta), loss


def kto_undesirable(p: Pair, *, beta, z0, lambda_u=Decimal(1)) -> Objective:
    """The rejected response as a single example."""

    def loss(p: Pair, c: Coefficients) -> Decimal:
        return lambda_u * sigmoid(-c.beta_l * (z0 - (p.L_l - p.R_l)))

    return Coefficients(beta, beta), loss


def kto(p: Pair, *, beta, z0, lambda_d=Decimal(1), lambda_u=Decimal(1)) -> Objective:
    """The sum over both responses of a pair: twice the mean over its two examples."""
    c, desirable = kto_desirable(p, beta=beta, z0=z0, lambda_d=lambda_d)
    _, undesirable = kto_undesirable(p, beta=beta, z0=z0, lambda_u=lambda_u)
    return c, lambda p, c: desirable(p, c) + undesirable(p, c)


OBJECTIVES: dict[str, Callable[..., Objective]] = {
    f.__name__: f
    for f in (
        dpo, lndpo, robust, hinge, ipo, rdpo, exo, discopop, nca, sppo, apozero, apodown, cpo, orpo,
        simpo, sft, tpo, alphadpo, madpo, omnidpo, betadpo, bco, aot, aotunpaired, tdpo1, tdpo2,
        kto_desirable, kto_undesirable, kto,
    )
}  # fmt: skip


def wpo_weight(
    chosen: Iterable[tuple[float, float]],
    rejected: Iterable[tuple[float, float]],
    clamp: bool = True,
) -> float:
    """WPO Eq. 2 for a pair, from (log p of the token, log sum_v p_v^2) of each scored token."""
    log_weight = math.fsum(
        math.fsum(logp - log_sum_sq for logp, log_sum_sq in tokens) / len(tokens)
        for tokens in (list(chosen), list(rejected))
    )
    # The paper has no bound. The authors' code clamps the product of the two weights at 1.
    return math.exp(min(log_weight, 0.0) if clamp else log_weight)


# Evaluation


def exact(value):
    """The exact value of a double as a decimal; a bool, a string or None is returned unchanged."""
    if value is None or isinstance(value, bool | str | Decimal):
        return value
    if isinstance(value, Adaptive):
        return Adaptive(*map(exact, value))
    if isinstance(value, tuple):
        return tuple(map(exact, value))
    return Decimal(value) if isinstance(value, int) else Decimal(float(value))


def precisely(digits: int = DIGITS):
    context = decimal.Context(prec=digits, Emax=decimal.MAX_EMAX, Emin=decimal.MIN_EMIN)
    return decimal.localcontext(context)


def _build(name: str, pair: Pair, options: dict) -> Objective:
    """The named objective, with the options that all objectives share."""
    options = {key: exact(value) for key, value in options.items()}
    weight = options.pop("weight", Decimal(1))
    rpo_alpha = options.pop("rpo_alpha", Decimal(0))
    nll_weight = rpo_alpha * (weight if options.pop("weight_nll", True) else 1)
    held, loss = OBJECTIVES[name](pair, **options)
    held = held._replace(weight=held.weight * weight)
    return held, lambda p, c: c.weight * loss(p, c) + nll_weight * token_nll(p)


def coefficients(name: str, pair: Pair, **options) -> Coefficients:
    with precisely():
        return _build(name, Pair(*map(exact, pair)), options)[0]


def loss(name: str, pair: Pair, held: Coefficients, **options) -> Decimal:
    with precisely():
        pair = Pair(*map(exact, pair))
        return _build(name, pair, options)[1](pair, held)


def gradient(name: str, pair: Pair, wrt: tuple[str, ...], **options) -> tuple[float, ...]:
    """Derivatives of the loss in the named fields of the pair, with constant coefficients."""
    held = coefficients(name, pair, **options)
    # With a coefficient of 1e300 the loss bends within 1e-300: a step must be shorter than that,
    # and needs enough digits. Beyond a double's range only the saturated slopes, 0 and inf, are
    # right.
    size = min(320, max(0, held.beta_w.adjusted(), held.beta_l.adjusted()))
    return tuple(_slope(name, pair, field, size, options) for field in wrt)


def _slope(name: str, pair: Pair, field: str, size: int, options: dict) -> float:
    slope = Decimal(0)
    # A slope of 1e-300 next to a loss of 1 needs more digits than most slopes.
    for digits in (DIGITS + 2 * size, DIGITS + 350 + 2 * size):
        with precisely(digits):
            p = Pair(*map(exact, pair))
            held, function = _build(name, p, options)
            at = getattr(p, field)
            # Relative to the value: ORPO's log odds are as steep as 1/L near L = 0.
            step = (abs(at) or 1) * STEP.scaleb(-size)
            above = function(p._replace(**{field: at + step}), held)
            below = function(p._replace(**{field: at - step}), held)
            slope = (above - below) / (2 * step)
            if abs(above - below) > abs(above).scaleb(25 - digits):
                break
    return float(slope)


def value_and_gradient(
    name: str, pair: Pair, **options
) -> tuple[float, float, float, float, float]:
    """(loss, dloss/dL_w, dloss/dL_l, beta_w, beta_l); inf where a double overflows.

    In addition to its own options, every objective takes `weight` (of WPO, without gradient),
    `rpo_alpha` (adds -rpo_alpha L_w / n_w) and `weight_nll` (whether `weight` also multiplies that
    term).
    """
    held = coefficients(name, pair, **options)
    value = float(loss(name, pair, held, **options))
    slopes = gradient(name, pair, ("L_w", "L_l"), **options)
    return value, *slopes, float(held.beta_w), float(held.beta_l)


def balance(name: str, pair: Pair, **options) -> float:
    """|dloss/dP_w| / |dloss/dP_l| for sequence probabilities P = exp(L) (AdaDPO Eq. 2, A.6)."""
    g_w, g_l = gradient(name, pair, ("L_w", "L_l"), **options)
    return abs(g_w / g_l) * math.exp(pair.L_l - pair.L_w)
