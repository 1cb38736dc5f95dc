"""Everything that prefkern asks of a GPU, in one command of at most eight minutes: `make gpu`.

usage: python bench/gpu.py [--wheels FOLDER] [--results FOLDER] [--stages NAME ...] [--again NAME ...]
                           [--seconds N] [--dry | --page]

Seven stages in the order of what matters: `prefkern check`; kernel, guard, determinism and gradient
tests; log-probs beside the peers; a training step; a profile by kernel; memcheck; CUDA graphs,
torch.compile, fp16 and memory that runs out. A stage is one or more commands, each in a process of
its own with a limit of time. One that fails or hangs is a result, with its error, and the next one
runs. A stage writes gpu-NAME.json after each command. What is done there already is skipped, so the
same line again runs what failed or found no time.

It needs torch, Triton, transformers, peft, pytest, hypothesis and rich, and no network. The peers
(liger-kernel, trl, cut-cross-entropy) can be brought as wheels: --wheels names their folder, and
they are installed without their dependencies into a folder of their own. A package that is missing
is a row or a test that says so.

It ends with a page of verdicts, each a claim, what was measured, and whether it holds. --page only
writes the page from results that are there. --dry runs the same commands on a CPU, with tiny shapes
and Triton's interpreter, into a temporary folder: its figures mean nothing, it shows that every
command runs.

Exit status: 0 if everything ran and every claim holds, 1 if not, 2 if nothing could be run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PATHS = [str(ROOT / folder) for folder in (".", "kernels", "bench", "tests")]
sys.path[:0] = PATHS

from gpu_day import runs, stages, verdicts
from gpu_day.stages import RESULT, Part, Stage
from prefkern.training.files import write_atomically, write_json

RESULTS = ROOT / "bench/results"
PAGE = ROOT / "bench/GPU.md"
SECONDS = 480.0
DRY_SECONDS = 3600.0
# A command that has less than this is not begun.
LEAST = 8.0
SITE = Path(tempfile.gettempdir()) / "prefkern-gpu-site"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    names = [stage.name for stage in stages.real()]
    parser = argparse.ArgumentParser(
        prog="python bench/gpu.py", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="wheels of the peers")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="default: bench/results")
    parser.add_argument("--stages", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument(
        "--again", nargs="+", choices=names, default=[], metavar="NAME",
        help="run these anew, whatever is there",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, help=f"the most in all; default: {SECONDS:g}")
    parser.add_argument("--dry", action="store_true", help="the same on a CPU, to try the script")
    parser.add_argument("--page", action="store_true", help="write the page of existing results")
    arguments = parser.parse_args(argv)
    if arguments.wheels and not [*arguments.wheels.glob("*.whl")]:
        parser.error(f"--wheels: there is no wheel in {arguments.wheels}")
    if arguments.results is None:
        arguments.results = RESULTS
        if arguments.dry:
            arguments.results = Path(tempfile.mkdtemp(prefix="prefkern-gpu-dry-"))
    if arguments.dry and arguments.results.resolve() == RESULTS.resolve():
        parser.error("--dry: bench/results is for figures of a GPU; give another --results")
    if not arguments.results.is_dir():
        parser.error(f"--results: there is no folder {arguments.results}")
    if arguments.seconds is None:
        arguments.seconds = DRY_SECONDS if arguments.dry else SECONDS
    return arguments


def main(argv: Sequence[str]) -> int:
    begin = time.monotonic()
    arguments = parse(argv)
    folder: Path = arguments.results
    if arguments.page:
        return show(folder)
    environment = environment_of(arguments.dry)
    if arguments.wheels:
        install(arguments.wheels, environment)
    about, why = looked_at(environment)
    if about is None or (about["device_type"] != "cuda" and not arguments.dry):
        why = why or "torch sees no GPU; --dry tries the commands on a CPU"
        print(f"gpu: nothing was run: {why}", file=sys.stderr)
        return 2
    about["dry"] = arguments.dry
    others = of_others(folder, about)
    if others:
        print(
            f"gpu: nothing was run: {', '.join(others)} in {folder} are of another machine or other "
            "versions; give another --results, or delete them",
            file=sys.stderr,
        )
        return 2
    print(f"{about['device']}; {versions(about)}; results in {folder}", flush=True)
    planned = stages.dry() if arguments.dry else stages.real()
    planned = [stage for stage in planned if stage.name in arguments.stages]
    whole = sum(stage.seconds for stage in planned)
    share = 0.0
    for stage in planned:
        # Cumulative: the time that a stage leaves is the next one's.
        share += stage.seconds / whole
        deadline = begin + arguments.seconds * share
        print(stage.title, flush=True)
        try:
            run(stage, folder, about, environment, deadline, stage.name in arguments.again)
        except Exception:  # noqa: BLE001, the next stage runs whatever happened to this one
            note_broken(stage, folder, about, traceback.format_exc())
    print(f"{time.monotonic() - begin:.0f} s in all", flush=True)
    return show(folder)


def run(
    stage: Stage,
    folder: Path,
    about: dict[str, Any],
    environment: dict[str, str],
    deadline: float,
    again: bool = False,
) -> None:
    """Run the parts of a stage that are not done yet; its file is written after each."""
    path = file_of(folder, stage.name)
    record = read(path)
    if record is None or again:
        record = blank(stage, about)
    record.pop("broken", None)
    kept: dict[str, Any] = record["parts"]
    for part in stage.parts:
        if kept.get(part.name, {}).get("status") in ("done", "absent"):
            print(f"  {part.name}: there already", flush=True)
            continue
        limit = min(part.seconds, deadline - time.monotonic())
        if limit < min(LEAST, part.seconds):
            # An earlier outcome says more.
            outcome = kept.setdefault(part.name, runs.not_begun(part))
            print(f"  {part.name}: {outcome['status']}", flush=True)
        else:
            kept[part.name] = outcome = runs.run(part, limit, environment)
            why = f": {outcome['error'].splitlines()[-1]}" if outcome["error"] else ""
            print(
                f"  {part.name}: {outcome['status']}, {outcome['seconds']:.0f} s{why}", flush=True
            )
        write_json(path, record, indent=1)


def note_broken(stage: Stage, folder: Path, about: dict[str, Any], trace: str) -> None:
    """Print where this script itself broke, and keep it in the stage's file if that can be written."""
    print(f"  {stage.name}: {trace}", flush=True)
    path = file_of(folder, stage.name)
    record = read(path) or blank(stage, about)
    record["broken"] = trace
    try:
        write_json(path, record, indent=1)
    except OSError as error:
        print(f"  {path}: cannot be written: {error}", flush=True)


def blank(stage: Stage, about: dict[str, Any]) -> dict[str, Any]:
    """The record of a stage of which nothing has run."""
    return {**about, "stage": stage.name, "title": stage.title, "parts": {}}


def show(folder: Path) -> int:
    """Print the page of verdicts and write it; 0 if everything ran and every claim holds."""
    records = {stage.name: read(file_of(folder, stage.name)) for stage in stages.real()}
    found = {name: record for name, record in records.items() if record is not None}
    if not found:
        print(f"gpu: there are no results in {folder}", file=sys.stderr)
        return 2
    model = model_of(RESULTS)
    judged = verdicts.judged(found, model)
    print(verdicts.text(found, judged))
    path = PAGE if folder.resolve() == RESULTS.resolve() else folder / "gpu.md"
    write_atomically(path, verdicts.page(found, judged, model))
    print(f"wrote {path}")
    complete = len(found) == len(records) and all(map(verdicts.is_complete, found.values()))
    return int(not complete or any(each.holds is False for each in judged))


def file_of(folder: Path, stage: str) -> Path:
    return folder / f"gpu-{stage}.json"


def read(path: Path) -> dict[str, Any] | None:
    """A result; None, with a word, if there is none that can be read."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        print(f"  {path}: cannot be read, and is left out: {error}", flush=True)
        return None


def model_of(folder: Path) -> dict[str, Any] | None:
    """The model of time, kernel by kernel, if one was written (`bench/launch_costs.py`)."""
    paths = sorted(folder.glob("launch-costs*.json"))
    return read(paths[-1]) if paths else None


def of_others(folder: Path, about: dict[str, Any]) -> list[str]:
    """The results that are of another machine, other versions, or of a dry run."""
    keys = ("device", "versions", "dry")
    paths = [file_of(folder, stage.name) for stage in stages.real()]
    records = [(path.name, read(path)) for path in paths]
    return [
        name
        for name, record in records
        if record is not None and any(record.get(key) != about[key] for key in keys)
    ]


def versions(about: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)


def environment_of(dry: bool) -> dict[str, str]:
    """The environment of every command: this tree and the peers on the path, and no network."""
    made = {
        **os.environ,
        # Before what is installed; the peers come last.
        "PYTHONPATH": os.pathsep.join([*PATHS, str(SITE)]),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    made.pop("TRITON_INTERPRET", None)
    if dry:
        made |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return made


def install(wheels: Path, environment: dict[str, str]) -> None:
    """Install the wheels into a folder of their own; those that are there already are not again."""
    paths = sorted(wheels.glob("*.whl"))
    for path in paths:
        done = SITE / f".{path.name}"
        if done.exists():
            continue
        # Each alone: one that does not fit this machine must not keep out the others.
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
        command += ["--no-compile", "--upgrade", "--target", str(SITE), str(path)]
        installed = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        if installed.returncode:
            print(f"wheel {path.name}: {installed.stderr.strip().splitlines()[-1]}", flush=True)
        else:
            done.touch()


def looked_at(environment: dict[str, str]) -> tuple[dict[str, Any] | None, str | None]:
    """The machine and its versions, or why they cannot be had."""
    part = Part("about", ["-m", "gpu_day.about", "--json", RESULT], 120)
    outcome = runs.run(part, part.seconds, environment)
    return outcome["result"], outcome["error"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
