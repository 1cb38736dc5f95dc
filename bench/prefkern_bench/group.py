"""Measures one group of rows: one task at one shape, with every provider.

First each provider is examined: errors and plan, memory, operations, each in a separate run, so
that they do not disturb one another. Then all providers without a failure are timed in turns. An
error that a provider raises becomes the `failure` of its row.

Operations are those of the products that torch runs. If a provider's products are inside its own
kernels, or if fewer are counted than the task needs, the row says "operations not counted" instead
of a number. A compiled provider is counted without compilation; it multiplies the same matrices.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import Progress

from prefkern_bench.measure import Meter, cuda_peak_bytes
from prefkern_bench.providers import ONLY, PROVIDERS, Provider
from prefkern_bench.report import PLAIN_PRODUCT, Row
from prefkern_bench.timing import (
    Failure,
    Step,
    Time,
    describe_failure,
    release,
    time_in_turns,
)

MIB = 2**20


@dataclass(frozen=True)
class Settings:
    """The settings that all groups of a run share."""

    providers: list[str]
    tasks: list[str]
    dtype: torch.dtype
    device: torch.device
    workspace_mb: float | None
    warm_up: int
    rounds: int
    seconds: float


@dataclass(frozen=True)
class Group:
    """One task at one shape.

    Args:
        blank: makes the empty row of a provider.
        run: runs the step with a provider; its result goes to `errors`.
        errors: writes the errors of a result into the row.
        nhv: N H V, the unit of operations; None if the unit makes no sense.
        fewest: the fewest operations that the task needs, in NHV.
        plain_product: a plain product of 2NHV operations, the unit of time; None: no unit.
    """

    blank: Callable[[str], Row]
    run: Callable[[Provider], Any]
    errors: Callable[[Row, Any], None]
    nhv: int | None = None
    fewest: int = 0
    plain_product: Step | None = None


def measure(group: Group, settings: Settings, progress: Progress) -> list[Row]:
    """One row for each provider, and one for the plain product."""
    rounds = settings.warm_up + settings.rounds
    some = group.blank("")
    # A larger workspace changes nothing for a frozen head, and a kernel with the product in it
    # has no backward; suite "step" uses the default only.
    names = [name for name in settings.providers if ONLY.get(name, some.task) == some.task]
    rows = {name: group.blank(name) for name in names}
    task = progress.add_task(f"{some.suite}: {some.shape}, {some.task}", total=len(names) + rounds)
    steps: dict[str, Step] = {}
    for name, row in rows.items():
        try:
            provider = PROVIDERS[name](settings.workspace_mb, settings.device)
            _examine(row, provider, group, settings.device)
            steps[name] = lambda provider=provider: group.run(provider)
        except Exception as error:  # noqa: BLE001, a peer's failure is a result
            row.fail(describe_failure(error))
            del error
        progress.advance(task)
        release(settings.device)
    if group.plain_product is not None and steps:
        steps[PLAIN_PRODUCT] = group.plain_product
        rows[PLAIN_PRODUCT] = group.blank(PLAIN_PRODUCT)
        if group.nhv is not None:
            _record_operations(rows[PLAIN_PRODUCT], 2 * group.nhv, group.nhv)
    times = time_in_turns(
        steps,
        settings.device,
        warm_up=settings.warm_up,
        rounds=settings.rounds,
        seconds=settings.seconds,
        advance=lambda: progress.advance(task),
    )
    _record_times(rows, times, group)
    progress.remove_task(task)
    return list(rows.values())


def _examine(row: Row, provider: Provider, group: Group, device: torch.device) -> None:
    result = group.run(provider)
    row.plan = provider.plan()
    group.errors(row, result)
    del result
    release(device)
    if device.type == "cuda":
        row.peak_mib = cuda_peak_bytes(lambda: group.run(provider), device) / MIB
    uncompiled = provider.uncompiled()
    try:
        with Meter() as meter:
            group.run(uncompiled)
    except Exception as error:
        # The uncompiled form may need more memory than the device has.
        if uncompiled is provider:
            raise
        row.add_note(f"operations not counted: {describe_failure(error)}")
        return
    if device.type != "cuda":
        if provider.is_visible and uncompiled is provider:
            row.peak_mib = meter.peak_bytes / MIB
        else:
            row.add_note("memory not counted")
    if provider.is_visible and meter.operations >= group.fewest * (group.nhv or 0):
        _record_operations(row, meter.operations, group.nhv)
    else:
        row.add_note("operations not counted")


def _record_operations(row: Row, operations: int, nhv: int | None) -> None:
    row.operations = operations
    row.operations_nhv = None if nhv is None else operations / nhv


def _record_times(
    rows: Mapping[str, Row], times: Mapping[str, list[Time] | Failure], group: Group
) -> None:
    plain = times.get(PLAIN_PRODUCT)
    # Milliseconds of a plain product with one NHV of operations.
    unit = _median(plain) / 2 if isinstance(plain, list) and plain else None
    for name, outcome in times.items():
        row = rows[name]
        if isinstance(outcome, Failure):
            row.fail(outcome)
            continue
        row.all_ms = [round(each.wall, 4) for each in outcome]
        row.median_ms = statistics.median(each.wall for each in outcome)
        processor = [each.processor for each in outcome if each.processor is not None]
        if processor:
            row.processor_ms = statistics.median(processor)
        if unit is not None and name != PLAIN_PRODUCT:
            row.floor_ratio = _median(outcome) / (unit * group.fewest)
            if row.operations_nhv is not None:
                row.product_ratio = _median(outcome) / (unit * row.operations_nhv)


def _median(times: list[Time]) -> float:
    """The median of what ratios are made of: processor time, and on a GPU the time there."""
    return statistics.median(
        each.wall if each.processor is None else each.processor for each in times
    )
