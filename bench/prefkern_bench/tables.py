"""Prints rows as tables on a terminal: one table for each task at each shape.

`table_of` makes the table, `remarks` the lines below it: failures and notes. `rounded` and `error`
format the numbers. The legend explains the columns once, at the end of the run.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE
from rich.table import Table

from prefkern_bench.claims import Verdict
from prefkern_bench.report import Row

LEGEND = """\
NHV: counted operations of matrix products. MiB: peak memory beyond the inputs. ms: median, then
lowest and highest. CPU ms: median of the processor time, summed over threads. x: time (on a CPU
processor time) as a multiple of a plain product with as many operations. Errors against float64:
token, sum: the worst log-prob of a token and of a sequence, in nats; dH, dW: relative.
-: not measured; a note says why if it is not obvious."""
CPU_REMARK = "Times on a CPU say little about a GPU; operations and errors are the same there."


def table_of(rows: Sequence[Row], title: str) -> Table:
    is_step = rows[0].suite == "step"
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE, pad_edge=False)
    table.add_column("", no_wrap=True)
    columns = ["GFLOP" if is_step else "NHV", "MiB", "ms", "from-to", "CPU ms"]
    columns += ["sum"] if is_step else ["x", "token", "sum", "dH", "dW"]
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        # After a failure the row is empty; numbers measured before it are in the JSON only.
        table.add_row(row.provider, *([] if row.failure else _cells(row, is_step)))
    return table


def claims_table(judged: Sequence[Verdict]) -> Table:
    """A line for each claim: what was measured, and whether it holds."""
    table = Table(title="claims", title_justify="left", title_style="bold", box=SIMPLE)
    for column in ("", "measured", ""):
        table.add_column(column, overflow="fold")
    for each in judged:
        table.add_row(each.claim, each.measured, "holds" if each.holds else "MISS")
    return table


def remarks(rows: Sequence[Row]) -> list[str]:
    """Failures, and notes; a note that several rows share appears once."""
    failures = [f"{row.provider}: {row.failure}" for row in rows if row.failure]
    notes: dict[str, list[str]] = {}
    for row in rows:
        if row.note and not row.failure:
            notes.setdefault(row.note, []).append(row.provider)
    return failures + [f"{', '.join(names)}: {note}" for note, names in notes.items()]


def _cells(row: Row, is_step: bool) -> list[str]:
    if is_step:
        operations = None if row.operations is None else rounded(row.operations / 1e9)
    else:
        operations = None if row.operations_nhv is None else f"{row.operations_nhv:.2f}"
    spread = None
    if row.all_ms:
        spread = f"{rounded(min(row.all_ms))}-{rounded(max(row.all_ms))}"
    cells = [operations, rounded(row.peak_mib), rounded(row.median_ms), spread]
    cells.append(rounded(row.processor_ms))
    if is_step:
        cells.append(error(row.sum_logp_error))
    else:
        cells.append(None if row.product_ratio is None else f"{row.product_ratio:.2f}")
        cells += [
            error(value)
            for value in (
                row.token_logp_error,
                row.sum_logp_error,
                row.dhidden_error,
                row.dweight_error,
            )
        ]
    return ["-" if cell is None else cell for cell in cells]


def rounded(value: float | None) -> str | None:
    """Three digits, without an exponent."""
    if value is None:
        return None
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def error(value: float | None) -> str | None:
    return None if value is None else f"{value:.1e}"
