"""The rows of a run, the environment that they were measured in, and their JSON file.

The file is written again after every group of rows, so that an interrupted run keeps its finished
rows. The field `finished` says whether the run reached its end.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import prefkern
from prefkern.training.files import write_json
from prefkern_bench.timing import Failure

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "liger-kernel",
    "trl",
    "cut-cross-entropy",
    "peft",
)
PLAIN_PRODUCT = "plain product"


@dataclass
class Row:
    """The measurements of one provider on one task at one shape; None: not measured."""

    suite: str  # "operator" | "loss" | "step"
    shape: str  # name of the shape or of the model
    task: str  # "forward" | "frozen" | "trainable"; in suite "step": "lora" | "full"
    provider: str
    tokens: int  # N, scored
    failure: str | None = None  # why there are no numbers, in one line
    traceback: str | None = None  # of a failure that was not foreseen
    note: str | None = None  # what a number leaves out
    operations: int | None = None  # counted operations of the matrix products
    operations_nhv: float | None = None  # the same in units of N H V
    peak_mib: float | None = None  # peak memory beyond the inputs
    median_ms: float | None = None
    all_ms: list[float] | None = None
    processor_ms: float | None = None  # median of the processor time; None on a GPU
    # Time (on a CPU processor time) divided by the time of a plain product, timed in the same
    # rounds. For product_ratio the product has as many operations as were counted; for floor_ratio,
    # the fewest that the task needs (2, 4, 6 NHV, and 2 more with a reference).
    product_ratio: float | None = None
    floor_ratio: float | None = None
    # Errors against float64: nats, and |x - truth| / |truth|.
    token_logp_error: float | None = None  # the worst
    token_logp_mean_error: float | None = None
    sum_logp_error: float | None = None  # the worst over sequences
    sum_logp_mean_error: float | None = None
    dhidden_error: float | None = None
    dweight_error: float | None = None
    plan: dict[str, Any] | None = None  # prefkern's plan

    def fail(self, failure: Failure) -> None:
        self.failure, self.traceback = str(failure), failure.traceback

    def add_note(self, note: str | None) -> None:
        if note:
            self.note = f"{self.note}; {note}" if self.note else note


@dataclass
class Report:
    """All rows of a run, and the JSON file that keeps them."""

    about: dict[str, Any]
    rows: list[Row]
    path: Path | None

    def add(self, rows: Iterable[Row]) -> None:
        self.rows += rows
        self.write(finished=False)

    def as_dict(self, finished: bool) -> dict[str, Any]:
        rows = [asdict(row) for row in self.rows]
        return self.about | {"finished": finished, "rows": rows}

    def write(self, finished: bool) -> None:
        if self.path is None:
            return
        write_json(self.path, self.as_dict(finished), indent=1)


def environment(device: torch.device, command: str) -> dict[str, Any]:
    """The machine, the versions and the command that the numbers belong to."""
    versions: dict[str, str | None] = {
        "python": platform.python_version(),
        "prefkern": prefkern.__version__,
    }
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    # torch.__version__ names the build (+cpu, +cu128); the package's metadata may not.
    versions["torch"] = torch.__version__
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_cpu_name()}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": name,
        "device_type": device.type,
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "command": command,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
