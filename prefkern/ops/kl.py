"""The second operator: log-probs, and the divergence from a reference to the policy, per token.

Objectives with a term of each token's divergence (TDPO, arXiv 2404.11999) need `sum_v r_v (log r_v -
log p_v)` beside the log-probs, over two distributions of V words. `linear_kl` folds tiles of both
models' logits at once, so that neither set of logits is ever in memory; the way through the package
is that of `linear_logprobs`, with `kl_passes` over pairs of tiles (`prefkern_kernels.fold_kl` and
`kl_gradient`, or `torch_kl_tiles`).
"""

from __future__ import annotations

import functools

from torch import Tensor

from prefkern.ops import call, checks, memory, plan, sequences
from prefkern.ops.kl_autograd import Call, scored_kl
from prefkern.ops.operands import Transform, as_stored
from prefkern.ops.outputs import TokenKL


def linear_kl(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (...)
    ref_hidden: Tensor,  # (..., H_ref)
    ref_weight: Tensor,  # (V, H_ref)
    bias: Tensor | None = None,  # (V,)
    ref_bias: Tensor | None = None,  # (V,)
    *,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    workspace_mb: float | None = None,
    backend: str | None = None,
) -> TokenKL:
    """Log-probs of labels, and the forward KL divergence from a reference, in tiles.

    With p and r the distributions of policy and reference, `kl = sum_v r_v (log r_v - log p_v)` over
    the whole vocabulary, whatever the label. Equal models give exactly 0.

    Args:
        hidden, weight, labels, bias: as in `prefkern.linear_logprobs`.
        ref_hidden: [..., H_ref] of the reference at the same tokens; its width and dtype may differ.
        ref_weight: [V, H_ref], over the same words as weight.
        ref_bias: [V] or None.
        ignore_index, logit_scale, softcap, temperature, workspace_mb, backend: as in
            `prefkern.linear_logprobs`; the transform is the same for both models.

    Returns:
        TokenKL(logps, ref_logps, kl), [...] float32 each, in nats; 0 where not scored. `logps` and
        `kl` are differentiable once in hidden, weight and bias; nothing of the reference carries a
        gradient. `prefkern.last_plan()` tells what ran.

    Raises:
        TypeError, ValueError, RuntimeError: as `prefkern.linear_logprobs` does, of the reference's
            arguments too.
    """
    checks.head(hidden, weight, bias)
    checks.labels(labels, hidden.shape[:-1], hidden.device)
    checks.head(ref_hidden, ref_weight, ref_bias, prefix="ref_")
    checks.same_words(hidden, weight, ref_hidden, ref_weight)
    checks.same_tokens(hidden, ref_hidden)
    checks.ignore_index(ignore_index)
    checks.transform(logit_scale, softcap, temperature)
    workspace_mb = call.resolve_workspace(workspace_mb, hidden.device)
    backend = call.resolve_backend(backend, hidden.device, hidden.dtype)
    scored = sequences.select(labels.reshape(-1), ignore_index, weight.shape[0])
    *values, _ = run(
        hidden,
        weight,
        bias,
        ref_hidden,
        ref_weight,
        ref_bias,
        scored,
        Transform(float(logit_scale), softcap, float(temperature)),
        workspace_mb,
        backend,
    )
    return TokenKL(*(call.place(value, scored.rows, labels.shape) for value in values))


def run(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    ref_hidden: Tensor,  # (..., H_ref)
    ref_weight: Tensor,  # (V, H_ref)
    ref_bias: Tensor | None,  # (V,)
    scored: sequences.Scored,
    transform: Transform,
    workspace_mb: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, plan.Plan]:
    """Plan and run checked arguments: (N,) log-probs of both and divergence of scored tokens."""
    hidden, weight, bias = hidden.resolve_neg(), weight.resolve_neg(), as_stored(bias)
    ref_hidden, ref_weight = ref_hidden.resolve_neg(), ref_weight.resolve_neg()
    ref_bias = as_stored(ref_bias)
    operands, ref_operands = call.operands_of(hidden), call.operands_of(ref_hidden)
    plan_of = functools.partial(
        plan.make_kl_plan,
        tokens=scored.count,
        vocab_size=weight.shape[0],
        policy=call.planned_head(hidden, weight, operands),
        reference=call.planned_head(ref_hidden, ref_weight, ref_operands),
        gradients=call.wanted_gradients(hidden, weight, bias),
        backend=backend,
        has_softcap=transform.softcap is not None,
    )
    made = plan_of(workspace_mb=workspace_mb)
    plan.record(made)
    budget = memory.Budget(
        workspace_mb, plan_of, plan.recorder(), retries=not sequences.is_capturing(hidden)
    )
    ops = call.tile_operations(backend, twin="prefkern.ops.torch_kl_tiles")
    tensors = (
        scored.cleared(hidden.reshape(-1, hidden.shape[-1])),
        weight,
        # Kernels walk a bias word by word: no strides, no expanded views.
        None if bias is None else bias.contiguous(),
        scored.cleared(ref_hidden.detach().reshape(-1, ref_hidden.shape[-1])),
        ref_weight.detach(),
        None if ref_bias is None else ref_bias.detach().contiguous(),
        scored.rows,
        scored.labels,
    )

    def attempt(made: plan.Plan) -> tuple[Tensor, Tensor, Tensor]:
        return scored_kl(*tensors, Call(transform, operands, ref_operands, made, ops, budget))

    (logps, ref_logps, kl), made = budget.attempt(attempt, made, "forward")
    return scored.masked(logps), scored.masked(ref_logps), scored.masked(kl), made
