"""The notebook of examples/: it runs, and its file holds outputs that are small and say no path."""

from __future__ import annotations

import json
import os
import re
import runpy
from importlib import metadata

import pytest

from support import notebook
from support.processes import PYTHONPATH

NOTEBOOK = notebook.read()
CELLS = notebook.code_cells(NOTEBOOK)


def said(contents: dict) -> str:
    return "\n".join(
        t for cell in notebook.code_cells(contents) for t in notebook.output_texts(cell)
    )


def check_what_it_shows(text: str) -> None:
    """Kinder after than before, pairs in order, and a loss in a fraction of the memory."""
    before, after = re.search(r"adjectives: (\d+)% before, (\d+)% after", text).groups()
    assert int(after) >= int(before) + 10
    assert float(re.search(r"eval_rewards/accuracies +([\d.]+)", text)[1]) > 0.7
    peaks = dict(re.findall(r"(with_\w+) +peak +([\d.]+) MiB", text))
    assert 10 * float(peaks["with_prefkern"]) < float(peaks["with_logits"])
    assert float(re.search(r"gradients: (\S+) of the largest", text)[1]) < 1e-4
    assert "trained with AdaDPO" in text and "adapter_model.safetensors" in text


def test_the_outputs_are_kept():
    assert [cell["execution_count"] for cell in CELLS] == [*range(1, len(CELLS) + 1)]
    # All but the imports say something, and one draws.
    assert [i for i, cell in enumerate(CELLS) if not cell["outputs"]] == [0]
    kinds = [output["output_type"] for cell in CELLS for output in cell["outputs"]]
    assert {*kinds} == {"stream", "display_data"}
    pictures = [output for cell in CELLS for output in cell["outputs"] if "data" in output]
    assert len(pictures) == 1 and "image/png" in pictures[0]["data"]
    check_what_it_shows(said(NOTEBOOK))


def test_the_outputs_are_small_and_of_no_machine():
    assert notebook.NOTEBOOK.stat().st_size < 100_000
    for cell in CELLS:
        for output in cell["outputs"]:
            assert output.get("name") != "stderr"
            for text in notebook.output_texts({"outputs": [output]}):
                assert len(text) < 60_000
                is_picture = "image/png" in output.get("data", {})
                assert is_picture or not notebook.PATH.search(text), text
    assert NOTEBOOK["metadata"].keys() == {"kernelspec", "language_info"}
    assert NOTEBOOK["metadata"]["kernelspec"]["name"] == "python3"


@pytest.mark.parametrize(
    "text", ["/home/me/models/x", "in /tmp/tmp1/out", "C:\\\\Users", "lib/site-packages/x"]
)
def test_a_path_is_seen(text):
    assert notebook.PATH.search(text)


def test_its_links_are_files():
    texts = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if "outputs" not in cell]
    links = re.findall(r"\]\(([^)]+)\)", "\n".join(texts))
    assert links and all((notebook.NOTEBOOK.parent / link).is_file() for link in links)


@pytest.mark.long
def test_its_cells_run_as_a_script(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib").use("Agg")
    pytest.importorskip("peft")
    script = tmp_path / "quickstart.py"
    script.write_text("\n".join(notebook.code_of(cell) for cell in CELLS))
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script))
    check_what_it_shows(capsys.readouterr().out)


@pytest.mark.long
def test_it_runs_in_jupyter(monkeypatch):
    for package in ("nbclient", "ipykernel"):
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            pytest.skip(f"{package} is not installed: pip install 'prefkern[notebook]'")
    monkeypatch.setitem(os.environ, "PYTHONPATH", PYTHONPATH)
    contents = json.loads(json.dumps(notebook.executed()))
    check_what_it_shows(said(contents))
    for cell, kept in zip(notebook.code_cells(contents), CELLS, strict=True):
        now = [output["output_type"] for output in cell["outputs"]]
        assert now == [output["output_type"] for output in kept["outputs"]]
