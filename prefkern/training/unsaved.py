"""Fingerprints of the weights that a run depends on and its checkpoints do not hold.

An adapter's checkpoint does not hold the base model, and no checkpoint holds the reference. A run
that resumes with other weights of the same shapes would go on silently: an adapter over a base that
it was not trained on, or, with the checkpoint as the model, the trained policy as its own
reference.

    unsaved_weights.json    {"base model": {name: hash}, "reference": {name: hash}}

An adapter's reference has no weights of its own ({}) where it is the base model.

A hash covers a few hundred values spread over a tensor, and its end. That takes milliseconds, where
all bytes of a model would take seconds, and training moves every value. Tensors that are sharded or
offloaded are left out.
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
    """A hash of some values of each tensor, by name."""
    return {name: _hash(value.detach()) for name, value in tensors if _is_here(value)}


def save_fingerprints(fingerprints: Fingerprints, folder: str) -> None:
    """Save in a checkpoint the hashes of what it was trained with and does not hold."""
    write_json(Path(folder) / UNSAVED_FILE, fingerprints)


def warn_of_others(fingerprints: Fingerprints, checkpoint: Path) -> None:
    """Warn if a resuming run has other weights than the checkpoint was trained with."""
    file = checkpoint / UNSAVED_FILE
    if not file.exists():
        return
    saved: Fingerprints = json.loads(file.read_text(encoding="utf-8"))
    for what in saved.keys() & fingerprints.keys():
        ours, theirs = fingerprints[what], saved[what]
        if bool(ours) != bool(theirs):
            own, base = "weights of its own", "the base model, without an adapter"
            logger.warning(
                "%s was trained with another %s: it was %s, and is %s now; resume with the model, "
                "adapter and ref_model that the run began with",
                checkpoint,
                what,
                own if theirs else base,
                own if ours else base,
            )
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
    # The last rows too: rows added to an embedding are there.
    for sample in (flat[:: max(len(flat) // _SAMPLES, 1)], flat[-_SAMPLES:]):
        digest.update(sample.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
