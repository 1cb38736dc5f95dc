"""A call of the operator: plans checked arguments, runs the plan, and puts results in their places.

`linear_logprobs`, `linear_kl`, the loss and `compiled` share this: the backend and the workspace
for a device, and the run itself. If memory runs out, the run is tried again with half the workspace
(`memory`).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from types import ModuleType

import torch
from torch import Tensor

from prefkern.ops import memory, passes, plain, plan, sequences, torch_tiles, workspace
from prefkern.ops.autograd import Call, Result, scored_logprobs
from prefkern.ops.operands import Head, Transform
from prefkern.ops.shards import VocabShard
from prefkern.ops.tile_ops import TileOps


def run(
    head: Head,
    scored: sequences.Scored,
    transform: Transform,
    workspace_mb: float | None,
    backend: str,
    *,
    reference: Head | None = None,
    with_stats: bool = False,
    with_divergence: bool = False,
    shard: VocabShard | None = None,
) -> tuple[Result, plan.Plan]:
    """Plan and run checked arguments, twice if memory runs out. Returns the plan that ran, too.

    Args:
        shard: the part of the vocabulary that the heads have. Then the ranks have agreed upon the
            call, and none tries twice: the others would wait for it.
        reference: a reference's states and head. Its own head is used only with a divergence;
            without one it must be the policy's (`same_head`).
    """
    reference = None if reference is None else reference.detach()
    if with_divergence and reference is not None:
        head, reference = head.unrounded(), reference.unrounded()
    gradients = wanted_gradients(head)
    product_row = None
    if backend == "triton" and not (gradients.states or gradients.head or with_stats):
        is_plain = head.operands.of_logits == head.hidden.dtype == head.weight.dtype
        if is_plain and reference is None and head.low_rank is None and shard is None:
            kernels = _kernels()
            assert kernels is not None
            plain = head.bias is None and transform.softcap is None
            product_row = kernels.product_fold_row(head.hidden, head.weight, plain)
    ref_size = None
    if reference is not None:
        ref_size = reference.size if with_divergence else head.size
    plan_of = functools.partial(
        plan.make_plan,
        tokens=scored.count,
        vocab_size=head.weight.shape[0],
        head=head.size,
        gradients=gradients,
        backend=backend,
        has_softcap=transform.softcap is not None,
        with_stats=with_stats,
        reference=ref_size,
        with_divergence=with_divergence,
        product_row=product_row,
        is_shard=shard is not None,
    )
    most_again_mb = math.inf
    if workspace_mb is None:
        device, entries = head.hidden.device, head.weight.shape[0]
        workspace_mb = workspace.workspace_of_call(
            device, scored.count, entries, head.size, gradients, with_divergence
        )
        most_again_mb = workspace.default_workspace_mb(device)
    made = plan_of(workspace_mb=workspace_mb)
    plan.record(made)
    retries = shard is None and not sequences.is_capturing(head.hidden)
    budget = memory.Budget(workspace_mb, plan_of, plan.recorder(), retries, most_again_mb)
    places = None
    # Ranks of one head have plans of their own, and one order of tokens.
    splits = shard is not None or passes.splits_tokens(made)
    if head.operands.rounds and scored.live is None and splits:
        scored, places = scored.mixed()
    head = head.through(scored.cleared)
    reference = None if reference is None else reference.through(scored.cleared)
    ref_operands = None if reference is None else reference.operands
    ops = tile_operations(backend)
    labels = scored.labels if shard is None else scored.labels - shard.start

    def attempt(made: plan.Plan) -> Result:
        call = Call(transform, head.operands, ref_operands, made, ops, with_stats, budget, shard)
        return scored_logprobs(head, reference, scored.rows, labels, call)

    result, made = budget.attempt(attempt, made, "forward")
    if scored.live is not None:
        result = result.each(scored.masked)
    if places is not None:
        result = result.each(lambda values: values.index_select(0, places))
    return result, made


def wanted_gradients(head: Head) -> plan.Gradients:
    if not torch.is_grad_enabled():
        return plan.Gradients(False, False, False)
    low_rank = head.low_rank
    return plan.Gradients(
        head.hidden.requires_grad,
        head.weight.requires_grad,
        head.bias is not None and head.bias.requires_grad,
        low_rank is not None and low_rank.hidden.requires_grad,
        low_rank is not None and low_rank.weight.requires_grad,
    )


def place(values: Tensor, rows: Tensor | None, shape: torch.Size) -> Tensor:  # (N,) -> (...)
    """Values of scored tokens at their places, 0 elsewhere."""
    if rows is not None:
        values = values.new_zeros(shape.numel()).index_copy(0, rows, values)
    return values.view(shape)


def check_workspace(workspace_mb: float | None) -> None:
    if workspace_mb is not None:
        plain.positive("workspace_mb", workspace_mb)


def resolve_workspace(workspace_mb: float | None, device: torch.device, trains_head: bool) -> float:
    """The bound for a call of any size: a compiled one may be of many."""
    check_workspace(workspace_mb)
    if workspace_mb is None:
        return workspace.default_workspace_mb(device, trains_head)
    return float(workspace_mb)


def resolve_backend(
    backend: str | None,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    name: str = "hidden",
) -> str:
    """The backend to run: the one asked for, if it can run on the device, or the device's own.

    `name` is the name of the argument that has the dtype, for the message.
    """
    if backend is None:
        has_kernels = device.type == "cuda" and dtype != torch.float64 and _kernels() is not None
        return "triton" if has_kernels else "torch"
    if backend not in plain.BACKENDS:
        known = ", ".join(map(repr, plain.BACKENDS))
        raise ValueError(f"backend must be None or one of {known}, got {backend!r}")
    if backend == "triton":
        if dtype == torch.float64:
            raise TypeError(
                f"{name} is float64, and backend='triton' does not compute in float64; "
                "pass backend='torch' or None, or float32, bfloat16 or float16"
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
    """The Triton kernels; None if triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("prefkern_kernels")


def tile_operations(backend: str) -> TileOps:
    """The backend's functions on tiles."""
    kernels = _kernels() if backend == "triton" else torch_tiles
    assert kernels is not None
    return kernels  # pyright: ignore[reportReturnType]
