"""What prefkern's kernels cost as compiled, and a model of a call's time; no GPU is needed.

usage: python bench/launch_costs.py [--before JSON] [PYTHON ...]

For each architecture, the operator's passes run on meta tensors at the five shapes of
`prefkern bench` on a GPU, and every launch is compiled with the arguments that it gets there:
registers, spills, shared memory, programs that a processor holds. `launch_trace` says what each
launch reads and writes, and `time_model` turns this into time on devices of public figures. Each
PYTHON is an interpreter with another version of Triton; the model is the first one's. `--before`
names an earlier result to compare with. It writes `bench/results/launch-costs.json` and the page
`bench/LAUNCHES.md`.

       python bench/launch_costs.py --compile TARGET [--shapes NAME ...]

prints one report as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULT, PAGE = ROOT / "bench/results/launch-costs.json", ROOT / "bench/LAUNCHES.md"
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# The device whose kernels are listed one by one.
SHOWN = "H200 SXM"


def report(target: str, shapes: list[str] | None = None) -> dict[str, Any]:
    """Compile what the calls launch, in this process, and model their time."""
    import torch
    import triton

    import launch_trace
    import prefkern_kernels as kernels
    import time_model
    from prefkern.objectives import Objective, build
    from prefkern_bench.shapes import GPU
    from prefkern_kernels import tiles
    from support import compile_ahead, instruction_counts

    backend = compile_ahead.compile_for(target).backend
    if backend == "hip":
        # The launchers ask torch for the architecture's tiles.
        torch.version.hip = "offline"
    devices = [device for device in time_model.DEVICES if device.target == target]
    rows: dict[int, dict[str, Any]] = {}

    def row_of(kernel: Any) -> dict[str, Any]:
        """The resources of a compiled kernel."""
        if id(kernel) not in rows:
            constants = constexprs(kernel)
            block = max((v for k, v in constants.items() if k.startswith("BLOCK_")), default=1)
            used = compile_ahead.resources(kernel, backend)
            warps = kernel.metadata.num_warps
            elements = max(block / (devices[0].warp * warps), 1)
            walks_rows = "product_fold" not in kernel.name
            counts = (0.0, 0.0)
            if walks_rows:
                counts = instruction_counts.per_element(kernel, elements, compile_ahead.TOOLS)
            compiled = time_model.Compiled(
                used["REG"] if backend == "cuda" else used["vgpr_count"],
                kernel.metadata.shared,
                warps,
                block,
                *(round(count, 2) for count in counts),
            )
            resident, bound = compiled.resident(devices[0])
            rows[id(kernel)] = {
                "kernel": kernel.name,
                "variant": variant(constants),
                **asdict(compiled),
                "spills": used["STACK"] if backend == "cuda" else used["vgpr_spill_count"],
                "resident": resident,
                "resident_bound": bound,
                "uses": compile_ahead.instructions(kernel),
                "shapes": [],
            }
        return rows[id(kernel)]

    def compiled() -> time_model.Compiled:
        row = row_of(compile_ahead.latest[0])
        if shape.name not in row["shapes"]:
            row["shapes"].append(shape.name)
        names = time_model.Compiled.__dataclass_fields__
        return time_model.Compiled(**{name: row[name] for name in names})

    calls = []
    for shape in (shape for shape in GPU if shapes is None or shape.name in shapes):
        for device in devices:
            tasks = dict(launch_trace.TASKS)
            if shape.name == launch_trace.MORE_AT:
                tasks |= launch_trace.MORE_TASKS
            for name, task in tasks.items():
                workspace_mb = device.workspace_mb(task.gradients.head)
                plan, launches = launch_trace.operator(
                    shape, task, workspace_mb, kernels, compiled, device.upcasts
                )
                costs = time_model.call_cost(launches, device)
                size = (shape.tokens, shape.hidden_size, shape.vocab_size)
                plain = time_model.plain_seconds(*size, plan.operations_nhv, device)
                whole = time_model.total(costs)
                eager = None
                if name in launch_trace.TASKS:
                    made = time_model.call_cost(launch_trace.eager(shape, name), device)
                    eager = time_model.as_record({"": time_model.total(made)})[""]
                calls.append(
                    {
                        "device": device.name,
                        "shape": shape.name,
                        "logits": shape.tokens * shape.vocab_size,
                        "task": name,
                        "nhv": round(plan.operations_nhv, 4),
                        "plain_operations": plan.operations,
                        "forward_tiles": [
                            plan.forward_tiles.token_tile,
                            plan.forward_tiles.vocab_tile,
                        ],
                        "kept_tokens": plan.kept_tokens,
                        "workspace_mb": round(plan.workspace_bytes / 2**20),
                        "plain_ms": round(1e3 * plain, 3),
                        "host_ms": round(1e3 * whole.launches * time_model.HOST, 3),
                        "kernels": time_model.as_record(costs),
                        "total": time_model.as_record({"": whole})[""],
                        "eager": eager,
                    }
                )
        dpo = build("dpo")
        assert isinstance(dpo, Objective)
        compile_ahead.launch_pair_loss(dpo, shape.pairs)
        compiled()
        plain_product = shape.softcap is None
        product = tiles.ProductClass("half", True, plain_product)
        before = len(compile_ahead.compiled)
        compile_ahead.launch_product(
            "half", tiles.PRODUCTS[target][product].candidates[0], softcap=shape.softcap
        )
        for kernel in compile_ahead.compiled[before:]:
            row_of(kernel)["shapes"].append(shape.name)
    versions = {"triton": triton.__version__, "torch": torch.__version__}
    return {"target": target, **versions, "kernels": merged(list(rows.values())), "calls": calls}


def constexprs(kernel: Any) -> dict[str, Any]:
    """A compiled kernel's constexprs by name."""
    names = kernel.src.fn.arg_names
    return {names[place[0]]: value for place, value in kernel.src.constants.items()}


def variant(constants: dict[str, Any]) -> str:
    """What is switched on, and options that are names."""
    on = [
        name.removeprefix("HAS_").lower().replace("_", " ")
        for name, value in constants.items()
        if value is True and name.isupper()
    ]
    return ", ".join(on)


def merged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each variant and block: the most of each resource.

    Triton compiles a kernel again where a size is divisible by 16, or not.
    """
    found: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        key = row["kernel"], row["variant"], row["block"], row["num_warps"]
        kept = found.setdefault(key, row)
        for name in ("registers", "shared", "spills", "instructions", "special"):
            kept[name] = max(kept[name], row[name])
        if row["resident"] < kept["resident"]:
            kept |= {name: row[name] for name in ("resident", "resident_bound")}
        kept["shapes"] = sorted({*kept["shapes"], *row["shapes"]})
    return sorted(found.values(), key=lambda row: (row["kernel"], row["variant"], row["block"]))


def run(python: str, target: str, shapes: list[str] | None = None) -> dict[str, Any]:
    """`report` in another process: Triton is imported there to compile."""
    folders = (ROOT, ROOT / "kernels", ROOT / "bench", ROOT / "tests")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}
    environment.pop("TRITON_INTERPRET", None)
    command = [python, str(Path(__file__).resolve()), "--compile", target]
    command += ["--shapes", *shapes] if shapes else []
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{target}: {done.stderr[-3000:]}")
    return json.loads(done.stdout)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("pythons", nargs="*", metavar="PYTHON", default=[sys.executable])
    parser.add_argument("--before", type=Path, metavar="JSON")
    parser.add_argument("--compile", choices=TARGETS, metavar="TARGET")
    parser.add_argument("--shapes", nargs="+", metavar="NAME")
    parser.add_argument("--json", type=Path, default=RESULT)
    arguments = parser.parse_args(argv)
    if arguments.compile:
        json.dump(report(arguments.compile, arguments.shapes), sys.stdout)
        return 0
    from launch_page import page

    before = json.loads(arguments.before.read_text()) if arguments.before else None
    cases = [(python, target) for python in arguments.pythons for target in TARGETS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reports = list(pool.map(lambda case: run(*case), cases))
    for each in reports[len(TARGETS) :]:
        # The model is the first interpreter's.
        del each["calls"]
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        # The record does not name the paths of the interpreters, only their versions.
        "command": "python bench/launch_costs.py"
        + " --before JSON" * (before is not None)
        + " PYTHON" * len(arguments.pythons),
        "reports": reports,
        "before": {} if before is None else totals(before),
    }
    text = json.dumps(result).replace('{"kernel"', '\n{"kernel"')
    arguments.json.write_text(text.replace('{"device"', '\n{"device"') + "\n")
    if arguments.json == RESULT:
        PAGE.write_text(page(result))
    return 0


def calls_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [call for each in result["reports"] for call in each.get("calls", [])]


def totals(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The time of each call, and its fold's, of a result."""
    return {
        f"{call['device']}, {call['shape']}, {call['task']}": {
            "ms": call["total"]["ms"],
            "hbm_bytes": call["total"]["hbm_bytes"],
            "launches": call["total"]["launches"],
            "forward_tiles": call["forward_tiles"],
            "fold_ms": call["kernels"]["fold"]["ms"],
            "nhv": call["nhv"],
        }
        for call in calls_of(result)
        if "fold" in call["kernels"]
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
