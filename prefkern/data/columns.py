"""The columns of a preference dataset: which are needed, which are read, which are refused.

These checks need only the columns. So an unusable dataset fails at once, before a row is read or a
model is loaded. `renamed` gives the columns of others the names that are read here.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prefkern.data.foreign import GOLD, SYSTEM, is_text, recognise

if TYPE_CHECKING:
    import datasets

TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
# Which tokens of a response are scored, beside the tokens; without them all are.
MASK_COLUMNS = ("chosen_mask", "rejected_mask")
EXAMPLE_MASK = "completion_mask"
GOLD_MASK = "reference_mask"
EXAMPLE_COLUMNS = ("prompt_ids", "completion_ids", "desirable")
MARGIN_SOURCES = (("reward_margin",), ("margin",), ("score_chosen", "score_rejected"))
# The gold response (`GOLD`) as tokens.
GOLD_IDS = "reference_ids"
ID_COLUMNS = (*TOKEN_COLUMNS, GOLD_IDS, EXAMPLE_COLUMNS[1])
# The pictures of a prompt, TRL's names: a list, or one.
PICTURE_COLUMNS = ("images", "image")
# What each token of a prompt is, text or part of a picture: the model's input, and our column.
TYPE_COLUMNS = {
    "token_type_ids": "prompt_token_types",
    "mm_token_type_ids": "prompt_mm_token_types",
}
# The columns that the collators read; all others are dropped.
COLUMNS = (
    *(*TOKEN_COLUMNS, GOLD_IDS, *MASK_COLUMNS, GOLD_MASK, *REFERENCE_COLUMNS, "reward_margin"),
    *(*EXAMPLE_COLUMNS[1:], EXAMPLE_MASK, *PICTURE_COLUMNS, *TYPE_COLUMNS.values()),
)
_TEXT_COLUMNS = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs", SYSTEM)
# TRL's names. They are part of the prompt, as pictures are: to ignore them would train another task.
_MEDIA = {
    **dict.fromkeys(("video", "videos"), "videos are"),
    **dict.fromkeys(("audio", "audios"), "audio is"),
}
# Names of prompts in the datasets of others, the likeliest first.
_QUESTIONS = (
    *("prompt", "question", "instruction", "query", "problem", "messages", "conversations"),
    *("conversation", "prompts", "questions", "user", "input", "history", "context"),
)
_SYSTEMS = ("system", "system_prompt")
# Beside a prompt, these belong before it; messages repeat it.
_BEFORE = (*_SYSTEMS, "instruction", "input", "history", "context")
# What `columns` may name.
_RENAMED = (
    *("prompt", "chosen", "rejected", GOLD, "completion", "label", "system", "tools"),
    *("chat_template_kwargs", *REFERENCE_COLUMNS),
    *(column for sources in MARGIN_SOURCES for column in sources),
)
COLUMNS_HELP = (
    "The dataset's own names of columns: prompt=question chosen=answer_a. system=NAME puts that "
    "column's text before each prompt, as a conversation."
)


def read_renaming(given: Any) -> dict[str, str] | None:
    """The option `columns` as a mapping: from one, from JSON, or from a list of `name=column`.

    Raises ValueError for anything else, for names that are not read, and for names given twice.
    """
    if given is None:
        return None
    pairs: list[Any] = []
    for item in given if isinstance(given, list | tuple) else [given]:
        if isinstance(item, str) and item.lstrip().startswith("{"):
            try:
                item = json.loads(item)
            except json.JSONDecodeError as error:
                raise ValueError(f"columns is not JSON: {error}") from error
        if isinstance(item, Mapping):
            pairs += item.items()
        elif isinstance(item, str) and "=" in item:
            pairs.append(tuple(item.split("=", 1)))
        else:
            raise ValueError(
                "columns must be a mapping such as {'prompt': 'question'}, or prompt=question on "
                f"the command line, got {item!r}"
            )
    names: dict[str, str] = {}
    for name, column in pairs:
        if name not in _RENAMED:
            raise ValueError(
                f"columns gives a name to {name!r}, which is not read; known are "
                f"{', '.join(_RENAMED)}"
            )
        if not isinstance(column, str) or not column:
            raise ValueError(f"columns must name one column for {name!r}, got {column!r}")
        if name in names:
            raise ValueError(
                f"columns gives {name!r} twice, as {names[name]!r} and as {column!r}; give one"
            )
        if column in names.values():
            raise ValueError(f"columns reads {column!r} twice; give it one name")
        names[name] = column
    return names or None


def renamed(dataset: Any, columns: Mapping[str, str] | None, name: str) -> Any:
    """The dataset under the names that are read here; one with tokens stays as it is.

    Args:
        dataset: a dataset; anything else is returned as it is, for `check_columns` to refuse.
        columns: the dataset's own name of each column: `{"prompt": "question"}`; None: no other.
        name: the dataset's name in errors.

    Raises ValueError for a column that does not exist, and for a name that exists already.
    """
    import datasets

    columns = read_renaming(columns)
    if not (columns and isinstance(dataset, datasets.Dataset)):
        return dataset
    found = dataset.column_names
    if set(TOKEN_COLUMNS) <= set(found) or set(EXAMPLE_COLUMNS) <= set(found):
        return dataset
    for target, source in columns.items():
        if source not in found:
            close = difflib.get_close_matches(source, found, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(
                f"dataset {name!r} has no column {source!r}{hint}, which columns names for "
                f"{target!r}; found {', '.join(found)}"
            )
        if target in found and target not in columns.values():
            raise ValueError(
                f"dataset {name!r} has a column {target!r} already, so columns cannot give "
                f"{source!r} that name; remove one of them"
            )
    targets = {"system": SYSTEM}
    new = {source: targets.get(target, target) for target, source in columns.items()}
    return dataset.rename_columns({old: name for old, name in new.items() if old != name})


def unread_columns(
    dataset: datasets.Dataset, *, paired: bool = True, gold: bool = False
) -> tuple[str, ...]:
    """The columns with text that nothing reads.

    Args:
        dataset: a dataset, after `renamed`.
        paired: False if its rows are single responses.
        gold: True if the gold responses are read.
    """
    found = dataset.column_names
    if set(TOKEN_COLUMNS) <= set(found) or set(EXAMPLE_COLUMNS) <= set(found):
        return ()
    read = {*_TEXT_COLUMNS} if paired else {*_TEXT_COLUMNS, "completion", "label"}
    read -= set() if paired else {"chosen", "rejected"}
    read |= {GOLD} if gold else set()
    return tuple(c for c in found if c not in read and _has_text(dataset.features.get(c)))


def before_prompts(columns: Sequence[str]) -> list[str]:
    """Those columns whose names say that their text belongs before a prompt."""
    return [column for column in columns if column.lower() in _BEFORE]


def unread_hint(columns: Sequence[str]) -> str:
    """What to do about unread columns, where the prompt is missing or empty."""
    ranked = sorted(columns, key=_rank)
    names = {"prompt": ranked[0]}
    systems = [column for column in columns if column.lower() in _SYSTEMS]
    if systems and ranked[0] != systems[0]:
        names["system"] = systems[0]
    flags = " ".join(f"{name}={column}" for name, column in names.items())
    return (
        f"name the prompt with columns={names} (--columns {flags}), or remove what nothing "
        "should read"
    )


def _alike(name: str, columns: Sequence[str]) -> str:
    """A column of the same name in other letters, to print; dots if there is none."""
    return next((repr(column) for column in columns if column.lower() == name), "...")


def _rank(column: str) -> int:
    name = column.lower()
    if name in _QUESTIONS:
        return _QUESTIONS.index(name)
    return len(_QUESTIONS) + (name in _SYSTEMS)


def _has_text(feature: Any) -> bool:
    """Whether cells of a feature hold text, at any depth."""
    if isinstance(feature, Mapping):
        return any(map(_has_text, feature.values()))
    if isinstance(feature, list | tuple):
        return any(map(_has_text, feature))
    inner = getattr(feature, "feature", None)
    if inner is not None:
        return _has_text(inner)
    return "string" in str(getattr(feature, "dtype", ""))


def check_columns(
    dataset: Any,
    name: str,
    *,
    paired: bool = True,
    margins: bool = False,
    gold: bool = False,
    pictures: bool = False,
) -> None:
    """Raise unless `dataset` is a map-style dataset with rows and the necessary columns.

    Args:
        dataset: a dataset, as `load_preference_dataset` returns it.
        name: the dataset's name in errors.
        paired: False also accepts single responses (`prompt`, `completion`, `label`).
        margins: True if each pair needs a reward model's margin.
        gold: True if each pair needs a third, gold response (TPO).
        pictures: True if the caller reads the pictures of prompts.

    Raises TypeError for another kind of dataset, ValueError for missing columns, media or no rows.
    """
    import datasets

    if not isinstance(dataset, datasets.Dataset):
        is_stream = isinstance(dataset, datasets.IterableDataset)
        hint = "; only PreferenceTrainer takes streams" if is_stream else ""
        raise TypeError(
            f"dataset {name!r} must be a datasets.Dataset, got {type(dataset).__name__}{hint}"
        )
    if len(dataset) == 0:
        raise ValueError(f"dataset {name!r} is empty")
    found = dataset.column_names
    for column in found:
        if column.lower() in _MEDIA:
            raise ValueError(
                f"dataset {name!r} has a column {column!r}, but {_MEDIA[column.lower()]} not "
                "supported yet; remove the column to train on the text alone"
            )
        if column.lower() in PICTURE_COLUMNS and not (pictures and column in PICTURE_COLUMNS):
            hint = "; pictures are read under the names 'images' and 'image'" if pictures else ""
            raise ValueError(
                f"dataset {name!r} has a column {column!r}, and pictures are not read here{hint}; "
                "remove the column to go on with the text alone"
            )
    if not paired and has_examples(found):
        return
    form = recognise(dataset, name, paired=paired)
    if form is not None:
        found = form.after(found)
        if "completion" in form.made:
            return
    missing = [column for column in ("chosen", "rejected") if column not in found]
    if missing and not set(TOKEN_COLUMNS) <= set(found):
        hint = f"; columns={{{missing[0]!r}: {_alike(missing[0], found)}}} reads another column"
        if not paired:
            hint = f"; or 'prompt', 'completion' and 'label' for single responses{hint}"
        elif has_examples(found) or recognise(dataset, name, paired=False):
            hint = "; single responses are for the objective 'kto'"
        raise ValueError(
            f"dataset {name!r} has no column {' and no column '.join(map(repr, missing))}; found "
            f"{', '.join(found)}; expected 'chosen' and 'rejected', and 'prompt' unless both "
            f"begin with it{hint}"
        )
    has_tokens = {*TOKEN_COLUMNS, GOLD_IDS} <= set(found)
    if gold and not (has_tokens or (GOLD in found and not missing)):
        column = GOLD_IDS if missing else GOLD
        raise ValueError(
            f"dataset {name!r} has no column {column!r}, the third response that this objective "
            f"trains on (TPO's gold one); found {', '.join(found)}; columns={{{GOLD!r}: ...}} reads "
            "another column"
        )
    if form is None:
        _check_prompt_column(dataset, name)
    if margins and not margin_columns(found):
        raise ValueError(
            f"dataset {name!r} has no margins, which this objective weighs pairs by: no column "
            "'reward_margin' or 'margin', nor 'score_chosen' and 'score_rejected'; found "
            f"{', '.join(found)}; `prefkern margins` writes one"
        )


def _check_prompt_column(dataset: datasets.Dataset, name: str) -> None:
    """Raise ValueError for texts without `prompt` beside a column that must be their prompt."""
    if "prompt" in dataset.column_names or not is_text(dataset.features.get("chosen")):
        return
    unread = unread_columns(dataset)
    if any(column.lower() in (*_QUESTIONS, *_SYSTEMS) for column in unread):
        raise ValueError(
            f"dataset {name!r} has no column 'prompt', and {listed(unread)} would not be read; "
            f"{unread_hint(unread)}"
        )


def listed(columns: Sequence[str]) -> str:
    """Columns by name, in a sentence."""
    plural = "s" if len(columns) > 1 else ""
    return f"text column{plural} {', '.join(map(repr, columns))}"


def check_labels(dataset: datasets.Dataset, name: str) -> None:
    """Raise ValueError unless every `label` of single responses is true or false."""
    if not {"prompt", "completion", "label"} <= set(dataset.column_names):
        return
    for row, label in enumerate(plain(dataset)["label"][:]):
        if not (isinstance(label, bool) or label in (0, 1)):
            raise ValueError(
                f"dataset {name!r}, row {row}: 'label' must be true or false, got {label!r}"
            )


def plain(dataset: datasets.Dataset) -> datasets.Dataset:
    """The dataset with rows of plain Python types, not tables or tensors of some library.

    A transform that the user set stays, because it defines the rows.
    """
    return dataset if dataset.format["type"] == "custom" else dataset.with_format(None)


def without_unused(
    dataset: datasets.Dataset, *, references: bool, margins: bool
) -> datasets.Dataset:
    """The dataset without the number columns that nothing reads, so that a gap there is no error.

    Args:
        references: whether to keep the reference's sums.
        margins: whether to keep the columns that give a reward margin.
    """
    unused: list[str] = []
    if not references:
        unused += REFERENCE_COLUMNS
    if not margins:
        unused += [column for sources in MARGIN_SOURCES for column in sources]
    return dataset.remove_columns([c for c in unused if c in dataset.column_names])


def picture_column(columns: Any) -> str | None:
    """The column of pictures among the names of columns, if there is one."""
    return next((column for column in PICTURE_COLUMNS if column in columns), None)


def pictures_of(example: Mapping[str, Any]) -> list[Any]:
    """The pictures of a row, which may be none."""
    column = picture_column(example)
    value = None if column is None else example[column]
    if value is None:
        return []
    return [value] if column == "image" else list(value)


def has_examples(columns: Sequence[str]) -> bool:
    """Whether rows are single responses, as text or tokens."""
    return {"prompt", "completion", "label"} <= set(columns) or set(EXAMPLE_COLUMNS) <= set(columns)


def holds_examples(dataset: datasets.Dataset, name: str) -> bool:
    """Whether rows are single responses, in a format of TRL's or of others."""
    if has_examples(dataset.column_names):
        return True
    form = recognise(dataset, name, paired=False)
    return form is not None and form.label is not None


def margin_columns(columns: Sequence[str]) -> tuple[str, ...]:
    """The columns that give the margin: one, two to subtract, or none."""
    for sources in MARGIN_SOURCES:
        if set(sources) <= set(columns):
            return sources
    return ()


def reward_margin(example: dict[str, Any], sources: tuple[str, ...]) -> float:
    """A row's margin, from what `margin_columns` found."""
    chosen, *rejected = (float(example[column]) for column in sources)
    return chosen - sum(rejected)


def is_number(value: Any) -> bool:
    is_plain = isinstance(value, int | float) and not isinstance(value, bool)
    return is_plain and math.isfinite(value)
