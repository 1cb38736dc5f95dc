"""Rankings of several answers to a prompt, as pairs.

    Nectar            answers of {answer, rank}: rank 1 is the best
    UltraFeedback     completions of {response, fine-grained_score or overall_score}
    lists beside      responses (or completions, answers, all_generated_responses) of texts, and
                      scores, ranks, ratings or all_rm_scores of numbers

A ranking that is trained on as it is gives one pair, the best answer against the worst;
`ranked_pairs` makes every pair. Two answers of one score are no pair, since neither is preferred. Of
UltraFeedback's two scores the mean of its four ratings is taken: the overall score is wrong in some
of its rows. Nectar's prompts are dialogues as text, and so are its pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prefkern.data.truncation import NothingToScore

if TYPE_CHECKING:
    import datasets

_ANSWERS = ("answers", "completions", "responses", "all_generated_responses")
_TEXTS = ("answer", "response", "completion", "content", "text")
# A rank is better if it is lower, a score if it is higher.
_RANKS = ("rank", "ranks")
_SCORES = (
    *("fine-grained_score", "overall_score", "score", "rating"),
    *("scores", "ratings", "all_rm_scores"),
)
_HUMAN, _ASSISTANT = "Human:", "Assistant:"


@dataclass(frozen=True)
class Ranking:
    """Where a dataset has its answers and what they are ranked by.

    `text` and `value` are keys of an answer; without `text`, `value` is a column of its own.
    `is_dialogue` is whether prompts are dialogues as text, as Nectar's.
    """

    answers: str
    text: str | None
    value: str
    is_dialogue: bool = False

    @property
    def name(self) -> str:
        return {"answer": "Nectar", "response": "UltraFeedback, ranked"}.get(
            self.text or "", "rankings"
        )

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.answers,) if self.text else (self.answers, self.value)

    def best_first(self, row: Mapping[str, Any]) -> list[tuple[float, str]]:
        """The answers of a row with their scores. Raises ValueError for a row without."""
        answers = row[self.answers] or []
        if self.text is None:
            values = row[self.value] or []
            if len(values) != len(answers):
                raise ValueError(
                    f"{self.answers!r} has {len(answers)} answers and {self.value!r} {len(values)} numbers"
                )
        else:
            values = [answer[self.value] for answer in answers]
            answers = [answer[self.text] for answer in answers]
        sign = -1 if self.value in _RANKS else 1
        for answer, value in zip(answers, values, strict=True):
            is_number = isinstance(value, int | float) and math.isfinite(value)
            if not (isinstance(answer, str) and is_number):
                raise ValueError(
                    f"each of {self.answers!r} must be a text with a number in {self.value!r}, got "
                    f"{str(answer)[:40]!r} with {value!r}"
                )
        ranked = [(sign * value, answer) for answer, value in zip(answers, values, strict=True)]
        return sorted(ranked, key=lambda each: -each[0])

    def best_and_worst(self, row: Mapping[str, Any]) -> tuple[str, str] | None:
        """The best answer and the worst; None if all have one score."""
        ranked = self.best_first(row)
        if not ranked or ranked[0][0] == ranked[-1][0]:
            return None
        return ranked[0][1], ranked[-1][1]


def find_ranking(features: Mapping[str, Any]) -> Ranking | None:
    """The ranking that a dataset has, by its columns; None if it has none."""
    for column in _ANSWERS:
        feature = features.get(column)
        inner = getattr(feature, "feature", None)
        if isinstance(feature, list) and len(feature) == 1:
            inner = feature[0]
        if isinstance(inner, Mapping):
            text = next((key for key in _TEXTS if key in inner), None)
            value = next((key for key in (*_RANKS, *_SCORES) if key in inner), None)
            if text and value:
                return Ranking(column, text, value)
        elif inner is not None and "string" in str(getattr(inner, "dtype", "")):
            values = (key for key in (*_RANKS, *_SCORES) if key in features)
            value = next((key for key in values if _are_numbers(features[key])), None)
            if value:
                return Ranking(column, None, value)
    return None


def ranked_pairs(dataset: datasets.Dataset) -> datasets.Dataset:
    """Every pair of answers of a dataset of rankings, the better one as `chosen`.

    Args:
        dataset: rows with `answers`, `completions` or `responses` that are ranked or scored.

    Returns:
        A row for each two answers of different scores, with `chosen` and `rejected` in place of the
        answers. The other columns stay, so that the format is recognised as ever, but for a `prompt`
        that is no dialogue: it becomes `question`, whose texts are read as messages.

    Raises ValueError for a dataset without rankings.
    """
    ranking = find_ranking(dataset.features)
    if ranking is None:
        raise ValueError(
            f"dataset has no rankings: expected {', '.join(map(repr, _ANSWERS[:3]))} with ranks or "
            f"scores, found {', '.join(dataset.column_names)}"
        )

    names = dataset.column_names
    renames = "prompt" in names and not is_dialogue(next(iter(dataset["prompt"]), None))

    def expand(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        others = [name for name in batch if name not in ranking.columns]
        made: dict[str, list[Any]] = {name: [] for name in (*others, "chosen", "rejected")}
        if renames:
            made["question"] = made.pop("prompt")
        for at in range(len(batch[ranking.answers])):
            row = {name: values[at] for name, values in batch.items()}
            ranked = ranking.best_first(row)
            for place, (score, better) in enumerate(ranked):
                for lower, worse in ranked[place + 1 :]:
                    if lower < score:
                        pair = {"chosen": better, "rejected": worse}
                        if renames:
                            pair["question"] = row["prompt"]
                        elif "prompt" in row:
                            pair = as_dialogue(row["prompt"], pair)
                        for name, values in made.items():
                            values.append({**row, **pair}[name])
        return made

    return dataset.map(
        expand, batched=True, remove_columns=dataset.column_names, desc="Making pairs of rankings"
    )


def without_ties(dataset: datasets.Dataset, name: str) -> datasets.Dataset:
    """Converted rows without those that have no pair. Raises NothingToScore if no row has one."""
    chosen: Any = dataset["chosen"]
    kept = [row for row, text in enumerate(chosen) if text is not None]
    if not kept:
        raise NothingToScore(f"dataset {name!r} has no row with two answers of different scores")
    return dataset if len(kept) == len(dataset) else dataset.select(kept)


def as_dialogue(prompt: str, answers: Mapping[str, str | None]) -> dict[str, Any]:
    """Prompt and answers; the space after a dialogue's last "Assistant:" belongs to the answers."""
    spaced = {name: None if text is None else f" {text.lstrip()}" for name, text in answers.items()}
    return {"prompt": prompt.rstrip(), **spaced}


def is_dialogue(prompt: Any) -> bool:
    """Whether a prompt is a dialogue as text, up to an answer."""
    return isinstance(prompt, str) and (
        prompt.lstrip().startswith(_HUMAN) and prompt.rstrip().endswith(_ASSISTANT)
    )


def _are_numbers(feature: Any) -> bool:
    inner = (
        feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", None)
    )
    return any(kind in str(getattr(inner, "dtype", "")) for kind in ("int", "float"))
