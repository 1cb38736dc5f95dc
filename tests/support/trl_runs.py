"""TRL's trainers on tiny models, with prefkern's in their place or not."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("trl")

# So that TRL sends nothing over the network.
os.environ.setdefault("CI", "1")

from trl import DPOConfig

from prefkern.integrations.trl import DPOTrainer
from support import tiny


def build(path, kind=DPOTrainer, make_config=DPOConfig, **options):
    """A trainer that has not trained; options of the trainer by name, others of its config."""
    names = ("ref_model", "peft_config", "objective", "objective_options", "eval_dataset")
    names = (*names, "train_dataset", "compute_metrics", "workspace_mb", "callbacks")
    given = {name: options.pop(name) for name in names if name in options}
    model = options.pop("model", None)
    given.setdefault("train_dataset", tiny.dataset(8))
    defaults = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "gradient_checkpointing": False,
        "optim": "sgd",
        "learning_rate": 0.1,
        "max_grad_norm": 0.0,
    }
    return kind(
        model=tiny.model() if model is None else model,
        args=make_config(str(path), **{**defaults, **options}),
        processing_class=tiny.tokenizer(),
        **given,
    )
