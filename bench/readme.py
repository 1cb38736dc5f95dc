"""Write the sections of measured figures in the README and the page of objectives.

usage: python bench/readme.py            (--check: exit 1 if a page is not what this would write)

No figure of those sections is typed by hand: each comes from a JSON file under bench/results/ that
`prefkern bench`, `make demo` or bench/objectives.py wrote, whose machine, versions, date and command
stand beside it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench/results"
MARKERS = "<!-- measured -->\n", "<!-- /measured -->\n"


def source(report: dict[str, Any], name: str) -> str:
    """One line: where the figures of a table come from."""
    versions = ", ".join(
        f"{package} {report['versions'][package]}"
        for package in ("torch", "transformers", "liger-kernel")
        if report["versions"].get(package)
    )
    return (
        f"`{report['command']}` on {report['device']}; {versions}; {report['date'][:10]} "
        f"([{name}](bench/results/{name}))."
    )


def loss_step_table(name: str) -> str:
    """Operations, memory, error and time of a DPO step at the model's shape, by provider."""
    report = json.loads((RESULTS / name).read_text())
    shape = next(each for each in report["shapes"] if each["name"] == "SmolLM2-135M")
    lines = [
        (
            f"A DPO loss step (hidden states to gradients, reference included) in {report['dtype']} at "
            f"H = {shape['hidden_size']:,}, V = {shape['vocab_size']:,}, "
            f"{shape['pairs']} pairs of {shape['length']} tokens, {shape['prompt']} of them prompt. "
            "NHV: matrix-product operations, 2 of them the reference's. "
            "Errors are the worst against float64, of a sequence's log-prob in nats and of dH and dW relative."
        ),
        "",
        "| head | provider | NHV | peak MiB | log-prob error | dH error | dW error | ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        if row["shape"] != shape["name"]:
            continue
        if row["failure"]:
            lines.append(f"| {row['head']} | {row['provider']} | {row['failure']} |||||||")
            continue
        errors = (row["sum_logp_error"], row["dhidden_error"], row["dweight_error"])
        cells = " | ".join("-" if error is None else f"{error:.1e}" for error in errors)
        lines.append(
            f"| {row['head']} | {row['provider']} | {row['operations_nhv']:.2f} "
            f"| {row['peak_mib']:.0f} | {cells} | {row['median_ms']:.0f} |"
        )
    return "\n".join([*lines, "", source(report, name)])


def demo_tables(name: str) -> str:
    """What the demo's training changed, and what its loss step costs."""
    report = json.loads((RESULTS / name).read_text())
    lines = [
        (
            f"The demo: {report['steps']} steps of 8 pairs, {report['held_out_pairs']} held-out pairs, "
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
        f"| its loss step, {step['tokens']} scored tokens | peak MiB | NHV | loss error | dH error | ms |",
        "|---|---|---|---|---|---|",
    ]
    for provider, row in step["rows"].items():
        lines.append(
            f"| {provider} | {row['peak_mib']:.1f} | {row['operations_nhv']:.2f} "
            f"| {row['loss_error']:.1e} | {row['dhidden_error']:.1e} | {row['median_ms']:.0f} |"
        )
    return "\n".join([*lines, "", source(report, name)])


def measured() -> str:
    """The README's section."""
    closing = (
        "On a CPU prefkern multiplies in float32, eager and Liger in the inputs' dtype, so these "
        "times say little about a GPU. Operations carry over to other machines, and memory follows "
        "`workspace_mb`."
    )
    return "\n\n".join([demo_tables("demo-cpu.json"), loss_step_table("bench-cpu.json"), closing])


def objectives_table(name: str) -> str:
    """The worst errors of every objective, plain and adaptive, against its oracle."""
    report = json.loads((RESULTS / name).read_text())
    bounds = report["bounds"]
    lines = [
        (
            "Worst relative error of value / of gradient over each objective's cases (options, P from near 0 to "
            "1 - 1e-12, log-ratios to 1e4, 32,768 tokens), against the textbook formulas in 150-digit decimals "
            f"of tests/oracles.py. Bounds: {bounds['float64']:.0e} in float64, {bounds['float32']:.0e} in float32. The pair "
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
    ROOT / "README.md": measured,
    ROOT / "prefkern/objectives/README.md": lambda: objectives_table("objectives-cpu.json"),
}


def main() -> int:
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
