"""Preference datasets: loading, tokenisation, truncation, and a report on the result.

The formats are TRL's. Standard: `prompt`, `chosen` and `rejected` are text. Conversational: they
are lists of messages, which the tokenizer's chat template renders; a row may also have `tools` (a
list, or JSON) and `chat_template_kwargs`. Implicit prompt: a row has `chosen` and `rejected` only,
and their common beginning is the prompt. KTO needs no pairs: a row is `prompt`, `completion` and
`label` (true if the response is desirable), or a pair whose two responses count one by one. A prompt
may have pictures (`images` or `image`); videos and audio are not supported: an error names the
column. `columns` maps other names. The formats of others (Alpaca's, ShareGPT's, Orca's and more) are
recognised and converted to these.

In reading order: `columns` (the columns that a dataset needs), `foreign` (the formats of others,
`rankings` among them),
`sources` (where a dataset is), `loading`, `messages` (what a cell holds), `rendering` (the chat
template, and what it leaves out), `turns` (which tokens of a conversation are scored), `pictures` (of
a prompt), `formats` (a row to tokens), `truncation` (pairs that are too long), `tokenisation` (all
rows), `shown` (rows to look at), `report`, with its counts in `marks`, `mixing` (several datasets) and
`streams`, then `collate` and `picture_batches` (rows to batches).
Nothing is cut or dropped silently: a `DatasetReport` counts it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from prefkern.data.columns import (
    COLUMNS,
    REFERENCE_COLUMNS,
    check_columns,
    check_labels,
    without_unused,
)
from prefkern.data.mixing import DatasetMix
from prefkern.data.rankings import ranked_pairs
from prefkern.data.report import DatasetReport, Lengths, show
from prefkern.data.truncation import TRUNCATION_MODES, truncate
from prefkern.version import install_line

if TYPE_CHECKING:
    from prefkern.data.formats import extract_prompt
    from prefkern.data.loading import load_preference_dataset, load_preference_stream
    from prefkern.data.tokenisation import tokenize_examples, tokenize_preferences
    from prefkern.data.turns import conversation_labels

__all__ = [
    "COLUMNS",
    "REFERENCE_COLUMNS",
    "TRUNCATION_MODES",
    "DatasetMix",
    "DatasetReport",
    "Lengths",
    "check_columns",
    "check_labels",
    "conversation_labels",
    "extract_prompt",
    "load_preference_dataset",
    "load_preference_stream",
    "ranked_pairs",
    "show",
    "tokenize_examples",
    "tokenize_preferences",
    "truncate",
    "without_unused",
]

# These need `datasets`, `jinja2` or `transformers`, so they are imported at first use.
_LAZY = {
    "conversation_labels": "turns",
    "extract_prompt": "formats",
    "load_preference_dataset": "loading",
    "load_preference_stream": "loading",
    "tokenize_examples": "tokenisation",
    "tokenize_preferences": "tokenisation",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'prefkern.data' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"prefkern.data.{_LAZY[name]}"), name)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"training needs more packages than the operator does ({error.name}): "
            + install_line("train")
        ) from error


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
