"""What the trainers on TRL's share: TRL's batches in prefkern's losses, logits, cards."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trl.trainer.utils import get_comet_experiment_url, get_trackio_space_url

from prefkern.loss.fused import FusedPreferenceLoss
from prefkern.models.packing import packed_inputs
from prefkern.models.scoring import IGNORE_INDEX, align_labels, forward_scored
from prefkern.objectives import Objective, citations
from prefkern.training.cards import objective_tags
from prefkern.training.objective_trainer import ObjectiveTrainer
from prefkern.training.sharing import shares_batches

MARGINS = "reward_margins"
# What a packed batch has in place of a mask.
BOUNDS = "cu_seqlens"
# Entries of a batch that the model's forward does not take.
_NOT_THE_MODELS = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps", MARGINS)


class OnTRL(ObjectiveTrainer):
    """ObjectiveTrainer on a trainer of TRL: logits for its `compute_metrics`, and the card's lines.

    The constructor sets `_tag_names` and `_name`, which TRL writes into models too.
    """

    _with_packages: ClassVar = {"TRL": citations.TRL.link}
    _more_papers = (citations.TRL,)
    _tag_names: list[str]

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Any, Any]:
        """Loss of an evaluation batch; for compute_metrics also its logits, and its tokens."""
        padded = super()._prepare_inputs(inputs)
        loss, _, _ = super().prediction_step(model, padded, prediction_loss_only, ignore_keys)
        if prediction_loss_only:
            return loss, None, None
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(**of_the_model(model, padded), use_cache=False).logits
        return loss, logits, padded["input_ids"]

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return self._packed(super()._prepare_inputs(inputs))

    def _packed(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch of TRL's collator; under padding_free as one row without its padding."""
        if not getattr(self.args, "padding_free", False) or BOUNDS in inputs:
            return inputs
        packed = dict(inputs)
        is_token = packed.pop("attention_mask").bool()  # (2B, T)
        for name in ("input_ids", "completion_mask"):
            packed[name] = inputs[name][is_token][None]
        packed[BOUNDS] = F.pad(is_token.sum(1).cumsum(0), (1, 0)).int()
        return packed

    def _count_tokens(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """TRL's `num_tokens`: the real tokens of all ranks' training batches so far."""
        trls: Any = self
        if model.training:
            tokens: Any = real_tokens(inputs)
            if not shares_batches(self.accelerator):
                tokens = self.accelerator.gather(tokens)
            trls._total_train_tokens += int(tokens.sum())
        mode = "train" if model.training else "eval"
        trls._metrics[mode]["num_tokens"] = [trls._total_train_tokens]

    def _card_tags(self) -> list[str]:
        return list(self._tag_names)

    def _badges(self) -> list[str]:
        runs = {"Trackio": get_trackio_space_url(), "Comet": get_comet_experiment_url()}
        return [
            *super()._badges(),
            *(f"[The run in {name}]({url})" for name, url in runs.items() if url is not None),
        ]


def tag_names(objective: Objective) -> list[str]:
    return ["trl", "prefkern", *objective_tags(objective)]


def scored(
    model: nn.Module,
    inputs: dict[str, Any],
    loss_fn: FusedPreferenceLoss,
    with_router: bool,
    **options: Any,
) -> tuple[Any, Tensor, Tensor | None]:
    """Runs `loss_fn` on TRL's batch inside the model's forward.

    Returns its outputs, the scalar 0 that fires the wrappers' hooks, and the router's loss or None.
    """
    model_inputs = of_the_model(model, inputs)
    if with_router:
        # Vision-language models read it only as an argument, not from their config.
        model_inputs["output_router_logits"] = True
    bounds = inputs.get(BOUNDS)
    outputs, returned = forward_scored(
        model,
        model_inputs,
        aligned_labels(inputs),
        loss_fn,
        bounds is not None,
        cu_seqlens=bounds,
        **options,
    )
    return outputs, returned.logits.sum(), getattr(returned, "aux_loss", None)


def aligned_labels(inputs: dict[str, Any]) -> Tensor:  # (S, T), or (1, M) if packed
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORE_INDEX)
    return align_labels(labels, inputs.get(BOUNDS))


def of_the_model(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    rest = {name: value for name, value in inputs.items() if name not in _NOT_THE_MODELS}
    return packed_inputs(model, **rest) if BOUNDS in rest else rest


def count_sequences(inputs: dict[str, Any]) -> int:
    return len(inputs[BOUNDS]) - 1 if BOUNDS in inputs else len(inputs["input_ids"])


def real_tokens(inputs: dict[str, Any]) -> Tensor:  # ()
    if BOUNDS in inputs:
        return inputs[BOUNDS][-1].long()
    return inputs["attention_mask"].sum()
