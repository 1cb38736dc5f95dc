"""Tokenizer, model and reference against one another: whether they mean the same words.

Nothing fails where they do not. Ids of another tokenizer are words of the model all the same, as
long as there are so many, and a reference with another vocabulary gives log-probs of other words.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow.compute as pc

from prefkern.models.loading import load_tokenizer
from prefkern.models.text_inputs import embedding_rows

logger = logging.getLogger(__name__)

# A tokenizer that names reserved tokens, or adds some, is the same one; another shares few ids.
_LEAST_SHARED = 0.9


def check_pad_token(tokenizer: Any, rows: int | None) -> None:
    """Raise ValueError for a pad token that the model cannot look up; rows None: not known."""
    if rows is not None and tokenizer.pad_token_id >= rows:
        raise ValueError(
            f"the tokenizer's pad token {tokenizer.pad_token!r} has id {tokenizer.pad_token_id}, "
            f"and the model's embedding {rows} rows; set another pad_token, or resize the "
            "embedding (model.resize_token_embeddings)"
        )


def check_tokens(
    dataset: Any, columns: Sequence[str], rows: int | None, name: str, whose: str = "model"
) -> None:
    """Raise ValueError for a token id that a model does not have.

    Args:
        dataset: a `datasets.Dataset`; columns: those of token ids, of which it need not have all.
        rows: of the model's embedding; None: not known.
        name, whose: what the error calls the dataset and the model.
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
                f"dataset {name!r} has token id {largest} in {column!r}, and the {whose}'s "
                f"embedding {rows} rows: the tokenizer is another model's"
            )


def check_reference_words(
    tokenizer: Any,
    model: Any,
    ref_model: Any,
    ref_name: str | None,
    ref_kwargs: Mapping[str, Any],
) -> None:
    """Raise ValueError for a reference with other words; warn where that cannot be told.

    Args:
        ref_name: where it was loaded from, and with it its tokenizer; None: not known.
        ref_kwargs: keywords of `from_pretrained` that it was loaded with.
    """
    rows, ref_rows = embedding_rows(model), embedding_rows(ref_model)
    if ref_name is not None:
        try:
            theirs = load_tokenizer(ref_name, ref_kwargs).get_vocab()
        except (OSError, ValueError, KeyError):
            theirs = {}
        ours = tokenizer.get_vocab()
        shared = sum(theirs.get(word) == at for word, at in ours.items())
        if theirs and shared < _LEAST_SHARED * min(len(ours), len(theirs)):
            raise ValueError(
                f"ref_model {ref_name!r} has another vocabulary than the model: its tokenizer "
                f"agrees with the model's in {shared} of {len(ours)} words; log-probs would be of "
                "other words. Give a reference of the same family"
            )
    if None not in (rows, ref_rows) and rows != ref_rows:
        logger.warning(
            "the model's embedding has %d rows and the reference's %d: if their tokenizers differ, "
            "the reference's log-probs are of other words",
            rows,
            ref_rows,
        )
