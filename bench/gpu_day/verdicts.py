"""The page of verdicts: each claim, what was measured, whether it holds; from the stages' results.

`judged` makes the verdicts, `text` the page for a terminal, `page` the one in Markdown. What was not
measured says why. The claims of log-probs and their gradients are those of `prefkern_bench.claims`,
the others are here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

from gpu_day import model
from prefkern_bench import claims
from prefkern_bench.claims import Verdict

Records = Mapping[str, dict[str, Any]]  # by stage
LN2 = 0.6931471805599453
LN2_SLACK = 1e-6
NORM_SLACK = 0.05  # of bfloat16's attention in another order
# Of a kernel's time, what the model of time may be off by.
MODEL_SLACK = 1.5
# Parts of stage "operator" that only compare.
COMPARED = ("tiles", "Liger and CCE", "loss", "compile")
# Kernels that the page lists of each call.
LISTED = 8
DRY = "A dry run: the commands ran on a CPU with tiny shapes, and its figures mean nothing."
TITLE = "# A day with a GPU"


def judged(records: Records, costs: dict[str, Any] | None = None) -> list[Verdict]:
    """Every claim that the stages were to measure, in their order."""
    found: list[Verdict] = []
    found += _check(records.get("check"))
    found += _tests(records.get("tests"), "on the device")
    found += _operator(records.get("operator"))
    found += _step(records.get("step"))
    found += _profile(records.get("profile"), costs)
    found += _memcheck(records.get("memcheck"))
    found += _tests(records.get("modes"), "")
    found += _check(records.get("modes"), "check, all cases", "every case")
    return found


def is_complete(record: Mapping[str, Any]) -> bool:
    ended = all(part["status"] in ("done", "absent") for part in record["parts"].values())
    return ended and not record.get("broken")


def _part(record: Mapping[str, Any] | None, name: str) -> tuple[Any, str]:
    """A part's result, and why it is none or not whole."""
    if record is None:
        return None, "the stage was not run"
    part = record["parts"].get(name)
    if part is None:
        return None, "not run"
    error = part["error"]
    return part["result"], f"{part['status']}: {error.splitlines()[-1]}" if error else part[
        "status"
    ]


def _check(
    record: Mapping[str, Any] | None, name: str = "quick", cases: str = "the main cases"
) -> Iterator[Verdict]:
    result, why = _part(record, name)
    claim = f"every backend within its bound of float64, in {cases}"
    if result is None:
        yield Verdict(claim, why, None)
        return
    rows = result["rows"]
    missed = [
        f"{row['backend']}, {row['dtype']}, {row['case']}, {row['head']}"
        for row in rows
        if not row["passed"]
    ]
    measured = f"{len(rows) - len(missed)} of {len(rows)}"
    yield Verdict(claim, ": ".join([measured, *missed[:1]]), not missed)


def _tests(record: Mapping[str, Any] | None, where: str) -> Iterator[Verdict]:
    """A verdict for each part that is of tests."""
    parts = {} if record is None else record["parts"]
    for name, part in parts.items():
        if "pytest" not in part.get("command", ""):
            continue
        result, why = _part(record, name)
        claim = f"tests {where}: {name}" if where else f"tests: {name}"
        if result is None:
            yield Verdict(claim, why, None)
            continue
        failed, skipped = result["failed"], sum(result["skipped"].values())
        measured = f"{result['passed']} passed, {len(failed)} failed, {skipped} skipped"
        # What was stopped before its end has not shown that it holds, and skips show nothing.
        holds: bool | None = not failed
        if holds and (part["status"] != "done" or not result["passed"]):
            holds, measured = None, measured if part["status"] == "done" else f"{measured}; {why}"
        first = failed[0].split(".")[-1] if failed else ""
        yield Verdict(claim, f"{measured}: {first}" if first else measured, holds)


def _operator(record: Mapping[str, Any] | None) -> Iterator[Verdict]:
    parts = {} if record is None else record["parts"]
    for name, part in parts.items():
        report = part["result"]
        if name in COMPARED:
            continue
        if report is None:
            yield Verdict(
                f"{name}: the claims of time, memory and error", _part(record, name)[1], None
            )
            continue
        yield from claims.verdicts(report)
        yield from _fold(report)
        if not report["finished"]:
            yield Verdict(f"{name}: the claims of its other tasks", _part(record, name)[1], None)
    if record is None:
        yield Verdict(
            "log-probs: the claims of time, memory and error", "the stage was not run", None
        )


def _fold(report: Mapping[str, Any]) -> Iterator[Verdict]:
    """Whether the kernel with the product in it beats the library's product and a fold."""
    rows = claims.rows_of(report)
    for shape in report["shapes"]:
        times = [
            rows.get((shape["name"], "forward", name), {}).get("median_ms")
            for name in ("prefkern-fold", "prefkern")
        ]
        claim = f"{shape['name']}, forward: `product_fold` is faster than a product and a fold"
        if all(times):
            yield Verdict(claim, f"{times[0]:.1f} ms against {times[1]:.1f}", times[0] < times[1])


def _step(record: Mapping[str, Any] | None) -> Iterator[Verdict]:
    result, why = _part(record, "layouts")
    if result is None:
        yield Verdict("a training step: loss, gradients, memory and time", why, None)
    rows = [] if result is None else [row for row in result["rows"] if row["failure"] is None]
    for task in dict.fromkeys(row["task"] for row in rows):
        ways = {row["way"]: row for row in rows if row["task"] == task}
        eager = ways.pop("logits in memory", None)
        if not ways:
            continue
        off = max((abs(row["loss"] - LN2) for row in ways.values()), key=_size)
        yield Verdict(
            f"step, {task}: the first loss is ln 2", f"off by {off:.1e}", off <= LN2_SLACK
        )
        norms = [row["gradient_norm"] for row in ways.values()]
        apart = (max(norms) - min(norms)) / max(norms) if max(norms) > 0 else math.nan
        yield Verdict(
            f"step, {task}: gradients' norms are the same padded, packed and shared",
            f"{apart:.1e} apart",
            apart <= NORM_SLACK,
        )
        for key, unit, label in (("peak_mib", "MiB", "memory"), ("median_ms", "ms", "time")):
            yield from _less(f"step, {task}: less {label}", ways, eager, key, unit)
    peers, _ = _part(record, "peers")
    for row in [] if peers is None else peers["rows"]:
        if row["provider"] == "prefkern":
            measured = row["failure"] or f"{row['median_ms']:,.0f} ms, {row['peak_mib']:,.0f} MiB"
            yield Verdict(
                f"{row['shape']}, {row['task']}: a training step runs", measured, not row["failure"]
            )


def _less(
    claim: str, ways: dict[str, Any], eager: dict[str, Any] | None, key: str, unit: str
) -> Iterator[Verdict]:
    """Padded is less than logits in memory, packed less than padded, shared less than packed."""
    order = [("logits in memory", eager), *((way, ways.get(way)) for way in ways)]
    for (other, more), (way, less) in itertools.pairwise(order):
        values = [None if row is None else row.get(key) for row in (less, more)]
        if None not in values:
            mine, theirs = values
            measured = f"{mine:,.0f} {unit} against {theirs:,.0f}"
            yield Verdict(f"{claim} {way} than with {_way(other)}", measured, mine <= theirs)


def _way(name: str) -> str:
    return name if name == "logits in memory" else f"{name} rows"


def _profile(record: Mapping[str, Any] | None, costs: dict[str, Any] | None) -> Iterator[Verdict]:
    result, why = _part(record, "calls")
    if record is None or result is None:
        yield Verdict("one call, kernel by kernel", why, None)
        return
    for call in result["calls"]:
        claim = f"{call['call']}: within {MODEL_SLACK:g} times of the model's time"
        of_model = model.call_of(costs, record["device"], result["shape"], call["call"])
        if of_model is None:
            why = "no model" if costs is None else "the model has no such call"
            yield Verdict(claim, why, None)
            continue
        ratio = call["ms"] / of_model["total"]["ms"]
        measured = f"{call['ms']:.2f} ms, the model {of_model['total']['ms']:.2f}"
        slowest = _furthest(call, of_model)
        holds = 1 / MODEL_SLACK <= ratio <= MODEL_SLACK
        yield Verdict(claim, f"{measured}; {slowest}" if slowest else measured, holds)


def _furthest(call: Mapping[str, Any], of_model: Mapping[str, Any]) -> str | None:
    """The kernel that takes most beyond what the model says."""
    said = model.modelled(of_model)
    over = {
        name: group.ms - said.get(name, model.Group(0, 0.0)).ms
        for name, group in model.measured(call["kernels"]).items()
    }
    name = max(over, key=lambda name: over[name], default=None)
    return f"{name} {over[name]:+.2f} ms" if name is not None and over[name] > 0 else None


def _memcheck(record: Mapping[str, Any] | None) -> Iterator[Verdict]:
    claim = "memcheck finds nothing in any kernel"
    part = None if record is None else record["parts"].get("memcheck")
    if part is None:
        yield Verdict(claim, "the stage was not run", None)
        return
    status = part.get("exit_status")
    if part["status"] in ("done", "failed") and status in (0, 1):
        yield Verdict(claim, "errors found" if status else "nothing found", not status)
        return
    yield Verdict(claim, _part(record, "memcheck")[1], None)


def _size(value: float) -> float:
    return math.inf if math.isnan(value) else value


def said(holds: bool | None) -> str:
    return "not measured" if holds is None else "holds" if holds else "MISS"


def summary(found: list[Verdict]) -> str:
    counts = [sum(each.holds is kind for each in found) for kind in (True, False, None)]
    return f"{counts[0]} hold, {counts[1]} miss, {counts[2]} not measured"


def about(records: Records) -> str:
    """The machine, the versions and the date, in one line."""
    some = next(iter(records.values()))
    named = [f"{name} {version}" for name, version in some["versions"].items() if version]
    gpu = some.get("gpu", {})
    parts = [some["device"], gpu.get("architecture"), gpu.get("cuda") and f"CUDA {gpu['cuda']}"]
    return "; ".join(
        [", ".join(part for part in parts if part), ", ".join(named), some["date"][:10]]
    )


def text(records: Records, found: list[Verdict]) -> str:
    """The page for a terminal."""
    lines = ["", about(records), *_dry(records)]
    for each in found:
        lines.append(f"{said(each.holds):<13} {each.claim}: {each.measured}")
    return "\n".join([*lines, summary(found)])


def _dry(records: Records) -> list[str]:
    return [DRY] if any(record["dry"] for record in records.values()) else []


def page(records: Records, found: list[Verdict], costs: dict[str, Any] | None = None) -> str:
    """The page in Markdown: the verdicts, what ran and how long, and each call's kernels."""
    lines = [TITLE, "", f"Written by `python bench/gpu.py --page`. {about(records)}.", ""]
    lines += [line for each in _dry(records) for line in (each, "")]
    lines += [f"{summary(found)[0].upper()}{summary(found)[1:]}.", ""]
    lines += ["| claim | measured | |", "|---|---|---|"]
    for each in found:
        lines.append(f"| {_cell(each.claim)} | {_cell(each.measured)} | {said(each.holds)} |")
    lines += ["", "## What ran", "", "| stage | part | | s | |", "|---|---|---|---|---|"]
    for stage, record in records.items():
        for name, part in record["parts"].items():
            error = (part["error"] or "").splitlines()
            seconds = part.get("seconds")
            cells = [stage, name, part["status"], "-" if seconds is None else f"{seconds:.0f}"]
            lines.append(f"| {' | '.join([*cells, _cell(error[-1] if error else '')])} |")
        if record.get("broken"):
            last = record["broken"].strip().splitlines()[-1]
            lines.append(f"| {stage} | the script itself | failed | - | {_cell(last)} |")
    lines += [*_kernels(records, costs), *_tiles(records)]
    return "\n".join(lines) + "\n"


def _kernels(records: Records, costs: dict[str, Any] | None) -> list[str]:
    """Each call's kernels in groups, beside the model's if there is one; and the longest ones."""
    result, _ = _part(records.get("profile"), "calls")
    if result is None:
        return []
    sizes = (f"{result[key]:,}" for key in ("tokens", "hidden_size", "vocab_size"))
    title = f"{result['shape']}: N, H, V = {', '.join(sizes)}. Model: `launch-costs.json`, if there is one."
    lines = ["", "## One call, kernel by kernel", "", title]
    for call in result["calls"]:
        groups = model.measured(call["kernels"])
        of_model = model.call_of(costs, records["profile"]["device"], result["shape"], call["call"])
        said = {} if of_model is None else model.modelled(of_model)
        busy = sum(group.ms for group in groups.values())
        title = f"{call['call']}: {call['ms']:.2f} ms, of which kernels run {busy:.2f}"
        lines += [
            "",
            f"**{title}**",
            "",
            "| kernels | launches | ms | model's launches | model's ms |",
        ]
        lines += ["|---|---|---|---|---|"]
        for name in dict.fromkeys([*groups, *said]):
            cells = [name, *_launches(groups.get(name)), *_launches(said.get(name))]
            lines.append(f"| {' | '.join(cells)} |")
        longest = [
            f"`{kernel['kernel'][:60]}` {kernel['us'] / 1e3:.3f}"
            for kernel in call["kernels"][:LISTED]
        ]
        lines += ["", f"Longest, ms: {'; '.join(longest)}."]
    return lines


def _launches(group: model.Group | None) -> tuple[str, str]:
    return ("-", "-") if group is None else (str(group.launches), f"{group.ms:.3f}")


def _tiles(records: Records) -> list[str]:
    result, _ = _part(records.get("operator"), "tiles")
    if result is None:
        return []
    lines = ["", "## Tiles of `product_fold`", "", "| shape | way | ms |", "|---|---|---|"]
    for row in result["rows"]:
        lines.append(
            f"| {row['shape']} | the library's product and a fold | {row['library_ms']:.2f} |"
        )
        for tiles in sorted(row["candidates"], key=lambda each: each["milliseconds"]):
            sizes = " x ".join(str(tiles[f"block_{axis}"]) for axis in "nvh")
            ways = [name for name in ("by_descriptor", "flatten", "specialize") if tiles[name]]
            named = [sizes, f"{tiles['num_warps']} warps", f"{tiles['num_stages']} stages", *ways]
            lines.append(f"| {row['shape']} | {', '.join(named)} | {tiles['milliseconds']:.2f} |")
    return lines


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")
