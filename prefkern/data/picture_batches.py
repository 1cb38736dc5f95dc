"""A collator of rows with pictures: the batch of their tokens, and the pixels beside it.

Pixels are made here, batch by batch, by the processor: kept for a whole dataset they would fill the
disk. The chosen and the rejected row of a pair have the same pictures, so the inputs are made once
for the prompts of a batch and repeated for each side, in the order of its rows:

    rows      c1 c2 ... | r1 r2 ...
    pictures  p1 p2 ... | p1 p2 ...

All layouts of processors repeat along their first dimension: one entry a row (Idefics), a picture
(LLaVA, Gemma) or a patch (Qwen). Positions are the model's: it computes them from the tokens and the
pictures' grids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prefkern.data.collate import ExampleCollator, PreferenceCollator
from prefkern.data.columns import TYPE_COLUMNS, pictures_of
from prefkern.data.pictures import type_names

# What a processor returns of a text.
_OF_TEXT = ("input_ids", "attention_mask", *TYPE_COLUMNS)


@dataclass
class PictureCollator:
    """Rows with pictures -> a padded batch with the inputs of the model for these.

    Args:
        tokens: makes the batch of the tokens.
        processor: a Hugging Face processor.
        accepted: the names of the model's inputs. Types of tokens that it does not take are left
            out.

    Raises ValueError for a packed batch.
    """

    tokens: PreferenceCollator | ExampleCollator
    processor: Any
    accepted: frozenset[str]

    def __post_init__(self) -> None:
        if self.tokens.padding_free:
            raise ValueError("a packed row cannot have pictures; leave padding_free out")

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        batch = self.tokens(examples)
        sides = len(batch["input_ids"]) // len(examples)
        made = self._inputs(examples, sides, batch["input_ids"])
        if isinstance(self.tokens, ExampleCollator):
            rows = [examples[row] for row, _ in self.tokens.mismatches(examples)]
            others = self._inputs(rows, 1, batch["mismatched_input_ids"])
            made |= {f"mismatched_{name}": value for name, value in others.items()}
        return {**batch, **made}

    def _inputs(
        self, rows: Sequence[dict[str, Any]], sides: int, input_ids: Tensor
    ) -> dict[str, Tensor]:
        """The inputs for the prompts' pictures of a batch in which the rows repeat `sides` times."""
        found = pixels([pictures_of(row) for row in rows], self.processor)
        made = {name: torch.cat([value] * sides) for name, value in found.items()}
        for name in type_names(self.processor):
            if name not in self.accepted:
                continue
            made[name] = torch.zeros_like(input_ids)
            for at, row in enumerate([*rows] * sides):
                # A dataset of text alone, to evaluate on, does not have the column.
                own = torch.tensor(row.get(TYPE_COLUMNS[name], []), dtype=input_ids.dtype)
                made[name][at, : len(own)] = own
        return made


def pixels(pictures: Sequence[list[Any]], processor: Any) -> dict[str, Tensor]:
    """The model's inputs for the pictures of some rows; nothing if no row has one."""
    if not any(pictures):
        return {}
    placeholders = [" ".join([processor.image_token] * len(each)) for each in pictures]
    made: Mapping[str, Any] = processor(
        text=placeholders, images=[*pictures], padding=True, return_tensors="pt"
    )
    return {name: value for name, value in made.items() if name not in _OF_TEXT}
