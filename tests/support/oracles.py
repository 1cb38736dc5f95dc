"""Preference objectives in textbook form, one pair at a time: the oracles of the vectorised ones.

Each objective follows its paper: AdaDPO (Eq. 7, Table 3), alpha-DPO (Eq. 8-12), MADPO (Eq. 4, 5),
beta-DPO, IPO, R-DPO, CPO, ORPO, SimPO, robust DPO (arXiv 2403.00409), TDPO (2404.11999), KTO
(2402.01306) and WPO (2406.11827). Nothing here uses tensors, batches or autograd.

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


def sigmoid(x: Decimal) -> Decimal:
    return 1 / (1 + (-x).exp())


def nll(x: Decimal) -> Decimal:
    """-log sigmoid(x)."""
    return max(-x, Decimal(0)) + log1p((-abs(x)).exp())


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


def simpo_ratio(p: Pair, adaptive: Adaptive) -> Decimal:
    """log of n_w P_w^a_w / (n_l P_l^a_l). With exponents of 0 this is SimPO, without lengths."""
    a_w, a_l = exponents(adaptive, (1 / p.n_w, 1 / p.n_l))
    if a_w == a_l == 0:
        return Decimal(0)
    return (p.n_w / p.n_l).ln() + a_w * p.L_w - a_l * p.L_l


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


def rho_margin(p: Pair, c: Coefficients) -> Decimal:
    return c.beta_w * (p.L_w - p.R_w) - c.beta_l * (p.L_l - p.R_l) - c.offset


def token_nll(p: Pair) -> Decimal:
    return -p.L_w / p.n_w


def dpo(p: Pair, *, beta, label_smoothing=Decimal(0), adaptive=None) -> Objective:
    def loss(p: Pair, c: Coefficients) -> Decimal:
        d = rho_margin(p, c)
        return (1 - label_smoothing) * nll(d) + label_smoothing * nll(-d)

    return betas(p, beta, adaptive), loss


def robust(p: Pair, *, beta, label_smoothing=Decimal(0), adaptive=None) -> Objective:
    def loss(p: Pair, c: Coefficients) -> Decimal:
        d, e = rho_margin(p, c), label_smoothing
        return ((1 - e) * nll(d) - e * nll(-d)) / (1 - 2 * e)

    return betas(p, beta, adaptive), loss


def hinge(p: Pair, *, beta, adaptive=None) -> Objective:
    # At exactly d = 1 a central difference gives half the slope, so do not test there.
    return betas(p, beta, adaptive), lambda p, c: max(Decimal(0), 1 - rho_margin(p, c))


def ipo(p: Pair, *, tau, length_normalized=False, adaptive=None) -> Objective:
    def loss(p: Pair, c: Coefficients) -> Decimal:
        rho_w, rho_l = p.L_w - p.R_w, p.L_l - p.R_l
        if length_normalized:
            rho_w, rho_l = rho_w / p.n_w, rho_l / p.n_l
        return (c.beta_w * rho_w - c.beta_l * rho_l - 1 / (2 * tau)) ** 2

    return betas(p, Decimal(1), adaptive), loss


def rdpo(p: Pair, *, beta, alpha, adaptive=None) -> Objective:
    # The sign is that of AdaDPO's Table 3. R-DPO's own paper (arXiv 2403.19159) adds the
    # difference.
    c = betas(p, beta, adaptive)._replace(offset=alpha * (p.n_w - p.n_l))
    return c, lambda p, c: nll(rho_margin(p, c))


def cpo(p: Pair, *, beta, nll_weight=Decimal(1), adaptive=None) -> Objective:
    def loss(p: Pair, c: Coefficients) -> Decimal:
        return nll(c.beta_w * p.L_w - c.beta_l * p.L_l) + nll_weight * token_nll(p)

    return betas(p, beta, adaptive, cpo_ratio), loss


def orpo(p: Pair, *, beta, nll_weight=Decimal(1), adaptive=None) -> Objective:
    def log_odds(x: Decimal) -> Decimal:
        return x - log1p(-x.exp())

    def loss(p: Pair, c: Coefficients) -> Decimal:
        d = c.beta_w * log_odds(p.L_w / p.n_w) - c.beta_l * log_odds(p.L_l / p.n_l)
        return nll(d) + nll_weight * token_nll(p)

    return betas(p, beta, adaptive, orpo_ratio), loss


def simpo(p: Pair, *, beta, gamma, adaptive=None) -> Objective:
    c = betas(p, beta, adaptive, simpo_ratio)._replace(offset=gamma)
    return c, lambda p, c: nll(c.beta_w * p.L_w / p.n_w - c.beta_l * p.L_l / p.n_l - c.offset)


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
) -> Objective:
    gap = implicit_gap(p, implicit_reference, length_normalized)
    z = (gap - mean) / std if std else Decimal(0)
    offset = gamma + alpha * (beta if scale_by_beta else 1) * z

    def loss(p: Pair, c: Coefficients) -> Decimal:
        n_w, n_l = (p.n_w, p.n_l) if length_normalized else (1, 1)
        return nll(c.beta_w * p.L_w / n_w - c.beta_l * p.L_l / n_l - c.offset)

    return Coefficients(beta, beta, offset), loss


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
        dpo, robust, hinge, ipo, rdpo, cpo, orpo, simpo, alphadpo, madpo, betadpo, tdpo1, tdpo2,
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
