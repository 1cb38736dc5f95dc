"""A model's forward with its head replaced, and the router's loss that comes out of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from prefkern.models import Score, forward_with_head, unwrap


def forward_with_router(
    model: nn.Module, inputs: Mapping[str, Any], fn: Score
) -> tuple[Any, Tensor, Tensor | None]:
    """`prefkern.models.forward_with_head`, with a mixture of experts' `aux_loss` as a third value.

    The model computes that loss itself, from the router's logits, where the inputs ask for it by
    `output_router_logits`; None where they do not.
    """
    outputs: list[Any] = []
    hook = unwrap(model).register_forward_hook(lambda module, args, out: outputs.append(out))
    try:
        result, zero = forward_with_head(model, inputs, fn)
    finally:
        hook.remove()
    return result, zero, getattr(outputs[-1], "aux_loss", None)
