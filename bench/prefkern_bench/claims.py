"""What prefkern claims of its operator, judged by the rows of suite "operator".

| | claim |
|---|---|
| forward, H >= 2048 | at least 85% of the rate of a plain product in the inputs' dtype |
| frozen head | at most 1.15 times the fewest products, 4NHV (1.5 times below H = 2048) |
| trained head, in one pass | the same of 6NHV |
| H >= 2048 | at most 0.75 of TRL's time with a frozen head, 0.85 with a trained one |
| memory | at most the workspace, beyond inputs, results and what autograd must keep |
| log-prob of a token | at most 1e-3 nats from float64 |
| dH, dW | no further from float64 than those of logits in memory |

Claims of time are of GPUs. `verdicts` judges what a report has rows for, and `line` says it in one
line, to paste into a report. Neither needs torch, so a page can be written anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

WIDE = 2048  # below this H the fold of the logits weighs more
RATE = 0.85
TIMES = {True: 1.15, False: 1.5}  # by whether H is wide
OF_TRL = {"frozen": 0.75, "trainable": 0.85}
NATS = 1e-3
FEWEST = {"frozen": 4, "trainable": 6}
HALF = ("bfloat16", "float16")
MIB = 2**20
MISSES = 3  # that a line names
# Beyond the plan: what the allocator rounds up, and vectors with a number for each token or entry.
SLACK, VECTORS, LEAST_MIB = 1.05, 64, 2.0

Rows = Mapping[tuple[str, str, str], Mapping[str, Any]]  # by shape, task and provider


@dataclass(frozen=True)
class Verdict:
    """A claim with its measurement; `holds` is None if it was not measured."""

    claim: str
    measured: str
    holds: bool | None


def verdicts(report: Mapping[str, Any]) -> list[Verdict]:
    """The claims that a report of `prefkern bench` has rows for, shape by shape."""
    if report["dtype"] not in HALF:
        return []
    rows = rows_of(report)
    is_gpu = report["device_type"] == "cuda"
    found: list[Verdict] = []
    for shape in report["shapes"]:
        found += _failures(shape, report)
        if is_gpu:
            found += _times(shape, rows)
        found += _memory(shape, rows)
        found += _errors(shape, rows)
    return found


def rows_of(report: Mapping[str, Any]) -> Rows:
    """The rows of suite "operator" that ran, by shape, task and provider."""
    return {
        (row["shape"], row["task"], row["provider"]): row
        for row in report["rows"]
        if row["suite"] == "operator" and not row["failure"]
    }


def _failures(shape: Mapping[str, Any], report: Mapping[str, Any]) -> Iterator[Verdict]:
    ours = ("operator", shape["name"], "prefkern")
    for row in report["rows"]:
        if (row["suite"], row["shape"], row["provider"]) == ours and row["failure"]:
            yield Verdict(f"{shape['name']}, {row['task']}: runs", row["failure"], False)


def _times(shape: Mapping[str, Any], rows: Rows) -> Iterator[Verdict]:
    name, is_wide = shape["name"], shape["hidden_size"] >= WIDE
    forward = rows.get((name, "forward", "prefkern"), {}).get("floor_ratio")
    if forward is not None and is_wide:
        yield Verdict(
            f"{name}, forward: at least {RATE:.0%} of a plain product's rate",
            f"{1 / forward:.0%}",
            1 / forward >= RATE,
        )
    for task, provider in (("frozen", "prefkern"), ("trainable", "prefkern-roomy")):
        row = rows.get((name, task, provider))
        if row is None:
            continue
        if row["floor_ratio"] is not None:
            most = TIMES[is_wide]
            yield Verdict(
                f"{name}, {task}: at most {most:g} x {FEWEST[task]}NHV of plain products",
                f"{row['floor_ratio']:.2f} x",
                row["floor_ratio"] <= most,
            )
        trl = rows.get((name, task, "trl"), {}).get("median_ms")
        if trl and row["median_ms"] and is_wide:
            ratio = row["median_ms"] / trl
            yield Verdict(
                f"{name}, {task}: at most {OF_TRL[task]:g} x TRL's time",
                f"{ratio:.2f} x",
                ratio <= OF_TRL[task],
            )


def _memory(shape: Mapping[str, Any], rows: Rows) -> Iterator[Verdict]:
    """The row that takes the largest part of what it may, of each task and provider."""
    parts = []
    for task in ("forward", *FEWEST):
        for provider in ("prefkern", "prefkern-roomy"):
            row = rows.get((shape["name"], task, provider))
            if row is not None and row["peak_mib"] is not None and row["plan"] is not None:
                most = allowed_mib(shape, row)
                parts.append((row["peak_mib"] / most, row["peak_mib"], most, task))
    if parts:
        part, peak, most, task = max(parts)
        yield Verdict(
            f"{shape['name']}: no more memory than workspace, results and [N, H] of gradient",
            f"{task}: {peak:,.0f} of {most:,.0f} MiB",
            part <= 1,
        )


def allowed_mib(shape: Mapping[str, Any], row: Mapping[str, Any]) -> float:
    """The most that a row of prefkern's may hold beyond its inputs, by its own plan."""
    N, H, V = shape["tokens"], shape["hidden_size"], shape["vocab_size"]
    plan = row["plan"]
    results = 0
    if row["task"] != "forward":
        # dH in the inputs' dtype, and its sum over tiles in float32.
        results += (2 + 4) * N * H
    if row["task"] == "trainable":
        results += 2 * V * H
    allowed = SLACK * plan["workspace_bytes"] + plan["saved_bytes"] + results + VECTORS * (N + V)
    return allowed / MIB + LEAST_MIB


def _errors(shape: Mapping[str, Any], rows: Rows) -> Iterator[Verdict]:
    name = shape["name"]
    mine = [row for (of, _, by), row in rows.items() if of == name and by.startswith("prefkern")]
    errors = [row["token_logp_error"] for row in mine if row["token_logp_error"] is not None]
    if errors:
        worst = _worst(errors)
        yield Verdict(
            f"{name}: a token's log-prob within {NATS:.0e} nats of float64",
            f"{worst:.1e}",
            worst <= NATS,
        )
    for key, label in (("dhidden_error", "dH"), ("dweight_error", "dW")):
        pairs = [
            (row[key], rows[name, row["task"], "eager"][key])
            for row in mine
            if row[key] is not None and (name, row["task"], "eager") in rows
        ]
        if pairs:
            error, eager = max(pairs, key=lambda pair: _part(*pair))
            yield Verdict(
                f"{name}: {label} no further from float64 than with logits in memory",
                f"{error:.1e}, theirs {eager:.1e}",
                error <= eager,
            )


def _worst(errors: Iterable[float]) -> float:
    """The largest; a NaN is larger than any number."""
    return max(errors, key=lambda error: math.inf if math.isnan(error) else error)


def _part(error: float, bound: float) -> float:
    return math.inf if math.isnan(error) or not bound else error / bound


def line(report: Mapping[str, Any]) -> str:
    """One line for a report: how many claims hold, where, the first shape's ratios and peak."""
    judged = verdicts(report)
    misses = [each for each in judged if not each.holds]
    versions = report["versions"]
    parts = [f"{len(judged) - len(misses)} of {len(judged)} claims hold"]
    named = (f"{name} {versions[name]}" for name in ("torch", "triton", "python") if versions[name])
    parts.append(", ".join([report["device"], *named]))
    rows = rows_of(report)
    for shape in report["shapes"][:1]:
        row = rows.get((shape["name"], "frozen", "prefkern"))
        if row is not None:
            parts.append(f"{shape['name']} {report['dtype']}, frozen: {_figures(shape, row, rows)}")
    if misses:
        some = [f"{miss.claim}: {miss.measured}" for miss in misses[:MISSES]]
        some += [f"and {len(misses) - MISSES} more"] * (len(misses) > MISSES)
        parts.append("misses: " + "; ".join(some))
    return f"prefkern bench {versions['prefkern']}: " + " | ".join(parts)


def _figures(shape: Mapping[str, Any], row: Mapping[str, Any], rows: Rows) -> str:
    figures = []
    if row["floor_ratio"] is not None:
        figures.append(f"{row['floor_ratio']:.2f} x plain products")
    trl = rows.get((shape["name"], "frozen", "trl"), {}).get("median_ms")
    if trl and row["median_ms"]:
        figures.append(f"{row['median_ms'] / trl:.2f} x TRL")
    if row["peak_mib"] is not None:
        figures.append(f"peak {row['peak_mib']:,.0f} MiB")
    return ", ".join(figures)
