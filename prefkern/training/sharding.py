"""Sharded runs: what they cannot do is refused before anything is loaded; their reference is sharded.

A reference is sharded as the policy is, and computes in the same mixed precision.

FSDP2 casts weights and inputs by its own policy, where autocast casts the operands of products. So
a reference outside of it would round at other places than the policy, and equal models would not
have equal log-probs. `sharded` makes its units of the same layers, over the same ranks. Under
DeepSpeed a reference has an engine of its own (`prefkern.training.zero`).

A model that is sharded answers `state_dict()` with a change: FSDP2 first puts the shards back. On
one rank alone that leaves the ranks with different collectives to run. What one rank needs of all
weights, such as their hash, it takes before.
"""

from __future__ import annotations

import os
from typing import Any

from accelerate import Accelerator
from torch import nn

from prefkern.models.ties import own_ties, untie_originals
from prefkern.training import zero
from prefkern.training.checks import Needs

_FSDP2 = "use FSDP2 (fsdp_config={'version': 2}, or accelerate launch --fsdp_version 2)"


def mode_of(args: Any) -> str | None:
    """How a run is sharded, by its arguments or its launcher: "FSDP1", "FSDP2", "ZeRO-3", ... None."""
    config = zero.configuration(args)
    if config is not None:
        return f"ZeRO-{zero.stage_of(config)}"
    # transformers writes these; older ones set the launcher's variables instead.
    given = getattr(args, "fsdp_plugin_args", None)
    if given:
        return f"FSDP{given['fsdp_version']}"
    # Accelerate does not shard one process.
    if _is_on("ACCELERATE_USE_FSDP") and args.parallel_mode.value == "distributed":
        return f"FSDP{os.environ.get('FSDP_VERSION', '1')}"
    return None


def _is_on(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def check_sharded_reference(mode: str | None, needs: Needs, *, is_carried: bool) -> None:
    """Raise ValueError for a reference that a sharded run does not compute.

    Args:
        mode: from `mode_of`.
        needs: what the objective needs.
        is_carried: whether all datasets carry the reference's sums.
    """
    if mode is None or not needs.reference or is_carried:
        return
    if needs.distributions and mode == "FSDP1":
        raise ValueError(
            f"TDPO is not supported under FSDP1: {_FSDP2}, DeepSpeed's ZeRO or DDP, or take an "
            "objective that needs sums alone"
        )
    if mode == "FSDP1":
        raise ValueError(
            "no reference is computed under FSDP1, whose weights cannot be read with the adapter "
            f"off or before training: {_FSDP2}, or carry its sums in the dataset "
            "(ref_chosen_logps and ref_rejected_logps columns)"
        )


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 or ZeRO-3 holds a model's weights."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule) or zero.is_partitioned(model)


def sharded(model: nn.Module, accelerator: Accelerator) -> Any:
    """The model for forwards alone, sharded in place as `accelerator` shards the policy."""
    if accelerator.state.deepspeed_plugin is not None:
        return zero.forward_engine(model.requires_grad_(False).eval(), accelerator)
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    plugin: Any = accelerator.state.fsdp_plugin
    # The first model that is sharded sets which classes of layers are wrapped: here that is not the
    # policy, and the two may be of different families.
    layers = (plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap)
    model.requires_grad_(False).eval()
    untie_originals(model)
    given = accelerator.parallelism_config
    if given is not None and given.cp_enabled:
        # Its attention leaves the mask out, as the policy's does.
        accelerator._prepare_cp(model)
    try:
        with own_ties(model):
            prepared: Any = fsdp2_prepare_model(accelerator, model)
        # Accelerate keeps the head whole after a forward, and the layers too if it was asked to, for
        # the backward that frees them. Here none follows.
        prepared.set_reshard_after_forward(True)
        # Loading may set new parameters.
        return prepared.requires_grad_(False).eval()
    finally:
        plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = layers
