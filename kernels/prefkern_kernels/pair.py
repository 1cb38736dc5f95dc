"""The pair kernel: from per-token log-probs to a pairwise loss and its gradient, in one launch.

One program a pair. It sums the log-probs of the pair's two runs of tokens (L_w, L_l). From these,
the reference's sums R and the lengths n it computes an objective of AdaDPO's Eq. 8:

    s            = rho, rho / n, L, L / n or log-odds     rho = L - R, log-odds of P = exp(L / n)
    ratio        = exp(alpha_w x_w - alpha_l x_l)         Eq. 7; x = rho, L, or log P (1 - P)
    beta_chosen  = beta k min(ratio, clip),   beta_rejected = beta
    delta        = beta_chosen s_w - beta_rejected s_l - margin
    loss         = weight link(delta) - nll_weight L_w / n_w

The margin may hold a z-score (alpha-DPO's Eq. 12), and the weight may be MADPO's Eq. 4.
Coefficients, margin and weight are constants to the gradient, so

    d loss / d L_w =  weight link'(delta) beta_chosen ds_w/dL_w - nll_weight / n_w
    d loss / d L_l = -weight link'(delta) beta_rejected ds_l/dL_l

This is one number a sequence, the same for every token. The kernel is the twin of
`prefkern.objectives.Contrastive`, whose declarations are its options. Tests compare the two.
"""

from __future__ import annotations

from typing import NamedTuple, TypedDict

import torch
import triton
import triton.language as tl

from .launches import count
from .primitives import log1p, on_device_of, one_minus_exp


class PairLossOutput(NamedTuple):
    """The results of one launch; S = 2B sequences, chosen ones first."""

    losses: torch.Tensor  # (B,) float32
    sums: torch.Tensor  # (S,) float32, log-prob of each sequence
    lengths: torch.Tensor  # (S,) int64, tokens of each sequence
    beta_chosen: torch.Tensor  # (B,) float32
    beta_rejected: torch.Tensor  # (B,) float32
    rewards: torch.Tensor  # (S,) float32, coefficient times score
    coefficients: torch.Tensor  # (S,) float32, d losses / d sums


class MarginWeight(TypedDict):
    """MADPO's weight of a reward margin h (Eq. 4), `c_range` being c_max - c_min."""

    tau: float
    c_min: float
    c_range: float
    log_k: float  # log((c_max - 1) / (1 - c_min))
    lam: float
    max_margin: float
    amplifies: bool  # False: weight 1 where |h| < tau
    damps: bool  # False: weight 1 where |h| >= tau


@triton.jit
def _sum_run(logps_ptr, begin, end, BLOCK_T: tl.constexpr):
    """The sum of logps[begin:end], added in float64 and rounded once: no order shows."""
    total = tl.zeros((BLOCK_T,), tl.float64)
    for block in range(0, (end - begin).to(tl.int32), BLOCK_T):
        offsets = begin + block + tl.arange(0, BLOCK_T)
        total += tl.load(logps_ptr + offsets, mask=offsets < end, other=0.0).to(tl.float64)
    return tl.sum(total, axis=0).to(tl.float32)


@triton.jit
def _least(x, bound):
    # A GPU's own minimum of NaN and a number is the number; but a NaN must stay visible.
    return tl.minimum(x, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _largest(x, bound):
    return tl.maximum(x, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _times(x, factor):
    """x factor, but 0 for a factor of 0, also if x is a log-prob of -inf."""
    return tl.where(factor == 0.0, 0.0, x * factor)


@triton.jit
def _log_sigmoid(x):
    # log sigmoid(x) = -log(1 + exp(-x)); exp of a negative number cannot overflow.
    return tl.minimum(x, 0.0) - log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _score(logp, ref_logp, length, least_miss, SCORE: tl.constexpr):
    """A response's score s, ds/dL, and log P (1 - P) if the score is log-odds."""
    value = logp
    if SCORE == "log_ratio" or SCORE == "mean_log_ratio":
        value = logp - ref_logp
    slope = 1.0
    extra = 0.0
    if SCORE == "mean_log_ratio" or SCORE == "mean_log_prob":
        value = value / length
        slope = 1.0 / length
    if SCORE == "log_odds":
        # o = log P - log(1 - P), d o / d log P = 1 / (1 - P)
        log_p = _least(value / length, -least_miss)
        miss = one_minus_exp(log_p)
        slope = tl.where(value / length <= -least_miss, 1.0 / miss / length, 0.0)
        value = log_p - tl.log(miss)
        extra = log_p + tl.log(miss)
    return value, slope, extra


@triton.jit
def _link(delta, label_smoothing, max_squared, LINK: tl.constexpr):
    """The link of delta, and its derivative."""
    if LINK == "hinge":
        loss = _largest(1.0 - delta, 0.0)
        ddelta = tl.where(delta < 1.0, -1.0, 0.0)
    elif LINK == "square":
        bounded = _least(_largest(delta, -max_squared), max_squared)
        loss = bounded * bounded
        ddelta = tl.where(tl.abs(delta) <= max_squared, 2.0 * bounded, 0.0)
    else:
        tail = tl.exp(-tl.abs(delta))
        kept = -_log_sigmoid(delta)
        flipped = -_log_sigmoid(-delta)
        below = tl.where(delta >= 0, tail, 1.0) / (1.0 + tail)  # sigmoid(-delta)
        above = tl.where(delta >= 0, 1.0, tail) / (1.0 + tail)  # sigmoid(delta)
        if LINK == "robust":
            scale = 1.0 - 2.0 * label_smoothing
            loss = ((1.0 - label_smoothing) * kept - label_smoothing * flipped) / scale
            ddelta = -((1.0 - label_smoothing) * below + label_smoothing * above) / scale
        else:
            # If delta overflows, the flipped loss is inf, and 0 times it would be NaN. So would be
            # kept + label_smoothing * (flipped - kept).
            smoothed = (1.0 - label_smoothing) * kept + label_smoothing * flipped
            loss = tl.where(label_smoothing > 0, smoothed, kept)
            ddelta = label_smoothing * above - (1.0 - label_smoothing) * below
    return loss, ddelta


@triton.jit
def _pair_loss_kernel(
    logps_ptr,
    offsets_ptr,
    ref_logps_ptr,
    reward_margins_ptr,
    gap_mean_ptr,
    gap_variance_ptr,
    losses_ptr,
    sums_ptr,
    lengths_ptr,
    beta_chosen_ptr,
    beta_rejected_ptr,
    rewards_ptr,
    coefficients_ptr,
    n_pairs,
    beta,
    label_smoothing,
    margin,
    length_penalty,
    nll_weight,
    alpha_chosen,
    alpha_rejected,
    clip,
    k,
    max_log_ratio,
    least_miss,
    max_squared,
    gap_policy,
    gap_reference,
    gap_scale,
    least_spread,
    tau,
    c_min,
    c_range,
    log_k,
    lam,
    max_margin,
    SCORE: tl.constexpr,
    LINK: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    RATIO_SPACE: tl.constexpr,
    BY_LENGTH: tl.constexpr,
    COUNTS_LENGTHS: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    HAS_GAP: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    AMPLIFIES: tl.constexpr,
    DAMPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One pair."""
    chosen = tl.program_id(0).to(tl.int64)
    rejected = chosen + n_pairs
    begin_w = tl.load(offsets_ptr + chosen)
    end_w = tl.load(offsets_ptr + chosen + 1)
    begin_l = tl.load(offsets_ptr + rejected)
    end_l = tl.load(offsets_ptr + rejected + 1)
    sum_w = _sum_run(logps_ptr, begin_w, end_w, BLOCK_T)
    sum_l = _sum_run(logps_ptr, begin_l, end_l, BLOCK_T)
    # An empty response has a log-prob of 0, also after the division.
    n_w = tl.maximum((end_w - begin_w).to(tl.float32), 1.0)
    n_l = tl.maximum((end_l - begin_l).to(tl.float32), 1.0)
    ref_w, ref_l = 0.0, 0.0
    if HAS_REFERENCE:
        ref_w = tl.load(ref_logps_ptr + chosen)
        ref_l = tl.load(ref_logps_ptr + rejected)
    s_w, slope_w, extra_w = _score(sum_w, ref_w, n_w, least_miss, SCORE)
    s_l, slope_l, extra_l = _score(sum_l, ref_l, n_l, least_miss, SCORE)

    if SCORE == "log_odds":
        x_w, x_l = extra_w, extra_l
    elif RATIO_SPACE:
        x_w, x_l = sum_w - ref_w, sum_l - ref_l
    else:
        x_w, x_l = sum_w, sum_l
    if not BY_LENGTH:
        x_w = _times(x_w, alpha_chosen)
        x_l = _times(x_l, alpha_rejected)
    elif SCORE != "log_odds":
        x_w = x_w / n_w
        x_l = x_l / n_l
    log_ratio = x_w - x_l
    if COUNTS_LENGTHS:
        log_ratio += tl.log(n_w) - tl.log(n_l)
    ratio = tl.exp(_least(log_ratio, max_log_ratio))
    if HAS_CLIP:
        ratio = _least(ratio, clip)
    beta_w = beta * (k * ratio)

    offset = margin + length_penalty * (
        (end_w - begin_w).to(tl.float32) - (end_l - begin_l).to(tl.float32)
    )
    if HAS_GAP:
        gap_w = _times(sum_w, gap_policy) + _times(ref_w, gap_reference)
        gap_l = _times(sum_l, gap_policy) + _times(ref_l, gap_reference)
        if SCORE == "mean_log_prob":
            gap_w = gap_w / n_w
            gap_l = gap_l / n_l
        mean = tl.load(gap_mean_ptr).to(tl.float32)
        spread = tl.sqrt(tl.load(gap_variance_ptr).to(tl.float32))
        has_spread = spread > least_spread * tl.abs(mean)
        z = (gap_w - gap_l - mean) / tl.where(has_spread, spread, 1.0)
        offset += _times(tl.where(has_spread, z, 0.0), gap_scale)
    # A ratio of 0 belongs to a log-prob of -inf, and falls faster than the log-prob grows.
    weighed_w = tl.where((beta_w == 0.0) & (tl.abs(s_w) == float("inf")), 0.0, beta_w * s_w)
    delta = weighed_w - beta * s_l - offset
    loss, ddelta = _link(delta, label_smoothing, max_squared, LINK)

    if HAS_WEIGHT:
        h = tl.load(reward_margins_ptr + chosen).to(tl.float32)
        h = _least(_largest(h, -max_margin), max_margin)
        size = tl.abs(h)
        # 1 / (1 + K exp(lam (|h| - tau))) = exp(log sigmoid(-(lam (|h| - tau) + log K)))
        c = c_min + c_range * tl.exp(_log_sigmoid(-(lam * (size - tau) + log_k)))
        weight = tl.exp(_log_sigmoid(c * h) - _log_sigmoid(h))
        unweighted = h <= -tau
        if not AMPLIFIES:
            unweighted = unweighted | (size < tau)
        if not DAMPS:
            unweighted = unweighted | (size >= tau)
        weight = tl.where(unweighted, 1.0, weight)
        loss *= weight
        ddelta *= weight

    tl.store(losses_ptr + chosen, loss - _times(sum_w / n_w, nll_weight))
    tl.store(sums_ptr + chosen, sum_w)
    tl.store(sums_ptr + rejected, sum_l)
    tl.store(lengths_ptr + chosen, end_w - begin_w)
    tl.store(lengths_ptr + rejected, end_l - begin_l)
    tl.store(beta_chosen_ptr + chosen, beta_w)
    tl.store(beta_rejected_ptr + chosen, beta)
    tl.store(rewards_ptr + chosen, weighed_w)
    tl.store(rewards_ptr + rejected, beta * s_l)
    tl.store(coefficients_ptr + chosen, ddelta * beta_w * slope_w - nll_weight / n_w)
    tl.store(coefficients_ptr + rejected, -ddelta * beta * slope_l)


def pair_loss(
    logps: torch.Tensor,  # (N,) float32
    offsets: torch.Tensor,  # (S + 1,) int64, where each sequence's tokens begin
    ref_logps: torch.Tensor | None,  # (S,) float32; None if nothing needs it
    reward_margins: torch.Tensor | None = None,  # (B,), with margin_weight
    *,
    score: str,  # "log_ratio", "mean_log_ratio", "log_prob", "mean_log_prob" or "log_odds"
    link: str,  # "logistic", "robust", "hinge" or "square"
    beta: float,
    label_smoothing: float,
    margin: float,
    length_penalty: float,
    nll_weight: float,
    ratio_space: bool,
    exponents: tuple[float, float] | None,  # None: one over each length
    counts_lengths: bool,  # ratio times n_w / n_l
    clip: float | None,
    k: float,
    max_log_ratio: float,
    least_miss: float,
    max_squared: float,
    gap: tuple[float, float] | None = None,  # policy's and reference's part in alpha-DPO's gap
    gap_scale: float = 0.0,
    gap_statistics: tuple[torch.Tensor, torch.Tensor] | None = None,  # mean, variance: () float64
    least_spread: float = 0.0,  # relative to the mean
    margin_weight: MarginWeight | None = None,
) -> PairLossOutput:
    """Loss, coefficients and gradients of B pairs; one launch."""
    n_sequences = offsets.shape[0] - 1
    n_pairs = n_sequences // 2

    def empty(size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=logps.device)

    out = PairLossOutput(
        losses=empty(n_pairs),
        sums=empty(n_sequences),
        lengths=empty(n_sequences, torch.int64),
        beta_chosen=empty(n_pairs),
        beta_rejected=empty(n_pairs),
        rewards=empty(n_sequences),
        coefficients=empty(n_sequences),
    )
    alpha_chosen, alpha_rejected = exponents or (0.0, 0.0)
    gap_policy, gap_reference = gap or (0.0, 0.0)
    gap_mean, gap_variance = gap_statistics or (None, None)
    weight = margin_weight or MarginWeight(
        tau=1.0,
        c_min=0.0,
        c_range=0.0,
        log_k=0.0,
        lam=1.0,
        max_margin=0.0,
        amplifies=True,
        damps=True,
    )
    count("pair_loss")
    with on_device_of(logps):
        _pair_loss_kernel[(n_pairs,)](
            logps.contiguous(),
            offsets.contiguous(),
            None if ref_logps is None else ref_logps.contiguous(),
            None if reward_margins is None else reward_margins.contiguous(),
            gap_mean,
            gap_variance,
            *out,
            n_pairs,
            float(beta),
            float(label_smoothing),
            float(margin),
            float(length_penalty),
            float(nll_weight),
            float(alpha_chosen),
            float(alpha_rejected),
            float(clip or 0.0),
            float(k),
            float(max_log_ratio),
            float(least_miss),
            float(max_squared),
            float(gap_policy),
            float(gap_reference),
            float(gap_scale),
            float(least_spread),
            float(weight["tau"]),
            float(weight["c_min"]),
            float(weight["c_range"]),
            float(weight["log_k"]),
            float(weight["lam"]),
            float(weight["max_margin"]),
            SCORE=score,
            LINK=link,
            HAS_REFERENCE=ref_logps is not None,
            RATIO_SPACE=ratio_space,
            BY_LENGTH=exponents is None,
            COUNTS_LENGTHS=counts_lengths,
            HAS_CLIP=clip is not None,
            HAS_GAP=gap is not None,
            HAS_WEIGHT=margin_weight is not None,
            AMPLIFIES=weight["amplifies"],
            DAMPS=weight["damps"],
            BLOCK_T=1024,
            num_warps=4,
        )
    return out
