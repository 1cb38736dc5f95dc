"""The processor time from a command to its help or its error, before anything is loaded.

usage: python bench/startup.py [--json PATH] [--repeats N]      (exit status 1 if a bound is missed)

Each command line is a process of its own with one thread. Its time is user plus system time, and
the figure is the least over the repeats, taken in turns: other work on the machine can only add to
it, by the caches and the memory that it shares. Help and usage errors must take less than 0.7 s. Errors about files and
options must take less than 2 s: of these, some need torch, since they build an objective.
"""

from __future__ import annotations

import argparse
import os
import resource
import shlex
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table

from prefkern.training.files import write_json
from prefkern_bench import environment

ROOT = Path(__file__).parent.parent
HELP, FILES = 0.7, 2.0  # seconds
RUN = "--model hub/name --dataset hub/name"
LINES = {
    "--help": HELP,
    "--version": HELP,
    **{f"{command} --help": HELP for command in ("train", "margins", "plan", "check", "bench")},
    **{f"{command} --no_such": HELP for command in ("train", "margins", "plan", "check", "bench")},
    "train --use_peft true": HELP,
    "train none.yaml": FILES,
    "train broken.yaml": FILES,
    "train unknown.yaml": FILES,
    "train --learning_rate fast": FILES,
    "train --model hub/name --dataset none.jsonl": FILES,
    "train --model ./none --dataset hub/name": FILES,
    f"train {RUN} --objective sigmoyd": FILES,
    f"train {RUN} --objective_options " + shlex.quote('{"klip": 1}'): FILES,
    f"train {RUN} --max_length 1": FILES,
    "margins --model hub/name --dataset none.jsonl --output out.jsonl": FILES,
    "margins --model hub/name --dataset hub/name --output none/out.jsonl": FILES,
    "plan ./none --seq-len 8 --batch 1": FILES,
    "bench --shapes none": FILES,
    "bench --json none/x.json": FILES,
}
CONFIGS = {"broken.yaml": "beta: [1\n", "unknown.yaml": "lora_alhpa: 4\n"}


@dataclass
class Row:
    line: str
    bound: float
    status: int
    said: str  # the last line of the output
    seconds: list[float] = field(default_factory=list)

    @property
    def least(self) -> float:
        return min(self.seconds)


def measure(line: str, bound: float, folder: str) -> Row:
    """One run of a command line."""
    paths = os.pathsep.join(str(ROOT / each) for each in (".", "kernels", "bench"))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run(
        [sys.executable, "-m", "prefkern.cli", *shlex.split(line)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    said = (run.stdout + run.stderr).strip().splitlines()
    return Row(line, bound, run.returncode, said[-1] if said else "", [round(seconds, 3)])


def misses(row: Row) -> list[str]:
    """What is wrong with a row: its time, or that the command did something else than it should."""
    shows = row.line.split()[-1] in ("--help", "--version")
    found = [] if row.status == (0 if shows else 2) else [f"exit status {row.status}"]
    return found + ([] if row.least < row.bound else [f"{row.least:.2f} s of {row.bound}"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--json", type=Path, metavar="PATH")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args(argv)
    rows: dict[str, Row] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, text in CONFIGS.items():
            Path(folder, name).write_text(text)
        turns = [line for _ in range(arguments.repeats) for line in LINES]
        for line in track(turns, "measuring", transient=True):
            row = measure(line, LINES[line], folder)
            rows.setdefault(line, Row(line, row.bound, row.status, row.said)).seconds += row.seconds
    table = Table(box=SIMPLE)
    for column in ("prefkern ...", "s", "bound", ""):
        table.add_column(column)
    failed = 0
    for row in rows.values():
        wrong = "; ".join(misses(row))
        failed += bool(wrong)
        table.add_row(row.line, f"{row.least:.2f}", f"{row.bound}", wrong)
    Console(width=120).print(table)
    if arguments.json:
        given = sys.argv[1:] if argv is None else argv
        about = environment(torch.device("cpu"), shlex.join(["python", "bench/startup.py", *given]))
        table_rows = [{**asdict(row), "least": row.least} for row in rows.values()]
        write_json(arguments.json, {**about, "rows": table_rows}, indent=1)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
