"""`prefkern margins`: step 1 of MADPO. Writes a reward margin into each row of a dataset of pairs.

    prefkern margins --model_name_or_path M --dataset pairs.jsonl --output margins.jsonl
    prefkern margins --reward_model R --dataset pairs.jsonl --output margins.jsonl
    prefkern train --objective madpo --dataset margins.jsonl ...

The first command trains a reward model on the pairs and holds some of them out for early stopping
(MADPO, Section 5.1). It saves the model to --output_dir and scores every pair with the best
checkpoint. The second command scores with an existing reward model. The new column `margin` is
r(chosen) - r(rejected). Rows, their order and other columns do not change, with one exception:
`datasets` reads dates in JSON as times, so they are written as `2024-01-01 00:00:00`. Arguments
come from flags, from a YAML file, or from both.

With --padding_free and --share_prompt a batch is one row that holds each prompt once: the same
margins, up to rounding, at a lower cost.

All inputs are checked before training. An error is one line on stderr and exit status 2. Several
processes (`accelerate launch`, `torchrun`) share the work, and the first one writes.
"""

from __future__ import annotations

import json
import math
import os
import random
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefkern.cli.allocator import keep_freed_memory
from prefkern.cli.arguments import (
    DatasetArguments,
    ModelArguments,
    Parser,
    check_installed,
    check_lora,
    check_model_folder,
    check_output_dir,
    fail,
    lora_config,
    resume_from,
)
from prefkern.cli.closed import go_on
from prefkern.data.sources import local_path
from prefkern.training.files import replacing

if TYPE_CHECKING:
    from torch import Tensor

    from prefkern.training.rewards import RewardConfig, RewardTrainer

_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
# The margins that `prefkern train` reads.
_MARGIN_COLUMNS = ("margin", "reward_margin")
_TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
# The options of a run that only scores; any other option would have no effect there.
_SCORING = {
    *("reward_model", "dtype", "attn_implementation", "trust_remote_code"),
    *("dataset", "dataset_config", "dataset_split", "columns", "output", "overwrite"),
    *(
        "max_length",
        "max_prompt_length",
        "truncation_mode",
        "padding_free",
        "share_prompt",
        "dataset_num_proc",
        "per_device_eval_batch_size",
    ),
    *("use_cpu", "bf16", "fp16", "bf16_full_eval", "fp16_full_eval", "tf32", "torch_compile"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor"),
    *("disable_tqdm", "log_level", "log_level_replica", "ddp_backend", "ddp_timeout"),
}
_QUANTILES = {"min": 0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "max": 1}


@dataclass
class RewardModelArguments(ModelArguments):
    """The reward model: a new one to train, or one that is already trained."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Folder or hub name of the model to train the reward model from.",
            "aliases": ["--model"],
        },
    )
    reward_model: str | None = field(
        default=None,
        metadata={
            "help": "Instead of training: a trained reward model. It is a sequence classifier with "
            "one output, or a PEFT adapter of one, such as the --output_dir of an earlier run."
        },
    )


@dataclass
class MarginsDataArguments(DatasetArguments):
    """The preference pairs, and the file to write."""

    output: str | None = field(
        default=None,
        metadata={
            "help": "File to write (required): .jsonl, .json, .parquet or .csv, or a folder."
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace --output if it exists."})
    eval_fraction: float = field(
        default=1 / 6,
        metadata={
            "help": "Share of the pairs to hold out for early stopping, drawn by --seed. Default: "
            "1/6, as in MADPO (2,000 of 12,000)."
        },
    )
    eval_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Instead of --eval_fraction: pairs for early stopping, as a file, folder or "
            "hub name. No margins are written for them."
        },
    )
    eval_split: str = field(default="test", metadata={"help": "Split of --eval_dataset."})


@dataclass
class RewardLoraArguments:
    """The adapter of a new reward model; its head is trained too."""

    _argument_group_name = "LoRA"

    lora_r: int = field(default=16, metadata={"help": "Rank. 0 trains all weights."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale: alpha / r."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Names of layers. Default: every linear layer except the head."},
    )


@dataclass
class _Run:
    """Everything that is loaded and checked before the first computation."""

    trainer: RewardTrainer
    dataset: Any
    tokens: Any  # of the dataset's pairs, then of the pairs of --eval_dataset
    held_out: list[int]  # rows of `tokens`; empty for a run that only scores
    output: Path


def main(argv: list[str]) -> int:
    """Run `prefkern margins`; returns the exit status."""
    # Trainer makes its output folder even for a run that only scores, so give it a temporary one.
    with tempfile.TemporaryDirectory() as scratch:
        try:
            run = _prepare(argv, scratch)
        except (ValueError, TypeError, OSError, ImportError) as error:
            return fail("margins", str(error))
        from prefkern.cli.before_training import interrupted
        from prefkern.training.checkpoint_files import CheckpointError

        go_on()
        is_writer = run.trainer.args.process_index == 0
        if run.held_out:
            try:
                _train(run.trainer)
            except (CheckpointError, FloatingPointError) as error:
                return fail("margins", str(error))
            except KeyboardInterrupt:
                return interrupted("margins", run.trainer.args)
        rewards = run.trainer.rewards(run.tokens).double()
    bad = (~rewards.isfinite()).any(1).nonzero().flatten().tolist()
    if bad:
        return fail("margins", f"the rewards of row {bad[0]} are not finite; nothing was written")
    if is_writer:
        margins = (rewards[: len(run.dataset), 0] - rewards[: len(run.dataset), 1]).tolist()
        try:
            _write(run.dataset.add_column("margin", margins), run.output)
        except OSError as error:
            return fail("margins", f"{run.output} cannot be written: {error}")
        _report(run, rewards)
    return 0


def parse(
    argv: list[str],
) -> tuple[RewardModelArguments, MarginsDataArguments, RewardLoraArguments, RewardConfig]:
    """The arguments from flags and from a file.

    The checks that need no transformers come first, since its import takes seconds. Raises
    ValueError for unknown, missing, malformed or contradictory arguments, ImportError for a package
    that is not installed, and OSError for a dataset or folder that does not exist and an output that
    cannot be written.
    """
    parsed = Parser(
        (RewardModelArguments, MarginsDataArguments, RewardLoraArguments),
        ("prefkern.training.rewards", "RewardConfig"),
        "margins",
        "Writes reward margins into a dataset of preference pairs. The reward model is trained on "
        "the pairs or given.",
    ).parse(argv)
    check_installed()
    model, data, lora = parsed.groups
    given = parsed.given
    if (model.model_name_or_path is None) == (model.reward_model is None):
        raise ValueError(
            "give either --model_name_or_path, to train a reward model, or --reward_model"
        )
    for name, value in (("dataset", data.dataset), ("output", data.output)):
        if value is None:
            raise ValueError(f"--{name} is required")
    if model.reward_model is not None:
        unused = sorted(given - _SCORING)
        if unused:
            names = ", ".join(f"--{name}" for name in unused)
            raise ValueError(f"with --reward_model nothing is trained, so {names} has no effect")
    else:
        _check_training(data, lora, given)
        if not lora.lora_r:
            parsed.config.setdefault("learning_rate", 1e-5)
    args = parsed.checkable()
    for source in (data.dataset, data.eval_dataset):
        if source is not None:
            local_path(source)
    output = Path(data.output).expanduser()
    _check_output(output, data.overwrite)
    if model.reward_model is None and Path(args.output_dir).expanduser().resolve() == (
        output.resolve()
    ):
        raise ValueError("--output and --output_dir are the same folder")
    check_output_dir(args.output_dir)
    check_model_folder("--model_name_or_path", model.model_name_or_path)
    check_model_folder("--reward_model", model.reward_model)

    from prefkern.training import options

    options.check_rewards(args, parsed.training_defaults)

    from prefkern.training.rewards import RewardConfig

    return model, data, lora, RewardConfig(**parsed.config)


def _check_training(data: MarginsDataArguments, lora: RewardLoraArguments, given: set[str]) -> None:
    """Raise ValueError for options of a run that trains which contradict each other."""
    if not 0 < data.eval_fraction < 1:
        raise ValueError(f"--eval_fraction must be in (0, 1), got {data.eval_fraction}")
    check_lora(lora, given, without="with --lora_r 0")
    if data.eval_dataset is None and "eval_split" in given:
        raise ValueError("--eval_split has no effect without --eval_dataset")
    if data.eval_dataset is not None and "eval_fraction" in given:
        raise ValueError("give either --eval_dataset or --eval_fraction, not both")
    for name in sorted(given & {"save_strategy", "save_steps"}):
        raise ValueError(f"--{name} has no effect: models are saved whenever they are evaluated")


def _prepare(argv: list[str], scratch: str) -> _Run:
    """Check and load everything, the cheapest checks first."""
    model, data, lora, config = parse(argv)
    assert data.dataset is not None and data.output is not None
    output = Path(data.output).expanduser()
    name = model.reward_model or model.model_name_or_path
    assert name is not None and config.output_dir is not None
    is_new = model.reward_model is None
    if not is_new:
        config.output_dir = scratch
        _check_scoring(config)

    from datasets import concatenate_datasets
    from transformers import set_seed

    from prefkern.cli.before_training import check_options
    from prefkern.data import load_preference_dataset, show
    from prefkern.training import rewards

    keep_freed_memory(config.device.type)
    check_options(config)
    with config.main_process_first(desc="loading", local=False):
        names: Any = config.columns  # a mapping or None, since __post_init__
        dataset = load_preference_dataset(
            data.dataset, data.dataset_split, data.dataset_config, names
        )
        evaluation = None
        if data.eval_dataset is not None:
            evaluation = load_preference_dataset(
                data.eval_dataset, data.eval_split, data.dataset_config, names
            )
    _check_columns(dataset, data.dataset, output)
    held_out = []
    if evaluation is not None:
        held_out = [*range(len(dataset), len(dataset) + len(evaluation))]
        _check_batch(len(dataset), config)
    elif is_new:
        held_out = _draw(len(dataset), data.eval_fraction, config)

    # Seed here: the head and the adapter are drawn before Trainer sets its seed.
    set_seed(config.seed)
    if is_new:
        adapter = lora_config(lora, "SEQ_CLS")
        classifier, tokenizer = rewards.new_reward_model(name, adapter, **model.init_kwargs())
        # transformers 5.2x renamed gradient_checkpointing to activation_checkpointing.
        recomputes = config.gradient_checkpointing or getattr(config, "activation_checkpointing", 0)
        if adapter is not None and recomputes:
            # Otherwise no input of a frozen model's checkpointed blocks requires a gradient.
            classifier.enable_input_require_grads()
    else:
        classifier, tokenizer = rewards.load_reward_model(name, **model.init_kwargs())
    with config.main_process_first(desc="tokenisation", local=False):
        tokens, report = rewards.tokenize_for_rewards(dataset, tokenizer, config, data.dataset)
        reports = [report]
        if evaluation is not None:
            assert data.eval_dataset is not None
            # Both datasets may be slices of one file, so the name includes the split.
            source = f"{data.eval_dataset} ({data.eval_split})"
            more, report = rewards.tokenize_for_rewards(evaluation, tokenizer, config, source)
            tokens = concatenate_datasets([tokens, more])
            reports.append(report)
    pad_token_id = rewards.set_pad_token(classifier, tokenizer, tokens, is_new)
    trained_on = sorted(set(range(len(tokens))) - set(held_out))
    trainer = rewards.RewardTrainer(
        classifier,
        config,
        tokenizer,
        pad_token_id,
        train_dataset=tokens.select(trained_on),
        eval_dataset=tokens.select(held_out) if held_out else None,
    )
    if config.process_index == 0:
        show(reports)
    return _Run(trainer, dataset, tokens, held_out, output)


def _check_scoring(config: RewardConfig) -> None:
    """Raise ValueError under DeepSpeed, which shards a model when its training begins."""
    from prefkern.training import zero
    from prefkern.training.sharding import mode_of

    if zero.configuration(config) is not None:
        raise ValueError(
            f"--reward_model is not supported under {mode_of(config)}, which shards a model when its "
            "training begins: start one process, or several without DeepSpeed"
        )


def _check_output(path: Path, overwrite: bool) -> None:
    """Raise unless the file or folder can be written at the end of the run."""
    if path.suffix and path.suffix not in _SUFFIXES:
        raise ValueError(
            f"--output: unknown file type {path.suffix!r}; known: {', '.join(_SUFFIXES)}, or a "
            "folder, without a dot"
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--output: no such folder: {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"--output: cannot write to {path.parent}")
    if not path.exists():
        return
    if not overwrite:
        raise FileExistsError(f"--output: {path} exists; --overwrite replaces it")
    is_dataset = path.is_file() if path.suffix else (path / "dataset_info.json").exists()
    if not is_dataset:
        raise FileExistsError(f"--output: {path} exists, is not a dataset, and is not replaced")


def _check_columns(dataset: Any, name: str, output: Path) -> None:
    """Raise ValueError for columns that the margins would contradict, or the file cannot hold."""
    from datasets import Value

    for column in _MARGIN_COLUMNS:
        if column in dataset.column_names:
            raise ValueError(
                f"dataset {name!r} has a column {column!r}, from which training reads margins; "
                "remove the column, or train on the dataset as it is"
            )
    for column in _TOKEN_COLUMNS:
        if column in dataset.column_names:
            raise ValueError(
                f"dataset {name!r} has a column {column!r}, but a reward model needs text, because "
                "the token ids may be from another tokenizer"
            )
    if output.suffix == ".csv":
        nested = [name for name, kind in dataset.features.items() if not isinstance(kind, Value)]
        if nested:
            raise ValueError(
                f"--output: a .csv file cannot hold column {nested[0]!r}, which is not a scalar"
            )


def _draw(pairs: int, fraction: float, config: RewardConfig) -> list[int]:
    """The rows to hold out, drawn by the seed."""
    count = round(pairs * fraction)
    if not 0 < count < pairs:
        raise ValueError(
            f"{pairs} pairs are too few: with --eval_fraction {fraction:.3g}, {count} would be "
            f"held out and {pairs - count} trained on"
        )
    _check_batch(pairs - count, config)
    return sorted(random.Random(config.seed).sample(range(pairs), count))


def _check_batch(pairs: int, config: RewardConfig) -> None:
    step = config.train_batch_size * config.world_size
    if config.dataloader_drop_last and pairs < step:
        raise ValueError(
            f"{pairs} pairs to train on are fewer than a batch of {step} over all "
            "processes, and --dataloader_drop_last drops partial batches"
        )


def _train(trainer: RewardTrainer) -> None:
    """Train, end with the best checkpoint, and save it."""
    trainer.train(resume_from_checkpoint=resume_from(trainer.args))
    trainer.save_model()
    trainer.save_state()


def _write(dataset: Any, path: Path) -> None:
    """Write the file or folder under a temporary name, then rename it."""
    with replacing(path) as unfinished:
        if path.suffix in (".jsonl", ".json"):
            # Row by row, because `datasets` writes JSON with pandas, which rounds floats to 10
            # digits.
            with unfinished.open("w", encoding="utf-8") as file:
                rows = (json.dumps(row, ensure_ascii=False, default=str) for row in dataset)
                if path.suffix == ".jsonl":
                    file.writelines(f"{row}\n" for row in rows)
                else:
                    file.write("[\n" + ",\n".join(rows) + "\n]\n")
        elif path.suffix == ".parquet":
            dataset.to_parquet(unfinished)
        elif path.suffix == ".csv":
            dataset.to_csv(unfinished)
        else:
            dataset.save_to_disk(unfinished)


def _report(run: _Run, rewards: Tensor) -> None:
    """Print statistics of the margins, and warn if the reward model is no better than chance."""
    import numpy
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    from prefkern.training.rewards import pair_metrics

    written = rewards[: len(run.dataset)]
    parts = {"all pairs": written}
    if run.held_out:
        parts["held out"] = rewards[run.held_out]
    metrics = {name: pair_metrics(part) for name, part in parts.items()}
    table = Table(title="r(chosen) - r(rejected)", box=SIMPLE)
    table.add_column("")
    for name in parts:
        table.add_column(name, justify="right")
    table.add_row("pairs", *(str(len(part)) for part in parts.values()))
    table.add_row("loss", *(f"{m['loss']:.4f}" for m in metrics.values()))
    table.add_row("accuracy: share > 0", *(f"{m['accuracy']:.4f}" for m in metrics.values()))
    table.add_row("mean", *(f"{m['margin']:.4f}" for m in metrics.values()))
    margins = [part[:, 0] - part[:, 1] for part in parts.values()]
    table.add_row("std", *(f"{m.std(correction=0):.4f}" for m in margins))
    # numpy, because torch.quantile takes at most 2^24 values.
    quantiles = [numpy.quantile(m.numpy(), [*_QUANTILES.values()]) for m in margins]
    for name, values in zip(_QUANTILES, zip(*quantiles, strict=True), strict=True):
        table.add_row(name, *(f"{value:.4f}" for value in values))
    console = Console(highlight=False)
    console.print(table)
    judged = "held out" if run.held_out else "all pairs"
    if run.held_out:
        state, args = run.trainer.state, run.trainer.args
        stopped = "stopped early" if state.global_step < state.max_steps else "done"
        # best_global_step is None if training ended before the first evaluation.
        best = state.best_global_step or state.global_step
        print(
            f"training {stopped} at step {state.global_step} of {state.max_steps}; the saved model "
            f"is from step {best}"
        )
        evaluation = {f"eval_{name}": value for name, value in metrics[judged].items()}
        run.trainer.save_metrics("all", evaluation, combined=False)
        print(f"reward model saved to {args.output_dir}")
    print(f"{len(written)} margins written to {run.output}")
    pairs, accuracy = len(parts[judged]), metrics[judged]["accuracy"]
    needed = 0.5 + 1.645 * 0.5 / math.sqrt(pairs)
    if accuracy <= needed:
        print(
            f"prefkern margins: warning: an accuracy of {accuracy:.3f} on {pairs} pairs "
            f"({judged}) is no better than chance, which exceeds {needed:.3f} one time in twenty; "
            "these margins carry little information",
            file=sys.stderr,
        )
