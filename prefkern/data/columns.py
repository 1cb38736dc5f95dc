"""The columns of a preference dataset: which are needed, which are read, which are refused.

These checks need only the columns. So an unusable dataset fails at once, before a row is read or a
model is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets

TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
EXAMPLE_COLUMNS = ("prompt_ids", "completion_ids", "desirable")
MARGIN_SOURCES = (("reward_margin",), ("margin",), ("score_chosen", "score_rejected"))
ID_COLUMNS = (*TOKEN_COLUMNS, EXAMPLE_COLUMNS[1])
# The columns that the collators read; all others are dropped.
COLUMNS = (*TOKEN_COLUMNS, *REFERENCE_COLUMNS, "reward_margin", *EXAMPLE_COLUMNS[1:])
# TRL's names. Images are part of the prompt: to ignore them would train another task.
_IMAGE_COLUMNS = ("image", "images")


def check_columns(dataset: Any, name: str, *, paired: bool = True, margins: bool = False) -> None:
    """Raise unless `dataset` is a map-style dataset with rows and the necessary columns.

    Args:
        dataset: a dataset, as `load_preference_dataset` returns it.
        name: the dataset's name in errors.
        paired: False also accepts single responses (`prompt`, `completion`, `label`).
        margins: True if each pair needs a reward model's margin.

    Raises TypeError for another kind of dataset, ValueError for missing columns, images or no rows.
    """
    import datasets

    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(
            f"dataset {name!r} must be a datasets.Dataset (not streaming), "
            f"got {type(dataset).__name__}"
        )
    if len(dataset) == 0:
        raise ValueError(f"dataset {name!r} is empty")
    found = dataset.column_names
    for column in _IMAGE_COLUMNS:
        if column in found:
            raise ValueError(
                f"dataset {name!r} has a column {column!r}, but images are not supported yet; "
                "remove the column to train on the text alone"
            )
    if not paired and has_examples(found):
        return
    missing = [column for column in ("chosen", "rejected") if column not in found]
    if missing and not set(TOKEN_COLUMNS) <= set(found):
        hint = ""
        if not paired:
            hint = "; or 'prompt', 'completion' and 'label' for single responses"
        elif has_examples(found):
            hint = "; single responses are for the objective 'kto'"
        raise ValueError(
            f"dataset {name!r} has no column {' and no column '.join(map(repr, missing))}; found "
            f"{', '.join(found)}; expected 'chosen' and 'rejected', and 'prompt' unless both "
            f"begin with it{hint}"
        )
    if margins and not margin_columns(found):
        raise ValueError(
            f"dataset {name!r} has no margins, which this objective weighs pairs by: no column "
            "'reward_margin' or 'margin', nor 'score_chosen' and 'score_rejected'; found "
            f"{', '.join(found)}; `prefkern margins` writes one"
        )


def check_labels(dataset: datasets.Dataset, name: str) -> None:
    """Raise ValueError unless every `label` of single responses is true or false."""
    if not {"prompt", "completion", "label"} <= set(dataset.column_names):
        return
    for row, label in enumerate(plain(dataset)["label"][:]):
        if not (isinstance(label, bool) or label in (0, 1)):
            raise ValueError(
                f"dataset {name!r}, row {row}: 'label' must be true or false, got {label!r}"
            )


def plain(dataset: datasets.Dataset) -> datasets.Dataset:
    """The dataset with rows of plain Python types, not tables or tensors of some library.

    A transform that the user set stays, because it defines the rows.
    """
    return dataset if dataset.format["type"] == "custom" else dataset.with_format(None)


def without_unused(
    dataset: datasets.Dataset, *, references: bool, margins: bool
) -> datasets.Dataset:
    """The dataset without the number columns that nothing reads, so that a gap there is no error.

    Args:
        references: whether to keep the reference's sums.
        margins: whether to keep the columns that give a reward margin.
    """
    unused: list[str] = []
    if not references:
        unused += REFERENCE_COLUMNS
    if not margins:
        unused += [column for sources in MARGIN_SOURCES for column in sources]
    return dataset.remove_columns([c for c in unused if c in dataset.column_names])


def has_examples(columns: Sequence[str]) -> bool:
    """Whether rows are single responses, as text or tokens."""
    return {"prompt", "completion", "label"} <= set(columns) or set(EXAMPLE_COLUMNS) <= set(columns)


def margin_columns(columns: Sequence[str]) -> tuple[str, ...]:
    """The columns that give the margin: one, two to subtract, or none."""
    for sources in MARGIN_SOURCES:
        if set(sources) <= set(columns):
            return sources
    return ()


def reward_margin(example: dict[str, Any], sources: tuple[str, ...]) -> float:
    """A row's margin, from what `margin_columns` found."""
    chosen, *rejected = (float(example[column]) for column in sources)
    return chosen - sum(rejected)


def is_number(value: Any) -> bool:
    is_plain = isinstance(value, int | float) and not isinstance(value, bool)
    return is_plain and math.isfinite(value)
