"""Launches counted by kernel: how a test, or a user, sees that a kernel ran."""

from __future__ import annotations

import collections

launches: collections.Counter[str] = collections.Counter()


def count(kernel: str) -> None:
    launches[kernel] += 1
