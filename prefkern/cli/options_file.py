"""Reads a YAML file of options: its items, their lines, and errors with file, line and column.

YAML's safe loader reads the file: it makes plain values and executes nothing. A key that occurs
twice is an error here. YAML's own loaders silently take the last one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def read_options(path: Path) -> tuple[dict[Any, Any], dict[Any, int]]:
    """The file's items, and the line of each key, counted from 1.

    Raises FileNotFoundError for a missing file, ValueError for a file that is not YAML or has a key
    twice, and TypeError for YAML that is not a mapping.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from error
    try:
        loader = _Loader(text)
        values = loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        raise ValueError(f"{path}{where}: {error.problem or 'this is not YAML'}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise TypeError(
            f"{path} must be a mapping of options to values, got {type(values).__name__}"
        )
    return values, loader.lines


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key that occurs twice, and keeps the lines of top-level keys."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lines: dict[Any, int] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key_node.tag == "tag:yaml.org,2002:merge" or not isinstance(key, str | int | float):
                continue
            line = key_node.start_mark.line + 1
            if key in lines:
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"{key!r} occurs twice, first in line {lines[key]}",
                    key_node.start_mark,
                )
            lines[key] = line
        # The top-level mapping is constructed first, so later ones do not replace its lines.
        self.lines = self.lines or lines
        return super().construct_mapping(node, deep)
