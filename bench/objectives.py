"""The worst error of every objective, plain and adaptive, in value and gradient against its oracle.

usage: python bench/objectives.py [--json PATH]         (exit status 1 if a bound is missed)

`tests/support/objective_cases.py` has the table of cases and their pairs. The oracles in
`tests/support/oracles.py` are the textbook formulas in decimals with 150 digits. Each case runs
through its torch class in float64 and float32, differentiated by autograd. If it has a pair kernel,
it also runs through that Triton kernel, by the same call that the loss makes: compiled on a GPU, in
Triton's interpreter without one. All numbers are exact in float32, so every path gets the same
inputs.

An error is |x - truth| / max(|truth|, tiny). Here tiny is 1e-280 in float64 and 1e-30 in float32,
below which a saturated loss or gradient counts as 0. x is the loss, or one of its two derivatives
with respect to L_w and L_l. A row has the worst error over its pairs. Some pairs have
P = 1 - 1e-12, log-ratios of 1e4, or 32,768 tokens. Pairs for which the library bounds a value
against overflow (a ratio above e^60, a square above 1e36) are not compared; the report has their
number.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    # Triton reads this when it is first imported.
    os.environ["TRITON_INTERPRET"] = "1"

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table

from prefkern import Pairs
from prefkern.loss.diagnostics import objective_balance
from prefkern.objectives import DPO, Adaptive, Objective
from prefkern_bench import environment
from support.listing import listing_1
from support.objective_cases import (
    BOUNDS,
    CASES,
    GROUPS,
    TINY,
    Answer,
    Case,
    Errors,
    errors,
    evaluate,
    evaluate_kernel,
)

try:
    import prefkern_kernels as kernels
except ImportError:
    kernels = None

PATHS = {"float64": torch.float64, "float32": torch.float32, "kernel": torch.float32}
# AdaDPO, A.6: P_w / P_l, then |dL/dP_w| / |dL/dP_l| for DPO and for Stable AdaDPO.
APPENDIX_A6 = [(5.0, 0.2, 0.4), (10.0, 0.1, 0.2), (1.5, 1 / 1.5, 1.0)]


def row_of(case: Case) -> dict[str, Any]:
    """The worst errors of one case, for each path."""
    row: dict[str, Any] = {
        "objective": case.objective,
        "variant": case.variant,
        "adaptive": getattr(case.make(), "adaptive", None) is not None,
        "pairs": 0,
        "bounded": 0,
        "launches": None,
    }
    for samples in GROUPS.values():
        truths = zip(case.expected(samples), samples, strict=True)
        bounded = sum(case.is_bounded(truth, sample.pair) for truth, sample in truths)
        row["bounded"] += bounded
        row["pairs"] += len(samples) - bounded
    for path, dtype in PATHS.items():
        if path == "kernel" and not _has_kernel(case):
            row[path] = None
            continue
        found = []
        for samples in GROUPS.values():
            if path == "kernel":
                before = sum(kernels.launches.values())
                answer: Answer = evaluate_kernel(case, samples, DEVICE)
                row["launches"] = sum(kernels.launches.values()) - before
            else:
                answer = evaluate(case, samples, dtype, DEVICE)
            found.append(errors(case, samples, answer, dtype))
        # A NaN counts as the worst error.
        worst = (
            max(column, key=lambda error: math.inf if math.isnan(error) else error)
            for column in zip(*found, strict=True)
        )
        row[path] = Errors(*worst)._asdict()
    return row


def _has_kernel(case: Case) -> bool:
    objective = case.make()
    return (
        kernels is not None
        and isinstance(objective, Objective)
        and objective.pair_kernel_options() is not None
    )


def appendix_a6() -> list[dict[str, Any]]:
    rows = []
    stable = Adaptive("policy", 1.0, 2.0)
    for odds, dpo, ada in APPENDIX_A6:
        for name, adaptive, expected in (("dpo", None, dpo), ("adadpo", stable, ada)):
            rejected = torch.tensor([-20.0], dtype=torch.float64)
            pairs = Pairs(rejected + math.log(odds), rejected, rejected, rejected)
            balance = objective_balance(DPO(0.1, adaptive=adaptive), pairs).log_balance.exp()
            row = {"odds": odds, "objective": name, "balance": balance.item()}
            rows.append({**row, "expected": expected})
    return rows


def listing_1_difference() -> float:
    """AdaDPO against the paper's code on random pairs: the worst error of losses and gradients."""
    generator = torch.Generator().manual_seed(0)
    ref = -50 + 20 * torch.randn(128, generator=generator, dtype=torch.float64)
    drift = 10 * torch.randn(128, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, 60, (128,), generator=generator)
    chosen, rejected = slice(0, 64), slice(64, 128)
    worst = 0.0
    for beta, clip in ((0.005, 1.5), (0.1, 2.0), (1.0, 10.0)):
        logps = (ref + drift).requires_grad_()
        pairs = Pairs(*logps.chunk(2), *ref.chunk(2), *lengths.chunk(2))
        mine = DPO(beta, adaptive=Adaptive(clip=clip))(pairs).losses
        theirs = listing_1(logps, ref, chosen, rejected, beta, clip, *lengths.chunk(2))
        slopes = [torch.autograd.grad(losses.sum(), logps)[0] for losses in (mine, theirs)]
        for x, true in ((mine, theirs), slopes):
            worst = max(worst, ((x - true).abs() / true.abs().clamp(min=1e-280)).max().item())
    return worst


def missed(report: dict[str, Any]) -> list[str]:
    """The errors above their bounds, as text."""
    found = []
    for row in report["rows"]:
        name = f"{row['objective']}: {row['variant']}"
        for path, dtype in PATHS.items():
            for kind, error in (row[path] or {}).items():
                if not error <= BOUNDS[dtype]:
                    found.append(f"{name}: {path} {kind} {error:.1e}")
        if row["launches"] not in (None, 1):
            found.append(f"{name}: {row['launches']} launches")
    for row in report["appendix_a6"]:
        if not math.isclose(row["balance"], row["expected"], rel_tol=1e-12):
            found.append(f"A.6 at {row['odds']}: {row['balance']} for {row['expected']}")
    if not report["listing_1"] <= BOUNDS[torch.float64]:
        found.append(f"Listing 1: {report['listing_1']:.1e}")
    return found


def table_of(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="worst error of value and of gradient", box=SIMPLE, pad_edge=False)
    table.add_column("objective")
    table.add_column("pairs", justify="right")
    for path in ("torch float64", "torch float32", "pair kernel"):
        table.add_column(path, justify="right", no_wrap=True)
    for row in rows:
        cells = (
            "-" if row[path] is None else f"{row[path]['value']:.0e} {row[path]['gradient']:.0e}"
            for path in PATHS
        )
        table.add_row(f"{row['objective']}: {row['variant']}", str(row["pairs"]), *cells)
    return table


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Errors of every objective against its oracle.")
    default = ROOT / f"bench/results/objectives-{DEVICE}.json"
    parser.add_argument("--json", type=Path, default=default, metavar="PATH")
    arguments = parser.parse_args(argv)
    console = Console()
    command = shlex.join(["python", "bench/objectives.py", *argv])
    cases = track(CASES.values(), "", console=console, transient=True)
    report = {
        **environment(torch.device(DEVICE), command),
        "kernel": "none" if kernels is None else "compiled" if DEVICE == "cuda" else "interpreted",
        "error": "worst |x - truth| / max(|truth|, tiny) over a case's pairs",
        "tiny": {str(dtype).removeprefix("torch."): x for dtype, x in TINY.items()},
        "bounds": {str(dtype).removeprefix("torch."): x for dtype, x in BOUNDS.items()},
        "appendix_a6": appendix_a6(),
        "listing_1": listing_1_difference(),
        "rows": [row_of(case) for case in cases],
    }
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    console.print(table_of(report["rows"]))
    for row in report["appendix_a6"]:
        console.print(
            f"A.6: {row['objective']} at P_w / P_l = {row['odds']:g}: {row['balance']:.6g}"
        )
    console.print(f"Listing 1: {report['listing_1']:.1e}")
    misses = missed(report)
    for miss in misses:
        console.print(f"missed: {miss}", style="red")
    return bool(misses)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
