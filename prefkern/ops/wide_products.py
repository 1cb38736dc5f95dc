"""Does a device multiply half-precision operands into a float32 result?

A logit must not be rounded to the operands' dtype. CUDA's library has such products
(`torch.mm(..., out_dtype=torch.float32)`), and so have Intel's XPU and AMD's ROCm, from a version on
that differs by dtype and build. So it is tried, once for each kind of device and dtype, on the
device: 64 x 64 numbers whose sums half precision cannot hold. Where the library refuses, or rounds,
tiles of operands are raised to float32 first: more time and memory, and the same numbers.

Nothing can be tried for a device that this machine does not have (a plan, a fake tensor), or while a
CUDA graph is captured: then CUDA counts as having them, and every other device as not.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from prefkern.ops import cpu

HALVES = (torch.bfloat16, torch.float16)
_SIZE = 64
# 64^2 + 1 and twice that: of 13 bits each, and bfloat16 has 8, float16 11.
_SUM = 4097.0


def has_wide_product(device_type: str, dtype: torch.dtype) -> bool:
    """Whether products of this dtype on such a device have a float32 result."""
    if device_type == "cpu":
        # It has a way of its own.
        return dtype == torch.bfloat16 and cpu.has_wide_product()
    if dtype not in HALVES or device_type == "meta":
        return False
    if not can_try(device_type):
        return device_type == "cuda" and torch.version.hip is None
    return refusal(device_type, dtype) is None


# torch.compile asks once, and takes the answer for a constant.
has_wide_product._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def can_try(device_type: str) -> bool:
    """Whether this machine has such a device, and it runs what it is given at once."""
    try:
        module: Any = torch.get_device_module(device_type)
    except RuntimeError:
        return False
    if not getattr(module, "is_available", bool)():
        return False
    return device_type != "cuda" or not torch.cuda.is_current_stream_capturing()


@functools.cache
def refusal(device_type: str, dtype: torch.dtype) -> str | None:
    """Why a device does not make such products; None if it does."""
    # A thread of its own has no autocast, no dispatch modes and no default device of a caller's.
    with ThreadPoolExecutor(1) as clean:
        return clean.submit(_refusal, device_type, dtype).result()


def _refusal(device_type: str, dtype: torch.dtype) -> str | None:
    a = torch.zeros((_SIZE, _SIZE), dtype=dtype, device=device_type)
    # Each sum is 64 * 64 + 1 * 1.
    a[:, 0], a[:, 1] = _SIZE, 1
    out = torch.empty((_SIZE, _SIZE), dtype=torch.float32, device=device_type)
    try:
        torch.mm(a, a.t(), out_dtype=torch.float32, out=out)
        once = out.clone()
        torch.addmm(out, a, a.t(), out_dtype=torch.float32, out=out)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError) as error:
        # Without the list of backends that torch appends.
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    if bool((once == _SUM).all()) and bool((out == 2 * _SUM).all()):
        return None
    return f"the result is rounded: {once[0, 0].item():g} for {_SUM:g}"
