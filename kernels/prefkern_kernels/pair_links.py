"""Scores and links of the pair kernel, each with its derivatives.

The twin of `prefkern.objectives.scores` and `prefkern.objectives.links`, which have the formulas.
There is one number a program here, so nothing is tiled. NaN stays visible, and an infinite log-prob
gives the loss's own limit: factors that vanish are never multiplied by an infinity.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import log1p, one_minus_exp


@triton.jit
def least(x, bound):
    # A GPU's own minimum of NaN and a number is the number; but a NaN must stay visible.
    return tl.minimum(x, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest(x, bound):
    return tl.maximum(x, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def within(x, bound):
    return least(largest(x, -bound), bound)


@triton.jit
def times(x, factor):
    """x factor, but 0 for a factor of 0, also if x is a log-prob of -inf."""
    return tl.where(factor == 0.0, 0.0, x * factor)


@triton.jit
def log_sigmoid(x):
    # log sigmoid(x) = -log(1 + exp(-x)); exp of a negative number cannot overflow.
    return tl.minimum(x, 0.0) - log1p(tl.exp(-tl.abs(x)))


@triton.jit
def sigmoid(x):
    tail = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, tail) / (1.0 + tail)


@triton.jit
def score(
    logp,
    ref_logp,
    length,
    power,
    max_log_ratio,
    least_miss,
    SCORE: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):
    """A response's score s, ds/dL, and log P (1 - P) if the score is log-odds."""
    value = logp
    slope = 1.0
    extra = 0.0
    if SCORE == "log_ratio" or SCORE == "mean_log_ratio":
        value = logp - ref_logp
        if DIVERGENCE != "log":
            value, slope = _ratio_score(value, power, max_log_ratio, DIVERGENCE)
    if SCORE == "mean_log_ratio" or SCORE == "mean_log_prob":
        # A GPU's own quotient is off by 2 ulp, and an exponential makes 1e-5 of that.
        value = tl.div_rn(value, length)
        slope = slope / length
    if SCORE == "log_odds":
        # o = log P - log(1 - P), d o / d log P = 1 / (1 - P)
        mean = tl.div_rn(value, length)
        log_p = least(mean, -least_miss)
        miss = one_minus_exp(log_p)
        slope = tl.where(mean <= -least_miss, 1.0 / miss / length, 0.0)
        value = log_p - tl.log(miss)
        extra = log_p + tl.log(miss)
    return value, slope, extra


@triton.jit
def _ratio_score(rho, power, max_log_ratio, DIVERGENCE: tl.constexpr):
    """f'(exp(rho)), and its derivative in rho."""
    if DIVERGENCE == "js":
        # log(2t / (1 + t)) = min(rho, 0) - log(1 - (1 - exp(-|rho|)) / 2)
        value = tl.minimum(rho, 0.0) - log1p(-0.5 * one_minus_exp(-tl.abs(rho)))
        slope = sigmoid(-rho)
    else:
        # exp(x) - 1 = exp(x) (1 - exp(-x))
        x = least(power * rho, max_log_ratio)
        miss = one_minus_exp(-tl.abs(x))
        value = tl.where(x < 0, -miss, tl.exp(x) * miss) / power
        slope = tl.where(power * rho <= max_log_ratio, tl.exp(x), 0.0)
    return value, slope


@triton.jit
def link(chosen, rejected, delta, shape, max_squared, max_log_ratio, LINK: tl.constexpr):
    """The link of weighed scores, and its derivatives in the chosen and in the rejected one."""
    if LINK == "nca":
        loss = -log_sigmoid(chosen) - 0.5 * (log_sigmoid(-chosen) + log_sigmoid(-rejected))
        dchosen = 0.5 * sigmoid(chosen) - sigmoid(-chosen)
        drejected = 0.5 * sigmoid(rejected)
    elif LINK == "squares":
        loss_chosen, dchosen = _square((chosen - 0.5) / shape, max_squared)
        loss_rejected, drejected = _square((rejected + 0.5) / shape, max_squared)
        loss = loss_chosen + loss_rejected
        dchosen = dchosen / shape
        drejected = drejected / shape
    elif LINK == "apo_zero":
        loss = sigmoid(-chosen) + sigmoid(rejected)
        dchosen = -sigmoid(chosen) * sigmoid(-chosen)
        drejected = sigmoid(rejected) * sigmoid(-rejected)
    elif LINK == "apo_down":
        gap = chosen - rejected
        loss = sigmoid(chosen) + sigmoid(-gap)
        drejected = sigmoid(gap) * sigmoid(-gap)
        # sigmoid'(a) - sigmoid'(a - b) is 4 sigmoid'(a) sigmoid'(a - b) times
        # sinh(b / 2) sinh(b / 2 - a), whose exponentials are taken out.
        size = -tl.minimum(tl.abs(chosen), tl.abs(gap))
        misses = _signed_miss(rejected) * _signed_miss(rejected - 2.0 * chosen)
        ends = (1.0 + tl.exp(-tl.abs(chosen))) * (1.0 + tl.exp(-tl.abs(gap)))
        dchosen = tl.exp(size) * misses / (ends * ends)
    else:
        loss, dchosen = _difference(delta, shape, max_squared, max_log_ratio, LINK)
        drejected = -dchosen
    return loss, dchosen, drejected


@triton.jit
def _signed_miss(x):
    """1 - exp(-|x|), with the sign of x."""
    miss = one_minus_exp(-tl.abs(x))
    return tl.where(x < 0, -miss, miss)


@triton.jit
def _difference(delta, shape, max_squared, max_log_ratio, LINK: tl.constexpr):
    """A link of delta, and its derivative."""
    if LINK == "none":
        loss = 0.0
        ddelta = 0.0
    elif LINK == "hinge":
        loss = largest(1.0 - delta, 0.0)
        ddelta = tl.where(delta < 1.0, -1.0, 0.0)
    elif LINK == "square":
        loss, ddelta = _square(delta, max_squared)
    elif LINK == "exo":
        bounded = within(delta, max_squared)
        kept = sigmoid(bounded) * (log_sigmoid(bounded) - log1p(-shape))
        flipped = sigmoid(-bounded) * (log_sigmoid(-bounded) - tl.log(shape))
        loss = kept + flipped
        # log q_w - log q_l = delta
        odds = tl.log(shape) - log1p(-shape)
        ddelta = sigmoid(bounded) * sigmoid(-bounded) * (bounded + odds)
    elif LINK == "discopop":
        bounded = within(delta, max_squared)
        share = sigmoid(bounded / shape)
        rest = sigmoid(-bounded / shape)
        # exp(-delta) alone would overflow where its factor vanishes.
        exponent = log_sigmoid(bounded / shape) - bounded
        tail = tl.exp(least(exponent, max_log_ratio))
        dtail = tl.where(exponent <= max_log_ratio, tail * (rest / shape - 1.0), 0.0)
        loss = times(-log_sigmoid(delta), rest) + tail
        drest = -log_sigmoid(bounded) * (share * rest / shape)
        ddelta = dtail - sigmoid(-delta) * rest - drest
    else:
        loss, ddelta = _logistic(delta, shape, LINK)
    return loss, ddelta


@triton.jit
def _logistic(delta, smoothing, LINK: tl.constexpr):
    kept = -log_sigmoid(delta)
    flipped = -log_sigmoid(-delta)
    below = sigmoid(-delta)
    above = sigmoid(delta)
    if LINK == "robust":
        scale = 1.0 - 2.0 * smoothing
        loss = ((1.0 - smoothing) * kept - smoothing * flipped) / scale
        ddelta = -((1.0 - smoothing) * below + smoothing * above) / scale
    else:
        # If delta overflows, the flipped loss is inf, and 0 times it would be NaN. So would be
        # kept + smoothing * (flipped - kept).
        smoothed = (1.0 - smoothing) * kept + smoothing * flipped
        loss = tl.where(smoothing > 0, smoothed, kept)
        ddelta = smoothing * above - (1.0 - smoothing) * below
    return loss, ddelta


@triton.jit
def _square(x, max_squared):
    bounded = within(x, max_squared)
    return bounded * bounded, tl.where(tl.abs(x) <= max_squared, 2.0 * bounded, 0.0)
