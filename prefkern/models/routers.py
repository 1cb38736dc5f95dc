"""The load-balancing loss of a mixture of experts, which the model computes with its logits.

This loss keeps a router from sending all tokens to a few experts. A model adds it to its own loss
if its config sets `output_router_logits`. prefkern replaces the model's loss, so it adds the term
too: `coefficient * aux_loss`. The term covers all real tokens of a forward batch, prompts included,
as in the model.

The term is not a sum over pairs. Over accumulated batches and over ranks it is the mean of the
values of all batches, weighted by their numbers of pairs. So a split batch trains a little
differently from a whole one; transformers and TRL do the same. The reference does not compute it.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from prefkern.loss.outputs import PreferenceOutput, UnpairedOutput
from prefkern.models.heads import unwrap

_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


@dataclass(frozen=True)
class RouterLoss:
    """The coefficient of a model's load-balancing loss; with 0 the loss is not computed."""

    coefficient: float = 0.0

    @classmethod
    def of(cls, model: nn.Module, coefficient: float | None = None) -> RouterLoss:
        """The router loss of a model.

        Args:
            model: a Hugging Face causal LM, bare or wrapped.
            coefficient: the factor of the loss. None: the model's own coefficient if its config
                sets `output_router_logits`, else 0.

        Raises ValueError for a coefficient if the model has no such loss.
        """
        base = unwrap(model)
        if coefficient is None:
            return cls(_own_coefficient(base) if _is_asked_for(base) else 0.0)
        if coefficient and not _can_be_asked(base):
            raise ValueError(
                f"router_aux_loss_coef is {coefficient}, but {type(base).__name__} has no "
                "load-balancing loss (its forward takes no output_router_logits)"
            )
        return cls(float(coefficient))

    def asked_of(self, model: nn.Module) -> dict[str, bool]:
        """The keyword for the model's forward: models with images read it only there."""
        if self.coefficient:
            return {"output_router_logits": True}
        # Otherwise a config that sets it would compute the loss for nothing.
        return {"output_router_logits": False} if _is_asked_for(unwrap(model)) else {}

    def added_to(
        self, loss: PreferenceOutput | UnpairedOutput, output: Any
    ) -> PreferenceOutput | UnpairedOutput:
        """The loss plus the router's loss, which the metrics also show as `aux_loss`.

        Args:
            loss: the preference loss.
            output: what the model's forward returned.

        Raises ValueError if the output has no load-balancing loss.
        """
        if not self.coefficient:
            return loss
        value = getattr(output, "aux_loss", None)
        if not torch.is_tensor(value):
            raise ValueError(
                "the model was asked for its load-balancing loss but returned none (aux_loss is "
                f"{value!r}); router_aux_loss_coef=0 trains without it"
            )
        term = self.coefficient * value.to(loss.losses.device).float()
        return replace(
            loss,
            loss=loss.loss + term,
            losses=loss.losses + term,
            metrics={**loss.metrics, "aux_loss": value.detach().float().expand(len(loss.losses))},
        )


def _can_be_asked(base: Any) -> bool:
    # Many configs have the attribute although their model has no such loss, so ask the forward.
    return "output_router_logits" in inspect.signature(base.forward).parameters


def _is_asked_for(base: Any) -> bool:
    asked = getattr(base.config.get_text_config(), "output_router_logits", False)
    return bool(asked) and _can_be_asked(base)


def _own_coefficient(base: Any) -> float:
    """The factor of the load-balancing loss in the model's own loss."""
    owners = (base, base.config.get_text_config())
    found = (getattr(owner, name, None) for owner in owners for name in _COEFFICIENTS)
    value = next((value for value in found if value is not None), None)
    if value is None:
        raise ValueError(
            f"the config of {type(base).__name__} sets output_router_logits but has no "
            f"{' or '.join(_COEFFICIENTS)}: give router_aux_loss_coef, 0 for none"
        )
    return float(value)
