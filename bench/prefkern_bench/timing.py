"""Times steps in turns, and describes a failure in one line.

Every round runs every step once and begins with another step each time. So a change of the clock,
or load from another process, affects all steps alike. On CUDA a time is measured between two events
on the stream. On a CPU it is measured twice, by the wall clock and as processor time of all
threads, which other processes of the machine change little.
"""

from __future__ import annotations

import gc
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

Step = Callable[[], object]


class Time(NamedTuple):
    """Milliseconds of one step."""

    wall: float
    processor: float | None = None  # summed over threads; None on a GPU


class Failure(str):
    """A failure in one line, and where it was raised; None if the line says it all.

    As text: an exception would keep the memory of the frames that it passed.
    """

    traceback: str | None = None


FEWEST_ROUNDS = 3
KEPT_OF_A_TRACEBACK = 4000


def time_in_turns(
    steps: Mapping[str, Step],
    device: torch.device,
    *,
    warm_up: int,
    rounds: int,
    seconds: float,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, list[Time] | Failure]:
    """The time of each step in each round after the warm-up, or its failure in one line.

    Args:
        rounds: the number of timed rounds; there are fewer, but at least three, if all of them
            would take longer than `seconds`.
        advance: called after each round.
    """
    times: dict[str, list[Time]] = {name: [] for name in steps}
    failures: dict[str, Failure] = {}
    names = list(steps)

    def one_round(number: int) -> None:
        first = number % len(names)
        for name in names[first:] + names[:first]:
            if name not in failures:
                try:
                    times[name].append(time_of(steps[name], device))
                except Exception as error:  # noqa: BLE001, a peer's failure is a result
                    failures[name] = describe_failure(error)
                    del error
                    release(device)
        advance()

    if not names:
        return {}
    for number in range(warm_up):
        one_round(number)
    for kept in times.values():
        kept.clear()
    start = time.perf_counter()
    for number in range(rounds):
        per_round = (time.perf_counter() - start) / max(number, 1)
        if number >= FEWEST_ROUNDS and (number + 1) * per_round > seconds:
            break
        one_round(number)
    return times | failures


def time_of(step: Step, device: torch.device) -> Time:
    if device.type == "cuda":
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        begin.record()
        result = step()
        end.record()
        torch.cuda.synchronize(device)
        del result
        return Time(begin.elapsed_time(end))
    start, used = time.perf_counter(), time.process_time()
    result = step()
    used, elapsed = time.process_time() - used, time.perf_counter() - start
    del result
    return Time(elapsed * 1e3, used * 1e3)


def release(device: torch.device) -> None:
    """Free the memory of a provider (also of one that failed) before the next one's peak is taken.

    On a CPU, memory of others does not change a peak, and a collection takes longer than a step.
    """
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def describe_failure(error: Exception) -> Failure:
    """One line for a table, with the traceback of what was not foreseen."""
    if isinstance(error, torch.OutOfMemoryError):
        return Failure("out of memory")
    if isinstance(error, ModuleNotFoundError):
        return Failure(f"not installed ({error.name})")
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    # A first line that ends with a colon says nothing without the second one.
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    failure = Failure(f"{type(error).__name__}: {text}"[:120])
    failure.traceback = _without_folders(error)[-KEPT_OF_A_TRACEBACK:]
    return failure


def _without_folders(error: Exception) -> str:
    """The traceback, with files as they are imported: a result says nothing of where it was run."""
    text = "".join(traceback.format_exception(error))
    folders = [folder.rstrip("/\\") + os.sep for folder in sys.path if os.path.isabs(folder)]
    for folder in sorted(folders, key=len, reverse=True):
        text = text.replace(f'"{folder}', '"')
    return text
