"""Write the sections of figures in the README, docs/results.md, docs/objectives.md and the page here.

usage: python bench/readme.py            (--check: exit 1 if a page is not what this would write;
                                          --pictures: draw those of `prefkern bench` anew, too)

No figure of those sections is typed by hand: each comes from a JSON file under bench/results/ that
`prefkern bench`, `make demo`, bench/plans.py or bench/objectives.py wrote, whose machine, versions, date and command
stand beside it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from prefkern.cli.plan import Batch, Cost, ModelHead, eager_costs, fused_costs

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench/results"
MARKERS = "<!-- measured -->\n", "<!-- /measured -->\n"


def source(report: dict[str, Any], name: str, folder: str = "../bench/results") -> str:
    """One line: where the figures of a table come from."""
    versions = ", ".join(
        f"{package} {report['versions'][package]}"
        for package in ("torch", "transformers", "liger-kernel", "trl", "cut-cross-entropy")
        if report["versions"].get(package)
    )
    return (
        f"`{report['command']}` on {report['device']}; {versions}; {report['date'][:10]} "
        f"([{name}]({folder}/{name}))."
    )


def kept(pattern: str) -> list[str]:
    """Result files by name, those of GPUs first."""
    return sorted((path.name for path in RESULTS.glob(pattern)), key=lambda n: ("cpu" in n, n))


def rows_of(report: dict[str, Any], suite: str, shape: str) -> list[dict[str, Any]]:
    return [row for row in report["rows"] if (row["suite"], row["shape"]) == (suite, shape)]


def size(shape: dict[str, Any]) -> str:
    softcap = f", softcap {shape['softcap']:g}" if shape["softcap"] else ""
    spread = "" if shape["spread"] == 2 else f", logits' spread {shape['spread']:g}"
    return (
        f"{shape['tokens']:,} scored tokens, H = {shape['hidden_size']:,}, "
        f"V = {shape['vocab_size']:,}{softcap}{spread}"
    )


def number(value: float | None, form: str = "") -> str:
    """Three digits without an exponent, or by the format."""
    if value is None:
        return "-"
    if form:
        return format(value, form)
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def bench_table(rows: list[dict[str, Any]]) -> str:
    """One suite at one shape: a line for each task and provider."""

    def cells(row: dict[str, Any]) -> list[str]:
        errors = ("token_logp_error", "sum_logp_error", "dhidden_error", "dweight_error")
        return [
            number(row["operations_nhv"], ".2f"),
            number(row["peak_mib"]),
            *(number(row[error], ".1e") for error in errors),
            number(row["median_ms"]),
            number(row["processor_ms"]),
            number(row["product_ratio"], ".2f"),
        ]

    columns = ("NHV", "peak MiB", "token", "sequence", "dH", "dW", "ms", "CPU ms", "x")
    return provider_table(rows, columns, cells)


def model_table(rows: list[dict[str, Any]]) -> str:
    """Suite "step" of one model: a line for each task and provider."""

    def cells(row: dict[str, Any]) -> list[str]:
        return [
            number(None if row["operations"] is None else row["operations"] / 1e9),
            number(row["peak_mib"]),
            number(row["sum_logp_error"], ".1e"),
            number(row["median_ms"]),
            number(row["processor_ms"]),
        ]

    return provider_table(rows, ("GFLOP", "peak MiB", "sequence", "ms", "CPU ms"), cells)


def provider_table(
    rows: list[dict[str, Any]],
    columns: Sequence[str],
    cells: Callable[[dict[str, Any]], list[str]],
) -> str:
    """A line for each task and provider that ran, and then who did not, and why."""
    header = ("task", "provider", *columns)
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for row in rows:
        if not row["failure"]:
            lines.append(f"| {' | '.join((row['task'], row['provider'], *cells(row)))} |")
    return "\n".join([*lines, *failures(rows)])


# Part of an error's text, and what it says of a provider.
WHY = {
    "0 active drivers": "its kernels need a GPU, and this machine has none",
    "not installed": "it was not installed",
    "out of memory": "memory ran out",
}


def why_not(failure: str) -> str:
    """Why a provider was not measured, in plain words; an error's own text stays in the result."""
    name, _, reason = failure.partition(": ")
    if name == "NotImplementedError":
        return f"it {reason}"
    return next((why for part, why in WHY.items() if part in failure), f"it raised {name}")


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """Who was not measured in a table, and why, each reason once."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["failure"]:
            reasons.setdefault((row["provider"], why_not(row["failure"])), []).append(row["task"])
    texts = [f"{name} ({', '.join(tasks)}): {why}" for (name, why), tasks in reasons.items()]
    return ["", f"Not measured: {'; '.join(texts)}."] if texts else []


COLUMNS = (
    "NHV: matrix-product operations, counted. Peak MiB: beyond the inputs, gradients included. "
    "token, sequence: the worst error of a log-prob against float64, in nats; dH, dW: relative. "
    "ms: by the wall clock; CPU ms: the processor's time, which other programs change little. "
    "x: CPU ms over that of plain products of as many operations. prefkern-roomy: with a workspace that holds a trained head's probabilities. -: not measured."
)


def bench_section(name: str) -> str:
    """The results' part: log-probs and gradients at the first shape, and fidelity."""
    report = json.loads((RESULTS / name).read_text())
    shape = report["shapes"][0]
    rows = [row for row in rows_of(report, "operator", shape["name"]) if row["task"] != "forward"]
    parts = [
        "## Log-probs and their gradients",
        (
            f"Forward and backward, {report['dtype']}, the head of "
            f"{shape['name']}: {size(shape)}. {COLUMNS}"
        ),
        bench_table(rows),
    ]
    if any(each["name"].startswith("spread") for each in report["shapes"]):
        parts += fidelity(report)
    picture = RESULTS / name.replace(".json", "-errors.png")
    if picture.exists():
        parts.append(f"![errors against float64, by provider](../bench/results/{picture.name})")
    return "\n\n".join([*parts, source(report, name)])


def fidelity(report: dict[str, Any]) -> list[str]:
    """Errors of sums and of a DPO step's gradients, by the spread of the logits."""
    spreads = [each for each in report["shapes"] if each["name"].startswith("spread")]
    some = spreads[0]
    length = some["tokens"] // (2 * some["pairs"])
    lines = ["| provider |", "|---|"]
    for shape in spreads:
        lines[0] += f" spread {shape['spread']:g}: sum, worst | mean | DPO's dH | DPO's dW |"
        lines[1] += "---|---|---|---|"
    providers = {row["provider"]: None for row in rows_of(report, "loss", some["name"])}
    for provider in providers:
        cells: list[str] = []
        for shape in spreads:
            rows = {
                row["task"]: row
                for row in rows_of(report, "loss", shape["name"])
                if row["provider"] == provider and row["sum_logp_error"] is not None
            }
            if len(rows) == 2:
                cells += [
                    number(rows["frozen"]["sum_logp_error"], ".1e"),
                    number(rows["frozen"]["sum_logp_mean_error"], ".1e"),
                    number(rows["frozen"]["dhidden_error"], ".1e"),
                    number(rows["trainable"]["dweight_error"], ".1e"),
                ]
        if cells:
            lines.append(f"| {provider} | {' | '.join(cells)} |")
    intro = (
        f"Errors of the log-prob of a sequence of {length} tokens, half of them confident, in nats, "
        f"and of the gradients of a DPO step on such sequences (beta 0.1), against float64, at H = {some['hidden_size']:,}, V = {some['vocab_size']:,}, by "
        "the spread of the logits:"
    )
    return [f"## What logits in {report['dtype']} cost", intro, "\n".join(lines)]


def all_results() -> str:
    """The benchmarks' own page: every table of every result, and the plans' bounds."""
    return "\n\n".join([*(every_table(name) for name in kept("bench-*.json")), plans_table()])


def every_table(name: str) -> str:
    report = json.loads((RESULTS / name).read_text())
    parts = [f"### {report['device']}", source(report, name, "results"), COLUMNS]
    for shape in report["shapes"]:
        for suite in ("operator", "loss"):
            if rows := rows_of(report, suite, shape["name"]):
                parts += [f"**{suite}, {shape['name']}**: {size(shape)}", bench_table(rows)]
    for model in report["models"]:
        if rows := rows_of(report, "step", model["name"]):
            size_of = f"{2 * model['pairs']} rows of {model['length']} tokens, half of them scored"
            parts += [f"**step, {model['name']}**: {size_of}", model_table(rows)]
    pictures = sorted(RESULTS.glob(name.replace(".json", "-*.png")))
    parts += [f"![{path.stem}](results/{path.name})" for path in pictures]
    return "\n\n".join(parts)


def plans_table(name: str = "plans-cpu.json") -> str:
    """Temporary memory and operations of each task, by shape and workspace."""
    report = json.loads((RESULTS / name).read_text())
    tasks = list(dict.fromkeys(row["task"] for row in report["rows"]))
    lines = [
        "### Plans: operations and temporary memory",
        "",
        (
            "Counted on the torch backend in bfloat16: NHV of a call, and the most bytes alive at once "
            "beyond inputs, outputs, gradients and the float32 `[N, H]` of D or dH, which is what "
            f"`workspace_mb` bounds. `bench/plans.py` fails where it is passed by more than "
            f"{report['slack'] - 1:.0%}."
        ),
        "",
        "| N, H, V | logits, MiB | workspace_mb |" + "".join(f" {t}: NHV | MiB |" for t in tasks),
        "|---|---|---|" + "---|---|" * len(tasks),
    ]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in report["rows"]:
        key = (row["tokens"], row["hidden_size"], row["vocab_size"], row["workspace_mb"])
        groups.setdefault(key, []).append(row)
    for (N, H, V, workspace_mb), rows in groups.items():
        cells = "".join(f" {r['operations_nhv']:.2f} | {r['temporary_mib']:.1f} |" for r in rows)
        lines.append(
            f"| {N:,}, {H:,}, {V:,} | {rows[0]['logits_mib']:.0f} | {workspace_mb} |{cells}"
        )
    return "\n".join([*lines, "", source(report, name, "results")])


def demo_tables(name: str) -> str:
    """What the demo's training changed, and what its loss step costs."""
    report = json.loads((RESULTS / name).read_text())
    lines = [
        "## The demo",
        "",
        (
            f"{report['steps']} steps of 8 pairs, {report['held_out_pairs']} held-out pairs, "
            f"{report['seconds']} s in all with the check."
        ),
        "",
        "| held-out | before | after |",
        "|---|---|---|",
    ]
    for label, (before, after) in report["learning"].items():
        plain = label.split(" [")[0]
        lines.append(f"| {plain} | {before:.4f} | {after:.4f} |")
    step = report["loss_step"]
    lines += [
        "",
        (
            "Before training policy and reference agree, so every reward is 0 and none is above the other. "
            "Log-prob accuracy: pairs whose chosen response has the higher log-prob per token, without a reference."
        ),
        "",
        f"| its loss step, {step['tokens']} scored tokens | peak MiB | NHV | loss error | dH error | CPU ms |",
        "|---|---|---|---|---|---|",
    ]
    for provider, row in step["rows"].items():
        lines.append(
            f"| {provider} | {row['peak_mib']:.1f} | {row['operations_nhv']:.2f} "
            f"| {row['loss_error']:.1e} | {row['dhidden_error']:.1e} | {row['median_ms']:.0f} |"
        )
    return "\n".join([*lines, "", source(report, name)])


def measured() -> str:
    """The page of results."""
    closing = (
        "The processor multiplies bfloat16 operands. Eager, Liger and TRL round the logits to bfloat16; "
        "prefkern [does not](operator.md#on-a-cpu). Such times say little about a GPU. "
        "Operations carry over to other machines, and memory follows `workspace_mb`. DPO steps, training steps of whole models, other shapes and the bounds of "
        "memory: [benchmarks](../bench/README.md)."
    )
    sections = [bench_section(name) for name in kept("bench-*.json")]
    return "\n\n".join([demo_tables("demo-cpu.json"), *sections, closing])


# The README's first table: a head, and pairs of two sequences of so many tokens.
PLANNED_HEAD = ModelHead("Llama-3-8B", 4096, 128256, False, 1.0, None)
PLANNED_BATCH = Batch.of_lengths(4, 2048, 0)
PLANNED_MB = (1024.0, 6144.0)
# The providers of its second table, as a reader knows them.
PEERS = {
    "prefkern": "prefkern",
    "eager": "logits in memory",
    "trl": "TRL 1.16's tiles",
    "liger": "Liger, all tokens",
    "torch-lce": "torch's `linear_cross_entropy`",
}


def summary(name: str = "bench-cpu.json") -> str:
    """The README's section: what a plan says of a large head, and what was measured of a small one."""
    fused = fused_costs(PLANNED_HEAD, PLANNED_BATCH, torch.bfloat16, "cuda", PLANNED_MB, "triton")
    eager = {cost.task: cost for cost in eager_costs(PLANNED_HEAD, PLANNED_BATCH, torch.bfloat16)}
    unit = PLANNED_BATCH.scored * PLANNED_HEAD.hidden_size * PLANNED_HEAD.vocab_size

    def cell(cost: Cost) -> str:
        unit_of_bytes, size = ("GiB", 2**30) if cost.bytes >= 2**30 else ("MiB", 2**20)
        value = round(cost.bytes / size, 1 if size == 2**30 else 0)
        return f"{value:g} {unit_of_bytes}, {cost.operations / unit:g} NHV"

    lines = [
        (
            f"Planned for the head of {PLANNED_HEAD.model} (H = {PLANNED_HEAD.hidden_size:,}, "
            f"V = {PLANNED_HEAD.vocab_size:,}, bfloat16) and {PLANNED_BATCH.pairs} pairs of 2 x "
            f"{PLANNED_BATCH.length:,} tokens: memory beyond weights, hidden states and their gradients, and "
            "operations in NHV (tokens x H x V). "
            f"`prefkern plan meta-llama/Meta-Llama-3-8B --seq-len {PLANNED_BATCH.length} --batch "
            f"{PLANNED_BATCH.pairs} --workspace-mb {' '.join(f'{mb:g}' for mb in PLANNED_MB)}` prints it on any machine."
        ),
        "",
        "| | logits and their gradient in memory | prefkern, by `workspace_mb` |",
        "|---|---|---|",
    ]
    tasks = {
        "frozen head": "frozen head (LoRA)",
        "trained head": "trained head",
        "reference": "reference",
    }
    for task, label in tasks.items():
        ways = [f"{cell(c)} at {c.workspace_mb:,.0f}" for c in fused if c.task == task]
        # The last is the least power of two for one pass, which one of those given is enough for.
        ways = ways[: len(PLANNED_MB)]
        lines.append(f"| {label} | {cell(eager[task])} | {'; '.join(ways)} |")
    report = json.loads((RESULTS / name).read_text())
    shape = report["shapes"][0]
    rows = {(row["provider"], row["task"]): row for row in rows_of(report, "loss", shape["name"])}
    roomy = rows["prefkern-roomy", "trainable"]["operations_nhv"]
    lines += [
        "",
        (
            f"Measured on a CPU: a DPO step with its reference, at the head of {shape['name']} ({size(shape)}, "
            "bfloat16). Errors are against float64: of a response's log-prob in nats, of the hidden states' "
            "gradient relative. ms: the processor's time, one thread."
        ),
        "",
        "| | NHV, frozen head | NHV, trained | peak MiB, frozen | log-prob error | gradient error | ms, frozen | ms, trained |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for provider, label in PEERS.items():
        frozen, trained = rows[provider, "frozen"], rows[provider, "trainable"]
        nhv = number(trained["operations_nhv"], "g")
        if provider == "prefkern" and nhv != f"{roomy:g}":
            nhv = f"{roomy:g} to {nhv}"
        cells = (
            number(frozen["operations_nhv"], "g"),
            nhv,
            number(frozen["peak_mib"]),
            number(frozen["sum_logp_error"], ".1e"),
            number(frozen["dhidden_error"], ".1e"),
            number(frozen["processor_ms"]),
            number(trained["processor_ms"]),
        )
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", source(report, name, "bench/results")])


def objectives_table(name: str) -> str:
    """The worst errors of every objective, plain and adaptive, against its oracle."""
    report = json.loads((RESULTS / name).read_text())
    bounds = report["bounds"]
    lines = [
        (
            "Worst relative error of value / of gradient over each objective's cases (options, P from near 0 to "
            "1 - 1e-12, log-ratios to 1e4, 32,768 tokens), against the textbook formulas in 150-digit decimals "
            f"of tests/support/oracles.py. Bounds: {bounds['float64']:.0e} in float64, {bounds['float32']:.0e} in float32. The pair "
            f"kernel ran {report['kernel']}, in one launch a loss (alpha-DPO's running statistics, while training, "
            "are moved by torch before it); where there is none, the torch class is what runs on every backend."
        ),
        "",
        "| objective | | cases | torch, float64 | torch, float32 | pair kernel, float32 |",
        "|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for row in report["rows"]:
        groups.setdefault((row["objective"], row["adaptive"]), []).append(row)
    for (objective, adaptive), rows in groups.items():
        cells = []
        for path in ("float64", "float32", "kernel"):
            found = [row[path] for row in rows if row[path] is not None]
            worst = (max(row[kind] for row in found) for kind in ("value", "gradient") if found)
            cells.append(" / ".join(f"{error:.0e}" for error in worst) or "-")
        kind = "adaptive" if adaptive else "plain"
        lines.append(f"| `{objective}` | {kind} | {len(rows)} | {' | '.join(cells)} |")
    lines += [
        "",
        "AdaDPO's A.6, |dL/dP_w| / |dL/dP_l|: "
        + "; ".join(
            f"`{row['objective']}` at P_w/P_l = {row['odds']:g}: {row['balance']:.4g}"
            for row in report["appendix_a6"]
        )
        + f". Its Listing 1 and `adadpo` differ by {report['listing_1']:.0e} at most, relative, in loss and gradient.",
    ]
    return "\n".join([*lines, "", source(report, name)])


PAGES = {
    ROOT / "README.md": summary,
    ROOT / "docs/results.md": measured,
    ROOT / "bench/README.md": all_results,
    ROOT / "docs/objectives.md": lambda: objectives_table("objectives-cpu.json"),
}


def draw_pictures() -> None:
    from prefkern_bench import pictures

    for name in kept("bench-*.json"):
        report = json.loads((RESULTS / name).read_text())
        pictures.draw(report, RESULTS, name.removesuffix(".json"))


def main() -> int:
    if "--pictures" in sys.argv:
        draw_pictures()
    differ = False
    for path, section in PAGES.items():
        text = path.read_text()
        before, rest = text.split(MARKERS[0])
        after = rest.split(MARKERS[1])[1]
        written = f"{before}{MARKERS[0]}\n{section()}\n\n{MARKERS[1]}{after}"
        differ |= written != text
        if "--check" not in sys.argv:
            path.write_text(written)
    return int(differ and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
