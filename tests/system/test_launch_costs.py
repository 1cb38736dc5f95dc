"""The page of launches is of its record, the record is of the code, and the model's rules hold."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest

pytest.importorskip("triton")

import triton

import launch_costs
import launch_page
import launch_trace
import time_model
from launch_trace import Launch, Region
from support import instruction_counts

H200 = next(device for device in time_model.DEVICES if device.name == launch_costs.SHOWN)
MIB = 2**20


def test_the_page_is_of_its_record() -> None:
    result = json.loads(launch_costs.RESULT.read_text())
    text = launch_page.page(result)
    assert launch_costs.PAGE.read_text() == text
    devices = {device.name for device in time_model.DEVICES}
    calls = launch_costs.calls_of(result)
    assert {call["device"] for call in calls} == devices
    assert len(calls) == (5 * 3 + len(launch_trace.MORE_TASKS)) * len(devices)
    assert {report["target"] for report in result["reports"]} == {*launch_costs.TARGETS}
    for report in result["reports"]:
        assert all(row["spills"] == 0 for row in report["kernels"]), report["triton"]
    for call in calls:
        # No model beats the products that it is made of, or moves less than the logits once.
        assert call["total"]["ms"] > call["plain_ms"] * 0.99
        assert call["total"]["hbm_bytes"] > call["logits"]
    calls[0]["total"]["ms"] *= 2
    assert launch_page.page(result) != text


def test_the_record_is_of_the_code() -> None:
    """One architecture and shape, compiled again: launches, bytes and times; and its kernels."""
    target, shape = "sm_100", launch_trace.MORE_AT
    again = launch_costs.run(sys.executable, target, [shape])
    result = json.loads(launch_costs.RESULT.read_text())
    assert {row["kernel"] for row in again["kernels"]} >= {
        *("_fold_kernel", "_finish_kernel", "_rescale_rows_kernel", "_scatter_scaled_kernel"),
        *("_remake_weights_kernel", "_pair_loss_kernel", "_product_fold_kernel"),
    }
    kept = [each for each in result["reports"] if each["target"] == target]
    recorded = {call["task"]: call for call in kept[0]["calls"] if call["shape"] == shape}
    assert {call["task"] for call in again["calls"]} == recorded.keys()
    same_compiler = kept[0]["triton"] == triton.__version__
    for call in again["calls"]:
        old = recorded[call["task"]]
        for name in ("nhv", "forward_tiles", "kept_tokens", "host_ms", "eager"):
            assert call[name] == old[name], name
        assert call["kernels"].keys() == old["kernels"].keys()
        for name, cost in call["kernels"].items():
            assert cost["launches"] == old["kernels"][name]["launches"]
            assert cost == old["kernels"][name] or not same_compiler, name
    for report in kept:
        if report["triton"] == triton.__version__:
            rows = {launch_page.key_of(row): row for row in report["kernels"]}
            for row in again["kernels"]:
                old = rows[launch_page.key_of(row)]
                assert row["uses"] == old["uses"] and row["block"] == old["block"]
                # The record has the most over all shapes.
                assert row["registers"] <= old["registers"] and row["shared"] <= old["shared"]


def test_what_l2_holds_is_not_read_again() -> None:
    """A product writes a tile and a fold reads it: from L2 if it is small, else from HBM."""

    def moved(size: float, between: float = 0.0) -> list[float]:
        tile, other = Region(("tile",), size), Region(("other",), between)
        launches = [
            Launch("product", [], [tile]),
            *([Launch("other", [other], [])] if between else []),
            Launch("fold", [tile], []),
            # It overwrites the tile: what L2 still holds was never in HBM.
            Launch("product", [], [tile]),
        ]
        return time_model.memory_bytes(launches, H200)

    assert moved(10 * MIB) == [0.0, 0.0, 10 * MIB]
    assert moved(100 * MIB) == [100 * MIB] * 3
    assert moved(10 * MIB, between=30 * MIB) == [10 * MIB, 30 * MIB, 10 * MIB, 10 * MIB]


def test_programs_of_a_processor() -> None:
    kernel = time_model.Compiled(48, 32, 8, 2048, 20.0, 1.0)
    assert kernel.resident(H200) == (5, "registers")
    assert replace(kernel, registers=32).resident(H200) == (8, "threads")
    assert replace(kernel, shared=100_000).resident(H200) == (2, "shared memory")
    assert replace(kernel, registers=20, num_warps=1).resident(H200) == (32, "programs")
    mi300x = next(device for device in time_model.DEVICES if device.target == "gfx942")
    assert replace(kernel, registers=128).resident(mi300x) == (2, "registers")


def test_a_second_reading_costs_what_the_rows_in_flight_do_not_leave_in_l2() -> None:
    kernel = time_model.Compiled(48, 32, 8, 2048, 20.0, 1.0)
    bytes_of = {}
    for row_size in (2048, 32768):
        launch = Launch(
            "fold", [], [], rows=4096, row_size=row_size, row_bytes=6 * row_size, readings=2,
            compiled=kernel,
        )  # fmt: skip
        bytes_of[row_size] = time_model.launch_cost(launch, 0.0, H200).hbm
    assert bytes_of == {2048: 0.0, 32768: 4.0 * 4096 * 32768}


def test_a_product_fills_whole_waves() -> None:
    at = 0.8 * H200.half
    full = time_model.product_seconds(128 * 132, 256 * 16, 4096, "bfloat16", H200)
    assert full == pytest.approx(2 * 128 * 132 * 256 * 16 * 4096 / at)
    # One more row of tiles is one more wave.
    more = time_model.product_seconds(128 * 132 + 1, 256 * 16, 4096, "bfloat16", H200)
    assert full < more < 1.1 * full
    # Few tiles with a large inner size are split.
    few = time_model.product_seconds(1024, 1024, 2**17, "bfloat16", H200)
    assert 2 * 1024 * 1024 * 2**17 / at < few < 2 * 2 * 1024 * 1024 * 2**17 / at


def test_instructions_of_a_loop_are_counted() -> None:
    """Not what runs once, nor what a branch jumps over within the loop."""
    One = instruction_counts.Instruction
    listing = [
        One("LDG"), One("FADD"), One("BRA", 5, True), One("SHFL"), One("STG"), One("MUFU.EX2"),
        One("BRA", 1, True), One("EXIT"), One("BRA", 8),
    ]  # fmt: skip
    assert instruction_counts.counted(listing) == ["FADD", "BRA", "MUFU.EX2", "BRA"]
    straight = [One("LDG"), One("MUFU.EX2"), One("EXIT")]
    assert len(instruction_counts.counted(straight)) == 3
