"""What tests expect of older versions of a package, and skip on them, is for versions that are tested."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.version import Version

from support import versions

ROOT = Path(__file__).parent.parent.parent
SINCE = {name: each for name, each in vars(versions).items() if isinstance(each, versions.Since)}


def pinned(file: str) -> dict[str, Version]:
    lines = re.findall(r"(?m)^([\w-]+)==([^\s;]+)", (ROOT / file).read_text())
    return {name: Version(version) for name, version in lines}


@pytest.mark.parametrize("name", SINCE)
def test_the_newest_has_it_and_the_oldest_has_not(name: str) -> None:
    """So the newest is held to the full test, and none of the branches for older ones is dead."""
    each = SINCE[name]
    newest, oldest = pinned("constraints.txt"), pinned("constraints-oldest.txt")
    assert oldest[each.package] < Version(each.version) <= newest[each.package]


def test_a_skip_says_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    each = versions.Since("pytest", "1000", "it has wheels")
    monkeypatch.setattr(versions.importlib.metadata, "version", lambda _: "9.1")
    (mark,) = each.param("wheels").marks
    assert mark.args == (True,)
    assert mark.kwargs == {"reason": "pytest 9.1 is before 1000: it has wheels"}
    assert each.is_too_old and not each.is_here
    monkeypatch.setattr(versions.importlib.metadata, "version", lambda _: "1000.0")
    assert each.is_here and not each.is_too_old and each.param("wheels").marks[0].args == (False,)


def test_a_package_that_is_missing_is_not_too_old() -> None:
    each = versions.Since("no-such-package", "1", "it is there")
    assert not each.is_here and not each.is_too_old


def test_tests_look_at_versions_through_the_table() -> None:
    """A skip for a version that nobody looks at would stay when the version is the newest."""
    found = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if re.search(r"pytest\.skip\(.*(older|this (trl|accelerate|peft))", path.read_text())
    }
    assert not found
