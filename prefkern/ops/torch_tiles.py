"""The kernels' twins in torch: what is done to one tile of logits, on any device.

Same calls, same order of operations and same results as `prefkern_kernels` (see there and
`prefkern.ops.passes` for the mathematics); the tests hold the two together. A tile is float32
`(n, v)`: n tokens by v consecutive words of the vocabulary, holding raw products `h . W_v`. What
takes a tile overwrites it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prefkern.ops import fold_state
from prefkern.ops.plan import slices


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
    shifted: Tensor | None = None,  # (n,), in and out, as are the next ones; None: no statistics
    logit_sum: Tensor | None = None,  # (n,)
    before: Tensor | None = None,  # (n,)
    squares: Tensor | None = None,  # (n,)
    *,
    start: int,
    first: bool,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
) -> None:
    """Fold a tile into each token's running state, a new one if it is the first."""
    if first:
        state = (maximum, total, label_logit, label_slope, shifted, logit_sum, before, squares)
        fold_state.clear(*state)
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
        # exp is 0 from -104 down (in float64 from -746), so that the bound changes no product and
        # -inf times 0 is 0.
        distance = z.clamp(min=-800.0)
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


def remake_weights(
    tile: Tensor,  # (n, v) float32, overwritten
    labels: Tensor,  # (n,) int64
    bias: Tensor | None,  # (v,)
    unit: Tensor,  # (n,) float32
    label_value: Tensor,  # (n,) float32
    factor: Tensor,  # (n,) float32
    weights: Tensor,  # (n, v), out; may be the tile itself
    *,
    start: int,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
) -> None:
    """Turn a tile into `factor exp(z_v - unit) t_v`, the label's into `factor label_value`."""
    z, slope = transform_in_place(tile, bias, logit_scale, softcap, temperature)
    z.sub_(unit.unsqueeze(1)).exp_()
    if slope is not None:
        z.mul_(slope)
    _put_label_values(z, labels - start, label_value)
    z.mul_(factor.unsqueeze(1))
    if weights is not tile:
        weights.copy_(z)


def settle(
    kept: Tensor,  # (n, V), in place
    maxima: Tensor,  # (tiles, n) float32, what each tile's columns are relative to
    unit: Tensor,  # (n,) float32, what they shall be relative to
    label_value: Tensor,  # (n,) float32
    labels: Tensor,  # (n,) int64
    vocab_tile: int,
) -> None:
    """Bring kept rows to one unit, and put `label_value` in the label's column."""
    factors = torch.exp(maxima - unit)
    for columns, factor in zip(kept.split(vocab_tile, 1), factors, strict=True):
        columns.mul_(factor.unsqueeze(1))
    kept.scatter_(1, labels.unsqueeze(1), label_value.unsqueeze(1).to(kept.dtype))


def finish(
    maximum: Tensor,  # (n,) float32
    total: Tensor,  # (n,)
    label_logit: Tensor,  # (n,)
    label_slope: Tensor,  # (n,)
    labels: Tensor,  # (n,) int64
    logps: Tensor,  # (n,), out
    unit: Tensor | None = None,  # (n,), out, as are the next two; None: the head needs no gradient
    share: Tensor | None = None,  # (n,)
    label_value: Tensor | None = None,  # (n,)
    derivative: Tensor | None = None,  # (n, H) float32, in: A, out: D; None: neither
    weight: Tensor | None = None,  # (V, H)
    *,
    factor: float = 1.0,
    compute_dtype: torch.dtype = torch.float32,
    operand_dtype: torch.dtype = torch.float32,
) -> None:
    """The end of a fold; see `prefkern_kernels.finish`."""
    state = fold_state.FoldState(maximum, total, label_logit, label_slope)
    folded = fold_state.finish(state)
    logps.copy_(folded.logps)
    if unit is not None and share is not None and label_value is not None:
        excess = torch.log(total / fold_state.largest_total(operand_dtype)).clamp(min=0.0)
        unit.copy_(torch.where(maximum == -math.inf, 0.0, maximum)).add_(excess)
        share.copy_(folded.rest).mul_(excess.exp())
        label_value.copy_(-total * torch.exp(-excess) * label_slope)
    if derivative is not None and weight is not None:
        # D = c ((1 - p_y) t_y W_y - rest A)
        derivative.mul_((-factor * folded.rest).unsqueeze(1))
        label_rows = weight.index_select(0, labels).to(compute_dtype).to(derivative.dtype)
        derivative.addcmul_(label_rows, (factor * folded.miss * label_slope).unsqueeze(1))


def rescale_rows(
    accumulator: Tensor,  # (n, H) float32, in place
    factor: Tensor,  # (n,)
) -> None:
    """Multiply each row by its factor, 1 for most rows once the maximum has been met."""
    accumulator.mul_(factor.unsqueeze(1))


def scatter_scaled(
    values: Tensor,  # (n, H) float32
    scale: Tensor,  # (n,)
    rows: Tensor | None,  # (n,) int64, no two the same; None: 0, 1, ...
    out: Tensor,  # (m, H), in any dtype; other rows stay as they are
) -> None:
    """`out[rows[t]] = scale[t] values[t]`, rounded once."""
    # As many rows at a time as a MiB holds.
    for part in slices(0, values.shape[0], max(2**18 // values.shape[1], 1)):
        scaled = (values[part] * scale[part].unsqueeze(1)).to(out.dtype)
        if rows is None:
            out[part] = scaled
        else:
            out.index_copy_(0, rows[part], scaled)


def _put_label_values(tile: Tensor, local: Tensor, values: Tensor) -> None:
    """Write each token's value at its label's column, if the tile has it."""
    inside = (local >= 0) & (local < tile.shape[1])
    column = local.clamp(0, tile.shape[1] - 1).unsqueeze(1)
    tile.scatter_(1, column, torch.where(inside, values, tile.gather(1, column)[:, 0]).unsqueeze(1))


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
