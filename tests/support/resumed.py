"""Runs with dropout and shuffled rows that may be stopped and resumed, and what must then be equal."""

from __future__ import annotations

from pathlib import Path

import peft
import torch

from support import tiny
from support.training import assert_same_weights, trainer, weights

# 14 pairs, 2 a batch, 2 batches a step: 4 steps an epoch, the last of one batch.
STEPS = 8
OPTIONS = {
    "count": 14,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 2,
    "lr_scheduler_type": "linear",
    "max_grad_norm": 0.5,
    "logging_steps": 4,
    "save_strategy": "steps",
    "save_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 2,
}


def llama(**options):
    return tiny.model(attention_dropout=0.3, **options)


def adapter():
    return peft.LoraConfig(r=4, lora_dropout=0.3)


def trained_adapter():
    """One that has been trained before, and is the reference as it was."""
    torch.manual_seed(0)
    options = {"r": 4, "lora_dropout": 0.3, "init_lora_weights": False}
    return peft.get_peft_model(llama(), peft.LoraConfig(**options))


CASES = {
    "full": dict,
    "lora": lambda: {"peft_config": adapter()},
    "trained adapter": lambda: {"model": trained_adapter()},
    "bf16 autocast": lambda: {"bf16": True},
    "bf16 weights": lambda: {"model": llama().bfloat16()},
    "checkpointed blocks": lambda: {"gradient_checkpointing": True},
    "precomputed": lambda: {"precompute_ref_log_probs": True},
    # Moved at steps 2, 4, 6 and 8: before and after the steps that are resumed from.
    "moving reference": lambda: {"sync_ref_model": True, "ref_model_sync_steps": 2},
    "alphadpo": lambda: {"objective": "alphadpo", "objective_options": {"alpha": 0.5}},
    "betadpo": lambda: {
        "objective": "betadpo",
        "objective_options": {"keep": 0.5},
        "peft_config": adapter(),
    },
    "betadpo, composed": lambda: {
        "objective": "betadpo",
        "objective_options": {"keep": 0.5},
        "use_weighting": True,
        "rpo_alpha": 0.2,
    },
    "statistics between logs": lambda: {"objective": "alphadpo", "logging_steps": 5},
}


def run_of(path: Path, case: str, **options):
    options = {**OPTIONS, "disable_dropout": False, **CASES[case](), **options}
    options.setdefault("model", llama())
    return trainer(path, eval_dataset=tiny.dataset(5, seed=3), **options)


def logs_of(run) -> list[dict]:
    """What a run has logged, without the clock, and without what is of a process's own steps."""
    own = ("runtime", "second", "train_loss", "total_flos")
    logs = [{k: v for k, v in log.items() if not k.endswith(own)} for log in run.state.log_history]
    expected = {"loss", "grad_norm", "rewards/margins", "entropy"}
    assert any(expected <= log.keys() for log in logs)
    return logs


def assert_same_runs(resumed, whole) -> None:
    assert resumed.state.global_step == whole.state.global_step == STEPS
    assert_same_weights(weights(resumed.model), weights(whole.model), atol=0, rtol=0)
    assert logs_of(resumed) == logs_of(whole)
    if whole.ref_model is not None:
        references = (weights(run.ref_model) for run in (resumed, whole))
        assert_same_weights(*references, atol=0, rtol=0)
    assert str(resumed.loss_fn.objective.state_dict()) == str(whole.loss_fn.objective.state_dict())
