"""Times every tile configuration of `product_fold`, and the library's product: `-m gpu_day.tiles`.

What decides between the two ways of a forward, and which configuration is first in the table of
`prefkern_kernels.tiles`: at each shape, with all its tokens, the milliseconds of each candidate,
and of log-probs with a product of the library and a fold after it.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton

import prefkern
import prefkern_kernels
from prefkern.training.files import write_json
from prefkern_bench.problem import make_problem
from prefkern_bench.shapes import KNOWN, Shape
from prefkern_bench.timing import time_of
from prefkern_kernels import autotune


def times_of(shape: Shape, device: torch.device) -> dict[str, Any]:
    """The milliseconds at one shape."""
    problem = make_problem(shape, torch.bfloat16, device, padded=False)
    hidden, labels = problem.hidden.flatten(0, 1), problem.labels.flatten()

    def milliseconds(run: Any) -> float:
        if device.type == "cuda":
            return triton.testing.do_bench(run, warmup=20, rep=200, return_mode="median")
        return time_of(run, device).wall

    def library() -> None:
        with torch.no_grad():
            prefkern.linear_logprobs(hidden, problem.weight, labels, softcap=problem.softcap)

    prefkern_kernels.tune_product_fold(
        hidden, problem.weight, softcap=problem.softcap, timer=milliseconds
    )
    (entry,) = json.loads(autotune.cache_path().read_text())["entries"].values()
    return {
        "shape": shape.name,
        "library_ms": milliseconds(library),
        "fastest": entry["config"],
        "candidates": entry["milliseconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--shapes", nargs="+", required=True)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    os.environ["PREFKERN_PRODUCT_FOLD"] = "0"
    rows: list[dict[str, Any]] = []
    for name in arguments.shapes:
        # Not into the user's own file of configurations.
        with tempfile.TemporaryDirectory() as folder:
            os.environ["XDG_CACHE_HOME"] = folder
            rows.append(times_of(KNOWN[name], device))
        write_json(arguments.json, {"rows": rows}, indent=1)


if __name__ == "__main__":
    main()
