"""Preference datasets: loading, tokenisation, truncation, and a report of what became of them.

The formats are TRL's. Standard: `prompt`, `chosen`, `rejected` as text. Conversational: the same as
lists of messages, rendered by the tokenizer's chat template, with `tools` (a list, or JSON) and
`chat_template_kwargs` of the row. Implicit prompt: `chosen` and `rejected` only, whose common
beginning is the prompt. For KTO, which knows no pairs, a row is `prompt`, `completion` and a `label`
(whether it is desirable), or each response of a pair by itself. Images are refused, by name.

In reading order: `columns` (what a dataset has to have), `loading`, `formats` (a row's text to
tokens), `prefkern.truncation` (what becomes of a pair that is too long), `tokenisation` (all rows)
and `report`. Nothing is cut or dropped silently: a `DatasetReport` counts it.
"""

from __future__ import annotations

try:
    import datasets as datasets
except ImportError as error:
    raise ImportError(
        "training needs more packages than the operator does: pip install 'prefkern[train]'"
    ) from error

from prefkern.data.columns import (
    COLUMNS,
    REFERENCE_COLUMNS,
    check_columns,
    check_labels,
    without_unused,
)
from prefkern.data.formats import extract_prompt
from prefkern.data.loading import load_preference_dataset
from prefkern.data.report import DatasetReport, Lengths, show
from prefkern.data.tokenisation import tokenize_examples, tokenize_preferences
from prefkern.truncation import TRUNCATION_MODES, truncate

__all__ = [
    "COLUMNS",
    "REFERENCE_COLUMNS",
    "TRUNCATION_MODES",
    "DatasetReport",
    "Lengths",
    "check_columns",
    "check_labels",
    "extract_prompt",
    "load_preference_dataset",
    "show",
    "tokenize_examples",
    "tokenize_preferences",
    "truncate",
    "without_unused",
]
