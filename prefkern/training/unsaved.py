"""Which weights a run's numbers lean on that its checkpoints do not hold: told apart on resuming.

An adapter's checkpoint has no base model, and none has the reference. A run that is resumed with
others of the same shapes would go on without a word: an adapter over weights that it was not trained
on, or, with the checkpoint itself as the model, against a reference that is the trained policy.

    unsaved_weights.json    {"base model": {name: hash}, "reference": {name: hash}}

A hash is of a few hundred values of a tensor, spread over it, and its end: that costs milliseconds
where a model's bytes would cost seconds, and training moves all of them. Tensors whose values are not
all here (sharded, offloaded) are left out.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import xxhash
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from prefkern.training.files import write_json

logger = logging.getLogger(__name__)

UNSAVED_FILE = "unsaved_weights.json"
_SAMPLES = 256

Fingerprints = Mapping[str, Mapping[str, str]]


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """A hash by name of some values of each tensor."""
    return {name: _hash(value.detach()) for name, value in tensors if _is_here(value)}


def save_fingerprints(fingerprints: Fingerprints, folder: str) -> None:
    """Put into a checkpoint what it was trained with and does not hold."""
    write_json(Path(folder) / UNSAVED_FILE, fingerprints)


def warn_of_others(fingerprints: Fingerprints, checkpoint: Path) -> None:
    """Warn where a run that resumes has other weights than a checkpoint was trained with."""
    file = checkpoint / UNSAVED_FILE
    if not file.exists():
        return
    saved: Fingerprints = json.loads(file.read_text(encoding="utf-8"))
    for what in saved.keys() & fingerprints.keys():
        ours, theirs = fingerprints[what], saved[what]
        differing = [name for name in ours if name in theirs and theirs[name] != ours[name]]
        if differing:
            logger.warning(
                "%s was trained with another %s: of %d weights %d differ, the first of them %s; "
                "resume with the one that the run began with, in its dtype",
                checkpoint,
                what,
                len(ours),
                len(differing),
                differing[0],
            )


def _is_here(value: Tensor) -> bool:
    return not (value.is_meta or hasattr(value, "ds_id") or is_traceable_wrapper_subclass(value))


def _hash(value: Tensor) -> str:
    flat = value.reshape(-1)
    digest = xxhash.xxh3_64(f"{value.dtype} {list(value.shape)}".encode())
    # Rows that were added to an embedding are its last.
    for sample in (flat[:: max(len(flat) // _SAMPLES, 1)], flat[-_SAMPLES:]):
        digest.update(sample.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
