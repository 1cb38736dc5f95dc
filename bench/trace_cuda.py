"""The CUDA path without a GPU: every kind of call on fake CUDA tensors; writes bench/TRACE.md.

usage: python bench/trace_cuda.py [--only TEXT] [--check]        (make trace-cuda sets it all up)

Needs a CUDA build of torch, no GPU and no driver. `--only` traces the cases whose names contain a
text, and writes nothing. `--check` compares another version of torch with the record, and adds to
it how that went.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import traceback
import warnings
from collections import Counter
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "bench/results/trace-cuda.json"
PAGE = ROOT / "bench/TRACE.md"


def traced(case: Any, inject: contextlib.AbstractContextManager | None = None) -> dict[str, Any]:
    """What a case did, and what is wrong about it."""
    from prefkern.ops import plan as plans
    from tracing import expected, machine, watch

    made: list[plans.Plan] = []
    real = plans.make_plan

    def make(**options: Any) -> plans.Plan:
        made.append(real(**options))
        return made[-1]

    case.prepare()
    error = None
    with (
        machine.pretended(),
        mock.patch.dict("os.environ", case.environment),
        inject or contextlib.nullcontext(),
        case.context(),
    ):
        if case.warm:
            with watch.Watch(case.answers).recording():
                case.run()
        seen = watch.Watch(case.answers)
        with seen.recording(), mock.patch.object(plans, "make_plan", make):
            try:
                case.run()
            # Any error of a call is a finding about it.
            except Exception as raised:  # noqa: BLE001
                error = raised
    findings = [*seen.findings]
    if error is not None:
        last = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split())[:300]
        findings.append(f"raises {type(error).__name__} in {last.name}: {text}")
    promised = expected.Promise()
    for plan in made if case.plans == "all" else made[-1:]:
        runs_backward = case.backward and plan.structure != "forward"
        promised += expected.of_plan(plan, runs_backward, case.product_parts, case.sums_bias)
    promised.launches += Counter({"_pair_loss_kernel": case.pair_losses})
    findings += expected.differences(promised, seen)
    for where in {**case.waits, **seen.waits}:
        got, want = seen.waits[where], case.waits.get(where, 0)
        if got != want:
            findings.append(f"waits for the device {got} times, promised {want}: {where}")
    if sum(seen.collectives.values()) != case.collectives:
        findings.append(f"all-reduces: {dict(seen.collectives)}, promised {case.collectives}")
    return {
        "group": case.group,
        "case": case.name,
        "structure": [plan.structure for plan in made],
        "launches": {
            name.removeprefix("_").removesuffix("_kernel"): count
            for name, count in sorted(seen.launches.items())
        },
        "products": seen.products,
        "operations": seen.operations,
        "starts": sum(seen.started.values()) + sum(seen.launches.values()),
        "waits": dict(sorted(seen.waits.items())),
        "all_reduces": sum(seen.collectives.values()),
        "operators": sorted(seen.operators),
        "findings": findings,
    }


def report(only: str = "") -> dict[str, Any]:
    """Trace all cases, and all faults."""
    from tracing import cases, faults, groups, models

    rows, operators = [], set()
    for case in [*cases.all_cases(), *groups.all_cases(), *models.model_cases()]:
        if only not in f"{case.group}: {case.name}":
            continue
        row = traced(case)
        operators |= {*row.pop("operators")}
        rows.append(row)
        for finding in row["findings"]:
            print(f"{case.group}: {case.name}: {finding}")
    injected = []
    for fault in faults.all_faults() if not only else ():
        findings = traced(fault.case, fault.inject())["findings"]
        named = [text for text in findings if fault.said in text]
        injected.append({"fault": fault.name, "named": named[0] if named else None})
        if not named:
            print(f"not named: {fault.name}; {findings}")
    versions = {
        name: metadata.version(name) for name in ("torch", "triton", "transformers", "peft")
    }
    return {
        "date": date.today().isoformat(),
        "versions": {**versions, "torch": _torch_version()},
        "cases": rows,
        "faults": injected,
        "operators": sorted(operators),
    }


def _torch_version() -> str:
    import torch

    return torch.__version__


def misses(result: dict[str, Any]) -> list[str]:
    """What does not hold."""
    found = [
        f"{row['group']}: {row['case']}: {text}"
        for row in result["cases"]
        for text in row["findings"]
    ]
    return found + [f"not named: {row['fault']}" for row in result["faults"] if not row["named"]]


HEAD = """\
# The CUDA path, traced without a GPU

Written by `python bench/trace_cuda.py` (`make trace-cuda` sets it up) on {date} with {versions}. Each call runs on fake CUDA tensors: they have a
device, a dtype, a shape and strides, and no memory. Launches of Triton kernels are recorded and not run.
So this shows no number and no time. It shows, for {count} calls:

- each tensor that a kernel gets is on the call's GPU, which is not the current one, and so is the launch;
- each product has dtypes and strides that CUDA's library takes without a copy;
- no tensor of the CPU meets one of the GPU, and CUDA has each of the {operators} operators of torch that ran;
- the host waits for the device only where that is promised;
- launches, products and their operations are those that the [plan](../docs/operator.md) gives, exactly.

The sizes are 8 rows of 512 tokens with half of them scored, H = 1024, V = 32000, bfloat16, unless a line says
otherwise. *Starts* are the launches and operators that start something on the device, forward and backward.
"""


def differences(result: dict[str, Any], record: dict[str, Any]) -> list[str]:
    """What a result has otherwise than the record: launches, products, waits and all-reduces."""
    names = ("launches", "products", "operations", "waits", "all_reduces")
    before = {(row["group"], row["case"]): row for row in record["cases"]}
    after = {(row["group"], row["case"]): row for row in result["cases"]}
    found = [
        f"{group}: {case}: in one of them alone" for group, case in before.keys() ^ after.keys()
    ]
    for key in before.keys() & after.keys():
        for name in names:
            if before[key][name] != after[key][name]:
                was, now = before[key][name], after[key][name]
                found.append(f"{key[0]}: {key[1]}: {name} {now}, recorded {was}")
    return sorted(found)


def page(result: dict[str, Any]) -> str:
    """The page of a result."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        HEAD.format(
            date=result["date"],
            versions=versions,
            count=len(result["cases"]),
            operators=len(result["operators"]),
        )
    ]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in result["cases"]:
        groups.setdefault(row["group"].partition(",")[0], []).append(row)
    for version, row in result.get("checked", {}).items():
        lines.append(
            f"Torch {version} with Triton {row['triton']}, on {row['date']}: {row['calls']} calls, "
            f"{row['faults']} faults, {len(row['misses'])} misses, {len(row['differences'])} "
            "differences."
        )
    for name, rows in groups.items():
        lines += [
            f"\n## {name[0].upper()}{name[1:]}\n",
            "| call | kernels | products | starts | waits for the device |",
            "|---|---|---|---|---|",
        ]
        for row in rows:
            kind = row["group"].partition(", ")[2]
            call = f"{kind}: {row['case']}" if kind else row["case"]
            kernels = ", ".join(f"{name} {n}" for name, n in row["launches"].items()) or "-"
            waits = ", ".join(_shown(where, n) for where, n in row["waits"].items()) or "-"
            found = "".join(f"; **{text}**" for text in row["findings"])
            lines.append(
                f"| {call} | {kernels} | {row['products']} | {row['starts']} | {waits}{found} |"
            )
    lines += [
        "\n## Faults that were put in\n",
        "Each of these was put into the source, and the trace named it:\n",
        "| fault | named as |",
        "|---|---|",
        *(f"| {row['fault']} | {_cell(row['named'])} |" for row in result["faults"]),
    ]
    return "\n".join(lines) + "\n"


def _shown(where: str, count: int) -> str:
    path = where.partition(" ")[0]
    file, _, function = path.partition(":")
    name = f"`{Path(file).stem}.{function}`"
    return name if count == 1 else f"{name} x {count}"


def _cell(text: str | None) -> str:
    return "**nothing**" if text is None else text.replace("|", "\\|")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains it")
    parser.add_argument("--check", action="store_true", help="compare, and add to the record")
    arguments = parser.parse_args(argv)
    import torch

    if not torch.backends.cuda.is_built():
        parser.error(
            f"this torch, {torch.__version__}, is no CUDA build; make trace-cuda TORCH=... takes "
            "another version or the address of a wheel"
        )
    warnings.simplefilter("ignore")
    result = report(arguments.only)
    missed = misses(result)
    print(f"{len(result['cases'])} calls, {len(result['faults'])} faults, {len(missed)} misses")
    if arguments.only:
        return int(bool(missed))
    if arguments.check:
        record = json.loads(RESULT.read_text())
        differing = differences(result, record)
        print("\n".join(differing) or "no difference from the record")
        record.setdefault("checked", {})[result["versions"]["torch"]] = {
            "triton": result["versions"]["triton"],
            "date": result["date"],
            "calls": len(result["cases"]),
            "faults": len(result["faults"]),
            "misses": missed,
            "differences": differing,
        }
        result, missed = record, [*missed, *differing]
    RESULT.write_text(json.dumps(result).replace('{"group"', '\n{"group"') + "\n")
    PAGE.write_text(page(result))
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
