"""The load-balancing loss of a mixture of experts, which the model computes beside its logits.

It keeps a router from sending all tokens to few experts, and the model adds it to its own loss when
its config says `output_router_logits`. The loss that takes the place of the model's adds it as well:
`coefficient * aux_loss`, over all real tokens of a forward batch, prompts included, as the model has
it. It is no sum over pairs: over accumulated batches and over ranks it is the mean of the batches'
own values, weighed by their pairs, so a split batch trains a little differently from a whole one, as
it does in transformers and TRL. A reference has no use for it, and is not asked to compute it.
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
    """What a model's load-balancing loss counts for; 0: nothing, and it is not computed."""

    coefficient: float = 0.0

    @classmethod
    def of(cls, model: nn.Module, coefficient: float | None = None) -> RouterLoss:
        """The router loss of a model.

        Args:
            model: a Hugging Face causal LM, bare or wrapped.
            coefficient: what it counts for; None: the model's own coefficient if its config has
                `output_router_logits` on, else nothing.

        Raises ValueError for a coefficient of a model that has no such loss.
        """
        base = unwrap(model)
        if coefficient is None:
            return cls(_own_coefficient(base) if _is_asked_for(base) else 0.0)
        if coefficient and not _can_be_asked(base):
            raise ValueError(
                f"router_aux_loss_coef is {coefficient}, and {type(base).__name__} has no "
                "load-balancing loss (its forward takes no output_router_logits)"
            )
        return cls(float(coefficient))

    def asked_of(self, model: nn.Module) -> dict[str, bool]:
        """What to pass to the model's forward: models with images take it from there alone."""
        if self.coefficient:
            return {"output_router_logits": True}
        # A config that asks for it would have it computed in vain.
        return {"output_router_logits": False} if _is_asked_for(unwrap(model)) else {}

    def added_to(
        self, loss: PreferenceOutput | UnpairedOutput, output: Any
    ) -> PreferenceOutput | UnpairedOutput:
        """The loss with the router's in it, and among its metrics as `aux_loss`.

        Args:
            loss: the preference loss.
            output: what the model's forward returned.

        Raises ValueError where that has no load-balancing loss.
        """
        if not self.coefficient:
            return loss
        value = getattr(output, "aux_loss", None)
        if not torch.is_tensor(value):
            raise ValueError(
                "the model was asked for its load-balancing loss and returned none (aux_loss is "
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
    # Many a config knows the name, and its model has no such loss.
    return "output_router_logits" in inspect.signature(base.forward).parameters


def _is_asked_for(base: Any) -> bool:
    asked = getattr(base.config.get_text_config(), "output_router_logits", False)
    return bool(asked) and _can_be_asked(base)


def _own_coefficient(base: Any) -> float:
    """What the model multiplies its load-balancing loss by in a loss of its own."""
    owners = (base, base.config.get_text_config())
    found = (getattr(owner, name, None) for owner in owners for name in _COEFFICIENTS)
    value = next((value for value in found if value is not None), None)
    if value is None:
        raise ValueError(
            f"{type(base).__name__} is asked for its router's logits (output_router_logits), and "
            f"has no {' or '.join(_COEFFICIENTS)}: give router_aux_loss_coef, 0 for none"
        )
    return float(value)
