"""Loads one split of a preference dataset: from a file, a folder, or a name on the hub.

A split may be a slice in the syntax of `datasets`: `train[:10000]`, `train[90%:]`. A single file is
one split; it may be requested under any name. `load_preference_stream` reads the rows as they are
needed instead, and takes no slices.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pandas
from datasets.exceptions import DatasetsError

from prefkern.data import faults, foreign
from prefkern.data.columns import check_columns, plain, renamed
from prefkern.data.sources import FORMATS, local_path
from prefkern.data.streams import first_rows, refuse_streamed_pictures

_TEXT_COLUMNS = ("prompt", "chosen", "rejected", "completion", *foreign.TEXTS)
# The texts that pandas reads as a missing value.
_MISSING = [
    *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"),
    *("<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
]


def load_preference_dataset(
    source: str,
    split: str = "train",
    config: str | None = None,
    columns: Mapping[str, str] | None = None,
    pictures: bool = False,
) -> datasets.Dataset:
    """Load a preference dataset and check that it is one.

    Args:
        source: a .jsonl, .json, .parquet or .csv file, a folder (of such files, or written by
            `save_to_disk`), or a name on the Hugging Face hub.
        split: which split, or slice of one (`train[:1000]`).
        config: which configuration of a hub dataset.
        columns: the dataset's own names of columns, `{"prompt": "question"}`; the dataset keeps
            its names, and whoever tokenises it gets the mapping again.
        pictures: whether the caller reads the pictures of prompts.

    Raises FileNotFoundError for a file that does not exist, and ValueError for one that cannot be
    read, lacks a column or has no rows.
    """
    with _named_failures(source):
        dataset = _load(source, split, config, columns, streaming=False)
    check_columns(renamed(dataset, columns, source), source, paired=False, pictures=pictures)
    # `save_to_disk` also saves the format that was set on the dataset.
    return plain(dataset)


def load_preference_stream(
    source: str,
    split: str = "train",
    config: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> datasets.IterableDataset:
    """A preference dataset as a stream, whose first rows are checked.

    Args, and errors: as of `load_preference_dataset`; a slice of a split is refused.
    """
    if "[" in split:
        raise ValueError(
            f"split must be the name of a split for a stream, which has no length to slice, got {split!r}"
        )
    with _named_failures(source):
        stream = _load(source, split, config, columns, streaming=True)
        first = first_rows(stream, source)
    refuse_streamed_pictures(first.column_names, source)
    check_columns(renamed(first, columns, source), source, paired=False)
    return stream


def _load(
    source: str, split: str, config: str | None, columns: Mapping[str, str] | None, streaming: bool
) -> Any:
    path = local_path(source)
    if path.is_file():
        return _load_file(path, split, columns or {}, streaming)
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        saved = _load_saved(path, split)
        return saved.to_iterable_dataset() if streaming else saved
    name = str(path) if path.is_dir() else source
    return datasets.load_dataset(name, config, split=split, streaming=streaming)


@contextmanager
def _named_failures(source: str) -> Iterator[None]:
    """Raise ValueError for what the readers of files raise, with the dataset and the fault."""
    path = local_path(source)
    try:
        yield
    # `datasets` raises RuntimeError for a dataset that is a script, which it does not run.
    except (DatasetsError, OSError, KeyError, ValueError, RuntimeError) as error:
        raise ValueError(f"dataset {source!r} cannot be loaded: {_reason(path, error)}") from error


def _reason(path: Path, error: Exception) -> str:
    """The fault in the file if it can be found, else the message of the file's reader."""
    if path.is_file() and path.suffix in (".jsonl", ".json"):
        fault = faults.in_json(path)
        if fault is not None:
            return fault
    # `datasets` says only that something failed; the cause below it says what.
    cause: BaseException = error
    while isinstance(cause, DatasetsError) and cause.__cause__ is not None:
        cause = cause.__cause__
    return next(iter(str(cause).strip().splitlines()), type(cause).__name__)


def _load_file(path: Path, split: str, columns: Mapping[str, str], streaming: bool) -> Any:
    builder = FORMATS.get(path.suffix)
    if builder is None:
        raise ValueError(f"unknown file type {path.suffix!r}; known: {', '.join(FORMATS)}")
    with path.open("rb") as file:
        if not file.read(4096).strip():
            raise ValueError("the file is empty")
    files = {_split_name(split): str(path)}
    options = _text_as_it_is(path, columns) if builder == "csv" else {}
    return datasets.load_dataset(
        builder, data_files=files, split=split, streaming=streaming, **options
    )


def _text_as_it_is(path: Path, names: Mapping[str, str]) -> dict[str, Any]:
    """Options for pandas that read the prompts "NA", "null" and "", and the answer 007, as text.

    In columns that hold no text, such cells and empty ones are still missing values.
    """
    columns = pandas.read_csv(path, nrows=0).columns
    texts = {*_TEXT_COLUMNS, *(names[name] for name in (*_TEXT_COLUMNS, "system") if name in names)}
    return {
        "converters": {column: str for column in columns if column in texts},
        "na_values": {column: _MISSING for column in columns if column not in texts},
        "keep_default_na": False,
    }


def _load_saved(path: Path, split: str) -> datasets.Dataset:
    """Loads what `save_to_disk` wrote, and slices it: the reader of `datasets` takes no slices."""
    saved = datasets.load_from_disk(str(path))
    is_dict = isinstance(saved, datasets.DatasetDict)
    parts = {str(n): part for n, part in saved.items()} if is_dict else {_split_name(split): saved}
    if _split_name(split) not in parts:
        raise ValueError(f"no split {_split_name(split)!r}; found {', '.join(parts)}")
    lengths = {name: len(part) for name, part in parts.items()}
    slices = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    pieces = [
        parts[each.splitname].select(range(lengths[each.splitname])[each.from_ : each.to])
        for each in slices
    ]
    return pieces[0] if len(pieces) == 1 else datasets.concatenate_datasets(pieces)


def _split_name(split: str) -> str:
    """The name of the split in a slice: `train` in `train[:10000]`."""
    name = re.match(r"\w+", split)
    if name is None:
        raise ValueError(f"split must be a name, or a slice like 'train[:1000]', got {split!r}")
    return name[0]
