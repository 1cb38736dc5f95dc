"""What packing and sharing save on a file of pairs: the second table of `prefkern plan --data`.

The files are read, tokenised, cut and mixed as `prefkern train` does it. Batches are drawn in a random
order of the seed. For each layout one epoch is counted:

    padded          2B rows (TPO: 3B), each as long as the batch's longest
    packed          all sequences in one row (`padding_free`)
    prompt shared   the same with each prompt once (`share_prompt`)

Operations are those of the matrix products: the policy's forward and backward, the reference's
forward (TPO has none), and the head as planned for both. Activations are bytes that forward keeps for backward, of
the largest step. `prefkern.models.body_cost` says how the body is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy
import torch

from prefkern.data import DatasetMix, load_preference_dataset, tokenize_preferences
from prefkern.data.columns import GOLD, check_columns, renamed, without_unused
from prefkern.data.report import DatasetReport
from prefkern.models.body_cost import BodyCost, Sequences
from prefkern.models.loading import load_tokenizer

if TYPE_CHECKING:
    from argparse import Namespace

    import datasets

LAYOUTS = ("padded", "packed", "prompt shared")


@dataclass(frozen=True)
class Pairs:
    """Lengths in tokens, after truncation."""

    prompts: numpy.ndarray  # (pairs,)
    responses: numpy.ndarray  # (2, pairs): chosen, rejected; of TPO the gold ones too
    scored_tokens: numpy.ndarray  # (pairs,) of all responses

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, rows: numpy.ndarray) -> Pairs:
        return Pairs(self.prompts[rows], self.responses[:, rows], self.scored_tokens[rows])

    def batches(self, size: int, seed: int) -> Iterator[Pairs]:
        """All pairs in a random order of the seed; the last batch may be smaller."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).numpy()
        for start in range(0, len(self), size):
            yield self.take(order[start : start + size])

    @property
    def scored(self) -> int:
        return int(self.scored_tokens.sum())

    @property
    def padded_length(self) -> int:
        return int((self.prompts + self.responses.max(0)).max())

    def sequences(self, layout: str) -> Sequences:
        """The sequences that the body computes of a batch."""
        own = (self.prompts + self.responses).reshape(-1)
        none = numpy.zeros_like(own)
        if layout == "padded":
            longest = numpy.full_like(own, self.padded_length)
            return Sequences(longest, none, True, has_padding=bool((own < longest).any()))
        if layout == "packed":
            return Sequences(own, none, False)
        # Each response but the chosen one begins with the last token of its prompt.
        others = slice(len(self), None)
        own[others] = (numpy.minimum(self.prompts, 1) + self.responses[1:]).reshape(-1)
        none[others] = numpy.tile(numpy.maximum(self.prompts - 1, 0), len(self.responses) - 1)
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


def read_pairs(args: Namespace) -> tuple[Pairs, list[DatasetReport]]:
    """The lengths of pairs as `prefkern train` cuts them, and a report of each file.

    Raises ValueError and OSError for a file or tokenizer that cannot be read.
    """
    tokenizer = load_tokenizer(args.model, {"trust_remote_code": args.trust_remote_code})
    parts, reports = {}, {}
    for source in args.data:
        dataset = load_preference_dataset(
            source, args.dataset_split, args.dataset_config, args.columns
        )
        dataset = renamed(dataset, args.columns, source)
        check_columns(dataset, source, gold=args.gold)
        parts[source], reports[source] = tokenize_preferences(
            without_unused(dataset, references=False, margins=False),
            tokenizer,
            max_length=args.max_length,
            max_prompt_length=args.max_prompt_length,
            truncation_mode=args.truncation_mode,
            num_proc=args.dataset_num_proc,
            name=source,
            gold=args.gold,
            assistant_only_loss=args.assistant_only_loss,
            last_turn_only=args.last_turn_only,
        )
    tokens = DatasetMix(parts, args.dataset_weights).mixed(args.seed, reports)
    return pairs_of(tokens), [*reports.values()]


def pairs_of(tokens: datasets.Dataset) -> Pairs:
    """The lengths of tokenised pairs."""
    sides = ("chosen", "rejected", GOLD)
    sides = [side for side in sides if f"{side}_ids" in tokens.column_names]
    prompts, *responses = (
        numpy.array([len(ids) for ids in tokens[column]], numpy.int64)
        for column in ("prompt_ids", *(f"{side}_ids" for side in sides))
    )
    # The first token of a sequence has nothing before it.
    scored = sum(responses) - len(responses) * (prompts == 0)
    if f"{sides[0]}_mask" in tokens.column_names:
        first = (prompts == 0).astype(numpy.int64)
        scored = sum(
            numpy.array([sum(mask[start:]) for mask, start in zip(column, first, strict=True)])
            for column in (tokens[f"{side}_mask"][:] for side in sides)
        )
    return Pairs(prompts, numpy.stack(responses), numpy.asarray(scored))


def epochs(
    steps: Sequence[Pairs], body: BodyCost, head: Callable[[int], int], reference: bool
) -> list[Epoch]:
    """The cost of all steps in each layout.

    Args:
        steps: the pairs of each.
        body: of policy and reference.
        head: the operations of the heads, from the number of scored tokens.
        reference: whether a reference runs too.
    """
    forwards = 1 + reference
    found = []
    for layout in LAYOUTS:
        tokens = operations = recomputed = kept = kept_checkpointed = 0
        for step in steps:
            sequences = step.sequences(layout)
            cost = body.of(sequences)
            tokens += sequences.tokens
            operations += forwards * cost.forward + cost.backward + head(step.scored)
            recomputed += cost.recomputed
            kept = max(kept, cost.kept)
            kept_checkpointed = max(kept_checkpointed, cost.kept_checkpointed)
        found.append(
            Epoch(layout, tokens, operations, operations + recomputed, kept, kept_checkpointed)
        )
    return found
