"""Arguments of the commands that train: from flags, from a YAML or JSON file, or from both.

The keys of the file are the names of the flags, and a flag goes before the file. Names may be
written with "_" or "-". The parser knows transformers' options without importing it (see `fields`),
so it is quick, and an error is one line on stderr and exit status 2.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

from prefkern.cli import fields
from prefkern.cli.fields import UNKNOWN, Option
from prefkern.data.mixing import check_weights
from prefkern.data.sources import local_path
from prefkern.keywords import full_dtype
from prefkern.training.names import asks_nothing, hint
from prefkern.version import install_line

if TYPE_CHECKING:
    from transformers import TrainingArguments

# Of files of options.
_SUFFIXES = (".yaml", ".yml", ".json")
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
        metadata={
            "help": "Dtype of the weights; auto: as in the file.",
            "choices": _DTYPES,
            "reads": full_dtype,
            "aliases": ["--torch_dtype"],
        },
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
    dataset_split: str = field(
        default="train",
        metadata={"help": "Split to use.", "aliases": ["--dataset_train_split"]},
    )


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


@dataclass(frozen=True)
class Parsed:
    """The arguments of a command."""

    groups: tuple[Any, ...]  # instances of the command's own dataclasses
    config: dict[str, Any]  # the options of the training config that were given
    given: set[str]  # the names of all options that were given
    defaults: dict[str, Any]  # of the training config
    training_defaults: dict[str, Any]  # of transformers' TrainingArguments

    def checkable(self) -> SimpleNamespace:
        """The training config's values, for checks before its class is imported."""
        known = {name: value for name, value in self.defaults.items() if value is not UNKNOWN}
        return SimpleNamespace(**{**known, **self.config})


class Parser(argparse.ArgumentParser):
    """Options of dataclasses, with errors of one line.

    Args:
        kinds: the command's own dataclasses.
        config: module and name of the training config's class, a TrainingArguments.
        command, description: for the help.
    """

    def __init__(
        self, kinds: Sequence[type], config: tuple[str, str], command: str, description: str
    ) -> None:
        super().__init__(
            prog=f"prefkern {command}",
            usage=f"prefkern {command} [CONFIG.yaml] [--option value ...]",
            description=description,
            epilog="CONFIG is a .yaml or .json file of options; --config CONFIG means the same. "
            "Options may be written with - instead of _.",
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
        )
        # argparse's own takes -1e-5 for an option.
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")
        self.kinds = kinds
        training = fields.of_source("transformers.training_args", "TrainingArguments")
        theirs = {option.name for option in training}
        options = fields.of_source(*config)
        self.training_defaults = {o.name: o.default for o in training if o.default is not UNKNOWN}
        self.config_options = {option.name: option for option in options}
        self.options: dict[str, Option] = {}
        for kind in kinds:
            self._add(getattr(kind, "_argument_group_name", "options"), fields.of_class(kind))
        self._add("training", [option for option in options if option.name not in theirs])
        self._add(
            "training: transformers' own", [option for option in options if option.name in theirs]
        )

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def parse(self, argv: list[str]) -> Parsed:
        """Raises ValueError for an unknown or malformed option, and the errors of `read_options`."""
        file, argv = self._config_file(spelled(argv, "_"))
        given = {} if file is None else self._values_of(file)
        flags, unknown = self.parse_known_args(argv)
        if unknown:
            name = unknown[0].partition("=")[0]
            near = hint(name, self.options, "--{}") if name.startswith("--") else ""
            raise ValueError(f"unknown argument {unknown[0]!r}{near}")
        for name, value in vars(flags).items():
            # `--report_to none` is one text, `--report_to wandb tensorboard` a list.
            is_one = "str" in self.options[name].kinds and isinstance(value, list)
            given[name] = value[0] if is_one and len(value) == 1 else value
        own = [{o.name for o in fields.of_class(kind)} for kind in self.kinds]
        return Parsed(
            tuple(
                kind(**{name: value for name, value in given.items() if name in names})
                for kind, names in zip(self.kinds, own, strict=True)
            ),
            {name: value for name, value in given.items() if name in self.config_options},
            set(given),
            {name: option.default for name, option in self.config_options.items()},
            self.training_defaults,
        )

    def _add(self, title: str, options: list[Option]) -> None:
        group = self.add_argument_group(title)
        for option in options:
            names = [f"--{option.name}", *option.aliases]
            self.options |= {name.removeprefix("--"): option for name in names}
            takes: dict[str, Any] = {"nargs": "?", "const": True} if option.is_flag else {}
            if "list" in option.kinds:
                takes = {"nargs": "+"}
                # As often as it is given: `--columns prompt=question --columns chosen=good`.
                takes["action"] = "extend"
            text = option.help
            if option.default not in (None, UNKNOWN) and "efault" not in text:
                text += f" (default: {option.default})".replace("%", "%%")
            takes["metavar"] = None if option.choices else _metavar(option)
            takes["choices"] = option.choices
            group.add_argument(*names, dest=option.name, type=_reader(option), help=text, **takes)
            if option.default is True:
                group.add_argument(
                    f"--no_{option.name}",
                    dest=option.name,
                    action="store_false",
                    help=argparse.SUPPRESS,
                )

    def _config_file(self, argv: list[str]) -> tuple[Path | None, list[str]]:
        """The file of options, wherever it stands, and the other arguments."""
        files, rest, previous, option = [], [], "", None
        for word in argv:
            option = self._option_string_actions.get(previous, option)
            nargs = None if option is None else option.nargs
            is_first = previous in self._option_string_actions
            is_value = is_first and nargs in (None, "+")
            # `--columns prompt=a.json chosen=b.json`, and not a file after the last of them.
            is_value = is_value or (nargs == "+" and "=" in word and not Path(word).exists())
            # `--dataset a.json b.json`, and not a file of options after them.
            is_several = nargs == "+" and option is not None and option.dest == "dataset"
            is_several = is_several and word.endswith(".json")
            is_value = is_value or (is_several and not self._has_options(Path(word)))
            if previous == "--config" or (
                word.endswith(_SUFFIXES) and not word.startswith("-") and not is_value
            ):
                files.append(word)
            elif word.startswith("--config="):
                files.append(word.removeprefix("--config="))
            elif word != "--config":
                rest.append(word)
            previous = word
        if previous == "--config":
            raise ValueError("--config needs a file")
        if len(files) > 1:
            raise ValueError(f"give one file of options, got {' and '.join(files)}")
        return (Path(files[0]) if files else None), rest

    def _has_options(self, path: Path) -> bool:
        """Whether a JSON file is an object that names an option."""
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return isinstance(value, dict) and any(
            str(key).replace("-", "_") in self.options for key in value
        )

    def _values_of(self, path: Path) -> dict[str, Any]:
        """The values in a file, by option; null is the default of an option that is never None."""
        from prefkern.cli.options_file import read_options

        file = read_options(path)
        keys: dict[str, str] = {}
        unknown: list[str] = []
        given: dict[str, Any] = {}
        for key, value in file.values.items():
            where = file.where(key)
            option = self.options.get(str(key).replace("-", "_"))
            if option is None:
                if asks_nothing(str(key), value):
                    continue
                near = hint(str(key), self.options, "{!r}")
                unknown.append(f"{where}: unknown option {key!r}{near}")
                continue
            if option.name in keys:
                raise ValueError(f"{where}: {keys[option.name]!r} and {key!r} are the same option")
            keys[option.name] = str(key)
            if value is not None:
                literal = file.texts.get(key)
                given[option.name] = _from_file(option, value, literal, f"{where}: {key!r}")
            elif "None" in option.kinds and option.name != "report_to":
                given[option.name] = None
        if unknown:
            raise ValueError("; ".join(unknown))
        return given


def spelled(argv: list[str], mark: str) -> list[str]:
    """The arguments with `mark`, "_" or "-", between the parts of an option's name."""
    return [
        re.sub("(?<=[^-])[-_]", mark, name) + equals + value if name.startswith("--") else word
        for word in argv
        for name, equals, value in [word.partition("=")]
    ]


def check_installed() -> None:
    """Raise ImportError for packages of the extra "train" that are missing."""
    needed = ("accelerate", "datasets", "peft")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"{', '.join(missing)} not installed: {install_line('train')}")


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


@contextmanager
def importing() -> Iterator[None]:
    """Imports without the garbage collector, which takes a tenth of their time and finds little."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def check_model_folder(option: str, name: str | None) -> None:
    """Raise FileNotFoundError for a model's name that is clearly a folder and does not exist."""
    if name is not None and name.startswith((".", "/", "~")) and not Path(name).exists():
        raise FileNotFoundError(f"{option}: no such folder: {name}")


def check_sources(option: str, sources: Sequence[str], weights: Sequence[float] | None) -> None:
    """Raise for datasets given twice or that do not exist, and for weights that do not fit them."""
    if weights is not None and len(sources) == 1:
        raise ValueError(f"--dataset_weights has no effect on one dataset, {sources[0]}")
    check_weights("--dataset_weights", weights, len(sources))
    for source in sources:
        if sources.count(source) > 1:
            raise ValueError(f"{option} has {source} twice; give each dataset once")
        local_path(source)


def check_output_dir(output_dir: str | None) -> None:
    """Raise ValueError for a folder that cannot be made, since a file is in its place."""
    path = Path(output_dir or ".").expanduser()
    for each in (path, *path.parents):
        if each.exists() and not each.is_dir():
            raise ValueError(f"--output_dir must be a folder, got {str(path)!r}: {each} is a file")


def _boolean(text: str) -> bool:
    values = {"yes": True, "true": True, "t": True, "y": True, "1": True, "on": True}
    values |= {"no": False, "false": False, "f": False, "n": False, "0": False, "off": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}")
    return values[text.lower()]


def _reader(option: Option) -> Callable[[str], Any]:
    """The function that makes an option's value of its text."""
    kinds = option.kinds
    if "int" in kinds or "float" in kinds:
        return int if "int" in kinds else float

    def read(text: str) -> Any:
        if "bool" in kinds and ("str" not in kinds or text.lower() in ("true", "false")):
            return _boolean(text)
        if "dict" in kinds and (text.lstrip().startswith("{") or "str" not in kinds):
            try:
                return json.loads(text)
            except json.JSONDecodeError as error:
                raise argparse.ArgumentTypeError(f"is not JSON: {error}") from error
        return text if option.reads is None else option.reads(text)

    return read


def _metavar(option: Option) -> str:
    names = {"int": "INT", "float": "NUMBER", "dict": "JSON", "bool": "BOOL"}
    return next((name for kind, name in names.items() if kind in option.kinds), "TEXT")


def _from_file(option: Option, value: Any, literal: str | None, what: str) -> Any:
    """A value of a file, checked as a flag is. Raises ValueError, with file and line."""
    kinds = option.kinds
    if isinstance(value, list):
        if "list" not in kinds:
            raise ValueError(f"{what} takes one value, got the list {value}")
        return [
            _from_file(replace(option, kinds=kinds - {"list"}), each, None, what) for each in value
        ]
    if isinstance(value, dict):
        if "dict" not in kinds:
            raise ValueError(f"{what} takes one value, got the mapping {value}")
        return value
    text = json.dumps(value) if isinstance(value, bool) else str(value)
    if literal is not None and not kinds & {"int", "float", "bool"}:
        # `no` and `1.10` are texts here, as on the command line.
        text = literal
    try:
        read = _reader(option)(text)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{what} {error}") from error
    except ValueError as error:
        expected = "an int" if "int" in kinds else "a number"
        raise ValueError(f"{what} must be {expected}, got {text!r}") from error
    if option.choices is not None and read not in option.choices:
        known = ", ".join(str(choice) for choice in option.choices)
        raise ValueError(f"{what} must be one of {known}, got {text!r}")
    return [read] if "list" in kinds and "str" not in kinds else read
