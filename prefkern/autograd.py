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
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from prefkern import passes
from prefkern.once import differentiable_once
from prefkern.operands import Head, Operands, Transform
from prefkern.plan import Plan


@dataclass(frozen=True)
class Call:
    """What a call runs on, beside its tensors."""

    transform: Transform
    operands: Operands
    plan: Plan
    ops: ModuleType
    with_stats: bool


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
    ref_hidden: Tensor | None,  # (M, H), a reference's, through the same head
    rows: Tensor | None,  # (N,)
    labels: Tensor,  # (N,)
    call: Call,
) -> Result:
    """Log-probs of the scored tokens; when asked, statistics of them and a reference's log-probs."""
    tensors = (hidden, weight, bias, ref_hidden, rows, labels)
    if call.plan.structure == "forward":
        with torch.no_grad():
            passed = _forward(*tensors, call)
        return Result(passed.logps, passed.stats, passed.ref_logps)
    logps, ref_logps, *stats = _LinearLogprobs.apply(*tensors, call)
    return Result(logps, (stats[0], stats[1], stats[2], stats[3]) if stats else None, ref_logps)


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ref_hidden: Tensor | None,
        rows: Tensor | None,
        labels: Tensor,
        call: Call,
    ) -> tuple[Tensor | None, ...]:
        passed = _forward(hidden, weight, bias, ref_hidden, rows, labels, call)
        ctx.set_materialize_grads(False)
        ctx.call = call
        ctx.hidden_shape, ctx.hidden_dtype = hidden.shape, hidden.dtype
        saved: tuple[Tensor | None, ...] = (passed.derivative, rows)
        if passed.terms is not None:
            saved += (hidden, weight, bias, labels, *vars(passed.terms).values())
        ctx.save_for_backward(*saved)
        constant = (passed.ref_logps, *(passed.stats or ()))
        ctx.mark_non_differentiable(*(x for x in constant if x is not None))
        return passed.logps, *constant

    @staticmethod
    @differentiable_once
    def backward(ctx, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 7
        call = ctx.call
        grad = grad.float()
        derivative, rows, *for_head = ctx.saved_tensors
        dhidden = dweight = dbias = None
        with without_autocast(grad):
            if derivative is not None:
                dhidden = passes.hidden_gradient(
                    grad, derivative, rows, ctx.hidden_shape, ctx.hidden_dtype, call.ops
                )
            if for_head:
                hidden, weight, bias, labels, *values = for_head
                dweight, dbias = passes.head_gradient(
                    grad,
                    Head(hidden, weight, bias, call.operands),
                    rows,
                    labels,
                    passes.HeadTerms(*values),
                    call.transform,
                    call.plan,
                    call.ops,
                    needs_weight=ctx.needs_input_grad[1],
                    needs_bias=ctx.needs_input_grad[2],
                )
        return dhidden, dweight, dbias, None, None, None, None


def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
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
            Head(hidden, weight, bias, call.operands),
            rows,
            labels,
            call.transform,
            call.plan,
            call.ops,
            call.with_stats,
            reference,
        )


def without_autocast(x: Tensor) -> torch.autocast:
    """Operands are cast tile by tile, and nothing else may be: autocast is kept out."""
    return torch.autocast(x.device.type, enabled=False)
