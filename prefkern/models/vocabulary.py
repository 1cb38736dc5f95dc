"""Checks that tokenizer, model and reference use the same vocabulary.

Nothing else fails if they do not. An id from another tokenizer is still a valid row of the model's
embedding if it is small enough. A reference with another vocabulary still returns log-probs, but of
other tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow.compute as pc

from prefkern.models.loading import load_tokenizer
from prefkern.models.text_inputs import embedding_rows

logger = logging.getLogger(__name__)

# Two tokenizers of one family may differ in reserved or added tokens; other ones share few ids.
_LEAST_SHARED = 0.9


def check_pad_token(tokenizer: Any, rows: int | None) -> None:
    """Raise ValueError if the embedding has no row for the pad token; `rows` None: unknown."""
    if rows is not None and tokenizer.pad_token_id >= rows:
        raise ValueError(
            f"the tokenizer's pad token {tokenizer.pad_token!r} has id {tokenizer.pad_token_id}, "
            f"but the model's embedding has {rows} rows; set another pad_token, or resize the "
            "embedding (model.resize_token_embeddings)"
        )


def check_tokens(
    dataset: Any, columns: Sequence[str], rows: int | None, name: str, whose: str = "model"
) -> None:
    """Raise ValueError for a token id that a model's embedding does not have.

    Args:
        dataset: a `datasets.Dataset`.
        columns: columns of token ids; the dataset may lack some.
        rows: number of rows of the model's embedding; None: unknown.
        name, whose: the names of the dataset and of the model in the error.
    """
    for column in (column for column in columns if column in dataset.column_names):
        largest = -1
        tables: Any = dataset.select_columns([column]).with_format("arrow").iter(batch_size=65536)
        for table in tables:
            ids = pc.list_flatten(table[column])  # pyright: ignore[reportAttributeAccessIssue]
            bounds = pc.min_max(ids).as_py()  # pyright: ignore[reportAttributeAccessIssue]
            if bounds["max"] is not None:
                largest = max(largest, bounds["max"])
                if bounds["min"] < 0:
                    raise ValueError(f"dataset {name!r} has token id {bounds['min']} in {column!r}")
        if rows is not None and largest >= rows:
            raise ValueError(
                f"dataset {name!r} has token id {largest} in {column!r}, but the {whose}'s "
                f"embedding has {rows} rows: the tokenizer belongs to another model"
            )


def check_reference_words(
    tokenizer: Any,
    model: Any,
    ref_model: Any,
    ref_name: str | None,
    ref_kwargs: Mapping[str, Any],
) -> None:
    """Raise ValueError for a reference with another vocabulary; warn if that cannot be decided.

    Args:
        ref_name: the folder or hub name of the reference and its tokenizer; None: unknown.
        ref_kwargs: keywords of `from_pretrained` that the reference was loaded with.
    """
    rows, ref_rows = embedding_rows(model), embedding_rows(ref_model)
    if ref_name is not None:
        try:
            theirs = load_tokenizer(ref_name, ref_kwargs).get_vocab()
        except (OSError, ValueError, KeyError):
            theirs = {}
        ours = tokenizer.get_vocab()
        shared = sum(theirs.get(token) == at for token, at in ours.items())
        if theirs and shared < _LEAST_SHARED * min(len(ours), len(theirs)):
            raise ValueError(
                f"ref_model {ref_name!r} has another vocabulary than the model: its tokenizer "
                f"agrees with the model's in {shared} of {len(ours)} entries; log-probs would be "
                "of other tokens. Give a reference of the same family"
            )
    if None not in (rows, ref_rows) and rows != ref_rows:
        logger.warning(
            "the model's embedding has %d rows and the reference's %d: if their tokenizers differ, "
            "the reference's log-probs are of other tokens",
            rows,
            ref_rows,
        )
