"""Breaks the source on purpose, one fault at a time: a check that cannot fail shows nothing.

Each fault is a context, a case that runs in it, and a part of the text by which it must be named.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import prefkern_kernels as kernels
from prefkern.ops import backward, call, operands, passes, sequences
from prefkern.ops.fold_state import FoldState
from tracing import cases, machine
from tracing.cases import Case

# By name: the package has its function under that of the file.
_FINISH: Any = sys.modules["prefkern_kernels.finish"]


@dataclass(frozen=True)
class Fault:
    name: str
    inject: Callable[[], contextlib.AbstractContextManager]
    said: str  # by a finding
    case: Case


def _replaced(module: Any, name: str, change: Callable[..., Any]) -> Callable[[], Any]:
    """A context in which `module.name` is `change(original, *arguments)`."""

    def context() -> Any:
        original = getattr(module, name)
        return mock.patch.object(
            module, name, lambda *args, **kwargs: change(original, *args, **kwargs)
        )

    return context


def _everywhere(name: str, function: Callable[..., Any]) -> Callable[[], Any]:
    """A context in which the products of the operator are another function."""

    def context() -> Any:
        stack = contextlib.ExitStack()
        for module in (operands, passes, backward):
            stack.enter_context(mock.patch.object(module, name, function))
        return stack

    return context


def _float32_and_half(a: Tensor, b: Tensor, out: Tensor) -> None:
    torch.mm(a.float(), b, out_dtype=torch.float32, out=out)


def _into_half(a: Tensor, b: Tensor, out: Tensor) -> None:
    torch.mm(a, b, out_dtype=torch.bfloat16, out=out)


def _of_integers(a: Tensor, b: Tensor, out: Tensor) -> None:
    torch.mm(a.to(torch.int32), b.to(torch.int32))


def _of_half_summand(a: Tensor, b: Tensor, out: Tensor) -> None:
    summand = out.to(torch.float16)
    torch.addmm(summand, a, b, out_dtype=torch.float32, out=out)


def _strided(a: Tensor, b: Tensor, out: Tensor) -> None:
    pairs = torch.stack([a, a], 2)
    torch.mm(pairs[:, :, 0], b, out_dtype=torch.float32, out=out)


def _twice(a: Tensor, b: Tensor, out: Tensor) -> None:
    torch.mm(a, b, out_dtype=torch.float32, out=out)
    torch.mm(a, b, out_dtype=torch.float32, out=out)


def _state_of_cpu(original: Callable[..., Any], tokens: int, device: Any, *rest: Any, **more: Any):
    return original(tokens, torch.device("cpu"), *rest, **more)


def _state_of_first_gpu(original: Callable[..., Any], tokens: int, device: Any, *rest, **more: Any):
    return original(tokens, torch.device("cuda"), *rest, **more)


def _rows_by_nonzero(original: Callable[..., Any], labels: Tensor, ignore_index: int, *rest: Any):
    scored = original(labels, ignore_index, *rest)
    (labels != ignore_index).nonzero()
    return scored


def _kernel_without(name: str) -> Callable[[], Any]:
    """A context in which the launcher of `finish` leaves an argument out."""

    class Forgetful:
        def __getitem__(self, grid: Any) -> Callable[..., Any]:
            def launch(*args: Any, **options: Any) -> None:
                options.pop(name)
                kernel.run(*args, grid=grid, warmup=False, **options)

            return launch

    kernel = _FINISH._finish_kernel
    return lambda: mock.patch.object(_FINISH, "_finish_kernel", Forgetful())


def _nowhere() -> Any:
    """Launches of a kernel go to the current device, whatever the tensors'."""
    return mock.patch.object(_FINISH, "on_device_of", lambda _: contextlib.nullcontext())


def all_faults() -> list[Fault]:
    n = cases.B * cases.T
    frozen = Case("faults", "frozen head", lambda: cases.operator(workspace_mb=32), scored=n)
    plain = Case("faults", "frozen head", cases.operator, scored=n // 2)
    place = _replaced_place
    return [
        Fault("a state of the CPU", _replaced(FoldState, "empty", _state_of_cpu),
              "_fold_kernel: maximum_ptr is on cpu", plain),
        Fault("a state of another GPU", _replaced(FoldState, "empty", _state_of_first_gpu),
              "_fold_kernel: maximum_ptr is on cuda:0", plain),
        Fault("a launch on the current GPU", _nowhere, "it goes to cuda:0", plain),
        Fault("a launch without an argument", _kernel_without("BLOCK_H"),
              "BLOCK_H is not given", plain),
        Fault("a fold too many", _replaced(kernels, "fold", _again),
              "launches of _fold_kernel, the plan promises", frozen),
        Fault("operands of two dtypes", _everywhere("product", _float32_and_half),
              "operands of float32 and bfloat16", plain),
        Fault("a result of another dtype", _everywhere("product", _into_half),
              "a result of float32 where bfloat16 is made", plain),
        Fault("a product of integers", _everywhere("product", _of_integers),
              "no product of int32 operands", plain),
        Fault("a summand of a third dtype", _everywhere("add_product", _of_half_summand),
              "a summand of float16", Case("faults", "trained head", lambda: cases.operator(
                  head=True, workspace_mb=32), scored=n)),
        Fault("an operand with gaps", _everywhere("product", _strided),
              "a copy of the operand", plain),
        Fault("a product too many", _everywhere("product", _twice),
              "products, the plan promises", plain),
        Fault("a number read", place(lambda x: x * (x.sum().item() or 1)),
              "_local_scalar_dense", plain),
        Fault("a branch on a number", place(lambda x: x if x.sum() > 0 else -x),
              "_local_scalar_dense", plain),
        Fault("a list read", place(lambda x: x.tolist() and x), "linear_logprobs (tolist)", plain),
        Fault("places of what is not 0", _replaced(sequences, "select", _rows_by_nonzero),
              "(nonzero)", plain),
        Fault("a choice by a mask", place(lambda x: x + x[x < 0].sum()), "(index)", plain),
        Fault("a way over the CPU", place(lambda x: x.cpu().to(machine.DEVICE)),
              "a copy from cuda to cpu", plain),
        Fault("numbers of the host", place(
            lambda x: x + torch.tensor([1.0], device=machine.DEVICE)),
              "a copy from cpu to cuda", plain),
        Fault("a tensor of the CPU", place(lambda x: x + torch.ones(x.shape)),
              "a tensor of the CPU", plain),
        Fault("a tensor on another GPU", place(
            lambda x: x * torch.ones((), device="cuda")), "cuda:0", plain),
    ]  # fmt: skip


def _again(original: Callable[..., Any], *args: Any, **keywords: Any) -> None:
    original(*args, **keywords)
    original(*args, **keywords)


def _replaced_place(change: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
    """A context in which log-probs go through `change` before they are put in their places."""

    def changed(original: Callable[..., Any], values: Tensor, *rest: Any) -> Tensor:
        return original(change(values), *rest)

    return _replaced(call, "place", changed)
