"""Checks options that transformers itself checks only during training.

Trainer looks at a scheduler's keywords, and at the packages of an optimiser and a logger, when it
first needs them: after the model is loaded. It looks at the name of the best metric after the first
evaluation, when nothing is saved yet. These checks run before training. Each error names the option
and its value.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from prefkern.typos import nearest

if TYPE_CHECKING:
    from prefkern.training.trainer import PreferenceTrainer

# Optimisers that take the names of layers from the model.
_OF_LAYERS = ("galore", "apollo", "lomo")
# The metrics that Trainer adds to an evaluation.
_SPEEDS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
# The errors that transformers raises for a name or keyword that it cannot use; their texts are
# kept.
_ERRORS = (ValueError, TypeError, ImportError, RuntimeError, AttributeError, KeyError)


def check_options(config: TrainingArguments) -> None:
    """Raise ValueError for options of transformers that would stop the run later."""
    for name in config.report_to or ():
        callback = INTEGRATION_TO_CALLBACK.get(name)
        if callback is not None:
            try:
                callback()
            except (RuntimeError, ImportError) as error:
                raise ValueError(f"--report_to {name}: {error}") from error
    if not any(part in str(config.optim) for part in _OF_LAYERS):
        check_optimizer(config)
    weight = torch.zeros(1, requires_grad=True)
    try:
        get_scheduler(
            config.lr_scheduler_type,
            torch.optim.SGD([weight], lr=config.learning_rate),
            num_warmup_steps=1,
            num_training_steps=10,
            scheduler_specific_kwargs={**(config.lr_scheduler_kwargs or {})},  # pyright: ignore[reportGeneralTypeIssues]
        )
    except _ERRORS as error:
        name = getattr(config.lr_scheduler_type, "value", config.lr_scheduler_type)
        given = config.lr_scheduler_kwargs or "none"
        raise ValueError(
            f"--lr_scheduler_type {name} cannot be made with --lr_scheduler_kwargs ({given}): {error}"
        ) from error


def check_optimizer(config: TrainingArguments, model: Any = None) -> None:
    """Raise ValueError for an optimiser that cannot be used; some need the model to decide."""
    try:
        Trainer.get_optimizer_cls_and_kwargs(config, model)
    except _ERRORS as error:
        name = getattr(config.optim, "value", config.optim)
        raise ValueError(f"--optim {name} cannot be used: {error}") from error


def check_best_metric(trainer: PreferenceTrainer) -> None:
    """Raise ValueError if evaluation will not log args.metric_for_best_model."""
    name = trainer.args.metric_for_best_model
    if name is None or trainer.args.eval_strategy == "no" or trainer.eval_dataset is None:
        return
    known = [*_metrics(trainer), *_SPEEDS]
    if isinstance(trainer.eval_dataset, dict):
        known = [f"{key}_{each}" for key in trainer.eval_dataset for each in known]
    if name.removeprefix("eval_") not in known:
        close = nearest(name.removeprefix("eval_"), known)
        hint = f" (did you mean {close!r}?)" if close else ""
        raise ValueError(
            f"--metric_for_best_model is {name!r}{hint}, but evaluation does not log it; it logs "
            f"{', '.join(known)}"
        )


def interrupted(command: str, config: TrainingArguments | None) -> int:
    """Print the checkpoint that an interrupted run can resume from; returns the status 130."""
    from prefkern.training.checkpoint_files import CheckpointError, last_complete

    state = "nothing was saved"
    if config is not None:
        try:
            found = last_complete(Path(config.output_dir or "."))
            state = f"the last checkpoint is {found}; resume it with --resume_from_checkpoint true"
        except CheckpointError:
            state = f"{config.output_dir} holds no checkpoint"
    print(f"prefkern {command}: interrupted; {state}", file=sys.stderr)
    return 130


def _metrics(trainer: PreferenceTrainer) -> list[str]:
    """The names of the metrics that the trainer logs, from its own code on two dummy pairs."""
    from prefkern.loss.fused import FusedPreferenceLoss
    from prefkern.training.metrics import item_values, means, per_item

    objective = copy.deepcopy(trainer.loss_fn.objective)
    needs = trainer._objective_needs
    rows = 2 * objective.responses if needs.paired else 4
    hidden, weight = torch.ones(rows, 2, 3), torch.ones(5, 3)
    options: dict[str, Any] = {"return_stats": trainer.args.token_metrics}
    if needs.distributions:
        options |= {"ref_hidden": hidden, "ref_weight": weight}
    elif needs.reference:
        options["ref_logps"] = -torch.ones(4)
    if needs.margins:
        options["reward_margins"] = torch.ones(2)
    if not needs.paired:
        options["desirable"] = torch.tensor([True, True, False, False])
        options["mismatched_log_ratios"] = torch.zeros(4)
    loss_fn = FusedPreferenceLoss(objective, backend="torch").eval()
    with torch.no_grad():
        out = loss_fn(hidden, weight, torch.ones(rows, 2, dtype=torch.int64), **options)
    values = {"loss": per_item(out.losses), **item_values(out, objective)}
    # `means` omits a mean over no items. Real batches may have items there, so both names count.
    return sorted({*values, *means({name: value.sum(0) for name, value in values.items()})})
