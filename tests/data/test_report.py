"""The report on a dataset: counts and lengths against a count row by row, and how it looks."""

from __future__ import annotations

import io
import statistics

import numpy
import pytest

from support import tiny

datasets = pytest.importorskip("datasets")

from rich.console import Console

from prefkern import data
from prefkern.data.report import Histogram, Lengths

TOKENIZER = tiny.tokenizer()


def _report(rows: list[dict], **options) -> data.DatasetReport:
    return data.tokenize_preferences(datasets.Dataset.from_list(rows), TOKENIZER, **options)[1]


def _words(text: str) -> int:
    return len(text.split())


def test_lengths_are_those_that_training_sees():
    rows = tiny.pairs(50)
    report = _report(rows)
    # A token a word, and one that ends a response.
    for part, extra in (("prompt", 0), ("chosen", 1), ("rejected", 1)):
        lengths = [_words(row[part]) + extra for row in rows]
        found = report.lengths[part]
        assert (found.min, found.max) == (min(lengths), max(lengths))
        assert found.median == statistics.median(lengths)
        assert found.mean == pytest.approx(statistics.mean(lengths))
        assert found.p95 == pytest.approx(numpy.quantile(lengths, 0.95))
    cut = _report(rows, max_length=6)
    assert cut.lengths["chosen"].max <= 5 and cut.lengths["prompt"].min == 1
    # The histogram is of what was found, and says what to make of max_length.
    assert cut.histogram.counts == report.histogram.counts
    totals = [
        _words(row["prompt"]) + max(_words(row["chosen"]), _words(row["rejected"])) + 1
        for row in rows
    ]
    assert report.histogram.width == 2 and report.histogram.longest == max(totals)
    for low in range(0, max(totals), 2):
        count = sum(low < total <= low + 2 for total in totals)
        assert cut.histogram.counts[low // 2] == count


def test_counts():
    pair = {"prompt": "the film is", "chosen": " very good", "rejected": " bad"}
    rows = [
        pair,
        {**pair, "rejected": pair["chosen"]},
        {**pair, "prompt": "the film was very very fine"},
        {**pair, "chosen": " very very very very very good"},
        {"prompt": "", "chosen": "", "rejected": "good"},
        {"prompt": "the fi", "chosen": "lm good", "rejected": "lm bad"},
    ]
    report = _report(rows, max_length=7, name="mine")
    assert report.summary == (
        "mine: 5 pairs (1 dropped for an empty response, 0 dropped as too long (keep_end), "
        "2 with a truncated prompt, 1 with a truncated response, 1 with identical responses, "
        "1 whose prompt does not end on a token boundary)"
    )
    dropping = _report(rows, max_length=7, truncation_mode="drop")
    assert (dropping.pairs, dropping.empty, dropping.too_long) == (3, 1, 2)
    assert "2 dropped as too long (drop)" in dropping.summary


def test_single_responses():
    rows = [{**row, "margin": 0.0} for row in tiny.pairs(20)]
    report = data.tokenize_examples(datasets.Dataset.from_list(rows), TOKENIZER)[1]
    assert (report.pairs, report.unit, [*report.lengths]) == (
        40,
        "responses",
        ["prompt", "response"],
    )
    lengths = [_words(row[side]) + 1 for row in rows for side in ("chosen", "rejected")]
    assert report.lengths["response"].mean == pytest.approx(statistics.mean(lengths))
    assert sum(report.histogram.counts) == 40
    assert "prompt and response, tokens before truncation" in str(report)


@pytest.mark.parametrize(
    ("lengths", "bound", "rows"),
    [
        ([3], None, [("3", 1, True)]),
        ([1, 2, 2, 4], 2, [("1", 1, True), ("2", 2, True), ("3", 0, False), ("4", 1, False)]),
        # Edges are multiples of powers of two, so that a bound of 64 is one.
        (
            [33] * 98 + [64, 65],
            64,
            [
                ("33-40", 98, True),
                ("41-48", 0, True),
                ("49-56", 0, True),
                ("57-64", 1, True),
                ("65-72", 1, False),
            ],
        ),
        # One that is far longer than all others gets no bins of its own.
        (
            [1] * 100 + [2] * 100 + [5000],
            100,
            [("1", 100, True), ("2", 100, True), ("3+", 1, True)],
        ),
    ],
)
def test_histogram(lengths, bound, rows):
    found = Histogram.of(numpy.array(lengths), bound).rows()
    assert sum(count for _, count, _ in found) == len(lengths)
    assert found == rows


def test_what_is_printed():
    rows = tiny.pairs(60)
    report = _report(rows, max_length=9)
    plain = io.StringIO()
    data.show([report], Console(file=plain))
    text = plain.getvalue()
    lines = text.splitlines()
    assert text.rstrip("\n") == str(report) and "\x1b" not in text
    assert lines[0] == report.summary
    assert "prompt and the longer response, tokens before truncation; max_length is 9" in text
    by_part = {line.split()[0]: line.split()[1:] for line in lines if line}
    assert by_part["tokens"] == ["min", "median", "mean", "p95", "max"]
    assert by_part["chosen"] == report.lengths["chosen"].cells()
    caption = next(i for i, line in enumerate(lines) if line.startswith("prompt and the longer"))
    bars = [line.split() for line in lines[caption + 1 :] if line]
    assert [int(bar[1]) for bar in bars] == [row[1] for row in report.histogram.rows()]
    tallest = max(report.histogram.counts)
    assert {bar[1] for bar in bars if bar[2:] == ["#" * 40]} == {str(tallest)}

    drawn = io.StringIO()
    data.show([report], Console(file=drawn, force_terminal=True, width=60, color_system="standard"))
    terminal = drawn.getvalue()
    assert "█" in terminal and "\x1b[33" in terminal
    assert f"{report.prompts_truncated} with a truncated prompt" in terminal
    # What did not happen is not mentioned there.
    assert report.empty == 0 and "empty response" not in terminal


def test_numbers_are_short():
    lengths = Lengths.of(numpy.array([1, 2, 1500, 12]))
    assert lengths.cells() == ["1", "7", "378.8", "1,276.8", "1,500"]


def test_many_rows_cost_little(monkeypatch):
    """The report reads no tokens, only a few numbers of each row."""
    from prefkern.data import marks as of_rows
    from prefkern.data import tokenisation, truncation, turns

    rows = datasets.Dataset.from_list(tiny.pairs(30))
    bounds = truncation.Bounds(None, None, "keep_end")
    marked = tokenisation._with_tokens(rows, TOKENIZER, bounds, None, "x", turns.Turns())
    read = []
    original = datasets.Dataset.select_columns
    monkeypatch.setattr(
        datasets.Dataset, "select_columns", lambda s, c: read.extend(c) or original(s, c)
    )
    marks = of_rows.marks_of(marked)
    assert set(read) == set(marks) and not any(name.endswith("_ids") for name in marks)
    assert sum(values.shape[-1] if values.ndim > 1 else 1 for values in marks.values()) < 23
