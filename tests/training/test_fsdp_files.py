"""FSDP's part of a checkpoint: missing or damaged files are named, and nothing in them is executed."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from prefkern.training import fsdp_files
from prefkern.training.fsdp_files import OPTIMIZER, SHARDS, WHOLE, other_kind, problem


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    for name in (SHARDS, OPTIMIZER):
        state = {"a": torch.randn(5, 3), "b": {"step": torch.ones(()), "lr": 0.1}}
        dcp.save(state, checkpoint_id=tmp_path / name)
    return tmp_path


def test_a_whole_one_has_no_problem(checkpoint, tmp_path_factory):
    assert problem(checkpoint) is None
    assert problem(tmp_path_factory.mktemp("none")) is None


@pytest.mark.parametrize("name", [SHARDS, OPTIMIZER])
def test_what_is_missing_or_cut_off_is_named(checkpoint, name):
    folder = checkpoint / name
    [file] = folder.glob("*.distcp")
    size = file.stat().st_size
    # No byte is left over: one less is damage.
    os.truncate(file, size - 1)
    assert problem(checkpoint) == (
        f"{file} is damaged or was not written to its end ({size - 1} of {size} bytes)"
    )
    file.unlink()
    named = f"it has no {file.name}, which .metadata names"
    assert problem(checkpoint) == f"{folder} is incomplete: {named}"
    (folder / ".metadata").unlink()
    assert problem(checkpoint) == (
        f"{folder} is incomplete: it has no .metadata, which is written last"
    )
    shutil.rmtree(folder)
    assert problem(checkpoint) == f"{checkpoint} is incomplete: it has no {name}"


def test_metadata_that_is_cut_off(checkpoint):
    metadata = checkpoint / SHARDS / ".metadata"
    whole = metadata.read_bytes()
    for size in range(0, len(whole), 40):
        metadata.write_bytes(whole[:size])
        assert f"{metadata} is damaged or was not written to its end" in (problem(checkpoint) or "")
    metadata.write_bytes(pickle.dumps({}))
    assert (problem(checkpoint) or "").endswith("(it names no files)")


class Execute:
    """A pickle of this makes a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_nothing_in_metadata_is_executed(checkpoint):
    trap = checkpoint / "made"
    (checkpoint / SHARDS / ".metadata").write_bytes(pickle.dumps([Execute(trap)]))
    assert "it names no files" in (problem(checkpoint) or "")
    assert not trap.exists()
    # The pickle is one that does it.
    pickle.loads((checkpoint / SHARDS / ".metadata").read_bytes())
    assert trap.exists()


def test_the_kind_that_a_run_reads(checkpoint):
    assert other_kind(checkpoint, "SHARDED_STATE_DICT") is None
    # No FSDP, or a kind that is not known here.
    assert other_kind(checkpoint, "") is None
    assert "set SHARDED_STATE_DICT" in (other_kind(checkpoint, "FULL_STATE_DICT") or "")
    shutil.rmtree(checkpoint / fsdp_files.SHARDS)
    for kind in ("SHARDED_STATE_DICT", "FULL_STATE_DICT"):
        assert "was not saved under FSDP" in (other_kind(checkpoint, kind) or "")
    (checkpoint / WHOLE).touch()
    assert other_kind(checkpoint, "FULL_STATE_DICT") is None
    assert "set FULL_STATE_DICT" in (other_kind(checkpoint, "SHARDED_STATE_DICT") or "")
