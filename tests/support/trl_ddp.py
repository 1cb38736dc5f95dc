"""TRL's trainers with prefkern's operator on ranks that share a batch, for test_trl_ddp.py.

As a script it is one of the ranks: a folder, then the names of cases.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import trl
from packaging.version import Version
from trl import DPOTrainer as PlainDPOTrainer
from trl import SFTConfig, SFTTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

import twins
from prefkern.integrations.trl import fuse_head
from support import tiny
from support.trl_runs import build

# Two ranks and one process have steps of the same four rows.
ACCUMULATED = {
    1: {"per_device_train_batch_size": 4},
    2: {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
}
SPLIT = {1: {"per_device_train_batch_size": 4}, 2: {"per_device_train_batch_size": 2}}
CASES = ["adadpo", "simpo", "sft", "dpo"]
# Older trainers ask their models for logits.
ASKING = ["sft", "dpo"]
IS_ASKED = Version(trl.__version__).release >= (1, 16)


def outcome(name: str, folder: Path, ranks: int) -> dict[str, Any]:
    """The gradients and logs of two steps: AdaDPO, and SimPO, SFT and DPO of TRL, fused."""
    record = twins.Record()
    given: dict[str, Any] = {"callbacks": [record], "max_steps": 2}
    if name == "adadpo":
        given |= {"objective": name, "ref_model": tiny.model(seed=1), **ACCUMULATED[ranks]}
        given |= {"eval_dataset": tiny.dataset(5, seed=2), "per_device_eval_batch_size": 2}
        trainer = build(folder, **given)
    elif name == "simpo":
        given |= {"loss_type": name, "cpo_alpha": 0.0, "remove_unused_columns": False}
        trainer = fuse_head(build(folder, CPOTrainer, CPOConfig, **given, **ACCUMULATED[ranks]))
    elif name == "sft":
        rows = twins.responses(8).remove_columns("label")
        given |= {"train_dataset": rows, **SPLIT[ranks]}
        trainer = fuse_head(build(folder, SFTTrainer, SFTConfig, **given))
    else:
        given |= {"ref_model": tiny.model(seed=1), **SPLIT[ranks]}
        trainer = fuse_head(build(folder, PlainDPOTrainer, **given))
    trainer.train()
    assert trainer.args.world_size == ranks
    gradients = [
        {key.removeprefix("module."): value for key, value in step.items()}
        for step in record.gradients
    ]
    logs = [log for log in trainer.state.log_history if "loss" in log]
    if name == "adadpo":
        logs.append(trainer.evaluate())
    return {"gradients": gradients, "logs": logs}


if __name__ == "__main__":
    torch.set_num_threads(1)
    place, *names = sys.argv[1:]
    found = {name: outcome(name, Path(place), ranks=2) for name in names}
    torch.save(found, Path(place) / f"rank{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()
