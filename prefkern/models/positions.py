"""Checks that a model has a position for each token of a dataset's longest row.

Some models have a table of positions (GPT-2, OPT, BERT; GPT-J and CTRL have tables of sines). A
token beyond the table gives an index error on a CPU. On a GPU it gives an assertion, after which
the process can run nothing more. So a longer row is an error here. Rotary and relative positions
have no such limit, but the model was not trained beyond its own length: a longer row gives a
warning. The user sets the bound on rows (`max_length`). It is not lowered automatically, because
truncation changes what is trained.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import pyarrow.compute as pc
from torch import nn

logger = logging.getLogger(__name__)

_TABLES = ("embed_positions", "pos_encoding")


def check_positions(
    dataset: Any,
    base: Any,
    name: str,
    *,
    max_length: int | None,
    multiple: int | None = None,
    whose: str = "model",
) -> None:
    """Raise ValueError for rows longer than the table of positions; without a table, warn.

    Args:
        dataset: tokenised pairs or single responses.
        base: the unwrapped Hugging Face model.
        name: the dataset's name in the error.
        max_length: the bound on prompt plus response that the rows were cut to, in tokens.
        multiple: batches are padded to a multiple of this length.
        whose: the model's name in the error.
    """
    known = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(known, int) or known <= 0:
        return
    table = _rows_of_table(base, known)
    longest = longest_row(dataset, max_length)
    padded = math.ceil(longest / (multiple or 1)) * (multiple or 1)
    if table is not None and padded > table:
        rounded = f" (padded to {padded}, a multiple of {multiple})" if padded > longest else ""
        raise ValueError(
            f"dataset {name!r} has a row of {longest} tokens{rounded}, but the {whose} "
            f"({type(base).__name__}) has {table} positions: max_length must be at most {table}, "
            f"got {max_length}"
        )
    if table is None and longest > known:
        logger.warning(
            "dataset %r has a row of %d tokens, but the %s (%s) was made for %d "
            "(max_position_embeddings): unless its positions are scaled, set max_length to that "
            "(it is %s)",
            name,
            longest,
            whose,
            type(base).__name__,
            known,
            max_length,
        )


def longest_row(dataset: Any, max_length: int | None) -> int:
    """The length in tokens of the longest prompt plus response that a batch may hold."""
    lengths = {}
    columns = [each for each in dataset.column_names if each.endswith("_ids")]
    tables: Any = dataset.select_columns(columns).with_format("arrow").iter(batch_size=65536)
    longest = 0
    most = dict.fromkeys(columns, 0)
    for table in tables:
        for column in columns:
            lengths[column] = pc.list_value_length(table[column])  # pyright: ignore[reportAttributeAccessIssue]
            most[column] = max(most[column], pc.max(lengths[column]).as_py() or 0)  # pyright: ignore[reportAttributeAccessIssue]
        for column in columns:
            if column != "prompt_ids":
                rows = pc.add(lengths["prompt_ids"], lengths[column])  # pyright: ignore[reportAttributeAccessIssue]
                longest = max(longest, pc.max(rows).as_py() or 0)  # pyright: ignore[reportAttributeAccessIssue]
    if "completion_ids" in most:
        # KTO also joins prompts with responses to other prompts, cut to max_length.
        mismatched = most["prompt_ids"] + most["completion_ids"]
        longest = max(longest, min(mismatched, max_length or mismatched))
    return longest


def _rows_of_table(base: Any, known: int) -> int | None:
    """The number of positions in a model's table; None for a model that computes positions."""
    for path, module in base.named_modules():
        name = path.rpartition(".")[2]
        # A smaller table may be a vision tower's, with a row for each patch.
        is_table = isinstance(module, nn.Embedding) and ("position" in name or name == "wpe")
        if is_table and module.num_embeddings >= known:
            # If the table has a padding row, positions begin after it.
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            return min(known, module.num_embeddings - first)
    for path, table in base.named_buffers():
        if path.rpartition(".")[2] in _TABLES and len(table) == known:
            return known
    return None
