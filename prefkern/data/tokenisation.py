"""Turns the rows of a preference dataset into token ids within the bounds, with a report.

Each row is tokenised (`formats`) and cut (`truncation`). Columns of marks record what happened to
it: empty, too long, cut, identical and so on. Rows with no token to score are dropped, and a
`DatasetReport` sums up the marks.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import tokenizers
import transformers

from prefkern.data.columns import (
    COLUMNS,
    EXAMPLE_COLUMNS,
    EXAMPLE_MASK,
    GOLD,
    GOLD_IDS,
    GOLD_MASK,
    MARGIN_SOURCES,
    MASK_COLUMNS,
    PICTURE_COLUMNS,
    REFERENCE_COLUMNS,
    TOKEN_COLUMNS,
    TYPE_COLUMNS,
    check_columns,
    check_labels,
    has_examples,
    is_number,
    listed,
    margin_columns,
    picture_column,
    plain,
    renamed,
    reward_margin,
    unread_columns,
    unread_hint,
)
from prefkern.data.foreign import Format, is_text, recognise
from prefkern.data.formats import Reading, TokenizedPair, read_row, tokenize_pair
from prefkern.data.marks import (
    PICTURES,
    Marks,
    mark_columns,
    marks_of,
    of_responses,
    report_of,
    without_dropped,
)
from prefkern.data.messages import may_be_written
from prefkern.data.pictures import (
    PictureTokenizer,
    beside,
    check_uncut,
    read_pictures,
    refuse_marks,
    text_needs_blocks,
    type_names,
    with_pictures,
)
from prefkern.data.rankings import without_ties
from prefkern.data.report import DatasetReport
from prefkern.data.shown import Said, said
from prefkern.data.truncation import Bounds
from prefkern.data.turns import Turns, brings_masks_of, mask_of
from prefkern.version import VERSION

_NUMBER = "_number"  # of the row that a response is of
_ROUNDING = 1e-3  # error of a sum of log-probs whose true value is 0
_Tokens = list[list[int]]  # prompt, chosen, rejected and, where it is read, the gold response
_Masks = list[list[bool]] | None  # of the responses; None: every token is scored


def tokenize_preferences(
    dataset: datasets.Dataset,
    tokenizer: Any,
    *,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    truncation_mode: str = "keep_end",
    num_proc: int | None = None,
    name: str = "train",
    columns: Mapping[str, str] | None = None,
    gold: bool = False,
    assistant_only_loss: bool = False,
    last_turn_only: bool = False,
) -> tuple[datasets.Dataset, DatasetReport]:
    """Tokenise preference pairs into columns `prompt_ids`, `chosen_ids`, `rejected_ids`.

    Args:
        dataset: pairs in one of the formats of `prefkern.data`. A dataset that is tokenised already
            is only truncated. `ref_chosen_logps` and `ref_rejected_logps` are kept.
            `reward_margin` comes from the column of that name, or from `margin`, or from
            `score_chosen` - `score_rejected`.
        tokenizer: a Hugging Face tokenizer; a processor for rows with pictures (`images`, `image`).
        max_length: bound on prompt plus response, in tokens; None for no bound.
        max_prompt_length: bound on the prompt, in tokens; None for no bound.
        truncation_mode: one of `TRUNCATION_MODES`; see `prefkern.data.truncation`. A pair with
            reference sums is never cut: that is an error, because the sums belong to the whole
            responses.
        num_proc: number of processes.
        name: the dataset's name in the report and in errors.
        columns: the dataset's own names of columns, `{"prompt": "question"}`. With `"system"`, a
            row becomes a conversation that begins with that column's text.
        gold: also read a third response, `reference` (TPO's gold one, under TRL's name), into
            `reference_ids`.
        assistant_only_loss: score only what the chat template marks as the assistant's
            (`{% generation %}`), and no turn of another role inside a response.
        last_turn_only: score only the last message of each response.

    Returns:
        The tokenised dataset, without pairs that have no token to score, and the report. With one
        of the last two, it also has `chosen_mask` and `rejected_mask`: whether each token of a
        response is scored. A dataset that is tokenised already keeps those that it has.

    Raises ValueError for a dataset, row, length or mode that cannot be used.
    """
    dataset = renamed(dataset, columns, name)
    check_columns(dataset, name, gold=gold, pictures=True)
    bounds = Bounds(max_length, max_prompt_length, truncation_mode)
    dataset = with_pictures(plain(dataset), name, tokenizer)
    given, (dataset, form) = len(dataset), _converted(dataset, num_proc, name)
    unread = unread_columns(dataset, gold=gold)
    names = ("chosen", "rejected", GOLD) if gold else ("chosen", "rejected")
    samples = _samples(dataset, names) if form is not None else ()
    turns = Turns(assistant_only_loss, last_turn_only)
    marked = _with_tokens(dataset, tokenizer, bounds, num_proc, name, turns, names)
    marks = marks_of(marked)
    _check_prompts(dataset, marks, unread, name)
    what = f"pair with {'three' if gold else 'two'} responses"
    kept = without_dropped(marked, marks, name, what)
    has_masks = MASK_COLUMNS[0] in kept.column_names
    report = report_of(name, "pairs", marks, bounds, unread, form, samples, given, has_masks)
    return kept.remove_columns(mark_columns(kept)), replace(report, tied=given - len(dataset))


def tokenize_examples(
    dataset: datasets.Dataset,
    tokenizer: Any,
    *,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    truncation_mode: str = "keep_end",
    num_proc: int | None = None,
    name: str = "train",
    columns: Mapping[str, str] | None = None,
    assistant_only_loss: bool = False,
    last_turn_only: bool = False,
) -> tuple[datasets.Dataset, DatasetReport]:
    """Tokenise single responses into columns `prompt_ids`, `completion_ids`, `desirable`.

    Args: as in `tokenize_preferences`; the mask is `completion_mask`. A row of `dataset` is one
    response (`prompt`, `completion`, `label`), or a pair: its chosen response is desirable, its
    rejected one is not. The report counts responses.

    Raises ValueError for a dataset, row, length or mode that cannot be used.
    """
    dataset = renamed(dataset, columns, name)
    check_columns(dataset, name, paired=False, pictures=True)
    bounds = Bounds(max_length, max_prompt_length, truncation_mode)
    dataset = with_pictures(plain(dataset), name, tokenizer)
    given, (dataset, form) = len(dataset), _converted(dataset, num_proc, name, paired=False)
    check_labels(dataset, name)
    is_paired = not has_examples(dataset.column_names)
    # KTO reads no number of a pair, so a missing one is no error here.
    unread = unread_columns(dataset, paired=is_paired)
    numbers = (*REFERENCE_COLUMNS, *itertools.chain(*MARGIN_SOURCES))
    dataset = dataset.remove_columns([c for c in numbers if c in dataset.column_names])
    if not is_paired:
        own = ("completion", "label", "completion_ids", EXAMPLE_MASK)
        dataset = dataset.map(
            _AsOfNow(lambda example, row: _as_pair(example, row, name)),
            with_indices=True,
            remove_columns=[column for column in own if column in dataset.column_names],
            num_proc=num_proc,
            desc=f"Reading {name} dataset",
        )
    names = ("chosen", "rejected") if is_paired else ("completion", "completion")
    samples = _samples(dataset, names) if form is not None else ()
    turns = Turns(assistant_only_loss, last_turn_only)
    marked = _with_tokens(dataset, tokenizer, bounds, num_proc, name, turns, names)
    marks = marks_of(marked)
    _check_prompts(dataset, marks, unread, name)
    kept = without_dropped(marked, marks, name, "response")
    sides = ("chosen", "rejected")[: 1 + is_paired]
    has_masks = MASK_COLUMNS[0] in kept.column_names
    types = [column for column in TYPE_COLUMNS.values() if column in kept.column_names]
    of_prompt = ["prompt_ids", *types]

    def split(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        rows: dict[str, list[Any]] = {column: [] for column in (*EXAMPLE_COLUMNS, *types)}
        rows[_NUMBER] = numbers * len(sides)
        if has_masks:
            rows[EXAMPLE_MASK] = [mask for side in sides for mask in batch[f"{side}_mask"]]
        # Of a batch all chosen, then all rejected, not pair by pair: neighbours then have different prompts,
        # so that an unshuffled batch also gets mismatched rows.
        for side in sides:
            responses = batch[f"{side}_ids"]
            for column in of_prompt:
                rows[column] += batch[column]
            rows["completion_ids"] += responses
            rows["desirable"] += (
                [side == "chosen"] * len(responses) if is_paired else batch["desirable"]
            )
        return rows

    examples = kept.map(
        _AsOfNow(split), with_indices=True, batched=True, remove_columns=kept.column_names
    )
    of_rows: Any = examples[_NUMBER]
    examples = examples.remove_columns(_NUMBER)
    if picture_column(kept.column_names) is not None:
        examples = beside(examples, kept.select(of_rows[:]))
    marks = of_responses(marks, len(sides))
    report = report_of(name, "responses", marks, bounds, unread, form, samples, given, has_masks)
    return examples, replace(report, tied=given - len(dataset))


def _converted(
    dataset: datasets.Dataset, num_proc: int | None, name: str, *, paired: bool = True
) -> tuple[datasets.Dataset, Format | None]:
    """The dataset in one of TRL's formats, and the format of others that it had, if any."""
    form = recognise(dataset, name, paired=paired)
    if form is None or not form.made:
        return dataset, form

    def convert(example: dict[str, Any], row: int) -> dict[str, Any]:
        try:
            return form.convert(example)
        except ValueError as error:
            raise ValueError(
                f"dataset {name!r}, row {row}, read as {form.name}: {error}"
            ) from error

    converted = dataset.map(
        _AsOfNow(convert),
        with_indices=True,
        remove_columns=list(form.read),
        num_proc=num_proc,
        desc=f"Converting {name} dataset",
    )
    return without_ties(converted, name) if form.ranking else converted, form


def _samples(dataset: datasets.Dataset, names: tuple[str, ...]) -> tuple[Said, ...]:
    """The first rows as they are read. A row with an error is left to `_with_tokens`."""
    written = _written_columns(dataset, gold=GOLD in names)
    samples = []
    kinds = _kinds(dataset.column_names)
    # Pictures are not shown, and a broken one is an error later.
    texts = [column for column in dataset.column_names if column not in PICTURE_COLUMNS]
    first: Any = dataset.select_columns(texts).select(range(min(len(dataset), 3)))
    for row in first:
        try:
            prompt, *responses = read_row(row, names, written, kinds)
        except ValueError:
            break
        samples.append(said(prompt, dict(zip(names, responses, strict=True))))
    return tuple(samples)


def _with_tokens(
    dataset: datasets.Dataset,
    tokenizer: Any,
    bounds: Bounds,
    num_proc: int | None,
    name: str,
    turns: Turns,
    names: tuple[str, ...] = ("chosen", "rejected"),
) -> datasets.Dataset:
    """Adds the token columns of pairs and the columns of marks; keeps every row."""
    columns = dataset.column_names
    pictures = picture_column(columns)
    processor = tokenizer
    if pictures is not None:
        refuse_marks(turns.assistant_only_loss, f"dataset {name!r}")
    tokenizer = getattr(processor, "tokenizer", processor)
    has_gold = len(names) == 3
    id_columns = (*TOKEN_COLUMNS, GOLD_IDS) if has_gold else TOKEN_COLUMNS
    mask_columns = (*MASK_COLUMNS, GOLD_MASK) if has_gold else MASK_COLUMNS
    brings_masks = brings_masks_of(columns, turns, name, names, mask_columns)
    references = [column in columns for column in REFERENCE_COLUMNS]
    if any(references) and not all(references):
        raise ValueError(f"dataset {name!r} has only one of {' and '.join(REFERENCE_COLUMNS)}")

    numbers: dict[str, tuple[str, ...]] = {}
    if all(references):
        numbers["reference sum"] = REFERENCE_COLUMNS
    _check_token_types(dataset, name)
    margins = margin_columns(columns)
    if margins:
        numbers["margin"] = margins

    unread = unread_columns(dataset, gold=has_gold)
    hint = ""
    if "prompt" not in columns and unread:
        hint = f"; {listed(unread)} would not be read, {unread_hint(unread)}"
    written = _written_columns(dataset, has_gold)
    reading = Reading.of(tokenizer, written, names, turns, _kinds(columns))
    marks = turns.assistant_only_loss
    sees = pictures is not None or (not marks and text_needs_blocks(processor, tokenizer))
    types = [] if pictures is None else [TYPE_COLUMNS[each] for each in type_names(processor)]

    def ends_only(tokens: _Tokens) -> bool:
        """Whether a response is only an end token."""
        return any(len(ids) == 1 and ids[0] in reading.end_ids for ids in tokens[1:])

    def process(example: dict[str, Any], row: int) -> dict[str, Any]:
        for what, sources in numbers.items():
            for column in sources:
                value = example[column]
                if not is_number(value):
                    raise ValueError(
                        f"dataset {name!r}, row {row}: no {what} ({column!r} is {value!r})"
                    )
                if what == "reference sum" and value > _ROUNDING:
                    raise ValueError(
                        f"dataset {name!r}, row {row}: {column!r} is {value!r}, but a sum of "
                        "log-probs is never above 0; is it a negative log-likelihood?"
                    )
        try:
            shown = read_pictures(example)
        except ValueError as error:
            raise ValueError(f"dataset {name!r}, row {row}: {error}") from error
        type_ids: dict[str, list[int]] = {}
        if all(example.get(column) is not None for column in id_columns):
            missing = [column for column in types if example.get(column) is None]
            if missing:
                raise ValueError(
                    f"dataset {name!r}, row {row} has token ids and pictures, and no {missing[0]!r}: "
                    "what each token of the prompt is; give text, which is tokenised with both"
                )
            type_ids = {column: example[column] for column in types}
            for column in id_columns:
                if None in example[column]:
                    raise ValueError(
                        f"dataset {name!r}, row {row}: {column!r} has None among its token ids"
                    )
            prompt, *responses = (list(example[column]) for column in id_columns)
            pair = TokenizedPair(prompt, responses)
            if brings_masks:
                masks = [
                    mask_of(example[column], ids, f"dataset {name!r}, row {row}", side)
                    for column, ids, side in zip(mask_columns, responses, names, strict=True)
                ]
                pair = pair._replace(masks=masks)
        else:
            of_row = PictureTokenizer(processor, shown) if sees else tokenizer
            try:
                pair = tokenize_pair(example, of_row, reading)
                if types:
                    type_ids = of_row.types_of(pair.prompt)
            except ValueError as error:
                raise ValueError(f"dataset {name!r}, row {row}: {error}{hint}") from error
        found = [pair.prompt, *pair.responses]
        kept = bounds.cut(found)
        try:
            check_uncut(found, kept, len(shown), bounds)
        except ValueError as error:
            raise ValueError(f"dataset {name!r}, row {row}: {error}") from error
        is_empty = pair.empty or ends_only(found) or not _can_be_scored(found)
        if pair.stops:
            # The other text goes on, so the end token is a response.
            is_empty = not _can_be_scored(found)
        masks = pair.masks and [
            mask[: len(ids)] for mask, ids in zip(pair.masks, kept[1:], strict=True)
        ]
        is_masked = not is_empty and not _can_be_scored(found, pair.masks)
        can_be_scored = _can_be_scored(kept, masks)
        is_cut = [len(after) < len(before) for before, after in zip(found, kept, strict=True)]
        if all(references) and any(is_cut[:3]) and can_be_scored:
            raise ValueError(
                f"dataset {name!r}, row {row}: truncation would cut it, but its reference sums "
                f"({' and '.join(REFERENCE_COLUMNS)}) belong to the whole row; raise max_length or "
                "max_prompt_length, set truncation_mode='drop', or remove the two columns"
            )
        return {
            **dict(zip(id_columns, kept, strict=True)),
            # Without a picture the beginning of a prompt may be cut.
            **{column: each[len(each) - len(kept[0]) :] for column, each in type_ids.items()},
            **(dict(zip(mask_columns, masks, strict=True)) if masks else {}),
            **({"reward_margin": reward_margin(example, margins)} if margins else {}),
            "_empty": is_empty,
            "_masked": is_masked,
            "_too_long": not (is_empty or is_masked or can_be_scored),
            "_prompt_truncated": is_cut[0],
            "_truncated": is_cut[1:],
            "_identical": kept[1] == kept[2],
            "_was_identical": found[1] == found[2],
            "_merged": pair.merged,
            "_repeated": pair.repeated,
            "_begun": pair.begun,
            "_unasked": pair.unasked,
            "_unsaid": pair.unsaid,
            "_turns": pair.turns,
            "_found_lengths": [len(ids) for ids in found],
            "_lengths": [len(ids) for ids in kept],
            "_scored": _scored_counts(kept, masks),
            **({} if pictures is None else {PICTURES: len(shown)}),
        }

    used = set(COLUMNS) if has_gold else set(COLUMNS) - {GOLD_IDS, GOLD_MASK}
    used -= set() if brings_masks else {*MASK_COLUMNS, GOLD_MASK}
    used -= {*PICTURE_COLUMNS}
    unused = [column for column in dataset.column_names if column not in used]
    tokens = dataset.map(
        _AsOfNow(process),
        with_indices=True,
        remove_columns=unused,
        num_proc=num_proc,
        desc=f"Tokenizing {name} dataset",
    )
    return tokens if pictures is None else beside(tokens, dataset)


@functools.cache
def _versions() -> tuple[str, ...]:
    """This package's version, a hash of the code that makes tokens, and its libraries' versions."""
    code = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        code.update(file.read_bytes())
    others = (transformers.__version__, tokenizers.__version__)
    return (VERSION, code.hexdigest(), *others)


@dataclass(frozen=True)
class _AsOfNow:
    """A function of rows, with the versions of all code that its result depends on.

    `datasets` caches a function's result under a hash of the function. Functions of other modules
    enter that hash by name only, so the cache would return the tokens of an earlier version.
    """

    function: Callable[..., dict[str, Any]]
    versions: tuple[str, ...] = field(default_factory=lambda: _versions())

    def __call__(self, *args: Any) -> dict[str, Any]:
        return self.function(*args)


def _kinds(columns: Any) -> tuple[str, ...]:
    """What a message may hold."""
    return ("text",) if picture_column(columns) is None else ("text", "image")


def _check_token_types(dataset: datasets.Dataset, name: str) -> None:
    """Raise ValueError for token ids that are not integers: they would be rounded to other ids."""
    for column in (*TOKEN_COLUMNS, GOLD_IDS, "completion_ids"):
        feature: Any = dataset.features.get(column)
        inner = getattr(feature, "feature", None)
        kind = str(getattr(inner, "dtype", ""))
        # If all lists are empty, their type is unknown.
        if feature is not None and "int" not in kind and kind != "null":
            raise ValueError(
                f"dataset {name!r}: {column!r} must be lists of integers, token ids, got {feature}"
            )


def _written_columns(dataset: datasets.Dataset, gold: bool) -> tuple[str, ...]:
    """The text columns in which every row is a conversation as text, empty cells aside.

    The first batch decides for nearly all datasets. A transform returns what it means.
    """
    if dataset.format["type"] == "custom":
        return ()
    read = ("prompt", "chosen", "rejected", *([GOLD] if gold else []))
    wanted = [c for c in read if is_text(dataset.features.get(c))]
    if not wanted:
        return ()
    found: set[str] = set()
    for batch in dataset.select_columns(wanted).iter(batch_size=1000):
        rows: Any = batch
        # An empty cell is an error of its own row.
        texts = {c: [text for text in rows[c] if text] for c in wanted}
        wanted = [c for c in wanted if all(map(may_be_written, texts[c]))]
        found |= {c for c in wanted if texts[c]}
        if not wanted:
            break
    return tuple(c for c in wanted if c in found)


def _check_prompts(
    dataset: datasets.Dataset, marks: Marks, unread: tuple[str, ...], name: str
) -> None:
    """Raise ValueError where prompts are empty while columns with text are not read.

    A row whose texts have no common beginning has no prompt in them, so one such row is enough. In
    a `prompt` of its own a text may be empty, so there all are.
    """
    unasked = marks["_unasked"]
    if not unread or not unasked.any():
        return
    hint = unread_hint(unread)
    if "prompt" not in dataset.column_names:
        raise ValueError(
            f"dataset {name!r}, row {int(unasked.argmax())}: 'chosen' and 'rejected' have no common "
            f"beginning, so its prompt would be empty, and {listed(unread)} would not be read; "
            f"{hint}"
        )
    if unasked.all():
        raise ValueError(
            f"dataset {name!r}: every 'prompt' is empty, and {listed(unread)} would not be read; "
            f"remove 'prompt', and {hint}"
        )


def _scored_counts(tokens: _Tokens, masks: _Masks) -> list[int]:
    """How many tokens of each response are scored."""
    prompt, *responses = tokens
    # The first token of a sequence has no context, so it is not scored.
    first = 0 if prompt else 1
    if masks is None:
        return [max(len(ids) - first, 0) for ids in responses]
    return [sum(mask[first:]) for mask in masks]


def _can_be_scored(tokens: _Tokens, masks: _Masks = None) -> bool:
    return min(_scored_counts(tokens, masks)) > 0


def _as_pair(example: dict[str, Any], row: int, name: str) -> dict[str, Any]:
    """A single response as a pair: it is both chosen and rejected."""
    if set(EXAMPLE_COLUMNS) <= example.keys():
        ids = example["completion_ids"]
        pair = {"chosen_ids": ids, "rejected_ids": ids}
        if EXAMPLE_MASK in example:
            pair |= dict.fromkeys(MASK_COLUMNS, example[EXAMPLE_MASK])
        return pair
    if example["prompt"] is None:
        # A pair's common beginning would become the prompt: here that is the whole response.
        raise ValueError(f"dataset {name!r}, row {row}: 'prompt' must not be null")
    completion = example["completion"]
    return {"chosen": completion, "rejected": completion, "desirable": bool(example["label"])}
