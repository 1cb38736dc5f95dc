"""The options of a command: the fields of its dataclasses, some read from their source.

`transformers.TrainingArguments` takes seconds to import. `of_source` reads the fields of such a
class, and of its bases, from their files instead: nothing is imported, so `--help` and an unknown
option cost a fraction of a second, and the fields are those of the installed version. Where the
package is not installed, there are none. A default or help text that is not a literal, or a
literal's name in one of these files, is `UNKNOWN`. A test holds the result to the real classes.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

UNKNOWN: Any = type("Unknown", (), {"__repr__": lambda self: "UNKNOWN"})()


@dataclass(frozen=True)
class Option:
    """A field, as the command line needs it."""

    name: str
    kinds: frozenset[str]  # the names in its annotation: {"float", "None"} for `float | None`
    choices: tuple[Any, ...] | None = None
    default: Any = UNKNOWN
    help: str = ""
    aliases: tuple[str, ...] = ()  # as flags
    is_flag: bool = False  # may stand without a value, which then means true
    reads: Callable[[str], str] | None = None  # the choice that a text means


def of_class(kind: type) -> list[Option]:
    """The options of a dataclass; its module has postponed annotations."""
    return [
        _option(field.name, ast.parse(field.type, mode="eval").body, field.default, field.metadata)
        for field in dataclasses.fields(kind)
        if isinstance(field.type, str)
    ]


def of_source(module: str, name: str) -> list[Option]:
    """The options of a dataclass and its bases, in the order of its parameters.

    None of a class whose package is not installed.
    """
    if _file_of(module) is None:
        return []
    source = _Source(module)
    found: dict[str, Option] = {}
    for base in source.classes[name].bases:
        where = source.imported.get(ast.unparse(base))
        if where is not None:
            found |= {option.name: option for option in of_source(*where)}
    for node in source.classes[name].body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            if "ClassVar" in ast.unparse(node.annotation):
                continue
            given = node.value
            parts = {}
            if isinstance(given, ast.Call):
                parts = {str(each.arg): each.value for each in given.keywords}
            metadata = source.value(parts["metadata"]) if "metadata" in parts else {}
            default = source.value(parts["default"]) if "default" in parts else UNKNOWN
            if ast.unparse(parts.get("default_factory", ast.Constant(None))) == "list":
                default = []
            option = _option(node.target.id, node.annotation, default, metadata)
            values = [v for kind in option.kinds for v in source.members(kind)]
            if values:
                option = dataclasses.replace(option, choices=tuple(values))
            # As in a dataclass, a field that a subclass changes keeps its place.
            found[option.name] = option
    return list(found.values())


def _option(name: str, annotation: ast.expr, default: Any, metadata: Any) -> Option:
    kinds = _kinds(annotation)
    choices = metadata.get("choices")
    aliases = metadata.get("aliases", ())
    text = metadata.get("help", "")
    return Option(
        name,
        kinds,
        None if choices is None or choices is UNKNOWN else tuple(choices),
        default,
        "" if text is UNKNOWN else text,
        (aliases,) if isinstance(aliases, str) else tuple(aliases),
        "bool" in kinds or metadata.get("nargs") == "?",
        metadata.get("reads"),
    )


def _kinds(annotation: ast.expr) -> frozenset[str]:
    if isinstance(annotation, ast.BinOp):
        return _kinds(annotation.left) | _kinds(annotation.right)
    if isinstance(annotation, ast.Subscript):
        # Of a list also that it is one of numbers, which its texts are then read as.
        inside = _kinds(annotation.slice) if ast.unparse(annotation.value) == "list" else set()
        return _kinds(annotation.value) | (inside & {"int", "float"})
    return frozenset({ast.unparse(annotation)})


class _Source:
    """A module's classes, imports and constants, from its file."""

    def __init__(self, module: str) -> None:
        tree = _parsed(module)
        self.classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
        self.imported: dict[str, tuple[str, str]] = {}
        self.constants: dict[str, ast.expr] = {}
        package = module.split(".")
        for node in tree.body:
            if isinstance(node, ast.ImportFrom):
                above = ".".join(package[: -node.level]) if node.level else ""
                place = ".".join(filter(None, (above, node.module)))
                self.imported |= {n.asname or n.name: (place, n.name) for n in node.names}
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self.constants[node.targets[0].id] = node.value

    def value(self, node: ast.expr) -> Any:
        """The value of a literal, or of a constant's name; else UNKNOWN."""
        if isinstance(node, ast.Name) and node.id in self.constants:
            return self.value(self.constants[node.id])
        if isinstance(node, ast.Name) and node.id in self.imported:
            module, name = self.imported[node.id]
            return _Source(module).value(ast.Name(name)) if _file_of(module) else UNKNOWN
        if isinstance(node, ast.Dict) and all(node.keys):
            keys = [self.value(key) for key in node.keys if key is not None]
            return dict(zip(keys, map(self.value, node.values), strict=True))
        try:
            return ast.literal_eval(node)
        except ValueError:
            return UNKNOWN

    def members(self, name: str) -> list[Any]:
        """The values of an enum's members; none for anything else."""
        if name in self.imported:
            module, name = self.imported[name]
            return _Source(module).members(name) if _file_of(module) else []
        node = self.classes.get(name)
        if node is None or "Enum" not in "".join(map(ast.unparse, node.bases)):
            return []
        return [self.value(each.value) for each in node.body if isinstance(each, ast.Assign)]


@functools.cache
def _parsed(module: str) -> ast.Module:
    path = _file_of(module)
    assert path is not None, module
    return ast.parse(path.read_text(encoding="utf-8"))


def _file_of(module: str) -> Path | None:
    """A module's file, found without importing its package."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0], *rest)
    files = [path.with_suffix(".py"), path / "__init__.py"]
    return next((file for file in files if file.is_file()), None)
