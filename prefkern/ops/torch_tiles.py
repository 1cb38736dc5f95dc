"""The functions on a tile of logits in torch, on any device: twins of the Triton kernels.

They have the same calls, order of operations and results as `prefkern_kernels` (see there and
`prefkern.ops.passes` for the mathematics); tests compare the two. A tile is float32 `(n, v)`: n
tokens by v consecutive entries of the vocabulary. It holds raw products `h . W_v`, and a function
that takes a tile overwrites it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prefkern.ops import fold_state
from prefkern.ops.plan import slices

_LOG2_E = 1 / math.log(2)


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
    ref_tile: Tensor | None = None,  # (n, v) float32, overwritten; None: no reference
    ref_bias: Tensor | None = None,  # (v,)
    ref_maximum: Tensor | None = None,  # (n,), in and out, as are the next ones
    ref_total: Tensor | None = None,  # (n,)
    ref_label_logit: Tensor | None = None,  # (n,)
    cross: Tensor | None = None,  # (n,)
    ref_rescale: Tensor | None = None,  # (n,), out
    ref_weights: Tensor | None = None,  # (n, v), out, with weights; may be ref_tile itself
    start: int,
    first: bool,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
) -> None:
    """Fold a tile, or a pair of tiles, into each token's running state."""
    if first:
        state = (maximum, total, label_logit, label_slope, shifted, logit_sum, before, squares)
        fold_state.clear(*state)
        fold_state.clear(ref_maximum, ref_total, ref_label_logit, None, cross)
    x = None
    if ref_tile is not None:
        # The reference's slope is not needed, and is freed before the policy's is made.
        x = transform_in_place(ref_tile, ref_bias, logit_scale, softcap, temperature)[0]
    z, slope = transform_in_place(tile, bias, logit_scale, softcap, temperature)
    local = labels - start
    inside, column = _label_columns(z, local)
    if slope is not None:
        torch.where(inside, slope.gather(1, column)[:, 0], label_slope, out=label_slope)
    if logit_sum is not None:
        logit_sum += z.sum(1)
    if before is not None:
        is_before = torch.arange(z.shape[1], device=z.device) < local.unsqueeze(1)
        torch.maximum(before, torch.where(is_before, z, -math.inf).amax(1), out=before)
    difference = None if x is None else torch.sub(x, z)

    old, offset, factor = _shift(z, inside, column, maximum, label_logit)
    if shifted is not None:
        moved = torch.where(total > 0, (old - offset) * total, 0.0)
        # exp is 0 from -104 down (in float64 from -746). So the bound changes no product, and
        # avoids -inf times 0.
        distance = z.clamp(min=-800.0)
        shifted.add_(moved).mul_(factor)
        _exp_(z)
        shifted += distance.mul_(z).sum(1)
        if squares is not None:
            squares.mul_(factor).mul_(factor).add_(torch.mul(z, z, out=distance).sum(1))
    else:
        _exp_(z)
    total.mul_(factor).add_(z.sum(1))
    _write(z, factor, slope, tile, rescale, weights)
    if x is None or difference is None:
        return
    assert ref_maximum is not None and ref_total is not None and ref_label_logit is not None
    assert ref_tile is not None and cross is not None
    _, _, ref_factor = _shift(x, inside, column, ref_maximum, ref_label_logit)
    _exp_(x)
    ref_total.mul_(ref_factor).add_(x.sum(1))
    # exp(x_v - m_r) is 0 in the label's column, where the difference is finite. It is also 0 at an
    # entry that both models rule out, where the difference is NaN (-inf minus -inf) and counts as
    # 0.
    terms = difference.mul_(x).nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf)
    cross.mul_(ref_factor).add_(terms.sum(1))
    _write(x, ref_factor, slope, ref_tile, ref_rescale, ref_weights)


def _exp_(z: Tensor) -> Tensor:
    """The exponential, in place."""
    if z.dtype == torch.float32 and z.device.type == "cpu":
        # Of MKL's two functions on processors of AMD this one is three times as fast; of Intel, alike.
        return z.mul_(_LOG2_E).exp2_()
    return z.exp_()


def _shift(
    z: Tensor,  # (n, v), left as z - maximum, -inf in the label's column
    inside: Tensor,  # (n,) bool, the label is one of these entries
    column: Tensor,  # (n, 1)
    maximum: Tensor,  # (n,), in and out
    label_logit: Tensor,  # (n,), in and out
) -> tuple[Tensor, Tensor, Tensor]:  # (n,) each
    """Take a tile's label logit and maximum.

    Returns the old maximum, what to subtract, exp(old - new).
    """
    picked = z.gather(1, column)
    torch.where(inside, picked[:, 0], label_logit, out=label_logit)
    # The label's column is left out; its term is added at the end, where it cannot cancel.
    z.scatter_(1, column, torch.where(inside.unsqueeze(1), -math.inf, picked))
    old = maximum.clone()
    torch.maximum(maximum, z.amax(1), out=maximum)
    # If only the label's logit was seen, the maximum is -inf, and exp(-inf - 0) = 0.
    offset = torch.where(maximum == -math.inf, 0.0, maximum)
    z.sub_(offset.unsqueeze(1))
    return old, offset, torch.exp(old - offset)


def _write(
    e: Tensor,  # (n, v) exponentials, in the tile's memory
    factor: Tensor,  # (n,)
    slope: Tensor | None,  # (n, v)
    tile: Tensor,  # (n, v)
    rescale: Tensor | None,  # (n,), out
    weights: Tensor | None,  # (n, v), out; may be the tile itself
) -> None:
    """Write what the second product reads, and the factor of its accumulator."""
    if rescale is not None:
        rescale.copy_(factor)
    if weights is not None:
        if slope is not None:
            e.mul_(slope)
        if weights is not tile:
            weights.copy_(e)


def remake_weights(
    tile: Tensor,  # (n, v) float32, overwritten unless it is kept
    labels: Tensor,  # (n,) int64
    bias: Tensor | None,  # (v,)
    unit: Tensor,  # (n,) float32
    factor: Tensor,  # (n,) float32, r
    label_gradient: Tensor,  # (n,) float32
    weights: Tensor,  # (n, v), out; may be the tile itself
    *,
    ref_tile: Tensor | None = None,  # (n, v), as tile; None: no reference
    ref_bias: Tensor | None = None,  # (v,)
    ref_unit: Tensor | None = None,  # (n,) float32
    ref_factor: Tensor | None = None,  # (n,) float32
    is_kept: bool = False,  # the tiles hold u, in any dtype
    start: int,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
) -> None:
    """Turn a tile, or a pair of tiles, into the loss's gradient; see the kernel of this name."""
    slope = None
    if is_kept:
        # What is kept is read alone: the sum is made in the output, or in float32 where that is not.
        z = weights if weights.dtype == factor.dtype else torch.empty_like(tile, dtype=factor.dtype)
        torch.mul(tile, factor.unsqueeze(1), out=z)
        if ref_tile is not None and ref_factor is not None:
            # A rounded product, so that equal models leave nothing; as many rows as a MiB holds.
            for part in slices(0, tile.shape[0], max(2**18 // tile.shape[1], 1)):
                z[part] += ref_tile[part] * ref_factor[part].unsqueeze(1)
    else:
        x = None
        if ref_tile is not None and ref_unit is not None and ref_factor is not None:
            x = transform_in_place(ref_tile, ref_bias, logit_scale, softcap, temperature)[0]
            _exp_(x.sub_(ref_unit.unsqueeze(1))).mul_(ref_factor.unsqueeze(1))
        z, slope = transform_in_place(tile, bias, logit_scale, softcap, temperature)
        _exp_(z.sub_(unit.unsqueeze(1))).mul_(factor.unsqueeze(1))
        if x is not None:
            z.add_(x)
    if slope is not None:
        z.mul_(slope)
    inside, column = _label_columns(z, labels - start)
    kept = z.gather(1, column)
    z.scatter_(1, column, torch.where(inside.unsqueeze(1), label_gradient.unsqueeze(1), kept))
    if weights is not z:
        weights.copy_(z)


def _label_columns(tile: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:  # (n,) bool, (n, 1)
    """Whether each token's label is an entry of the tile, and a valid column in either case."""
    inside = (local >= 0) & (local < tile.shape[1])
    return inside, local.clamp(0, tile.shape[1] - 1).unsqueeze(1)


def settle(
    kept: Tensor,  # (n, V), in place
    maxima: Tensor,  # (tiles, n) float32; each tile's columns are relative to one
    unit: Tensor,  # (n,) float32; the columns shall be relative to it
    label_value: Tensor,  # (n,) float32
    labels: Tensor,  # (n,) int64
    vocab_tile: int,
) -> None:
    """Bring kept rows to one unit, and put `label_value` in the label's column."""
    factors = torch.exp(maxima - unit)
    for columns, factor in zip(kept.split(vocab_tile, 1), factors, strict=True):
        columns.mul_(factor.unsqueeze(1))
    # On a CPU, scatter_ would copy all of `kept` for it.
    tokens = torch.arange(kept.shape[0], device=kept.device)
    inside, column = _label_columns(kept, labels)
    place = tokens, column[:, 0]
    kept[place] = torch.where(inside, label_value.to(kept.dtype), kept[place])


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
    """Multiply each row by its factor, which is 1 for most rows after their maximum."""
    accumulator.mul_(factor.unsqueeze(1))


def scatter_scaled(
    values: Tensor,  # (n, H) float32
    scale: Tensor,  # (n,)
    rows: Tensor | None,  # (n,) int64, no two the same; None: 0, 1, ...
    out: Tensor,  # (m, H), in any dtype; other rows stay as they are
    others: Tensor | None = None,  # (n, H) float32, a second term; None: there is none
    other_scale: Tensor | None = None,  # (n,)
) -> None:
    """`out[rows[t]] = scale[t] values[t] (+ other_scale[t] others[t])`, rounded once."""
    # In parts of about a MiB.
    for part in slices(0, values.shape[0], max(2**18 // values.shape[1], 1)):
        scaled = values[part] * scale[part].unsqueeze(1)
        if others is not None and other_scale is not None:
            scaled.addcmul_(others[part], other_scale[part].unsqueeze(1))
        scaled = scaled.to(out.dtype)
        if rows is None:
            out[part] = scaled
        else:
            out.index_copy_(0, rows[part], scaled)


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
