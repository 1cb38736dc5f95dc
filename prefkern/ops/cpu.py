"""What a CPU is fast at: products of bfloat16 operands.

Processors with bfloat16 units (AVX512-BF16, AMX) multiply bfloat16 operands faster than float32 ones.
torch uses them through oneDNN in two ways:

- For bfloat16 tensors. A result is rounded to bfloat16, which is good enough for gradients and not
  for logits.
- For float32 tensors, if it is asked to (`torch.backends.mkldnn.matmul.fp32_precision = "bf16"`)
  and the processor has AMX. Operands are rounded to bfloat16, sums and results are float32. Operands
  that were bfloat16 lose nothing by it.

That setting is one for the whole process. It is made around a single product, and put back. In that
moment a float32 product on another thread is rounded as well, and
`torch.get_float32_matmul_precision()` raises there, since it cannot name the setting.
`PREFKERN_CPU_BF16=0` switches both ways off, and a setting of the user's own is left as it is.
"""

from __future__ import annotations

import functools
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

SWITCH = "PREFKERN_CPU_BF16"

# torch's types do not know its backends' attributes.
_matmul: Any = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]


@functools.cache
def has_bfloat16_units() -> bool:
    """Whether products of bfloat16 tensors are faster than those of float32 ones.

    A processor without such units would emulate them, slower than float32.
    `ONEDNN_MAX_CPU_ISA=AVX2` switches them off, as it does for torch itself.
    """
    if os.environ.get(SWITCH) == "0" or not torch.backends.mkldnn.is_available():
        return False
    # torch has no public name for any of these.
    of_cpu: Any = torch.cpu
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    asked = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", bool)
    return any(getattr(of_cpu, name, bool)() for name in names) and bool(asked())


class _RoundedOperands:
    """A context in which float32 products round their operands to bfloat16, for any thread.

    The first one to enter makes the setting, and the last one to leave puts it back. A process
    forked in between has no thread that would leave, so it begins anew.
    """

    def __init__(self) -> None:
        self._was_unset = False
        self._begin()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._begin)

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._put_back()

    def _put_back(self) -> None:
        # What somebody else has set meanwhile stays.
        if self._was_unset and _matmul.fp32_precision == "bf16":
            _matmul.fp32_precision = "none"
        self._was_unset = False

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                # "none": nobody set it, nor what it follows, `torch.backends.fp32_precision`.
                self._was_unset = _matmul.fp32_precision == "none"
                if self._was_unset:
                    _matmul.fp32_precision = "bf16"
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._put_back()


_rounded_operands = _RoundedOperands()


@functools.cache
def rounds_when_asked() -> bool:
    """Whether the setting has an effect here, tried on operands that bfloat16 cannot hold."""
    if not has_bfloat16_units():
        return False
    # A thread of its own has neither autocast, which would round too, nor a caller's default device
    # and dispatch modes, which would count the product.
    with ThreadPoolExecutor(1) as clean:
        return clean.submit(_rounds).result()


def _rounds() -> bool:
    x = torch.full((128, 128), 1 + 2.0**-12, dtype=torch.float32, device="cpu")
    with _rounded_operands:
        rounded = x @ x
    return bool((rounded == 128.0).all())


def product_of_bfloat16(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """`out = a @ b` for float32 tensors of bfloat16 numbers; the result is not rounded to these."""
    if not rounds_when_asked():
        torch.mm(a, b, out=out)
        return
    with _rounded_operands:
        torch.mm(a, b, out=out)
