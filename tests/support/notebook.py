"""Runs notebooks, and keeps their outputs: `python tests/support/notebook.py`, or `make notebook`.

The outputs are those of this machine, without what only its owner could read: paths, times of
execution, warnings on stderr.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
# An absolute path of a machine, or a file address.
PATH = re.compile(r"(?<![\w.:/])/(?:\w[\w.-]*/)+[\w.-]+|[A-Z]:\\\\|file://|site-packages")


def read(path: Path = NOTEBOOK) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8"))


def code_of(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def output_texts(cell: dict[str, Any]) -> list[str]:
    """Everything that a cell's outputs hold as text; a picture is its base64 text."""
    texts = []
    for output in cell["outputs"]:
        values = [output.get("text", ""), *output.get("data", {}).values()]
        texts += ["".join(value) for value in values if value]
    return texts


def executed(path: Path = NOTEBOOK) -> Any:
    """The notebook as nbclient leaves it, run in its own folder. Raises if a cell does."""
    import nbclient
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    # Times of execution would differ at each run.
    client = nbclient.NotebookClient(
        notebook,
        timeout=600,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"]
    return notebook


def main() -> int:
    import nbformat

    notebook = executed()
    # The kernel writes its Python's version and its editor's details there.
    notebook.metadata["language_info"] = {"name": "python"}
    nbformat.write(notebook, NOTEBOOK)
    print(f"{NOTEBOOK.relative_to(ROOT)}: {NOTEBOOK.stat().st_size / 1024:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
