"""A machine with two GPUs, pretended: what torch and Triton answer when they are asked.

A CUDA build of torch knows the operators that CUDA has, and a fake tensor has a device, a dtype, a
shape and strides, and no memory. The calls run on the second GPU while the first one is current: a
tensor that is made on the wrong one, or a launch that goes there, is seen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from prefkern.ops import wide_products
from tracing import engine

DEVICE = torch.device("cuda:1")
# Of an H200, as its driver reports it.
PROPERTIES = SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    total_memory=139 * 2**30,
    multi_processor_count=132,
    L2_cache_size=60 * 2**20,
    shared_memory_per_block_optin=232448,
    gcnArchName="",
)

# Storages of the host that a copy to the GPU need not wait for.
pinned: set[int] = set()
_current: list[int] = [0]
_addresses: dict[int, int] = {}
_kept: list[Any] = []


class CurrentDevice:
    """Stands for `torch.cuda.device`: a context in which another device is the current one."""

    def __init__(self, device: torch.device | int) -> None:
        index = device if isinstance(device, int) else device.index
        self._index = 0 if index is None else index

    def __enter__(self) -> None:
        _current.append(self._index)

    def __exit__(self, *_: object) -> None:
        _current.pop()


def current_device() -> int:
    return _current[-1]


def address(x: Tensor) -> int:
    """A number that views of one storage share, at a distance of their offsets; 512-byte blocks."""
    storage = x.untyped_storage()
    key = storage._cdata
    if key not in _addresses:
        # The number of a storage that is gone must not be another one's.
        _kept.append(storage)
        last = max(_addresses.values(), default=0)
        _addresses[key] = last + 2**40
    return _addresses[key] + x.storage_offset() * x.element_size()


@contextlib.contextmanager
def pretended() -> Iterator[None]:
    """In this context torch answers as if the machine had the GPUs, and tensors are fake."""
    if not torch.backends.cuda.is_built():
        raise RuntimeError("the trace needs a CUDA build of torch (a GPU it does not need)")
    torch._C._ensureCUDADeviceGuardSet()
    real_pointer = Tensor.data_ptr
    pinned.clear()

    def data_ptr(x: Tensor) -> int:
        return address(x) if isinstance(x, FakeTensor) else real_pointer(x)

    def pin_memory(x: Tensor) -> Tensor:
        copy = x.clone()
        pinned.add(copy.untyped_storage()._cdata)
        return copy

    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "current_device": current_device,
        "get_device_properties": lambda device=None: PROPERTIES,
        "get_device_capability": lambda device=None: (PROPERTIES.major, PROPERTIES.minor),
        "get_device_name": lambda device=None: PROPERTIES.name,
        "is_current_stream_capturing": lambda: False,
        "is_bf16_supported": lambda including_emulation=True: True,
        "device": CurrentDevice,
    }
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(mock.patch.object(fake_tensor, "init_gpu_context", lambda *_: None))
        stack.enter_context(mock.patch.object(Tensor, "data_ptr", data_ptr))
        stack.enter_context(mock.patch.object(Tensor, "pin_memory", pin_memory))
        # What a GPU with such products answers; `without_wide_products` is another one.
        stack.enter_context(mock.patch.object(wide_products, "refusal", lambda *_: None))
        stack.enter_context(mock.patch.object(torch.autograd, "grad", engine.grad))
        stack.enter_context(mock.patch.object(Tensor, "backward", engine.backward))
        stack.enter_context(FakeTensorMode())
        try:
            yield
        finally:
            _addresses.clear()
            _kept.clear()
