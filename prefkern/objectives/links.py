"""The links: from the weighed scores of a pair's two responses to its loss.

With `a = beta_chosen s_w`, `b = beta_rejected s_l` and `delta = a - b - margin`, a link is a
function of delta, or one of a and b, without a margin:

    logistic    -logsigmoid(delta)                                            DPO and most others
    robust      (-(1 - e) logsigmoid(delta) + e logsigmoid(-delta)) / (1 - 2e)
    hinge       max(0, 1 - delta)
    square      delta^2
    exo         KL(q || p), q = (sigmoid(delta), sigmoid(-delta)), p = (1 - e, e)
    discopop    -(1 - m) logsigmoid(delta) + m exp(-delta), m = sigmoid(delta / tau)
    nca         -logsigmoid(a) - logsigmoid(-a) / 2 - logsigmoid(-b) / 2
    squares     ((a - 1/2)^2 + (b + 1/2)^2) / beta^2
    apo_zero    sigmoid(-a) + sigmoid(b)
    apo_down    sigmoid(a) + sigmoid(b - a)
    none        0

`shape` is the link's own number: label smoothing e (logistic and `exo` have it, too), tau or beta.
`prefkern_kernels.pair_links` is the Triton twin. Sigmoids are taken through their logarithms:
torch's derivative of sigmoid, s (1 - s), is 0 in float32 from x = 17 on.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from prefkern.objectives.adaptive import MAX_LOG_RATIO

Link = Literal[
    "logistic",
    "robust",
    "hinge",
    "square",
    "exo",
    "discopop",
    "nca",
    "squares",
    "apo_zero",
    "apo_down",
    "none",
]

# Those that read label smoothing, are undefined at a shape of 0, or are no functions of delta.
LINKS_WITH_SMOOTHING = ("logistic", "robust", "exo")
LINKS_WITH_A_SHAPE = ("exo", "discopop", "squares")
LINKS_WITHOUT_A_MARGIN = ("nca", "squares", "apo_zero", "apo_down", "none")

# What is squared is clamped to this, so that its square stays finite in float32. So is the delta of
# a link whose terms would be 0 times infinity.
MAX_SQUARED = 1e18


def linked(
    link: Link,
    delta: Tensor,  # (B,)
    shape: float = 0.0,
    sides: tuple[Tensor, Tensor] | None = None,  # a and b, for the links that read them
) -> Tensor:  # (B,)
    """The loss of each pair."""
    if sides is not None:
        chosen, rejected = sides
        if link == "nca":
            kept = F.logsigmoid(chosen) + 0.5 * F.logsigmoid(-chosen)
            return -kept - 0.5 * F.logsigmoid(-rejected)
        if link == "squares":
            return _square((chosen - 0.5) / shape) + _square((rejected + 0.5) / shape)
        if link == "apo_zero":
            return _sigmoid(-chosen) + _sigmoid(rejected)
        if link == "apo_down":
            return _APODown.apply(chosen, rejected)
    if link == "none":
        return delta.new_zeros(delta.shape)
    if link == "hinge":
        return F.relu(1 - delta)
    if link == "square":
        return _square(delta)
    if link == "exo":
        return _exo(delta, shape)
    if link == "discopop":
        return _discopop(delta, shape)
    return _logistic(link, delta, shape)


def product(factor: Tensor, loss: Tensor) -> Tensor:
    """`factor loss`, both with a gradient: where the factor's is 0, an infinite loss adds 0 to it.

    For factors that saturate, exponentially, where the loss grows linearly.
    """
    # Only where the loss is that large: elsewhere a second derivative must see both factors.
    is_finite = loss <= MAX_SQUARED
    held = factor.detach()
    bounded = held * loss + (factor - held) * MAX_SQUARED
    return torch.where(is_finite, factor * torch.where(is_finite, loss, 0.0), bounded)


def _logistic(link: Link, delta: Tensor, smoothing: float) -> Tensor:
    losses = -F.logsigmoid(delta)
    if not smoothing:
        return losses
    flipped = -F.logsigmoid(-delta)
    if link == "robust":
        return ((1 - smoothing) * losses - smoothing * flipped) / (1 - 2 * smoothing)
    # Not `losses + smoothing (flipped - losses)`: where delta overflows, that is inf - inf.
    return (1 - smoothing) * losses + smoothing * flipped


def _square(x: Tensor) -> Tensor:
    return x.clamp(-MAX_SQUARED, MAX_SQUARED).square()


def _sigmoid(x: Tensor) -> Tensor:
    return F.logsigmoid(x).exp()


class _APODown(torch.autograd.Function):
    """`sigmoid(a) + sigmoid(b - a)`; autograd's own slope in a would cancel for a small b.

    The slopes are differentiable in turn.
    """

    @staticmethod
    def forward(ctx: Any, chosen: Tensor, rejected: Tensor) -> Tensor:
        ctx.save_for_backward(chosen, rejected)
        return _sigmoid(chosen) + _sigmoid(rejected - chosen)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        chosen, rejected = ctx.saved_tensors
        gap = chosen - rejected
        # sigmoid'(a) - sigmoid'(a - b) is 4 sigmoid'(a) sigmoid'(a - b) times this product, whose
        # exponentials are taken out: sinh(b / 2) sinh(b / 2 - a)
        size = -torch.minimum(chosen.abs(), gap.abs())
        misses = _signed_miss(rejected) * _signed_miss(rejected - 2 * chosen)
        ends = (1 + (-chosen.abs()).exp()) * (1 + (-gap.abs()).exp())
        slope = size.exp() * misses / ends.square()
        return grads[0] * slope, grads[0] * (_sigmoid(gap) * _sigmoid(-gap))


def _signed_miss(x: Tensor) -> Tensor:
    """`1 - exp(-|x|)`, with the sign of x."""
    # Two branches with a slope of 1 each at 0, where that of |x| is 0.
    is_negative = x < 0
    below = torch.expm1(torch.where(is_negative, x, 0.0))
    return torch.where(is_negative, below, -torch.expm1(-torch.where(is_negative, 0.0, x)))


def _exo(delta: Tensor, smoothing: float) -> Tensor:
    # q log q is 0 where q is: not 0 times -inf.
    delta = delta.clamp(-MAX_SQUARED, MAX_SQUARED)
    log_kept, log_flipped = F.logsigmoid(delta), F.logsigmoid(-delta)
    kept = log_kept.exp() * (log_kept - math.log1p(-smoothing))
    return kept + log_flipped.exp() * (log_flipped - math.log(smoothing))


def _discopop(delta: Tensor, tau: float) -> Tensor:
    bounded = delta.clamp(-MAX_SQUARED, MAX_SQUARED)
    logistic = product(_sigmoid(-bounded / tau), -F.logsigmoid(delta))
    # exp(-delta) alone would overflow where its factor vanishes.
    exponent = F.logsigmoid(bounded / tau) - bounded
    return logistic + exponent.clamp(max=MAX_LOG_RATIO).exp()
