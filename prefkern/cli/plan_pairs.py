"""What packing and sharing save on a file of pairs: the second table of `prefkern plan --data`.

The file is read, tokenised and cut as `prefkern train` does it. Batches are drawn in a random order
of the seed. For each layout one epoch is counted:

    padded          2B rows, each as long as the batch's longest
    packed          all sequences in one row (`padding_free`)
    prompt shared   the same with each prompt once (`share_prompt`)

Operations are those of the matrix products: the policy's forward and backward, the reference's
forward, and the head as planned for both. Activations are bytes that forward keeps for backward, of
the largest step. `prefkern.models.body_cost` says how the body is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy
import torch

from prefkern.data import load_preference_dataset, tokenize_preferences
from prefkern.data.columns import TOKEN_COLUMNS, check_columns, renamed, without_unused
from prefkern.data.report import DatasetReport
from prefkern.models.body_cost import BodyCost, Sequences
from prefkern.models.loading import load_tokenizer

if TYPE_CHECKING:
    from argparse import Namespace

LAYOUTS = ("padded", "packed", "prompt shared")


@dataclass(frozen=True)
class Pairs:
    """Lengths in tokens, after truncation."""

    prompts: numpy.ndarray
    chosen: numpy.ndarray
    rejected: numpy.ndarray

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, rows: numpy.ndarray) -> Pairs:
        return Pairs(self.prompts[rows], self.chosen[rows], self.rejected[rows])

    def batches(self, size: int, seed: int) -> Iterator[Pairs]:
        """All pairs in a random order of the seed; the last batch may be smaller."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).numpy()
        for start in range(0, len(self), size):
            yield self.take(order[start : start + size])

    @property
    def scored(self) -> int:
        """The tokens of the responses; the first token of a sequence has nothing before it."""
        unscored = 2 * int((self.prompts == 0).sum())
        return int((self.chosen + self.rejected).sum()) - unscored

    @property
    def padded_length(self) -> int:
        return int((self.prompts + numpy.maximum(self.chosen, self.rejected)).max())

    def sequences(self, layout: str) -> Sequences:
        """The sequences that the body computes of a batch."""
        own = numpy.concatenate([self.prompts + self.chosen, self.prompts + self.rejected])
        none = numpy.zeros_like(own)
        if layout == "padded":
            longest = numpy.full_like(own, self.padded_length)
            return Sequences(longest, none, True, has_padding=bool((own < longest).any()))
        if layout == "packed":
            return Sequences(own, none, False)
        # A rejected response begins with the last token of its prompt.
        own[len(self) :] = numpy.minimum(self.prompts, 1) + self.rejected
        none[len(self) :] = numpy.maximum(self.prompts - 1, 0)
        return Sequences(own, none, False)


@dataclass(frozen=True)
class Epoch:
    """One pass over the pairs in one layout; activations, in bytes, are of its largest step."""

    layout: str
    tokens: int
    operations: int
    operations_checkpointed: int
    activations: int
    activations_checkpointed: int


def read_pairs(args: Namespace) -> tuple[Pairs, DatasetReport]:
    """The lengths of a file's pairs as `prefkern train` cuts them, and its report.

    Raises ValueError and OSError for a file or tokenizer that cannot be read.
    """
    dataset = load_preference_dataset(
        args.data, args.dataset_split, args.dataset_config, args.columns
    )
    dataset = renamed(dataset, args.columns, args.data)
    check_columns(dataset, args.data)
    tokens, report = tokenize_preferences(
        without_unused(dataset, references=False, margins=False),
        load_tokenizer(args.model, {"trust_remote_code": args.trust_remote_code}),
        max_length=args.max_length,
        max_prompt_length=args.max_prompt_length,
        truncation_mode=args.truncation_mode,
        num_proc=args.dataset_num_proc,
        name=args.data,
    )
    lengths = {
        column: numpy.array([len(ids) for ids in tokens[column]], numpy.int64)
        for column in TOKEN_COLUMNS
    }
    return Pairs(*lengths.values()), report


def epochs(steps: Sequence[Pairs], body: BodyCost, head: Callable[[int], int]) -> list[Epoch]:
    """The cost of all steps in each layout.

    Args:
        steps: the pairs of each.
        body: of policy and reference.
        head: the operations of both heads, from the number of scored tokens.
    """
    found = []
    for layout in LAYOUTS:
        tokens = operations = recomputed = kept = kept_checkpointed = 0
        for step in steps:
            sequences = step.sequences(layout)
            cost = body.of(sequences)
            tokens += sequences.tokens
            operations += 2 * cost.forward + cost.backward + head(step.scored)
            recomputed += cost.recomputed
            kept = max(kept, cost.kept)
            kept_checkpointed = max(kept_checkpointed, cost.kept_checkpointed)
        found.append(
            Epoch(layout, tokens, operations, operations + recomputed, kept, kept_checkpointed)
        )
    return found
