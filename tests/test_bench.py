"""`prefkern bench`: what it counts is right, and a provider that fails is a row that says so."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prefkern.cli import bench
from prefkern.cli.providers import Problem, Provider

HAS_LIGER = importlib.util.find_spec("liger_kernel") is not None
# Of matrix products, in NHV, the reference's 2 included. Liger computes dW for a frozen head, too,
# and for the tokens that are not scored: 6 and 8, times 24 tokens over 16.
OPERATIONS = {
    ("frozen", "prefkern"): 6,
    ("frozen", "eager"): 6,
    ("frozen", "liger"): 9,
    ("trainable", "prefkern"): 10,
    ("trainable", "eager"): 8,
    ("trainable", "liger"): 12,
}


class Failing(Provider):
    def __init__(self, error: Exception, calls: int = 0) -> None:
        self.error, self.calls = error, calls

    def loss(self, problem: Problem, compiled: bool) -> tuple[Tensor, Tensor]:
        if not self.calls:
            raise self.error
        self.calls -= 1
        return bench.Eager().loss(problem, compiled)


def run(tmp_path: Path, *options: str) -> tuple[int, dict[str, Any]]:
    file = tmp_path / "result.json"
    arguments = ["--quick", "--device", "cpu", "--repeats", "2", "--json", str(file), *options]
    status = bench.main(arguments)
    return status, json.loads(file.read_text())


def test_rows_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, report = run(tmp_path)
    assert status == 0
    assert {(row["head"], row["provider"]) for row in report["rows"]} == set(OPERATIONS)
    for row in report["rows"]:
        if row["provider"] == "liger" and not HAS_LIGER:
            assert row["failure"].startswith("not installed")
            continue
        head, provider = row["head"], row["provider"]
        assert row["failure"] is None
        # Two passes do 10; a single pass in the workspace may do 8.
        assert row["operations_nhv"] <= OPERATIONS[head, provider]
        if provider != "prefkern":
            assert row["operations_nhv"] == OPERATIONS[head, provider]
        assert row["peak_mib"] > 0
        assert len(row["all_ms"]) == 2 and min(row["all_ms"]) <= row["median_ms"]
        assert (row["dweight_error"] is None) == (head == "frozen")
        assert (row["token_logp_error"] is None) == (provider == "liger")
        assert row["dhidden_error"] < 1e-2
    ours, eager = (
        next(row for row in report["rows"] if row["provider"] == name)
        for name in ("prefkern", "eager")
    )
    assert ours["token_logp_error"] < 1e-3 < eager["token_logp_error"]
    assert report["versions"]["torch"] == torch.__version__
    assert report["device"] and report["date"] and "--quick" in report["command"]
    output = capsys.readouterr().out
    assert "prefkern" in output and "Times on a CPU" in output


def test_float32_agrees_with_float64(tmp_path: Path) -> None:
    _, report = run(tmp_path, "--dtype", "float32", "--providers", "prefkern", "eager")
    for row in report["rows"]:
        assert row["token_logp_error"] < 1e-5 and row["sum_logp_error"] < 1e-4
        assert row["dhidden_error"] < 1e-5
        assert row["head"] == "frozen" or row["dweight_error"] < 1e-5


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried ..."), "out of memory"),
        (ModuleNotFoundError("no", name="liger_kernel"), "not installed (liger_kernel)"),
        (ValueError("first line\nsecond"), "ValueError: first line"),
    ],
)
@pytest.mark.parametrize("calls", [0, 3], ids=["at once", "while it is timed"])
def test_a_failure_is_a_row(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    expected: str,
    calls: int,
) -> None:
    monkeypatch.setitem(bench.PROVIDERS, "liger", lambda arguments: Failing(error, calls))
    status, report = run(tmp_path, "--heads", "frozen", "--providers", "liger", "eager")
    assert status == 0
    failed, eager = report["rows"]
    assert failed["failure"] == expected and failed["median_ms"] is None
    assert eager["failure"] is None and len(eager["all_ms"]) == 2
    assert f"liger: {expected}" in capsys.readouterr().out


def test_prefkern_failing_is_the_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(bench.PROVIDERS, "prefkern", lambda arguments: Failing(ValueError("no")))
    status, _ = run(tmp_path, "--heads", "frozen", "--providers", "prefkern")
    assert status == 1


@pytest.mark.parametrize(
    "options", [["--shape", "no such"], ["--repeats", "0"], ["--json", "/no/such/folder/x.json"]]
)
def test_bad_arguments_are_refused_before_anything_runs(options: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--quick", *options])
