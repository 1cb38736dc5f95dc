"""The command `prefkern bench`: its options, the order of the runs, and its output.

`parse` reads and checks the options before anything runs. `planned` lists the jobs: every suite at
one shape, then the next shape. `run` measures them, and prints and saves each group of rows as soon
as it is done.
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from prefkern_bench import group, pictures, shapes, step, suites, tables
from prefkern_bench.group import Group, Settings
from prefkern_bench.providers import PROVIDERS
from prefkern_bench.report import Report, environment
from prefkern_bench.timing import release

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SUITES = ("operator", "loss", "step")
TASKS = (*suites.FEWEST, *step.TASKS)


def main(argv: list[str]) -> int:
    """Run the benchmark and print its tables; 1 if prefkern itself failed somewhere."""
    arguments = parse(argv)
    device = torch.device(arguments.device)
    if device.index is not None:
        # CUDA events and synchronisation act on the current device.
        torch.cuda.set_device(device)
    about = environment(device, shlex.join(["prefkern", "bench", *argv]))
    about |= {
        "dtype": arguments.dtype,
        "shapes": [asdict(shape) for shape in arguments.shapes],
        "models": [asdict(model) for model in arguments.models],
    }
    report = Report(about, [], arguments.json)
    settings = Settings(
        providers=arguments.providers,
        tasks=arguments.tasks,
        dtype=DTYPES[arguments.dtype],
        device=device,
        workspace_mb=arguments.workspace_mb,
        warm_up=arguments.warm_up,
        rounds=arguments.repeats,
        seconds=arguments.seconds,
    )
    console = Console()
    if not console.is_terminal:
        console = Console(width=100)
    console.print(f"{about['device']}, torch {about['versions']['torch']}, {arguments.dtype}")
    run(arguments, settings, report, console)
    console.print(tables.LEGEND)
    if device.type != "cuda":
        console.print(tables.CPU_REMARK)
    report.write(finished=True)
    if arguments.pictures:
        arguments.pictures.mkdir(parents=True, exist_ok=True)
        prefix = arguments.json.stem if arguments.json else "bench"
        for path in pictures.draw(report.as_dict(finished=True), arguments.pictures, prefix):
            console.print(f"wrote {path}")
    return int(any(row.failure and row.provider == "prefkern" for row in report.rows))


def run(arguments: Any, settings: Settings, report: Report, console: Console) -> None:
    """Measure all groups of rows in order; print and save each one when it is done."""
    jobs = planned(arguments)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        whole = progress.add_task("all", total=len(jobs))
        for number, (title, groups) in enumerate(jobs):
            for one in groups(settings):
                rows = group.measure(one, settings, progress)
                report.add(rows)
                console.print(tables.table_of(rows, f"{rows[0].suite}, {title}, {rows[0].task}"))
                for remark in tables.remarks(rows):
                    console.print(remark, style="yellow", markup=False, highlight=False)
                del one
                release(settings.device)
            # Shapes are static: code compiled for this shape does not serve another one.
            is_last = number + 1 == len(jobs) or jobs[number + 1][0] != title
            if is_last and settings.device.type == "cuda":
                torch.compiler.reset()
            progress.advance(whole)


Job = tuple[str, Callable[[Settings], Iterator[Group]]]


def planned(arguments: Any) -> list[Job]:
    """The jobs with their titles: every suite at one shape, then the next shape."""
    jobs: list[Job] = []
    for shape in arguments.shapes:
        title = f"{shape.name}: N = {shape.tokens}, H = {shape.hidden_size}, V = {shape.vocab_size}"
        if "operator" in arguments.suite:
            jobs.append((title, lambda settings, s=shape: suites.operator_groups(s, settings)))
        if "loss" in arguments.suite:
            jobs.append((title, lambda settings, s=shape: suites.loss_groups(s, settings)))
    if "step" in arguments.suite:
        for model in arguments.models:
            title = f"{model.name}: {2 * model.pairs} rows of {model.length} tokens"
            jobs.append((title, lambda settings, m=model: step.step_groups(m, settings)))
    if "operator" in arguments.suite and arguments.sweep:
        for shape in [fewer for each in arguments.shapes for fewer in shapes.swept(each)]:
            jobs.append(
                (
                    f"{shape.name}, H = {shape.hidden_size}, V = {shape.vocab_size}",
                    lambda settings, s=shape: suites.operator_groups(s, settings),
                )
            )
    return jobs


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="prefkern bench",
        description="Compares prefkern with its peers in time, memory, operations and error.",
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes, few repeats")
    parser.add_argument(
        "--suite",
        nargs="+",
        choices=SUITES,
        default=list(SUITES),
        help="operator: log-probs; loss: a DPO step on them; step: a model's training step",
    )
    parser.add_argument(
        "--shapes", "--shape", nargs="+", action="extend", metavar="NAME",
        help=f"one of {', '.join(shapes.KNOWN)}; for suite step one of {', '.join(step.KNOWN)}",
    )  # fmt: skip
    parser.add_argument(
        "--no-sweep",
        dest="sweep",
        action="store_false",
        help="skip the runs with fewer tokens, which the pictures need",
    )
    parser.add_argument(
        "--providers", nargs="+", choices=list(PROVIDERS), default=list(PROVIDERS), metavar="NAME",
        help=f"one of {', '.join(PROVIDERS)}",
    )  # fmt: skip
    parser.add_argument(
        "--tasks", "--heads", nargs="+", choices=TASKS, default=list(TASKS), metavar="NAME",
        help=f"one of {', '.join(TASKS)}; the last two belong to suite step",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--workspace-mb", type=float, help="bound on prefkern's temporary memory")
    parser.add_argument("--repeats", type=int, help="largest number of timed rounds")
    parser.add_argument("--warm-up", type=int, help="number of rounds before the timed ones")
    parser.add_argument(
        "--seconds",
        type=float,
        default=None,
        help="bound on the timed rounds of a task, in seconds",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to FILE")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="also draw pictures there")
    arguments = parser.parse_args(argv)
    _resolve(arguments, parser)
    return arguments


def _resolve(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Fill in the defaults that depend on the device; refuse impossible options before any run."""
    arguments.device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    is_gpu = arguments.device.startswith("cuda")
    if is_gpu and not torch.cuda.is_available():
        parser.error(f"--device {arguments.device}: there is no CUDA device here")

    names, quick = arguments.shapes, arguments.quick
    arguments.models = step.default_models(is_gpu, quick)
    arguments.shapes = shapes.default_shapes(is_gpu, quick)
    if names:
        known = list(shapes.KNOWN) + list(step.KNOWN)
        if unknown := set(names) - set(known):
            parser.error(f"unknown shape {', '.join(unknown)}; known: {', '.join(known)}")
        arguments.shapes = [shapes.KNOWN[name] for name in names if name in shapes.KNOWN]
        arguments.models = [step.KNOWN[name] for name in names if name in step.KNOWN]
    if not planned(arguments):
        parser.error(f"--suite {' '.join(arguments.suite)} has none of the requested shapes")

    # On a CPU a first round only warms caches; on a GPU clocks rise and memory is allocated.
    defaults = (2, 1, 60.0) if quick else (20, 2, 2.0) if is_gpu else (5, 1, 10.0)
    given = (arguments.repeats, arguments.warm_up, arguments.seconds)
    arguments.repeats, arguments.warm_up, arguments.seconds = (
        default if value is None else value for value, default in zip(given, defaults, strict=True)
    )
    if arguments.repeats < 1 or arguments.warm_up < 0:
        parser.error("--repeats must be at least 1, --warm-up at least 0")
    if arguments.json and not arguments.json.parent.is_dir():
        parser.error(f"--json: there is no folder {arguments.json.parent}")
    if arguments.pictures and importlib.util.find_spec("matplotlib") is None:
        parser.error("--pictures needs matplotlib: pip install matplotlib")
