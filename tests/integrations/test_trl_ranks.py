"""The trainers on TRL's under tensor parallelism: two ranks against one process."""

from __future__ import annotations

import os

import pytest
import torch
import transformers
from packaging.version import Version

pytest.importorskip("trl.experimental.tpo")
pytest.importorskip("peft")
# So that TRL sends nothing over the network.
os.environ.setdefault("CI", "1")

if Version(transformers.__version__) < Version("5.23"):
    pytest.skip("older ones are refused", allow_module_level=True)

from support.tensor_parallel import launch, save_models, through_trl


def test_a_batch_of_all_ranks_counts_once(tmp_path):
    """In draws, metrics and the count of tokens."""
    save_models(tmp_path)
    launch(tmp_path, "trl")
    expected = through_trl(tmp_path / "one process", tmp_path, ranks=1)
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pt")["trl"]
        for name, logs in expected.items():
            assert len(logs) == 2
            for mine, true in zip(found[name], logs, strict=True):
                assert mine["num_tokens"] == true["num_tokens"] > 0
                assert mine == pytest.approx(true, rel=1e-3, abs=1e-4), name
