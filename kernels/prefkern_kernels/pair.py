"""The pair kernel: from per-token log-probs to a pairwise loss and its gradient, in one launch.

One program a pair. It sums the log-probs of the pair's two runs of tokens (L_w, L_l), forms the
log-ratios `rho = L - R` to the reference's sums, AdaDPO's coefficients (Eq. 7)

    ratio         = exp(alpha_w x_w - alpha_l x_l),  x = rho or L,  alpha = 1 / |y| or given
    beta_chosen   = beta k min(ratio, clip),         beta_rejected = beta

and, with `delta = beta_chosen rho_w - beta_rejected rho_l` and label smoothing e,

    loss          = -(1 - e) logsigmoid(delta) - e logsigmoid(-delta)
    d loss/d delta = -(1 - e) sigmoid(-delta) + e sigmoid(delta)

The coefficients are constants to the gradient, so `d loss / d L_w = beta_chosen d loss/d delta` and
`d loss / d L_l = -beta_rejected d loss/d delta`: one number a sequence, the same for every token.
It is the twin of `prefkern.objectives.DPO`, which the tests hold it to.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launches import count
from .primitives import log1p, on_device_of


class PairLossOutput(NamedTuple):
    """What one launch returns; S = 2B sequences, chosen ones first."""

    losses: torch.Tensor  # (B,) float32
    sums: torch.Tensor  # (S,) float32, log-prob of each sequence
    lengths: torch.Tensor  # (S,) int64, tokens of each sequence
    beta_chosen: torch.Tensor  # (B,) float32
    beta_rejected: torch.Tensor  # (B,) float32
    rewards: torch.Tensor  # (S,) float32, coefficient times log-ratio
    coefficients: torch.Tensor  # (S,) float32, d losses / d sums


@triton.jit
def _sum_run(logps_ptr, begin, end, BLOCK_T: tl.constexpr):
    """Sum of logps[begin:end], added in float64 and rounded once, so that no order shows."""
    total = tl.zeros((BLOCK_T,), tl.float64)
    for block in range(0, (end - begin).to(tl.int32), BLOCK_T):
        offsets = begin + block + tl.arange(0, BLOCK_T)
        total += tl.load(logps_ptr + offsets, mask=offsets < end, other=0.0).to(tl.float64)
    return tl.sum(total, axis=0).to(tl.float32)


@triton.jit
def _pair_loss_kernel(
    logps_ptr,
    offsets_ptr,
    ref_logps_ptr,
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
    alpha_chosen,
    alpha_rejected,
    clip,
    k,
    max_log_ratio,
    RATIO_SPACE: tl.constexpr,
    BY_LENGTH: tl.constexpr,
    HAS_CLIP: tl.constexpr,
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
    rho_w = sum_w - tl.load(ref_logps_ptr + chosen)
    rho_l = sum_l - tl.load(ref_logps_ptr + rejected)

    if RATIO_SPACE:
        x_w, x_l = rho_w, rho_l
    else:
        x_w, x_l = sum_w, sum_l
    if BY_LENGTH:
        # An empty response has a log-prob of 0, whatever it is divided by.
        x_w = x_w / tl.maximum((end_w - begin_w).to(tl.float32), 1.0)
        x_l = x_l / tl.maximum((end_l - begin_l).to(tl.float32), 1.0)
    else:
        x_w = x_w * alpha_chosen
        x_l = x_l * alpha_rejected
    ratio = tl.exp(tl.minimum(x_w - x_l, max_log_ratio))
    if HAS_CLIP:
        ratio = tl.minimum(ratio, clip)
    beta_w = beta * (k * ratio)

    delta = beta_w * rho_w - beta * rho_l
    # -logsigmoid(delta) = log(1 + exp(-delta)); exp of a negative number cannot overflow.
    tail = tl.exp(-tl.abs(delta))
    softplus = log1p(tail)
    loss = softplus + tl.maximum(-delta, 0.0)
    flipped = softplus + tl.maximum(delta, 0.0)
    below = tl.where(delta >= 0, tail, 1.0) / (1.0 + tail)  # sigmoid(-delta)
    above = tl.where(delta >= 0, 1.0, tail) / (1.0 + tail)  # sigmoid(delta)
    ddelta = label_smoothing * above - (1.0 - label_smoothing) * below

    tl.store(losses_ptr + chosen, loss + label_smoothing * (flipped - loss))
    tl.store(sums_ptr + chosen, sum_w)
    tl.store(sums_ptr + rejected, sum_l)
    tl.store(lengths_ptr + chosen, end_w - begin_w)
    tl.store(lengths_ptr + rejected, end_l - begin_l)
    tl.store(beta_chosen_ptr + chosen, beta_w)
    tl.store(beta_rejected_ptr + chosen, beta)
    tl.store(rewards_ptr + chosen, beta_w * rho_w)
    tl.store(rewards_ptr + rejected, beta * rho_l)
    tl.store(coefficients_ptr + chosen, ddelta * beta_w)
    tl.store(coefficients_ptr + rejected, -ddelta * beta)


def pair_loss(
    logps: torch.Tensor,  # (N,) float32
    offsets: torch.Tensor,  # (S + 1,) int64, where each sequence's tokens begin
    ref_logps: torch.Tensor,  # (S,) float32
    *,
    beta: float,
    label_smoothing: float,
    ratio_space: bool,
    exponents: tuple[float, float] | None,  # None: one over each length
    clip: float | None,
    k: float,
    max_log_ratio: float,
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
    count("pair_loss")
    with on_device_of(logps):
        _pair_loss_kernel[(n_pairs,)](
            logps.contiguous(),
            offsets.contiguous(),
            ref_logps.contiguous(),
            *out,
            n_pairs,
            float(beta),
            float(label_smoothing),
            float(alpha_chosen),
            float(alpha_rejected),
            float(clip or 0.0),
            float(k),
            float(max_log_ratio),
            RATIO_SPACE=ratio_space,
            BY_LENGTH=exponents is None,
            HAS_CLIP=clip is not None,
            BLOCK_T=1024,
            num_warps=4,
        )
    return out
