"""Moments at which a run is killed while it saves: each gets a trainer and arranges a SIGKILL there."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from prefkern.training import checkpoint_files, checkpoints
from support.resumed import OPTIONS

LAST = 4  # the step whose checkpoint is being saved
BEFORE = 2  # that of the last complete one
SAVING = {
    **OPTIONS,
    "save_steps": 2,
    "save_total_limit": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "rewards/margins",
    "greater_is_better": True,
}


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_step(trainer) -> bool:
    return trainer.state.global_step == LAST


# Each takes a trainer and arranges that the process dies while it saves.


def before_all_files(trainer):
    on_call(trainer, "save_model", lambda *_: at_step(trainer) and kill())


def in_weights(trainer):
    """Kill when the file of weights has half of its bytes."""
    save = trainer._save_into

    def save_half(folder, state_dict):
        save(folder, state_dict)
        if at_step(trainer):
            [path] = Path(folder).glob("*model.safetensors")
            os.truncate(path, path.stat().st_size // 2)
            kill()

    trainer._save_into = save_half


def between_weights_and_optimizer(trainer):
    on_call(trainer, "_save_optimizer_and_scheduler", lambda *_: at_step(trainer) and kill())


def in_torch_file(name: str) -> Callable:
    def arrange(trainer):
        save = torch.save

        def save_half(value, path, *args, **kwargs):
            if at_step(trainer) and Path(path).name == name:
                content = io.BytesIO()
                save(value, content)
                Path(path).write_bytes(content.getvalue()[: len(content.getvalue()) // 2])
                kill()
            save(value, path, *args, **kwargs)

        torch.save = save_half

    return arrange


def in_trainer_state(trainer):
    save = transformers.TrainerState.save_to_json

    def save_half(state, path):
        save(state, path)
        if at_step(trainer):
            os.truncate(path, os.path.getsize(path) // 2)
            kill()

    transformers.TrainerState.save_to_json = save_half


def before_the_rename(trainer):
    checkpoint_files.sync = lambda _: at_step(trainer) and kill()


def after_the_rename(trainer):
    on_call(checkpoints, "delete_oldest", lambda *_: at_step(trainer) and kill())


def on_call(owner, name: str, also: Callable) -> None:
    original = getattr(owner, name)

    def called(*args, **kwargs):
        also(*args)
        return original(*args, **kwargs)

    setattr(owner, name, called)
