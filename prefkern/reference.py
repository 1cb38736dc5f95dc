"""The oracle: the same calls as the fused path, with the logits in memory.

This is the textbook loss: one `[tokens, V]` tensor of logits in the inputs' dtype, as a model would
return it; its `log_softmax` in float32 (float64 for float64 inputs); autograd for every gradient.
In bf16 it does what an eager training step does. In float64 it is the truth for the tests, for
`prefkern check` and for the benchmark. It imports nothing of the fused path, and the fused path
does not import it.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from prefkern.loss import checks as loss_checks
from prefkern.loss.outputs import PreferenceOutput, UnpairedOutput
from prefkern.objectives import Examples, Objective, Pairs, UnpairedObjective
from prefkern.ops import checks, plain
from prefkern.ops.outputs import TokenKL, TokenStats


def logits(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None = None,  # (V,)
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    lora_hidden: Tensor | None = None,  # (..., R)
    lora_weight: Tensor | None = None,  # (V, R)
) -> Tensor:  # (..., V)
    """Transformed logits, in float64 for float64 inputs and float32 otherwise."""
    z = torch.nn.functional.linear(hidden, weight, bias)
    if lora_hidden is not None and lora_weight is not None:
        z = z + torch.nn.functional.linear(lora_hidden, lora_weight)
    z = (z if z.dtype == torch.float64 else z.float()) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def linear_logprobs(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (...)
    bias: Tensor | None = None,  # (V,)
    *,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    workspace_mb: float | None = None,
    backend: str | None = None,
    return_stats: bool = False,
    lora_hidden: Tensor | None = None,  # (..., R)
    lora_weight: Tensor | None = None,  # (V, R)
) -> Tensor | TokenStats:
    """`prefkern.linear_logprobs` with logits in memory, in any float dtype, float64 included.

    `workspace_mb` and `backend` are checked and have no effect, so that one call can replace the
    other. Float64 inputs give float64 results, all others float32.

    Raises TypeError and ValueError as `prefkern.linear_logprobs` does.
    """
    _check_unused(workspace_mb, backend)
    checks.head(hidden, weight, bias)
    checks.low_rank(hidden, weight, lora_hidden, lora_weight)
    checks.labels(labels, hidden.shape[:-1], hidden.device)
    checks.ignore_index(ignore_index)
    checks.transform(logit_scale, softcap, temperature)
    plain.boolean("return_stats", return_stats)
    scored = labels != ignore_index
    if bool((scored & ((labels < 0) | (labels >= weight.shape[0]))).any()):
        raise ValueError(f"labels must be in [0, {weight.shape[0]}) or {ignore_index}")
    z = logits(
        hidden,
        weight,
        bias,
        logit_scale=logit_scale,
        softcap=softcap,
        temperature=temperature,
        lora_hidden=lora_hidden,
        lora_weight=lora_weight,
    )
    log_p = z.log_softmax(-1)
    index = labels.clamp(min=0, max=weight.shape[0] - 1)
    logps = log_p.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    # where, not a product: a token that is not scored must pass back a gradient of exactly 0.
    logps = torch.where(scored, logps, torch.zeros_like(logps))
    if not return_stats:
        return logps
    with torch.no_grad():
        p = log_p.exp()
        entropy = -torch.where(p > 0, p * log_p, 0.0).sum(-1)
        return TokenStats(
            logps,
            torch.where(scored, entropy, 0.0),
            torch.where(scored, z.mean(-1), 0.0),
            scored & (z.argmax(-1) == labels),
        )


def preference_loss(
    objective: Objective | UnpairedObjective,
    hidden: Tensor,  # (2B, T, H), or (tokens, H) with cu_seqlens
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (2B, T), or (tokens,)
    bias: Tensor | None = None,  # (V,)
    ref_hidden: Tensor | None = None,  # as hidden, its own width allowed
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    ref_logps: Tensor | None = None,  # (2B,)
    reward_margins: Tensor | None = None,  # (B,)
    cu_seqlens: Tensor | None = None,  # (2B + 1,)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    *,
    ignore_index: int = -100,
    ld_alpha: float | None = None,
    return_stats: bool = False,
    desirable: Tensor | None = None,  # (S,), KTO
    mismatched_log_ratios: Tensor | None = None,  # (M,), KTO
    lora_hidden: Tensor | None = None,  # (2B, T, R), or (tokens, R)
    lora_weight: Tensor | None = None,  # (V, R)
) -> PreferenceOutput | UnpairedOutput:
    """`prefkern.FusedPreferenceLoss(objective)(...)` with logits in memory, float64 too.

    Raises TypeError and ValueError as that does.
    """
    if not isinstance(objective, Objective | UnpairedObjective):
        raise TypeError(f"objective must be an objective of prefkern.objectives, got {objective!r}")
    checks.head(hidden, weight, bias)
    checks.labels(labels, hidden.shape[:-1], hidden.device)
    checks.ignore_index(ignore_index)
    plain.boolean("return_stats", return_stats)
    sequences = loss_checks.bounds(labels, cu_seqlens, objective.responses)
    count = len(sequences) - 1
    loss_checks.ld_alpha(ld_alpha, objective)
    loss_checks.reference(
        objective, hidden, weight, ref_hidden, ref_weight, ref_bias, ref_logps, count
    )
    loss_checks.unpaired(objective, desirable, mismatched_log_ratios, count, hidden)
    loss_checks.margins(objective, reward_margins, count, hidden.device)
    found = sequences.tolist()
    if found != sorted(found) or found[0] != 0 or found[-1] != labels.numel():
        raise ValueError(
            f"cu_seqlens must rise from 0 to the number of tokens, {labels.numel()}; got {found}"
        )
    transform: dict[str, Any] = {
        "logit_scale": logit_scale,
        "softcap": softcap,
        "temperature": temperature,
    }
    adapter: dict[str, Any] = {"lora_hidden": lora_hidden, "lora_weight": lora_weight}
    scored = labels != ignore_index

    def sequence_sums(per_token: Tensor) -> Tensor:  # (tokens) or (2B, T) -> (2B,)
        if cu_seqlens is None:
            return per_token.sum(-1)
        bounds = cu_seqlens.tolist()
        return torch.stack([per_token[a:b].sum() for a, b in itertools.pairwise(bounds)])

    stats = linear_logprobs(
        hidden,
        weight,
        labels,
        bias,
        ignore_index=ignore_index,
        return_stats=True,
        **transform,
        **adapter,
    )
    assert isinstance(stats, TokenStats)
    lengths = sequence_sums(scored.long())
    responses = objective.responses
    shared = None
    if ld_alpha is not None:
        # A gold response has no tokens beyond.
        of_pair = list(lengths.chunk(responses))
        of_pair[:2] = [torch.minimum(*of_pair[:2])] * 2
        shared = torch.cat(of_pair)

    def discounted(logps: Tensor) -> Tensor:  # (tokens) or (2B, T) -> (2B,)
        """Sums in which tokens beyond the shorter response's length weigh ld_alpha (LD-DPO)."""
        if shared is None or ld_alpha is None:
            return sequence_sums(logps)
        weights = torch.full((logps.numel(),), ld_alpha, dtype=logps.dtype, device=logps.device)
        for first, last, count in zip(found, found[1:], shared.tolist(), strict=False):
            weights[first:last][scored.reshape(-1)[first:last].cumsum(0) <= count] = 1
        # A weight of 0 leaves a token out, even one of -inf.
        weights = weights.view(logps.shape)
        return sequence_sums(torch.where(weights == 0, 0.0, weights * logps))

    sums = discounted(stats.logps)
    whole = None if ld_alpha is None else sequence_sums(stats.logps)
    if ref_hidden is not None and ref_weight is not None:
        with torch.no_grad():
            ref_logps = discounted(
                linear_logprobs(
                    ref_hidden, ref_weight, labels, ref_bias, ignore_index=ignore_index, **transform
                )  # pyright: ignore[reportArgumentType]
            )
    if ref_logps is not None:
        ref_logps = ref_logps[: loss_checks.reference_sums(count, responses)]
    if isinstance(objective, UnpairedObjective):
        assert ref_logps is not None and desirable is not None
        assert mismatched_log_ratios is not None
        answer = objective(Examples(sums, desirable, ref_logps, mismatched_log_ratios))
        return UnpairedOutput(
            loss=answer.losses.mean(),
            losses=answer.losses,
            logps=sums,
            ref_logps=ref_logps,
            rewards=answer.rewards,
            lengths=lengths,
            desirable=desirable,
            reference_point=answer.reference_point,
            token_stats=stats if return_stats else None,
        )

    alignments = kls = None
    if objective.needs_alignments:
        with torch.no_grad():
            p = logits(hidden, weight, bias, **transform, **adapter).softmax(-1)
            per_token = torch.where(scored, stats.logps - p.square().sum(-1).log(), 0.0)
            alignments = sequence_sums(per_token) / lengths.clamp(min=1)
    if objective.needs_kls:
        assert ref_hidden is not None and ref_weight is not None
        log_p = logits(hidden, weight, bias, **transform, **adapter).log_softmax(-1)
        log_r = logits(ref_hidden, ref_weight, ref_bias, **transform).log_softmax(-1).detach()
        per_token = _divergence(log_p, log_r)
        kls = sequence_sums(torch.where(scored, per_token, 0.0))
    given = (ref_logps, lengths, reward_margins, alignments, kls)
    if torch.is_inference_mode_enabled():
        # Tensors made in inference mode cannot be differentiated, the objective's inputs included.
        with torch.inference_mode(False):
            sums, whole = sums.clone(), None if whole is None else whole.clone()
            given = tuple(None if value is None else value.clone() for value in given)
    with torch.inference_mode(False), torch.enable_grad():
        # With `ld_alpha` a token of weight 1 is in two sums of its response.
        tracked = [
            x if x.requires_grad else x.detach().requires_grad_()
            for x in (sums, whole)
            if x is not None
        ]
        pairs = Pairs.of_sequences(tracked[0], *given, *tracked[1:], responses=responses)
        result = objective(pairs)
        gradients = torch.stack(
            torch.autograd.grad(
                result.losses.sum(), tracked, retain_graph=True, materialize_grads=True
            )
        ).sum(0)
    losses = result.losses if sums.requires_grad else result.losses.detach()
    chosen, rejected, *gold = sums.chunk(responses)
    chosen_lengths, rejected_lengths, *gold_lengths = lengths.chunk(responses)
    return PreferenceOutput(
        loss=losses.mean(),
        losses=losses,
        chosen_logps=chosen,
        rejected_logps=rejected,
        ref_chosen_logps=pairs.ref_chosen_logps,
        ref_rejected_logps=pairs.ref_rejected_logps,
        chosen_rewards=result.chosen_rewards,
        rejected_rewards=result.rejected_rewards,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        beta_chosen=result.beta_chosen,
        beta_rejected=result.beta_rejected,
        chosen_gradients=gradients.chunk(responses)[0],
        rejected_gradients=gradients.chunk(responses)[1],
        gold_logps=gold[0] if gold else None,
        gold_lengths=gold_lengths[0] if gold_lengths else None,
        metrics=objective.metrics(pairs, result),
        token_stats=stats if return_stats else None,
    )


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
) -> TokenKL:
    """`prefkern.linear_kl` with both models' logits in memory, in any float dtype.

    Raises TypeError and ValueError as that does.
    """
    _check_unused(workspace_mb, backend)
    checks.head(hidden, weight, bias)
    checks.low_rank(hidden, weight, lora_hidden, lora_weight)
    checks.labels(labels, hidden.shape[:-1], hidden.device)
    checks.head(ref_hidden, ref_weight, ref_bias, prefix="ref_")
    checks.same_entries(hidden, weight, ref_hidden, ref_weight)
    checks.same_tokens(hidden, ref_hidden)
    checks.ignore_index(ignore_index)
    checks.transform(logit_scale, softcap, temperature)
    transform: dict[str, Any] = {
        "logit_scale": logit_scale,
        "softcap": softcap,
        "temperature": temperature,
    }
    scored = labels != ignore_index
    if bool((scored & ((labels < 0) | (labels >= weight.shape[0]))).any()):
        raise ValueError(f"labels must be in [0, {weight.shape[0]}) or {ignore_index}")
    index = labels.clamp(min=0, max=weight.shape[0] - 1).unsqueeze(-1)
    log_p = logits(
        hidden, weight, bias, **transform, lora_hidden=lora_hidden, lora_weight=lora_weight
    ).log_softmax(-1)
    with torch.no_grad():
        log_r = logits(ref_hidden, ref_weight, ref_bias, **transform).log_softmax(-1)
    values = (
        log_p.gather(-1, index).squeeze(-1),
        log_r.gather(-1, index).squeeze(-1),
        _divergence(log_p, log_r),
    )
    # where, not a product: a token that is not scored must pass back a gradient of exactly 0.
    return TokenKL(*(torch.where(scored, value, torch.zeros_like(value)) for value in values))


def _divergence(log_p: Tensor, log_r: Tensor) -> Tensor:  # (..., V) -> (...)
    """KL from reference to policy; an entry that the reference rules out adds nothing to it."""
    gap = torch.where(log_r.isneginf(), 0.0, log_r - log_p)
    return (log_r.exp() * gap).sum(-1)


def _check_unused(workspace_mb: float | None, backend: str | None) -> None:
    """Refuse what the fused path refuses, of two arguments that have no effect here."""
    if workspace_mb is not None:
        plain.positive("workspace_mb", workspace_mb)
    if backend is not None and backend not in ("triton", "torch"):
        raise ValueError(f"backend must be None or one of 'triton', 'torch', got {backend!r}")
