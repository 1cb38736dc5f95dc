"""Write the README's section "What was measured" from the files under bench/results/.

usage: python bench/readme.py            (--check: exit 1 if the README is not what this would write)

No figure of that section is typed by hand: each comes from a JSON file that `prefkern bench` or
`make demo` wrote, whose machine, versions, date and command stand beside it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench/results"
START, END = "<!-- measured -->\n", "<!-- /measured -->\n"


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


def section() -> str:
    """The whole section, between its markers."""
    closing = (
        "On a CPU prefkern multiplies in float32, eager and Liger in the inputs' dtype, so these "
        "times say little about a GPU. Operations carry over to other machines, and memory follows "
        "`workspace_mb`."
    )
    parts = [demo_tables("demo-cpu.json"), loss_step_table("bench-cpu.json"), closing]
    return START + "\n" + "\n\n".join(parts) + "\n\n" + END


def main() -> int:
    path = ROOT / "README.md"
    text = path.read_text()
    before, rest = text.split(START)
    after = rest.split(END)[1]
    written = before + section() + after
    if "--check" in sys.argv:
        return int(written != text)
    path.write_text(written)
    return 0


if __name__ == "__main__":
    sys.exit(main())
