"""A report on a tokenised dataset: what was kept, cut and dropped. Read it before training.

    train: 60,917 pairs

    tokens    min  median   mean    p95    max
    prompt     17     109  170.2    512  1,024
    ...

The report counts the rows that were dropped, were cut or look wrong. It shows the lengths that
training will see, and a histogram of the lengths before truncation. It needs a few numbers for each
row and never reads the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy

from prefkern.data.columns import GOLD
from prefkern.data.shown import Said

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

# What the lengths of a response's scored tokens are called, after its name.
SCORED = ", scored"
_BARS = 12
_BAR_WIDTH = 40


@dataclass(frozen=True)
class Lengths:
    """Lengths in tokens."""

    min: int
    median: float
    mean: float
    p95: float
    max: int

    @classmethod
    def of(cls, lengths: numpy.ndarray) -> Lengths:
        median, p95 = numpy.quantile(lengths, [0.5, 0.95])
        return cls(
            int(lengths.min()), float(median), float(lengths.mean()), float(p95), int(lengths.max())
        )

    def cells(self) -> list[str]:
        values = (self.min, self.median, self.mean, self.p95, self.max)
        return [f"{value:,.1f}".removesuffix(".0") for value in values]


@dataclass(frozen=True)
class Histogram:
    """Counts in bins of equal width: bin i holds `i * width < length <= (i + 1) * width`.

    The width is a power of two, so that the usual bounds are edges. The last bin also counts all
    longer lengths.
    """

    width: int
    counts: tuple[int, ...]
    longest: int
    bound: int | None  # longer lengths do not fit

    @classmethod
    def of(cls, lengths: numpy.ndarray, bound: int | None) -> Histogram:
        # The longest 1% do not count: one of them could press all others into one bin.
        usual = max(float(numpy.quantile(lengths, 0.99)), 1)
        width = 2 ** math.ceil(math.log2(max(usual / _BARS, 1)))
        bins = (numpy.maximum(lengths, 1) - 1) // width
        counts = numpy.bincount(numpy.minimum(bins, math.ceil(usual / width)))
        return cls(width, tuple(int(count) for count in counts), int(lengths.max()), bound)

    def rows(self) -> list[tuple[str, int, bool]]:
        """Each bin's edges, its count, and whether it may fit, from the first count above 0 on."""
        first = next(at for at, count in enumerate(self.counts) if count)
        rows = []
        for at in range(first, len(self.counts)):
            low, high = at * self.width + 1, (at + 1) * self.width
            edges = f"{low:,}-{high:,}" if self.width > 1 else f"{low:,}"
            if at == len(self.counts) - 1 and self.longest > high:
                edges = f"{low:,}+"
            rows.append((edges, self.counts[at], self.bound is None or low <= self.bound))
        return rows


@dataclass(frozen=True)
class DatasetReport:
    """What tokenisation did to a dataset; print it to see everything.

    It counts pairs, or single responses where `unit` says so. `empty`, `masked` and `too_long` count
    dropped rows; all other counts are of kept rows. `lengths` has the lengths that training sees,
    with keys "prompt", "chosen" and "rejected" (or "response"), "reference" where gold responses are
    read, and "chosen, scored" and so on where turns are left out. `histogram` shows the length of
    the prompt plus the longest response, before truncation.
    """

    name: str
    pairs: int  # kept
    empty: int  # dropped: a response is empty
    too_long: int  # dropped: no token to score was left within the bounds
    prompts_truncated: int
    responses_truncated: int
    identical: int  # chosen equals rejected
    made_identical: int  # those of `identical` that differed before truncation
    merged: int  # prompts whose last token merged with the response
    max_length: int | None
    truncation_mode: str
    lengths: dict[str, Lengths]
    histogram: Histogram
    unit: str = "pairs"
    repeated: int = 0  # both responses begin with the whole prompt; that copy is scored
    begun: int = 0  # the text has a beginning-of-sequence token already; no second one was added
    unsaid: int = 0  # the chat template leaves out text or thoughts of an earlier answer
    turns: int = 0  # responses have turns of other roles, which are scored
    pictures: int = 0  # in the prompts of kept rows
    masked: int = 0  # dropped: no token of a response is in a turn that is scored
    scored: int = 0  # tokens of responses
    unscored: int = 0  # tokens of responses in other turns, or without anything before them
    unread: tuple[str, ...] = ()  # columns with text that nothing reads
    read_as: str = ""  # the format of others that all rows were converted from, and its columns
    converted: int = 0  # rows, before any was dropped
    samples: tuple[Said, ...] = ()  # the first of these rows, converted
    tied: int = 0  # of these, rankings without a best answer; no pair, and no row here
    drawn: int | None = None  # how many of them a mix by weights trains on

    @property
    def dropped(self) -> int:
        return self.empty + self.masked + self.too_long

    @property
    def summary(self) -> str:
        """All counts in one line."""
        counts = ", ".join(f"{count:,} {what}" for count, what in self._counts())
        unread = f"; {self._unread}" if self.unread else ""
        converted = f"; {self._from_others}" if self.read_as else ""
        drawn = "" if self.drawn is None else f"; {self.drawn:,} of them are in the mix"
        return f"{self.name}: {self.pairs:,} {self.unit} ({counts}){unread}{converted}{drawn}"

    @property
    def _from_others(self) -> str:
        rows = "row" if self.converted == 1 else "rows"
        return f"{self.converted:,} {rows} converted from {self.read_as}"

    def _sample_lines(self) -> list[str]:
        """The samples as plain text; a line break before each."""
        lines = []
        for row, sample in enumerate(self.samples):
            width = max(len(who) for who, _ in sample)
            lines += ["", f"row {row}", *(f"  {who:<{width}}  {text}" for who, text in sample)]
        return lines

    @property
    def _unread(self) -> str:
        return f"text columns not read: {', '.join(self.unread)}"

    @property
    def _leaves_out(self) -> bool:
        """Whether tokens of responses are in turns that are not scored, or might have been."""
        return any(part.endswith(SCORED) for part in self.lengths)

    def _counts(self) -> list[tuple[int, str]]:
        counts = [
            (self.empty, "dropped for an empty response"),
            (self.too_long, f"dropped as too long ({self.truncation_mode})"),
            (self.prompts_truncated, "with a truncated prompt"),
            (self.responses_truncated, "with a truncated response"),
            (self.merged, "whose prompt does not end on a token boundary"),
        ]
        if self.unit == "pairs":
            by_truncation = (
                f", {self.made_identical:,} by truncation" if self.made_identical else ""
            )
            counts.insert(4, (self.identical, f"with identical responses{by_truncation}"))
        if self._leaves_out:
            counts.insert(1, (self.masked, "dropped for a response without a scored turn"))
            tokens = f"tokens of responses not scored, {self.scored:,} scored"
            counts.append((self.unscored, tokens))
        # Text that looks wrong is rare: these counts are shown only if they are not 0.
        suspicious = [
            (self.tied, "rankings left out, whose answers have one score"),
            (self.repeated, "whose responses repeat the prompt"),
            (self.begun, "whose text has the tokenizer's first token already"),
            (self.unsaid, "whose chat template leaves out parts of earlier answers"),
            (self.turns, "whose responses have scored turns of other roles"),
        ]
        counts += [(count, what) for count, what in suspicious if count]
        if self.pictures:
            counts.append((self.pictures, "pictures, whose tokens are the prompts'"))
        return counts

    @property
    def _caption(self) -> str:
        longer = "the longer response" if self.unit == "pairs" else "response"
        if GOLD in self.lengths:
            longer = "the longest response"
        bound = "" if self.max_length is None else f"; max_length is {self.max_length:,}"
        return f"prompt and {longer}, tokens before truncation{bound}"

    def __str__(self) -> str:
        """The report as plain text, on several lines."""
        table = [["tokens", "min", "median", "mean", "p95", "max"]]
        table += [[part, *lengths.cells()] for part, lengths in self.lengths.items()]
        bins = self.histogram.rows()
        most = max(count for _, count, _ in bins)
        bars = [
            [edges, f"{count:,}", "#" * math.ceil(_BAR_WIDTH * count / most)]
            for edges, count, _ in bins
        ]
        lines = [self.summary, *self._sample_lines(), "", *_aligned(table), "", self._caption]
        return "\n".join([*lines, *(line.rstrip() for line in _aligned(bars, last_left=True))])

    def __rich__(self) -> RenderableType:
        """The report for a terminal, with bars and colours."""
        from rich.bar import Bar
        from rich.box import SIMPLE_HEAD
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("tokens")
        for column in ("min", "median", "mean", "p95", "max"):
            table.add_column(column, justify="right")
        for part, lengths in self.lengths.items():
            table.add_row(part, *lengths.cells())
        counts = [
            Text(f"  {count:,} {what}", style="yellow") for count, what in self._counts() if count
        ]
        if self.unread:
            counts.append(Text(f"  {self._unread}", style="yellow"))
        if self.read_as:
            counts.append(Text(f"  {self._from_others}", style="cyan"))
            counts += map(Text, self._sample_lines())
        bins = self.histogram.rows()
        most = max(count for _, count, _ in bins)
        bars = Table.grid(padding=(0, 1))
        bars.add_column(justify="right")
        bars.add_column(justify="right")
        bars.add_column()
        for edges, count, fits in bins:
            bar = Bar(most, 0, count, width=_BAR_WIDTH, color="cyan" if fits else "yellow")
            bars.add_row(edges, f"{count:,}", bar)
        title = Text(f"{self.name}: {self.pairs:,} {self.unit}", style="bold")
        return Group(title, *counts, table, Text(self._caption, style="dim"), bars)


def show(reports: Iterable[DatasetReport], console: Console | None = None) -> None:
    """Print reports: with bars and colours on a terminal, as plain text elsewhere."""
    from rich.console import Console

    console = console or Console(highlight=False)
    for report in reports:
        if console.is_terminal:
            console.print(report)
        else:
            console.file.write(f"{report}\n")
        console.file.write("\n")


def _aligned(rows: list[list[str]], last_left: bool = False) -> list[str]:
    """Rows of cells in columns: the first column is flush left, the others are flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width)
            if at == 0 or (last_left and at == len(row) - 1)
            else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells))
    return lines
