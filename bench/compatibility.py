"""Run the tests on this interpreter's versions, and record what passed, failed and was skipped.

usage: python bench/compatibility.py NAME [PYTEST OPTION ...]     (make test-oldest, test-newest, record)

NAME is the name of the set of versions in the record: oldest (constraints-oldest.txt, the lower
bounds of pyproject.toml), tested (constraints.txt) or newest (constraints-newest.txt). Writes
NAME's part of `bench/results/compatibility.json` and the page `bench/COMPATIBILITY.md`. Writes
nothing if an option selects tests (-k, a file). The exit status is pytest's.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from collections import Counter
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "bench/results/compatibility.json"
PAGE = ROOT / "bench/COMPATIBILITY.md"
NAMES = ("oldest", "tested", "newest")
OWN = "tests/system/test_compatibility.py::test_the_page_is_of_its_record"
PACKAGES = (
    *("torch", "triton", "transformers", "numpy", "accelerate", "datasets", "peft", "trl"),
    *("liger-kernel", "hypothesis", "pytest", "matplotlib", "pyyaml", "rich", "xxhash"),
)
HEAD = """\
# Versions that the tests pass on

The tests of `make test` on three sets of versions. *oldest*: the lower bounds of `pyproject.toml`
(`make test-oldest`). *tested*: the versions that `make test` installs (`make record`). *newest*:
the newest available versions (`make test-newest`).
"""


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "-"
    return found


def outcomes(junit: Path) -> dict[str, Any]:
    """The number of passed tests, the failed tests, and how many tests gave each skip reason."""
    passed, failed, skipped = 0, [], Counter()
    for case in ElementTree.parse(junit).iter("testcase"):
        skip = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(f"{case.get('classname')}.{case.get('name')}")
        elif skip is not None:
            skipped[skip.get("message") or ""] += 1
        else:
            passed += 1
    return {"passed": passed, "failed": failed, "skipped": dict(sorted(skipped.items()))}


def page(report: dict[str, Any]) -> str:
    runs = {name: report[name] for name in NAMES if name in report}
    rows = [("", *runs), ("---",) * (len(runs) + 1)]
    for package in ("python", *PACKAGES):
        rows.append((package, *(run["versions"][package] for run in runs.values())))
    rows += [
        ("passed", *(f"{run['passed']:,}" for run in runs.values())),
        ("failed", *(str(len(run["failed"])) for run in runs.values())),
        ("skipped", *(str(sum(run["skipped"].values())) for run in runs.values())),
        ("date", *(run["date"] for run in runs.values())),
    ]
    lines = [HEAD, *("| " + " | ".join(row) + " |" for row in rows)]
    for name, run in runs.items():
        for title, tests in (("Failed", run["failed"]), ("Skipped", _reasons(run["skipped"]))):
            if tests:
                lines += [f"\n## {title} on the {name}\n", *(f"- {test}" for test in tests)]
    return "\n".join(lines) + "\n"


def _reasons(skipped: dict[str, int]) -> list[str]:
    return [f"{count}: {reason}" for reason, count in skipped.items()]


def main(name: str, options: list[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        # Deselected: this test compares the page with the record, which is being replaced.
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={junit}", "--deselect", OWN]
        command += options
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        # Status 0 and 1: all tests ran. After any other status there is nothing to record.
        if status > 1:
            return status
        found = outcomes(junit)
    if any(option == "-k" or option.split("::")[0].endswith(".py") for option in options):
        return status
    report = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    report[name] = {"date": date.today().isoformat(), "versions": versions(), **found}
    report = {each: report[each] for each in NAMES if each in report}
    RESULT.write_text(json.dumps(report, indent=1) + "\n")
    PAGE.write_text(page(report))
    return status


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        sys.exit(f"usage: python bench/compatibility.py {'|'.join(NAMES)} [PYTEST OPTION ...]")
    sys.exit(main(sys.argv[1], sys.argv[2:]))
