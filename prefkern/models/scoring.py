"""Log-probs and losses of a Hugging Face causal LM, with no logits in memory.

`token_logprobs` scores tokens. `preference_outputs` runs a preference loss on a batch of
`prefkern.data.collate`; the trainer calls it at each step, and so does your own loop:

    out = prefkern.preference_outputs(model, batch, loss_fn, ref_logps=ref_logps)
    out.loss.backward()
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prefkern.loss.fused import FusedPreferenceLoss
from prefkern.loss.outputs import PreferenceOutput, UnpairedOutput
from prefkern.models import text_inputs
from prefkern.models.head_forward import head_forward
from prefkern.models.heads import HeadInputs, find_head
from prefkern.models.packing import packed_inputs
from prefkern.models.routers import RouterLoss
from prefkern.models.transform import DECODER_IDS, head_transform
from prefkern.ops.logprobs import linear_logprobs

IGNORE_INDEX = -100

# Options of `token_logprobs`: an unknown keyword that is close to one of these is a typing error.
_OWN_OPTIONS = ("labels", "cu_seqlens", "temperature", "workspace_mb", "backend", "attention_mask")
# Entries of a batch that the loss reads, not the model.
_OF_THE_LOSS = ("labels", "shift_labels", "ref_logps", "reward_margins", "desirable")
MISMATCHED = "mismatched_"


def token_logprobs(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    temperature: float = 1.0,
    workspace_mb: float | None = None,
    backend: str | None = None,
    **model_kwargs: Any,
) -> Tensor:
    """Log-probability of each token under a causal LM, without logits.

    Args:
        model: a Hugging Face causal LM, bare or wrapped (DDP, PEFT, FSDP).
        input_ids: [B, T] int64.
        attention_mask: [B, T], 1 for tokens and 0 for padding.
        labels: [B, T] int64 as the model takes them: not shifted, -100 where not scored. None
            scores every token of `input_ids` that is real, if the token before it is real too.
        cu_seqlens: [S + 1] int32 or int64: where each sequence of a packed row begins. input_ids is
            then [1, M], and attention_mask must be None. Positions restart with each sequence, and
            its first token is not scored.
        temperature: divides the logits, > 0.
        workspace_mb, backend: as in `prefkern.linear_logprobs`.
        model_kwargs: passed to the model's forward (position_ids, pixel_values, ...).

    Returns:
        [B, T-1] float32; column t holds log p(labels[:, t + 1]), 0 where not scored.
        Differentiable in the model's parameters.

    Raises TypeError and ValueError for tensors that do not fit the model or one another, for a
    model whose head or logits transform cannot be read, and for a model that cannot keep packed
    sequences apart.
    """
    base, _ = find_head(model)
    text_inputs.check(base, input_ids, attention_mask, labels)
    text_inputs.check_names(base, model_kwargs, _OWN_OPTIONS)
    if labels is None:
        labels = input_ids
        if attention_mask is not None:
            # A token after padding has no context: the state of a pad token would predict it.
            kept = attention_mask.bool()
            kept = kept & F.pad(kept[:, :-1], (1, 0), value=True)
            labels = labels.masked_fill(~kept, IGNORE_INDEX)
    inputs = {"input_ids": input_ids, **model_kwargs}
    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask
    if cu_seqlens is not None:
        if len(inputs) > 1:
            given = ", ".join(name for name in inputs if name != "input_ids")
            raise ValueError(f"a packed row takes only input_ids and cu_seqlens, also got {given}")
        inputs = packed_inputs(model, input_ids, cu_seqlens)
    logps, output = forward_scored(
        model,
        inputs,
        align_labels(labels, cu_seqlens),
        linear_logprobs,
        ignore_index=IGNORE_INDEX,
        temperature=temperature,
        workspace_mb=workspace_mb,
        backend=backend,
    )
    return logps[:, :-1] + output.logits.sum()


def preference_outputs(
    model: nn.Module,
    batch: Mapping[str, Any],
    loss_fn: FusedPreferenceLoss,
    *,
    router_loss: RouterLoss | None = None,
    **options: Any,
) -> PreferenceOutput | UnpairedOutput:
    """Run a loss inside a model's forward, with no logits in memory.

    Scale, softcap, bias, tied weights and an adapter on the head are read from the model.

    Args:
        model: a Hugging Face causal LM, bare or wrapped (DDP, PEFT, FSDP).
        batch: a batch from a collator of `prefkern.data.collate`, on the model's device. It holds
            `input_ids`, `labels` ([2B, T], not shifted, -100 where not scored; B chosen rows, then
            their B rejected rows), `attention_mask`, and anything else that the model's forward
            takes. Packed, it holds `input_ids` and `labels` [1, M], `cu_seqlens` [2B + 1] and, with
            shared prompts, `prefixes` [2B, 2]. For a loss with a `sequence_group` all of these are
            this rank's part of the rows, with `shift_labels` in place of labels: shifted before
            they were split. The model's attention must reach the other ranks' tokens.
        loss_fn: a `prefkern.FusedPreferenceLoss` with `ignore_index` -100.
        router_loss: the load-balancing loss of a mixture of experts; None: as the model's config
            says.
        options: further keywords of the call of `loss_fn`, mainly `ref_logps` ([2B]) and
            `reward_margins` ([B]). Pass these yourself even if the batch holds them: some
            objectives refuse them.

    Returns:
        The output of `loss_fn`. Its `loss` also depends on the wrapped model's output. That changes
        no value, but DDP and FSDP put their hooks there: call backward on this loss.

    Raises TypeError and ValueError for a batch whose tensors do not fit one another or the model,
    for a model whose head or logits transform cannot be read, and for a `loss_fn` with another
    `ignore_index`. With a `sequence_group` also for a packed batch and for a router's loss.
    """
    if not isinstance(loss_fn, FusedPreferenceLoss):
        raise TypeError(f"loss_fn must be a prefkern.FusedPreferenceLoss, got {loss_fn!r}")
    if router_loss is not None and not isinstance(router_loss, RouterLoss):
        raise TypeError(f"router_loss must be a RouterLoss or None, got {router_loss!r}")
    base, _ = find_head(model)
    is_part = loss_fn.sequence_group is not None
    _check_batch(base, batch, "shift_labels" if is_part else "labels")
    if loss_fn.ignore_index != IGNORE_INDEX:
        raise ValueError(
            f"loss_fn must have ignore_index={IGNORE_INDEX}, the label of tokens that a model does "
            f"not score; got {loss_fn.ignore_index}"
        )
    router_loss = RouterLoss.of(model) if router_loss is None else router_loss
    cu_seqlens = batch.get("cu_seqlens")
    if is_part and router_loss.coefficient:
        raise ValueError(
            f"router_aux_loss_coef is {router_loss.coefficient}, and with a sequence_group a rank "
            "sees the experts of its own tokens alone; pass router_loss=RouterLoss(0)"
        )
    if is_part and cu_seqlens is not None:
        raise ValueError(
            "cu_seqlens was given, and a model's forward does not know the bounds of sequences whose"
            " tokens other ranks hold; pad the rows for a loss with a sequence_group"
        )
    inputs = {**model_inputs(model, batch), **router_loss.asked_of(model)}
    labels = batch["shift_labels"] if is_part else align_labels(batch["labels"], cu_seqlens)
    is_packed = cu_seqlens is not None
    outputs, returned = forward_scored(
        model, inputs, labels, loss_fn, is_packed, cu_seqlens=cu_seqlens, **options
    )
    outputs = router_loss.added_to(outputs, returned)
    return replace(outputs, loss=outputs.loss + returned.logits.sum())


def forward_scored(
    model: nn.Module,
    inputs: Mapping[str, Any],
    labels: Tensor,  # (B, T), aligned
    score: Callable[..., Any],
    is_packed: bool = False,
    **options: Any,
) -> tuple[Any, Any]:
    """Run a model's forward, with `score` in place of its output head.

    Args:
        model: a Hugging Face causal LM, bare or wrapped.
        inputs: keyword arguments of its forward, without labels. An encoder-decoder is scored if
            they have its `decoder_input_ids`.
        labels: aligned with hidden states.
        score: the operator, a loss, or what takes the same arguments: hidden, weight, labels, bias,
            and keywords for the transform and the adapter. It returns a tensor, something with a
            `loss`, or a tuple whose first is one of these.
        is_packed: whether the batch is one packed row, which losses take as [M, H] and [M].
        options: further keywords of `score`.

    Returns:
        The answer of `score`, and the output of the model. Add the sum of its logits, which is 0,
        to what is differentiated; see `prefkern.models.head_forward`.
    """
    transform = head_transform(model, with_encoder=DECODER_IDS in inputs)

    def scored(head: HeadInputs) -> tuple[Any, Tensor]:
        head = head.of_tokens(labels, is_packed)
        result = score(
            head.hidden,
            head.weight,
            labels[0] if is_packed else labels,
            head.bias,
            logit_scale=transform.logit_scale,
            softcap=transform.softcap,
            **head.adapter(),
            **options,
        )
        anchor = result[0] if isinstance(result, tuple) else result
        return result, getattr(anchor, "loss", anchor)

    return head_forward(model, inputs, scored)


def _check_batch(base: Any, batch: Mapping[str, Any], name: str) -> None:
    """Raise unless the batch has labels that fit its ids: others would score the wrong tokens."""
    # isinstance(batch, Mapping) is false for transformers' BatchEncoding.
    if not hasattr(batch, "keys"):
        raise TypeError(f"batch must be a mapping of names to tensors, got {batch!r}"[:200])
    if name not in batch:
        raise ValueError(f"batch must have {name}, got {', '.join(map(str, batch)) or 'nothing'}")
    labels, ids = batch[name], batch.get("input_ids")
    if ids is not None:
        text_inputs.check(base, ids, batch.get("attention_mask"), labels)


def model_inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of the model's forward in a batch, without the entries that the loss reads."""
    rest = {
        name: value
        for name, value in batch.items()
        if name not in _OF_THE_LOSS and not name.startswith(MISMATCHED)
    }
    if "cu_seqlens" not in rest:
        return rest
    if not {"input_ids", "cu_seqlens"} <= rest.keys() <= {"input_ids", "cu_seqlens", "prefixes"}:
        raise ValueError(
            "a packed batch gives the model only input_ids and cu_seqlens (and prefixes), from "
            f"which all other inputs follow; got {', '.join(rest)}"
        )
    return packed_inputs(model, **rest)


def align_labels(
    labels: Tensor,  # (B, T), or (1, M) with cu_seqlens
    cu_seqlens: Tensor | None = None,  # (S + 1,)
) -> Tensor:  # as labels
    """Labels as a model takes them -> labels aligned with hidden states. Only this function shifts.

    The last token of a sequence predicts nothing, also not the first token of the next sequence.
    """
    aligned = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    if cu_seqlens is None:
        return aligned
    return aligned.index_fill(1, cu_seqlens[1:].to(labels.device, torch.int64) - 1, IGNORE_INDEX)
