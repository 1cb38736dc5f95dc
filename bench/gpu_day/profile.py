"""One call of the operator, kernel by kernel: `python -m gpu_day.profile --json FILE`.

Log-probs at the head of Llama-3-8B, forward; with a frozen head; with a trained one, also with so
small a workspace that logits are computed again; and forward with the product in the kernel. For
each call: its time between events, and of every kernel the launches and the microseconds that
torch's profiler saw. What the kernels do not account for is launching and waiting.

`--dry`: a tiny shape on a CPU, where the profiler sees operators in place of kernels.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from prefkern.training.files import write_json
from prefkern_bench.problem import Problem, make_problem
from prefkern_bench.providers import Prefkern, PrefkernInOneKernel
from prefkern_bench.shapes import KNOWN
from prefkern_bench.timing import time_of

SHAPE, DRY_SHAPE = "Llama-3-8B", "tiny"
WARM_UP, ROUNDS = 2, 5


def call(provider: Prefkern, problem: Problem, task: str) -> None:
    """Forward, and for the other two tasks backward with a gradient of ones."""
    weight = problem.weight.detach().requires_grad_(task == "trainable")
    hidden = problem.hidden.detach().requires_grad_(task != "forward")
    with torch.set_grad_enabled(task != "forward"):
        scores = provider.score(problem._replace(hidden=hidden, weight=weight))
    if task != "forward":
        scores.sums.sum().backward()


def kernels_of(run: Any, device: torch.device) -> list[dict[str, Any]]:
    """Each kernel's launches and microseconds in one run, the longest first."""
    is_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])]
    with profile(activities=activities) as profiler:
        run()
        if is_gpu:
            torch.cuda.synchronize(device)
    wanted = DeviceType.CUDA if is_gpu else DeviceType.CPU
    rows = [
        {
            "kernel": event.key,
            "launches": event.count,
            "us": event.self_device_time_total if is_gpu else event.self_cpu_time_total,
        }
        for event in profiler.key_averages()
        if event.device_type == wanted
    ]
    return sorted((row for row in rows if row["us"]), key=lambda row: -row["us"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--dry", action="store_true")
    arguments = parser.parse_args()
    device = torch.device("cpu" if arguments.dry else "cuda")
    shape = KNOWN[DRY_SHAPE if arguments.dry else SHAPE]
    problem = make_problem(shape, torch.bfloat16, device, padded=False)
    result: dict[str, Any] = {
        "shape": shape.name,
        "tokens": shape.tokens,
        "hidden_size": shape.hidden_size,
        "vocab_size": shape.vocab_size,
        "calls": [],
    }
    ways = {
        "forward": ("forward", Prefkern()),
        "frozen": ("frozen", Prefkern()),
        "trained": ("trainable", Prefkern()),
        "trained, in 1 GiB": ("trainable", Prefkern(workspace_mb=1024)),
    }
    if not arguments.dry:
        ways["forward, product in the kernel"] = ("forward", PrefkernInOneKernel(None, device))
    for name, (task, provider) in ways.items():
        run = functools.partial(call, provider, problem, task)
        for _ in range(WARM_UP):
            run()
        times = [time_of(run, device).wall for _ in range(ROUNDS)]
        row = {"call": name, "ms": statistics.median(times), "plan": provider.plan()}
        result["calls"].append(row | {"kernels": kernels_of(run, device)})
        write_json(arguments.json, result, indent=1)


if __name__ == "__main__":
    main()
