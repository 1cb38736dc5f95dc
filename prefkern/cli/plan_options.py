"""The options of `prefkern plan`. Nothing here imports torch or transformers, so errors come at once."""

from __future__ import annotations

import argparse
import importlib.util
from typing import NoReturn

from prefkern.cli import fields
from prefkern.cli.arguments import check_model_folder, check_sources, spelled
from prefkern.data.columns import COLUMNS_HELP, read_renaming
from prefkern.data.truncation import TRUNCATION_HELP, TRUNCATION_MODES
from prefkern.keywords import full_dtype
from prefkern.version import install_line

DTYPES = ("bfloat16", "float16", "float32")
# The options that decide on the tokens of --data, and the defaults that are not of training.
_OF_DATA = {
    "dataset_config": None,
    "dataset_split": "train",
    "columns": None,
    "max_length": None,
    "max_prompt_length": None,
    "truncation_mode": None,
    "dataset_num_proc": None,
    "seed": None,
    "dataset_weights": None,
    "assistant_only_loss": None,
    "last_turn_only": None,
    "gold": False,
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse(argv: list[str]) -> argparse.Namespace:
    """The options, checked; with --data, those of `prefkern train` have its defaults.

    Raises ValueError for options that are unknown, malformed or without effect, OSError for a file
    or folder that does not exist, and ImportError if a package for --data is missing.
    """
    parser = _Parser(
        prog="prefkern plan",
        description="Predicts what a model's head costs in a step, compared with logits in memory.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "model", help="folder or hub name; for a hub name only the config is downloaded"
    )
    parser.add_argument("--seq-len", type=int, help="tokens of prompt and response")
    parser.add_argument(
        "--batch", type=int, required=True, help="pairs in one forward and backward"
    )
    parser.add_argument(
        "--prompt-len",
        type=int,
        help="how many of these tokens are prompt, which is not scored (default: 0)",
    )
    parser.add_argument(
        "--dtype",
        type=full_dtype,
        choices=DTYPES,
        default="bfloat16",
        help="dtype of hidden states and head (default: bfloat16)",
    )
    parser.add_argument(
        "--device",
        default="cuda",
        help="device of the later run; this machine need not have it (default: cuda)",
    )
    parser.add_argument("--backend", choices=("triton", "torch"), help="default: the device's own")
    parser.add_argument(
        "--workspace-mb",
        type=float,
        nargs="+",
        metavar="MIB",
        help="bounds on temporary memory to plan for (default: 256 1024 4096)",
    )
    head = parser.add_mutually_exclusive_group()
    head.add_argument(
        "--lora", action="store_true", help="show only a frozen head, as with LoRA on the body"
    )
    head.add_argument("--trains-head", action="store_true", help="show only a trained head")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run model code from the hub"
    )
    _add_data_options(parser)
    args = parser.parse_args(spelled(argv, "-"))
    for name, least in (("seq_len", 2), ("batch", 1), ("prompt_len", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"{_flag(name)} must be at least {least}, got {value}")
    check_model_folder("model", args.model)
    if args.data is not None:
        _check_data_options(args)
        return args
    for name in _OF_DATA:
        if getattr(args, name) is not None:
            raise ValueError(f"{_flag(name)} has no effect without --data")
    if args.seq_len is None:
        raise ValueError("give the lengths: --data FILE, or --seq-len")
    args.prompt_len = args.prompt_len or 0
    if args.prompt_len >= args.seq_len:
        raise ValueError(
            f"--prompt-len must be below --seq-len ({args.seq_len}), got {args.prompt_len}"
        )
    return args


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    """Those of `prefkern train` that decide on tokens, under its names."""
    data = parser.add_argument_group("data", "as in `prefkern train`, with its defaults")
    data.add_argument(
        "--data",
        "--dataset",
        "--dataset-name",
        nargs="+",
        action="extend",
        metavar="FILE",
        help="pairs to take the lengths from: .jsonl, .json, .parquet or .csv files, folders, or hub "
        "names; in place of --seq-len",
    )
    data.add_argument(
        "--dataset-weights",
        type=float,
        nargs="+",
        help="how often to draw from each of several (default: by size)",
    )
    for name in ("--assistant-only-loss", "--last-turn-only"):
        data.add_argument(
            name,
            action="store_true",
            default=None,
            help="score only those turns of a response, as training does",
        )
    data.add_argument(
        "--gold",
        action="store_true",
        default=None,
        help="take the third response of pairs too, and no reference, as the objective tpo does",
    )
    data.add_argument("--dataset-config", help="configuration of a hub dataset")
    data.add_argument("--dataset-split", help="split to use, or a slice of it: train[:1000]")
    data.add_argument(
        "--columns",
        nargs="+",
        action="extend",
        metavar="NAME=COLUMN",
        help=COLUMNS_HELP,
    )
    for name, text in (
        ("--max-length", "bound on prompt plus response, in tokens"),
        ("--max-prompt-length", "bound on the prompt, in tokens"),
        ("--dataset-num-proc", "processes that tokenise the dataset"),
        ("--seed", "of the order of the pairs"),
    ):
        data.add_argument(name, type=int, help=text)
    data.add_argument("--truncation-mode", choices=TRUNCATION_MODES, help=TRUNCATION_HELP)


def _check_data_options(args: argparse.Namespace) -> None:
    """Check the options of --data, and put in the defaults of `prefkern train`."""
    for name in ("seq_len", "prompt_len"):
        if getattr(args, name) is not None:
            raise ValueError(f"{_flag(name)} has no effect with --data, which has the lengths")
    if importlib.util.find_spec("datasets") is None:
        raise ImportError(f"--data needs datasets, which is not installed: {install_line('train')}")
    training = fields.of_source("prefkern.training.config", "PreferenceConfig")
    defaults = _OF_DATA | {o.name: o.default for o in training if o.name in _OF_DATA}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name, least in (
        ("max_length", 2),
        ("max_prompt_length", 1),
        ("dataset_num_proc", 1),
        ("seed", 0),
    ):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"{_flag(name)} must be at least {least}, got {value}")
    # As numpy's, which training seeds too.
    if args.seed >= 2**32:
        raise ValueError(f"--seed must be below 2**32, got {args.seed}")
    args.columns = read_renaming(args.columns)
    check_sources("--data", args.data, args.dataset_weights)
