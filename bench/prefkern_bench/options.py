"""The options of `prefkern bench`, read and checked before torch is imported.

Names of tasks and providers are listed here, so that help and errors come at once; a test holds
them to `suites`, `step` and `providers`.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from prefkern.keywords import full_dtype
from prefkern_bench import models, shapes

DTYPES = ("bfloat16", "float16", "float32")
SUITES = ("operator", "loss", "step")
TASKS = ("forward", "frozen", "trainable", "lora", "full")
PROVIDERS = (
    *("prefkern", "prefkern-roomy", "prefkern-fold", "eager", "compile"),
    *("torch-lce", "liger", "trl", "cce"),
)
# What `--claims` measures: two shapes of a GPU, one of a CPU.
CLAIMED = ("Llama-3-8B", "Qwen3-0.6B")
CLAIMED_ON_CPU = ("SmolLM2-135M",)
CLAIMED_PROVIDERS = ("prefkern", "prefkern-roomy", "eager", "trl")


def parse(argv: list[str]) -> argparse.Namespace:
    """The options; shows help, or an error and exit status 2, as argparse does."""
    parser = argparse.ArgumentParser(
        prog="prefkern bench",
        description="Compares prefkern with its peers in time, memory, operations and error.",
    )
    parser.add_argument("--quick", action="store_true", help="tiny shapes, few repeats")
    parser.add_argument(
        "--claims",
        action="store_true",
        help="only what prefkern claims of log-probs: two shapes, with a line for a report",
    )
    parser.add_argument(
        "--suite",
        nargs="+",
        choices=SUITES,
        help="operator: log-probs; loss: a DPO step on them; step: a model's training step",
    )
    parser.add_argument(
        "--shapes", "--shape", nargs="+", action="extend", metavar="NAME",
        help=f"one of {', '.join(shapes.KNOWN)}; for suite step one of {', '.join(models.KNOWN)}",
    )  # fmt: skip
    parser.add_argument(
        "--no-sweep",
        dest="sweep",
        action="store_false",
        help="skip the runs with fewer tokens, which the pictures need",
    )
    parser.add_argument(
        "--providers", nargs="+", choices=PROVIDERS, metavar="NAME",
        help=f"one of {', '.join(PROVIDERS)}",
    )  # fmt: skip
    parser.add_argument(
        "--tasks", "--heads", nargs="+", choices=TASKS, default=list(TASKS), metavar="NAME",
        help=f"one of {', '.join(TASKS)}; the last two belong to suite step",
    )  # fmt: skip
    parser.add_argument("--dtype", type=full_dtype, choices=DTYPES, default="bfloat16")
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
    _check(arguments, parser)
    _resolve(arguments, parser)
    return arguments


def _check(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse impossible options before any run."""
    if arguments.claims:
        for name in ("quick", "suite", "shapes", "providers", "tasks"):
            if getattr(arguments, name) not in (None, False, list(TASKS)):
                parser.error(f"--claims says what is measured; leave out --{name}")
    known = [*shapes.KNOWN, *models.KNOWN]
    if unknown := set(arguments.shapes or ()) - set(known):
        parser.error(f"unknown shape {', '.join(unknown)}; known: {', '.join(known)}")
    repeats, warm_up = arguments.repeats, arguments.warm_up
    if (repeats is not None and repeats < 1) or (warm_up is not None and warm_up < 0):
        parser.error("--repeats must be at least 1, --warm-up at least 0")
    if arguments.json and not arguments.json.parent.is_dir():
        parser.error(f"--json: there is no folder {arguments.json.parent}")
    if arguments.pictures and importlib.util.find_spec("matplotlib") is None:
        parser.error("--pictures needs matplotlib: pip install matplotlib")


def _resolve(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Fill in the defaults that depend on the device."""
    import torch

    arguments.device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    is_gpu = arguments.device.startswith("cuda")
    if is_gpu and not torch.cuda.is_available():
        parser.error(f"--device {arguments.device}: there is no CUDA device here")

    if arguments.claims:
        arguments.suite, arguments.sweep = ["operator"], False
        arguments.providers = list(CLAIMED_PROVIDERS)
        arguments.shapes = list(CLAIMED if is_gpu else CLAIMED_ON_CPU)
    arguments.suite = arguments.suite or list(SUITES)
    arguments.providers = arguments.providers or list(PROVIDERS)
    names, quick = arguments.shapes, arguments.quick
    arguments.models = models.default_models(is_gpu, quick)
    arguments.shapes = shapes.default_shapes(is_gpu, quick)
    if names:
        arguments.shapes = [shapes.KNOWN[name] for name in names if name in shapes.KNOWN]
        arguments.models = [models.KNOWN[name] for name in names if name in models.KNOWN]
    has_shapes = arguments.shapes and {"operator", "loss"} & set(arguments.suite)
    if not has_shapes and not (arguments.models and "step" in arguments.suite):
        parser.error(f"--suite {' '.join(arguments.suite)} has none of the requested shapes")

    # On a CPU a first round only warms caches; on a GPU clocks rise and memory is allocated.
    defaults = (2, 1, 60.0) if quick else (20, 2, 2.0) if is_gpu else (5, 1, 10.0)
    given = (arguments.repeats, arguments.warm_up, arguments.seconds)
    arguments.repeats, arguments.warm_up, arguments.seconds = (
        default if value is None else value for value, default in zip(given, defaults, strict=True)
    )
