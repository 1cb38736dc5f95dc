"""The autograd function of the operator: log-probs of the scored tokens, a divergence, gradients.

Saved for backward is what `passes.forward` gathers:

- For a frozen head D, and K with a divergence, (N, W) float32 each. Backward only scales them and
  reads no weight.
- For a trained head three numbers a token, the probabilities that the plan keeps, and the inputs,
  from which backward computes the other probabilities again.

Nothing saved is overwritten, so a second backward with `retain_graph` is right. The reference gets
no gradient, and a second derivative raises (`once`).

It is a plain function, part of the graph of the module whose forward calls it. So the hooks of DDP,
FSDP and PEFT see the parameters as usual.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prefkern.ops import passes
from prefkern.ops.backward import backward
from prefkern.ops.memory import Budget
from prefkern.ops.once import anchors, differentiable_once, refuse_tangents
from prefkern.ops.operands import Head, LowRank, Operands, Transform
from prefkern.ops.passes import Gathered
from prefkern.ops.plan import Gradients, Plan
from prefkern.ops.shards import VocabShard
from prefkern.ops.tile_ops import TileOps


@dataclass(frozen=True)
class Call:
    """A call's plan, backend and options: everything but its tensors."""

    transform: Transform
    operands: Operands
    ref_operands: Operands | None  # None: there is no reference
    plan: Plan
    ops: TileOps
    with_stats: bool
    budget: Budget
    shard: VocabShard | None = None  # of the vocabulary; None: the heads have all of it


@dataclass(frozen=True)
class Result:
    """The results of a call, (N,) each, for the scored tokens in their order."""

    logps: Tensor
    # entropy, mean logit, is_top1, log sum_v p_v^2
    stats: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    ref_logps: Tensor | None = None
    kl: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> Result:
        """The same results, with `change` applied to each."""
        stats = None
        if self.stats is not None:
            entropy, mean_logit, is_top1, collision = map(change, self.stats)
            stats = entropy, mean_logit, is_top1, collision
        ref_logps, kl = (None if x is None else change(x) for x in (self.ref_logps, self.kl))
        return Result(change(self.logps), stats, ref_logps, kl)


def scored_logprobs(
    head: Head,
    reference: Head | None,  # through the same head, or with a divergence: the plan says which
    rows: Tensor | None,  # (N,)
    labels: Tensor,  # (N,)
    call: Call,
) -> Result:
    """Log-probs of the scored tokens; if asked for, statistics, a reference's, the divergence."""
    trained = _tensors(head)
    names = ("hidden", "weight", "bias", "lora_hidden", "lora_weight")
    refuse_tangents(**dict(zip(names, trained, strict=True)))
    if call.plan.structure == "forward":
        with torch.no_grad():
            passed = _forward(head, reference, rows, labels, call)
        return Result(passed.logps, passed.stats, passed.ref_logps, passed.kl)
    of_reference = (None, None, None) if reference is None else _tensors(reference)[:3]
    logps, kl, ref_logps, *stats = _LinearLogprobs.apply(
        *trained, *of_reference, rows, labels, call, anchors(*trained)
    )
    joined = (stats[0], stats[1], stats[2], stats[3]) if stats else None
    return Result(logps, joined, ref_logps, kl)


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
        ref_weight: Tensor | None,
        ref_bias: Tensor | None,
        rows: Tensor | None,
        labels: Tensor,
        call: Call,
        once: tuple[Tensor, ...],
    ) -> tuple[Tensor | None, ...]:
        inputs = (hidden, weight, bias, lora_hidden, lora_weight, ref_hidden, ref_weight, ref_bias)
        passed = _forward(*_heads(call, *inputs), rows, labels, call)
        ctx.set_materialize_grads(False)
        ctx.call, ctx.anchors = call, once
        ctx.shape_of_values = passed.logps.shape, passed.logps.device
        ctx.states = [(x.shape, x.dtype) for x in (hidden, lora_hidden) if x is not None]
        gathered = passed.gathered
        ctx.kept_at = [_place(x) for x in (gathered.kept, gathered.ref_kept) if x is not None]
        # The backward of a frozen head has no product and reads no input.
        saved: tuple[Tensor | None, ...] = ()
        if call.plan.trains_head:
            saved = (labels, *inputs[:5], *(inputs[5:] if call.plan.has_divergence else ()))
        ctx.save_for_backward(*gathered.tensors(), rows, *saved)
        constant = (passed.ref_logps, *(passed.stats or ()))
        ctx.mark_non_differentiable(*(x for x in constant if x is not None))
        return passed.logps, passed.kl, *constant

    @staticmethod
    @differentiable_once
    def backward(
        ctx, dlogps: Tensor | None, dkl: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if dlogps is None and dkl is None:
            return (None,) * 12
        wide, budget = ctx.call.operands.wide, ctx.call.budget
        # A divergence needs both gradients: the one that is not given is 0.
        given = (dlogps, dkl) if ctx.call.plan.has_divergence else (dlogps,)
        shape, device = ctx.shape_of_values
        grads = [
            torch.zeros(shape, dtype=wide, device=device) if x is None else x.to(wide).resolve_neg()
            for x in given
        ]

        # Once: checkpointing without reentry hands each saved tensor out a single time.
        gathered, rows, saved = _saved(ctx)

        def again(workspace_mb: float) -> Plan:
            """Free the kept probabilities, and plan to recompute them in any later backward."""
            nonlocal gathered
            for x, place in zip((gathered.kept, gathered.ref_kept), ctx.kept_at, strict=False):
                # A saved-tensor hook may have put its own tensor there, which is not ours to free.
                if x is not None and _place(x) == place:
                    x.untyped_storage().resize_(0)
            none = {
                name: x.new_empty((0, x.shape[1]))
                for name, x in (("kept", gathered.kept), ("ref_kept", gathered.ref_kept))
                if x is not None
            }
            gathered = replace(gathered, **none)
            made = budget.plan_of(workspace_mb=workspace_mb, kept=0)
            made = replace(made, forward_tiles=ctx.call.plan.forward_tiles)
            ctx.call = replace(ctx.call, plan=made)
            return made

        with without_autocast(grads[0]):
            gradients, _ = budget.attempt(
                lambda plan: _gradients(ctx, grads, gathered, rows, saved, plan),
                ctx.call.plan,
                "backward",
                again,
            )
        return *gradients, *(None,) * 7


def _saved(ctx) -> tuple[Gathered, Tensor | None, list[Tensor]]:
    """The saved tensors: what forward gathered; rows; for a trained head labels and the inputs."""
    count = len(vars(Gathered()))
    tensors = ctx.saved_tensors
    rows, *saved = tensors[count:]
    return Gathered(*tensors[:count]), rows, saved


def _gradients(
    ctx,
    grads: list[Tensor],
    gathered: Gathered,
    rows: Tensor | None,
    saved: list[Tensor],
    plan: Plan,
) -> tuple[Tensor | None, ...]:
    """Gradients of hidden, weight, bias and an adapter's two."""
    call, labels, head, reference = ctx.call, None, None, None
    if plan.trains_head:
        labels, *inputs = saved
        head, reference = _heads(call, *inputs)
    return backward(
        grads,
        head,
        reference,
        rows,
        labels,
        gathered,
        ctx.states,
        call.transform,
        plan,
        call.ops,
        Gradients(*ctx.needs_input_grad[:5]),
        call.shard,
    )


def _forward(
    head: Head, reference: Head | None, rows: Tensor | None, labels: Tensor, call: Call
) -> passes.Passed:
    with without_autocast(head.hidden):
        return passes.forward(
            head,
            reference,
            rows,
            labels,
            call.transform,
            call.plan,
            call.ops,
            call.with_stats,
            shard=call.shard,
        )


def _tensors(head: Head) -> tuple[Tensor | None, ...]:
    adapter = (
        (None, None) if head.low_rank is None else (head.low_rank.hidden, head.low_rank.weight)
    )
    return head.hidden, head.weight, head.bias, *adapter


def _heads(
    call: Call,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
) -> tuple[Head, Head | None]:
    """The heads of policy and reference, from the tensors that autograd passes one by one."""
    head = Head(hidden, weight, bias, call.operands, LowRank.of(lora_hidden, lora_weight))
    if ref_hidden is None or ref_weight is None or call.ref_operands is None:
        return head, None
    return head, Head(ref_hidden, ref_weight, ref_bias, call.ref_operands)


def _place(kept: Tensor) -> tuple[int, int]:
    storage = kept.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def without_autocast(x: Tensor) -> torch.autocast:
    """Switch autocast off: operands are cast tile by tile, and nothing else may be."""
    return torch.autocast(x.device.type, enabled=False)
