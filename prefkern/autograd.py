"""The autograd function of the operator: scored tokens' log-probs, differentiable.

What is kept for backward depends on what needs a gradient. With a frozen head it is
`D = d logp / d hidden`, (N, H) in float32, so that `dhidden = grad * D` is rounded once. With a
trainable head it is the inputs themselves and three numbers a token, from which the tiles are
recomputed. Nothing saved is ever overwritten: a second backward call with `retain_graph` is right.

A plain function, in the graph of whatever module's forward calls it, so that the hooks of DDP, FSDP
and PEFT see the parameters as they see any other. Differentiating its gradient raises.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from prefkern import passes
from prefkern.once import differentiable_once
from prefkern.plan import Plan


@dataclass(frozen=True)
class Call:
    """What a call runs on, beside its tensors."""

    transform: passes.Transform
    operands: passes.Operands
    plan: Plan
    ops: ModuleType
    with_stats: bool


def scored_logprobs(
    hidden: Tensor,  # (M, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    rows: Tensor | None,  # (N,)
    labels: Tensor,  # (N,)
    call: Call,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor] | None]:
    """Log-probs (N,) float32 of the scored tokens; when asked, `passes.statistics` of them."""
    if call.plan.structure == "forward":
        with torch.no_grad(), without_autocast(hidden):
            logps, *stats = _values(hidden, weight, bias, rows, labels, call)[0]
    else:
        logps, *stats = _LinearLogprobs.apply(hidden, weight, bias, rows, labels, call)
    return logps, (stats[0], stats[1], stats[2], stats[3]) if call.with_stats else None


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Tensor | None,
        labels: Tensor,
        call: Call,
    ) -> tuple[Tensor, ...]:
        with without_autocast(hidden):
            outputs, folded, derivative = _values(hidden, weight, bias, rows, labels, call)
        ctx.call = call
        ctx.hidden_shape, ctx.hidden_dtype = hidden.shape, hidden.dtype
        if derivative is not None:
            ctx.save_for_backward(derivative, rows)
        else:
            kept = (folded.maximum, folded.total, folded.miss)
            ctx.save_for_backward(hidden, weight, bias, rows, labels, *kept)
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @differentiable_once
    def backward(ctx, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        call = ctx.call
        grad = grad.float()
        with without_autocast(grad):
            if call.plan.structure == "one_pass":
                derivative, rows = ctx.saved_tensors
                tile = call.plan.forward_tiles.token_tile
                dhidden = passes.scatter_rows(
                    [(derivative, grad)], rows, ctx.hidden_shape, ctx.hidden_dtype, tile
                )
                return dhidden, None, None, None, None, None
            hidden, weight, bias, rows, labels, maximum, total, miss = ctx.saved_tensors
            gradients = passes.backward(
                grad,
                hidden,
                weight,
                bias,
                rows,
                labels,
                maximum,
                total,
                miss,
                call.transform,
                call.operands,
                call.plan,
                call.ops,
                needs=ctx.needs_input_grad[:3],
            )
        return *gradients, None, None, None


def _values(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    labels: Tensor,
    call: Call,
) -> tuple[tuple[Tensor, ...], passes.Folded, Tensor | None]:
    state, folded, derivative = passes.forward(
        hidden,
        weight,
        bias,
        rows,
        labels,
        call.transform,
        call.operands,
        call.plan,
        call.ops,
        call.with_stats,
    )
    if not call.with_stats:
        return (folded.logps,), folded, derivative
    stats = passes.statistics(state, folded, weight.shape[0])
    return (folded.logps, *stats), folded, derivative


def without_autocast(x: Tensor) -> torch.autocast:
    """Operands are cast tile by tile, and nothing else may be: autocast is kept out."""
    return torch.autocast(x.device.type, enabled=False)
