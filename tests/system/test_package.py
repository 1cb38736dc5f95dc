"""The source archive, the wheel and their metadata; and, long, `make dist`.

The build is that of `python -m build`: setuptools' own hooks, the wheel from the source archive.
"""

from __future__ import annotations

import email
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

from prefkern.objectives import citations

pytest.importorskip("setuptools", minversion="77")
yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Beside the repository's files, the archive has what setuptools writes.
WRITTEN = {"PKG-INFO", "setup.cfg"}
README = (ROOT / "README.md").read_text()


def of_the_repository() -> set[str]:
    """Its files, those not yet committed included."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone: which files belong to it is not known")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name for name in listed.splitlines() if (ROOT / name).exists()}


def clone(folder: Path) -> Path:
    """A copy of the repository's files, without what is ignored in this one."""
    for name in of_the_repository():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def build(kind: str, source: Path, out: Path) -> Path:
    code = f"import sys; from setuptools import build_meta as b; b.build_{kind}(sys.argv[1])"
    out.mkdir(exist_ok=True)
    made = subprocess.run(
        [sys.executable, "-c", code, out],
        cwd=source, env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    (file,) = out.iterdir()
    return file


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive, unpacked."""
    folder = tmp_path_factory.mktemp("archive")
    with tarfile.open(build("sdist", clone(folder / "clone"), folder / "sdist")) as file:
        file.extractall(folder, filter="data")
    return folder / f"prefkern-{PROJECT['version']}"


@pytest.fixture(scope="module")
def wheel(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    return zipfile.ZipFile(build("wheel", archive, tmp_path_factory.mktemp("wheel") / "wheel"))


def metadata(wheel: zipfile.ZipFile) -> email.message.Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(wheel.read(name))


def test_the_archive_has_every_file_of_the_repository(archive: Path) -> None:
    found = {p.relative_to(archive).as_posix() for p in archive.rglob("*") if p.is_file()}
    found = {name for name in found if not name.startswith("prefkern.egg-info/")} - WRITTEN
    assert found == of_the_repository()
    assert {"kernels/prefkern_kernels/py.typed", "LICENSE", "tests/conftest.py"} <= found


def test_the_wheel_has_the_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    info = f"prefkern-{PROJECT['version']}.dist-info"
    modules = {
        file.relative_to(ROOT / source).as_posix()
        for source, package in (
            (".", "prefkern"),
            ("bench", "prefkern_bench"),
            ("kernels", "prefkern_kernels"),
        )
        for file in (ROOT / source / package).rglob("*")
        if file.suffix in {".py", ".md"} or file.name == "py.typed"
    }
    rest = {name for name in wheel.namelist() if not name.startswith(f"{info}/")}
    assert rest == modules
    assert {"prefkern/py.typed", "prefkern_kernels/py.typed", "prefkern_kernels/tiles.py"} <= rest
    license_ = wheel.read(f"{info}/licenses/LICENSE").decode()
    assert license_ == (ROOT / "LICENSE").read_text()
    assert (
        "prefkern = prefkern.cli.__main__:main" in wheel.read(f"{info}/entry_points.txt").decode()
    )


def test_the_metadata(wheel: zipfile.ZipFile) -> None:
    given = metadata(wheel)
    assert given["Name"] == "prefkern" and given["Version"] == PROJECT["version"]
    assert given["Author"] == "prefkern developers"
    assert given["License-Expression"] == "Apache-2.0"
    assert given["Keywords"].split(",") == PROJECT["keywords"] and len(PROJECT["keywords"]) > 5
    assert given.get_all("Classifier") == PROJECT["classifiers"] and len(PROJECT["classifiers"]) > 5
    extras = set(given.get_all("Provides-Extra") or ())
    assert extras == PROJECT["optional-dependencies"].keys()
    # No address of the project is known, so none is given.
    assert given.get_all("Project-URL") is None and given["Home-page"] is None


def test_the_description_reads_outside_the_repository(wheel: zipfile.ZipFile) -> None:
    """No link to a file, no picture among the files; every other line is the README's."""
    given = metadata(wheel)
    assert given["Description-Content-Type"] == "text/markdown"
    shown = given.get_payload(decode=True).decode()
    assert all(
        target.startswith("https://") for target in re.findall(r"\]\(([^)]*)\)", prose(shown))
    )
    assert "](" in prose(README) and "![" in README and "![" not in shown
    assert blocks(shown) == blocks(README) and len(blocks(README)) > 4
    kept = [line for line in prose(README).splitlines() if line and not line.startswith("![")]
    lines = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", line) for line in kept]
    assert [line for line in prose(shown).splitlines() if line][:-1] == lines
    assert "`docs/`, `bench/` and `examples/`" in " ".join(shown.split()[-30:])


def test_links_of_a_description() -> None:
    spec = importlib.util.spec_from_file_location("setup_of_prefkern", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = "a [file](docs/a.md#b), [here](#there), [web](https://x.org/a) and\n\n![p](a.png)\n\nb\n"
    code = "```python\ntables[0](x)\n```\n"
    assert module.described(text + code) == (
        "a file, here, [web](https://x.org/a) and\n\nb\n" + code + module.PLACES
    )


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def blocks(text: str) -> list[str]:
    return re.findall(r"^```.*?^```$", text, flags=re.DOTALL | re.MULTILINE)


def test_the_version_is_written_once() -> None:
    """Other files that name it agree with pyproject.toml."""
    version = PROJECT["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == version
    changelog = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## \[([^\]]+)\]", changelog, re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert headings[1:2] == [version] or f"version, {version}, is not released yet" in changelog
    for file in (*ROOT.glob("prefkern/**/*.py"), *ROOT.glob("kernels/**/*.py")):
        assert f'"{version}"' not in file.read_text(), file


def test_the_citation_names_the_three_papers() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["type"] == "software" and citation["cff-version"] == "1.2.0"
    assert citation["license"] == PROJECT["license"]
    assert citation["authors"] == PROJECT["authors"]
    assert [_of_cff(paper) for paper in citation["references"]] == [
        (paper.title, paper.authors, paper.year, f"arXiv:{paper.arxiv}")
        for paper in (citations.ADADPO, citations.ALPHA_DPO, citations.MADPO)
    ]


def _of_cff(paper: dict[str, Any]) -> tuple[str, str, int, str]:
    names = [f"{each['given-names']} {each['family-names']}" for each in paper["authors"]]
    assert paper["type"] == "article"
    return paper["title"], " and ".join(names), paper["year"], paper["identifiers"][0]["value"]


def test_a_report_of_a_fault_has_what_is_needed() -> None:
    folder = ROOT / ".github/ISSUE_TEMPLATE"
    forms = {file.stem: yaml.safe_load(file.read_text()) for file in folder.glob("*.yml")}
    assert {"bug", "idea"} <= forms.keys()
    asked = {part["id"]: part for part in forms["bug"]["body"]}
    for name, line in (("env", "prefkern env"), ("check", "prefkern check --quick")):
        assert line in asked[name]["attributes"]["label"]
        assert asked[name]["validations"]["required"] is True
    for form in (forms["bug"], forms["idea"]):
        assert form["name"] and form["description"]
        assert all(
            part["type"] == "textarea" and part["attributes"]["label"] for part in form["body"]
        )


@pytest.mark.long
def test_the_wheel_in_a_fresh_environment(tmp_path: Path) -> None:
    """`make dist`: build, twine, and what a user does first. Needs a package index."""
    made = subprocess.run(
        ["make", "dist", f"PYTHON={sys.executable}"],
        cwd=clone(tmp_path), env={**os.environ, "PYTHONPATH": "", "MAKEFLAGS": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stdout[-3000:] + made.stderr[-3000:]
    assert made.stdout.count("PASSED") == 2 and "WARNING" not in made.stdout
    for part in ("without extras: as it should be", "train: as it should be", "saved to "):
        assert part in made.stdout
    names = {file.name for file in (tmp_path / "dist").iterdir()}
    stem = f"prefkern-{PROJECT['version']}"
    assert names == {f"{stem}.tar.gz", f"{stem}-py3-none-any.whl"}
