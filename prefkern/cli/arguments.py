"""Arguments of the commands that train: from flags, from a YAML file, or from both.

The keys of the file are the names of the flags. Its items become flags in front of the given flags,
so that one parser checks both. An error is one line on stderr and exit status 2.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser, TrainingArguments

from prefkern.cli.options_file import read_options

_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class ModelArguments:
    """The model to train."""

    _argument_group_name = "model"

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder or hub name (required).", "aliases": ["--model"]}
    )
    dtype: str = field(
        default="float32",
        metadata={"help": "Dtype of the weights; auto: as in the file.", "choices": _DTYPES},
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa, flash_attention_2, ... Default: the model's own."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run model code from the hub."}
    )

    def init_kwargs(self) -> dict[str, Any]:
        """Keywords of `from_pretrained`."""
        kwargs: dict[str, Any] = {"dtype": self.dtype, "trust_remote_code": self.trust_remote_code}
        if self.attn_implementation is not None:
            kwargs["attn_implementation"] = self.attn_implementation
        return kwargs


@dataclass
class DatasetArguments:
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
    dataset_split: str = field(default="train", metadata={"help": "Split to use."})


def check_lora(lora: Any, given: set[str], without: str) -> None:
    """Raise ValueError for `--lora_*` that are out of range, or have no effect `without` a rank."""
    if lora.lora_r < 0:
        raise ValueError(f"--lora_r must be >= 0, got {lora.lora_r}")
    if lora.lora_alpha <= 0:
        raise ValueError(f"--lora_alpha must be > 0, got {lora.lora_alpha}")
    unused = sorted(given & vars(lora).keys() - {"lora_r"})
    if unused and not lora.lora_r:
        raise ValueError(f"--{unused[0]} has no effect {without}")


def lora_config(lora: Any, task_type: str, **options: Any) -> Any:
    """The adapter that `--lora_*` describe, or None."""
    if not lora.lora_r:
        return None
    from peft import LoraConfig

    targets = lora.lora_target_modules
    return LoraConfig(
        task_type=task_type,
        r=lora.lora_r,
        lora_alpha=lora.lora_alpha,
        target_modules="all-linear" if targets in (None, ["all-linear"]) else targets,
        **options,
    )


class Parser(HfArgumentParser):
    """HfArgumentParser with errors of one line, which also turns a YAML file into flags."""

    def __init__(self, kinds: tuple[type, ...], command: str, description: str) -> None:
        super().__init__(
            kinds,  # pyright: ignore[reportArgumentType]
            prog=f"prefkern {command}",
            usage=f"prefkern {command} [CONFIG.yaml] [--option value ...]",
            description=description,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def parse(self, argv: list[str]) -> tuple[tuple[Any, ...], set[str]]:
        """The dataclasses, and the names of the options that the user gave.

        If the first argument is a YAML file, its options come before the flags. Raises ValueError
        for an unknown or malformed option.
        """
        if argv and argv[0].endswith((".yaml", ".yml")):
            argv = [*self.flags_of_yaml(Path(argv[0])), *argv[1:]]
        *parsed, unknown = self.parse_args_into_dataclasses(
            argv, look_for_args_file=False, return_remaining_strings=True
        )
        if unknown:
            raise ValueError(f"unknown argument {unknown[0]!r}")
        # argparse sets a default only for names that the namespace lacks.
        unset = object()
        blank = argparse.Namespace(**{action.dest: unset for action in self._actions})
        filled = vars(self.parse_known_args(argv, blank)[0])
        return tuple(parsed), {name for name, value in filled.items() if value is not unset}

    def flags_of_yaml(self, path: Path) -> list[str]:
        """The file's items as flags.

        Flags cannot express null, or a list for an option that also takes one value. Such a value
        becomes the option's default if its type allows that. Raises ValueError for a key that is
        not a flag, and the errors of `read_options`.
        """
        values, lines = read_options(path)
        # Flags without a value (--help, --no_bf16) are not keys.
        actions = {
            option.removeprefix("--"): action
            for option, action in self._option_string_actions.items()
            if option.startswith("--") and action.nargs != 0
        }
        types = {n: t for kind in self.dataclass_types for n, t in get_type_hints(kind).items()}
        given: dict[str, str] = {}
        flags: list[str] = []
        for key, value in values.items():
            where = f"{path}, line {lines[key]}"
            action = actions.get(str(key))
            if action is None:
                close = difflib.get_close_matches(str(key), actions, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ValueError(f"{where}: unknown option {key!r}{hint}")
            if action.dest in given:
                raise ValueError(f"{where}: {given[action.dest]!r} and {key!r} are the same option")
            given[action.dest] = str(key)
            allowed = [get_origin(t) or t for t in get_args(types[action.dest])]
            if value is None:
                if NoneType in allowed:
                    self.set_defaults(**{action.dest: None})
            elif isinstance(value, list):
                if action.nargs is None and list in allowed:
                    self.set_defaults(**{action.dest: value})
                elif action.nargs == "+":
                    flags += [f"--{key}", *map(_argument, value)]
                else:
                    raise ValueError(f"{where}: {key!r} takes one value, got the list {value}")
            else:
                _check_argument(action, value, f"{where}: {key!r}")
                flags.append(f"--{key}={_argument(value)}")
        return flags


def resume_from(config: TrainingArguments) -> Any:
    """The value for `Trainer.train(resume_from_checkpoint=...)`: a folder, True, False or None."""
    resume: Any = config.resume_from_checkpoint
    if isinstance(resume, str) and resume.lower() in ("true", "false"):
        return resume.lower() == "true"
    return resume


def fail(command: str, message: str) -> int:
    """Print the error in one line; returns the exit status 2."""
    print(f"prefkern {command}: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _argument(value: Any) -> str:
    """A value of a YAML file as an argument of the command line."""
    if isinstance(value, str):
        return value
    return json.dumps(value, default=str) if isinstance(value, bool | dict | list) else str(value)


def _check_argument(action: argparse.Action, value: Any, what: str) -> None:
    """Raise ValueError, with file and line, for a value that argparse would refuse without them."""
    argument = _argument(value)
    if action.type is not None:
        try:
            action.type(argument)  # pyright: ignore[reportCallIssue]
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            kind = getattr(action.type, "__name__", "value")
            expected = {"int": "an int", "float": "a number", "string_to_bool": "true or false"}
            raise ValueError(
                f"{what} must be {expected.get(kind, 'one of its choices')}, got {argument!r}"
            ) from error
    if action.choices is not None and argument not in [str(choice) for choice in action.choices]:
        known = ", ".join(str(choice) for choice in action.choices)
        hint = ""
        if isinstance(value, bool):
            given = "yes or on" if value else "no or off"
            hint = f"; YAML reads {given} as {argument}, unless it is in quotes"
        raise ValueError(f"{what} must be one of {known}, got {argument!r}{hint}")
