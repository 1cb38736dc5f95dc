"""The kernels' twins in torch: what is done to one tile of logits, on any device.

Same calls, same order of operations and same results as `prefkern_kernels` (see there and
`prefkern.passes` for the mathematics); the tests hold the two together. A tile is float32
`(n, v)`: n tokens by v consecutive words of the vocabulary, holding raw products `h . W_v`. Both
functions overwrite it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def fold(
    tile: Tensor,  # (n, v) float32, overwritten
    labels: Tensor,  # (n,) int64, over the whole vocabulary
    bias: Tensor | None,  # (v,)
    maximum: Tensor,  # (n,) float32, in and out, as are the next ones
    total: Tensor,  # (n,)
    label_logit: Tensor,  # (n,)
    label_slope: Tensor,  # (n,)
    rescale: Tensor | None,  # (n,), out
    weights: Tensor | None,  # (n, v), out; may be the tile itself
    shifted: Tensor | None,  # (n,), in and out, as are the next ones; None: no statistics
    logit_sum: Tensor | None,  # (n,)
    before: Tensor | None,  # (n,)
    squares: Tensor | None,  # (n,)
    *,
    start: int,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
) -> None:
    """Fold a tile into each token's running state; see `prefkern.passes.FoldState`."""
    z, slope = transform_in_place(tile, bias, logit_scale, softcap, temperature)
    local = labels - start
    inside = (local >= 0) & (local < z.shape[1])
    column = local.clamp(0, z.shape[1] - 1).unsqueeze(1)
    picked = z.gather(1, column)
    torch.where(inside, picked[:, 0], label_logit, out=label_logit)
    if slope is not None:
        torch.where(inside, slope.gather(1, column)[:, 0], label_slope, out=label_slope)
    if logit_sum is not None:
        logit_sum += z.sum(1)
    if before is not None:
        is_before = torch.arange(z.shape[1], device=z.device) < local.unsqueeze(1)
        torch.maximum(before, torch.where(is_before, z, -math.inf).amax(1), out=before)

    # The label's column is left out: its own term is added at the end, where it cannot cancel.
    z.scatter_(1, column, torch.where(inside.unsqueeze(1), -math.inf, picked))
    new_maximum = torch.maximum(maximum, z.amax(1))
    # Where no logit but the label's has been seen the maximum is -inf, and exp(-inf - 0) = 0.
    offset = torch.where(new_maximum == -math.inf, 0.0, new_maximum)
    factor = torch.exp(maximum - offset)
    z.sub_(offset.unsqueeze(1))
    if shifted is not None:
        moved = torch.where(total > 0, (maximum - offset) * total, 0.0)
        # exp is 0 from -104 down, so that the bound changes no product and -inf times 0 is 0.
        distance = z.clamp(min=-200.0)
        shifted.add_(moved).mul_(factor)
        z.exp_()
        shifted += distance.mul_(z).sum(1)
        if squares is not None:
            squares.mul_(factor).mul_(factor).add_(torch.mul(z, z, out=distance).sum(1))
    else:
        z.exp_()
    total.mul_(factor).add_(z.sum(1))
    maximum.copy_(new_maximum)
    if rescale is not None:
        rescale.copy_(factor)
    if weights is not None:
        if slope is not None:
            z.mul_(slope)
        if weights is not tile:
            weights.copy_(z)


def logits_gradient(
    tile: Tensor,  # (n, v) float32, overwritten
    labels: Tensor,  # (n,) int64
    bias: Tensor | None,  # (v,)
    maximum: Tensor,  # (n,) float32
    coefficient: Tensor,  # (n,), -(d loss / d logp) / sum of exp(z - maximum)
    label_gradient: Tensor,  # (n,), (d loss / d logp) (1 - p_label)
    gradient: Tensor,  # (n, v), out; may be the tile itself
    *,
    start: int,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
) -> None:
    """Turn a tile into `d loss / d (h . W_v + b_v)`, transform included."""
    z, slope = transform_in_place(tile, bias, logit_scale, softcap, temperature)
    local = labels - start
    inside = (local >= 0) & (local < z.shape[1])
    column = local.clamp(0, z.shape[1] - 1).unsqueeze(1)
    # d logp / d z_v = [v = label] - p_v
    z.sub_(maximum.unsqueeze(1)).exp_().mul_(coefficient.unsqueeze(1))
    kept = z.gather(1, column)
    z.scatter_(1, column, torch.where(inside.unsqueeze(1), label_gradient.unsqueeze(1), kept))
    if slope is not None:
        z.mul_(slope)
    z.mul_(logit_scale / temperature)
    if gradient is not tile:
        gradient.copy_(z)


def rescale_rows(
    accumulator: Tensor,  # (n, H) float32, in place
    factor: Tensor,  # (n,)
) -> None:
    """Multiply each row by its factor, 1 for most rows once the maximum has been met."""
    accumulator.mul_(factor.unsqueeze(1))


def transform_in_place(
    tile: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
) -> tuple[Tensor, Tensor | None]:
    """Transformed logits, the tile's own memory; with a softcap also tanh's derivative, (n, v)."""
    if bias is not None:
        tile += bias
    if softcap is None:
        if logit_scale != temperature:
            tile *= logit_scale / temperature
        return tile, None
    tile.mul_(logit_scale / softcap).tanh_()
    # d tanh(x) / dx = 1 - tanh(x)^2
    slope = torch.addcmul(tile.new_ones(()), tile, tile, value=-1)
    return tile.mul_(softcap / temperature), slope
