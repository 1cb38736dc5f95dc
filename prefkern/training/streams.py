"""Training on streams: what is refused beside one, its tokens, and whether a run can resume on it.

    stream.json    a hash of the first rows of each stream, and the weights of several, in a checkpoint

A run that resumes reads the stream again and skips as many batches as the checkpoint has seen. That
is right only if the stream has the same rows in the same order, so a run whose first rows differ
says that it cannot.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets

from prefkern.data.columns import renamed
from prefkern.data.foreign import decided_by
from prefkern.data.mixing import DatasetMix
from prefkern.data.report import DatasetReport
from prefkern.data.streams import (
    EndlessRows,
    MixedStream,
    TokenStream,
    first_rows,
    is_stream,
    refuse_streamed_pictures,
)
from prefkern.training.files import write_json
from prefkern.training.pictures import refuse_picture_stream

_FILE = "stream.json"


class Streams:
    """The streams that a run trains on.

    Args:
        given: a stream, or a `DatasetMix` of streams.

    `first` holds their first rows, which are checked and reported before training: a dataset, or a
    mix of datasets.
    """

    def __init__(self, given: Any) -> None:
        is_mix = isinstance(given, DatasetMix)
        self._parts = (
            {f"train_{key}": part for key, part in given.parts.items()}
            if is_mix
            else {"train": given}
        )
        self._weights = given.weights if is_mix else None
        for name, part in self._parts.items():
            refuse_picture_stream(part, name)
        self._first = {name: first_rows(part, name) for name, part in self._parts.items()}
        for name, rows in self._first.items():
            refuse_streamed_pictures(rows.column_names, name)
        named = {key: self._first[f"train_{key}"] for key in given.parts} if is_mix else {}
        self.first: Any = DatasetMix(named) if is_mix else self._first["train"]

    def rename(self, reports: dict[str, DatasetReport]) -> None:
        """Say in the reports that they are of first rows."""
        for name in self._parts:
            reports[name] = replace(reports[name], name=f"{name}, first rows")

    def tokenised(
        self,
        tokenize: Callable[[datasets.Dataset, str], datasets.Dataset],
        columns: Any,
        shuffles: bool,
        seed: int,
    ) -> EndlessRows:
        """The tokenised rows.

        Args:
            tokenize: raw rows and the name of their dataset -> tokenised rows.
            columns: the streams' own names of columns.
            shuffles: as of `TokenStream`.
            seed: of the draws from several streams.
        """

        def tokens(name: str, rows: datasets.Dataset) -> datasets.Dataset:
            with decided_by(renamed(self._first[name], columns, name)):
                return tokenize(rows, name)

        parts = [
            TokenStream(part, partial(tokens, name), tokens(name, self._first[name]), shuffles)
            for name, part in self._parts.items()
        ]
        return parts[0] if self._weights is None else MixedStream(parts, self._weights, seed)


def check_stream(args: Any, train_dataset: Any) -> Streams | None:
    """The streams to train on, or None. Raises for arguments that need the whole of one."""
    is_mix = isinstance(train_dataset, DatasetMix)
    parts: dict[str, Any] = {**train_dataset.parts} if is_mix else {"": train_dataset}
    found = [name for name, part in parts.items() if is_stream(part)]
    if not found:
        return None
    if is_mix and len(found) < len(parts):
        others = [name for name in parts if name not in found]
        raise TypeError(
            f"train_dataset mixes streams ({', '.join(map(repr, found))}) and datasets "
            f"({', '.join(map(repr, others))}): make all of them streams, with "
            "dataset.to_iterable_dataset()"
        )
    if is_mix and train_dataset.weights is None:
        raise ValueError(
            "weights is None, and the sizes of streams are not known: give the DatasetMix a weight "
            f"for each of {', '.join(map(repr, parts))}"
        )
    if args.max_steps <= 0:
        raise ValueError(
            f"max_steps is {args.max_steps}, and train_dataset is a stream, whose length is not "
            "known; set max_steps"
        )
    for name in ("precompute_ref_log_probs", "max_tokens_per_batch"):
        if getattr(args, name):
            raise ValueError(
                f"{name} is {getattr(args, name)!r}, which needs all rows, and train_dataset is a "
                "stream; leave it out, or give a datasets.Dataset"
            )
    for part in parts.values():
        if getattr(part, "_distributed", None) is not None:
            raise ValueError(
                "train_dataset was split by split_dataset_by_node, and the trainer spreads a stream "
                "over the processes itself: rows would be left out; give the whole stream"
            )
    # accelerate would choose True for streams, and cut a batch by its rows.
    args.accelerator_config.dispatch_batches = False
    return Streams(train_dataset)


def save_stream(dataset: Any, folder: str) -> None:
    """Write into a checkpoint what tells the stream that it was trained on."""
    if isinstance(dataset, EndlessRows):
        write_json(Path(folder) / _FILE, dataset.description)


def check_resumed_stream(dataset: Any, checkpoint: str, skips: bool) -> None:
    """Raise ValueError if a stream is another one than that of a checkpoint.

    `skips` is whether training goes on after the rows that the checkpoint has seen.
    """
    if not (isinstance(dataset, EndlessRows) and skips):
        return
    file = Path(checkpoint) / _FILE
    theirs = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    if theirs != dataset.description:
        raise ValueError(
            f"the stream's first rows are not those that {checkpoint} was trained on, or the weights "
            "or the seed of several streams differ, so it cannot resume where it stopped: give the "
            "same stream in the same order, or set ignore_data_skip to go on at its beginning"
        )
