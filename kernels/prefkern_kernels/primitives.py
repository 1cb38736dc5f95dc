"""Small jitted functions that the kernels share, right both on a GPU and in Triton's interpreter.

The kernels run compiled on GPUs and, for tests, under Triton's interpreter on a CPU. Some things
differ there: `libdevice.tanh` and `log1p` are missing, and stores to bf16 truncate instead of
rounding. `tanh_and_slope`, `log1p` and `round_to` are right in both.
"""

from __future__ import annotations

import contextlib
import os

import torch
import triton
import triton.language as tl

# Read when the kernels are defined, as Triton itself does.
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
_INTERPRET = tl.constexpr(INTERPRET)


@triton.jit
def tanh_and_slope(x):
    """tanh(x) and its derivative 1 - tanh(x)^2, to float32 accuracy at every x."""
    e = tl.exp(-2.0 * tl.abs(x))
    # One reciprocal for both quotients: a division takes many instructions.
    r = 1.0 / (1.0 + e)
    t = (1.0 - e) * r
    t = tl.where(x < 0, -t, t)
    # Near 0 the quotient cancels; take tanh's series there. Its next term is below 2e-8 of x.
    s = x * x
    fifth = 62.0 / 2835 + s * (-1382.0 / 155925)
    series = x * (1.0 + s * (-1.0 / 3 + s * (2.0 / 15 + s * (-17.0 / 315 + s * fifth))))
    t = tl.where(tl.abs(x) < 0.35, series, t)
    return t, 4.0 * e * r * r


@triton.jit
def transform(z, logit_scale, softcap, temperature, HAS_SOFTCAP: tl.constexpr):
    """Transformed logits, and t in `d transform / d z = logit_scale / temperature * t`."""
    if HAS_SOFTCAP:
        t, slope = tanh_and_slope(z * (logit_scale / softcap))
        return t * (softcap / temperature), slope
    return z * (logit_scale / temperature), tl.full(z.shape, 1.0, tl.float32)


@triton.jit
def load_logits(
    row_ptr,
    bias_ptr,
    entries,
    mask,
    logit_scale,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """`transform` of a block of a row of raw products; where masked out, any number."""
    z = tl.load(row_ptr + entries, mask=mask, other=0.0)
    if HAS_BIAS:
        z += tl.load(bias_ptr + entries, mask=mask, other=0.0).to(tl.float32)
    return transform(z, logit_scale, softcap, temperature, HAS_SOFTCAP)


@triton.jit
def log1p(y):
    """log(1 + y) for y > -1, without losing a small y."""
    u = 1.0 + y
    # log(u) / (u - 1) varies so slowly that the rounding of u cancels in it.
    return tl.where(u == 1.0, y, tl.log(u) * (y / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def one_minus_exp(x):
    """1 - exp(x) for x < 0, to float32 accuracy down to the smallest x."""
    # Below 1/2 the difference cancels; take the series of expm1 there. Its next term is 1e-8 of x.
    s = 1.0 + x * (1.0 / 7) * (1.0 + x * (1.0 / 8))
    s = 1.0 + x * (1.0 / 4) * (1.0 + x * (1.0 / 5) * (1.0 + x * (1.0 / 6) * s))
    s = x * (1.0 + x * (1.0 / 2) * (1.0 + x * (1.0 / 3) * s))
    return tl.where(x > -0.5, -s, 1.0 - tl.exp(x))


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """Round float32 to `dtype`, to the nearest even."""
    if _INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


def check_vectors(**vectors: torch.Tensor | None) -> None:
    """Kernels index vectors without a stride."""
    for name, x in vectors.items():
        if x is not None and not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {list(x.stride())}")


def on_device_of(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Make x's device the current one: launches go there, unlike torch's own operators."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def check_rows(name: str, x: torch.Tensor) -> None:
    """Kernels index rows by a stride and assume that a row's elements are adjacent."""
    if x.ndim != 2 or (x.shape[1] > 1 and x.stride(1) != 1):
        raise ValueError(
            f"{name} must be 2-D with unit stride in its last dimension, "
            f"got shape {list(x.shape)}, strides {list(x.stride())}"
        )
