"""Responses of the model at each evaluation: to look at outputs, beside numbers (`generate_samples`).

After an evaluation the model answers the first prompts of `eval_dataset`, each token the likeliest
one: no random number is drawn, so that a run with samples trains like one without. The answers are
a table in the terminal, and in a tracker of `report_to` that shows tables: Weights & Biases,
Trackio, TensorBoard. A tracker's table has those of earlier evaluations too.

    step   prompt                     response
    50     The film was, all in all   a delight from start to finish.

The first process generates. A model whose weights are sharded over processes is refused, since each
token would need all of them.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import GenerationConfig, TrainerCallback

from prefkern.training.sharding import mode_of

logger = logging.getLogger(__name__)

_COLUMNS = ("step", "prompt", "response")
# What a tracker calls the table.
_NAME = "samples"
# Their `Table` and `log` are alike: the attribute of transformers' callback that has them.
_TABLES = {"WandbCallback": "_wandb", "TrackioCallback": "_trackio"}
_SHOWN = ("wandb", "trackio", "tensorboard")


class ShowsSamples(TrainerCallback):
    """Generates and shows responses after each evaluation of a `PreferenceTrainer`."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._rows: list[tuple[int, str, str]] = []
        self._last_step: int | None = None

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Once for several datasets, and once where the last step is evaluated again.
        if state.global_step == self._last_step or not state.is_world_process_zero:
            return
        self._last_step = state.global_step
        answers = responses(self._trainer, args.generate_samples, args.generate_max_new_tokens)
        rows = [(state.global_step, *pair) for pair in answers]
        self._rows += rows
        _print(rows)
        for callback in self._trainer.callback_handler.callbacks:
            self._log(callback, rows, state)

    def _log(self, callback: Any, rows: list[tuple[int, str, str]], state: Any) -> None:
        """Add the table to a tracker, by transformers' callback for it."""
        tracker = getattr(callback, _TABLES.get(type(callback).__name__, ""), None)
        if tracker is not None:
            import pandas

            table = tracker.Table(dataframe=pandas.DataFrame(self._rows, columns=[*_COLUMNS]))
            tracker.log({_NAME: table, "train/global_step": state.global_step})
        writer = getattr(callback, "tb_writer", None)
        if writer is not None:
            writer.add_text(_NAME, _markdown(rows), state.global_step)


def check_samples(args: Any, eval_dataset: Any) -> None:
    """Raise ValueError where `generate_samples` cannot have an effect."""
    if not args.generate_samples:
        return
    if eval_dataset is None:
        raise ValueError(
            f"generate_samples is {args.generate_samples}, and without eval_dataset there are no "
            "prompts; give an eval_dataset, or leave it out"
        )
    if mode_of(args) is not None:
        raise ValueError(
            f"generate_samples is not supported under {mode_of(args)}, which shards weights; train "
            "under DDP, or leave it out"
        )
    silent = [name for name in args.report_to or () if name not in _SHOWN]
    if silent:
        logger.warning(
            "generate_samples: %s has no table of them; the terminal has, and so have %s",
            ", ".join(silent),
            ", ".join(_SHOWN),
        )


@torch.no_grad()
def responses(trainer: Any, count: int, max_new_tokens: int) -> list[tuple[str, str]]:
    """The first prompts of a trainer's eval_dataset, and the model's likeliest responses."""
    dataset = trainer.eval_dataset
    if isinstance(dataset, dict):
        dataset = next(iter(dataset.values()))
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    model = trainer.accelerator.unwrap_model(trainer.model)
    own = model.generation_config
    ends = own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
    )
    was_training = model.training
    model.eval()
    found = []
    try:
        for row in dataset.select(range(min(count, len(dataset)))):
            prompt = torch.tensor([row["prompt_ids"]], device=model.device)
            with trainer.accelerator.autocast():
                made = model.generate(
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    generation_config=config,
                )
            texts = (row["prompt_ids"], made[0, prompt.shape[1] :])
            found.append(tuple(tokenizer.decode(ids, skip_special_tokens=True) for ids in texts))
    finally:
        model.train(was_training)
    return found


def _print(rows: list[tuple[int, str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"Step {rows[0][0]}", show_lines=True, expand=True)
    for name in _COLUMNS[1:]:
        table.add_column(name, ratio=1)
    for _, *texts in rows:
        # Text, since a model may write what rich takes for markup.
        table.add_row(*map(Text, texts))
    Console().print(table)


def _markdown(rows: list[tuple[int, str, str]]) -> str:
    lines = [f"| {' | '.join(_COLUMNS)} |", "|---|---|---|"]
    for row in rows:
        cells = (str(cell).replace("|", "\\|").replace("\n", "<br>") for cell in row)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
