"""A model's forward on a batch of `prefkern.collate`, with a preference loss where its head was.

This is the step that the trainer makes, and a loop of one's own:

    out = prefkern.preference_outputs(model, batch, loss_fn, ref_logps=ref_logps)
    out.loss.backward()
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from prefkern import text_inputs
from prefkern.loss import FusedPreferenceLoss
from prefkern.models import (
    IGNORE_INDEX,
    HeadInputs,
    align_labels,
    find_head,
    head_forward,
    head_transform,
)
from prefkern.outputs import PreferenceOutput, UnpairedOutput
from prefkern.packing import packed_inputs
from prefkern.routers import RouterLoss

# What a batch has for the loss, and not for the model.
_OF_THE_LOSS = ("labels", "ref_logps", "reward_margins", "desirable")
MISMATCHED = "mismatched_"


def preference_outputs(
    model: nn.Module,
    batch: Mapping[str, Any],
    loss_fn: FusedPreferenceLoss,
    *,
    router_loss: RouterLoss | None = None,
    **options: Any,
) -> PreferenceOutput | UnpairedOutput:
    """Run a loss inside a model's forward, with no logits in memory.

    Scale, softcap, bias, tied weights and an adapter on the head are read off the model.

    Args:
        model: a Hugging Face causal LM, bare or wrapped (DDP, PEFT, FSDP).
        batch: what a collator of `prefkern.collate` makes, on the model's device: `input_ids`,
            `labels` ([2B, T], not shifted, -100 where not scored; B chosen rows, then their B
            rejected), `attention_mask` and whatever else the model's forward takes; or packed,
            `input_ids` and `labels` [1, M] and `cu_seqlens` [2B + 1].
        loss_fn: a `prefkern.FusedPreferenceLoss` with -100 as its `ignore_index`.
        router_loss: what a mixture of experts' load-balancing loss counts for; None: what the
            model's config says.
        options: further keywords of its call, first of all `ref_logps` ([2B]) or `reward_margins`
            ([B]). Those that the batch carries are not passed on by themselves: an objective may
            have no use for them.

    Returns:
        The output of `loss_fn`. Its `loss` depends on the wrapped model's output as well, which
        changes no value, and is where DDP and FSDP hang their hooks: call backward on it.

    Raises TypeError and ValueError for a batch whose tensors do not fit one another or the model,
    for a model whose head or logits transform is not understood, and for a `loss_fn` of another
    `ignore_index`.
    """
    if not isinstance(loss_fn, FusedPreferenceLoss):
        raise TypeError(f"loss_fn must be a prefkern.FusedPreferenceLoss, got {loss_fn!r}")
    if router_loss is not None and not isinstance(router_loss, RouterLoss):
        raise TypeError(f"router_loss must be a RouterLoss or None, got {router_loss!r}")
    base, _ = find_head(model)
    _check_batch(base, batch)
    if loss_fn.ignore_index != IGNORE_INDEX:
        raise ValueError(
            f"loss_fn must have ignore_index={IGNORE_INDEX}, which a model's labels and the last "
            f"token of each sequence have; got {loss_fn.ignore_index}"
        )
    router_loss = RouterLoss.of(model) if router_loss is None else router_loss
    transform = head_transform(model)
    inputs = {**model_inputs(model, batch), **router_loss.asked_of(model)}
    cu_seqlens = batch.get("cu_seqlens")
    labels = align_labels(batch["labels"], cu_seqlens)

    def score(head: HeadInputs) -> tuple[PreferenceOutput | UnpairedOutput, Tensor]:
        is_packed = cu_seqlens is not None
        head = head.of_tokens(labels, is_packed)
        outputs = loss_fn(
            head.hidden,
            head.weight,
            labels[0] if is_packed else labels,
            head.bias,
            cu_seqlens=cu_seqlens,
            logit_scale=transform.logit_scale,
            softcap=transform.softcap,
            **head.adapter(),
            **options,
        )
        return outputs, outputs.loss

    outputs, returned = head_forward(model, inputs, score)
    outputs = router_loss.added_to(outputs, returned)
    return replace(outputs, loss=outputs.loss + returned.logits.sum())


def _check_batch(base: Any, batch: Mapping[str, Any]) -> None:
    """Labels of another shape would be scored against other tokens' hidden states."""
    # transformers' BatchEncoding is none to isinstance.
    if not hasattr(batch, "keys"):
        raise TypeError(f"batch must be a mapping of names to tensors, got {batch!r}"[:200])
    if "labels" not in batch:
        raise ValueError(f"batch must have labels, got {', '.join(map(str, batch)) or 'nothing'}")
    labels, ids = batch["labels"], batch.get("input_ids")
    if ids is not None:
        text_inputs.check(base, ids, batch.get("attention_mask"), labels)


def model_inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """What of a batch is the model's, and not the loss's."""
    rest = {
        name: value
        for name, value in batch.items()
        if name not in _OF_THE_LOSS and not name.startswith(MISMATCHED)
    }
    if "cu_seqlens" not in rest:
        return rest
    if rest.keys() != {"input_ids", "cu_seqlens"}:
        raise ValueError(
            "a packed batch has input_ids, labels and cu_seqlens, from which all else is made; "
            f"got {', '.join(rest)}"
        )
    return packed_inputs(model, **rest)
