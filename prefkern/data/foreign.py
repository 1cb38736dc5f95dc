"""The formats of others: recognised by their columns, and read as one of TRL's.

    Alpaca, LLaMA-Factory   instruction, input [system, history], chosen and rejected
                            or output (two texts), or output and kto_tag
    ShareGPT                conversations of {from, value}, chosen and rejected messages, or a label
    OpenAI's messages       messages, chosen and rejected messages, or a label
    Orca, axolotl           question or input [system], chosen and rejected
    Argilla                 instruction [system], chosen_response and rejected_response
    UltraFeedback           prompt as text, chosen and rejected as whole conversations
    HH                      chosen and rejected as one text each, "\\n\\nHuman: ...\\n\\nAssistant: ..."
    rankings                prompt, instruction or question, and several answers with ranks or scores
                            (`rankings`): the best against the worst

In all but HH's and Nectar's the texts become messages, because their homes render them with a chat
template: a row gets a `SYSTEM` column, which may be empty. HH's stay text, and the prompt ends with the last
"Assistant:" of the common beginning. A format is that of a dataset, not of a row: no row is left
out, and one that does not have the format is an error. Where two readings are possible, the error
has the mapping `columns` that chooses. Of a stream, whose rows come in groups, the first ones decide
(`decided_by`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from prefkern.data.messages import ANSWERS, present
from prefkern.data.rankings import Ranking, as_dialogue, find_ranking, is_dialogue

if TYPE_CHECKING:
    import datasets

# The column of system messages, which makes a row a conversation.
SYSTEM = "_system"
# TRL's name of a third, gold response to the prompt (TPO).
GOLD = "reference"
_PAIRS = (("chosen", "rejected"), ("chosen_response", "rejected_response"))
_SYSTEMS = ("system", "system_prompt")
_LABELS = ("label", "kto_tag")
_TURNS = ("conversations", "messages", "conversation")
_HUMAN, _ASSISTANT = "Human:", "\n\nAssistant:"
# A turn of a person inside a response of HH's.
NEXT_TURN = f"\n\n{_HUMAN}"
_NAMES = {"question": "Orca", "instruction": "Alpaca", "input": "Orca, question as input"}
# What CSV files have as text.
TEXTS = ("question", "instruction", "input", "output", *_PAIRS[1], *_SYSTEMS)
# Rows that decide what a text is.
_FIRST = 1000
_DECIDING: ContextVar[datasets.Dataset | None] = ContextVar("deciding rows", default=None)


@dataclass(frozen=True)
class Format:
    """A format of others, as a dataset has it.

    `question` are the columns whose texts are the question, `turns` the conversation before the
    responses (and with the response, if there is no other column for it). `responses` are two
    columns, or one: with `label`, of single responses; without, of a list of two texts.
    """

    name: str
    question: tuple[str, ...] = ()
    turns: str | None = None
    responses: tuple[str, ...] = ()
    label: str | None = None
    system: str | None = None
    history: str | None = None
    tools: bool = False
    ranking: Ranking | None = None  # in place of `responses`: a row may have no pair
    is_text: bool = False  # HH's

    @property
    def read(self) -> tuple[str, ...]:
        """The columns that are read."""
        answers = self.ranking.columns if self.ranking else self.responses
        named = (self.system, self.history, self.turns, *self.question, *answers, self.label)
        return tuple(column for column in named if column is not None)

    @property
    def made(self) -> tuple[str, ...]:
        """The columns that are made of them; none if the rows are read as they are."""
        if self.question == ("prompt",) and self.responses == _PAIRS[0]:
            return ()
        if not (self.question or self.turns or self.is_text):
            return _PAIRS[0] if self.tools else ()
        return ("prompt", *(("completion", "label") if self.label else _PAIRS[0]))

    def after(self, columns: Sequence[str]) -> list[str]:
        """The names of a dataset's columns when it has been converted."""
        if not self.made:
            return list(columns)
        return [*self.made, *(c for c in columns if c not in (*self.read, *self.made))]

    def convert(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row with the columns `made`, and `SYSTEM` where it is to be a conversation.

        Raises ValueError for a row that does not have the format.
        """
        if self.is_text:
            return _split(row)
        tools = {"tools": schemas(row["tools"])} if self.tools else {}
        if not (self.question or self.turns):
            return {**{side: row[side] for side in self.responses}, **tools}
        prompt = self._prompt(row)
        if self.ranking is not None:
            return {**self._ranked(prompt, row, self.ranking), **tools}
        responses = [row[column] for column in self.responses]
        if not responses:
            *prompt, last = prompt
            if not prompt:
                raise ValueError(f"{self.turns!r} has one message; expected a question before it")
            responses = [[last]]
        if self.label is None and len(responses) == 1:
            responses = responses[0] or []
            if len(responses) != 2 or None in responses:
                raise ValueError(
                    f"{self.responses[0]!r} must be two texts, chosen and rejected, got "
                    f"{len(responses)}; more answers need 'scores' or 'ranks' beside 'responses'"
                )
        made = dict(zip(self.made[1:], responses, strict=False))
        if self.label is not None:
            made["label"] = row[self.label]
        system = {} if SYSTEM in row else {SYSTEM: (row[self.system] if self.system else "") or ""}
        return {"prompt": prompt, **made, **system, **tools}

    def _ranked(self, prompt: Any, row: dict[str, Any], ranking: Ranking) -> dict[str, Any]:
        """A row of a ranking as a pair; its responses are None if all have one score."""
        pair = ranking.best_and_worst(row) or (None, None)
        made = dict(zip(_PAIRS[0], pair, strict=True))
        if not ranking.is_dialogue:
            system = (
                {} if SYSTEM in row else {SYSTEM: (row[self.system] if self.system else "") or ""}
            )
            return {"prompt": prompt, **made, **system}
        if not is_dialogue(prompt):
            raise ValueError(
                f"'prompt' must be a dialogue up to 'Assistant:', as in the first row, got {prompt[:60]!r}"
            )
        return {**made, **as_dialogue(prompt, made)}

    def _prompt(self, row: dict[str, Any]) -> Any:
        if self.turns is not None:
            turns = row[self.turns]
            if not turns:
                raise ValueError(f"{self.turns!r} is empty, so the row has no question")
            return turns
        texts = [row[column] for column in self.question]
        text = "\n".join(text for text in texts if text and text.strip())
        if not text:
            raise ValueError(f"{' and '.join(map(repr, self.question))}: the question is empty")
        if self.history is None:
            return text
        turns = []
        for turn in row[self.history] or []:
            if len(turn) != 2 or None in turn:
                raise ValueError(f"{self.history!r} must be pairs of question and answer: {turn}")
            roles = ("user", "assistant")
            turns += [{"role": r, "content": t} for r, t in zip(roles, turn, strict=True)]
        return [*turns, {"role": "user", "content": text}]


@contextmanager
def decided_by(rows: datasets.Dataset) -> Iterator[None]:
    """Within it, these rows decide what the texts of a dataset are, not the dataset's own.

    A few rows may all look like another format than that of their dataset.
    """
    token = _DECIDING.set(rows.with_format(None))
    try:
        yield
    finally:
        _DECIDING.reset(token)


def recognise(dataset: datasets.Dataset, name: str, *, paired: bool = True) -> Format | None:
    """The format of others that a dataset has; None if it has one of TRL's, or none.

    Args:
        dataset: a dataset with rows, after `columns.renamed`.
        name: its name in errors.
        paired: False if single responses are wanted before pairs.

    Raises ValueError for columns that can be read in two ways.
    """
    if dataset.format["type"] == "custom":
        # A transform makes other rows than the columns say.
        return None
    dataset = dataset.with_format(None)
    features, found = dataset.features, dataset.column_names
    if {"prompt_ids", "chosen_ids", "rejected_ids"} <= set(found) or "completion_ids" in found:
        return None
    if not paired and {"prompt", "completion", "label"} <= set(found):
        return None
    labels = [column for column in _LABELS if column in found]
    form = _single(features, labels, name) if labels and not paired else None
    form = form or _pair(dataset, name)
    return form if form is None else replace(form, tools="tools" in found)


def _single(features: Mapping[str, Any], labels: list[str], name: str) -> Format | None:
    """The format of single responses."""
    texts = _prompts(features)
    answers = [c for c in ("completion", "output") if is_text(features.get(c))]
    turns = [column for column in _TURNS if _is_messages(features.get(column))]
    if set(_PAIRS[0]) <= set(features):
        # Beside pairs, a conversation is their prompt.
        turns = []
    elif not texts and "prompt" not in features and _is_messages(features.get("completion")):
        # axolotl's `argilla_chat`: the question is in the response's column.
        turns = ["completion"]
    if not (texts and answers or turns):
        return None
    label = _one([(c,) for c in labels], "the label", "", features, name)[0]
    if texts and answers:
        question = _one(texts, "the prompt", "prompt", features, name)
        answer = _one([(c,) for c in answers], "the response", "completion", features, name)
        return _asked(question, answer, features, name, label=label)
    column = _one([(c,) for c in turns], "the conversation", "", features, name)[0]
    kind = _kind_of_turns(features[column])
    return Format(kind, turns=column, label=label, system=_system(features, name))


def _pair(dataset: datasets.Dataset, name: str) -> Format | None:
    features = dataset.features
    sides = [pair for pair in _PAIRS if set(pair) <= set(features)]
    texts = _prompts(features)
    if not sides:
        ranking = find_ranking(features)
        if ranking is not None and texts:
            question = _one(texts, "the prompt", "prompt", features, name)
            form = _asked(question, (), features, name)
            if question == ("prompt",):
                first = _first(dataset, question)[0]["prompt"]
                ranking = replace(ranking, is_dialogue=is_dialogue(first))
            return replace(form, name=ranking.name, ranking=ranking)
        output = features.get("output")
        if texts and is_text(getattr(output, "feature", None)):
            question = _one(texts, "the prompt", "prompt", features, name)
            return _asked(question, ("output",), features, name)
        return None
    pair = _one(sides, "the responses", "chosen", features, name)
    chosen = features[pair[0]]
    is_whole = _begins_with_a_question(dataset, pair[0])
    if "prompt" in features and pair == _PAIRS[0]:
        if is_whole and is_text(features["prompt"]):
            return Format("UltraFeedback", ("prompt",), responses=pair)
        return _spoken(features, pair)
    if is_whole:
        return _spoken(features, pair)
    turns = [(column,) for column in _TURNS if _is_messages(features.get(column))]
    if not texts and not turns:
        return _hh(dataset, pair) if is_text(chosen) else _spoken(features, pair)
    # A prompt of messages needs responses of messages, so the mapping would be of no use.
    target = "prompt" if texts or not is_text(chosen) else ""
    source = _one([*texts, *turns], "the prompt", target, features, name)
    if source in turns:
        kind = _kind_of_turns(features[source[0]])
        return Format(kind, turns=source[0], responses=pair, system=_system(features, name))
    if is_text(chosen):
        _check_repeated(dataset, source, pair, name)
    return _asked(source, pair, features, name)


def _asked(
    question: tuple[str, ...],
    responses: tuple[str, ...],
    features: Mapping[str, Any],
    name: str,
    label: str | None = None,
) -> Format:
    """The format of a question in columns of text."""
    history = features.get("history")
    is_history = is_text(getattr(getattr(history, "feature", None), "feature", None))
    kind = "Argilla" if responses == _PAIRS[1] else _NAMES.get(question[0], "LLaMA-Factory")
    return Format(
        kind,
        question,
        responses=responses,
        label=label,
        system=_system(features, name),
        history="history" if is_history else None,
    )


def _prompts(features: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The columns, or sets of them, that may be the question."""
    found = [c for c in ("prompt", *_NAMES) if is_text(features.get(c))]
    if "prompt" in found:
        return [("prompt",)]
    if {"instruction", "input"} <= set(found):
        # Alpaca's: the input belongs to the instruction.
        found.remove("input")
        return [("instruction", "input") if c == "instruction" else (c,) for c in found]
    return [(c,) for c in found]


def _system(features: Mapping[str, Any], name: str) -> str | None:
    found = [(c,) for c in _SYSTEMS if is_text(features.get(c))]
    if not found or SYSTEM in features:
        return None
    return _one(found, "the system message", "system", features, name)[0]


def _one(
    sources: Sequence[tuple[str, ...]],
    what: str,
    target: str,
    features: Mapping[str, Any],
    name: str,
) -> tuple[str, ...]:
    """The only source of a part of the row. Raises ValueError if there are more.

    The error has a mapping of columns if there is a `target`, the name that is read.
    """
    if len(sources) == 1:
        return sources[0]
    several = " and ".join(repr(source[0]) for source in sources)
    remedy = "remove what nothing should read"
    if not target:
        raise ValueError(
            f"dataset {name!r} can be read in two ways: {several} may be {what}; {remedy}"
        )
    names = {target: sources[0][0]}
    if target == "prompt" and "system" in features:
        names["system"] = "system"
    flags = " ".join(f"{key}={column}" for key, column in names.items())
    raise ValueError(
        f"dataset {name!r} can be read in two ways: {several} may be {what}; columns={names} "
        f"(--columns {flags}) reads the first, or {remedy}"
    )


def _check_repeated(
    dataset: datasets.Dataset, question: tuple[str, ...], pair: tuple[str, ...], name: str
) -> None:
    """Raise ValueError if the responses have the question already, in all of the first rows."""
    asked = question[0]
    for row in _first(dataset, (asked, *pair)):
        text, common = row[asked], os.path.commonprefix([row[pair[0]] or "", row[pair[1]] or ""])
        if not (text and text.strip() and text.strip() in common):
            return
    raise ValueError(
        f"dataset {name!r} can be read in two ways: {asked!r} may be the prompt, but {pair[0]!r} "
        f"and {pair[1]!r} have its text already; remove {asked!r} to take their common beginning "
        f"as the prompt, or put it before them with columns={{'prompt': {asked!r}}}"
    )


def _first(dataset: datasets.Dataset, columns: Sequence[str]) -> Any:
    """The rows that decide what the texts of some columns are."""
    deciding = _DECIDING.get()
    rows = dataset
    if deciding is not None and {*columns} <= {*deciding.column_names}:
        rows = deciding
    if rows.format["type"] != "custom":
        # A picture beside them would be read; a transform takes whole rows.
        rows = rows.select_columns([*columns])
    return rows.select(range(min(len(rows), _FIRST)))


def _begins_with_a_question(dataset: datasets.Dataset, column: str) -> bool:
    """Whether the responses of a dataset are whole conversations: its first one decides."""
    if not _is_messages(dataset.features[column]):
        return False
    messages = _first(dataset, (column,))[0][column]
    messages = messages if isinstance(messages, list) else [messages]
    first = messages[0] if messages and isinstance(messages[0], dict) else {}
    return (first.get("role") or first.get("from")) not in (*ANSWERS, None)


def _spoken(features: Mapping[str, Any], pair: tuple[str, ...]) -> Format | None:
    """ShareGPT's messages in TRL's columns."""
    is_theirs = _kind_of_turns(features[pair[0]]) == "ShareGPT" and pair == _PAIRS[0]
    return Format("ShareGPT", responses=pair) if is_theirs else None


def _hh(dataset: datasets.Dataset, pair: tuple[str, ...]) -> Format | None:
    for row in _first(dataset, pair):
        for column in pair:
            text = row[column] or ""
            if not text.lstrip().startswith(_HUMAN) or _ASSISTANT not in text:
                return None
    return Format("HH", responses=pair, is_text=True)


def _split(row: dict[str, Any]) -> dict[str, Any]:
    """Dialogues as text, cut after the last "Assistant:" that chosen and rejected have in common."""
    chosen, rejected = row["chosen"] or "", row["rejected"] or ""
    at = os.path.commonprefix([chosen, rejected]).rfind(_ASSISTANT)
    if at < 0:
        raise ValueError(
            "'chosen' and 'rejected' begin with different questions: no 'Assistant:' stands in "
            f"their common beginning, {os.path.commonprefix([chosen, rejected])[:60]!r}"
        )
    at += len(_ASSISTANT)
    made = {"prompt": chosen[:at], "chosen": chosen[at:], "rejected": rejected[at:]}
    gold = row.get(GOLD)
    if isinstance(gold, str) and gold.lstrip().startswith(_HUMAN):
        if not gold.startswith(made["prompt"]):
            raise ValueError(
                f"{GOLD!r} is a dialogue that does not begin as 'chosen' and 'rejected' do, with "
                f"{made['prompt'][:60]!r}; expected the same beginning, or the answer alone"
            )
        made[GOLD] = gold[at:]
    return made


def schemas(tools: Any) -> Any:
    """The tools of a row in JSON, each as `{"type": "function", "function": ...}`.

    LLaMA-Factory's are the inner part, which it wraps so for most models. What cannot be read stays
    as it is.
    """
    try:
        found = json.loads(tools) if isinstance(tools, str) else present(tools)
    except json.JSONDecodeError:
        return tools
    if not (isinstance(found, list) and all(isinstance(each, dict) for each in found)):
        return tools
    wrapped = [
        {"type": "function", "function": each}
        if "name" in each and "function" not in each
        else each
        for each in found
    ]
    return json.dumps(wrapped, ensure_ascii=False)


def is_text(feature: Any) -> bool:
    """Whether cells of a feature are text."""
    return not isinstance(feature, Mapping | list) and "string" in str(
        getattr(feature, "dtype", "")
    )


def _fields(feature: Any) -> Mapping[str, Any]:
    """The keys of a message, or of the messages of a list."""
    if isinstance(feature, list) and len(feature) == 1:
        feature = feature[0]
    feature = getattr(feature, "feature", feature)
    return feature if isinstance(feature, Mapping) else {}


def _is_messages(feature: Any) -> bool:
    keys = _fields(feature).keys()
    return {"from", "value"} <= keys or "role" in keys


def _kind_of_turns(feature: Any) -> str:
    return "ShareGPT" if {"from", "value"} <= _fields(feature).keys() else "OpenAI's messages"
