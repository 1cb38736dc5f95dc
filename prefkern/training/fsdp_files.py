"""What FSDP writes into a checkpoint: whether it is all there, and of the kind that a run reads.

    SHARDED_STATE_DICT  pytorch_model_fsdp_0/ and optimizer_0/, each with a .distcp file a rank and
                        .metadata, which is written last and says where in the files a tensor lies
    FULL_STATE_DICT     pytorch_model_fsdp.bin and optimizer.bin

.metadata is a pickle. Here it is read without calling anything that it names: only the places are
wanted. torch, which loads the checkpoint later, does call it.
"""

from __future__ import annotations

import pickle
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.version import Version

WHOLE = "pytorch_model_fsdp.bin"
SHARDS, OPTIMIZER = "pytorch_model_fsdp_0", "optimizer_0"
_METADATA = ".metadata"
_SETTING = "fsdp_state_dict_type"


def problem(checkpoint: Path) -> str | None:
    """What is missing or damaged of FSDP's shards in a checkpoint; None if nothing is."""
    folders = [checkpoint / name for name in (SHARDS, OPTIMIZER)]
    if not any(folder.is_dir() for folder in folders):
        return None
    for folder in folders:
        if not folder.is_dir():
            return f"{checkpoint} is incomplete: it has no {folder.name}"
        written_last = folder / _METADATA
        if not written_last.exists():
            return f"{folder} is incomplete: it has no {_METADATA}, which is written last"
        try:
            ends = _ends(written_last)
        except (pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError) as error:
            return f"{written_last} is damaged or was not written to its end ({error})"
        for name, end in sorted(ends.items()):
            file = folder / name
            if not file.is_file():
                return f"{folder} is incomplete: it has no {name}, which {_METADATA} names"
            size = file.stat().st_size
            if size < end:
                return f"{file} is damaged or was not written to its end ({size} of {end} bytes)"
    return None


def other_kind(checkpoint: Path, kind: str) -> str | None:
    """Why a run with this state dict type cannot read a checkpoint; None if it can.

    Only rank 0 opens whole files: without them it would fail, and the other ranks wait for it.
    """
    found = {
        "SHARDED_STATE_DICT": (checkpoint / SHARDS).is_dir(),
        "FULL_STATE_DICT": (checkpoint / WHOLE).is_file(),
    }
    if found.get(kind, True):
        return None
    saved = next((name for name, is_there in found.items() if is_there), None)
    if saved is not None:
        return (
            f"{checkpoint} was saved with {_SETTING} {saved}, and this run has {kind}: set {saved}"
        )
    return (
        f"{checkpoint} was not saved under FSDP, and this run is under FSDP, which does not load "
        "its optimizer: resume as it was trained, or give the folder as the model"
    )


def adapter_problem(kind: str) -> str | None:
    """Why an adapter is in no checkpoint of this state dict type; None if it is.

    accelerate before 1.15 gathers whole weights of a model, and of an adapter none: rank 0 writes its
    shards alone.
    """
    version = metadata.version("accelerate")
    if kind != "FULL_STATE_DICT" or Version(version).release >= (1, 15):
        return None
    return (
        f"{_SETTING} FULL_STATE_DICT keeps no whole adapter in accelerate {version}: set "
        "SHARDED_STATE_DICT (state_dict_type in fsdp_config, --fsdp_state_dict_type of accelerate "
        "launch), or pip install 'accelerate>=1.15', or set save_strategy='no'"
    )


def _ends(written_last: Path) -> dict[str, int]:
    """How many bytes each file has at least, by its name."""
    with written_last.open("rb") as file:
        reader = _Places(file)
        reader.load()
    ends: dict[str, int] = {}
    for place in reader.places:
        name, end = str(place["relative_path"]), int(place["offset"]) + int(place["length"])
        ends[name] = max(ends.get(name, 0), end)
    if not ends:
        raise ValueError("it names no files")
    return ends


class _Inert:
    """Stands for whatever a pickle names: it is made and filled, and does nothing."""

    def __init__(self, *args: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Places(pickle.Unpickler):
    """Reads a pickle as inert objects, and keeps the states of torch's `_StorageInfo`."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.places: list[Any] = []

    def find_class(self, module_name: str, global_name: str) -> Any:
        if global_name != "_StorageInfo":
            return _Inert
        places = self.places

        class Place(_Inert):
            def __setstate__(self, state: Any) -> None:
                places.append(state)

        return Place
