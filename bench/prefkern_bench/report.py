"""Rows, what they belong to, and the JSON file that keeps them.

The file is written anew after every group of rows, so that a run that is stopped leaves what it has
finished; `finished` says whether it came to its end.
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
    """What was measured of one provider at one task of one shape; None where it was not."""

    suite: str  # "operator" | "loss" | "step"
    shape: str  # its name, or the model's
    task: str  # "forward" | "frozen" | "trainable"; of a step, "lora" | "full"
    provider: str
    tokens: int  # N, scored
    failure: str | None = None  # why there is nothing, in one line
    note: str | None = None  # what a number leaves out
    operations: int | None = None  # of matrix products, counted
    operations_nhv: float | None = None  # the same in units of N H V
    peak_mib: float | None = None  # most memory alive beyond the inputs
    median_ms: float | None = None
    all_ms: list[float] | None = None
    # Time over that of plain products, timed in the same rounds: of as many operations as were
    # counted, and of the fewest that the task takes (2, 4, 6 NHV; the reference's 2 besides).
    product_ratio: float | None = None
    floor_ratio: float | None = None
    # Errors against float64: nats, and |x - truth| / |truth|.
    token_logp_error: float | None = None  # the worst
    token_logp_mean_error: float | None = None
    sum_logp_error: float | None = None  # of a sequence, the worst
    sum_logp_mean_error: float | None = None
    dhidden_error: float | None = None
    dweight_error: float | None = None
    plan: dict[str, Any] | None = None  # prefkern's

    def add_note(self, note: str | None) -> None:
        if note:
            self.note = f"{self.note}; {note}" if self.note else note


@dataclass
class Report:
    """All rows of a run, and the file that they are kept in."""

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
    """What the numbers belong to."""
    versions: dict[str, str | None] = {
        "python": platform.python_version(),
        "prefkern": prefkern.__version__,
    }
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    # Which says what it is built for, as its metadata may not.
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
