"""Log-probs, and the divergence from a reference to the policy, per token.

Some objectives have a term with each token's divergence (TDPO, arXiv 2404.11999). They need `sum_v
r_v (log r_v - log p_v)` beside the log-probs: a sum over the distributions of both models. It is an
option of the passes that `linear_logprobs` runs. A tile of the policy's logits and one of the
reference's are folded together, so that neither model's logits are ever in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prefkern.ops import call, checks, compiled, sequences, shards
from prefkern.ops.agreement import Agreement
from prefkern.ops.operands import Head, LowRank, Transform
from prefkern.ops.outputs import TokenKL
from prefkern.ops.shards import VocabShard


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
    lora_hidden: Tensor | None = None,  # (..., R)
    lora_weight: Tensor | None = None,  # (V, R)
    vocab: VocabShard | None = None,
) -> TokenKL:
    """Log-probs of labels, and the forward KL divergence from a reference, in tiles.

    With p and r the distributions of policy and reference, `kl = sum_v r_v (log r_v - log p_v)` over
    the whole vocabulary. It does not depend on the label. Equal models give exactly 0; with an
    adapter that changes nothing, 0 to float32's rounding.

    Args:
        hidden, weight, labels, bias: as in `prefkern.linear_logprobs`.
        ref_hidden: [..., H_ref], the reference's hidden states at the same tokens; width and dtype
            may differ from hidden's.
        ref_weight: [V, H_ref], over the same vocabulary as weight.
        ref_bias: [V] or None.
        ignore_index, logit_scale, softcap, temperature, workspace_mb, backend: as in
            `prefkern.linear_logprobs`; the transform is the same for both models.
        lora_hidden, lora_weight: a LoRA adapter on the policy's head, as in
            `prefkern.linear_logprobs`.
        vocab: as in `prefkern.linear_logprobs`; ref_weight and ref_bias then have the same rows as
            weight.

    Returns:
        TokenKL(logps, ref_logps, kl), [...] float32 each, in nats; 0 where not scored. `logps` and
        `kl` are differentiable once in hidden, weight, bias, lora_hidden and lora_weight. The
        reference's tensors get no gradient. `prefkern.last_plan()` says what ran.

    Raises:
        TypeError, ValueError, RuntimeError: as `prefkern.linear_logprobs` does, also for the
            reference's arguments.
    """
    shards.refuse_graphs(vocab, weight, labels)
    with Agreement(shards.party(vocab, weight)) as (facts,):
        vocab, (weight, bias, lora_weight) = shards.local_head(
            vocab, weight=weight, bias=bias, lora_weight=lora_weight
        )
        ref_weight, ref_bias = shards.local_reference(
            vocab, ref_weight=ref_weight, ref_bias=ref_bias
        )
        hidden, labels, lora_hidden, ref_hidden = shards.local_states(
            hidden=hidden, labels=labels, lora_hidden=lora_hidden, ref_hidden=ref_hidden
        )
        checks.head(hidden, weight, bias, shard=vocab)
        checks.low_rank(hidden, weight, lora_hidden, lora_weight)
        checks.labels(labels, hidden.shape[:-1], hidden.device)
        checks.head(ref_hidden, ref_weight, ref_bias, prefix="ref_", shard=vocab)
        checks.same_entries(hidden, weight, ref_hidden, ref_weight)
        checks.same_tokens(hidden, ref_hidden)
        checks.ignore_index(ignore_index)
        checks.transform(logit_scale, softcap, temperature)
        transform = Transform(float(logit_scale), softcap, float(temperature))
        head = Head.of(hidden, weight, bias, LowRank.of(lora_hidden, lora_weight))
        ref_head = Head.of(ref_hidden, ref_weight, ref_bias)
        if torch.compiler.is_compiling():
            values = compiled.token_logprobs(
                head, labels, ignore_index, transform, workspace_mb, backend, reference=ref_head
            )
            assert values.ref_logps is not None and values.kl is not None
            return TokenKL(values.logps, values.ref_logps, values.kl)
        call.check_workspace(workspace_mb)
        backend = call.resolve_backend(backend, hidden.device, hidden.dtype)
        scored = sequences.select(labels.reshape(-1), ignore_index, shards.size_of(vocab, weight))
        if vocab is not None:
            options = {"ignore_index": ignore_index, **transform.keywords()}
            facts |= shards.facts_of(vocab, head, labels, **options)
    result, _ = call.run(
        head,
        scored,
        transform,
        workspace_mb,
        backend,
        reference=ref_head,
        with_divergence=True,
        shard=vocab,
    )
    assert result.ref_logps is not None and result.kl is not None
    found = (result.logps, result.ref_logps, result.kl)
    return TokenKL(*(call.place(value, scored.rows, labels.shape) for value in found))
