"""Collators: tokenised rows to batches, padded on the right or packed into one row.

A batch of pairs has 2B rows: B chosen, then their B rejected. With a third response to each prompt
(TPO's gold one) it has 3B: the gold ones come last. A batch of single responses (KTO) has
S rows. Beside them it has the prompts of the batch with responses to other prompts; KTO estimates
its reference point from these.

A packed batch (`padding_free`) is one row of M tokens: all sequences end to end, without padding.
`cu_seqlens` says where each sequence begins. `prefkern.models.packing` turns it into a model's
inputs.

A packed batch of pairs may hold each prompt once (`share_prompt`):

    [p1 c1 p2 c2 ... | t1 r1 t2 r2 ...]     and, with gold responses, ... | t1 g1 t2 g2 ...]

t is the last token of the prompt again, which predicts the first token of the response r or g. So every token has one label, and `cu_seqlens` and `labels` are as in other packed batches.
`prefixes` says which earlier tokens a sequence sees: `t1 r1` sees p1 without its last token.

Only responses have labels; the labels of the prompt and of the padding are -100. So are those of
tokens that a row's mask leaves out (`chosen_mask`, `rejected_mask`, `completion_mask`). Labels are
not shifted here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from prefkern.data.columns import GOLD, REFERENCE_COLUMNS, pictures_of
from prefkern.data.truncation import truncate
from prefkern.data.turns import labels_of
from prefkern.models.scoring import IGNORE_INDEX


@dataclass
class PreferenceCollator:
    """Pairs -> padded batch of 2B rows: B chosen rows, then their B rejected rows.

    Args:
        pad_token_id: fills `input_ids` on the right.
        pad_to_multiple_of: rounds the length T up.
        padding_free: pack into one row without padding; the two arguments above have no effect
            then.
        share_prompt: hold a pair's prompt once in the row; needs `padding_free`.
        gold: B rows of gold responses (`reference_ids`) come after the 2B others, and 2B below is
            3B, except of `ref_logps`.

    A batch holds `input_ids`, `attention_mask`, `labels` ([2B, T] int64; the prompt's and padding's
    labels are -100) and, where the dataset has them, `ref_logps` ([2B] float32) and
    `reward_margins` ([B] float32). Packed, it holds `input_ids` and `labels` ([1, M]) and
    `cu_seqlens` ([2B + 1] int32) in place of the first three. With shared prompts it also holds
    `prefixes` ([2B, 2] int32: start and length).
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    padding_free: bool = False
    share_prompt: bool = False
    gold: bool = False

    def __post_init__(self) -> None:
        if self.share_prompt and not self.padding_free:
            raise ValueError("share_prompt needs padding_free=True: only a packed row can share")

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        prompts = [list(example["prompt_ids"]) for example in examples]
        sides = ("chosen", "rejected", *([GOLD] if self.gold else []))
        responses = [list(example[f"{side}_ids"]) for side in sides for example in examples]
        labels = [label for side in sides for label in _labels(examples, side)]
        if self.share_prompt:
            batch = _shared(prompts, responses, labels)
        else:
            batch = _batch(self, prompts * len(sides), responses, labels)
        if all(column in examples[0] for column in REFERENCE_COLUMNS):
            batch["ref_logps"] = torch.tensor(
                [example[column] for column in REFERENCE_COLUMNS for example in examples],
                dtype=torch.float32,
            )
        if "reward_margin" in examples[0]:
            batch["reward_margins"] = torch.tensor(
                [example["reward_margin"] for example in examples], dtype=torch.float32
            )
        return batch


@dataclass
class ExampleCollator:
    """Single responses -> padded batch of S rows, and a second one of mismatched rows (KTO).

    Args:
        pad_token_id, pad_to_multiple_of, padding_free: as in `PreferenceCollator`.
        max_length: bound on a mismatched prompt plus response. The prompt loses its beginning,
            whatever mode truncates the dataset, because each mismatched row needs a response. Beside
            pictures the response loses its end.

    A batch holds `input_ids`, `attention_mask`, `labels` ([S, T] int64) and `desirable` ([S] bool).
    It holds the first three again as `mismatched_...` ([M, T']): each prompt with the next response
    of the batch that answers another prompt. M is 0 if all prompts are equal. Packed, each group of
    three is as in `PreferenceCollator`.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    max_length: int | None = None
    padding_free: bool = False

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        prompts = [list(example["prompt_ids"]) for example in examples]
        responses = [list(example["completion_ids"]) for example in examples]
        labels = _labels(examples, "completion")
        batch = _batch(self, prompts, responses, labels)
        batch["desirable"] = torch.tensor([bool(example["desirable"]) for example in examples])
        mismatched = []
        for row, other in self.mismatches(examples):
            response = responses[other]
            # A picture's tokens cannot be cut.
            mode = "keep_start" if pictures_of(examples[row]) else "keep_end"
            bounds = (self.max_length, None, mode)
            cut, response, _ = truncate(prompts[row], response, response, *bounds)
            mismatched.append((cut, response, labels[other][: len(response)]))
        rows = _batch(self, *([row[part] for row in mismatched] for part in range(3)))
        return {**batch, **{f"mismatched_{name}": value for name, value in rows.items()}}

    def mismatches(self, examples: Sequence[dict[str, Any]]) -> list[tuple[int, int]]:
        """Rows with, for each, the next row of the batch that answers another prompt."""
        asked = [(list(example["prompt_ids"]), pictures_of(example)) for example in examples]
        count, found = len(examples), []
        for row in range(count):
            others = ((row + step) % count for step in range(1, count))
            other = next((each for each in others if asked[each] != asked[row]), None)
            if other is not None:
                found.append((row, other))
        return found


def sequence_count(batch: Mapping[str, Any]) -> int:
    """The number of sequences in a batch: its rows, or the sequences of its one packed row."""
    if "cu_seqlens" in batch:
        return len(batch["cu_seqlens"]) - 1
    return len(batch["input_ids"])


def first_sequence(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The first sequence of a batch as a batch of one, padded or packed."""
    if "cu_seqlens" not in batch:
        return {name: rows[:1] for name, rows in batch.items()}
    bounds = batch["cu_seqlens"][:2]
    row = {name: row[:, : int(bounds[1])] for name, row in batch.items() if name != "cu_seqlens"}
    return {**row, "cu_seqlens": bounds}


def _labels(examples: Sequence[dict[str, Any]], side: str) -> list[list[int]]:
    """The labels of responses: their tokens, but for those that the row's mask leaves out."""
    ids, mask = f"{side}_ids", f"{side}_mask"
    if mask not in examples[0]:
        return [list(example[ids]) for example in examples]
    return [labels_of(example[ids], example[mask]) for example in examples]


def _batch(
    collator: PreferenceCollator | ExampleCollator,
    prompts: list[list[int]],
    responses: list[list[int]],
    labels: list[list[int]],
) -> dict[str, Tensor]:
    if collator.padding_free:
        return _packed(prompts, responses, labels)
    return _padded(prompts, responses, labels, collator.pad_token_id, collator.pad_to_multiple_of)


def _packed(
    prompts: list[list[int]], responses: list[list[int]], labels: list[list[int]]
) -> dict[str, Tensor]:
    """Prompts and responses end to end in one row; only responses have labels."""
    pairs = [*zip(prompts, responses, strict=True)]
    ends = [0, *accumulate(len(prompt) + len(response) for prompt, response in pairs)]
    tokens = [token for prompt, response in pairs for token in (*prompt, *response)]
    targets = [
        label
        for prompt, own in zip(prompts, labels, strict=True)
        for label in (*[IGNORE_INDEX] * len(prompt), *own)
    ]
    return {
        "input_ids": torch.tensor([tokens], dtype=torch.int64),
        "labels": torch.tensor([targets], dtype=torch.int64),
        "cu_seqlens": torch.tensor(ends, dtype=torch.int32),
    }


def _shared(
    prompts: list[list[int]], responses: list[list[int]], labels: list[list[int]]
) -> dict[str, Tensor]:
    """A packed row in which each response but the chosen one follows on the prompt's last token."""
    others = len(responses) // max(len(prompts), 1) - 1
    batch = _packed(prompts + [prompt[-1:] for prompt in prompts] * others, responses, labels)
    starts = batch["cu_seqlens"].tolist()
    prefixes = [(0, 0)] * len(prompts)
    prefixes += [
        (start, max(len(prompt) - 1, 0)) for start, prompt in zip(starts, prompts, strict=False)
    ] * others
    return {**batch, "prefixes": torch.tensor(prefixes, dtype=torch.int32).view(-1, 2)}


def _padded(
    prompts: list[list[int]],
    responses: list[list[int]],
    labels: list[list[int]],
    pad_token_id: int,
    pad_to_multiple_of: int | None,
) -> dict[str, Tensor]:
    """Rows of prompt and response, padded on the right; only responses have labels."""
    longest = max((len(p) + len(r) for p, r in zip(prompts, responses, strict=True)), default=0)
    multiple = pad_to_multiple_of or 1
    shape = (len(prompts), math.ceil(longest / multiple) * multiple)
    input_ids = torch.full(shape, pad_token_id)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    targets = torch.full(shape, IGNORE_INDEX)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        start, end = len(prompt), len(prompt) + len(response)
        input_ids[row, :end] = torch.tensor(prompt + response)
        attention_mask[row, :end] = 1
        targets[row, start:end] = torch.tensor(labels[row])
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": targets}
