"""The autograd function of the second operator: scored tokens' log-probs and divergence.

As `autograd` does it for log-probs alone. With a frozen head, `D = d logp / d hidden` and `K = d kl /
d hidden` are kept, (N, H) float32 each, and backward is `g D + k K`, rounded once; with a trainable
head, the inputs themselves and six numbers a token, from which the tiles are recomputed. Nothing
saved is overwritten, nothing of the reference has a gradient, and differentiating a gradient raises.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from prefkern.ops import kl_passes
from prefkern.ops.autograd import without_autocast
from prefkern.ops.kl_passes import FoldedPair
from prefkern.ops.memory import Budget
from prefkern.ops.once import anchors, differentiable_once, refuse_tangents
from prefkern.ops.operands import Head, Operands, Transform
from prefkern.ops.plan import Plan


@dataclass(frozen=True)
class Call:
    """What a call runs on, beside its tensors."""

    transform: Transform
    operands: Operands
    ref_operands: Operands
    plan: Plan
    ops: ModuleType
    budget: Budget


def scored_kl(
    hidden: Tensor,  # (M, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    ref_hidden: Tensor,  # (M, H_ref)
    ref_weight: Tensor,  # (V, H_ref)
    ref_bias: Tensor | None,  # (V,)
    rows: Tensor | None,  # (N,)
    labels: Tensor,  # (N,)
    call: Call,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of policy and reference, and the divergence, of scored tokens: (N,) float32."""
    tensors = (hidden, weight, bias, ref_hidden, ref_weight, ref_bias, rows, labels)
    refuse_tangents(hidden=hidden, weight=weight, bias=bias)
    if call.plan.structure == "forward":
        with torch.no_grad():
            return _outputs(_fold(*tensors, call))
    return _LinearKL.apply(*tensors, call, anchors(hidden, weight, bias))


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ref_hidden: Tensor,
        ref_weight: Tensor,
        ref_bias: Tensor | None,
        rows: Tensor | None,
        labels: Tensor,
        call: Call,
        once: tuple[Tensor, ...],
    ) -> tuple[Tensor, Tensor, Tensor]:
        tensors = (hidden, weight, bias, ref_hidden, ref_weight, ref_bias, rows, labels)
        folded = _fold(*tensors, call)
        ctx.call, ctx.anchors = call, once
        ctx.hidden_shape, ctx.hidden_dtype = hidden.shape, hidden.dtype
        if folded.derivatives is not None:
            ctx.save_for_backward(*folded.derivatives, rows)
        else:
            policy, reference = folded.policy, folded.reference
            ctx.save_for_backward(
                *tensors,
                policy.maximum,
                policy.total,
                reference.maximum,
                reference.total,
                policy.miss,
                folded.label_difference,
            )
        outputs = _outputs(folded)
        ctx.mark_non_differentiable(outputs[1])
        return outputs

    @staticmethod
    @differentiable_once
    def backward(ctx, dlogps: Tensor, _: Tensor, dkl: Tensor) -> tuple[Tensor | None, ...]:
        wide = ctx.call.operands.wide
        dlogps, dkl = dlogps.to(wide).resolve_neg(), dkl.to(wide).resolve_neg()

        def attempt(plan: Plan) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
            return _gradients(ctx, dlogps, dkl, plan)

        with without_autocast(dlogps):
            gradients, _ = ctx.call.budget.attempt(attempt, ctx.call.plan, "backward")
        return *gradients, *(None,) * 7


def _gradients(
    ctx, dlogps: Tensor, dkl: Tensor, plan: Plan
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias."""
    call = ctx.call
    if plan.structure == "one_pass":
        logps_derivative, kl_derivative, rows = ctx.saved_tensors
        dhidden = kl_passes.scatter_rows(
            [(logps_derivative, dlogps), (kl_derivative, dkl)],
            rows,
            ctx.hidden_shape,
            ctx.hidden_dtype,
            plan.forward_tiles.token_tile,
        )
        return dhidden, None, None
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias, rows, labels, *kept = ctx.saved_tensors
    maximum, total, ref_maximum, ref_total, miss, label_difference = kept
    return kl_passes.backward(
        dlogps,
        dkl,
        Head(hidden, weight, bias, call.operands),
        Head(ref_hidden, ref_weight, ref_bias, call.ref_operands),
        rows,
        labels,
        maximum,
        total,
        ref_maximum,
        ref_total,
        miss,
        label_difference,
        call.transform,
        plan,
        call.ops,
        needs=ctx.needs_input_grad[:3],
    )


def _fold(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    rows: Tensor | None,
    labels: Tensor,
    call: Call,
) -> FoldedPair:
    policy = Head(hidden, weight, bias, call.operands)
    reference = Head(ref_hidden, ref_weight, ref_bias, call.ref_operands)
    with without_autocast(hidden):
        return kl_passes.forward(
            policy, reference, rows, labels, call.transform, call.plan, call.ops
        )


def _outputs(folded: FoldedPair) -> tuple[Tensor, Tensor, Tensor]:
    return folded.policy.logps, folded.reference.logps, folded.kl
