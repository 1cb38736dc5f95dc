"""Counts launches by kernel: so a test, or a user, can see that a kernel ran."""

from __future__ import annotations

import collections

launches: collections.Counter[str] = collections.Counter()


def count(kernel: str) -> None:
    launches[kernel] += 1
