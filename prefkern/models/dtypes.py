"""The dtype among a model's keywords for `from_pretrained`, by either of its names.

Without a dtype prefkern loads float32. That default must not shadow a dtype that the user gave, so
`torch_dtype`, as older scripts call it, is read as `dtype` before defaults are added.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

_SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def with_dtype(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of `from_pretrained` with `torch_dtype`, the older name, as `dtype`.

    Its value may be a torch.dtype, "auto", or a name: "bfloat16", "torch.bfloat16", "bf16". Raises
    ValueError for another name, and for two different dtypes.
    """
    names = [name for name in ("dtype", "torch_dtype") if kwargs.get(name) is not None]
    dtypes = [dtype_name(name, kwargs[name]) for name in names]
    if len(dtypes) == 2 and dtypes[0] != dtypes[1]:
        raise ValueError(
            f"dtype is {kwargs['dtype']!r} and torch_dtype, its older name, "
            f"{kwargs['torch_dtype']!r}; give one"
        )
    others = {name: value for name, value in kwargs.items() if name not in ("dtype", "torch_dtype")}
    return others | ({"dtype": dtypes[0]} if dtypes else {})


def dtype_name(name: str, value: Any) -> Any:
    """A dtype's own name, "bfloat16"; "auto" and a dict of a model's parts are left as they are."""
    if isinstance(value, dict) or value == "auto":
        return value
    plain = str(value).removeprefix("torch.")
    plain = _SHORT.get(plain, plain)
    dtype = getattr(torch, plain, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(
            f'{name} must be "auto" or a floating dtype such as "bfloat16", got {value!r}'
        )
    return str(dtype).removeprefix("torch.")
