"""A streamed dataset as tokenised rows, made as training reads them.

Rows are tokenised in groups, by the same code as a dataset that is there at once, so that each row
has the same tokens. The stream is read again when it ends, with its `set_epoch`. Several streams are
mixed by weights (`MixedStream`). A run that resumes reads from the beginning and skips what it has
trained on: `description` tells whether the first rows, and what mixes them, are still the same. An
evaluation reads a stream once and keeps its rows (`whole`).
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import datasets
from torch.utils.data import IterableDataset, get_worker_info

from prefkern.data.columns import picture_column
from prefkern.data.mixing import DatasetMix
from prefkern.data.truncation import NothingToScore

# Rows that are tokenised together; the first ones are checked and reported before training.
ROWS = 256


def is_stream(dataset: Any) -> bool:
    """Whether a dataset is streamed by `datasets`."""
    return isinstance(dataset, datasets.IterableDataset)


def refuse_streamed_pictures(columns: Iterable[str] | None, name: str) -> None:
    """Raise ValueError for pictures among a stream's columns: its rows are decoded on the way.

    Those of a generator are known once its rows are read; until then they are None.
    """
    if picture_column(columns or ()) is not None:
        raise ValueError(
            f"dataset {name!r} is a stream with pictures, which is not supported yet; give a "
            "datasets.Dataset (no --streaming), or remove the column to train on the text alone"
        )


def first_rows(stream: datasets.IterableDataset, name: str) -> datasets.Dataset:
    """The first rows of a stream. Raises ValueError if there are none."""
    group = next(iter(stream.batch(ROWS)), None)
    if group is None:
        raise ValueError(f"dataset {name!r} is empty")
    return _dataset_of(group)


def whole(dataset: Any) -> Any:
    """A dataset, or each of several, with the rows of a stream in memory; others as they are."""
    if isinstance(dataset, DatasetMix):
        return dataset.of({name: whole(part) for name, part in dataset.parts.items()})
    if isinstance(dataset, dict):
        return {name: whole(part) for name, part in dataset.items()}
    return _with_all_columns([*dataset]) if is_stream(dataset) else dataset


class EndlessRows(IterableDataset):
    """Tokenised rows without end; `description` is equal for rows that are."""

    column_names: list[str]
    description: dict[str, Any]


class TokenStream(EndlessRows):
    """The tokenised rows of a stream.

    Args:
        stream: the raw rows.
        tokenize: raw rows -> tokenised rows; it raises ValueError for what cannot be used.
        first: the first rows, tokenised.
        shuffles: mix the rows of a group: a pair's responses would come apart from others'.
    """

    def __init__(
        self,
        stream: datasets.IterableDataset,
        tokenize: Callable[[datasets.Dataset], datasets.Dataset],
        first: datasets.Dataset,
        shuffles: bool,
    ) -> None:
        self._stream = stream
        self._tokenize = tokenize
        self._shuffles = shuffles
        self.column_names = first.column_names
        digest = hashlib.sha256(json.dumps([*first]).encode())
        self.description = {"rows": len(first), "first rows": digest.hexdigest()}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        times = 0
        while True:
            self._stream.set_epoch(times)
            start, is_idle = 0, True
            for group in self._stream.batch(ROWS):
                rows = _dataset_of(group)
                for row in self._tokens(rows, start):
                    is_idle = False
                    yield row
                start += len(rows)
            if is_idle:
                # A worker may have no shard of the stream, or one without a row to train on.
                return
            times += 1

    def _tokens(self, rows: datasets.Dataset, start: int) -> Iterator[dict[str, Any]]:
        hidden = datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
        try:
            tokens = self._tokenize(rows)
        except NothingToScore:
            return
        except ValueError as error:
            raise ValueError(f"in rows {start} to {start + len(rows) - 1}: {error}") from error
        finally:
            if not hidden:
                datasets.enable_progress_bars()
        mixed: Any = tokens.shuffle(seed=start) if self._shuffles else tokens
        yield from mixed


class MixedStream(EndlessRows):
    """The rows of several streams, each drawn from one of them with the probability of its weight.

    A stream that ends is read again, so that the shares stay those of the weights.
    """

    def __init__(self, parts: Sequence[TokenStream], weights: Sequence[float], seed: int) -> None:
        self._parts = parts
        self._weights = [float(weight) for weight in weights]
        self._seed = seed
        self.column_names = parts[0].column_names
        self.description = {
            "parts": [part.description for part in parts],
            "weights": self._weights,
            "seed": seed,
        }

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        drawn = random.Random(f"{self._seed} {0 if worker is None else worker.id}")
        rows = [iter(part) for part in self._parts]
        weights = [*self._weights]
        while any(weights):
            (at,) = drawn.choices(range(len(rows)), weights)
            row = next(rows[at], None)
            if row is None:
                # A worker without a shard of this stream.
                weights[at] = 0.0
            else:
                yield row


def _dataset_of(group: dict[str, list[Any]]) -> datasets.Dataset:
    count = len(next(iter(group.values())))
    return _with_all_columns(
        [{name: values[row] for name, values in group.items()} for row in range(count)]
    )


def _with_all_columns(rows: list[dict[str, Any]]) -> datasets.Dataset:
    """Rows with the columns that any of them has: `from_list` alone takes those of its first."""
    names = dict.fromkeys(name for row in rows for name in row)
    return datasets.Dataset.from_list([{name: row.get(name) for name in names} for row in rows])
