"""The twins in torch of the kernels that take a pair of tiles, policy's and reference's.

As `torch_tiles` is to `fold` and `remake_weights`, this is to `fold_kl` and `kl_gradient` of
`prefkern_kernels` (see there and `prefkern.ops.kl_passes` for the mathematics). Both functions
overwrite both tiles.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prefkern.ops.torch_tiles import rescale_rows, transform_in_place

__all__ = ["fold_kl", "kl_gradient", "rescale_rows"]


def fold_kl(
    tile: Tensor,  # (n, v) float32, overwritten
    ref_tile: Tensor,  # (n, v) float32, overwritten
    labels: Tensor,  # (n,) int64, over the whole vocabulary
    bias: Tensor | None,  # (v,)
    ref_bias: Tensor | None,  # (v,)
    maximum: Tensor,  # (n,) float32, in and out, as are the next ones
    total: Tensor,  # (n,)
    label_logit: Tensor,  # (n,)
    label_slope: Tensor,  # (n,)
    ref_maximum: Tensor,  # (n,)
    ref_total: Tensor,  # (n,)
    ref_label_logit: Tensor,  # (n,)
    cross: Tensor,  # (n,)
    rescale: Tensor | None,  # (n,), out
    ref_rescale: Tensor | None,  # (n,), out
    weights: Tensor | None,  # (n, v), out; may be the tile itself
    ref_weights: Tensor | None,  # (n, v), out, with weights; may be ref_tile itself
    *,
    start: int,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
) -> None:
    """Fold a pair of tiles into each token's running states."""
    # The reference's slope is not needed, and gone before the policy's is made.
    x = transform_in_place(ref_tile, ref_bias, logit_scale, softcap, temperature)[0]
    z, slope = transform_in_place(tile, bias, logit_scale, softcap, temperature)
    local = labels - start
    inside = (local >= 0) & (local < z.shape[1])
    column = local.clamp(0, z.shape[1] - 1).unsqueeze(1)
    if slope is not None:
        torch.where(inside, slope.gather(1, column)[:, 0], label_slope, out=label_slope)
    difference = torch.sub(x, z)
    factor = _fold(z, inside, column, maximum, total, label_logit)
    ref_factor = _fold(x, inside, column, ref_maximum, ref_total, ref_label_logit)
    # exp(x_v - m_r) is 0 in the label's column, where the difference is finite, and at a word that
    # neither model can say, where it is not: a logit of -inf in both is no difference.
    terms = difference.mul_(x).nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf)
    cross.mul_(ref_factor).add_(terms.sum(1))
    for e, changed, into, out in (
        (z, factor, rescale, weights),
        (x, ref_factor, ref_rescale, ref_weights),
    ):
        if into is not None:
            into.copy_(changed)
        if out is not None:
            if slope is not None:
                e.mul_(slope)
            if out is not tile and out is not ref_tile:
                out.copy_(e)


def kl_gradient(
    tile: Tensor,  # (n, v) float32, overwritten
    ref_tile: Tensor,  # (n, v) float32, overwritten
    labels: Tensor,  # (n,) int64
    bias: Tensor | None,  # (v,)
    ref_bias: Tensor | None,  # (v,)
    maximum: Tensor,  # (n,) float32
    ref_maximum: Tensor,  # (n,) float32
    coefficient: Tensor,  # (n,), (d loss / d kl - d loss / d logp) / sum of exp(z - maximum)
    ref_coefficient: Tensor,  # (n,), -(d loss / d kl) / sum of exp(x - ref_maximum)
    label_gradient: Tensor,  # (n,)
    gradient: Tensor,  # (n, v), out; may be the tile itself
    *,
    start: int,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
) -> None:
    """Turn a pair of tiles into `d loss / d (h . W_v + b_v)` of the policy, transform included."""
    x = transform_in_place(ref_tile, ref_bias, logit_scale, softcap, temperature)[0]
    z, slope = transform_in_place(tile, bias, logit_scale, softcap, temperature)
    local = labels - start
    inside = (local >= 0) & (local < z.shape[1])
    column = local.clamp(0, z.shape[1] - 1).unsqueeze(1)
    # d logp / d z_v = [v = label] - p_v,  d kl / d z_v = p_v - r_v
    z.sub_(maximum.unsqueeze(1)).exp_().mul_(coefficient.unsqueeze(1))
    z.add_(x.sub_(ref_maximum.unsqueeze(1)).exp_().mul_(ref_coefficient.unsqueeze(1)))
    kept = z.gather(1, column)
    z.scatter_(1, column, torch.where(inside.unsqueeze(1), label_gradient.unsqueeze(1), kept))
    if slope is not None:
        z.mul_(slope)
    z.mul_(logit_scale / temperature)
    if gradient is not tile:
        gradient.copy_(z)


def _fold(
    z: Tensor,  # (n, v), left as exp(z - new maximum), 0 in the label's column
    inside: Tensor,  # (n,) bool, the label is one of these words
    column: Tensor,  # (n, 1)
    maximum: Tensor,  # (n,)
    total: Tensor,  # (n,)
    label_logit: Tensor,  # (n,)
) -> Tensor:  # (n,)
    """One head's share of the fold; returns what earlier sums were multiplied by."""
    picked = z.gather(1, column)
    torch.where(inside, picked[:, 0], label_logit, out=label_logit)
    z.scatter_(1, column, torch.where(inside.unsqueeze(1), -math.inf, picked))
    new_maximum = torch.maximum(maximum, z.amax(1))
    # Where no logit but the label's has been seen the maximum is -inf, and exp(-inf - 0) = 0.
    offset = torch.where(new_maximum == -math.inf, 0.0, new_maximum)
    factor = torch.exp(maximum - offset)
    z.sub_(offset.unsqueeze(1)).exp_()
    total.mul_(factor).add_(z.sum(1))
    maximum.copy_(new_maximum)
    return factor
