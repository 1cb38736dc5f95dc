"""The pair kernel: from per-token log-probs to a pairwise loss and its gradient, in one launch.

One program a pair. It sums the log-probs of the pair's two runs of tokens (L_w, L_l). From these,
the reference's sums R and the lengths n it computes an objective of AdaDPO's Eq. 8:

    s            = rho, rho / n, L, L / n or log-odds     rho = L - R, log-odds of P = exp(L / n)
    ratio        = exp(alpha_w x_w - alpha_l x_l)         Eq. 7; x = rho, L, or log P (1 - P)
    a            = beta k min(ratio, clip) s_w,   b = beta s_l
    delta        = a - b - margin
    loss         = weight link(a, b, delta) - nll_weight L_w / n_w

In place of rho there may be the f' of another divergence. The margin may hold a gap of log-probs
(alpha-DPO's Eq. 12), and the weight may be MADPO's Eq. 4 or Omni-DPO's. Coefficients are constants
to the gradient, and where margin and weight are, too,

    d loss / d L_w = weight (d link / d a) beta_chosen ds_w/dL_w - nll_weight / n_w
    d loss / d L_l = weight (d link / d b) beta_rejected ds_l/dL_l

This is one number a sequence, the same for every token. With `ld_alpha` (LD-DPO) tokens beyond the
length of a pair's shorter response weigh less in L, and not in the NLL term, which is of all tokens:
a token's gradient is then `weight d loss / d L + d loss / d whole`. The kernel is the twin of
`prefkern.objectives.Contrastive`, whose declarations are its options. Tests compare the two.
`pair_links` has the scores and the links.
"""

from __future__ import annotations

from typing import NamedTuple, TypedDict

import torch
import triton
import triton.language as tl

from .launches import count
from .pair_links import least, log_sigmoid, sigmoid, times, within
from .pair_links import link as _link
from .pair_links import score as _score
from .primitives import on_device_of


class PairLossOutput(NamedTuple):
    """The results of one launch; S = 2B sequences, chosen ones first."""

    losses: torch.Tensor  # (B,) float32
    sums: torch.Tensor  # (S,) float32, log-prob of each sequence
    lengths: torch.Tensor  # (S,) int64, tokens of each sequence
    beta_chosen: torch.Tensor  # (B,) float32
    beta_rejected: torch.Tensor  # (B,) float32
    rewards: torch.Tensor  # (S,) float32, coefficient times score
    coefficients: torch.Tensor  # (S,) float32, d losses / d sums
    # With ld_alpha, the sums of all tokens with a weight of 1, and d losses / d whole; else None.
    whole: torch.Tensor | None  # (S,) float32
    whole_coefficients: torch.Tensor | None  # (S,) float32


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


class FocalWeight(TypedDict):
    """Omni-DPO's weight of a reward margin h and of the policy's own margin."""

    eta: float
    tau: float
    gamma: float
    max_margin: float


@triton.jit
def _sum_run(logps_ptr, begin, end, BLOCK_T: tl.constexpr):
    """The sum of logps[begin:end] in float64, to be rounded once: no order shows."""
    total = tl.zeros((BLOCK_T,), tl.float64)
    for block in range(0, (end - begin).to(tl.int32), BLOCK_T):
        offsets = begin + block + tl.arange(0, BLOCK_T)
        total += tl.load(logps_ptr + offsets, mask=offsets < end, other=0.0).to(tl.float64)
    return tl.sum(total, axis=0)


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
    whole_ptr,
    whole_coefficients_ptr,
    n_pairs,
    beta,
    shape,
    divergence_power,
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
    eta,
    gamma,
    max_margin,
    ld_alpha,
    SCORE: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    LINK: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    RATIO_SPACE: tl.constexpr,
    BY_LENGTH: tl.constexpr,
    COUNTS_LENGTHS: tl.constexpr,
    HAS_CLIP: tl.constexpr,
    HAS_GAP: tl.constexpr,
    GAP_IS_SCORED: tl.constexpr,
    GAP_TRAINS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    AMPLIFIES: tl.constexpr,
    DAMPS: tl.constexpr,
    HAS_FOCAL: tl.constexpr,
    NLL_BELOW_REFERENCE: tl.constexpr,
    HAS_LD: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One pair."""
    chosen = tl.program_id(0).to(tl.int64)
    rejected = chosen + n_pairs
    begin_w = tl.load(offsets_ptr + chosen)
    end_w = tl.load(offsets_ptr + chosen + 1)
    begin_l = tl.load(offsets_ptr + rejected)
    end_l = tl.load(offsets_ptr + rejected + 1)
    if HAS_LD:
        shared = tl.minimum(end_w - begin_w, end_l - begin_l)
        first_w = _sum_run(logps_ptr, begin_w, begin_w + shared, BLOCK_T)
        first_l = _sum_run(logps_ptr, begin_l, begin_l + shared, BLOCK_T)
        rest_w = _sum_run(logps_ptr, begin_w + shared, end_w, BLOCK_T)
        rest_l = _sum_run(logps_ptr, begin_l + shared, end_l, BLOCK_T)
        sum_w = (first_w + times(rest_w, ld_alpha)).to(tl.float32)
        sum_l = (first_l + times(rest_l, ld_alpha)).to(tl.float32)
        whole_w = (first_w + rest_w).to(tl.float32)
        whole_l = (first_l + rest_l).to(tl.float32)
    else:
        sum_w = _sum_run(logps_ptr, begin_w, end_w, BLOCK_T).to(tl.float32)
        sum_l = _sum_run(logps_ptr, begin_l, end_l, BLOCK_T).to(tl.float32)
        whole_w = sum_w
        whole_l = sum_l
    # An empty response has a log-prob of 0, also after the division.
    n_w = tl.maximum((end_w - begin_w).to(tl.float32), 1.0)
    n_l = tl.maximum((end_l - begin_l).to(tl.float32), 1.0)
    ref_w, ref_l = 0.0, 0.0
    if HAS_REFERENCE:
        ref_w = tl.load(ref_logps_ptr + chosen)
        ref_l = tl.load(ref_logps_ptr + rejected)
    s_w, slope_w, extra_w = _score(
        sum_w, ref_w, n_w, divergence_power, max_log_ratio, least_miss, SCORE, DIVERGENCE
    )
    s_l, slope_l, extra_l = _score(
        sum_l, ref_l, n_l, divergence_power, max_log_ratio, least_miss, SCORE, DIVERGENCE
    )

    if SCORE == "log_odds":
        x_w, x_l = extra_w, extra_l
    elif RATIO_SPACE:
        x_w, x_l = sum_w - ref_w, sum_l - ref_l
    else:
        x_w, x_l = sum_w, sum_l
    if not BY_LENGTH:
        x_w = times(x_w, alpha_chosen)
        x_l = times(x_l, alpha_rejected)
    elif SCORE != "log_odds":
        # A GPU's own quotient is off by 2 ulp, and an exponential makes 1e-5 of that.
        x_w = tl.div_rn(x_w, n_w)
        x_l = tl.div_rn(x_l, n_l)
    log_ratio = x_w - x_l
    if COUNTS_LENGTHS:
        log_ratio += tl.log(n_w) - tl.log(n_l)
    ratio = tl.exp(least(log_ratio, max_log_ratio))
    if HAS_CLIP:
        ratio = least(ratio, clip)
    beta_w = beta * (k * ratio)

    offset = margin + length_penalty * (
        (end_w - begin_w).to(tl.float32) - (end_l - begin_l).to(tl.float32)
    )
    # What a gap that trains takes off the slope of delta, of either side.
    held_back = 0.0
    if HAS_GAP:
        gap_w = times(sum_w, gap_policy) + times(ref_w, gap_reference)
        gap_l = times(sum_l, gap_policy) + times(ref_l, gap_reference)
        if SCORE == "mean_log_prob":
            gap_w = gap_w / n_w
            gap_l = gap_l / n_l
        z = gap_w - gap_l
        held_back = gap_scale * gap_policy
        if GAP_IS_SCORED:
            mean = tl.load(gap_mean_ptr).to(tl.float32)
            spread = tl.sqrt(tl.load(gap_variance_ptr).to(tl.float32))
            has_spread = spread > least_spread * tl.abs(mean)
            z = tl.where(has_spread, (z - mean) / tl.where(has_spread, spread, 1.0), 0.0)
            held_back = tl.where(has_spread, held_back / tl.where(has_spread, spread, 1.0), 0.0)
        offset += times(z, gap_scale)
    # A ratio of 0 belongs to a log-prob of -inf, and falls faster than the log-prob grows.
    weighed_w = tl.where((beta_w == 0.0) & (tl.abs(s_w) == float("inf")), 0.0, beta_w * s_w)
    weighed_l = beta * s_l
    delta = weighed_w - weighed_l - offset
    loss, dchosen, drejected = _link(
        weighed_w, weighed_l, delta, shape, max_squared, max_log_ratio, LINK
    )

    if HAS_WEIGHT:
        h = tl.load(reward_margins_ptr + chosen).to(tl.float32)
        h = within(h, max_margin)
        size = tl.abs(h)
        # 1 / (1 + K exp(lam (|h| - tau))) = exp(log sigmoid(-(lam (|h| - tau) + log K)))
        c = c_min + c_range * tl.exp(log_sigmoid(-(lam * (size - tau) + log_k)))
        weight = tl.exp(log_sigmoid(c * h) - log_sigmoid(h))
        unweighted = h <= -tau
        if not AMPLIFIES:
            unweighted = unweighted | (size < tau)
        if not DAMPS:
            unweighted = unweighted | (size >= tau)
        weight = tl.where(unweighted, 1.0, weight)
        loss *= weight
        dchosen *= weight
        drejected *= weight
    # d loss / d (L_w / n_w) through the weight.
    push = 0.0
    if HAS_FOCAL:
        h = within(tl.load(reward_margins_ptr + chosen).to(tl.float32), max_margin)
        gap = beta * (sum_w / n_w - sum_l / n_l)
        # (1 - sigmoid(x))^gamma = exp(gamma log sigmoid(-x))
        weight = tl.exp(log_sigmoid(eta * h) + times(log_sigmoid(tau - gap), gamma))
        push = -least(loss, max_squared) * (weight * gamma * sigmoid(gap - tau) * beta)
        loss *= weight
        dchosen *= weight
        drejected *= weight
    nll = nll_weight
    if NLL_BELOW_REFERENCE:
        nll = tl.where(sum_w >= ref_w, 0.0, nll_weight)

    tl.store(losses_ptr + chosen, loss - times(whole_w / n_w, nll))
    tl.store(sums_ptr + chosen, sum_w)
    tl.store(sums_ptr + rejected, sum_l)
    tl.store(lengths_ptr + chosen, end_w - begin_w)
    tl.store(lengths_ptr + rejected, end_l - begin_l)
    tl.store(beta_chosen_ptr + chosen, beta_w)
    tl.store(beta_rejected_ptr + chosen, beta)
    tl.store(rewards_ptr + chosen, weighed_w)
    tl.store(rewards_ptr + rejected, weighed_l)
    push_w = dchosen * beta_w * slope_w
    push_l = drejected * beta * slope_l
    if GAP_TRAINS:
        if SCORE == "mean_log_prob":
            push_w -= dchosen * (held_back / n_w)
            push_l -= drejected * (held_back / n_l)
        else:
            push_w -= dchosen * held_back
            push_l -= drejected * held_back
    of_nll = -nll / n_w
    if HAS_LD:
        tl.store(whole_ptr + chosen, whole_w)
        tl.store(whole_ptr + rejected, whole_l)
        tl.store(whole_coefficients_ptr + chosen, of_nll)
        tl.store(whole_coefficients_ptr + rejected, 0.0)
        of_nll = 0.0
    tl.store(coefficients_ptr + chosen, push_w + push / n_w + of_nll)
    tl.store(coefficients_ptr + rejected, push_l - push / n_l)


def pair_loss(
    logps: torch.Tensor,  # (N,) float32
    offsets: torch.Tensor,  # (S + 1,) int64, where each sequence's tokens begin
    ref_logps: torch.Tensor | None,  # (S,) float32; None if nothing needs it
    reward_margins: torch.Tensor | None = None,  # (B,), with margin_weight
    *,
    score: str,  # "log_ratio", "mean_log_ratio", "log_prob", "mean_log_prob" or "log_odds"
    divergence: str,  # "log", "js" or "power": the form of f'
    divergence_power: float,
    link: str,  # see `pair_links`
    shape: float,  # the link's own number
    beta: float,
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
    gap_trains: bool = False,
    margin_weight: MarginWeight | None = None,
    focal_weight: FocalWeight | None = None,
    nll_below_reference: bool = False,  # an NLL term only where L_w < R_w
    ld_alpha: float | None = None,  # weight of tokens beyond the shorter response's length
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
        whole=None if ld_alpha is None else empty(n_sequences),
        whole_coefficients=None if ld_alpha is None else empty(n_sequences),
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
    focal = focal_weight or FocalWeight(
        eta=0.0, tau=weight["tau"], gamma=0.0, max_margin=weight["max_margin"]
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
            float(shape),
            float(divergence_power),
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
            float(focal["tau"]),
            float(weight["c_min"]),
            float(weight["c_range"]),
            float(weight["log_k"]),
            float(weight["lam"]),
            float(focal["eta"]),
            float(focal["gamma"]),
            float(focal["max_margin"]),
            float(ld_alpha or 0.0),
            SCORE=score,
            DIVERGENCE=divergence,
            LINK=link,
            HAS_REFERENCE=ref_logps is not None,
            RATIO_SPACE=ratio_space,
            BY_LENGTH=exponents is None,
            COUNTS_LENGTHS=counts_lengths,
            HAS_CLIP=clip is not None,
            HAS_GAP=gap is not None,
            GAP_IS_SCORED=gap_statistics is not None,
            GAP_TRAINS=gap_trains,
            HAS_WEIGHT=margin_weight is not None,
            AMPLIFIES=weight["amplifies"],
            DAMPS=weight["damps"],
            HAS_FOCAL=focal_weight is not None,
            NLL_BELOW_REFERENCE=nll_below_reference,
            HAS_LD=ld_alpha is not None,
            BLOCK_T=1024,
            num_warps=4,
        )
    return out
