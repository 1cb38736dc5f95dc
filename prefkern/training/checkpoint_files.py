"""The folders of checkpoints: which are complete, what is damaged, how one takes its place.

A checkpoint is written to

    <output_dir>/.unfinished/checkpoint-N      and renamed to
    <output_dir>/checkpoint-N                  once every rank has written its part.

Only then are older ones deleted. If an earlier run left a folder of that name, the finished one
waits under `.finished` until the old one is deleted; after a kill in between, the next run
completes that.

A checkpoint is whole if every file that a run would read can be opened. Nothing in a file is
executed, and no numbers are read.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.trainer_pt_utils import safe_globals

from prefkern.training import fsdp_files, zero
from prefkern.training.files import remove, sync
from prefkern.training.saving import (
    ADAPTER_CONFIG,
    ADAPTERS,
    CONFIG,
    INDICES,
    UNFINISHED,
    WEIGHTS,
)
from prefkern.training.unsaved import UNSAVED_FILE

logger = logging.getLogger(__name__)

STATE = "trainer_state.json"
_FINISHED = ".finished"
_NAME = re.compile(r"checkpoint-(\d+)")
_JSON = (STATE, CONFIG, ADAPTER_CONFIG, UNSAVED_FILE, *INDICES)
# A pickle of more than tensors, for people. No run opens it.
_UNREAD = ("training_args.bin",)


class CheckpointError(ValueError):
    """A checkpoint that a run cannot resume from; the message names the file and what to do."""


def last_complete(folder: Path) -> Path:
    """The complete checkpoint with the largest number; warns of incomplete ones that it skips.

    Raises CheckpointError if there is none.
    """
    passed = []
    for checkpoint in reversed(checkpoints_of(folder)):
        found = problem(checkpoint)
        if found is None:
            for each in passed:
                logger.warning("resuming from %s: %s", checkpoint, each)
            return checkpoint
        passed.append(found)
    reasons = "".join(f"; {each}" for each in passed)
    raise CheckpointError(
        f"resume_from_checkpoint is True, and {folder} holds no complete checkpoint{reasons}; "
        "leave it out to start anew"
    )


def require_complete(checkpoint: Path) -> None:
    """Raise CheckpointError for a checkpoint that is missing, incomplete or damaged."""
    if not checkpoint.is_dir():
        raise CheckpointError(
            f"resume_from_checkpoint must be a folder, True or None, got {str(checkpoint)!r}, "
            "which is no folder"
        )
    found = problem(checkpoint)
    if found is not None:
        others = [each for each in checkpoints_of(checkpoint.parent) if each != checkpoint]
        whole = [str(each) for each in others if problem(each) is None]
        remedy = f"resume from {whole[-1]}" if whole else "start anew, without it"
        raise CheckpointError(f"{found}; {remedy}")


def problem(checkpoint: Path) -> str | None:
    """What is missing or damaged in a checkpoint, naming the file; None if it is complete."""
    names = {path.name for path in checkpoint.iterdir()}
    if STATE not in names:
        # transformers writes it last.
        return f"{checkpoint} is incomplete: it has no {STATE}, which is written last"
    adapters = _adapter_folders(checkpoint)
    for path in sorted(chain(checkpoint.iterdir(), *(each.iterdir() for each in adapters))):
        found = _damage(path)
        if found is not None:
            return f"{path} is damaged or was not written to its end ({found})"
    for adapter in adapters:
        if not any((adapter / name).exists() for name in ADAPTERS):
            return f"{adapter} is incomplete: it has no {ADAPTERS[0]}"
    found = zero.problem(checkpoint) or fsdp_files.problem(checkpoint)
    if found is not None:
        return found
    folders = keeps_state_in_folders(checkpoint)
    known = {*WEIGHTS, *ADAPTERS, *INDICES}
    if not folders and not adapters and not known & names:
        return f"{checkpoint} is incomplete: it has no weights ({WEIGHTS[0]} or {ADAPTERS[0]})"
    for index in INDICES:
        if index in names:
            shards = set(json.loads((checkpoint / index).read_text())["weight_map"].values())
            for shard in sorted(shards - names):
                return f"{checkpoint} is incomplete: it has no {shard}, which {index} names"
    has_optimizer = folders or any(name.startswith("optimizer") for name in names)
    if not folders and has_optimizer != ("scheduler.pt" in names):
        missing = "scheduler.pt" if has_optimizer else "optimizer.pt"
        return f"{checkpoint} is incomplete: it has no {missing}"
    return None


def _adapter_folders(checkpoint: Path) -> list[Path]:
    """Folders of adapters that are not called "default"."""
    return [path.parent for path in checkpoint.glob(f"*/{ADAPTER_CONFIG}")]


def keeps_state_in_folders(checkpoint: Path) -> bool:
    """Whether the state is in folders, as DeepSpeed and FSDP write it."""
    adapters = _adapter_folders(checkpoint)
    return any(path.is_dir() and path not in adapters for path in checkpoint.iterdir())


def _damage(path: Path) -> str | None:
    """Why a file cannot be read; None if it can, or if no run reads it."""
    try:
        if path.name in _JSON:
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                pass
        elif path.suffix in (".pt", ".pth", ".bin") and path.name not in _UNREAD and path.is_file():
            read_tensors(path)
    except (SafetensorError, OSError, ValueError) as error:
        return _first_line(error)
    return None


def read_tensors(path: Path) -> Any:
    """Read tensors and plain values that torch.save wrote; nothing in the file is executed.

    Numbers stay on disk until they are needed. Raises ValueError, with a reason, for other files,
    truncated ones, and objects of other types.
    """
    try:
        with safe_globals():
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except Exception as error:
        # The errors of the reader and of the unpickler have no common type.
        raise ValueError(_first_line(error)) from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    # torch first explains weights_only and how to switch it off: take the cause alone.
    unsafe = re.search(r"unsupported GLOBAL (\S+)", text, re.IGNORECASE)
    if unsafe is not None:
        return f"it would call {unsafe[1]}, which is not done"
    return f"{type(error).__name__}: {next(iter(text.splitlines()), '')[:200]}"


def checkpoints_of(folder: Path) -> list[Path]:
    """Folders called checkpoint-N, in the order of N."""
    if not folder.is_dir():
        return []
    found = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir()]
    return [path for _, path in sorted((int(name[1]), path) for name, path in found if name)]


def put_in_place(checkpoint: Path, folder: Path) -> None:
    """Move a finished checkpoint to its final place."""
    sync(checkpoint)
    final = folder / checkpoint.name
    if final.exists():
        # A rename cannot replace a folder with contents.
        waiting = folder / _FINISHED / checkpoint.name
        waiting.parent.mkdir(exist_ok=True)
        checkpoint.rename(waiting)
        take_places(folder)
    else:
        checkpoint.rename(final)
    remove(checkpoint.parent)


def take_places(folder: Path) -> None:
    """Replace checkpoints by finished ones of the same name, also after a kill in between."""
    waiting = folder / _FINISHED
    for checkpoint in checkpoints_of(waiting):
        _delete(folder / checkpoint.name)
        checkpoint.rename(folder / checkpoint.name)
    with contextlib.suppress(OSError):
        waiting.rmdir()


def delete_oldest(folder: Path, limit: int | None, keep: Iterable[Path]) -> None:
    """Delete checkpoints beyond a limit, but never the one just saved, nor the best.

    Trainer would keep the largest number, which may be an earlier run's, if it cannot compare ages.
    """
    if limit is None or limit <= 0:
        return
    found = sorted(checkpoints_of(folder), key=lambda path: path.stat().st_mtime_ns)
    # The paths may be spelt differently, since the run may have been resumed with another spelling.
    kept = {path.resolve() for path in keep}
    surplus = max(len(found) - max(limit, len(kept)), 0)
    for checkpoint in [path for path in found if path.resolve() not in kept][:surplus]:
        _delete(checkpoint)


def _delete(checkpoint: Path) -> None:
    """Delete a checkpoint if it exists. It is renamed first, so that none is seen half deleted."""
    if checkpoint.exists():
        waste = checkpoint.parent / UNFINISHED
        remove(waste)
        waste.mkdir()
        checkpoint.rename(waste / checkpoint.name)
        remove(waste)
