"""The trainers on TRL's under tensor parallelism: two ranks against one process."""

from __future__ import annotations

import os

import pytest
import torch

from support.versions import TENSOR_PARALLEL

pytest.importorskip("trl.experimental.tpo")
pytest.importorskip("peft")
# So that TRL sends nothing over the network.
os.environ.setdefault("CI", "1")

if not TENSOR_PARALLEL.is_here:
    pytest.skip(TENSOR_PARALLEL.reason, allow_module_level=True)

from accelerate.parallelism_config import ParallelismConfig
from transformers.trainer_pt_utils import AcceleratorConfig
from trl import DPOConfig
from trl.experimental.tpo import TPOConfig

from prefkern.integrations.trl import DPOTrainer, TPOTrainer
from support import tiny
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


@pytest.mark.parametrize("kind", [DPOTrainer, TPOTrainer])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parallelism_config": ParallelismConfig(cp_size=2)}, "parallelism_config has cp_size=2"),
        ({"parallelism_config": ParallelismConfig(sp_size=2)}, "parallelism_config has sp_size=2"),
        (
            {"accelerator_config": AcceleratorConfig(dispatch_batches=True)},
            "dispatch_batches cuts a batch by its",
        ),
    ],
    ids=["cp", "sp", "dispatch"],
)
def test_what_would_cut_pairs_is_refused(kind, options, message, tmp_path):
    configure = TPOConfig if kind is TPOTrainer else DPOConfig
    args = configure(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    for name, value in options.items():
        setattr(args, name, value)
    rows = tiny.triple_dataset(4) if kind is TPOTrainer else tiny.dataset(4)
    with pytest.raises(ValueError, match=message):
        kind("no model", args=args, train_dataset=rows)
