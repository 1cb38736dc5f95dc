"""Measures how far training under DeepSpeed's ZeRO is from one process on the joint batch.

usage: python bench/zero.py [--page]     (make test-zero; exit status 1 if a bound is missed)

The cases are those of `tests/support/zero.py`, on two gloo ranks of a CPU, with tiny models. This
writes bench/results/zero-cpu.json, and from that the page bench/ZERO.md. With --page it writes only
the page, from an existing result.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in (".", "kernels", "tests", "bench")]

import torch

from prefkern_bench import environment

PAGE = ROOT / "bench/ZERO.md"
RESULT = ROOT / "bench/results/zero-cpu.json"
STAGES = (2, 3)
BOUND, BOUND_BF16 = 1e-5, 0.1
HEAD = """\
# ZeRO-2 and ZeRO-3 against one process

Two gloo ranks of a CPU under DeepSpeed, and one process on the joint batch: tiny models, two steps
of SGD. *gradient*: the worst difference of a parameter's gradient before an optimiser step, relative
to its norm. *weight*: the worst difference of a weight. *log*: the worst difference of a logged
number, relative where that is above 1. *first loss*: of the two ranks. DPO between equal models
starts at ln 2 = 0.693147. In bfloat16 DeepSpeed casts weights, and one process, by autocast, the
operands of products: the two round at other places.
"""


def measured(command: str) -> dict[str, Any]:
    from support import zero

    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for stage in STAGES:
            cases = zero.cases_of(stage)
            for part in (cases[::2], cases[1::2]):
                zero.launch(folder, stage, *part)
                for case in part:
                    rows.setdefault(case, {})[f"ZeRO-{stage}"] = worst(folder, case)
    report = environment(torch.device("cpu"), command)
    report["versions"] |= {name: metadata.version(name) for name in ("accelerate", "deepspeed")}
    return report | {"rows": {case: rows[case] for case in zero.CASES if case in rows}}


def worst(folder: Path, case: str) -> dict[str, float]:
    """The worst errors of both ranks, and the first loss."""
    from support import zero

    kept = folder / f"one process, {case}.pt"
    if not kept.exists():
        torch.save(zero.outcome(folder / kept.stem, case, ranks=1), kept)
    expected = torch.load(kept)
    ranks = [torch.load(folder / f"rank{rank}.pt")[case] for rank in range(2)]
    errors = [zero.errors(case, found, expected) for found in ranks]
    found = {name: max(each[name] for each in errors) for name in ("gradients", "weights", "logs")}
    return {**found, "loss": ranks[0]["logs"][0]["loss"]}


def misses(result: dict[str, Any]) -> list[str]:
    return [
        f"{mode}, {case}: {name} {errors[name]:.1e}"
        for case, row in result["rows"].items()
        for mode, errors in row.items()
        for name in ("gradients", "weights", "logs")
        if not errors[name] <= (BOUND_BF16 if "bf16" in case else BOUND)
    ]


def page(result: dict[str, Any]) -> str:
    names = ("torch", "transformers", "accelerate", "peft", "deepspeed")
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in names)
    lines = [
        HEAD,
        f"`{result['command']}` on {result['device']}; {versions}; {result['date'][:10]}.",
        "",
        "| case | ZeRO-2: gradient | weight | log | ZeRO-3: gradient | weight | log | first loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case, row in result["rows"].items():
        cells = []
        for stage in STAGES:
            errors = row.get(f"ZeRO-{stage}")
            names = ("gradients", "weights", "logs")
            cells += [f"{errors[name]:.0e}" for name in names] if errors else ["refused", "-", "-"]
        losses = sorted({f"{errors['loss']:.6f}" for errors in row.values()})
        lines.append(f"| {case} | {' | '.join(cells)} | {', '.join(losses)} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Measures training under DeepSpeed's ZeRO.")
    parser.add_argument("--page", action="store_true", help="only write the page, from old results")
    arguments = parser.parse_args(argv)
    if not arguments.page:
        RESULT.write_text(json.dumps(measured("python bench/zero.py"), indent=1) + "\n")
    result = json.loads(RESULT.read_text())
    PAGE.write_text(page(result))
    missed = misses(result)
    for miss in missed:
        print(f"missed: {miss}", file=sys.stderr)
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
