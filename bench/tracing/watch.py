"""Sees the operators and launches of a call, and holds them to the rules.

`Watch` is a dispatch mode over fake tensors: each operator of torch passes through it on its way.
Launches of Triton kernels and collectives are recorded and not made. A number that a call reads from
the device is counted with the place that reads it, and gets the case's answer, or a 1.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from tracing import machine, rules

ROOT = Path(__file__).parent.parent.parent
_OWN = (str(ROOT / "prefkern"), str(ROOT / "kernels"))


def place() -> str:
    """Where in prefkern this is: file and function."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(_OWN):
            file = Path(frame.f_code.co_filename).relative_to(ROOT)
            return f"{file}:{frame.f_code.co_name}"
        if "/transformers/" in frame.f_code.co_filename:
            return "transformers"
        frame = frame.f_back
    return "outside of prefkern"


class Watch(TorchDispatchMode):
    """What a call did.

    Args:
        answers: what a place that reads the device gets, by the place.
    """

    def __init__(self, answers: dict[str, list[Any]] | None = None) -> None:
        super().__init__()
        self.answers = answers or {}
        self.findings: list[str] = []
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.products = 0
        self.operations = 0
        self.started: Counter[str] = Counter()
        self.operators: set[str] = set()
        self.collectives: Counter[str] = Counter()

    def found(self, text: str) -> None:
        text = f"{place()}: {text}"
        if text not in self.findings:
            self.findings.append(text)

    def waited(self, what: str) -> None:
        self.waits[f"{place()} ({what})"] += 1

    # Operators of torch

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace != "aten":
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_device = [x for x in given if x.device.type == "cuda"]
        made_on = kwargs.get("device")
        if not on_device and (made_on is None or torch.device(made_on).type != "cuda"):
            return func(*args, **kwargs)
        self.operators.add(str(func))
        self._check_kernel(func)
        arguments = _by_name(func, args, kwargs)
        if name in ("_to_copy", "copy_", "_copy_from"):
            self._check_copy(name, given, kwargs, made_on)
        else:
            self._check_devices(name, on_device, given)
        if name in rules.WAITING or _has_mask(name, arguments):
            self.waited(name)
            answer = _answer(name, on_device[0])
            if answer is not None:
                return answer
        if name in rules.PRODUCTS:
            if place().startswith("prefkern/ops/") and name in rules.MATRIX_PRODUCTS:
                self.products += 1
                self.operations += rules.operations(arguments, name)
            for fault in rules.product_faults(name, arguments):
                self.found(f"{name}: {fault}")
        if name not in rules.STARTS_NOTHING:
            self.started[name] += 1
        if name in ("mm", "addmm") and "out_dtype" in arguments:
            # Not every version of torch has these for fake tensors.
            return _product_of(arguments)
        if name == "_to_copy" and on_device == [] and given:
            # The numbers of a constant would be copied in earnest.
            source = given[0]
            return torch.empty(
                source.shape, dtype=kwargs.get("dtype") or source.dtype, device=made_on
            )
        out = func(*args, **kwargs)
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.device.type == "cuda" and x.device != machine.DEVICE:
                self.found(
                    f"{name}: a tensor is made on {x.device}, the call is on {machine.DEVICE}"
                )
        return out

    def _check_kernel(self, func: Any) -> None:
        if not torch._C._dispatch_has_computed_kernel_for_dispatch_key(func.name(), "CUDA"):
            self.found(f"{func}: CUDA has no such operator")

    def _check_devices(self, name: str, on_device: list[Tensor], given: list[Tensor]) -> None:
        for x in given:
            if x.device.type != "cuda" and on_device:
                self.found(f"{name}: a tensor of the CPU, {list(x.shape)}, meets one of the GPU")
        for x in on_device:
            if x.device != machine.DEVICE:
                self.found(f"{name}: a tensor on {x.device}, the call is on {machine.DEVICE}")

    def _check_copy(self, name: str, given: list[Tensor], kwargs: dict, made_on: Any) -> None:
        source = given[-1]
        target = given[0].device if name == "copy_" else torch.device(made_on or source.device)
        is_pinned = source.untyped_storage()._cdata in machine.pinned
        is_blocking = not (kwargs.get("non_blocking", False) and is_pinned)
        if source.device.type != target.type and is_blocking:
            self.waited(f"a copy from {source.device.type} to {target.type}")

    # Launches, numbers and collectives

    @contextlib.contextmanager
    def recording(self) -> Iterator[Watch]:
        """In this context the call is watched."""
        with (
            mock.patch.object(JITFunction, "run", self._run_of_triton()),
            mock.patch.object(FakeTensor, "tolist", self._tolist()),
            mock.patch.object(torch, "tensor", self._tensor()),
            mock.patch.object(torch.distributed, "all_reduce", self._all_reduce),
            self,
        ):
            yield self

    def _run_of_triton(self) -> Any:
        watch = self

        def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
            given = dict(zip(kernel.arg_names, args, strict=False))
            given |= {name: x for name, x in options.items() if name in kernel.arg_names}
            sizes = grid(given) if callable(grid) else grid
            watch.launches[kernel.__name__] += 1
            flat = {}
            for name, x in given.items():
                # A tensor descriptor holds its tensor.
                flat[name] = getattr(x, "base", x) if not isinstance(x, Tensor) else x
            parameters = [*kernel.signature.parameters.values()]
            for fault in rules.launch_faults(
                parameters, tuple(sizes), flat, machine.DEVICE, machine.current_device()
            ):
                watch.found(f"{kernel.__name__}: {fault}")

        return run

    def _tolist(self) -> Any:
        watch, real = self, FakeTensor.tolist

        def tolist(x: FakeTensor) -> Any:
            if x.device.type != "cuda":
                return real(x)
            watch.waited("tolist")
            answer = watch.answers.get(place())
            return [1] * x.numel() if answer is None else answer[: len(x)]

        return tolist

    def _tensor(self) -> Any:
        watch, real = self, torch.tensor

        def tensor(data: Any, **options: Any) -> Tensor:
            device = options.get("device")
            if device is None or torch.device(device).type != "cuda":
                return real(data, **options)
            watch.waited("a copy from cpu to cuda")
            with unset_fake_temporarily():
                made = real(data, dtype=options.get("dtype"))
            return torch.empty(made.shape, dtype=made.dtype, device=device)

        return tensor

    def _all_reduce(self, x: Tensor, *_: Any, **__: Any) -> None:
        self.collectives[f"{place()}"] += 1
        if x.device != machine.DEVICE or not x.is_contiguous():
            self.found(f"all_reduce: {x.device}, strides {list(x.stride())}")


def _by_name(func: Any, args: tuple, kwargs: dict) -> dict[str, Any]:
    names = [argument.name for argument in func._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _has_mask(name: str, arguments: dict[str, Any]) -> bool:
    """Whether an operator indexes with booleans, whose number it must know."""
    if name not in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return False
    indices = arguments.get("indices") or ()
    return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in indices)


def _answer(name: str, x: Tensor) -> Any:
    if name in ("_local_scalar_dense", "item"):
        return 1.0 if x.dtype.is_floating_point else x.dtype == torch.bool or 1
    if name in ("is_nonzero", "equal"):
        return True
    if name == "nonzero":
        return torch.empty((1, x.ndim), dtype=torch.int64, device=x.device)
    return None


def _product_of(arguments: dict[str, Any]) -> Tensor:
    """The result of a product with `out_dtype`; its numbers do not matter."""
    out = arguments.get("out")
    if out is not None:
        return out
    matrices = [x for x in arguments.values() if isinstance(x, Tensor)][-2:]
    a, b = matrices
    return a.new_empty((a.shape[0], b.shape[1]), dtype=arguments["out_dtype"])
