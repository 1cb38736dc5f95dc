"""Columns of marks: what happened to each row, and the report that sums them up.

Marks are a few numbers a row and no tokens, so that a report on many rows is cheap.
"""

from __future__ import annotations

import logging

import datasets
import numpy

from prefkern.data.columns import GOLD, before_prompts, listed
from prefkern.data.foreign import Format
from prefkern.data.report import SCORED, DatasetReport, Histogram, Lengths
from prefkern.data.shown import Said
from prefkern.data.truncation import Bounds, NothingToScore

logger = logging.getLogger(__name__)

# What happened to a row: a few numbers and no tokens, so that a report on many rows is cheap.
MARKS = (
    "_empty",
    "_masked",
    "_too_long",
    "_prompt_truncated",
    "_truncated",
    "_identical",
    "_was_identical",
    "_merged",
    "_repeated",
    "_begun",
    "_unasked",
    "_unsaid",
    "_turns",
    "_found_lengths",
    "_lengths",
    "_scored",
)
# The number of pictures: only rows of a dataset with pictures have it.
PICTURES = "_pictures"
Marks = dict[str, numpy.ndarray]


def marks_of(marked: datasets.Dataset) -> Marks:
    return marked.select_columns(mark_columns(marked)).with_format("numpy")[:]


def mark_columns(marked: datasets.Dataset) -> list[str]:
    return [column for column in (*MARKS, PICTURES) if column in marked.column_names]


def is_kept(marks: Marks) -> numpy.ndarray:
    return ~(marks["_empty"] | marks["_masked"] | marks["_too_long"])


def without_dropped(
    marked: datasets.Dataset, marks: Marks, name: str, what: str
) -> datasets.Dataset:
    kept = numpy.flatnonzero(is_kept(marks))
    if len(kept) == 0:
        bound = " within max_length and max_prompt_length" if marks["_too_long"].any() else ""
        raise NothingToScore(f"dataset {name!r} has no {what} that can be scored{bound}")
    return marked if len(kept) == len(marked) else marked.select(kept)


def of_responses(marks: Marks, sides: int) -> Marks:
    """The marks of pairs as marks of single responses: all of one side, then all of the other."""
    responses = {name: numpy.concatenate([values] * sides) for name, values in marks.items()}
    columns = [marks["_truncated"][:, side] for side in range(sides)]
    responses["_truncated"] = numpy.concatenate(columns)[:, None]
    responses["_scored"] = numpy.concatenate([marks["_scored"][:, [s]] for s in range(sides)])
    for name in ("_found_lengths", "_lengths"):
        of_side = [marks[name][:, [0, 1 + side]] for side in range(sides)]
        responses[name] = numpy.concatenate(of_side)
    # "Identical" compares the two responses of a pair, so it says nothing of single ones.
    responses["_identical"] = numpy.zeros_like(responses["_identical"])
    return responses


def report_of(
    name: str,
    unit: str,
    marks: Marks,
    bounds: Bounds,
    unread: tuple[str, ...],
    form: Format | None,
    samples: tuple[Said, ...],
    rows: int,
    has_masks: bool,
) -> DatasetReport:
    before = before_prompts(unread)
    if before:
        logger.warning("dataset %r: nothing reads the %s", name, listed(before))
    is_in = is_kept(marks)
    kept = {mark: values[is_in] for mark, values in marks.items()}
    found = marks["_found_lengths"]
    sides = ("chosen", "rejected", GOLD)[: found.shape[1] - 1] if unit == "pairs" else ("response",)
    lengths = {
        part: Lengths.of(kept["_lengths"][:, at]) for at, part in enumerate(("prompt", *sides))
    }
    if has_masks:
        lengths |= {
            f"{side}{SCORED}": Lengths.of(kept["_scored"][:, at]) for at, side in enumerate(sides)
        }
    return DatasetReport(
        name=name,
        unit=unit,
        pairs=int(is_in.sum()),
        empty=int(marks["_empty"].sum()),
        masked=int(marks["_masked"].sum()),
        too_long=int(marks["_too_long"].sum()),
        prompts_truncated=int(kept["_prompt_truncated"].sum()),
        responses_truncated=int(kept["_truncated"].any(1).sum()),
        identical=int(kept["_identical"].sum()),
        made_identical=int((kept["_identical"] & ~kept["_was_identical"]).sum()),
        merged=int(kept["_merged"].sum()),
        repeated=int(kept["_repeated"].sum()),
        begun=int(kept["_begun"].sum()),
        unsaid=int(kept["_unsaid"].sum()),
        turns=int(kept["_turns"].sum()),
        pictures=int(kept[PICTURES].sum()) if PICTURES in kept else 0,
        unread=unread,
        read_as="" if form is None else f"{form.name} ({', '.join(form.read)})",
        converted=0 if form is None else rows,
        samples=samples,
        max_length=bounds.max_length,
        truncation_mode=bounds.truncation_mode,
        lengths=lengths,
        scored=int(kept["_scored"].sum()),
        unscored=int(kept["_lengths"][:, 1:].sum() - kept["_scored"].sum()),
        histogram=Histogram.of(found[:, 0] + found[:, 1:].max(1), bounds.max_length),
    )
