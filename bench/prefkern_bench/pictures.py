"""Draws pictures of a report: time and memory against tokens, and errors by provider.

They are drawn from the JSON of a run, so that a saved result can be drawn again. matplotlib is
imported only here, and only when a picture is requested.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from prefkern.training.files import replacing

Rows = list[dict[str, Any]]


class Style(NamedTuple):
    color: str
    marker: str


# Okabe and Ito's palette for colour-blind readers; the markers also work without colour.
STYLES = {
    "prefkern": Style("#0072B2", "o"),
    "prefkern-roomy": Style("#56B4E9", "p"),
    "prefkern-fold": Style("#56B4E9", "*"),
    "eager": Style("#000000", "s"),
    "compile": Style("#999999", "D"),
    "torch-lce": Style("#E69F00", "^"),
    "liger": Style("#009E73", "v"),
    "trl": Style("#D55E00", "P"),
    "cce": Style("#CC79A7", "X"),
}
TASKS = {
    "forward": "forward",
    "frozen": "forward and backward, frozen head",
    "trainable": "forward and backward, trainable head",
}
ERRORS = {
    "token_logp_error": ("log-prob of a token", "worst error, nats"),
    "sum_logp_error": ("log-prob of a sequence", "worst error, nats"),
    "dhidden_error": ("gradient of hidden states", "relative error"),
    "dweight_error": ("gradient of the head", "relative error"),
}
SUITE_MARKERS = {"operator": "o", "loss": "D"}


def draw(report: dict[str, Any], folder: Path, prefix: str = "bench") -> list[Path]:
    """Draw every picture that the report has numbers for; raises ImportError without matplotlib."""
    drawn = []
    head = _longest_sweep(report["rows"])
    if head is not None:
        drawn.append(folder / f"{prefix}-tokens.png")
        draw_tokens(report, head, drawn[-1])
    if any(row["token_logp_error"] is not None for row in report["rows"]):
        drawn.append(folder / f"{prefix}-errors.png")
        draw_errors(report, drawn[-1])
    return drawn


def pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw_tokens(report: dict[str, Any], head: str, path: Path) -> None:
    """Median time and peak memory of suite "operator" against scored tokens, by provider."""
    plots = pyplot()
    rows = [row for row in _measured(report["rows"], "operator") if _head(row) == head]
    tasks = {task: title for task, title in TASKS.items() if any(r["task"] == task for r in rows)}
    is_gpu = report.get("device_type") == "cuda"
    times = {"median_ms": "time, ms"} if is_gpu else {"processor_ms": "processor time, ms"}
    quantities = {**times, "peak_mib": "peak memory beyond the inputs, MiB"}
    with plots.rc_context(_RC):
        figure, axes = plots.subplots(
            2,
            len(tasks),
            squeeze=False,
            figsize=(12, 7.2),
            sharex=True,
            sharey="row",
            layout="constrained",
        )
        for line, (quantity, label) in zip(axes, quantities.items(), strict=True):
            line[0].set_ylabel(label)
            for panel, task in zip(line, tasks, strict=True):
                for provider, style in STYLES.items():
                    points = _points(rows, task, provider, quantity)
                    if points:
                        panel.plot(
                            *zip(*points, strict=True),
                            color=style.color,
                            marker=style.marker,
                            markersize=6,
                            linewidth=2.4 if provider.startswith("prefkern") else 1.5,
                            zorder=3 if provider.startswith("prefkern") else 2,
                            label=provider,
                        )
                panel.set_xscale("log", base=2)
                panel.set_yscale("log")
                panel.grid(color="0.9", linewidth=0.6)
        tokens = sorted({row["tokens"] for row in rows})
        for panel, title in zip(axes[0], tasks.values(), strict=True):
            panel.set_title(title, loc="left", fontsize=11)
        for panel in axes[-1]:
            panel.set_xticks(tokens, [f"{n:,}" for n in tokens])
            panel.minorticks_off()
            panel.set_xlabel("scored tokens")
        for panel in (axes[0, 0], axes[1, 0]):
            _plain_ticks(panel)
        handles = {
            label: handle
            for panel in axes.flat
            for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
        }
        figure.legend(
            handles.values(), handles.keys(), loc="outside right center", frameon=False, fontsize=11
        )
        sizes = next(shape for shape in report["shapes"] if shape["name"] == head)
        figure.suptitle(
            f"{head}: H = {sizes['hidden_size']:,}, V = {sizes['vocab_size']:,}, "
            f"{report['dtype']}, {report['device']}",
            x=0.01,
            ha="left",
            fontsize=12,
            fontweight="bold",
        )
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=110, metadata={"Software": None})
        plots.close(figure)


def draw_errors(report: dict[str, Any], path: Path) -> None:
    """Errors of suites "operator" and "loss" against float64, one mark for each shape and task."""
    plots = pyplot()
    rows = _measured(report["rows"], *SUITE_MARKERS)
    shown = [name for name in STYLES if any(row["provider"] == name for row in rows)]
    # A logarithmic axis needs a number above 0.
    errors = {key: text for key, text in ERRORS.items() if any(row[key] for row in rows)}
    with plots.rc_context(_RC):
        figure, axes = plots.subplots(
            1,
            len(errors),
            squeeze=False,
            figsize=(13, 1.6 + 0.42 * len(shown)),
            sharey=True,
            layout="constrained",
        )
        for panel, (error, (title, unit)) in zip(axes[0], errors.items(), strict=True):
            for height, provider in enumerate(shown):
                for suite, marker in SUITE_MARKERS.items():
                    values = [
                        row[error]
                        for row in rows
                        if row["provider"] == provider and row["suite"] == suite and row[error]
                    ]
                    is_operator = suite == "operator"
                    panel.scatter(
                        values,
                        [height + (-0.14 if is_operator else 0.14)] * len(values),
                        s=44,
                        marker=marker,
                        facecolors=STYLES[provider].color if is_operator else "none",
                        edgecolors=STYLES[provider].color,
                        linewidths=1.4,
                        alpha=0.85,
                        zorder=3,
                    )
            panel.set_xscale("log")
            panel.set_title(title, loc="left", fontsize=11)
            panel.set_xlabel(unit)
            panel.grid(axis="x", color="0.9", linewidth=0.6)
            for height in range(len(shown)):
                panel.axhline(height, color="0.93", linewidth=0.8, zorder=1)
            _widen(panel)
        axes[0, 0].set_yticks(range(len(shown)), shown)
        axes[0, 0].set_ylim(len(shown) - 0.5, -0.5)
        handles = [
            plots.Line2D(
                [], [], linestyle="", marker=marker, markersize=7, color="0.3",
                markerfacecolor="0.3" if suite == "operator" else "none", label=f"suite {suite}",
            )
            for suite, marker in SUITE_MARKERS.items()
        ]  # fmt: skip
        figure.legend(
            handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=10
        )
        figure.suptitle(
            f"Error against float64, {report['dtype']} inputs, {report['device']}: "
            "one mark for each shape and task",
            x=0.01,
            ha="left",
            fontsize=12,
            fontweight="bold",
        )
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=110, metadata={"Software": None})
        plots.close(figure)


_RC = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 10}


def _measured(rows: Rows, *suites: str) -> Rows:
    return [row for row in rows if row["suite"] in suites and not row["failure"]]


def _head(row: dict[str, Any]) -> str:
    """The name of the shape whose head this row has: the name without " N=..."."""
    return row["shape"].partition(" N=")[0]


def _longest_sweep(rows: Rows) -> str | None:
    """The head with the most token counts in suite "operator"; None if every head has only one."""
    tokens: dict[str, set[int]] = {}
    for row in _measured(rows, "operator"):
        tokens.setdefault(_head(row), set()).add(row["tokens"])
    best = max(tokens, key=lambda head: len(tokens[head]), default=None)
    return best if best is not None and len(tokens[best]) > 1 else None


def _points(rows: Rows, task: str, provider: str, quantity: str) -> list[tuple[int, float]]:
    return sorted(
        (row["tokens"], row[quantity])
        for row in rows
        if row["task"] == task and row["provider"] == provider and row[quantity] is not None
    )


def _plain_ticks(panel: Any) -> None:
    """Ticks at 1, 2 and 5, without exponents."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    panel.yaxis.set_minor_locator(NullLocator())


def _widen(panel: Any) -> None:
    """Widen the axis to whole decades, so that it has at least two ticks."""
    import math

    values: Iterable[float] = [x for c in panel.collections for x, _ in c.get_offsets()]
    powers = [math.log10(x) for x in values if x > 0]
    if powers:
        panel.set_xlim(10 ** (math.floor(min(powers)) - 0.1), 10 ** (math.ceil(max(powers)) + 0.1))
