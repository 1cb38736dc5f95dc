"""The place of a dataset: a file, a folder, or a name on the hub. Needs no `datasets`."""

from __future__ import annotations

from pathlib import Path

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def local_path(source: str) -> Path:
    """The path of a dataset, which a name on the hub is not.

    Raises FileNotFoundError for a name that is clearly a file or folder and does not exist.
    """
    path = Path(source).expanduser()
    looks_local = path.suffix in FORMATS or source.startswith((".", "/", "~"))
    if looks_local and not path.exists():
        raise FileNotFoundError(f"dataset {source!r}: no such file or folder")
    return path
