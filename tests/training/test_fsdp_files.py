"""FSDP's part of a checkpoint: missing or damaged files are named, and nothing in them is executed."""

from __future__ import annotations

import os
import pickle
import shutil
import types
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from support import tiny

pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")

from prefkern.training import fsdp_files
from prefkern.training.checkpoint_files import CheckpointError
from prefkern.training.checkpoints import CheckpointTrainer
from prefkern.training.fsdp_files import OPTIMIZER, SHARDS, WHOLE, other_kind, problem
from support.training import lora


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


@pytest.mark.parametrize("version", ["1.10.1", "1.14.0", "1.15.0"])
def test_adapters_in_whole_checkpoints(version, monkeypatch):
    monkeypatch.setattr(fsdp_files.metadata, "version", lambda name: version)
    assert fsdp_files.adapter_problem("SHARDED_STATE_DICT") is None
    found = fsdp_files.adapter_problem("FULL_STATE_DICT")
    if version == "1.15.0":
        assert found is None
        return
    assert found is not None
    assert f"FULL_STATE_DICT keeps no whole adapter in accelerate {version}: set SHARDED_" in found
    run = run_under_fsdp()
    for changed in (
        {"model": tiny.model()},
        {"args": types.SimpleNamespace(save_strategy="no", world_size=2)},
        {"args": types.SimpleNamespace(save_strategy="steps", world_size=1)},
        {"accelerator": types.SimpleNamespace(state=types.SimpleNamespace())},
    ):
        CheckpointTrainer._check_adapters_are_kept(run_under_fsdp(**changed), resumes=False)
    with pytest.raises(CheckpointError, match="pip install 'accelerate>=1.15'"):
        CheckpointTrainer._check_adapters_are_kept(run, resumes=False)
    run.args.save_strategy = "no"
    with pytest.raises(CheckpointError, match="or set save_strategy='no'"):
        CheckpointTrainer._check_adapters_are_kept(run, resumes=True)


def run_under_fsdp(**changed: object) -> types.SimpleNamespace:
    """What is asked of a trainer of an adapter under FSDP2."""
    kind = types.SimpleNamespace(name="FULL_STATE_DICT")
    plugin = types.SimpleNamespace(fsdp_version=2, state_dict_type=kind)
    given = {
        "accelerator": types.SimpleNamespace(state=types.SimpleNamespace(fsdp_plugin=plugin)),
        "args": types.SimpleNamespace(save_strategy="steps", world_size=2),
        "model": peft.get_peft_model(tiny.model(), lora()),
    }
    return types.SimpleNamespace(**given | changed)
