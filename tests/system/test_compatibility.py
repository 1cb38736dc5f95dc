"""The oldest versions are the lower bounds, and the committed page is made from its record."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent.parent

import compatibility

# Neither linters, nor what builds the site, nor what no test runs.
UNTESTED = {"import-linter", "pyright", "ruff", "gguf", "cut-cross-entropy"}
UNTESTED |= {"mkdocs-material", "mkdocstrings-python"}
# `make notebook` runs them.
UNTESTED |= {"ipykernel", "nbclient"}
# `make test-zero` runs it, in the version of constraints.txt.
UNTESTED |= {"deepspeed"}


def pins(name: str) -> dict[str, Version]:
    lines = (ROOT / name).read_text().splitlines()
    found = [re.fullmatch(r"([\w-]+)==([\w.]+)(;.*)?", line) for line in lines]
    return {match[1]: Version(match[2]) for match in found if match}


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    oldest = pins("constraints-oldest.txt")
    named = set()
    for line in (*project["dependencies"], *(line for extra in extras for line in extra)):
        bound = Requirement(line)
        if bound.name in UNTESTED:
            continue
        named.add(bound.name)
        (least,) = (each.version for each in bound.specifier if each.operator == ">=")
        # A bound of 3.6 is of its first release, whose number may be 3.6.1.
        pinned = oldest[bound.name]
        assert bound.specifier.contains(pinned), line
        assert pinned.release[: len(Version(least).release)] == Version(least).release, line
    assert oldest.keys() - named == {"numpy"}


def test_the_page_is_of_its_record() -> None:
    report = json.loads(compatibility.RESULT.read_text())
    assert compatibility.PAGE.read_text() == compatibility.page(report)
    assert [*report] == [name for name in compatibility.NAMES if name in report]
    constraints = {"oldest": "constraints-oldest.txt", "newest": "constraints-newest.txt"}
    for name, run in report.items():
        pinned = pins(constraints.get(name, "constraints.txt"))
        assert run["failed"] == [] and run["passed"] > 1000
        assert all(run["skipped"])
        for package in ("torch", "triton", "transformers", "peft", "numpy"):
            # A CPU build of the same version says so after a +.
            assert Version(run["versions"][package].split("+")[0]) == pinned[package]


@pytest.mark.long
def test_what_ran_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a run of tests in which one fails and two are skipped for the same reason."""
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "def test_passes(): pass\n"
        "def test_fails(): assert False\n"
        "@pytest.mark.parametrize('x', [1, 2])\n"
        "def test_skips(x): pytest.skip('no GPU')\n"
    )
    monkeypatch.setattr(compatibility, "ROOT", tmp_path)
    monkeypatch.setattr(compatibility, "RESULT", tmp_path / "result.json")
    monkeypatch.setattr(compatibility, "PAGE", tmp_path / "page.md")
    assert compatibility.main("oldest", ["-k", "passes"]) == 0
    assert not compatibility.RESULT.exists()
    assert compatibility.main("oldest", []) == 1
    assert compatibility.main("newest", ["no_such_folder"]) > 1
    report = json.loads(compatibility.RESULT.read_text())
    assert [*report] == ["oldest"]
    run = report["oldest"]
    assert (run["passed"], run["skipped"]) == (1, {"no GPU": 2})
    assert run["failed"] == ["test_it.test_fails"]
    assert compatibility.PAGE.read_text() == compatibility.page(report)
    for part in ("| passed | 1 |", "- test_it.test_fails", "- 2: no GPU"):
        assert part in compatibility.PAGE.read_text()
