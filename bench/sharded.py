"""Measures how far training under FSDP2 and DeepSpeed's ZeRO is from one process on the joint batch.

usage: python bench/sharded.py [--page]     (make test-zero; exit status 1 if a bound is missed)

The cases are those of `tests/support/{fsdp,zero}.py`, on two gloo ranks of a CPU, with tiny models. This
writes bench/results/sharded-cpu.json, and from that the page bench/SHARDED.md. With --page it writes only
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

PAGE = ROOT / "bench/SHARDED.md"
RESULT = ROOT / "bench/results/sharded-cpu.json"
MODES = ("FSDP2", "ZeRO-2", "ZeRO-3")
BOUND, BOUND_BF16 = 1e-5, 0.1
HEAD = """\
# FSDP2, ZeRO-2 and ZeRO-3 against one process

Two gloo ranks of a CPU, sharded, and one process on the joint batch: tiny models, two steps
of SGD. *gradient*: the worst difference of a parameter's gradient before an optimiser step, relative
to its norm. *weight*: the worst difference of a weight. *log*: the worst difference of a logged
number, relative where that is above 1. *first loss*: of the two ranks. DPO between equal models
starts at ln 2 = 0.693147. In bfloat16 FSDP2 and DeepSpeed cast weights, and one process, by
autocast, the operands of products: the two round at other places. A dash: refused before anything
is loaded, or a case of the other mode's own.
"""


def measured(command: str) -> dict[str, Any]:
    from support import fsdp, zero

    cases = {
        "FSDP2": list(fsdp.CASES),
        **{f"ZeRO-{stage}": zero.cases_of(stage) for stage in (2, 3)},
    }
    rows: dict[str, dict[str, Any]] = {case: {} for case in {**fsdp.CASES, **zero.CASES}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for mode, names in cases.items():
            for part in (names[::2], names[1::2]):
                launch = fsdp.launch if mode == "FSDP2" else zero.launch
                launch(folder, int(mode[-1]), *part)
                for case in part:
                    rows[case][mode] = worst(folder, case)
    report = environment(torch.device("cpu"), command)
    report["versions"] |= {name: metadata.version(name) for name in ("accelerate", "deepspeed")}
    return report | {"rows": rows}


def worst(folder: Path, case: str) -> dict[str, float]:
    """The worst errors of both ranks, and the first loss."""
    from support import fsdp, zero

    kept = folder / f"one process, {case}.pt"
    if not kept.exists():
        cases = {**fsdp.CASES, **zero.CASES}
        torch.save(fsdp.outcome_of(folder / kept.stem, case, 1, cases=cases), kept)
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
        f"| case | {' | '.join(f'{mode}: gradient | weight | log' for mode in MODES)} | first loss |",
        f"|---|{'---|' * (3 * len(MODES) + 1)}",
    ]
    for case, row in result["rows"].items():
        cells = []
        for mode in MODES:
            errors = row.get(mode)
            names = ("gradients", "weights", "logs")
            cells += [f"{errors[name]:.0e}" for name in names] if errors else ["-", "-", "-"]
        losses = sorted({f"{errors['loss']:.6f}" for errors in row.values()})
        lines.append(f"| {case} | {' | '.join(cells)} | {', '.join(losses)} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Measures sharded training.")
    parser.add_argument("--page", action="store_true", help="only write the page, from old results")
    arguments = parser.parse_args(argv)
    if not arguments.page:
        RESULT.write_text(json.dumps(measured("python bench/sharded.py"), indent=1) + "\n")
    result = json.loads(RESULT.read_text())
    PAGE.write_text(page(result))
    missed = misses(result)
    for miss in missed:
        print(f"missed: {miss}", file=sys.stderr)
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
