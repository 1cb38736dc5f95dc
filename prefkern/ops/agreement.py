"""Checks of a call that ranks end together: all go on, or all raise.

A rank that refuses its arguments sends nothing more, and the others would wait for it forever. So
before anything is computed the ranks of a group exchange small objects: what must be the same on
all of them, or the text of an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Party:
    """The ranks of a group that make a call together.

    Args:
        name: the group, as messages call it.
        share: what its ranks have in common, as a clause.
        special: names of facts that may differ between ranks, which `check` looks at.
        check: raises ValueError for the facts of all ranks; the same on each of them.
    """

    name: str
    group: ProcessGroup
    share: str
    special: tuple[str, ...] = ()
    check: Callable[[list[dict[str, Any]]], None] | None = None

    def compare(self, facts: Mapping[str, object]) -> None:
        """Raise, on every rank, if one of them sends an error or other facts than the rest."""
        everyone: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(everyone, facts, group=self.group)
        for rank, theirs in enumerate(everyone):
            if "error" in theirs:
                raise RuntimeError(
                    f"rank {rank} of {self.name} refused this call: {theirs['error']}"
                )
        first = everyone[0]
        # Another call has other names.
        for name in dict.fromkeys(name for theirs in everyone for name in theirs):
            for rank, theirs in enumerate(everyone):
                if name not in self.special and theirs.get(name) != first.get(name):
                    raise ValueError(
                        f"{name} must be the same on all ranks of {self.name}, {self.share}: rank 0 "
                        f"has {first.get(name)}, rank {rank} has {theirs.get(name)}"
                    )
        if self.check is not None:
            self.check(everyone)


class Agreement:
    """A context of checks that all ranks of one or two groups end together.

    It gives a dict for each party, None included. The body puts there what must be the same on all
    ranks of that party, by the name of an argument. If a rank raises, it raises its own error, and
    the others one with the text of that error.
    """

    def __init__(self, *parties: Party | None) -> None:
        self._parties = parties
        self._facts: tuple[dict[str, object], ...] = tuple({} for _ in parties)

    def admit(self, party: Party | None) -> dict[str, object]:
        """Add a party that the body has found, before the others; returns its dict."""
        facts: dict[str, object] = {}
        self._parties, self._facts = (party, *self._parties), (facts, *self._facts)
        return facts

    def __enter__(self) -> tuple[dict[str, object], ...]:
        return self._facts

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is not None and not isinstance(error, Exception):
            return
        found = error
        pairs = zip(self._parties, self._facts, strict=True)
        rounds = [(party, facts) for party, facts in pairs if party is not None]
        # Another group of this rank has not heard yet what the last one found.
        for party, facts in rounds + rounds[:-1]:
            told = facts
            if found is not None:
                told = {"error": f"{type(found).__name__}: {found}"}
            try:
                party.compare(told)
            except (ValueError, RuntimeError) as refusal:
                found = found or refusal
        if found is not None and found is not error:
            raise found


def checksum(integers: Tensor) -> str:  # (...) int64
    """A text that differs if numbers do, places included. One device synchronisation."""
    flat = integers.reshape(-1)
    # Sums and products of int64 wrap around; an odd factor loses no bit, and moves none down. So
    # the upper half, with a float64's sign and exponent, goes into the lower one before each product.
    places = torch.arange(flat.shape[0], device=flat.device) * 2 + 0x9E3779B1
    mixed = _folded((_folded(flat) + 0x5851F42D) * places)
    number = int(_folded(mixed * 0x5851F42D4C957F2D).sum()) & 0xFFFFFFFFFFFFFFFF
    return f"{flat.shape[0]} with checksum {number:016x}"


def _folded(integers: Tensor) -> Tensor:  # (n,) int64
    """One to one: the upper half, added to the lower one bit by bit."""
    return integers ^ (integers >> 32 & 0xFFFFFFFF)
