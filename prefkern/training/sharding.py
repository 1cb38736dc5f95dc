"""A reference that is sharded as the policy is, and computes in the same mixed precision (FSDP2).

FSDP2 casts weights and inputs by its own policy, where autocast casts the operands of products. So
a reference outside of it would round at other places than the policy, and equal models would not
have equal log-probs. `sharded` makes its units of the same layers, over the same ranks.

A model that is sharded answers `state_dict()` with a change: FSDP2 first puts the shards back. On
one rank alone that leaves the ranks with different collectives to run. What one rank needs of all
weights, such as their hash, it takes before.
"""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from torch import nn


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 holds a model's weights."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def sharded(model: nn.Module, accelerator: Accelerator) -> Any:
    """The model for forwards alone, sharded in place as `accelerator` shards the policy."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    plugin: Any = accelerator.state.fsdp_plugin
    # The first model that is sharded sets which classes of layers are wrapped: here that is not the
    # policy, and the two may be of different families.
    layers = (plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap)
    model.requires_grad_(False).eval()
    try:
        # Loading may set new parameters.
        return fsdp2_prepare_model(accelerator, model).requires_grad_(False).eval()
    finally:
        plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = layers
