"""Compile every configuration of `product_fold` for every GPU in the table; record its resources.

usage: python bench/compile_reports.py [PYTHON ...]

No GPU is needed. The script runs `support.compile_ahead --all` (in tests/) for each architecture,
with this interpreter or with each PYTHON given, which may have another version of Triton. It writes
`bench/results/compile-reports.json` and the table `bench/COMPILE.md`. Registers and spills show
whether a configuration is worth measuring, but not how fast it is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
COLUMNS = (
    *("operands", "bias or softcap", "tile n x v x h", "warps", "stages", "operands by", "flat"),
    *("specialised", "in use", "registers", "stack", "KiB", "instructions"),
)
HEAD = """\
# Resources of the product's configurations

Written by `{command}` on {date}. The table shows resources of `_product_fold_kernel`: registers per
thread (vector registers on gfx942), bytes of stack (ptxas spills; on gfx942 scalar registers that
spill into lanes) and KiB of shared memory. Each number is the largest over the variants of a call:
with rows, a bias, a softcap and a vocabulary that the tiles do not divide, as far as the class
allows them. *In use* marks the first candidate of its class. No configuration was measured on a GPU
unless `tiles.py` says so.
"""


def compile_all(python: str, target: str) -> dict[str, Any]:
    folders = (ROOT, ROOT / "kernels", ROOT / "tests")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [python, "-m", "support.compile_ahead", target, "--all"],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    return json.loads(done.stdout)


def table(report: dict[str, Any]) -> list[str]:
    """The rows of a report in Markdown, one for each configuration."""
    worst: dict[tuple, dict[str, Any]] = {}
    for row in report["kernels"]:
        if row["kernel"] != "_product_fold_kernel":
            continue
        config = row["config"]
        key = (row["operands"], row["plain"], tuple(config.items()))
        kept = worst.setdefault(key, {"registers": 0, "stack": 0, "shared": 0, **row, "has": set()})
        kept["registers"] = max(kept["registers"], row.get("REG", row.get("vgpr_count", 0)))
        kept["stack"] = max(kept["stack"], row.get("STACK", row.get("sgpr_spill_count", 0)))
        kept["shared"] = max(kept["shared"], row["shared"])
        kept["has"] |= set(row["instructions"])
    lines = [
        f"\n## {report['target']}, Triton {report['triton']}\n",
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
    ]
    for row in worst.values():
        config = row["config"]
        cells = [
            row["operands"],
            "" if row["plain"] else "yes",
            f"{config['block_n']} x {config['block_v']} x {config['block_h']}",
            config["num_warps"],
            config["num_stages"],
            "descriptor" if config["by_descriptor"] else "pointer",
            "yes" if config["flatten"] else "",
            "yes" if config["specialize"] else "",
            "yes" if row["in_use"] else "",
            row["registers"],
            row["stack"],
            f"{row['shared'] / 1024:.0f}",
            ", ".join(f"`{name}`" for name in sorted(row["has"])),
        ]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return lines


def main() -> None:
    pythons = sys.argv[1:] or [sys.executable]
    # The record does not name the paths of the interpreters, only their versions.
    command = " ".join(["python bench/compile_reports.py"] + ["PYTHON"] * len(sys.argv[1:]))
    reports = []
    for python in pythons:
        for target in TARGETS:
            report = compile_all(python, target)
            print(f"{target}, Triton {report['triton']}: {len(report['kernels'])} kernels")
            reports.append(report)
    today = date.today().isoformat()
    record = {"date": today, "command": command, "reports": reports}
    path = ROOT / "bench/results/compile-reports.json"
    # One line for each kernel.
    path.write_text(json.dumps(record).replace('{"kernel"', '\n{"kernel"') + "\n")
    lines = [HEAD.format(command=command, date=today)]
    for report in reports:
        lines += table(report)
    (ROOT / "bench/COMPILE.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
