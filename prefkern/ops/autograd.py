"""The autograd function of the operator: scored tokens' log-probs, differentiable.

What is kept for backward: `D = d logp / d hidden`, (N, H) in float32, where hidden needs a gradient,
so that `dhidden = grad * D` is rounded once; where the head needs one, `passes.HeadTerms` and the
inputs themselves. Nothing saved is ever overwritten: a second backward call with `retain_graph` is
right.

A plain function, in the graph of whatever module's forward calls it, so that the hooks of DDP, FSDP
and PEFT see the parameters as they see any other. Differentiating its gradient raises.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from prefkern.ops import passes
from prefkern.ops.memory import Budget
from prefkern.ops.once import anchors, differentiable_once, refuse_tangents
from prefkern.ops.operands import Head, LowRank, Operands, Transform
from prefkern.ops.plan import Gradients, Plan


@dataclass(frozen=True)
class Call:
    """What a call runs on, beside its tensors."""

    transform: Transform
    operands: Operands
    plan: Plan
    ops: ModuleType
    with_stats: bool
    budget: Budget


@dataclass(frozen=True)
class Result:
    """(N,) each, of the scored tokens; only `logps` carries a gradient."""

    logps: Tensor
    stats: tuple[Tensor, Tensor, Tensor, Tensor] | None  # as `fold_state.statistics`
    ref_logps: Tensor | None

    def masked(self, mask: Callable[[Tensor], Tensor]) -> Result:
        """The same with `mask` applied to everything."""
        stats = None
        if self.stats is not None:
            entropy, mean_logit, is_top1, collision = map(mask, self.stats)
            stats = entropy, mean_logit, is_top1, collision
        ref_logps = None if self.ref_logps is None else mask(self.ref_logps)
        return Result(mask(self.logps), stats, ref_logps)


def scored_logprobs(
    hidden: Tensor,  # (M, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    low_rank: LowRank | None,  # an adapter's part of the head
    ref_hidden: Tensor | None,  # (M, H), a reference's, through the same head
    rows: Tensor | None,  # (N,)
    labels: Tensor,  # (N,)
    call: Call,
) -> Result:
    """Log-probs of the scored tokens; when asked, statistics of them and a reference's log-probs."""
    lora_hidden, lora_weight = (None, None) if low_rank is None else vars(low_rank).values()
    tensors = (hidden, weight, bias, lora_hidden, lora_weight, ref_hidden, rows, labels)
    refuse_tangents(hidden=hidden, weight=weight, bias=bias)
    if call.plan.structure == "forward":
        with torch.no_grad():
            passed = _forward(*tensors, call)
        return Result(passed.logps, passed.stats, passed.ref_logps)
    once = anchors(hidden, weight, bias, lora_hidden, lora_weight)
    logps, ref_logps, *stats = _LinearLogprobs.apply(*tensors, call, once)
    return Result(logps, (stats[0], stats[1], stats[2], stats[3]) if stats else None, ref_logps)


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_hidden: Tensor | None,
        lora_weight: Tensor | None,
        ref_hidden: Tensor | None,
        rows: Tensor | None,
        labels: Tensor,
        call: Call,
        once: tuple[Tensor, ...],
    ) -> tuple[Tensor | None, ...]:
        operands = (hidden, weight, bias, lora_hidden, lora_weight)
        passed = _forward(*operands, ref_hidden, rows, labels, call)
        ctx.set_materialize_grads(False)
        ctx.call, ctx.anchors = call, once
        ctx.states = [(x.shape, x.dtype) for x in (hidden, lora_hidden) if x is not None]
        saved: tuple[Tensor | None, ...] = (passed.derivative, rows)
        ctx.kept_at = None
        if passed.terms is not None:
            storage = passed.terms.kept.untyped_storage()
            ctx.kept_at = (storage.data_ptr(), storage.nbytes())
            saved += (labels, *operands, *vars(passed.terms).values())
        ctx.save_for_backward(*saved)
        constant = (passed.ref_logps, *(passed.stats or ()))
        ctx.mark_non_differentiable(*(x for x in constant if x is not None))
        return passed.logps, *constant

    @staticmethod
    @differentiable_once
    def backward(ctx, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 10
        budget, grad = ctx.call.budget, grad.to(ctx.call.operands.wide).resolve_neg()

        def again(workspace_mb: float) -> Plan:
            """Recompute what was kept, and give its memory back, for a second backward as well."""
            if ctx.kept_at is not None:
                storage = ctx.saved_tensors[-1].untyped_storage()
                # What a saved-tensor hook has put in its place is not ours.
                if (storage.data_ptr(), storage.nbytes()) == ctx.kept_at:
                    storage.resize_(0)
            made = budget.plan_of(workspace_mb=workspace_mb, kept=0)
            made = replace(made, forward_tiles=ctx.call.plan.forward_tiles)
            ctx.call = replace(ctx.call, plan=made)
            return made

        with without_autocast(grad):
            gradients, _ = budget.attempt(
                lambda plan: _gradients(ctx, grad, plan), ctx.call.plan, "backward", again
            )
        return *gradients, *(None,) * 5


def _gradients(ctx, grad: Tensor, plan: Plan) -> tuple[Tensor | None, ...]:
    """Gradients of hidden, weight, bias and an adapter's two."""
    call, needs = ctx.call, Gradients(*ctx.needs_input_grad[:5])
    derivative, rows, *for_head = ctx.saved_tensors
    dhidden = dlora_hidden = dweight = dbias = dlora_weight = None
    if derivative is not None:
        dhidden, dlora_hidden = _state_gradients(ctx, grad, derivative, rows, needs)
    if for_head:
        labels, hidden, weight, bias, lora_hidden, lora_weight, *terms = for_head
        dweight, dbias, dlora_weight = passes.head_gradient(
            grad,
            _head(hidden, weight, bias, lora_hidden, lora_weight, call),
            rows,
            labels,
            passes.HeadTerms(*terms),
            call.transform,
            plan,
            call.ops,
            needs,
        )
    return dhidden, dweight, dbias, dlora_hidden, dlora_weight


def _state_gradients(
    ctx, grad: Tensor, derivative: Tensor, rows: Tensor | None, needs: Gradients
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of hidden and of an adapter's hidden, each from its columns of D."""
    start, own = ctx.call.plan.state_columns.start, ctx.call.plan.hidden_size

    def gradient(part: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return passes.hidden_gradient(grad, part, rows, shape, dtype, ctx.call.ops)

    dhidden = dlora = None
    if needs.hidden:
        dhidden = gradient(derivative[:, :own], *ctx.states[0])
    if needs.lora_hidden:
        shape, dtype = ctx.states[1]
        dlora = gradient(derivative[:, own - start :][:, : shape[1]], shape, dtype)
    return dhidden, dlora


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    ref_hidden: Tensor | None,
    rows: Tensor | None,
    labels: Tensor,
    call: Call,
) -> passes.Passed:
    reference = None
    if ref_hidden is not None:
        reference = Head(ref_hidden, weight, bias, call.operands)
    with without_autocast(hidden):
        return passes.forward(
            _head(hidden, weight, bias, lora_hidden, lora_weight, call),
            rows,
            labels,
            call.transform,
            call.plan,
            call.ops,
            call.with_stats,
            reference,
        )


def _head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    call: Call,
) -> Head:
    low_rank = None
    if lora_hidden is not None and lora_weight is not None:
        low_rank = LowRank(lora_hidden, lora_weight)
    return Head(hidden, weight, bias, call.operands, low_rank)


def without_autocast(x: Tensor) -> torch.autocast:
    """Operands are cast tile by tile, and nothing else may be: autocast is kept out."""
    return torch.autocast(x.device.type, enabled=False)
