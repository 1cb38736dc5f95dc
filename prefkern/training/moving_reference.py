"""A reference that follows the policy (TR-DPO, Gorbatovski et al. 2024).

Every `ref_model_sync_steps` optimiser steps, each weight of the reference moves a part of the way:

    reference = alpha policy + (1 - alpha) reference,   alpha = ref_model_mixup_alpha

in float32, rounded once to the reference's dtype. Names and defaults are TRL's. A checkpoint holds
the weights that were moved, so that a resumed run goes on bit for bit:

    moved_reference.safetensors

The reference must be a model of its own with the policy's weights, whole on every rank.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from prefkern.training.checkpoint_files import CheckpointError

REFERENCE_FILE = "moved_reference.safetensors"


class MovesReference(TrainerCallback):
    """Moves the reference of a trainer at the end of every so many steps."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % args.ref_model_sync_steps == 0:
            policy = self._trainer.accelerator.unwrap_model(self._trainer.model)
            move(self._trainer.ref_model, policy, args.ref_model_mixup_alpha)


def check_can_follow(reference: nn.Module, policy: nn.Module) -> None:
    """Raise ValueError for a reference whose weights are not those of the policy, one by one."""
    theirs, ours = dict(reference.named_parameters()), dict(policy.named_parameters())
    for name in sorted(theirs.keys() | ours.keys()):
        shapes = [list(each[name].shape) if name in each else None for each in (theirs, ours)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                "sync_ref_model moves each weight of the reference to the policy's, and "
                f"{name} is {shapes[0] or 'not there'} in ref_model and "
                f"{shapes[1] or 'not there'} in the model; give a ref_model of the same shapes"
            )
        if not theirs[name].is_floating_point():
            raise ValueError(
                f"sync_ref_model needs weights that are floating-point numbers, and {name} of "
                f"ref_model is {theirs[name].dtype}; leave it out, or load ref_model unquantised"
            )


@torch.no_grad()
def move(reference: nn.Module, policy: nn.Module, alpha: float) -> None:
    """Move a reference's weights to the policy's, by a share `alpha` of the way."""
    ours = dict(policy.named_parameters())
    for name, old in reference.named_parameters():
        dtype = torch.promote_types(old.dtype, torch.float32)
        new = ours[name].to(old.device, dtype)
        old.copy_(old.to(dtype).mul(1 - alpha).add_(new, alpha=alpha))


def save_reference(reference: nn.Module, folder: str) -> None:
    """Save a reference's weights in a checkpoint."""
    save_file(_weights(reference), Path(folder) / REFERENCE_FILE)


def load_reference(reference: nn.Module, folder: str) -> None:
    """Load the reference of a checkpoint. Raises CheckpointError if it is not there, or another."""
    file = Path(folder) / REFERENCE_FILE
    if not file.exists():
        raise CheckpointError(
            f"sync_ref_model is True, and {folder} holds no reference ({REFERENCE_FILE}): it was "
            "trained with a reference that stays, or saved weights alone; leave sync_ref_model out, "
            "or start anew"
        )
    try:
        saved = load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}): resume from another") from error
    weights = _weights(reference)
    described = [
        {name: (x.dtype, x.shape) for name, x in each.items()} for each in (saved, weights)
    ]
    if described[0] != described[1]:
        raise CheckpointError(
            f"{file} is of another reference: its weights have other names, shapes or dtypes; give "
            "the ref_model that the run began with"
        )
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(saved[name])


def refuse_moved_reference(folder: str) -> None:
    """Raise CheckpointError for a checkpoint with a moved reference, in a run whose one stays."""
    if (Path(folder) / REFERENCE_FILE).exists():
        raise CheckpointError(
            f"{folder} was trained with a reference that follows the policy ({REFERENCE_FILE}): set "
            "sync_ref_model to go on, or start anew from its weights"
        )


def _weights(reference: nn.Module) -> dict[str, Tensor]:
    return {name: x.detach().contiguous() for name, x in reference.named_parameters()}
