"""Checks of what an objective is given: its hyper-parameters, and the tensors of a batch.

Each error names the argument, what it must be and what was given.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# Hyper-parameters beyond these have no use, and their products and reciprocals would leave float32.
LARGEST = 1e6
LEAST = 1e-12


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


def shown(value: object) -> str:
    """A value as an error message shows it: at most 80 characters."""
    return f"{value!r}"[:80]


def require_number(name: str, value: Any) -> float:
    if not is_number(value) or abs(value) > LARGEST:
        raise ValueError(
            f"{name} must be a finite number, within +-{LARGEST:g}, got {shown(value)}"
        )
    return float(value)


def require_positive(name: str, value: Any) -> float:
    if not is_number(value) or not LEAST <= value <= LARGEST:
        raise ValueError(
            f"{name} must be a finite number > 0, from {LEAST:g} to {LARGEST:g}, got {shown(value)}"
        )
    return float(value)


def require_not_negative(name: str, value: Any) -> float:
    if not is_number(value) or not 0 <= value <= LARGEST:
        raise ValueError(
            f"{name} must be a finite number >= 0, at most {LARGEST:g}, got {shown(value)}"
        )
    return float(value)


def require_below(name: str, value: Any, end: float) -> float:
    """A number in [0, end)."""
    if not (is_number(value) and 0 <= value < end):
        raise ValueError(f"{name} must be in [0, {end:g}), got {shown(value)}")
    return float(value)


def require_between(name: str, value: Any, end: float) -> float:
    """A number in (0, end), not below the least one that float32 keeps."""
    if not (is_number(value) and LEAST <= value < end):
        raise ValueError(f"{name} must be in (0, {end:g}), from {LEAST:g} on, got {shown(value)}")
    return float(value)


def require_share(name: str, value: Any) -> float:
    """A number in [0, 1]."""
    if not (is_number(value) and 0 <= value <= 1):
        raise ValueError(f"{name} must be in [0, 1], got {shown(value)}")
    return float(value)


def require_int(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {shown(value)}")
    return value


def require_bool(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def require_one_of(name: str, value: object, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return str(value)


def require_kind(name: str, value: Any, kind: type) -> None:
    """Raise TypeError unless a value is the dataclass that an objective reads."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {kind.__name__}, got {value!r}"[:200])


def require_vectors(values: Any, names: list[str], required: tuple[str, ...], size: str) -> None:
    """Check that the fields of a frozen dataclass have one shape and one device.

    Raises half precision to float32. Lengths and margins may be integers; a field called
    `desirable` is bool.
    """
    first = getattr(values, names[0])
    for name in names:
        value = getattr(values, name)
        if value is None and name not in required:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor of shape [{size}], got {value!r}")
        if value.is_nested or value.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor of shape [{size}]")
        if value.ndim != 1 or value.shape != first.shape:
            raise ValueError(
                f"{name} must have the shape [{size}] of {names[0]}, "
                f"{list(first.shape)}, got {list(value.shape)}"
            )
        if value.device != first.device:
            raise ValueError(f"{name} is on {value.device} and {names[0]} on {first.device}")
        if name == "desirable":
            if value.dtype != torch.bool:
                raise TypeError(f"desirable must be a bool tensor, got {value.dtype}")
            continue
        may_be_integers = name.endswith("_lengths") or name == "reward_margins"
        is_integer = not (
            value.is_floating_point() or value.is_complex() or value.dtype == torch.bool
        )
        if not value.is_floating_point() and not (may_be_integers and is_integer):
            raise TypeError(f"{name} must be a floating-point tensor, got {value.dtype}")
        if value.dtype in (torch.float16, torch.bfloat16):
            object.__setattr__(values, name, value.float())
        elif is_integer:
            # A difference of small unsigned integers would wrap.
            object.__setattr__(values, name, value.long())
