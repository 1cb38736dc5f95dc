"""Counts the cost of calls by their plan, on the torch backend: operations and temporary bytes.

usage: python bench/plans.py [--json PATH]         (exit status 1 if a bound is missed)

There are three shapes, three bounds on temporary memory and three tasks: forward; forward and
backward with a frozen head; forward and backward with a trainable head. For each combination,
`prefkern_bench.measure.Meter` counts the matrix products in units of NHV. It also counts the peak
of bytes beyond inputs, outputs, gradients and the float32 `[N, H]` tensor that holds D or dH.

A row fails if the bytes exceed `workspace_mb` by more than 5%, if the operations differ from the
plan's, or if they exceed the bound of the task. That bound is 2, 4 and 8 NHV, and 6 for a trainable
head if the plan keeps the logits of every token in the workspace.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import prefkern
from prefkern_bench import environment
from prefkern_bench.measure import Meter

ROOT = Path(__file__).parent.parent
MIB = 2**20
SLACK = 1.05
# N, H, V: a small vocabulary, a V that is large relative to H, and SmolLM2-135M's head.
SHAPES = ((1024, 256, 16384), (2048, 128, 50257), (512, 576, 49152))
WORKSPACES_MB = (8, 64, 256)
MOST = {"forward": 2, "frozen": 4, "trainable": 8}  # NHV
# Some numbers for each token: log-prob, logsumexp, their gradients and similar.
TOKEN_BYTES = 200


@dataclass
class Row:
    tokens: int
    hidden_size: int
    vocab_size: int
    workspace_mb: int
    task: str
    structure: str
    operations_nhv: float
    planned_nhv: float
    temporary_mib: float  # beyond inputs, outputs, gradients and [N, H]
    logits_mib: float  # size of the logits in float32, for comparison
    misses: list[str]


def measure(
    N: int, H: int, V: int, workspace_mb: int, task: str, dtype: torch.dtype = torch.bfloat16
) -> Row:
    """One call, with its backward if the task has one."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator).to(dtype).requires_grad_(task != "forward")
    weight = torch.randn(V, H, generator=generator).to(dtype).requires_grad_(task == "trainable")
    labels = torch.randint(V, (N,), generator=generator)
    with Meter() as meter:
        logps = prefkern.linear_logprobs(
            hidden, weight, labels, workspace_mb=workspace_mb, backend="torch"
        )
        assert isinstance(logps, torch.Tensor)
        if task != "forward":
            logps.sum().backward()
    plan = prefkern.last_plan()
    assert plan is not None
    gradients = [x.grad for x in (hidden, weight) if x.grad is not None]
    outputs = sum(x.nbytes for x in (logps, *gradients)) + TOKEN_BYTES * N
    outputs += 4 * N * H if task != "forward" else 0
    row = Row(
        N, H, V, workspace_mb, task, plan.structure,
        operations_nhv=meter.operations / (N * H * V),
        planned_nhv=plan.operations / (N * H * V),
        temporary_mib=max(0, meter.peak_bytes - outputs) / MIB,
        logits_mib=4 * N * V / MIB,
        misses=[],
    )  # fmt: skip
    row.misses = misses(row, kept_tokens=getattr(plan, "kept_tokens", 0))
    return row


def misses(row: Row, kept_tokens: int = 0) -> list[str]:
    """The bounds that the row exceeds."""
    found = []
    if row.temporary_mib > SLACK * row.workspace_mb:
        found.append(f"{row.temporary_mib:.1f} MiB of {row.workspace_mb}")
    if abs(row.operations_nhv - row.planned_nhv) > 1e-6:
        found.append(f"{row.operations_nhv:.2f} NHV, planned {row.planned_nhv:.2f}")
    most = MOST[row.task]
    if row.task == "trainable" and kept_tokens >= row.tokens:
        most = 6
    if row.operations_nhv > most + 1e-6:
        found.append(f"{row.operations_nhv:.2f} NHV, bound {most}")
    return found


def table_of(rows: list[Row]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("N", "H", "V", "workspace", "task", "structure", "NHV", "MiB", "logits MiB", ""):
        table.add_column(column, justify="left" if column in ("task", "structure") else "right")
    for row in rows:
        table.add_row(
            f"{row.tokens:,}", f"{row.hidden_size:,}", f"{row.vocab_size:,}",
            str(row.workspace_mb), row.task, row.structure, f"{row.operations_nhv:.2f}",
            f"{row.temporary_mib:.1f}", f"{row.logits_mib:.0f}", ", ".join(row.misses) or "ok",
        )  # fmt: skip
    return table


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--json", type=Path, default=ROOT / "bench/results/plans-cpu.json")
    arguments = parser.parse_args(argv)
    cases = [(*s, mb, task) for s in SHAPES for mb in WORKSPACES_MB for task in MOST]
    console = Console()
    rows = [measure(*case) for case in track(cases, "counting", console=console, transient=True)]
    console.print(table_of(rows))
    command = shlex.join(["python", "bench/plans.py", *argv])
    report: dict[str, Any] = environment(torch.device("cpu"), command)
    report |= {"dtype": "bfloat16", "slack": SLACK, "rows": [asdict(row) for row in rows]}
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return int(any(row.misses for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
