"""Finds the fault in a JSON file: the line, and what is wrong with it.

The readers of Arrow and pandas say only that parsing failed, at best with an offset into a block.
So a file that they refused is read again here, line by line, until the fault is found.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def in_json(path: Path) -> str | None:
    """The first fault of a JSON or JSONL file, with its line; None if none is found."""
    content = path.read_bytes()
    if path.suffix == ".json" and content.lstrip()[:1] == b"[":
        return _in_array(content)
    # A `.json` file may also hold one JSON object on each line.
    return _in_lines(content.split(b"\n"))


def _in_array(content: bytes) -> str | None:
    try:
        rows = json.loads(content.decode())
    except UnicodeDecodeError as error:
        return f"line {content[: error.start].count(10) + 1} is not UTF-8 ({error.reason})"
    except json.JSONDecodeError as error:
        return f"line {error.lineno}, column {error.colno} is not JSON: {error.msg}"
    return _unlike((f"entry {at}", row) for at, row in enumerate(rows))


def _in_lines(lines: list[bytes]) -> str | None:
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append((f"line {number}", json.loads(line.decode())))
        except UnicodeDecodeError as error:
            return f"line {number} is not UTF-8 ({error.reason} at byte {error.start})"
        except json.JSONDecodeError as error:
            return f"line {number}, column {error.colno} is not JSON: {error.msg}"
    return _unlike(rows)


def _unlike(rows: Iterable[tuple[str, Any]]) -> str | None:
    """The first row that is not an object, or whose column has another type than before."""
    seen: dict[str, tuple[str, str]] = {}
    for where, row in rows:
        if not isinstance(row, dict):
            return f"{where} must be an object with columns, got {json.dumps(row)[:60]}"
        for column, value in row.items():
            kind = _kind(value)
            if kind is None:
                continue
            before, known = seen.setdefault(column, (where, kind))
            if kind != known:
                return (
                    f"{where}: {column!r} is {kind}, but {known} in {before}; a column has one type"
                )
    return None


def _kind(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    return {str: "text", list: "a list", dict: "an object"}[type(value)]
