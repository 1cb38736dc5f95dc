"""A machine that says it has a GPU, and puts every tensor for it on the CPU.

Code that measures on a GPU has branches of its own: events, the allocator's counters, names of the
device. Inside `cuda_on_cpu` they run, with real numbers, on a machine without one: `torch.device`
says "cuda", tensors that are made there or moved there stay on the CPU, and the functions of
`torch.cuda` that bench/ calls have stand-ins, each of which notes that it was called. What a stand-in
cannot show is whether the real function takes these arguments; so each is bound to the real one's
signature.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Self

import pytest
import torch
from torch.overrides import TorchFunctionMode

NAME, MEMORY = "NVIDIA H200", 141 * 10**9
PROPERTIES = SimpleNamespace(
    name=NAME, major=9, minor=0, total_memory=MEMORY, multi_processor_count=132,
    L2_cache_size=50 * 2**20,
)  # fmt: skip


def _placed(value: Any) -> Any:
    is_gpu = isinstance(value, str | torch.device) and str(value).startswith("cuda")
    return torch.device("cpu") if is_gpu else value


class _OnCpu(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        given = {key: _placed(value) for key, value in (kwargs or {}).items()}
        return func(*map(_placed, args), **given)


class Event:
    """`torch.cuda.Event`: the wall clock at `record`."""

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing
        self._at = 0.0

    def record(self) -> None:
        self._at = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end._at - self._at)


@contextmanager
def cuda_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Runs what is inside on such a machine; the names of the functions that were called."""
    called: list[str] = []

    def replace(name: str, stand_in: Callable[..., Any]) -> None:
        real = inspect.signature(getattr(torch.cuda, name))

        def noted(*args: Any, **kwargs: Any) -> Any:
            real.bind(*args, **kwargs)
            called.append(name)
            return stand_in(*args, **kwargs)

        monkeypatch.setattr(torch.cuda, name, noted)

    peak = iter(range(0, 10**9, 3 * 2**20))
    replace("is_available", lambda: True)
    replace("get_device_properties", lambda device=None: PROPERTIES)
    replace("get_device_name", lambda device=None: NAME)
    for name in ("synchronize", "reset_peak_memory_stats"):
        replace(name, lambda device=None: None)
    replace("empty_cache", lambda: None)
    replace("memory_allocated", lambda device=None: 0)
    replace("max_memory_allocated", lambda device=None: next(peak))
    monkeypatch.setattr(torch.cuda, "Event", Event)

    class Generator(torch.Generator):
        def __new__(cls, device: Any = "cpu") -> Self:
            return super().__new__(cls, _placed(device))

    monkeypatch.setattr(torch, "Generator", Generator)
    with _OnCpu():
        yield called
