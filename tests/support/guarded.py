"""Kernel launches with guards around every buffer, so that a stray access is found.

    with guarded.launches() as kernels:
        prefkern.linear_logprobs(...)
    assert kernels["_fold_kernel"]

Each tensor of each launch is replaced by a copy with guards before and after it. If its rows do not
touch, there are guards between them too. Guards hold NaN, or for integers a number outside every
range, so that a value read there shows in the result. After the launch the guards must be
unchanged; then the copies are copied back. With `pads_rows` the launchers get matrices whose rows
do not touch.

In the interpreter every address is also checked before it is used. This finds even a load whose
value is discarded. On a GPU compute-sanitizer does this (`make sanitize`).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib
import inspect
import itertools
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from triton.runtime.jit import KernelInterface
from triton.tools.tensor_descriptor import TensorDescriptor

import prefkern_kernels

# Bytes before and after a buffer: a multiple of every alignment that a launch may rely on.
GUARD = 2**15
LAUNCHERS = (
    "finish", "fold", "pair_loss", "product_fold", "remake_weights", "rescale_rows",
    "scatter_scaled", "settle",
)  # fmt: skip
# Bytes between rows, which keep each row aligned for a tensor descriptor.
_BETWEEN_ROWS = 32


class StrayAccess(AssertionError):
    """A launch read or wrote memory outside of its arguments' elements."""


class Fence:
    """A copy of a tensor, with the same strides, between guards."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.original = tensor
        self.size = tensor.element_size()
        sizes, strides = tensor.shape, tensor.stride()
        last = sum((n - 1) * stride for n, stride in zip(sizes, strides, strict=True))
        self.span = last + 1 if tensor.numel() else 0
        # A launch may be compiled for a pointer divisible by 16: keep the tensor's remainder.
        self.begin = GUARD + tensor.data_ptr() % 16
        # All ones are NaN in each float format.
        self.poison = 0xFF if tensor.is_floating_point() else 0x7F
        length = self.begin + self.span * self.size + GUARD
        self.whole = torch.full((length,), self.poison, dtype=torch.uint8, device=tensor.device)
        inner = self.whole[self.begin : self.begin + self.span * self.size]
        # A view of bytes as another dtype needs an aligned start; set_ on the storage does not.
        self.copy = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(
            self.whole.untyped_storage(), self.begin // self.size, sizes, strides
        )
        assert self.begin % self.size == 0 and inner.data_ptr() == self.copy.data_ptr()
        self.copy.copy_(tensor)
        elements = torch.zeros(self.span, dtype=torch.bool, device=tensor.device)
        elements.as_strided(sizes, strides).fill_(True)
        self.is_element = elements.cpu().numpy()
        self._guards = torch.ones_like(self.whole, dtype=torch.bool)
        self._guards[self.begin : self.begin + self.span * self.size] = (
            ~elements
        ).repeat_interleave(self.size)

    def check(self, kernel: str) -> None:
        changed = (self.whole != self.poison) & self._guards
        if changed.any():
            first = (int(changed.to(torch.uint8).argmax()) - self.begin) // self.size
            raise StrayAccess(
                f"{kernel} wrote {int(changed.sum())} bytes outside of a buffer of "
                f"{list(self.original.shape)}, the first at element {first}"
            )

    def copy_back(self) -> None:
        self.original.copy_(self.copy)


class _Launch:
    """A kernel whose launches get fenced copies of all tensors."""

    def __init__(self, name: str, kernel: Any, launched: collections.Counter[str]) -> None:
        self.name, self.kernel, self.launched = name, kernel, launched

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return functools.partial(self._run, grid)

    def _run(self, grid: Any, *args: Any, **keywords: Any) -> None:
        fences: dict[tuple, Fence] = {}
        args = tuple(_fenced(arg, fences) for arg in args)
        _assert_apart([*fences.values()])
        strays: list[str] = []
        with _watched([*fences.values()], strays):
            try:
                self.kernel[grid](*args, **keywords)
            except Exception as error:
                if strays:
                    raise StrayAccess(f"{self.name} {strays[0]}") from error
                raise
        for fence in fences.values():
            fence.check(self.name)
        for fence in fences.values():
            fence.copy_back()
        self.launched[self.name] += 1


def guard(kernel: Any, name: str = "kernel") -> _Launch:
    """One kernel with guards."""
    return _Launch(name, kernel, collections.Counter())


def kernels() -> dict[tuple[str, str], Any]:
    """All kernels of the package, with (module, name) as keys."""
    found = {}
    for info in pkgutil.iter_modules(prefkern_kernels.__path__):
        module = importlib.import_module(f"prefkern_kernels.{info.name}")
        for name, value in vars(module).items():
            if name.endswith("_kernel") and isinstance(value, KernelInterface):
                found[module.__name__, name] = value
    return found


@contextmanager
def launches(pads_rows: bool = True) -> Iterator[collections.Counter[str]]:
    """Guard all launches of all kernels; yields the number of launches of each kernel."""
    launched: collections.Counter[str] = collections.Counter()
    replaced = []
    for (module, name), kernel in kernels().items():
        replaced.append((importlib.import_module(module), name, _Launch(name, kernel, launched)))
    if pads_rows:
        for name in LAUNCHERS:
            launcher = getattr(prefkern_kernels, name)
            replaced.append((prefkern_kernels, name, _with_padded_rows(launcher)))
    originals = [(owner, name, vars(owner)[name]) for owner, name, _ in replaced]
    try:
        for owner, name, value in replaced:
            setattr(owner, name, value)
        yield launched
    finally:
        for owner, name, value in originals:
            setattr(owner, name, value)


def _fenced(arg: Any, fences: dict[tuple, Fence]) -> Any:
    if isinstance(arg, TensorDescriptor):
        return dataclasses.replace(arg, base=_fenced(arg.base, fences))
    if not isinstance(arg, torch.Tensor):
        return arg
    # A tile may be its own output: two arguments with the same memory share one copy.
    key = (arg.data_ptr(), arg.shape, arg.stride(), arg.dtype)
    if key not in fences:
        fences[key] = Fence(arg)
    return fences[key].copy


def _assert_apart(fences: list[Fence]) -> None:
    """Assert that no buffers overlap partly: separate copies of these would behave differently."""
    ranges = sorted((f.original.data_ptr(), f.span * f.size) for f in fences if f.span)
    for (begin, length), (following, _) in itertools.pairwise(ranges):
        assert begin + length <= following, "two arguments of a launch overlap"


def _with_padded_rows(launcher: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(launcher)

    @functools.wraps(launcher)
    def padded(*args: Any, **keywords: Any) -> Any:
        bound = signature.bind(*args, **keywords)
        copies: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}
        for name, value in bound.arguments.items():
            # The kernel walks the table of maxima as a vector, so its rows must touch.
            is_matrix = isinstance(value, torch.Tensor) and value.ndim == 2 and name != "maxima"
            if not is_matrix or value.stride(1) != 1 or 0 in value.shape:
                continue
            key = (value.data_ptr(), value.shape, value.stride(), value.dtype)
            if key not in copies:
                rows, columns = value.shape
                stride = columns + _BETWEEN_ROWS // value.element_size()
                copy = value.new_empty(rows, stride)[:, :columns]
                copies[key] = value, copy.copy_(value)
            bound.arguments[name] = copies[key][1]
        result = launcher(*bound.args, **bound.kwargs)
        for value, copy in copies.values():
            value.copy_(copy)
        return result

    return padded


@contextmanager
def _watched(fences: list[Fence], strays: list[str]) -> Iterator[None]:
    """In the interpreter, check that every address is an element of one of the fenced tensors."""
    if not prefkern_kernels.INTERPRET:
        yield
        return
    from triton.runtime import interpreter

    real = interpreter._interpreter  # pyright: ignore[reportAttributeAccessIssue]
    interpreter._interpreter = _Watch(real, fences, strays)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        interpreter._interpreter = real  # pyright: ignore[reportAttributeAccessIssue]


class _Watch:
    """The interpreter's memory accesses, each checked before it happens."""

    def __init__(self, real: Any, fences: list[Fence], strays: list[str]) -> None:
        self._real, self._strays = real, strays
        self._fences = sorted((f for f in fences if f.span), key=lambda f: f.copy.data_ptr())
        begins = [fence.copy.data_ptr() for fence in self._fences]
        self._begins = np.array(begins, dtype=np.uint64)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def load(self, pointers: Any, mask: Any, *rest: Any) -> Any:
        self._look(pointers, mask, "read")
        return self._real.load(pointers, mask, *rest)

    def store(self, pointers: Any, value: Any, mask: Any) -> Any:
        self._look(pointers, mask, "wrote")
        return self._real.store(pointers, value, mask)

    def _look(self, pointers: np.ndarray, mask: np.ndarray, verb: str) -> None:
        # A comparison of scalars gives an integer, which would be taken for an index.
        pointers, mask = np.broadcast_arrays(pointers, np.asarray(mask, dtype=bool))
        addresses = pointers[mask].astype(np.uint64).ravel()
        owners = np.searchsorted(self._begins, addresses, side="right") - 1
        for owner in np.unique(owners):
            mine = addresses[owners == owner]
            if owner < 0:
                self._found(f"{verb} before every buffer")
            fence = self._fences[owner]
            offsets = (mine - self._begins[owner]).astype(np.int64) // fence.size
            outside = offsets >= fence.span
            if outside.any():
                of, first = list(fence.original.shape), int(offsets[outside][0])
                self._found(f"{verb} element {first}, past the end of a buffer of {of}")
            if not fence.is_element[offsets].all():
                self._found(f"{verb} between the rows of a buffer of {list(fence.original.shape)}")

    def _found(self, what: str) -> None:
        self._strays.append(what)
        raise StrayAccess(what)
