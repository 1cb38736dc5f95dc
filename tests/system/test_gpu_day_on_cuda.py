"""The branches of `bench/gpu_day` and `prefkern bench` that only a GPU takes, run without one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

pytest.importorskip("triton")

import triton

import sanitize
from gpu_day import about, layouts, profile, tiles
from prefkern.ops import call, operands
from prefkern_bench import command, options, shapes
from support.cuda_on_cpu import MEMORY, NAME, cuda_on_cpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-ins are for a CPU")
Run = Callable[..., tuple[Any, set[str]]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs a stage's module as its command does, on "cuda"; its result, and what it called."""

    def main(module: Any, *given: str) -> tuple[Any, set[str]]:
        path = tmp_path / "result.json"
        monkeypatch.setattr(sys, "argv", ["x", "--json", str(path), *given])
        with cuda_on_cpu(monkeypatch) as called:
            module.main()
        return json.loads(path.read_text()), set(called)

    return main


@pytest.fixture
def by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Triton backend, as on a GPU: its kernels under the interpreter, operands not raised."""
    made = operands.Operands
    monkeypatch.setattr(operands, "operands_for", lambda dtype, _: made(dtype, upcasts=False))
    monkeypatch.setattr(call, "resolve_backend", lambda backend, *_, **__: "triton")


def test_about(run: Run) -> None:
    found, called = run(about)
    assert found["device"] == NAME and found["device_type"] == "cuda"
    assert found["gpu"]["architecture"] == "sm_90" and found["gpu"]["l2_mib"] == 50
    assert found["gpu"]["memory_gib"] == round(MEMORY / 2**30, 1)
    assert "get_device_properties" in called


def test_profile(run: Run, by_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call of the real list; kernels are taken from the profiler's events of the device."""
    real = profile.profile

    class OfKernels(real):
        def __init__(self, activities: list[ProfilerActivity]) -> None:
            assert activities == [ProfilerActivity.CPU, ProfilerActivity.CUDA]
            super().__init__(activities=activities[:1])

        def key_averages(self, *args: Any, **more: Any) -> Any:
            events = super().key_averages(*args, **more)
            for event in events:
                event.device_type = DeviceType.CUDA
                event.self_device_time_total = event.self_cpu_time_total
            return events

    monkeypatch.setattr(profile, "profile", OfKernels)
    monkeypatch.setattr(profile, "SHAPE", "tiny")
    found, called = run(profile)
    calls = {each["call"]: each for each in found["calls"]}
    assert list(calls) == [
        "forward",
        "frozen",
        "trained",
        "trained, in 1 GiB",
        "forward, product in the kernel",
    ]
    for each in calls.values():
        assert each["ms"] > 0 and each["plan"]["backend"] == "triton"
        longest = [kernel["us"] for kernel in each["kernels"]]
        assert longest == sorted(longest, reverse=True) and longest
    assert calls["forward, product in the kernel"]["plan"]["product_in_kernel"]
    assert "synchronize" in called


def test_tiles(run: Run, by_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import inspect

    real, timed = inspect.signature(triton.testing.do_bench), []

    def do_bench(run: Any, **options: Any) -> float:
        real.bind(run, **options)
        run()
        timed.append(run)
        return float(len(timed))

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    found, _ = run(tiles, "--shapes", "tiny")
    (row,) = found["rows"]
    assert row["shape"] == "tiny" and row["library_ms"] == len(timed)
    assert len(row["candidates"]) == len(timed) - 1


@pytest.mark.long
def test_layouts(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both tasks and all ways, at the dry run's sizes; and a step that fails is a row."""
    monkeypatch.setattr(layouts, "STACK", layouts.QUICK[0])
    monkeypatch.setattr(layouts, "LENGTHS", layouts.DRY_LENGTHS)
    monkeypatch.setattr(layouts, "PAIRS", layouts.DRY_PAIRS)

    def refused(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(layouts, "eager_loss", refused)
    found, called = run(layouts)
    assert [row["task"] for row in found["rows"]] == ["lora"] * 4 + ["full"] * 4
    for row in found["rows"]:
        if row["way"] == layouts.EAGER:
            assert row["failure"] == "out of memory" and row["traceback"] is None
        else:
            # bfloat16, as on the day.
            assert row["failure"] is None, row
            assert row["loss"] == pytest.approx(0.6931, abs=0.02) and row["median_ms"] > 0
            assert row["peak_mib"] == 3 or row["peak_mib"] % 3 == 0
    assert {"max_memory_allocated", "reset_peak_memory_stats", "empty_cache"} <= called


@pytest.mark.long
def test_bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`prefkern bench` on "cuda": peaks of the allocator, times of events, the claims of time."""
    path = tmp_path / "report.json"
    given = ["--suite", "operator", "loss", "--shapes", "tiny", "--no-sweep", "--json", str(path)]
    given += ["--providers", "prefkern", "prefkern-roomy", "eager", "--workspace-mb", "8"]
    given += ["--repeats", "1", "--warm-up", "0", "--device", "cuda"]
    with cuda_on_cpu(monkeypatch) as called:
        assert command.measure(options.parse(given), "prefkern bench") == 0
    found = json.loads(path.read_text())
    assert found["device"] == NAME and found["finished"]
    assert found["shapes"][0]["name"] == shapes.QUICK[0].name
    for row in found["rows"]:
        assert row["failure"] is None and row["median_ms"] > 0 and row["processor_ms"] is None
        assert row["provider"] == "plain product" or row["peak_mib"] is not None
    assert {"max_memory_allocated", "synchronize", "empty_cache"} <= set(called)


@pytest.mark.parametrize(("status", "expected"), [(0, 0), (sanitize.FOUND, 1), (5, 3)])
def test_the_command_of_memcheck(
    status: int, expected: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What compute-sanitizer is called with, and what its exit status says."""
    tool, log = tmp_path / "compute-sanitizer", tmp_path / "log"
    tool.write_text(
        f'#!/bin/sh\necho "$@ [$PYTORCH_NO_CUDA_MEMORY_CACHING]" >> {log}\nexit {status}\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(sanitize, "missing", lambda: None)
    monkeypatch.setattr(sanitize, "PLACES", ())
    # The launches before it are compiled for a GPU.
    monkeypatch.setattr(sanitize.sys, "executable", "true")
    assert sanitize.main(["memcheck"]) == expected
    options = f"--tool memcheck --error-exitcode {sanitize.FOUND} --leak-check no"
    script = Path(sanitize.__file__).resolve()
    assert log.read_text() == f"{options} true {script} --drive [1]\n"
