"""The end of a fold: each token's log-prob, and the numbers for its gradients.

`fold` leaves the maximum m and `total`, the sum over v != y. With M = max(m, z_y) and s the sum
over all v relative to M:

    logp    = -log1p(total exp(m - z_y))           where z_y >= m, else (z_y - M) - log s
    1 - p_y = total exp(m - M) / s
    D       = c ((1 - p_y) t_y W_y - (exp(m - M) / s) A)

`derivative` holds A = sum_{v != y} exp(z_v - m) t_v W_v and is overwritten with D. For the head's
gradient,

    d logp / d (h . W_v) = -c share u_v,    u_v = exp(z_v - unit) t_v,    u_y = label_value

`unit` is m, or larger if `label_value = -t_y total exp(m - unit)` would overflow the operands'
dtype: float16 ends at 65504, and a sum over a large vocabulary may exceed that.

One program a token, in place of some twenty small launches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launches import count
from .primitives import check_rows, check_vectors, log1p, on_device_of, round_to
from .tiles import row_config

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _finish_kernel(
    maximum_ptr,
    total_ptr,
    label_logit_ptr,
    label_slope_ptr,
    labels_ptr,
    logps_ptr,
    unit_ptr,
    share_ptr,
    label_value_ptr,
    derivative_ptr,
    stride_dn,
    weight_ptr,
    stride_wv,
    stride_wh,
    n_columns,
    factor,
    largest_total,
    HAS_HEAD: tl.constexpr,
    HAS_DERIVATIVE: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One token: its state becomes its numbers, and its row of A its row of D."""
    row = tl.program_id(0).to(tl.int64)
    m = tl.load(maximum_ptr + row)
    total = tl.load(total_ptr + row)
    label_logit = tl.load(label_logit_ptr + row)
    slope = tl.load(label_slope_ptr + row)

    top = tl.maximum(m, label_logit)
    # If the label is the only entry, this is exp(-inf) = 0, and total is 0 too.
    drop = tl.exp(m - top)
    others = total * drop
    s = others + tl.exp(label_logit - top)
    # If the label's logit is the largest, label_logit - top is 0; or NaN for a logit of inf, which
    # has no softmax.
    logp = (label_logit - top) - tl.where(label_logit >= m, log1p(others), tl.log(s))
    tl.store(logps_ptr + row, logp)
    rest = drop / s

    if HAS_HEAD:
        excess = tl.where(total > largest_total, tl.log(total / largest_total), 0.0)
        tl.store(unit_ptr + row, tl.where(m == -float("inf"), 0.0, m) + excess)
        tl.store(share_ptr + row, rest * tl.exp(excess))
        tl.store(label_value_ptr + row, -slope * total * tl.exp(-excess))
    if HAS_DERIVATIVE:
        label = tl.load(labels_ptr + row)
        of_label = factor * slope * (others / s)
        of_rest = -factor * rest
        for block in range(0, n_columns, BLOCK_H):
            columns = block + tl.arange(0, BLOCK_H)
            mask = columns < n_columns
            pointers = derivative_ptr + row * stride_dn + columns
            w_row = weight_ptr + label * stride_wv
            w = tl.load(w_row + columns.to(tl.int64) * stride_wh, mask=mask, other=0.0)
            w = round_to(w.to(tl.float32), COMPUTE_DTYPE).to(tl.float32)
            a = tl.load(pointers, mask=mask, other=0.0)
            tl.store(pointers, of_rest * a + of_label * w, mask=mask)


def finish(
    maximum: torch.Tensor,  # (n,) float32
    total: torch.Tensor,  # (n,)
    label_logit: torch.Tensor,  # (n,)
    label_slope: torch.Tensor,  # (n,)
    labels: torch.Tensor,  # (n,) int64
    logps: torch.Tensor,  # (n,), out
    unit: torch.Tensor | None = None,  # (n,), out, as the next two; None: no gradient of the head
    share: torch.Tensor | None = None,  # (n,)
    label_value: torch.Tensor | None = None,  # (n,)
    derivative: torch.Tensor | None = None,  # (n, H) float32, in: A, out: D; None: neither
    weight: torch.Tensor | None = None,  # (V, H)
    *,
    factor: float = 1.0,  # c
    compute_dtype: torch.dtype = torch.float32,  # that the weight is rounded to
    operand_dtype: torch.dtype = torch.float32,  # that must hold a row's sum
) -> None:
    """Finish a fold; one launch."""
    check_vectors(
        maximum=maximum,
        total=total,
        label_logit=label_logit,
        label_slope=label_slope,
        labels=labels,
        logps=logps,
        unit=unit,
        share=share,
        label_value=label_value,
    )
    stride_dn = stride_wv = stride_wh = columns = 0
    if derivative is not None:
        if weight is None:
            raise ValueError("derivative was given without weight")
        check_rows("derivative", derivative)
        stride_dn, columns = derivative.stride(0), derivative.shape[1]
        stride_wv, stride_wh = weight.stride()
    n = maximum.shape[0]
    if n == 0:
        return
    config = row_config(columns)
    count("finish")
    with on_device_of(maximum):
        _finish_kernel[(n,)](
            maximum,
            total,
            label_logit,
            label_slope,
            labels,
            logps,
            unit,
            share,
            label_value,
            derivative,
            stride_dn,
            weight,
            stride_wv,
            stride_wh,
            columns,
            float(factor),
            torch.finfo(operand_dtype).max / 4,
            HAS_HEAD=unit is not None,
            HAS_DERIVATIVE=derivative is not None,
            COMPUTE_DTYPE=_DTYPES[compute_dtype],
            BLOCK_H=config.block,
            num_warps=config.num_warps,
        )
