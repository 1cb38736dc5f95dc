"""Triton's interpreter, without what it looks for again at every call of a jitted function.

Before each launch, and each call of one jitted function by another, it lists all members of
`triton.language` to find the builtins that it stands in for, which takes longer than most of the
tests' programs. What they are called never changes.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any


def look_once() -> None:
    """Let the interpreter remember the names of the builtins of each module and class."""
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    @functools.cache
    def builtins(owner: Any) -> tuple[str, ...]:
        # At the first launch of all, when nothing is replaced yet.
        return tuple(name for name, member in inspect.getmembers(owner) if is_builtin(member))

    def patch(owner: Any, builder: Any, *scope: Any) -> None:
        for name in builtins(owner):
            member = getattr(owner, name)
            if is_builtin(member):
                interpreter._patch_attr(owner, name, member, builder, *scope)

    interpreter._patch_builtin = patch
