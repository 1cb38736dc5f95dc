"""Checks of arguments that are plain Python values. They need no torch: see `prefkern.training.options`.

Each error names the argument, what was given and what is expected.
"""

from __future__ import annotations

BACKENDS = ("triton", "torch")


def boolean(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")


def number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    # Finite, in a form that torch.compile can trace if the number is a symbol.
    if value - value != 0 or abs(value) > 1e300:
        raise ValueError(f"{name} must be finite, got {value!r}")


def not_negative(name: str, value: float) -> None:
    number(name, value)
    if value < 0:
        raise ValueError(f"{name} must be >= 0, got {value!r}")


def positive(name: str, value: float) -> None:
    number(name, value)
    if value <= 0:
        raise ValueError(f"{name} must be > 0, got {value!r}")


def share(name: str, value: float) -> None:
    number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value!r}")


def shown(value: object) -> str:
    """A value as an error message shows it: its type, and at most 80 characters in all."""
    return f"{type(value).__name__} {value!r}"[:80]
