"""The list of mutations fits this source, and the committed page fits the list."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

import mutations

ROOT = mutations.ROOT


@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=lambda each: each.breaks)
def test_a_mutation_is_of_this_source(mutation: mutations.Mutation) -> None:
    """Its text is in the source once, the replacement is Python, and its tests exist."""
    mutations.check(mutation)
    files = [part for part in shlex.split(mutation.tests) if part.endswith(".py")]
    assert files and all((ROOT / file).exists() for file in files)


def test_the_page_is_the_result_s_and_nothing_survives() -> None:
    report = json.loads(mutations.RESULT.read_text())
    assert mutations.PAGE.read_text() == mutations.page(report)
    assert {row["status"] for row in report["mutations"]} == {"killed"}
    names = [name for name in mutations.Mutation._fields]
    assert [tuple(row[name] for name in names) for row in report["mutations"]] == [
        tuple(each) for each in mutations.MUTATIONS
    ]


@pytest.mark.long
def test_verdicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a tree of one line: killed, survived, timeout, not found, and tests that fail anyway."""
    monkeypatch.setattr(mutations, "ROOT", tmp_path)
    monkeypatch.setattr(mutations, "COPIED", ("package",))
    (tmp_path / "Makefile").write_text("")
    package = tmp_path / "package"
    package.mkdir()
    (package / "code.py").write_text("ANSWER = 42\nUNSEEN = 1\n")
    (package / "test_code.py").write_text(
        "from code_under_test import *\n".replace("code_under_test", "package.code")
        + "import time\n"
        "def test_answer():\n"
        "    time.sleep(60 if ANSWER == 1 else 0)\n"
        "    assert ANSWER == 42\n"
        "def test_false():\n"
        "    assert False\n"
    )
    tests = "package/test_code.py -k answer"

    def mutation(old: str, new: str, tests: str = tests) -> mutations.Mutation:
        return mutations.Mutation("", "package/code.py", old, new, tests)

    copies = mutations._Copies(tmp_path / "copies", 1)
    cases = {
        "killed": mutation("42", "41"),
        "survived": mutation("UNSEEN = 1", "UNSEEN = 2"),
        "timeout": mutation("42", "1"),
        "not found": mutation("43", "41"),
        "not run": mutation("42", "41", "package/test_code.py -k false"),
    }
    outcomes = {}
    for status, each in cases.items():
        # What sleeps for a minute need not be waited for; the others take what they take.
        monkeypatch.setattr(mutations, "SECONDS", 3 if status == "timeout" else 60)
        outcomes[status] = copies.attempt(each)
    assert {status: each.status for status, each in outcomes.items()} == {s: s for s in cases}
    assert outcomes["killed"].killed_by == "package/test_code.py::test_answer"
    assert "without the change it fails as well" in outcomes["not run"].killed_by
    assert (package / "code.py").read_text() == "ANSWER = 42\nUNSEEN = 1\n"
    with pytest.raises(LookupError, match="0 times"):
        mutation("43", "41").applied(tmp_path)
