"""Preference datasets: loading, tokenisation and truncation.

The formats are TRL's. Standard: `prompt`, `chosen`, `rejected` as text. Conversational: the same as
lists of messages, rendered by the tokenizer's chat template. Implicit prompt: `chosen` and
`rejected` only, whose common beginning is the prompt.

Prompt and prompt + response are tokenised whole, and the response starts where the two diverge, as
in TRL: no token boundary is invented. An end-of-sequence token closes text responses that lack it.

A pair longer than `max_length` loses the beginning of its prompt first, and the end of a response
only if the response alone does not fit. Chosen and rejected keep the same prompt. Nothing is cut or
dropped silently: a `DatasetReport` counts it.

For KTO, which knows no pairs, a row is `prompt`, `completion` and a `label` (whether it is
desirable), as in TRL, or each response of a pair by itself; see `tokenize_examples`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    import datasets
    from datasets.exceptions import DatasetsError
except ImportError as error:
    raise ImportError(
        "training needs more packages than the operator does: pip install 'prefkern[train]'"
    ) from error

_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
_EXAMPLE_COLUMNS = ("prompt_ids", "completion_ids", "desirable")
_MARGIN_SOURCES = (("reward_margin",), ("margin",), ("score_chosen", "score_rejected"))
# What the collators read; every other column is dropped.
COLUMNS = (*_TOKEN_COLUMNS, *REFERENCE_COLUMNS, "reward_margin", *_EXAMPLE_COLUMNS[1:])


@dataclass(frozen=True)
class DatasetReport:
    """What became of a dataset on its way to tokens."""

    name: str
    pairs: int
    dropped: int
    prompts_truncated: int
    responses_truncated: int
    identical: int
    merged: int  # prompts whose last token merged with the response
    unit: str = "pairs"

    def __str__(self) -> str:
        identical = f"{self.identical} with identical responses, " if self.unit == "pairs" else ""
        return (
            f"{self.name}: {self.pairs} {self.unit} ({self.dropped} dropped for an empty response, "
            f"{self.prompts_truncated} with a truncated prompt, {self.responses_truncated} with a "
            f"truncated response, {identical}{self.merged} whose prompt does not end on a token "
            "boundary)"
        )


def load_preference_dataset(
    source: str, split: str = "train", config: str | None = None
) -> datasets.Dataset:
    """Load a preference dataset and check that it is one.

    Args:
        source: a .jsonl, .json, .parquet or .csv file, a folder (of such files, or written by
            `save_to_disk`), or a name on the Hugging Face hub.
        split: which split of a folder or hub dataset.
        config: which configuration of a hub dataset.

    Raises FileNotFoundError for a file that does not exist, and ValueError for one that cannot be
    read, lacks a column or has no rows.
    """
    path = Path(source).expanduser()
    looks_local = path.suffix in _FORMATS or source.startswith((".", "/", "~"))
    if looks_local and not path.exists():
        raise FileNotFoundError(f"dataset {source!r}: no such file or folder")
    try:
        if path.is_file():
            dataset = _load_file(path)
        elif (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            dataset = datasets.load_from_disk(str(path))
            if isinstance(dataset, datasets.DatasetDict):
                dataset = dataset[split]
        else:
            dataset = datasets.load_dataset(
                str(path) if path.is_dir() else source, config, split=split
            )
    except (DatasetsError, OSError, KeyError, ValueError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"dataset {source!r} cannot be loaded: {reason[0]}") from error
    check_columns(dataset, source, paired=False)
    return dataset


def check_columns(dataset: Any, name: str, *, paired: bool = True, margins: bool = False) -> None:
    """Raise unless `dataset` is a map-style dataset with rows and the columns that are needed.

    Args:
        dataset: the dataset, as `load_preference_dataset` gives it.
        name: what errors call it.
        paired: False admits single responses (`prompt`, `completion`, `label`) as well.
        margins: whether a reward model's margin is needed of each pair.

    Raises TypeError for another kind of dataset, ValueError for missing columns or no rows.
    """
    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(
            f"dataset {name!r} must be a datasets.Dataset (not streaming), "
            f"got {type(dataset).__name__}"
        )
    if len(dataset) == 0:
        raise ValueError(f"dataset {name!r} is empty")
    found = dataset.column_names
    if not paired and _has_examples(found):
        return
    missing = [column for column in ("chosen", "rejected") if column not in found]
    if missing and not set(_TOKEN_COLUMNS) <= set(found):
        hint = ""
        if not paired:
            hint = "; or 'prompt', 'completion' and 'label' for single responses"
        elif _has_examples(found):
            hint = "; single responses are for the objective 'kto'"
        raise ValueError(
            f"dataset {name!r} has no column {' and no column '.join(map(repr, missing))}; found "
            f"{', '.join(found)}; expected 'chosen' and 'rejected', and 'prompt' unless both "
            f"begin with it{hint}"
        )
    if margins and not _margin_columns(found):
        raise ValueError(
            f"dataset {name!r} has no margins, which this objective weighs pairs by: no column "
            "'reward_margin' or 'margin', nor 'score_chosen' and 'score_rejected'; found "
            f"{', '.join(found)}; `prefkern margins` writes one"
        )


def check_labels(dataset: datasets.Dataset, name: str) -> None:
    """Raise ValueError unless every `label` of single responses is true or false."""
    if not {"prompt", "completion", "label"} <= set(dataset.column_names):
        return
    for row, label in enumerate(dataset["label"][:]):
        if not (isinstance(label, bool) or label in (0, 1)):
            raise ValueError(
                f"dataset {name!r}, row {row}: 'label' must be true or false, got {label!r}"
            )


def without_unused(
    dataset: datasets.Dataset, *, references: bool, margins: bool
) -> datasets.Dataset:
    """The dataset without numbers that nothing will read, whose gaps are then nobody's concern.

    Args:
        references: whether the reference's sums are kept.
        margins: whether the columns that a reward margin is taken from are.
    """
    unused: list[str] = []
    if not references:
        unused += REFERENCE_COLUMNS
    if not margins:
        unused += [column for sources in _MARGIN_SOURCES for column in sources]
    return dataset.remove_columns([c for c in unused if c in dataset.column_names])


def tokenize_preferences(
    dataset: datasets.Dataset,
    tokenizer: Any,
    *,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    num_proc: int | None = None,
    name: str = "train",
) -> tuple[datasets.Dataset, DatasetReport]:
    """Tokenise preference pairs into columns `prompt_ids`, `chosen_ids`, `rejected_ids`.

    Args:
        dataset: pairs in one of the module's formats; one that is already tokenised is only
            truncated. `ref_chosen_logps` and `ref_rejected_logps` are kept, and `reward_margin` is
            taken from a column of that name, `margin`, or `score_chosen` - `score_rejected`.
        tokenizer: a Hugging Face tokenizer.
        max_length: bound on prompt plus response; None for none.
        max_prompt_length: bound on the prompt, cut from its beginning; None for none.
        num_proc: processes.
        name: what the report calls the dataset.

    Returns:
        The tokenised dataset, without pairs that have no token to score, and the report.

    Raises ValueError for a dataset, row or length that cannot be used.
    """
    check_columns(dataset, name)
    flagged = _with_tokens(dataset, tokenizer, max_length, max_prompt_length, num_proc, name)
    kept = _without_dropped(flagged, name, "pair with two responses")
    report = DatasetReport(
        name=name,
        pairs=len(kept),
        dropped=len(flagged) - len(kept),
        prompts_truncated=sum(kept["_prompt_truncated"]),
        responses_truncated=sum(map(max, kept["_responses_truncated"])),
        identical=sum(kept["_identical"]),
        merged=sum(kept["_merged"]),
    )
    flags = [column for column in kept.column_names if column.startswith("_")]
    return kept.remove_columns(flags), report


def _with_tokens(
    dataset: datasets.Dataset,
    tokenizer: Any,
    max_length: int | None,
    max_prompt_length: int | None,
    num_proc: int | None,
    name: str,
) -> datasets.Dataset:
    """Token columns of pairs, every row kept, and what became of each in columns `_...`."""
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length must be at least 2, got {max_length}")
    if max_prompt_length is not None and max_prompt_length < 1:
        raise ValueError(f"max_prompt_length must be at least 1, got {max_prompt_length}")
    columns = dataset.column_names
    references = [column in columns for column in REFERENCE_COLUMNS]
    if any(references) and not all(references):
        raise ValueError(f"dataset {name!r} has only one of {' and '.join(REFERENCE_COLUMNS)}")

    numbers: dict[str, tuple[str, ...]] = {}
    if all(references):
        numbers["reference sum"] = REFERENCE_COLUMNS
    margin_columns = _margin_columns(columns)
    if margin_columns:
        numbers["margin"] = margin_columns

    def process(example: dict[str, Any], row: int) -> dict[str, Any]:
        for what, sources in numbers.items():
            for column in sources:
                value = example[column]
                if not _is_number(value):
                    raise ValueError(
                        f"dataset {name!r}, row {row}: no {what} ({column!r} is {value!r})"
                    )
        if all(example.get(column) is not None for column in _TOKEN_COLUMNS):
            prompt, chosen, rejected = (list(example[column]) for column in _TOKEN_COLUMNS)
            merged = False
        else:
            try:
                prompt, chosen, rejected, merged = _tokenize_pair(example, tokenizer)
            except ValueError as error:
                raise ValueError(f"dataset {name!r}, row {row}: {error}") from error
        full = (prompt, chosen, rejected)
        prompt, chosen, rejected = truncate(*full, max_length, max_prompt_length)
        # The first token of a sequence has nothing to be predicted from.
        unscored = 0 if prompt else 1
        return {
            "prompt_ids": prompt,
            "chosen_ids": chosen,
            "rejected_ids": rejected,
            **(
                {"reward_margin": _reward_margin(example, margin_columns)} if margin_columns else {}
            ),
            "_dropped": min(len(chosen), len(rejected)) <= unscored,
            "_prompt_truncated": len(prompt) < len(full[0]),
            "_responses_truncated": [len(chosen) < len(full[1]), len(rejected) < len(full[2])],
            "_identical": chosen == rejected,
            "_merged": merged,
        }

    unused = [column for column in dataset.column_names if column not in COLUMNS]
    return dataset.map(
        process,
        with_indices=True,
        remove_columns=unused,
        num_proc=num_proc,
        desc=f"Tokenizing {name} dataset",
    )


def _without_dropped(dataset: datasets.Dataset, name: str, what: str) -> datasets.Dataset:
    dropped = sum(dataset["_dropped"])
    if dropped == len(dataset):
        raise ValueError(f"dataset {name!r} has no {what} that can be scored")
    if not dropped:
        return dataset
    return dataset.filter(lambda dropped: not dropped, input_columns="_dropped")


def tokenize_examples(
    dataset: datasets.Dataset,
    tokenizer: Any,
    *,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    num_proc: int | None = None,
    name: str = "train",
) -> tuple[datasets.Dataset, DatasetReport]:
    """Tokenise single responses into columns `prompt_ids`, `completion_ids`, `desirable`.

    Args: as in `tokenize_preferences`; a row of `dataset` is one response (`prompt`, `completion`,
    `label`), or a pair, of which the chosen response is desirable and the rejected one is not. The
    report counts responses.

    Raises ValueError for a dataset, row or length that cannot be used.
    """
    check_columns(dataset, name, paired=False)
    check_labels(dataset, name)
    is_paired = not _has_examples(dataset.column_names)
    # Numbers of pairs are of no concern here, nor are those that are missing.
    numbers = (*REFERENCE_COLUMNS, *itertools.chain(*_MARGIN_SOURCES))
    dataset = dataset.remove_columns([c for c in numbers if c in dataset.column_names])
    if not is_paired:
        own = ("completion", "label", "completion_ids")
        dataset = dataset.map(
            lambda example, row: _as_pair(example, row, name),
            with_indices=True,
            remove_columns=[column for column in own if column in dataset.column_names],
            num_proc=num_proc,
            desc=f"Reading {name} dataset",
        )
    flagged = _with_tokens(dataset, tokenizer, max_length, max_prompt_length, num_proc, name)
    kept = _without_dropped(flagged, name, "response")
    of_prompt = ("prompt_ids", "_prompt_truncated", "_merged")

    def split(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows: dict[str, list[Any]] = {column: [] for column in _EXAMPLE_COLUMNS}
        rows |= {column: [] for column in (*of_prompt, "_truncated")}
        # Side by side, and not pair by pair: neighbours are then of different prompts, and an
        # unshuffled batch has mismatched rows.
        for side, column in enumerate(("chosen_ids", "rejected_ids")[: 1 + is_paired]):
            for row, truncated in enumerate(batch["_responses_truncated"]):
                for shared in of_prompt:
                    rows[shared].append(batch[shared][row])
                rows["completion_ids"].append(batch[column][row])
                rows["desirable"].append(side == 0 if is_paired else batch["desirable"][row])
                rows["_truncated"].append(truncated[side])
        return rows

    examples = kept.map(split, batched=True, remove_columns=kept.column_names)
    report = DatasetReport(
        name=name,
        pairs=len(examples),
        dropped=(len(flagged) - len(kept)) * (2 if is_paired else 1),
        prompts_truncated=sum(examples["_prompt_truncated"]),
        responses_truncated=sum(examples["_truncated"]),
        identical=0,
        merged=sum(examples["_merged"]),
        unit="responses",
    )
    flags = [column for column in examples.column_names if column.startswith("_")]
    return examples.remove_columns(flags), report


def extract_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """The common beginning of two texts, or of two conversations, and the rest of each.

    Of a conversation, the last message stays a response.
    """
    limit = min(len(chosen), len(rejected))
    if not isinstance(chosen, str):
        limit -= 1
    length = 0
    while length < limit and chosen[length] == rejected[length]:
        length += 1
    # The space before a word belongs to the word, as in most vocabularies.
    if isinstance(chosen, str) and length and chosen[length - 1] == " ":
        length -= 1
    return chosen[:length], chosen[length:], rejected[length:]


def _has_examples(columns: Sequence[str]) -> bool:
    """Whether rows are single responses, as text or tokens."""
    return {"prompt", "completion", "label"} <= set(columns) or set(_EXAMPLE_COLUMNS) <= set(
        columns
    )


def _as_pair(example: dict[str, Any], row: int, name: str) -> dict[str, Any]:
    """A single response in the form of a pair of it with itself."""
    if set(_EXAMPLE_COLUMNS) <= example.keys():
        ids = example["completion_ids"]
        return {"chosen_ids": ids, "rejected_ids": ids}
    if example["prompt"] is None:
        # Of a pair, the common beginning would be the prompt: here, all of the response.
        raise ValueError(f"dataset {name!r}, row {row}: 'prompt' must not be null")
    completion = example["completion"]
    if not isinstance(completion, str | list) or completion == []:
        raise ValueError(
            f"dataset {name!r}, row {row}: 'completion' must be text or a list of messages, "
            f"got {completion!r}"
        )
    return {"chosen": completion, "rejected": completion, "desirable": bool(example["label"])}


def _load_file(path: Path) -> datasets.Dataset:
    builder = _FORMATS.get(path.suffix)
    if builder is None:
        raise ValueError(f"unknown file type {path.suffix!r}; known: {', '.join(_FORMATS)}")
    with path.open("rb") as file:
        if not file.read(4096).strip():
            raise ValueError("the file is empty")
    return datasets.load_dataset(builder, data_files=str(path), split="train")


def _tokenize_pair(
    example: dict[str, Any], tokenizer: Any
) -> tuple[list[int], list[int], list[int], bool]:
    """Token ids of prompt, chosen and rejected, and whether the prompt's end merged with them."""
    prompt, chosen, rejected = (example.get(key) for key in ("prompt", "chosen", "rejected"))
    for key, value in (("chosen", chosen), ("rejected", rejected)):
        is_messages = isinstance(value, list) and bool(value) and isinstance(value[0], dict)
        if not (isinstance(value, str) or is_messages):
            raise ValueError(f"{key!r} must be text or a list of messages, got {value!r}")
    is_conversation = isinstance(chosen, list)
    if isinstance(rejected, list) != is_conversation:
        raise ValueError("one of 'chosen' and 'rejected' is text and the other a conversation")
    if prompt is None:
        prompt, chosen, rejected = extract_prompt(chosen, rejected)
    elif is_conversation and isinstance(prompt, str):
        prompt, chosen, rejected = _text_prompt(prompt, chosen, rejected)
    elif isinstance(prompt, list) != is_conversation:
        raise ValueError("'prompt' is a conversation, and 'chosen' and 'rejected' are text")

    if is_conversation:
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError("the dataset is conversational and the tokenizer has no chat template")
        options = {"tools": example.get("tools"), **(example.get("chat_template_kwargs") or {})}

        def encode(messages: list[dict[str, Any]], **kwargs: Any) -> list[int]:
            # Arrow gives every message every key; absent ones are None.
            present = [{k: v for k, v in m.items() if v is not None} for m in messages]
            return tokenizer.apply_chat_template(
                present, tokenize=True, return_dict=True, **options, **kwargs
            )["input_ids"]

        prompt_ids = encode(prompt, add_generation_prompt=True)
        sequences = [encode(prompt + chosen), encode(prompt + rejected)]
    else:
        prompt_ids = tokenizer(prompt)["input_ids"]
        sequences = [tokenizer(prompt + text)["input_ids"] for text in (chosen, rejected)]
        eos = tokenizer.eos_token_id
        sequences = [ids if eos is None or ids[-1:] == [eos] else [*ids, eos] for ids in sequences]
    start = min(_common_length(prompt_ids, ids) for ids in sequences)
    chosen_ids, rejected_ids = (ids[start:] for ids in sequences)
    return prompt_ids[:start], chosen_ids, rejected_ids, start < len(prompt_ids)


def _text_prompt(prompt: str, chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Prompt and responses of conversations that carry the question as text."""
    common, chosen, rejected = extract_prompt(chosen, rejected)
    if not prompt:
        return common, chosen, rejected
    if common:
        # Some conversational datasets keep the first question's text in `prompt`, too.
        asked = [m.get("content") for m in common if m.get("role") == "user"]
        if prompt.strip() not in (text.strip() for text in asked if isinstance(text, str)):
            raise ValueError(
                f"'prompt' is {prompt[:60]!r}, and no message that 'chosen' and 'rejected' both "
                "begin with is a user's of that text; correct 'prompt', or leave it out"
            )
        return common, chosen, rejected
    if any(messages[0].get("role") == "user" for messages in (chosen, rejected)):
        raise ValueError("'chosen' and 'rejected' begin with different questions")
    return [{"role": "user", "content": prompt}], chosen, rejected


def truncate(
    prompt: list[int],
    chosen: list[int],
    rejected: list[int],
    max_length: int | None,
    max_prompt_length: int | None,
) -> tuple[list[int], list[int], list[int]]:
    """Cut the prompt from its beginning, and responses at their end only if they must be."""
    if max_prompt_length is not None:
        prompt = prompt[-max_prompt_length:]
    if max_length is not None:
        # At least one token of context, so that the first token of the response is scored.
        room = max(max_length - max(len(chosen), len(rejected)), 1)
        prompt = prompt[-room:]
        budget = max_length - len(prompt)
        chosen, rejected = chosen[:budget], rejected[:budget]
    return prompt, chosen, rejected


def _common_length(first: list[int], second: list[int]) -> int:
    limit = min(len(first), len(second))
    return next((i for i in range(limit) if first[i] != second[i]), limit)


def _margin_columns(columns: Sequence[str]) -> tuple[str, ...]:
    """What the margin is taken from: one column, two to subtract, or none."""
    for sources in _MARGIN_SOURCES:
        if set(sources) <= set(columns):
            return sources
    return ()


def _reward_margin(example: dict[str, Any], sources: tuple[str, ...]) -> float:
    chosen, *rejected = (float(example[column]) for column in sources)
    return chosen - sum(rejected)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
