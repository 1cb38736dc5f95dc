"""Triton's interpreter with a GPU's exponential and quotient: `pytest -p support.gpu_arithmetic`.

For sm_90, Triton 3.6 compiles `tl.exp(x)` to `ex2.approx(x * log2(e))`. The product is rounded, so
the error grows with |x|; the instruction's own is up to 2^-22. `/` becomes `div.full`, which is off
by 2 ulp. (`tl.log` and `tl.div_rn` are accurate.) The interpreter has numpy's, which are accurate to
half an ulp, so a kernel's test may pass there and fail on a GPU. Here both have the errors of a GPU,
as noise that depends on the result's bits alone: runs are bitwise the same. What is exact on a GPU
is exact here: powers of 2, and quotients by them.
"""

from __future__ import annotations

import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
from triton.runtime import interpreter

_LOG2_E = np.float32(1.4426950408889634)
# Between 1 and 2 ulp of float32.
_NOISE = 2.0**-22.5


def _noisy(values: np.ndarray) -> np.ndarray:
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    share = (bits * np.uint64(2654435761) % np.uint64(2**32)).astype(np.float64) / 2**31 - 1
    return values * (1 + _NOISE * share)


def exp(x: np.ndarray) -> np.ndarray:
    if x.dtype != np.float32:
        return np.exp(x)
    with np.errstate(all="ignore"):
        power = np.asarray(x * _LOG2_E, dtype=np.float32)
        exact = np.exp2(power.astype(np.float64))
        return np.where(power == np.round(power), exact, _noisy(exact)).astype(np.float32)


def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        exact = np.divide(a, b)
        if exact.dtype != np.float32:
            return exact
        is_power = np.abs(np.frexp(b)[0]) == 0.5
        wide = np.divide(a.astype(np.float64), b.astype(np.float64))
        return np.where(is_power, exact, _noisy(wide)).astype(np.float32)


def _exp(self: Any, x: Any) -> Any:
    return self.unary_op(x, exp)


def _quotient(self: Any, a: Any, b: Any) -> Any:
    return self.binary_op(a, b, quotient)


interpreter.InterpreterBuilder.create_exp = _exp
interpreter.InterpreterBuilder.create_fdiv = _quotient
