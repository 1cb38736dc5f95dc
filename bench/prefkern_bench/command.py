"""The command `prefkern bench`: the order of the runs, and its output.

`options` has read and checked the options. `planned` lists the jobs: every suite at one shape, then
the next shape. `run` measures them, and prints and saves each group of rows as soon as it is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from prefkern_bench import claims, group, pictures, shapes, step, suites, tables
from prefkern_bench.group import Group, Settings
from prefkern_bench.report import Report, environment
from prefkern_bench.timing import release

# A line that is pasted is not wrapped, and its brackets are its own.
PLAIN: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}


def measure(arguments: Any, command: str) -> int:
    """Run the benchmark and print its tables; 1 if prefkern itself failed somewhere.

    Args:
        arguments: of `options.parse`.
        command: as the user wrote it, for the report.
    """
    device = torch.device(arguments.device)
    if device.index is not None:
        # CUDA events and synchronisation act on the current device.
        torch.cuda.set_device(device)
    about = environment(device, command)
    about |= {
        "dtype": arguments.dtype,
        "shapes": [asdict(shape) for shape in arguments.shapes],
        "models": [asdict(model) for model in arguments.models],
    }
    report = Report(about, [], arguments.json)
    settings = Settings(
        providers=arguments.providers,
        tasks=arguments.tasks,
        dtype=getattr(torch, arguments.dtype),
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
    measured = report.as_dict(finished=True)
    if judged := claims.verdicts(measured):
        console.print(tables.claims_table(judged))
        console.print(f"To paste into a report:\n{claims.line(measured)}", **PLAIN)
    if arguments.pictures:
        arguments.pictures.mkdir(parents=True, exist_ok=True)
        prefix = arguments.json.stem if arguments.json else "bench"
        for path in pictures.draw(measured, arguments.pictures, prefix):
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
