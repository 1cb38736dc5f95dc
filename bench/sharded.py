"""Measures how far training under FSDP2 and DeepSpeed's ZeRO is from one process on the joint batch.

usage: python bench/sharded.py [--page | --missing]
       (make test-zero; exit status 1 if a bound is missed)

The cases are those of `tests/support/{fsdp,zero,trl_shards,tensor_parallel,context_parallel}.py`, on two
gloo ranks of a CPU, with tiny models. This writes bench/results/sharded-cpu.json, and from that the page bench/SHARDED.md. With --page it
writes only the page, from an existing result; with --missing it measures the cases that the result lacks.
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
PARALLEL, CONTEXT = "tensor parallelism", "context parallelism"
# Before a case of TRL's own trainers.
TRL = "fuse_head: "
BOUND, BOUND_BF16 = 1e-5, 0.1
HEAD = """\
# Sharded training against one process

Two gloo ranks of a CPU, sharded, and one process on the joint batch: tiny models, two steps
of SGD. *gradient*: the worst difference of a parameter's gradient before an optimiser step, relative
to its norm. *weight*: the worst difference of a weight. *log*: the worst difference of a logged
number, relative where that is above 1. *first loss*: of the two ranks. DPO between equal models
starts at ln 2 = 0.693147. In bfloat16 FSDP2 and DeepSpeed cast weights, and one process, by
autocast, the operands of products: the two round at other places. A dash: refused before anything
is loaded, or a case of the other mode's own. *fuse_head*: TRL's own trainers with prefkern's head.
"""
OF_PARALLEL = """
## Tensor parallelism

transformers' `DistributedConfig(tp_size=2)`: both ranks compute each batch together. In bfloat16 a rank's
part of a sum is rounded before the parts are added.
"""
OF_CONTEXT = """
## Context parallelism

Accelerate's `ParallelismConfig(cp_size=2)` under FSDP2: both ranks compute each batch together, and each has a part
of every row. torch's ring attention computes with a CPU's kernel. In bfloat16 as FSDP2.
"""


def measured(command: str, known: dict[str, Any]) -> dict[str, Any]:
    """The errors of all cases; of `known` rows those that are there stay."""
    from support import context_parallel, fsdp, tensor_parallel, trl_shards, zero

    of_trl = [TRL + case for case in trl_shards.CASES]
    cases = {
        "FSDP2": [*fsdp.CASES, *of_trl],
        **{f"ZeRO-{stage}": [*zero.cases_of(stage), *of_trl] for stage in (2, 3)},
        PARALLEL: list(tensor_parallel.CASES),
        CONTEXT: list(context_parallel.CASES),
    }
    every = {each: None for names in cases.values() for each in names}
    rows: dict[str, dict[str, Any]] = {case: {**known.get(case, {})} for case in every}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tensor_parallel.save_models(folder)
        for mode, names in cases.items():
            names = [case for case in names if mode not in rows[case]]
            plain = [case for case in names if not case.startswith(TRL)]
            asking = [case for case in names if case.startswith(TRL)]
            for part in filter(None, (plain[::2], plain[1::2], asking)):
                if part is asking:
                    trl_shards.launch(folder, mode)
                elif mode == PARALLEL:
                    tensor_parallel.launch(folder, *part)
                elif mode == CONTEXT:
                    context_parallel.launch(folder, *part)
                else:
                    launch = fsdp.launch if mode == "FSDP2" else zero.launch
                    launch(folder, int(mode[-1]), *part)
                for case in part:
                    rows[case][mode] = worst(folder, mode, case)
    report = environment(torch.device("cpu"), command)
    report["versions"] |= {name: metadata.version(name) for name in ("accelerate", "deepspeed")}
    return report | {"rows": rows}


def worst(folder: Path, mode: str, case: str) -> dict[str, float]:
    """The worst errors of both ranks, and the first loss."""
    from support import context_parallel, fsdp, tensor_parallel, trl_shards, zero

    of = mode if mode in (PARALLEL, CONTEXT) else "shards"
    kept = folder / f"one process, {case}, {of}.pt"
    name = case.removeprefix(TRL)
    if not kept.exists():
        place = folder / kept.stem
        if mode == PARALLEL:
            outcome = tensor_parallel.outcome_of(place, folder, case, 1)
        elif mode == CONTEXT:
            outcome = context_parallel.outcome_of(place, case, 1)
        elif name != case:
            outcome = trl_shards.outcome_of(place, name, 1)
        else:
            outcome = fsdp.outcome_of(place, case, 1, cases={**fsdp.CASES, **zero.CASES})
        torch.save(outcome, kept)
    expected = torch.load(kept)
    ranks = [torch.load(folder / f"rank{rank}.pt")[name] for rank in range(2)]
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
        *table(result["rows"], MODES),
        OF_PARALLEL,
        *table(result["rows"], (PARALLEL,)),
        OF_CONTEXT,
        *table(result["rows"], (CONTEXT,)),
    ]
    return "\n".join(lines) + "\n"


def table(rows: dict[str, dict[str, Any]], modes: tuple[str, ...]) -> list[str]:
    """The lines of a table of the cases that were measured in one of these modes."""
    lines = [
        f"| case | {' | '.join(f'{mode}: gradient | weight | log' for mode in modes)} | first loss |",
        f"|---|{'---|' * (3 * len(modes) + 1)}",
    ]
    for case, row in rows.items():
        row = {mode: row[mode] for mode in modes if mode in row}
        if not row:
            continue
        cells = []
        for mode in modes:
            errors = row.get(mode)
            names = ("gradients", "weights", "logs")
            cells += [f"{errors[name]:.0e}" for name in names] if errors else ["-", "-", "-"]
        losses = sorted({f"{errors['loss']:.6f}" for errors in row.values()})
        lines.append(f"| {case} | {' | '.join(cells)} | {', '.join(losses)} |")
    return lines


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Measures sharded training.")
    parser.add_argument("--page", action="store_true", help="only write the page, from old results")
    parser.add_argument("--missing", action="store_true", help="only measure what the result lacks")
    arguments = parser.parse_args(argv)
    if not arguments.page:
        known = json.loads(RESULT.read_text())["rows"] if arguments.missing else {}
        RESULT.write_text(json.dumps(measured("python bench/sharded.py", known), indent=1) + "\n")
    result = json.loads(RESULT.read_text())
    PAGE.write_text(page(result))
    missed = misses(result)
    for miss in missed:
        print(f"missed: {miss}", file=sys.stderr)
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
