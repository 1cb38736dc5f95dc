"""What the trainers on TRL's share: TRL's batches in prefkern's losses, logits, cards."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from trl.trainer.utils import get_comet_experiment_url, get_trackio_space_url

from prefkern.loss.fused import FusedPreferenceLoss
from prefkern.models.scoring import IGNORE_INDEX, align_labels, forward_scored
from prefkern.objectives import Objective, citations
from prefkern.training.cards import objective_tags
from prefkern.training.objective_trainer import ObjectiveTrainer

MARGINS = "reward_margins"
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
        inputs = self._prepare_inputs(inputs)
        loss, _, _ = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if prediction_loss_only:
            return loss, None, None
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(**of_the_model(inputs), use_cache=False).logits
        return loss, logits, inputs["input_ids"]

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
    model_inputs = of_the_model(inputs)
    if with_router:
        # Vision-language models read it only as an argument, not from their config.
        model_inputs["output_router_logits"] = True
    outputs, returned = forward_scored(
        model, model_inputs, align_labels(labels_of(inputs)), loss_fn, **options
    )
    return outputs, returned.logits.sum(), getattr(returned, "aux_loss", None)


def labels_of(inputs: dict[str, Any]) -> Tensor:  # (S, T), not shifted
    return inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORE_INDEX)


def of_the_model(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in _NOT_THE_MODELS}
