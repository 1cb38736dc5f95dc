"""The study of objectives, end to end on a tiny model: JSON, picture, page, and nothing done twice."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from support import tiny

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("matplotlib")
pytest.importorskip("peft")

ROOT = Path(__file__).parent.parent.parent

import study

SEEDS, STEPS = 2, 2
RATIO_BASED = ("dpo", "adadpo", "madpo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A study of every objective on a dozen pairs, and its arguments."""
    folder = tmp_path_factory.mktemp("study")
    tiny.model().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    rows = "".join(json.dumps(row) + "\n" for row in tiny.pairs(20))
    (folder / "pairs.jsonl").write_text(rows)
    study.main(arguments(folder))
    return folder


def arguments(folder: Path, *more: str) -> list[str]:
    options = {
        "model": folder / "model",
        "data": folder / "pairs.jsonl",
        "seeds": SEEDS,
        "steps": STEPS,
        "pairs-a-step": 6,
        "held-out": 4,
        "evaluate-every": 1,
        "learning-rate": 0.01,
        "output": folder / "out",
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))] + [*more]


@pytest.fixture(scope="module")
def report(folder):
    return json.loads((folder / "out/study.json").read_text())


@pytest.mark.long
def test_every_curve_of_every_seed_is_there_and_finite(report):
    assert list(report["runs"]) == study.DEFAULT_OBJECTIVES
    curves = {panel[0] for panel in study.PANELS} | {curve for _, curve, _ in study.ROWS}
    for runs in report["runs"].values():
        assert [run["seed"] for run in runs] == [*range(SEEDS)]
        for run in runs:
            assert run["steps"] == [*range(STEPS + 1)]
            assert curves <= set(run["curves"])
            for values in run["curves"].values():
                assert len(values) == len(run["steps"])
                assert all(map(math.isfinite, values))
    for name in ("date", "device", "versions", "command", "settings", "margins", "objectives"):
        assert report[name]


@pytest.mark.long
def test_before_the_first_step_policy_and_reference_agree(report):
    for name in RATIO_BASED:
        for run in report["runs"][name]:
            assert run["curves"]["log_ratio_margin"][0] == 0
            assert run["curves"]["reward_ties"][0] == 1
            assert run["curves"]["reward_accuracy"][0] == 0
    for run in report["runs"]["dpo"]:
        assert run["curves"]["loss"][0] == pytest.approx(math.log(2), abs=1e-7)
    first = {
        tuple(run["curves"]["chosen_logps"][:1]) for runs in report["runs"].values() for run in runs
    }
    assert len(first) == 1


@pytest.mark.long
def test_balance_is_what_the_objectives_say_it_is(report):
    for run in report["runs"]["dpo"]:
        assert run["curves"]["chosen_share"] == [0.5] * (STEPS + 1)
    # AdaDPO's coefficients are DPO's while policy and reference agree.
    for run in report["runs"]["adadpo"]:
        assert run["curves"]["chosen_share"][0] == 0.5
        assert run["curves"]["chosen_share"][-1] != 0.5
    # beta (rho_w - rho_l) is DPO's reward margin.
    for run in report["runs"]["dpo"]:
        assert run["curves"]["kl_margin"] == pytest.approx(run["curves"]["reward_margin"], abs=1e-6)


@pytest.mark.long
def test_seeds_differ_and_training_moves(report):
    for runs in report["runs"].values():
        last = [run["curves"]["chosen_logps"][-1] for run in runs]
        assert len({*last, runs[0]["curves"]["chosen_logps"][0]}) == SEEDS + 1


@pytest.mark.long
def test_margins_are_those_of_the_command(folder, report):
    assert report["margins"]["source"] == "prefkern margins"
    for part, pairs in zip(("train", "held_out"), report["settings"]["pairs"], strict=True):
        rows = (folder / f"out/margins/{part}.jsonl").read_text().splitlines()
        assert len(rows) == pairs
        assert all(math.isfinite(json.loads(row)["margin"]) for row in rows)


@pytest.mark.long
def test_a_second_call_repeats_nothing(folder, report, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise AssertionError("a finished run was repeated")

    monkeypatch.setattr(study.Study, "train", refuse)
    monkeypatch.setattr(study.Study, "data", refuse)
    monkeypatch.setattr(study.margins_command, "main", refuse)
    study.main(arguments(folder))
    assert capsys.readouterr().out.count("done earlier") == SEEDS * len(report["runs"])
    again = json.loads((folder / "out/study.json").read_text())
    assert again["runs"] == report["runs"]
    # Other settings are another run.
    with pytest.raises(AssertionError, match="repeated"):
        study.main(arguments(folder, "--options", '{"simpo": {"gamma": 0.5}}'))


@pytest.mark.long
def test_a_run_is_determined_by_its_seed(folder, report):
    (folder / "out/runs/alphadpo-1.json").unlink()
    study.main(arguments(folder, "--json", str(folder / "again.json")))
    again = json.loads((folder / "again.json").read_text())["runs"]["alphadpo"][1]
    assert again["curves"] == report["runs"]["alphadpo"][1]["curves"]


@pytest.mark.long
def test_picture_and_page(folder, report):
    source, page = folder / "out/study.json", folder / "page.md"
    assert source.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    source.with_suffix(".png").unlink()
    page.write_text(f"above\n\n{study.START}stale\n{study.END}\nbelow\n")
    study.main(["--draw-only", str(source), "--page", str(page)])
    assert source.with_suffix(".png").stat().st_size > 10_000
    text = page.read_text()
    assert text.startswith("above\n") and text.endswith("\nbelow\n") and "stale" not in text
    assert "](out/study.png)" in text
    assert all(cell in text for cells in study.table_of(report).values() for cell in cells)


def test_the_page_has_the_figures_of_its_file():
    report = json.loads((ROOT / "bench/results/study-cpu.json").read_text())
    assert study.section(report, "results/study-cpu.png") in (ROOT / "bench/STUDY.md").read_text()


@pytest.mark.parametrize("name", ["kto", "tdpo1", "dpoo"])
def test_an_objective_that_cannot_be_studied_is_refused(tmp_path, name):
    with pytest.raises(SystemExit, match="study: "):
        study.main(["--objectives", name, "--output", str(tmp_path / "refused")])
