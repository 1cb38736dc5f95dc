"""A call of the operator: checked arguments in, a plan made and run, results at their places.

What both operators' public functions, the loss and `torch.compile`'s form share: which backend and
how much workspace a device has, how its operands multiply, and the run itself, which is tried again
with half the workspace where memory runs out (`memory`).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from prefkern.ops import checks, memory, plan, sequences
from prefkern.ops.autograd import Call, Result, scored_logprobs
from prefkern.ops.operands import LowRank, Operands, Transform, as_stored

BACKENDS = ("triton", "torch")


def run(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    scored: sequences.Scored,
    transform: Transform,
    workspace_mb: float,
    backend: str,
    with_stats: bool,
    ref_hidden: Tensor | None = None,  # (..., H), a reference's, through the same head
    low_rank: LowRank | None = None,
) -> tuple[Result, plan.Plan]:
    """Plan and run checked arguments, again where memory runs out; and the plan that ran."""
    hidden, weight = hidden.resolve_neg(), weight.resolve_neg()
    bias, ref_hidden = as_stored(bias), as_stored(ref_hidden)
    if low_rank is not None:
        low_rank = LowRank(low_rank.hidden.resolve_neg(), low_rank.weight.resolve_neg())
    operands = operands_of(hidden)
    gradients = wanted_gradients(hidden, weight, bias, low_rank)
    product_row = None
    if backend == "triton" and not (gradients.states or gradients.head or with_stats):
        is_plain = operands.dtype == hidden.dtype == weight.dtype
        is_plain = is_plain and ref_hidden is None and low_rank is None
        kernels = _kernels()
        assert kernels is not None
        if is_plain:
            plain = bias is None and transform.softcap is None
            product_row = kernels.product_fold_row(hidden, weight, plain)
    plan_of = functools.partial(
        plan.make_plan,
        tokens=scored.count,
        vocab_size=weight.shape[0],
        head=planned_head(hidden, weight, operands, low_rank),
        gradients=gradients,
        backend=backend,
        has_softcap=transform.softcap is not None,
        with_stats=with_stats,
        with_reference=ref_hidden is not None,
        product_row=product_row,
    )
    made = plan_of(workspace_mb=workspace_mb)
    plan.record(made)
    if low_rank is not None:
        flat = low_rank.hidden.reshape(-1, low_rank.hidden.shape[-1])
        low_rank = LowRank(scored.cleared(flat), low_rank.weight)
    budget = memory.Budget(
        workspace_mb, plan_of, plan.recorder(), retries=not sequences.is_capturing(hidden)
    )
    tensors = (
        scored.cleared(hidden.reshape(-1, hidden.shape[-1])),
        weight,
        # Kernels walk the bias word by word: no strides, no expanded views. (V,): a small copy.
        None if bias is None else bias.contiguous(),
        low_rank,
        None if ref_hidden is None else ref_hidden.detach().reshape(-1, ref_hidden.shape[-1]),
        scored.rows,
        scored.labels,
    )
    ops = tile_operations(backend)

    def attempt(made: plan.Plan) -> Result:
        call = Call(transform, operands, made, ops, with_stats, budget)
        return scored_logprobs(*tensors, call)

    result, made = budget.attempt(attempt, made, "forward")
    if scored.live is not None:
        result = result.masked(scored.masked)
    return result, made


def low_rank_of(hidden: Tensor | None, weight: Tensor | None) -> LowRank | None:
    return None if hidden is None or weight is None else LowRank(hidden, weight)


def planned_head(
    hidden: Tensor, weight: Tensor, operands: Operands, low_rank: LowRank | None = None
) -> plan.Head:
    """What the plan must know of a head."""
    return plan.Head(
        weight.shape[1],
        operands.compute_dtype,
        operands.upcasts,
        hidden.dtype,
        weight.dtype,
        0 if low_rank is None else low_rank.weight.shape[1],
    )


def wanted_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, low_rank: LowRank | None = None
) -> plan.Gradients:
    if not torch.is_grad_enabled():
        return plan.Gradients(False, False, False)
    return plan.Gradients(
        hidden.requires_grad,
        weight.requires_grad,
        bias is not None and bias.requires_grad,
        low_rank is not None and low_rank.hidden.requires_grad,
        low_rank is not None and low_rank.weight.requires_grad,
    )


def place(values: Tensor, rows: Tensor | None, shape: torch.Size) -> Tensor:  # (N,) -> (...)
    """Values of scored tokens at their places, 0 elsewhere."""
    if rows is not None:
        values = values.new_zeros(shape.numel()).index_copy(0, rows, values)
    return values.view(shape)


def resolve_workspace(workspace_mb: float | None, device: torch.device) -> float:
    if workspace_mb is None:
        return plan.default_workspace_mb(device)
    checks.positive("workspace_mb", workspace_mb)
    return float(workspace_mb)


def resolve_backend(
    backend: str | None,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    name: str = "hidden",
) -> str:
    """The backend to run: the one asked for, if it can run on the device, or the device's own.

    `name` is of the argument that has the dtype.
    """
    if backend is None:
        has_kernels = device.type == "cuda" and dtype != torch.float64 and _kernels() is not None
        return "triton" if has_kernels else "torch"
    if backend not in BACKENDS:
        known = ", ".join(map(repr, BACKENDS))
        raise ValueError(f"backend must be None or one of {known}, got {backend!r}")
    if backend == "triton":
        if dtype == torch.float64:
            raise TypeError(
                f"{name} is float64, which backend='torch' computes in, and backend='triton' not; "
                "give backend='torch' or None, or float32, bfloat16 or float16"
            )
        kernels = _kernels()
        if kernels is None:
            raise RuntimeError("backend='triton' was asked for, but triton is not installed")
        if device.type != "cuda" and not kernels.INTERPRET:
            place = "hidden is on" if name == "hidden" else "device is"
            raise RuntimeError(
                f"backend='triton' needs a GPU, and {place} {device.type}; "
                "set TRITON_INTERPRET=1 before importing to run its kernels on a CPU"
            )
    return backend


@functools.cache
def _kernels() -> ModuleType | None:
    """The Triton kernels, or None where triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("prefkern_kernels")


def tile_operations(backend: str, twin: str = "prefkern.ops.torch_tiles") -> ModuleType:
    """The backend's functions on tiles; `twin` names the module that has them in torch."""
    if backend == "triton":
        kernels = _kernels()
        assert kernels is not None
        return kernels
    return importlib.import_module(twin)


def operands_of(hidden: Tensor) -> Operands:
    """How a call with these hidden states multiplies, autocast included."""
    device = hidden.device.type
    # Autocast leaves float64 as it is.
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return operands_for(torch.get_autocast_dtype(device), device)
    return operands_for(hidden.dtype, device)


def operands_for(dtype: torch.dtype, device_type: str) -> Operands:
    # Only CUDA's libraries have products of half-precision operands with a float32 result.
    has_wide_product = device_type == "cuda" and torch.version.hip is None
    is_half = dtype in (torch.bfloat16, torch.float16)
    return Operands(dtype, upcasts=is_half and not has_wide_product)
