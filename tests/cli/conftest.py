"""Fixtures for the tests of the command line."""

from __future__ import annotations

import json

import pytest

from support import tiny


@pytest.fixture
def files(tmp_path):
    """A model folder, a file of pairs, and flags that make a short run of them."""
    tiny.model().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    rows = tiny.pairs(12)
    rows[0]["rejected"] = rows[0]["chosen"]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model_name_or_path": str(tmp_path / "model"),
        "dataset": str(tmp_path / "pairs.jsonl"),
        "output_dir": str(tmp_path / "out"),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
    }
