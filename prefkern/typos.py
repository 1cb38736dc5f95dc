"""A near typo of a known name: the name to propose in an error."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name that differs from a word by little: a letter or two, or their order.

    None if no name is that near: a name that is only similar means something else.
    """
    names = list(known)
    swapped = [name for name in names if sorted(name) == sorted(word)]
    close = swapped or difflib.get_close_matches(word, names, n=1, cutoff=0.75)
    return close[0] if close else None
