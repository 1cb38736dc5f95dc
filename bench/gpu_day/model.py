"""A profile's kernels beside those of the model of time (`bench/launch_costs.py`), by the model's names.

The model names prefkern's launchers ("fold"), the library's products ("product") and each operator
of torch ("torch copy"). A profile has the names that a GPU's kernels were compiled under. So both
are grouped: by launcher, "product", and "torch" for all others.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

_LAUNCHER = re.compile(r"^_(\w+?)_kernel")
_PRODUCT = re.compile("gemm|gemv|nvjet|cutlass|xmma|cublas|splitK", re.IGNORECASE)


class Group(NamedTuple):
    """Launches and milliseconds of the kernels under one name."""

    launches: int
    ms: float


def call_of(
    model: Mapping[str, Any] | None, device: str, shape: str, task: str
) -> dict[str, Any] | None:
    """The model's call on a device, whose name begins as the model's: "H200 SXM", "NVIDIA H200"."""
    for report in [] if model is None else model["reports"]:
        for call in report.get("calls", []):
            is_it = (call["shape"], call["task"]) == (shape, task)
            if is_it and call["device"].split()[0] in device.split():
                return call
    return None


def measured(kernels: Iterable[Mapping[str, Any]]) -> dict[str, Group]:
    """The groups of a profile."""
    return _grouped(
        (name_of(kernel["kernel"]), kernel["launches"], kernel["us"] / 1e3) for kernel in kernels
    )


def modelled(call: Mapping[str, Any]) -> dict[str, Group]:
    """The groups of a model's call."""
    return _grouped(
        (name.split()[0], kernel["launches"], kernel["ms"])
        for name, kernel in call["kernels"].items()
    )


def name_of(kernel: str) -> str:
    """A kernel's group, by the name that a GPU knows it under."""
    launcher = _LAUNCHER.match(kernel)
    if launcher:
        return launcher[1]
    return "product" if _PRODUCT.search(kernel) else "torch"


def _grouped(rows: Iterable[tuple[str, int, float]]) -> dict[str, Group]:
    found: dict[str, Group] = {}
    for name, launches, ms in rows:
        kept = found.get(name, Group(0, 0.0))
        found[name] = Group(kept.launches + launches, kept.ms + ms)
    return dict(sorted(found.items(), key=lambda item: -item[1].ms))
