"""The claims that `prefkern bench` judges: each at its bound, and the lines for a report."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import prefkern
from prefkern.cli import check
from prefkern_bench import claims, main, options, providers
from prefkern_bench.group import Settings, measure
from prefkern_bench.report import Row
from prefkern_bench.suites import operator_groups
from support.machine import DEVICE, HAS_TRITON

WIDE = {"name": "wide", "tokens": 1000, "hidden_size": 4096, "vocab_size": 8000}
NARROW = {**WIDE, "name": "narrow", "hidden_size": 1024}
VERSIONS = {"prefkern": "1.2", "torch": "2.11.0+cu130", "triton": "3.6.0", "python": "3.12.3"}


def row(task: str, provider: str, shape: str = "wide", **given: Any) -> dict[str, Any]:
    plan = {"workspace_bytes": 10 * 2**20, "saved_bytes": 0}
    blank = {**vars(Row("operator", shape, task, provider, 1000)), "median_ms": 10.0, "plan": plan}
    return {**blank, **given}


def report(*rows: dict[str, Any], **given: Any) -> dict[str, Any]:
    about = {"dtype": "bfloat16", "device_type": "cuda", "device": "a GPU", "versions": VERSIONS}
    return {**about, "shapes": [WIDE, NARROW], "rows": [*rows], **given}


def judged(*rows: dict[str, Any], **given: Any) -> dict[str, bool | None]:
    return {each.claim: each.holds for each in claims.verdicts(report(*rows, **given))}


@pytest.mark.parametrize(
    ("rows", "claim", "holds"),
    [
        ([row("forward", "prefkern", floor_ratio=1.17)], "wide, forward: at least 85%", True),
        ([row("forward", "prefkern", floor_ratio=1.18)], "wide, forward: at least 85%", False),
        ([row("frozen", "prefkern", floor_ratio=1.15)], "wide, frozen: at most 1.15 x 4NHV", True),
        ([row("frozen", "prefkern", floor_ratio=1.16)], "wide, frozen: at most 1.15 x 4NHV", False),
        (
            [row("trainable", "prefkern-roomy", floor_ratio=1.2)],
            "wide, trainable: at most 1.15 x 6NHV",
            False,
        ),
        (
            [row("frozen", "prefkern", "narrow", floor_ratio=1.5)],
            "narrow, frozen: at most 1.5 x 4NHV",
            True,
        ),
        (
            [row("frozen", "prefkern", "narrow", floor_ratio=1.51)],
            "narrow, frozen: at most 1.5 x 4NHV",
            False,
        ),
        ([row("frozen", "prefkern", median_ms=7.5), row("frozen", "trl")], "0.75 x TRL", True),
        ([row("frozen", "prefkern", median_ms=7.6), row("frozen", "trl")], "0.75 x TRL", False),
        (
            [row("trainable", "prefkern-roomy", median_ms=8.6), row("trainable", "trl")],
            "0.85 x TRL",
            False,
        ),
        ([row("forward", "prefkern", peak_mib=12.0)], "wide: no more memory", True),
        ([row("forward", "prefkern", peak_mib=14.0)], "wide: no more memory", False),
        # 6 bytes for each of N H, and for a trained head 2 for each of V H.
        ([row("frozen", "prefkern", peak_mib=36.0)], "wide: no more memory", True),
        ([row("frozen", "prefkern", peak_mib=38.0)], "wide: no more memory", False),
        ([row("trainable", "prefkern", peak_mib=98.0)], "wide: no more memory", True),
        ([row("trainable", "prefkern", peak_mib=101.0)], "wide: no more memory", False),
        ([row("forward", "prefkern", token_logp_error=1e-3)], "wide: a token's log-prob", True),
        ([row("forward", "prefkern", token_logp_error=1.1e-3)], "wide: a token's log-prob", False),
        ([row("forward", "prefkern", token_logp_error=math.nan)], "wide: a token's", False),
        (
            [
                row("frozen", "prefkern", dhidden_error=2e-3),
                row("frozen", "eager", dhidden_error=2e-3),
            ],
            "wide: dH no further",
            True,
        ),
        (
            [
                row("frozen", "prefkern", dhidden_error=3e-3),
                row("frozen", "eager", dhidden_error=2e-3),
            ],
            "wide: dH no further",
            False,
        ),
        (
            [
                row("trainable", "prefkern-roomy", dweight_error=math.nan),
                row("trainable", "eager", dweight_error=2e-3),
            ],
            "wide: dW no further",
            False,
        ),
        ([row("frozen", "prefkern", failure="out of memory")], "wide, frozen: runs", False),
    ],
)
def test_a_claim_at_its_bound(rows: list[dict[str, Any]], claim: str, holds: bool) -> None:
    (found,) = (value for name, value in judged(*rows).items() if claim in name)
    assert found is holds


def test_what_is_not_claimed() -> None:
    """Nothing of time on a CPU, of float32, or of TRL's time at a small H."""
    rows = [row("frozen", "prefkern", floor_ratio=9.0, peak_mib=1.0), row("frozen", "trl")]
    assert [*judged(*rows, device_type="cpu")] == [
        "wide: no more memory than workspace, results and [N, H] of gradient"
    ]
    assert judged(*rows, dtype="float32") == {}
    narrow = [row("frozen", "prefkern", "narrow"), row("frozen", "trl", "narrow")]
    assert judged(*narrow) == {}
    assert judged(row("forward", "prefkern", "narrow", floor_ratio=9.0)) == {}


def test_the_line_of_the_benchmark() -> None:
    """Verdict, device, versions, ratios and peak; and up to three misses."""
    good = row("frozen", "prefkern", floor_ratio=1.1, median_ms=7.0, peak_mib=30.0)
    assert claims.line(report(good, row("frozen", "trl"))) == (
        "prefkern bench 1.2: 3 of 3 claims hold | a GPU, torch 2.11.0+cu130, triton 3.6.0, python "
        "3.12.3 | wide bfloat16, frozen: 1.10 x plain products, 0.70 x TRL, peak 30 MiB"
    )
    rows = [row(task, "prefkern", failure="out of memory") for task in ("forward", "frozen")]
    rows += [row(task, "prefkern", "narrow", failure="broke") for task in ("forward", "frozen")]
    line = claims.line(report(*rows))
    assert line.startswith("prefkern bench 1.2: 0 of 4 claims hold | a GPU, ")
    assert line.endswith(" | misses: wide, forward: runs: out of memory; wide, frozen: runs: out of "
                         "memory; narrow, forward: runs: broke; and 1 more")  # fmt: skip
    assert "\n" not in line


@pytest.mark.parametrize("is_gpu", [False, True])
def test_claims_is_a_choice_of_what_is_measured(
    is_gpu: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_gpu)
    made = options.parse(["--claims"])
    assert made.suite == ["operator"] and not made.sweep and made.tasks == list(options.TASKS)
    assert made.providers == ["prefkern", "prefkern-roomy", "eager", "trl"]
    names = ["Llama-3-8B", "Qwen3-0.6B"] if is_gpu else ["SmolLM2-135M"]
    assert [shape.name for shape in made.shapes] == names
    for other in (["--quick"], ["--suite", "loss"], ["--providers", "cce"], ["--tasks", "lora"]):
        with pytest.raises(SystemExit, match="2"):
            options.parse(["--claims", *other])
        assert f"--claims says what is measured; leave out {other[0]}" in capsys.readouterr().err


def test_the_benchmark_ends_with_its_claims(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--quick", "--no-sweep", "--device", "cpu", "--suite", "operator", "--repeats", "1"]
    file = tmp_path / "result.json"
    assert main([*given, "--providers", "prefkern", "eager", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    line = claims.line(json.loads(file.read_text()))
    assert f"To paste into a report:\n{line}\n" in printed
    assert "4 of 4 claims hold" in line and printed.count("holds") == 4


def test_the_other_way_of_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """A provider of its own, of forward alone; it fails where another kernel ran."""
    cpu = torch.device("cpu")
    with pytest.raises(NotImplementedError, match="needs a GPU"):
        providers.PROVIDERS["prefkern-fold"](None, cpu)
    made = providers.PrefkernInOneKernel(None, torch.device("cuda"))
    tensors = (torch.randn(4, 8), torch.randn(20, 8), torch.tensor([0, 3, 19, 7]))
    tensors = [tensor.to(DEVICE) for tensor in tensors]
    monkeypatch.setenv("PREFKERN_PRODUCT_FOLD", "0")
    with pytest.raises(RuntimeError, match="ran another kernel"):
        made.token_logps(*tensors, None)
    seen = []

    def by_kernel(*arguments: Any, **keywords: Any) -> Any:
        seen.append(os.environ["PREFKERN_PRODUCT_FOLD"])
        return right(*arguments, **keywords, backend="triton")

    right = prefkern.linear_logprobs
    monkeypatch.setattr(prefkern, "linear_logprobs", by_kernel)
    if HAS_TRITON:
        with torch.no_grad():
            mine = made.token_logps(*tensors, None)
        truth = prefkern.reference.linear_logprobs(*tensors)
        torch.testing.assert_close(mine, truth)
        assert seen == ["1"] and os.environ["PREFKERN_PRODUCT_FOLD"] == "0"


def test_a_provider_of_one_task_is_not_asked_for_others() -> None:
    from rich.progress import Progress

    from prefkern_bench.shapes import QUICK

    settings = Settings(
        ["prefkern-roomy", "prefkern-fold"], ["forward", "frozen", "trainable"], torch.bfloat16,
        torch.device("cpu"), None, 0, 1, 1.0,
    )  # fmt: skip
    with Progress(disable=True) as progress:
        groups = operator_groups(QUICK[0], settings)
        found = [(r.task, r.provider) for each in groups for r in measure(each, settings, progress)]
    assert [pair for pair in found if pair[1] != "plain product"] == [
        ("forward", "prefkern-fold"),
        ("trainable", "prefkern-roomy"),
    ]


def checked(name: str, logp: float = 0.0, dweight: float | None = None) -> check.Row:
    made = check.Row("triton on cuda", "float16", name, "kept", logp, 1e-3, 1e-4, 1e-3)
    made.dweight, made.dweight_bound = dweight, None if dweight is None else 1e-3
    return made


def test_the_line_of_the_check() -> None:
    """Verdict, device, versions and the error that is nearest its bound; and up to three misses."""
    runs = [("torch", "cpu"), ("triton", "cpu")]
    line = check._line([checked("all"), checked("kl", 5e-4)], runs)
    assert line.startswith(f"prefkern check {prefkern.__version__}: 2 of 2 within bounds | ")
    assert f"torch {torch.__version__}, " in line and line.endswith(
        "nearest its bound: logp at 0.50 of it (triton on cuda, fp16, kl, kept)"
    )
    rows = [checked(name, math.nan if name == "a" else 2e-3) for name in "abcde"]
    line = check._line([*rows, checked("f", dweight=2e-4)], runs)
    assert ": 1 of 6 within bounds | " in line and "logp at inf of it" in line
    misses = "; ".join(f"triton on cuda, fp16, {name}, kept" for name in "abc")
    assert line.endswith(f"misses: {misses}; and 2 more") and "\n" not in line


def test_the_rows_of_the_check_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "_backends", lambda: [("torch", "cpu")])
    monkeypatch.setattr(check, "_check", lambda *case, seed, quick: checked(case[3], 2e-3))
    file = tmp_path / "check.json"
    assert check.main(["--dtype", "float16", "--quick", "--json", str(file)]) == 1
    found = json.loads(file.read_text())
    assert len(found["rows"]) == 9 and not any(each["passed"] for each in found["rows"])
    assert f"To paste into a report:\n{found['line']}\n" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        check.main(["--json", str(tmp_path / "no/such.json")])
    assert "--json: there is no folder" in capsys.readouterr().err
