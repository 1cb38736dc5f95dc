"""What CUDA takes: products, launches, and operators that wait for the device.

The products' rules are those of torch's CUDA library (2.11 to 2.15), which says them in its errors:

- operands of one dtype, two dimensions each, inner sizes equal;
- a result of the operands' dtype, or of float32 from bfloat16 or float16 if `out_dtype` asks for it;
- the summand of `addmm` in the dtype of the result or of the operands.

An operand whose rows and columns are both apart in memory is copied before the product, a result is
copied after it: also a finding, since no plan counts that memory.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)
MATRIX_PRODUCTS = ("mm", "addmm", "addmm_")
PRODUCTS = (*MATRIX_PRODUCTS, "bmm", "baddbmm", "addmv", "addmv_", "mv", "dot")
# They give the host a number, or sizes that depend on numbers.
WAITING = (
    *("_local_scalar_dense", "is_nonzero", "item", "equal", "nonzero", "masked_select"),
    *("unique_dim", "unique_consecutive", "_unique", "_unique2", "bincount"),
)
# Operators of torch that start nothing on a device: views, and memory without content.
STARTS_NOTHING = {
    *("_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "empty", "empty_like"),
    *("empty_strided", "expand", "new_empty", "new_empty_strided", "select", "slice", "split"),
    *("split_with_sizes", "squeeze", "t", "transpose", "permute", "unbind", "unsqueeze", "view"),
    *("view_as", "lift_fresh", "device", "set_", "resize_"),
}
# A grid's largest sizes.
_GRID = (2**31 - 1, 65535, 65535)


def product_faults(name: str, arguments: Mapping[str, Any]) -> list[str]:
    """What CUDA does not take about a product, by its arguments' names in torch's schema."""
    summand = arguments.get("self") if name.startswith(("addmm", "baddbmm", "addmv")) else None
    if summand is None:
        operands = [x for x in arguments.values() if isinstance(x, Tensor)][:2]
    else:
        operands = [arguments[key] for key in _factors(arguments)]
    a, b = operands
    asked = arguments.get("out_dtype")
    result = arguments.get("out")
    if result is None and name.endswith("_"):
        result = summand
    faults = []
    if a.dtype != b.dtype:
        faults.append(f"operands of {_of(a)} and {_of(b)}")
    if a.dtype not in (*HALVES, torch.float32, torch.float64):
        faults.append(f"no product of {_of(a)} operands")
    if a.shape[-1] != b.shape[-min(b.ndim, 2)]:
        faults.append(f"sizes {list(a.shape)} and {list(b.shape)}")
    dtype = asked or a.dtype
    if dtype != a.dtype and not (dtype == torch.float32 and a.dtype in HALVES):
        faults.append(f"{_name(dtype)} out_dtype of {_of(a)} operands")
    if result is not None and result.dtype != dtype:
        faults.append(f"a result of {_of(result)} where {_name(dtype)} is made")
    if summand is not None and summand.dtype not in (dtype, a.dtype):
        faults.append(f"a summand of {_of(summand)} to a product of {_name(dtype)}")
    matrices = [("operand", a), ("operand", b), ("result", result)]
    for role, x in matrices:
        if x is not None and x.ndim == 2 and not is_adjacent(x):
            faults.append(f"a copy of the {role} {list(x.shape)} with strides {list(x.stride())}")
    return faults


def operations(arguments: Mapping[str, Any], name: str) -> int:
    """Multiplications and additions of a product of two matrices."""
    if name == "mm":
        a, b = (x for x in list(arguments.values())[:2])
    else:
        a, b = (arguments[key] for key in _factors(arguments))
    return 2 * a.shape[0] * a.shape[1] * b.shape[1]


def _factors(arguments: Mapping[str, Any]) -> list[str]:
    return [key for key in ("mat1", "mat", "batch1", "mat2", "vec", "batch2") if key in arguments]


def is_adjacent(x: Tensor) -> bool:
    """Whether the rows or the columns of a matrix are adjacent in memory, as cuBLAS reads them."""
    (rows, columns), (down, right) = x.shape, x.stride()
    return (right == 1 and down >= max(columns, 1)) or (down == 1 and right >= max(rows, 1))


def launch_faults(
    parameters: Sequence[inspect.Parameter],
    grid: tuple[int, ...],
    given: Mapping[str, Any],
    device: torch.device,
    current: int,
) -> list[str]:
    """What is wrong with a launch: its device, its grid, and its arguments."""
    faults = []
    tensors = {name: x for name, x in given.items() if isinstance(x, Tensor)}
    for name, x in tensors.items():
        if x.device != device:
            faults.append(f"{name} is on {x.device}")
    if current != device.index:
        faults.append(f"it goes to cuda:{current}, its tensors are on {device}")
    for size, largest in zip(grid, _GRID, strict=False):
        if not 1 <= size <= largest:
            faults.append(f"a grid of {grid}")
    missing = [p.name for p in parameters if p.name not in given and p.default is p.empty]
    faults += [f"{name} is not given" for name in missing]
    for name, x in given.items():
        if isinstance(x, float) and math.isfinite(x) and abs(x) > torch.finfo(torch.float32).max:
            faults.append(f"{name}={x} is beyond float32")
    return faults


def _of(x: Tensor) -> str:
    return _name(x.dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
