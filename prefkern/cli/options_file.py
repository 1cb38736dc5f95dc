"""Reads a YAML or JSON file of options: its items, their lines, and errors with the place.

YAML's safe loader reads the file: it makes plain values and executes nothing. Two of its habits are
changed. A key that occurs twice is an error; YAML's own loaders silently take the last one. And
`1e-6` is a number, also deep inside a mapping; to YAML 1.1 it is text, since it has no dot.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml


@dataclass
class OptionsFile:
    """The items of a file."""

    path: Path
    values: dict[Any, Any]
    lines: dict[Any, int] = field(default_factory=dict)  # of keys, counted from 1; JSON has none
    # What the file says literally, by key: `no` where YAML reads False, `1.10` where it reads 1.1.
    texts: dict[Any, str] = field(default_factory=dict)

    def where(self, key: Any) -> str:
        return f"{self.path}, line {self.lines[key]}" if key in self.lines else str(self.path)


def read_options(path: Path) -> OptionsFile:
    """The file's items.

    Raises FileNotFoundError for a missing file, ValueError for a file that is not YAML (or JSON, by
    its name) or has a key twice, and TypeError for a file that is not a mapping.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from error
    read = _json(path, text) if path.suffix == ".json" else _yaml(path, text)
    if not isinstance(read.values, dict):
        raise TypeError(
            f"{path} must be a mapping of options to values, got {type(read.values).__name__}"
        )
    return read


def _json(path: Path, text: str) -> OptionsFile:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{path}: {name!r} occurs twice")
        return dict(pairs)

    try:
        return OptionsFile(path, json.loads(text, object_pairs_hook=once))
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{path}, {where}: {error.msg}") from error


def _yaml(path: Path, text: str) -> OptionsFile:
    try:
        loader = _Loader(text)
        return OptionsFile(path, loader.get_single_data(), loader.lines, loader.texts)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        raise ValueError(f"{path}{where}: {error.problem or 'this is not YAML'}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key that occurs twice, and keeps lines and texts of the top level."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lines: dict[Any, int] = {}
        self.texts: dict[Any, str] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        texts: dict[Any, str] = {}
        for key_node, value_node in node.value:
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
            if isinstance(value_node, yaml.ScalarNode):
                texts[key] = value_node.value
        # The top-level mapping is constructed first, so later ones do not replace its lines.
        if not self.lines:
            self.lines, self.texts = lines, texts
        return super().construct_mapping(node, deep)


# A number as YAML 1.2 has it, where 1.1 wants a dot before the exponent and a sign in it.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)
