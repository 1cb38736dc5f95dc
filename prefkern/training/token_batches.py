"""Batches of pairs by tokens: as many pairs as fit a budget, whatever their lengths.

A batch of a fixed number of pairs needs the memory of its longest pairs. A batch of at most so many
tokens needs about the same memory each time. `TokenBatches` is the batch sampler for that.

Training packs by first fit over windows of the shuffled order: each pair goes into the first batch
of its window that has room for it. Windows bound the work. Pairs are not sorted by length first,
which would fill batches better by a few percent. It would also put short pairs together, and in a
mean over the pairs of a step each of these would weigh less than a long one. Evaluation takes
consecutive pairs of the dataset's own order.

Trainer takes the number of steps from the length of the first epoch, and an interrupted run counts
its epochs by it. So every epoch has the same number of batches. It is the largest of the first few
epochs, as they are drawn. If a later epoch needs more batches, it is drawn again; if an epoch needs
fewer, its largest batches are cut in two.

Every rank computes the batches of all ranks and takes its own. So all ranks have the same number of
batches, without communication: batches are cut in two until their number is a multiple of the
ranks. If each batch is one pair already, the first ones are repeated instead. All draws depend on
the seed and the epoch alone: a resumed run skips the batches that it has seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import cycle, islice
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, Sampler

from prefkern.data.columns import GOLD_IDS, TOKEN_COLUMNS

# Pairs of the shuffled order that are packed together.
_WINDOW = 1024
# Epochs whose draws decide the number of batches.
_DRAFTS = 4
# What a loader is made of, beside its dataset and its batches.
_OPTIONS = (
    "collate_fn",
    "num_workers",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "prefetch_factor",
    "persistent_workers",
    "in_order",
)


class TokenBatches(Sampler[list[int]]):
    """This rank's batches of row numbers, each of at most `budget` tokens.

    Args:
        sizes: the tokens of each pair in a batch, none above the budget.
        budget: the bound on a batch's tokens.
        seed: shuffles the pairs of each epoch; None: the dataset's own order.
        rank, ranks: which of how many processes this is.

    Attributes:
        repeats: how many batches at the end of an epoch, over all ranks, repeat pairs; fewer than
            `ranks`.
    """

    def __init__(
        self,
        sizes: np.ndarray,  # (pairs,)
        budget: int,
        *,
        seed: int | None = None,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self._sizes = sizes
        self._budget = budget
        self._seed = seed
        self._rank = rank
        self._ranks = ranks
        self._epoch = 0
        epochs = range(1 if seed is None else _DRAFTS)
        most = max(len(next(self._drafts(epoch))) for epoch in epochs)
        self._count = math.ceil(most / ranks) * ranks
        self.repeats = max(self._count - len(sizes), 0)

    @property
    def repeats_last(self) -> bool:
        """Whether this rank's last batch repeats pairs."""
        return self._rank >= self._ranks - self.repeats

    @property
    def sampler(self) -> TokenBatches:
        """Where accelerate calls `set_epoch`, also on a loader that skips its first batches."""
        return self

    @property
    def description(self) -> dict[str, int | None]:
        """What the batches depend on, beside the order of the pairs."""
        return {
            "max_tokens_per_batch": self._budget,
            "pairs": len(self._sizes),
            "tokens": int(self._sizes.sum()),
            "seed": self._seed,
            "processes": self._ranks,
        }

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return self._count // self._ranks

    def __iter__(self) -> Iterator[list[int]]:
        yield from self._plan()[self._rank :: self._ranks]

    def rounds(self) -> list[list[list[int]]]:
        """The batches that the ranks compute at the same time, without the repeated ones."""
        plan = self._plan()[: self._count - self.repeats]
        return [plan[start : start + self._ranks] for start in range(0, len(plan), self._ranks)]

    def __str__(self) -> str:
        plan = self._plan()
        pairs = [len(batch) for batch in plan]
        tokens = [int(self._sizes[batch].sum()) for batch in plan]
        return (
            f"{len(plan)} batches of {min(pairs, default=0)} to {max(pairs, default=0)} pairs, "
            f"{sum(tokens) / max(len(tokens), 1):.0f} tokens on average and {max(tokens, default=0)} "
            f"at most (max_tokens_per_batch is {self._budget})"
        )

    def _plan(self) -> list[list[int]]:
        """All ranks' batches of the epoch."""
        drafts = self._drafts(self._epoch)
        return spread(next(each for each in drafts if len(each) <= self._count), self._count)

    def _drafts(self, epoch: int) -> Iterator[list[list[int]]]:
        """Batches of an epoch, drawn again each time."""
        if self._seed is None:
            yield consecutive(self._sizes, self._budget)
            return
        draws = np.random.default_rng((self._seed, epoch))
        while True:
            order = draws.permutation(len(self._sizes))
            batches = first_fit(order, self._sizes, self._budget)
            # Those of a window that were begun last are less full.
            yield [batches[place] for place in draws.permutation(len(batches))]


def first_fit(order: np.ndarray, sizes: np.ndarray, budget: int) -> list[list[int]]:
    """Rows in batches of at most `budget` tokens: each in the first batch with room for it."""
    batches: list[list[int]] = []
    # The batch that the window before began last: few pairs, which would weigh much in a step.
    carried: list[int] = []
    for start in range(0, len(order), _WINDOW):
        rows = order[start : start + _WINDOW].tolist()
        window = [carried] if carried else []
        room = np.full(1 + len(rows), budget)
        room[0] -= sizes[carried].sum()
        for row in rows:
            # A batch that is not begun has room for every row.
            first = int((room >= sizes[row]).argmax())
            if first == len(window):
                window.append([])
            window[first].append(row)
            room[first] -= sizes[row]
        carried = window.pop()
        batches += window
    return batches + [carried] if carried else batches


def consecutive(sizes: np.ndarray, budget: int) -> list[list[int]]:
    """Rows in their order, in batches of at most `budget` tokens."""
    batches: list[list[int]] = []
    room = 0
    for row, size in enumerate(sizes.tolist()):
        if not batches or size > room:
            batches.append([])
            room = budget
        batches[-1].append(row)
        room -= size
    return batches


def spread(batches: list[list[int]], count: int) -> list[list[int]]:
    """The same rows in `count` batches or, if there are fewer rows, with the first ones again."""
    batches = list(batches)
    while len(batches) < count:
        largest = max(range(len(batches)), key=lambda place: len(batches[place]))
        rows = batches[largest]
        half = len(rows) // 2
        if not half:
            break
        batches[largest : largest + 1] = [rows[:half], rows[half:]]
    return batches + list(islice(cycle(batches), count - len(batches)))


def pair_tokens(dataset: Any, shares: bool, gold: bool = False) -> np.ndarray:  # (pairs,)
    """How many tokens each tokenised pair has in a packed row, with or without a shared prompt."""
    columns = [*TOKEN_COLUMNS, *([GOLD_IDS] if gold else [])]
    parts = [np.zeros(0, dtype=np.int64)]
    tables: Any = dataset.select_columns(columns).with_format("arrow").iter(batch_size=65536)
    for table in tables:
        prompt, *responses = (
            pc.list_value_length(table[column]).to_numpy().astype(np.int64)  # pyright: ignore[reportAttributeAccessIssue]
            for column in columns
        )
        # A shared prompt's last token stands before each other response again.
        again = np.minimum(prompt, 1) if shares else prompt
        parts.append(prompt + sum(responses) + again * (len(responses) - 1))
    return np.concatenate(parts)


def check_budget(dataset: Any, name: str, budget: int, shares: bool, gold: bool = False) -> None:
    """Raise ValueError for a pair that no batch has room for."""
    sizes = pair_tokens(dataset, shares, gold)
    above = np.flatnonzero(sizes > budget)
    if len(above):
        raise ValueError(
            f"dataset {name!r}, row {above[0]} after tokenisation: the pair has "
            f"{sizes[above[0]]} tokens, and a batch has room for {budget} (max_tokens_per_batch); "
            f"{len(above)} such {'row' if len(above) == 1 else 'rows'}, the longest of "
            f"{sizes.max()}: raise max_tokens_per_batch, or lower max_length"
        )


def with_batches(loader: Any, batches: TokenBatches, device: torch.device) -> Any:
    """A loader like the given one, of these batches."""
    options: Any = {name: getattr(loader, name) for name in _OPTIONS}
    return prepare_data_loader(
        DataLoader(loader.dataset, batch_sampler=batches, **options),
        device,
        # The batches are this rank's own already.
        num_processes=1,
        process_index=0,
        put_on_device=True,
        dispatch_batches=False,
    )
