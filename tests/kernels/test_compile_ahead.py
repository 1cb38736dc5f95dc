"""Every kernel compiles for every GPU that is supported, without spills and within its memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prefkern.ops import plan
from support.processes import environment

pytest.importorskip("triton")
tiles = pytest.importorskip("prefkern_kernels.tiles")

ROOT = Path(__file__).parent.parent.parent
# Shared memory that a block may have, in bytes.
SHARED = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
# Registers that a multiprocessor has for its threads, NVIDIA's; a thread's are handed out by eights.
REGISTERS = 65_536
# A kernel that walks rows hides its loads behind other programs: at least two of eight warps, or as
# many of fewer, must fit a multiprocessor, and its exchanges between warps are small.
ROWS_REGISTERS, ROWS_SHARED = 128, 16_384
# A fold that holds its row has so many warps, all of whose loads are on their way at once. For
# gfx942 the compiler may exchange a whole row of 32 KiB between threads (float32 weights beside a
# bfloat16 bias). Its 1,024 threads let no more than two such programs run on a processor, so half of
# the memory is what costs none.
WARPS_OF_A_HELD_ROW = 16
KERNELS = {
    "_finish_kernel",
    "_fold_kernel",
    "_merge_splits_kernel",
    "_pair_loss_kernel",
    "_product_fold_kernel",
    "_remake_weights_kernel",
    "_rescale_rows_kernel",
    "_scatter_scaled_kernel",
    "_settle_kernel",
}


@pytest.mark.parametrize("target", SHARED)
@pytest.mark.long
def test_compiles(target):
    done = subprocess.run(
        [sys.executable, "-m", "support.compile_ahead", target],
        capture_output=True,
        text=True,
        env=environment(interprets=False),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout)["kernels"]
    assert {row["kernel"] for row in rows} == KERNELS
    for row in rows:
        assert_fits(row, target)


def assert_fits(row: dict[str, Any], target: str) -> None:
    assert row["shared"] <= SHARED[target], row
    walks_rows = row["kernel"] != "_product_fold_kernel"
    if walks_rows:
        may_exchange = target == "gfx942" and row["num_warps"] == WARPS_OF_A_HELD_ROW
        assert row["shared"] <= (SHARED[target] // 2 if may_exchange else ROWS_SHARED), row
    if target == "gfx942":
        # Scalar registers spill into lanes of a vector register, and not to memory: the product has
        # a few such masks.
        few = 16 if row["kernel"] == "_product_fold_kernel" else 0
        if walks_rows:
            assert row["vgpr_count"] <= ROWS_REGISTERS, row
        assert row["vgpr_spill_count"] == 0 and row["sgpr_spill_count"] <= few, row
    else:
        # What ptxas spills is stack; LOCAL is what the source itself asks for.
        assert row["STACK"] == row["LOCAL"] == 0 and 0 < row["REG"] <= 255, row
        # Above it a launch fails, or the compiler does not know how many warps there are.
        warps = row["num_warps"] if "num_warps" in row else row["config"]["num_warps"]
        assert -(-row["REG"] // 8) * 8 * 32 * warps <= REGISTERS, row
        if walks_rows:
            assert row["REG"] <= ROWS_REGISTERS, row
    if "instructions" in row and row["kernel"] == "_product_fold_kernel":
        assert_is_made_of(row, target)


def assert_is_made_of(row: dict[str, Any], target: str) -> None:
    """It uses the device's matrix unit, copies that run ahead and, if asked, specialised warps."""
    config, has = row["config"], row["instructions"]
    units = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}
    if row["operands"] != "float32":
        assert units.get(target, "v_mfma") in has, row
    if config["by_descriptor"]:
        assert "cp.async.bulk" in has, row
    elif target != "gfx942":
        assert "cp.async.cg" in has, row
    if config["specialize"] and row["variant"] == "bare":
        assert "setmaxnreg" in has, row


def test_a_plan_makes_no_wider_tiles_than_a_fold_holds():
    assert plan.FOLD_ENTRIES == tiles.FOLD_BLOCK


def test_report_has_every_configuration():
    """`bench/compile_reports.py` compiles them all, and its committed report is for this table.

    The candidate in use fits with every compiler, each other candidate with at least one.
    """
    reports = json.loads((ROOT / "bench/results/compile-reports.json").read_text())["reports"]
    assert {report["target"] for report in reports} == set(SHARED)
    for target in SHARED:
        choices = {
            (product.operands, product.plain): choice.candidates
            for product, choice in tiles.PRODUCTS[target].items()
            if product.wide
        }
        table = {(*product, config) for product, configs in choices.items() for config in configs}
        in_use = {(*product, configs[0]) for product, configs in choices.items()}
        fitting = []
        for report in (report for report in reports if report["target"] == target):
            assert {candidate(row) for row in report["kernels"]} == table
            misfits = {candidate(row) for row in report["kernels"] if not fits(row, target)}
            assert not misfits & in_use, (target, report["triton"])
            fitting.append(table - misfits)
        assert set.union(*fitting) == table, target


def candidate(row: dict[str, Any]) -> tuple[str, bool, tiles.ProductConfig]:
    return row["operands"], row["plain"], tiles.ProductConfig(**row["config"])


def fits(row: dict[str, Any], target: str) -> bool:
    try:
        assert_fits(row, target)
    except AssertionError:
        return False
    return True
