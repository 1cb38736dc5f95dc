"""The study's pictures: AdaDPO's Figures 1 and 3, its Table 2 and A.5, and MADPO's Figures 1 and 3.

Lines and bars are means over seeds, bands and dots show each seed.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from studies.parts import (
    BETAS,
    CELLS,
    CLIP_BETA,
    CLIPS,
    LEARNING_RATES,
    METHODS,
    adadpo,
    dpo,
    method,
)
from studies.readings import (
    CLIP,
    QUALITY,
    SPACE,
    Runs,
    Take,
    best_of_rates,
    last,
    over_seeds,
    sampled_reward,
    seeds_of,
    shorter_accuracy,
)
from studies.tasks import QUALITIES

# Okabe and Ito's colours, which differ under the common kinds of colour blindness.
BLACK, ORANGE, BLUE, GREEN, PINK, YELLOW = (
    "#000000",
    "#D55E00",
    "#0072B2",
    "#009E73",
    "#CC79A7",
    "#E69F00",
)
OBJECTIVES = (("DPO", dpo, BLACK, "--", "o"), ("AdaDPO", adadpo, ORANGE, "-", "s"))
# The betas of AdaDPO's Figure 3.
FIGURE_3 = (0.05, 0.01)


def draw(report: dict[str, Any], path: Path) -> dict[str, Path]:
    """Draw the pictures of every part in a report, next to its JSON; returns them by name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = {}
    wanted = {
        "grid": ("grid", _grid),
        "curves": ("grid", _curves),
        "clip": ("clip", _clip),
        "space": ("space", _space),
        "quality": ("quality", _quality),
    }
    style = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 10}
    with pyplot.rc_context(style):
        for name, (part, make) in wanted.items():
            if part in report["parts"]:
                drawn[name] = path.with_name(f"{path.stem}-{name}.png")
                figure = make(report["parts"][part])
                figure.savefig(drawn[name], dpi=110, metadata={"Software": None})
                pyplot.close(figure)
    return drawn


def _panels(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for panel in axes.flat:
        panel.grid(axis="y", color="0.9", linewidth=0.6)
        panel.set_axisbelow(True)
    return figure, axes


def _line(
    panel: Any,
    xs: list[float],
    values: list[list[float]],
    color: str,
    line: str,
    marker: str,
    label: str | None,
) -> None:
    """A line through the means, and a band from the lowest to the highest seed."""
    panel.fill_between(xs, [*map(min, values)], [*map(max, values)], color=color, alpha=0.13, lw=0)
    panel.plot(
        xs,
        [*map(statistics.fmean, values)],
        color=color,
        linestyle=line,
        marker=marker,
        markersize=4,
        linewidth=1.6,
        label=label,
    )


def _note(figure: Any, runs: Runs, more: str = "", spread: str = "band: lowest to highest") -> None:
    count = len(seeds_of(runs))
    figure.supxlabel(
        f"Mean of {count} seed{'s' if count > 1 else ''}; {spread}. {more}",
        fontsize=9,
        color="0.35",
    )


# AdaDPO's Figure 1: win rates are judged by the true reward here.
FIGURE_1: list[tuple[str, Take]] = [
    ("training: chosen log-prob, change", last("chosen_change", "train")),
    ("held-out reward accuracy", last("reward_accuracy")),
    ("... where chosen is shorter", shorter_accuracy),
    ("true reward, sampled", sampled_reward),
]


def _grid(runs: Runs) -> Any:
    """AdaDPO's Figure 1: results over beta, a row for each learning rate."""
    figure, axes = _panels(len(LEARNING_RATES), len(FIGURE_1), (12.5, 5.6))
    for row, rate in zip(axes, LEARNING_RATES, strict=True):
        for panel, (title, take) in zip(row, FIGURE_1, strict=True):
            for label, make, color, line, marker in OBJECTIVES:
                values = [over_seeds(runs, take, make(beta, rate)) for beta in BETAS]
                _line(panel, [*BETAS], values, color, line, marker, label)
            panel.set_xscale("log")
            panel.set_xticks(BETAS, [f"{beta:g}" for beta in BETAS])
            panel.minorticks_off()
            panel.set_title(title, fontsize=10, loc="left", fontweight="bold")
        row[0].set_ylabel(f"learning rate {rate:g}")
    for panel in axes[-1]:
        panel.set_xlabel("beta")
    axes[0][0].legend(frameon=False)
    _note(figure, runs)
    return figure


CURVES = [
    ("loss", "(a) held-out loss", "held_out"),
    ("reward_accuracy", "(b) held-out reward accuracy", "held_out"),
    ("kl_margin", "(c) held-out beta x KL margin", "held_out"),
    ("reward_margin", "(d) held-out reward margin", "held_out"),
    ("loss", "(e) training loss", "train"),
    ("chosen_change", "(f) training: chosen log-prob, change", "train"),
    ("rejected_change", "(g) training: rejected log-prob, change", "train"),
    ("chosen_share", "(h) training: chosen share of the push", "train"),
    ("length_correlation", "(i) held-out: length correlation", "held_out"),
    ("chosen_change", "(j) held-out: chosen log-prob, change", "held_out"),
    ("rejected_change", "(k) held-out: rejected log-prob, change", "held_out"),
    ("log_balance", "(l) training: log balance, median", "train"),
]


def _curves(runs: Runs) -> Any:
    """AdaDPO's Figure 3, and more, at the higher learning rate."""
    rate = LEARNING_RATES[-1]
    figure, axes = _panels(3, 4, (14, 9))
    for panel, (curve, title, pairs) in zip(axes.flat, CURVES, strict=True):
        for beta, color in zip(FIGURE_3, (ORANGE, BLUE), strict=True):
            for label, make, _, line, marker in OBJECTIVES:
                found = [*runs[make(beta, rate).key].values()]
                steps = found[0]["steps"]
                # Before the first step every pair ties, and accuracy means nothing.
                start = 1 if curve in ("reward_accuracy", "length_correlation") else 0
                values = [
                    [run["curves"][pairs][curve][point] for run in found]
                    for point in range(start, len(steps))
                ]
                name = f"{label}, beta = {beta:g}"
                _line(panel, steps[start:], values, color, line, marker, name)
        panel.set_title(title, fontsize=10, loc="left", fontweight="bold")
        panel.set_xlabel("step")
    axes[0][0].legend(frameon=False, fontsize=8)
    _note(figure, runs, f"Learning rate {rate:g}. Log-probs are in nats, sums over a response.")
    return figure


def _clip(runs: Runs) -> Any:
    """AdaDPO's Table 2: the better of the two learning rates at each clip."""
    figure, axes = _panels(1, len(CLIP), (12, 3.6))
    for panel, (title, take) in zip(axes.flat, CLIP, strict=True):
        values = [over_seeds(runs, best_of_rates(take), clip) for clip in CLIPS]
        _line(panel, [*CLIPS], values, ORANGE, "-", "s", None)
        panel.set_xscale("log")
        panel.set_xticks(CLIPS, [f"{clip:g}" for clip in CLIPS])
        panel.minorticks_off()
        panel.set_title(title, fontsize=10, loc="left", fontweight="bold")
        panel.set_xlabel("clip C")
    _note(figure, runs, f"beta = {CLIP_BETA:g}, the better of the two learning rates.")
    return figure


def _space(runs: Runs) -> Any:
    """AdaDPO's A.5: each cell of the grid in both spaces."""
    figure, axes = _panels(1, len(SPACE), (12, 3.9))
    names = [f"{beta:g}\n{rate:g}" for rate, beta in CELLS]
    for panel, (title, take) in zip(axes.flat, SPACE, strict=True):
        for space, color, line, marker in (
            ("ratio", ORANGE, "-", "s"),
            ("policy", GREEN, "-.", "D"),
        ):
            for number, rate in enumerate(LEARNING_RATES):
                runs_of = [adadpo(beta, rate, space=space) for beta in BETAS]
                values = [over_seeds(runs, take, run) for run in runs_of]
                places = [number * len(BETAS) + place for place in range(len(BETAS))]
                label = None if number else f"{space} space"
                _line(panel, places, values, color, line, marker, label)
        panel.set_xticks(range(len(CELLS)), names, fontsize=8)
        panel.set_title(title, fontsize=10, loc="left", fontweight="bold")
        panel.set_xlabel("beta, and learning rate below")
    axes[0][0].legend(frameon=False)
    _note(figure, runs)
    return figure


def _quality(runs: Runs) -> Any:
    """MADPO's Figures 1 and 3: the true reward of each method on each quality of data."""
    figure, axes = _panels(1, 2, (12, 4.4))
    colors = (BLACK, BLUE, YELLOW, ORANGE, PINK, GREEN)
    for panel, (how, take) in zip(axes.flat, QUALITY, strict=True):
        for place, (name, color) in enumerate(zip(METHODS, colors, strict=True)):
            for number, quality in enumerate(QUALITIES):
                values = over_seeds(runs, take, method(quality, name))
                x = number + (place - 2.5) * 0.14
                label = name if number == 0 else None
                panel.bar(x, statistics.fmean(values), 0.13, color=color, alpha=0.45, label=label)
                panel.scatter([x] * len(values), values, s=12, color=color, zorder=3)
        panel.axhline(0, color="0.4", linewidth=0.8)
        panel.set_xticks(range(len(QUALITIES)), [f"{quality} quality" for quality in QUALITIES])
        panel.set_title(
            f"true reward of {how} continuations", fontsize=10, loc="left", fontweight="bold"
        )
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", frameon=False, ncols=len(METHODS))
    _note(figure, runs, spread="dots: each seed")
    return figure
