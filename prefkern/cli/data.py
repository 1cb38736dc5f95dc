"""`prefkern data`: shows what would be trained on, before it is.

    prefkern data pairs.jsonl --model Qwen/Qwen3-0.6B
    prefkern data pairs.jsonl --model Qwen/Qwen3-0.6B --rows 10 > rows.txt
    prefkern data pairs.jsonl chats.parquet --dataset-weights 3 1 --model Qwen/Qwen3-0.6B

It prints the report that `prefkern train` prints with the same options, and the first rows of each
dataset as the model sees them: the tokens after the chat template and truncation. On a terminal scored tokens are
green, in two shades in turn. Elsewhere they stand between the marks `⟦` and `⟧`. A `‖` is the
boundary of prompt and response. A picture is the tokens that the processor makes of it. The model's
tokenizer (or processor) is read, and nothing else of it. An error is one line on stderr and exit
status 2.
"""

from __future__ import annotations

import argparse
import importlib.util
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from prefkern.cli import fields
from prefkern.cli.arguments import check_model_folder, check_sources, fail, spelled
from prefkern.data.columns import COLUMNS_HELP, read_renaming
from prefkern.data.truncation import TRUNCATION_HELP, TRUNCATION_MODES
from prefkern.version import install_line

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from prefkern.data.report import DatasetReport
    from prefkern.data.shown import Tokens

# The options of `prefkern train` that decide on tokens.
_OF_TRAINING = (
    *("max_length", "max_prompt_length", "truncation_mode", "dataset_num_proc"),
    *("assistant_only_loss", "last_turn_only"),
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status."""
    try:
        args = parse(argv)
        reports, rows = read(args)
    except (ValueError, TypeError, OSError, ImportError) as error:
        return fail("data", str(error))
    from prefkern.data import show

    show(reports)
    show_rows(rows)
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """The options, checked, with the defaults of `prefkern train`.

    Raises ValueError for options that are unknown or malformed, OSError for a file or folder that
    does not exist, and ImportError if a package is missing.
    """
    parser = _Parser(
        prog="prefkern data",
        description="Shows what would be trained on: the report, and rows as the model sees them.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "dataset",
        nargs="+",
        help=".jsonl, .json, .parquet or .csv files, folders, or hub names",
    )
    parser.add_argument(
        "--dataset-weights",
        type=float,
        nargs="+",
        help="how often to draw from each of several (default: by size)",
    )
    parser.add_argument(
        "--model",
        "--model-name-or-path",
        required=True,
        help="folder or hub name of the model, for its tokenizer and chat template",
    )
    parser.add_argument(
        "--rows", type=int, default=3, help="rows to show of each dataset (default: 3)"
    )
    responses = parser.add_mutually_exclusive_group()
    responses.add_argument(
        "--unpaired",
        action="store_true",
        help="take the responses of pairs one by one, as the objective kto does",
    )
    responses.add_argument(
        "--gold",
        action="store_true",
        help="take the third response of pairs too, as the objective tpo does",
    )
    parser.add_argument("--dataset-config", help="configuration of a hub dataset")
    parser.add_argument(
        "--dataset-split",
        default="train",
        help="split to use, or a slice of it: train[:1000] (default: train)",
    )
    parser.add_argument(
        "--columns", nargs="+", action="extend", metavar="NAME=COLUMN", help=COLUMNS_HELP
    )
    parser.add_argument("--max-length", type=int, help="bound on prompt plus response, in tokens")
    parser.add_argument("--max-prompt-length", type=int, help="bound on the prompt, in tokens")
    parser.add_argument("--truncation-mode", choices=TRUNCATION_MODES, help=TRUNCATION_HELP)
    for name in ("assistant_only_loss", "last_turn_only"):
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            action="store_true",
            default=None,
            help="score only those turns of a response, as training does",
        )
    parser.add_argument("--dataset-num-proc", type=int, help="processes that tokenise the dataset")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run tokenizer code from the hub"
    )
    args = parser.parse_args(spelled(argv, "-"))
    training = fields.of_source("prefkern.training.config", "PreferenceConfig")
    for option in training:
        if option.name in _OF_TRAINING and getattr(args, option.name) is None:
            setattr(args, option.name, option.default)
    for name, least in (
        ("rows", 0),
        ("max_length", 2),
        ("max_prompt_length", 1),
        ("dataset_num_proc", 1),
    ):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    args.columns = read_renaming(args.columns)
    check_model_folder("--model", args.model)
    check_sources("dataset", args.dataset, args.dataset_weights)
    if importlib.util.find_spec("datasets") is None:
        raise ImportError(f"this needs datasets, which is not installed: {install_line('train')}")
    return args


def read(args: argparse.Namespace) -> tuple[list[DatasetReport], list[tuple[str, list[Tokens]]]]:
    """The reports, and the first rows of each dataset, each with a title, in tokens.

    Raises ValueError and OSError for a dataset or tokenizer that cannot be read.
    """
    from prefkern.data import DatasetMix, load_preference_dataset
    from prefkern.data.columns import holds_examples, picture_column, renamed
    from prefkern.models.loading import load_processor, load_tokenizer

    found, are_single = {}, {}
    for source in args.dataset:
        dataset = load_preference_dataset(
            source, args.dataset_split, args.dataset_config, args.columns, pictures=True
        )
        found[source] = renamed(dataset, args.columns, source)
        are_single[source] = not args.gold and holds_examples(found[source], source)
    # A run trains on pairs or on single responses: beside the latter, pairs are taken one by one.
    is_single = args.unpaired or any(are_single.values())
    sees = any(picture_column(dataset.column_names) is not None for dataset in found.values())
    load = load_processor if sees else load_tokenizer
    processor = load(args.model, {"trust_remote_code": args.trust_remote_code})
    tokenizer = getattr(processor, "tokenizer", processor)
    parts, reports = {}, {}
    for source, dataset in found.items():
        parts[source], reports[source] = _tokenized(args, source, dataset, processor, is_single)
    if len(parts) > 1:
        options = fields.of_source("transformers.training_args", "TrainingArguments")
        seed = next(option.default for option in options if option.name == "seed")
        DatasetMix(parts, args.dataset_weights).mixed(seed, reports)
    unit = "response" if is_single else "pair"
    rows = []
    for source, tokens in parts.items():
        of = f" of {source}" if len(parts) > 1 else ""
        for number, row in enumerate(tokens.select(range(min(len(tokens), args.rows))), 1):
            title = f"{unit} {number} of {len(tokens):,}{of}"
            rows.append((title, [*_sequences(row, is_single, tokenizer)]))
    return [*reports.values()], rows


def _tokenized(
    args: argparse.Namespace, source: str, dataset: Any, processor: Any, is_single: bool
) -> tuple[Any, DatasetReport]:
    from prefkern.data import tokenize_examples, tokenize_preferences, without_unused

    tokenize = tokenize_examples if is_single else partial(tokenize_preferences, gold=args.gold)
    return tokenize(
        without_unused(dataset, references=False, margins=False),
        processor,
        max_length=args.max_length,
        max_prompt_length=args.max_prompt_length,
        truncation_mode=args.truncation_mode,
        assistant_only_loss=args.assistant_only_loss,
        last_turn_only=args.last_turn_only,
        num_proc=args.dataset_num_proc,
        name=source,
    )


def _sequences(row: Any, is_single: bool, tokenizer: Any) -> Iterator[Tokens]:
    """The sequences of a row, as the trainer's collator makes them."""
    from prefkern.data.collate import ExampleCollator, PreferenceCollator
    from prefkern.data.columns import GOLD, GOLD_IDS
    from prefkern.data.shown import Tokens

    # Packed, there is no padding to leave out.
    if is_single:
        batch = ExampleCollator(0, padding_free=True)([row])
        names = ("desirable" if row["desirable"] else "undesirable",)
    else:
        has_gold = GOLD_IDS in row
        batch = PreferenceCollator(0, padding_free=True, gold=has_gold)([row])
        names = ("chosen", "rejected", *([GOLD] if has_gold else []))
    ids, labels = (batch[name][0].tolist() for name in ("input_ids", "labels"))
    bounds = batch["cu_seqlens"].tolist()
    for name, start, end in zip(names, bounds[:-1], bounds[1:], strict=True):
        prompt = len(row["prompt_ids"])
        yield Tokens.of(name, ids[start:end], labels[start:end], prompt, tokenizer)


def show_rows(rows: list[tuple[str, list[Tokens]]], console: Console | None = None) -> None:
    """Print rows: in colour on a terminal, with marks elsewhere."""
    from rich.console import Console

    console = console or Console(highlight=False)
    is_coloured = console.is_terminal and not console.no_color
    for title, sequences in rows:
        console.file.write(f"{title}\n\n")
        for each in sequences:
            console.file.write(f"{each.title}\n")
            if is_coloured:
                console.print(each, soft_wrap=True)
            else:
                console.file.write(f"{each}\n")
            console.file.write("\n")
