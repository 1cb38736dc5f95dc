"""The folders are the packages that are installed, and imports between them point one way."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# Where packages lie.
SOURCES = {"prefkern": ".", "prefkern_bench": "bench", "prefkern_kernels": "kernels"}
# Each is imported from below it, or from beside it, and must be found: importer and imported.
UPWARD = {
    "prefkern_kernels.tiles": "prefkern.ops.plan",
    "prefkern.ops.plan": "prefkern.loss.fused",
    "prefkern.objectives.running": "prefkern.ops.sequences",
    "prefkern.loss.checks": "prefkern.reference",
    "prefkern.reference": "prefkern.models.heads",
    "prefkern.models.heads": "prefkern.data.columns",
    "prefkern.data.columns": "prefkern.training.files",
    "prefkern.training.files": "prefkern.integrations.trl",
    "prefkern.integrations.trl.options": "prefkern_bench.shapes",
    "prefkern_bench.shapes": "prefkern.cli.plan",
}


def test_every_folder_of_modules_is_installed() -> None:
    found = {
        ".".join(file.parent.relative_to(ROOT / source).parts)
        for package, source in SOURCES.items()
        for file in (ROOT / source / package).rglob("*.py")
    }
    setuptools = PROJECT["tool"]["setuptools"]
    assert found == set(setuptools["packages"])
    for package in found:
        source = SOURCES[package.split(".")[0]]
        assert (ROOT / source / package.replace(".", "/") / "__init__.py").exists(), package
    places = {name: f"{source}/{name}" for name, source in SOURCES.items() if source != "."}
    assert setuptools["package-dir"] == places


@pytest.mark.parametrize("package", ["prefkern", "prefkern_kernels"])
def test_types_are_for_users_too(package: str) -> None:
    assert (ROOT / SOURCES[package] / package / "py.typed").exists()
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"][package]


def lint(root: Path) -> tuple[int, str]:
    """Run import-linter on a tree; returns its exit status and output."""
    path = os.pathsep.join(str(root / source) for source in SOURCES.values())
    command = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run(
        [sys.executable, "-c", command, "--no-cache"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_an_import_upwards_is_found(tmp_path: Path) -> None:
    pytest.importorskip("importlinter")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for package, source in SOURCES.items():
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / source / package, tmp_path / source / package, ignore=ignored)
    status, printed = lint(tmp_path)
    assert status == 0, printed
    for importer, imported in UPWARD.items():
        file = tmp_path / SOURCES[importer.split(".")[0]] / f"{importer.replace('.', '/')}.py"
        with file.open("a") as module:
            module.write(f"\nimport {imported}\n")
    status, printed = lint(tmp_path)
    assert status == 1, printed
    for importer, imported in UPWARD.items():
        assert f"{importer} -> {imported}" in " ".join(printed.split()), (importer, imported)
