"""`prefkern bench`: a DPO loss step's time, memory, operations and error, beside its peers'.

One step is hidden states, head and labels in; loss and gradients out; the reference's log-probs
computed inside, through the reference's own head. Providers take turns within each round, so that a
clock or a neighbour that drifts touches all of them alike, and one that is missing, refuses a shape
or runs out of memory is a row that says so. The providers are in `providers.py`.

Operations are matrix products, counted, in units of NHV (N scored tokens x hidden size x
vocabulary); 2 of them are the reference's. Memory is the most alive beyond the inputs, gradients
included. Errors are against float64, whose gradients come through `prefkern.reference` in chunks of
tokens: the worst absolute error of a log-prob in nats, of a token and of a sequence's sum, and the
relative error |x - truth| / |truth| of dH and dW.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import shlex
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import prefkern
from prefkern.cli.providers import BETA, IGNORE_INDEX, Eager, Liger, Prefkern, Problem, Provider
from prefkern.measure import cost_of
from prefkern.objectives import DPO, Pairs

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TRUTH_CHUNK = 512  # tokens whose float64 logits are in memory at once


@dataclass(frozen=True)
class Shape:
    """B pairs of T tokens each, the first `prompt` of which are not scored."""

    name: str
    pairs: int
    length: int
    prompt: int
    hidden_size: int
    vocab_size: int
    softcap: float | None = None

    @property
    def tokens(self) -> int:
        return 2 * self.pairs * self.length

    @property
    def scored_tokens(self) -> int:
        return 2 * self.pairs * (self.length - self.prompt)

    @property
    def nhv(self) -> int:
        return self.scored_tokens * self.hidden_size * self.vocab_size


QUICK_SHAPES = [Shape("tiny", 2, 24, 8, 64, 1000)]
CPU_SHAPES = [
    Shape("small", 4, 96, 32, 256, 8192),
    Shape("SmolLM2-135M", 8, 40, 8, 576, 49152),
    Shape("odd vocabulary", 4, 64, 16, 128, 50257),
]
GPU_SHAPES = [
    Shape("Llama-3-8B", 4, 2560, 512, 4096, 128256),
    Shape("Qwen3-0.6B", 4, 2560, 512, 1024, 151936),
    Shape("Gemma-3-270M", 4, 2560, 512, 640, 262144),
    Shape("Gemma-2-9B", 2, 2560, 512, 3584, 256000, softcap=30.0),
    Shape("long context", 1, 16384, 0, 4096, 128256),
]


PROVIDERS: dict[str, Callable[[argparse.Namespace], Provider]] = {
    "prefkern": lambda arguments: Prefkern(arguments.workspace_mb),
    "eager": lambda arguments: Eager(),
    "liger": lambda arguments: Liger(),
}


@dataclass
class Row:
    """What was measured of one provider at one shape; None where it was not, and why."""

    shape: str
    head: str  # "frozen" | "trainable"
    provider: str
    failure: str | None = None
    operations_nhv: float | None = None
    peak_mib: float | None = None
    median_ms: float | None = None
    all_ms: list[float] | None = None
    token_logp_error: float | None = None
    sum_logp_error: float | None = None
    dhidden_error: float | None = None
    dweight_error: float | None = None


class Truth(NamedTuple):
    logps: Tensor  # (2B, T) float64, as all of these
    dhidden: Tensor
    dweight: Tensor


def make_problem(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """Random hidden states and head, every second scored token confident of its label."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    spread = 2.0  # of the logits
    rows, length = 2 * shape.pairs, shape.length
    weight = normal(shape.vocab_size, shape.hidden_size) * spread / shape.hidden_size**0.5
    labels = torch.randint(
        shape.vocab_size, (rows, length), generator=generator, device=device, dtype=torch.int64
    )
    hidden = normal(rows, length, shape.hidden_size)
    # h . W_y grows by |W_y|^2 = spread^2 times the step, past logsumexp = ln V + spread^2 / 2.
    step = (torch.tensor(float(shape.vocab_size)).log().item() + 3) / spread**2 + 0.5
    hidden[:, ::2] += step * weight[labels[:, ::2]]
    labels[:, : shape.prompt] = IGNORE_INDEX
    ref_hidden = hidden + 0.05 * normal(rows, length, shape.hidden_size)
    weight, hidden, ref_hidden = (x.to(dtype) for x in (weight, hidden, ref_hidden))
    return Problem(hidden, weight, labels, ref_hidden, weight, shape.softcap)


def truth_of(problem: Problem) -> Truth:
    """The step in float64, from the same rounded inputs, one chunk of logits at a time."""

    def logps_of(hidden: Tensor, weight: Tensor) -> Tensor:  # (2B, T)
        def chunk_logps(hidden: Tensor, labels: Tensor) -> Tensor:
            logps = prefkern.reference.linear_logprobs(
                hidden, weight, labels, softcap=problem.softcap
            )
            assert isinstance(logps, Tensor)
            return logps

        chunks = zip(
            hidden.flatten(0, 1).split(TRUTH_CHUNK),
            problem.labels.flatten().split(TRUTH_CHUNK),
            strict=True,
        )
        logps = [checkpoint(chunk_logps, *chunk, use_reentrant=False) for chunk in chunks]
        return torch.cat(logps).view(problem.labels.shape)

    hidden = problem.hidden.detach().double().requires_grad_()
    weight = problem.weight.detach().double().requires_grad_()
    logps = logps_of(hidden, weight)
    with torch.no_grad():
        ref_sums = logps_of(problem.ref_hidden.double(), problem.ref_weight.double()).sum(-1)
    DPO(BETA)(Pairs(*logps.sum(-1).chunk(2), *ref_sums.chunk(2))).losses.mean().backward()
    assert hidden.grad is not None and weight.grad is not None
    return Truth(logps.detach(), hidden.grad, weight.grad)


def step_of(
    provider: Provider, problem: Problem, trainable: bool, compiled: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Sequence sums, dH and dW of one step on leaves of its own."""
    problem = problem._replace(
        hidden=problem.hidden.detach().requires_grad_(),
        weight=problem.weight.detach().requires_grad_(trainable),
    )
    loss, sums = provider.loss(problem, compiled)
    loss.backward()
    return sums.detach(), problem.hidden.grad, problem.weight.grad


def examine(row: Row, provider: Provider, problem: Problem, truth: Truth, shape: Shape) -> Row:
    """Errors, operations and memory of one provider, before it is timed."""
    device, trainable = problem.hidden.device, row.head == "trainable"
    compiled = device.type == "cuda"
    sums, dhidden, dweight = step_of(provider, problem, trainable, compiled)
    assert dhidden is not None
    with torch.no_grad():
        token_logps = provider.token_logps(problem)
    row = replace(
        row,
        sum_logp_error=_worst(sums, truth.logps.sum(-1)),
        token_logp_error=None if token_logps is None else _worst(token_logps, truth.logps),
        dhidden_error=_relative(dhidden, truth.dhidden),
        dweight_error=None if dweight is None else _relative(dweight, truth.dweight),
    )
    del sums, dhidden, dweight, token_logps
    cost = cost_of(
        lambda: step_of(provider, problem, trainable, compiled),
        device,
        counted=lambda: step_of(provider, problem, trainable, compiled=False),
    )
    row.operations_nhv = cost.operations / shape.nhv
    row.peak_mib = cost.peak_bytes / 2**20
    return row


def _worst(value: Tensor, truth: Tensor) -> float:
    return (value.double() - truth).abs().max().item()


def _relative(value: Tensor, truth: Tensor) -> float:
    return ((value.double() - truth).norm() / truth.norm()).item()


def time_in_turns(
    steps: dict[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    advance: Callable[[], None],
) -> dict[str, list[float] | Exception]:
    """Milliseconds of each provider's step in each round, or what it raised in one of them."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    failures: dict[str, Exception] = {}
    for _ in range(rounds):
        for name, step in steps.items():
            if name not in failures:
                try:
                    times[name].append(_milliseconds(step, device))
                except Exception as error:  # noqa: BLE001, a peer's failure is a result
                    failures[name] = error
                    _release(device)
            advance()
    return times | failures


def _milliseconds(step: Callable[[], object], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    result = step()
    _synchronize(device)
    elapsed = time.perf_counter() - start
    del result
    return elapsed * 1e3


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe_failure(error: Exception) -> str:
    """One line for the table."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    if isinstance(error, ImportError):
        return f"not installed ({error.name})"
    first_line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first_line}"[:100]


def measure(
    shape: Shape,
    head: str,
    arguments: argparse.Namespace,
    device: torch.device,
    progress: Progress,
) -> list[Row]:
    """One row for each provider at this shape."""
    problem = make_problem(shape, DTYPES[arguments.dtype], device)
    rounds = arguments.warm_up + arguments.repeats
    task = progress.add_task(
        f"{shape.name}, {head} head", total=1 + len(arguments.providers) * (1 + rounds)
    )
    truth = truth_of(problem)
    progress.advance(task)
    rows, steps = {}, {}
    for name in arguments.providers:
        row = Row(shape.name, head, name)
        try:
            provider = PROVIDERS[name](arguments)
            row = examine(row, provider, problem, truth, shape)
            steps[name] = _timed_step(provider, problem, head == "trainable")
        except Exception as error:  # noqa: BLE001, a peer's failure is a result
            row.failure = describe_failure(error)
            progress.advance(task, rounds)
        rows[name] = row
        progress.advance(task)
        _release(device)
    times = time_in_turns(steps, rounds, device, lambda: progress.advance(task))
    for name, outcome in times.items():
        if isinstance(outcome, Exception):
            rows[name].failure = describe_failure(outcome)
        else:
            rows[name].all_ms = [round(ms, 4) for ms in outcome[arguments.warm_up :]]
            rows[name].median_ms = statistics.median(outcome[arguments.warm_up :])
    progress.remove_task(task)
    return list(rows.values())


def _timed_step(provider: Provider, problem: Problem, trainable: bool) -> Callable[[], object]:
    compiled = problem.hidden.device.type == "cuda"
    return lambda: step_of(provider, problem, trainable, compiled)


def _release(device: torch.device) -> None:
    """Leave nothing of a provider, least of all of one that failed, to the next one's peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def table_of(shape: Shape, head: str, rows: Iterable[Row], dtype: str) -> Table:
    title = (
        f"{shape.name}, {head} head: {shape.scored_tokens} scored tokens of {shape.tokens}, "
        f"H = {shape.hidden_size}, V = {shape.vocab_size}, {dtype}"
    )
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE, pad_edge=False)
    table.add_column("", no_wrap=True)
    for column in ("NHV", "MiB", "ms", "min-max", "logp", "sum", "dH", "dW"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        # What was measured before a failure stays in the JSON; a table's row is all or nothing.
        table.add_row(row.provider, *([] if row.failure else _cells(row)))
    return table


def _rounded(value: float | None) -> str:
    """Three digits, without an exponent."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _cells(row: Row) -> list[str]:
    times = row.all_ms or [float("nan")]
    errors = (row.token_logp_error, row.sum_logp_error, row.dhidden_error, row.dweight_error)
    return [
        f"{row.operations_nhv:.2f}",
        f"{row.peak_mib:.1f}",
        _rounded(row.median_ms),
        f"{_rounded(min(times))}-{_rounded(max(times))}",
        *("-" if error is None else f"{error:.1e}" for error in errors),
    ]


def environment(device: torch.device, command: str) -> dict[str, Any]:
    """What the numbers belong to."""
    versions: dict[str, str | None] = {
        "python": platform.python_version(),
        "prefkern": prefkern.__version__,
    }
    for package in ("torch", "triton", "transformers", "liger-kernel"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_cpu_name()}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": name,
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


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="prefkern bench", description="Time, memory, operations and error of the loss step."
    )
    parser.add_argument("--quick", action="store_true", help="one tiny shape, a few repeats")
    parser.add_argument("--shape", action="append", help="a shape by name; may be repeated")
    parser.add_argument(
        "--providers", nargs="+", choices=list(PROVIDERS), default=list(PROVIDERS), metavar="NAME"
    )
    parser.add_argument("--heads", nargs="+", choices=["frozen", "trainable"])
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--device", help="default: a GPU where there is one")
    parser.add_argument("--workspace-mb", type=float, help="bound on prefkern's temporary memory")
    parser.add_argument("--repeats", type=int, help="timed rounds")
    parser.add_argument("--warm-up", type=int, help="rounds before them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to FILE")
    arguments = parser.parse_args(argv)

    arguments.device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    is_gpu = arguments.device.startswith("cuda")
    if is_gpu and not torch.cuda.is_available():
        parser.error(f"--device {arguments.device}: there is no CUDA device here")
    shapes = QUICK_SHAPES if arguments.quick else GPU_SHAPES if is_gpu else CPU_SHAPES
    known = {shape.name: shape for shape in QUICK_SHAPES + CPU_SHAPES + GPU_SHAPES}
    if unknown := set(arguments.shape or []) - set(known):
        parser.error(f"unknown shape {', '.join(unknown)}; known: {', '.join(known)}")
    arguments.shapes = [known[name] for name in arguments.shape] if arguments.shape else shapes
    arguments.heads = arguments.heads or ["frozen", "trainable"]
    slow = not is_gpu and not arguments.quick
    if arguments.repeats is None:
        arguments.repeats = 5 if slow else 20 if is_gpu else 3
    if arguments.warm_up is None:
        arguments.warm_up = 5 if is_gpu else 1
    if arguments.repeats < 1 or arguments.warm_up < 0:
        parser.error("--repeats must be at least 1, --warm-up at least 0")
    if arguments.json and not arguments.json.parent.is_dir():
        parser.error(f"--json: there is no folder {arguments.json.parent}")
    return arguments


def main(argv: list[str]) -> int:
    """Run the benchmark and print its tables; 1 if prefkern itself failed somewhere."""
    arguments = parse(argv)
    device = torch.device(arguments.device)
    about = environment(device, shlex.join(["prefkern", "bench", *argv]))
    console = Console()
    if not console.is_terminal:
        console = Console(width=100)
    console.print(f"{about['device']}, torch {about['versions']['torch']}")
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    rows: list[Row] = []
    with Progress(*columns, console=console, transient=True) as progress:
        for shape in arguments.shapes:
            for head in arguments.heads:
                head_rows = measure(shape, head, arguments, device, progress)
                console.print(table_of(shape, head, head_rows, arguments.dtype))
                for row in head_rows:
                    if row.failure:
                        console.print(f"{row.provider}: {row.failure}", style="yellow")
                rows += head_rows
                _release(device)
    console.print(
        "NHV: matrix-product operations, 2 of them the reference's. MiB: peak beyond the inputs. "
        "ms: median.\nlogp, sum (of a sequence), dH, dW: errors against float64."
    )
    if device.type != "cuda":
        console.print(
            "Times on a CPU say little about a GPU, and errors not all: operations carry over."
        )
    if arguments.json:
        shapes = [asdict(shape) for shape in arguments.shapes]
        report = about | {"dtype": arguments.dtype, "shapes": shapes}
        report["rows"] = [asdict(row) for row in rows]
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return int(any(row.failure and row.provider == "prefkern" for row in rows))
