"""`prefkern train`: a preference run from flags, from a YAML file, or from a file and flags.

    prefkern train --model_name_or_path M --dataset pairs.jsonl --objective adadpo --lora_r 16
    prefkern train config.yaml --learning_rate 1e-5

The keys of the file are the flags' names, and its items become flags in front of those given, so
that one path checks both. What can be wrong is looked at in the order of what it
costs: arguments and objective, then the dataset, then the model. An error is one line on stderr and
exit status 2.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, NoReturn, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser

from prefkern.config import PreferenceConfig

if TYPE_CHECKING:
    from prefkern.trainer import PreferenceTrainer

_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class ModelArguments:
    """The model that is trained."""

    _argument_group_name = "model"

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or hub name (required).", "aliases": ["--model"]}
    )
    dtype: str = field(
        default="float32",
        metadata={"help": "Dtype of the weights; auto is the file's.", "choices": _DTYPES},
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa, flash_attention_2, ... Default: the model's."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run model code from the hub."}
    )


@dataclass
class DataArguments:
    """The preference pairs."""

    _argument_group_name = "data"

    dataset: str | None = field(
        default=None,
        metadata={
            "help": ".jsonl, .json, .parquet or .csv file, folder, or hub name (required).",
            "aliases": ["--dataset_name"],
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of a hub dataset."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_dataset: str | None = field(
        default=None, metadata={"help": "File, folder or hub name to evaluate on."}
    )
    eval_split: str = field(default="test", metadata={"help": "Its split."})
    eval_fraction: float = field(
        default=0.0, metadata={"help": "Or: the share of the dataset held out for evaluation."}
    )


@dataclass
class LoraArguments:
    """The adapter, if any."""

    _argument_group_name = "LoRA"

    lora_r: int = field(default=0, metadata={"help": "Rank. 0 trains all weights."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale: alpha / r."})
    lora_dropout: float = field(
        default=0.0, metadata={"help": "Dropout; needs --disable_dropout false."}
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Names of layers. Default: every linear layer but the head."},
    )


class _Parser(HfArgumentParser):
    """HfArgumentParser whose errors are one line, and which turns a YAML file into flags."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def flags_of_yaml(self, path: Path) -> list[str]:
        """The file's items as flags. Raises ValueError for a key that is no flag, and for no YAML.

        What flags cannot say (null, and lists for options that also take one word) is let through
        as a default where the option's type allows it.
        """
        import yaml

        if not path.exists():
            raise FileNotFoundError(f"no such file: {path}")
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(values, dict):
            raise TypeError(f"{path} must be a mapping of options to values")
        # Flags without a value (--help, --no_bf16) make no keys.
        actions = {
            option.removeprefix("--"): action
            for option, action in self._option_string_actions.items()
            if option.startswith("--") and action.nargs != 0
        }
        types = {n: t for kind in self.dataclass_types for n, t in get_type_hints(kind).items()}
        given: dict[str, str] = {}
        flags: list[str] = []
        for key, value in values.items():
            action = actions.get(str(key))
            if action is None:
                close = difflib.get_close_matches(str(key), actions, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ValueError(f"{path}: unknown option {key!r}{hint}")
            if action.dest in given:
                raise ValueError(f"{path}: {given[action.dest]!r} and {key!r} are the same option")
            given[action.dest] = str(key)
            allowed = [get_origin(t) or t for t in get_args(types[action.dest])]
            if value is None:
                if NoneType in allowed:
                    self.set_defaults(**{action.dest: None})
            elif isinstance(value, list):
                if action.nargs is None and list in allowed:
                    self.set_defaults(**{action.dest: value})
                elif action.nargs == "+":
                    flags += [f"--{key}", *map(_word, value)]
                else:
                    raise ValueError(f"{path}: {key!r} takes one value, got the list {value}")
            else:
                flags.append(f"--{key}={_word(value)}")
        return flags


def _word(value: Any) -> str:
    """A value of a YAML file as a word of the command line."""
    if isinstance(value, str):
        return value
    return json.dumps(value, default=str) if isinstance(value, bool | dict | list) else str(value)


def main(argv: list[str]) -> int:
    """Run `prefkern train`; returns the exit status."""
    missing = [n for n in ("accelerate", "datasets", "peft") if importlib.util.find_spec(n) is None]
    if missing:
        return _fail(f"{', '.join(missing)} not installed: pip install 'prefkern[train]'")
    try:
        trainer, config = _prepare(argv)
    except (ValueError, TypeError, OSError, ImportError) as error:
        return _fail(str(error))
    if config.process_index == 0:
        for report in trainer.dataset_reports.values():
            print(report)
    resume: Any = config.resume_from_checkpoint
    if isinstance(resume, str) and resume.lower() in ("true", "false"):
        resume = resume.lower() == "true"
    metrics = trainer.train(resume_from_checkpoint=resume).metrics
    if trainer.eval_dataset is not None:
        metrics = {**metrics, **trainer.evaluate()}
    trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("all", metrics, combined=False)
    if config.process_index == 0:
        width = max(map(len, metrics))
        for name, value in metrics.items():
            print(f"{name:<{width}}  {value:.6g}")
        print(f"saved to {config.output_dir}")
    return 0


def parse(
    argv: list[str],
) -> tuple[ModelArguments, DataArguments, LoraArguments, PreferenceConfig]:
    """Arguments from flags, after those of a YAML file if the first one names it.

    Raises ValueError for what is unknown, missing, malformed or contradictory.
    """
    parser = _Parser(
        (ModelArguments, DataArguments, LoraArguments, PreferenceConfig),  # pyright: ignore[reportArgumentType]
        prog="prefkern train",
        usage="prefkern train [CONFIG.yaml] [--option value ...]",
        description="Train a model on preference pairs.",
        allow_abbrev=False,
    )
    if argv and argv[0].endswith((".yaml", ".yml")):
        argv = [*parser.flags_of_yaml(Path(argv[0])), *argv[1:]]
    *parsed, unknown = parser.parse_args_into_dataclasses(
        argv, look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        raise ValueError(f"unknown argument {unknown[0]!r}")
    model, data, lora, config = parsed
    for name, value in (
        ("model_name_or_path", model.model_name_or_path),
        ("dataset", data.dataset),
    ):
        if value is None:
            raise ValueError(f"--{name} is required")
    if not 0 <= data.eval_fraction < 1:
        raise ValueError(f"--eval_fraction must be in [0, 1), got {data.eval_fraction}")
    if data.eval_fraction and data.eval_dataset:
        raise ValueError("give either --eval_dataset or --eval_fraction, not both")
    if config.eval_strategy != "no" and not (data.eval_fraction or data.eval_dataset):
        raise ValueError("--eval_strategy needs --eval_dataset or --eval_fraction")
    if lora.lora_r < 0:
        raise ValueError(f"--lora_r must be >= 0, got {lora.lora_r}")
    if lora.lora_alpha <= 0:
        raise ValueError(f"--lora_alpha must be > 0, got {lora.lora_alpha}")
    if not 0 <= lora.lora_dropout < 1:
        raise ValueError(f"--lora_dropout must be in [0, 1), got {lora.lora_dropout}")
    if lora.lora_dropout and config.disable_dropout:
        raise ValueError("--lora_dropout has no effect without --disable_dropout false")
    return model, data, lora, config


def _prepare(argv: list[str]) -> tuple[PreferenceTrainer, PreferenceConfig]:
    """Check and load everything, the cheapest first."""
    model, data, lora, config = parse(argv)
    objective = config.build_objective()

    from prefkern.data import load_preference_dataset

    assert model.model_name_or_path is not None and data.dataset is not None
    train = load_preference_dataset(data.dataset, data.dataset_split, data.dataset_config)
    evaluation = None
    if data.eval_dataset is not None:
        evaluation = load_preference_dataset(
            data.eval_dataset, data.eval_split, data.dataset_config
        )
    elif data.eval_fraction:
        parts = train.train_test_split(test_size=data.eval_fraction, seed=config.seed)
        train, evaluation = parts["train"], parts["test"]

    from peft import LoraConfig

    from prefkern.trainer import PreferenceTrainer

    kwargs: dict[str, Any] = {"dtype": model.dtype, "trust_remote_code": model.trust_remote_code}
    if model.attn_implementation is not None:
        kwargs["attn_implementation"] = model.attn_implementation
    # What the file says under model_init_kwargs is more specific.
    config.model_init_kwargs = {**kwargs, **(config.model_init_kwargs or {})}  # pyright: ignore[reportGeneralTypeIssues]
    adapter = None
    if lora.lora_r:
        targets: Any = lora.lora_target_modules
        if targets in (None, ["all-linear"]):
            targets = "all-linear"
        adapter = LoraConfig(
            task_type="CAUSAL_LM",
            r=lora.lora_r,
            lora_alpha=lora.lora_alpha,
            lora_dropout=lora.lora_dropout,
            target_modules=targets,
        )
    trainer = PreferenceTrainer(
        model.model_name_or_path,
        config,
        train_dataset=train,
        eval_dataset=evaluation,
        objective=objective,
        peft_config=adapter,
    )
    return trainer, config


def _fail(message: str) -> int:
    print(f"prefkern train: error: {' '.join(message.split())}", file=sys.stderr)
    return 2
