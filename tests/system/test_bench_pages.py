"""The script that counts plans, and the one that writes measured figures into pages."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent

import families
import plans
import readme
import sharded


@pytest.mark.parametrize(
    ("task", "most"), [("forward", 2), ("frozen", 4), ("trainable", 8)], ids=str
)
def test_a_plan_is_counted(task: str, most: int) -> None:
    row = plans.measure(256, 64, 8192, 2, task)
    assert not row.misses
    assert row.operations_nhv == row.planned_nhv and row.operations_nhv <= most
    # The bound means something: it is used, and the logits are larger.
    assert 0.5 < row.temporary_mib <= 2 * plans.SLACK < row.logits_mib


def test_a_broken_bound_is_a_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = plans.measure(256, 64, 8192, 2, "frozen")
    row.temporary_mib, row.operations_nhv = 2.2, 6.0
    assert plans.misses(row) == ["2.2 MiB of 2", "6.00 NHV, planned 4.00", "6.00 NHV, bound 4"]
    row.temporary_mib, row.operations_nhv = 2.09, 4.0
    assert plans.misses(row) == []

    kept = plans.measure(256, 64, 8192, 2, "trainable")
    kept.operations_nhv = kept.planned_nhv = 8.0
    assert plans.misses(kept) == [] and plans.misses(kept, kept_tokens=256)

    monkeypatch.setattr(plans, "SHAPES", [(64, 16, 512)])
    monkeypatch.setattr(plans, "WORKSPACES_MB", [1])
    file = tmp_path / "plans.json"
    assert plans.main(["--json", str(file)]) == 0
    assert len(json.loads(file.read_text())["rows"]) == 3
    monkeypatch.setattr(plans, "MOST", {"frozen": 3})
    assert plans.main(["--json", str(file)]) == 1


def test_the_bytes_that_a_rank_holds_are_of_their_record(tmp_path: Path) -> None:
    import fsdp_memory

    result = json.loads(fsdp_memory.RESULT.read_text())
    text = fsdp_memory.PAGE.read_text()
    assert fsdp_memory.page(text, result) == text
    assert fsdp_memory.misses(result) == []
    assert result["rows"].keys() == fsdp_memory.CASES.keys()
    # The script still counts what was recorded: bytes do not depend on the machine.
    case = "LoRA, reference model"
    assert fsdp_memory.counted(tmp_path, case) == result["rows"][case]["1"]
    for part, ranks in (("reference", "4"), ("optimizer", "2")):
        result["rows"][case][ranks][part] *= 2
    missed = fsdp_memory.misses(result)
    assert [miss.split(" bytes")[0].split(": ")[0] for miss in missed] == [
        f"{case}, 2 ranks",
        f"{case}, 4 ranks",
    ]


def test_the_page_of_sharded_training_is_of_its_record() -> None:
    result = json.loads(sharded.RESULT.read_text())
    assert sharded.PAGE.read_text() == sharded.page(result)
    assert sharded.misses(result) == []
    assert {mode for row in result["rows"].values() for mode in row} == {
        *sharded.MODES,
        sharded.PARALLEL,
        sharded.CONTEXT,
    }
    result["rows"]["full, none"]["ZeRO-3"]["gradients"] = math.nan
    assert sharded.misses(result) == ["ZeRO-3, full, none: gradients nan"]


def test_the_page_of_pictures_is_of_its_record() -> None:
    pytest.importorskip("trl")
    import pictures

    result = json.loads(pictures.RESULT.read_text())
    assert pictures.PAGE.read_text() == pictures.page(result)
    assert pictures.misses(result) == []
    assert result["rows"].keys() == result["trl"].keys() == {f.name for f in pictures.FAMILIES}
    first = next(iter(result["rows"]))
    result["rows"][first]["texts"]["float32"]["logps"] = math.nan
    result["trl"][first]["LoRA"]["loss"] = 1.0
    assert pictures.misses(result) == [
        f"{first}, texts, float32: logps nan",
        f"{first}, TRL, LoRA: loss 1.0e+00",
    ]


def test_the_results_page_s_numbers_are_the_result_s() -> None:
    """The numbers of the page's tables are in the file, row by row."""
    section = (ROOT / "docs/results.md").read_text().split(readme.MARKERS[0])[1]
    report = json.loads((ROOT / "bench/results/bench-cpu.json").read_text())
    assert report["finished"]
    rows = {
        (row["task"], row["provider"]): row
        for row in report["rows"]
        if row["suite"] == "operator" and row["shape"] == report["shapes"][0]["name"]
    }
    found = re.findall(r"^\| (frozen|trainable) \| ([a-z -]+) \| (.*) \|$", section, re.MULTILINE)
    backward = {key: row for key, row in rows.items() if key[0] != "forward"}
    assert len(found) == len([row for row in backward.values() if not row["failure"]])
    for (_, provider), row in backward.items():
        reason = row["failure"] and readme.why_not(row["failure"])
        assert not reason or f"{provider} (frozen, trainable): {reason}" in section
    for task, provider, cells in found:
        row = rows[task, provider]
        nhv, mib, _, _, dhidden, _, ms, processor, _ = (cell.strip() for cell in cells.split("|"))
        assert nhv == ("-" if row["operations_nhv"] is None else f"{row['operations_nhv']:.2f}")
        shown = ((mib, "peak_mib"), (ms, "median_ms"), (processor, "processor_ms"))
        for text, value in ((text, row[name]) for text, name in shown):
            assert (
                text == "-"
                if value is None
                else float(text.replace(",", "")) == pytest.approx(value, rel=0.006)
            )
        assert text_of(row["dhidden_error"]) == dhidden
    assert report["command"] in section and report["date"][:10] in section


def test_the_readme_s_numbers_are_the_result_s() -> None:
    section = (ROOT / "README.md").read_text().split(readme.MARKERS[0])[1]
    report = json.loads((ROOT / "bench/results/bench-cpu.json").read_text())
    shape = report["shapes"][0]["name"]
    rows = {
        (row["provider"], row["task"]): row
        for row in report["rows"]
        if (row["suite"], row["shape"]) == ("loss", shape)
    }
    for provider, label in readme.PEERS.items():
        (line,) = (line for line in section.splitlines() if line.startswith(f"| {label} |"))
        frozen, trained, mib, logp, dhidden, *times = line.strip("| ").split(" | ")[1:]
        row = rows[provider, "frozen"]
        assert float(frozen) == pytest.approx(row["operations_nhv"], abs=0.005)
        most = rows[provider, "trainable"]["operations_nhv"]
        assert float(trained.split(" to ")[-1]) == pytest.approx(most, abs=0.005)
        if provider == "prefkern":
            least = rows["prefkern-roomy", "trainable"]["operations_nhv"]
            assert float(trained.split(" to ")[0]) == least <= most
        assert float(mib) == pytest.approx(row["peak_mib"], rel=0.006)
        for ms, task in zip(times, ("frozen", "trainable"), strict=True):
            value = rows[provider, task]["processor_ms"]
            assert float(ms.replace(",", "")) == pytest.approx(value, rel=0.006)
        assert (logp, dhidden) == (text_of(row["sum_logp_error"]), text_of(row["dhidden_error"]))
    assert report["command"] in section and report["date"][:10] in section


def test_an_errors_own_text_is_in_no_page() -> None:
    """The page says in plain words why a provider was not measured."""
    for path in (*readme.RESULTS.glob("bench-*.json"),):
        for row in json.loads(path.read_text())["rows"]:
            if row["failure"] and not row["failure"].startswith("NotImplementedError"):
                assert all(row["failure"] not in page.read_text() for page in readme.PAGES)
    why = {
        "RuntimeError: 0 active drivers ([]). There should only be one.": "its kernels need a GPU",
        "not installed (liger_kernel)": "it was not installed",
        "out of memory": "memory ran out",
        "NotImplementedError: has no softcap": "it has no softcap",
        "ValueError: a shape": "it raised ValueError",
    }
    assert all(said in readme.why_not(failure) for failure, said in why.items())


def text_of(error: float | None) -> str:
    return "-" if error is None else f"{error:.1e}"


def test_a_changed_result_changes_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = json.loads((ROOT / "bench/results/bench-cpu.json").read_text())
    shape = report["shapes"][0]["name"]
    row = next(r for r in report["rows"] if r["shape"] == shape and r["task"] == "frozen")
    row["peak_mib"] = 4321.0
    row_of_another = next(r for r in report["rows"] if r["provider"] == "trl")
    row_of_another["failure"] = "out of memory"
    (tmp_path / "bench-gpu.json").write_text(json.dumps(report))
    (tmp_path / "bench-cpu.json").write_text(json.dumps(report))
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert readme.kept("bench-*.json") == ["bench-gpu.json", "bench-cpu.json"]
    assert "4,321" in readme.bench_section("bench-gpu.json")
    page = readme.every_table("bench-gpu.json")
    missing = [line for line in page.splitlines() if line.startswith("Not measured: ")]
    assert any("trl (forward): memory ran out" in line for line in missing)


def test_the_page_of_training_is_of_its_results() -> None:
    """No result is above its bound; a result that is would be shown as a miss."""
    pytest.importorskip("trl")
    import training

    result, twins = (json.loads(file.read_text()) for file in (training.RESULT, training.TWINS))
    assert training.PAGE.read_text() == training.page(result, twins)
    assert training.misses(result) == []
    broken = json.loads(json.dumps(result))
    broken["packing"][0]["gradient"] = 1e-3
    broken["resumption"][1]["weights_that_differ"] = 1
    broken["ranks"][2]["worst"] = float("nan")
    broken["adapter"][0]["dB"] = 1e-3
    assert len(training.misses(broken)) == 4


def test_a_family_is_agreed_with_refused_or_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    row = families.measure_class("GraniteForCausalLM")
    assert (row.status, row.transform) == ("agrees", "scale 0.125")
    assert row.value_error is not None and row.value_error < 1e-5
    assert row.gradient_error is not None and 0 < row.gradient_error < 1e-5
    refused = families.measure_class("ProphetNetForCausalLM")
    assert refused.status == "refused" and "[1, 2, 4, 97]" in refused.why
    assert "pixel_values" in families.measure_class("BlipForConditionalGeneration").why

    # A wrong reading that raises nothing is found, in values and in gradients alone.
    right = families.prefkern.token_logprobs
    for wrong in (
        lambda *batch: 1.001 * right(*batch),
        lambda *batch: right(*batch) + 0.01 * (each := right(*batch)) - 0.01 * each.detach(),
        lambda *batch: right(*batch) * torch.nan,
    ):
        monkeypatch.setattr(families.prefkern, "token_logprobs", wrong)
        assert families.measure_class("GraniteForCausalLM").status == "differs"


def test_the_page_of_families_is_the_result_s() -> None:
    report = json.loads((ROOT / "bench/results/families-cpu.json").read_text())
    assert families.page(report) == (ROOT / "bench/FAMILIES.md").read_text()
    rows = report["classes"] + report["families"]
    assert {row["status"] for row in rows} <= {"agrees", "refused", "not run"}
    assert sum(row["status"] == "agrees" for row in rows) > 250
    assert all(row["status"] == "agrees" for row in report["families"])
    for row in rows:
        assert row["status"] != "agrees" or row["value_error"] <= report["bounds"]["value"]


def test_the_page_of_sharing_is_the_result_s() -> None:
    import sharing

    report = json.loads(sharing.RESULT.read_text())
    assert sharing.page(report) == sharing.PAGE.read_text()
    assert 0 < sharing.spread(report["rows"], sharing.LENGTHS) < 1e-4
    assert 0 < sharing.spread(report["rows"], sharing.LENGTHS, "gradient_norms") < 1e-4
    # In bf16. All first losses are ln 2.
    assert sharing.spread(report["rows"], [sharing.DEMO]) < 1e-6
    assert 0 < sharing.spread(report["rows"], [sharing.DEMO], "gradient_norms") < 2e-2
    for name in sharing.LENGTHS:
        rows = {row["layout"]: row for row in report["rows"] if row["lengths"] == name}
        assert rows.keys() == sharing.LAYOUTS.keys()
        for key in ("operations", "peak_bytes", "seconds"):
            values = [rows[layout][key] for layout in sharing.LAYOUTS]
            assert values == sorted(values, reverse=True), (name, key)


def test_times_of_startup_are_within_their_bounds(tmp_path: Path) -> None:
    """The kept result; and that the script measures what the commands do."""
    import startup

    report = json.loads((ROOT / "bench/results/startup-cpu.json").read_text())
    assert {row["line"]: row["bound"] for row in report["rows"]} == startup.LINES
    for kept in report["rows"]:
        row = startup.Row(**{name: kept[name] for name in ("line", "bound", "status", "said")})
        row.seconds = kept["seconds"]
        assert len(row.seconds) >= 5 and kept["least"] == row.least
        assert startup.misses(row) == []
    row = startup.measure("train none.yaml", 2.0, str(tmp_path))
    assert (row.status, row.said) == (2, "prefkern train: error: no such file: none.yaml")
    assert row.least > 0
    row.seconds, row.status = [2.5], 1
    assert startup.misses(row) == ["exit status 1", "2.50 s of 2.0"]
