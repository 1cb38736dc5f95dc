"""Two ranks under DeepSpeed's ZeRO of which one or both die while they save, as `support.fsdp_crash`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from support import zero
from support.fsdp_crash import BOTH, try_moments
from support.killed import (
    BEFORE,
    LAST,
    SAVING,
    after_the_rename,
    at_step,
    before_all_files,
    before_the_rename,
    in_trainer_state,
    in_weights,
    kill,
)
from support.resumed import run_of


def in_a_part_of_the_optimizer(trainer: Any) -> None:
    """Kill when this rank's file of the optimizer's state has half of its bytes."""
    save = torch.save

    def save_half(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        save(value, path, *args, **kwargs)
        if at_step(trainer) and str(path).endswith("optim_states.pt"):
            os.truncate(path, Path(path).stat().st_size // 2)
            kill()

    torch.save = save_half


def before_latest(trainer: Any) -> None:
    """Kill when DeepSpeed's files are all there, and not the one that names them."""
    save = trainer._save_optimizer_and_scheduler

    def unname(folder: str) -> None:
        save(folder)
        if at_step(trainer):
            (Path(folder) / "latest").unlink()
            kill()

    trainer._save_optimizer_and_scheduler = unname


# As in `support.fsdp_crash`; how it saves is the stage.
MOMENTS: dict[str, tuple] = {
    "ZeRO-2, before all files": (before_all_files, BOTH, "lora", "2", BEFORE),
    "ZeRO-2, in the first rank's optimizer": (
        in_a_part_of_the_optimizer,
        [0],
        "alphadpo",
        "2",
        BEFORE,
    ),
    "ZeRO-2, after the rename": (after_the_rename, [0], "lora", "2", LAST),
    "ZeRO-3, in the second rank's optimizer": (
        in_a_part_of_the_optimizer,
        [1],
        "alphadpo",
        "3",
        BEFORE,
    ),
    "ZeRO-3, in the weights": (in_weights, [0], "lora", "3", BEFORE),
    "ZeRO-3, before latest": (before_latest, [0], "alphadpo", "3", BEFORE),
    "ZeRO-3, in the trainer's state": (in_trainer_state, [0], "lora", "3", BEFORE),
    "ZeRO-3, before the rename": (before_the_rename, [0], "alphadpo", "3", BEFORE),
    "ZeRO-3, after the rename": (after_the_rename, [0], "alphadpo", "3", LAST),
}


def made(folder: Path, case: str, stage: str, **options: Any) -> Any:
    zero.unset_hf_deepspeed_config()
    torch.manual_seed(17)
    # 14 pairs, 2 a rank and batch, 2 batches a step: 2 steps an epoch.
    given = {**SAVING, "num_train_epochs": 3, "deepspeed": zero.configuration(int(stage))}
    return run_of(folder, case, **given, **options)


if __name__ == "__main__":
    torch.set_num_threads(1)
    zero.on_cpus()
    try_moments(Path(sys.argv[1]), MOMENTS, made, sys.argv[2:])
