"""Rankings as pairs: the best answer against the worst, or every pair; ties are left out and counted."""

from __future__ import annotations

import itertools

import pytest

from support import tiny

datasets = pytest.importorskip("datasets")

from prefkern import data

TOKENIZER = tiny.tokenizer()
TEXTS = ("fine", "very good", "bad", "the film")
RANKS = (2.0, 1.0, 4.0, 3.0)
SCORES = (7.5, 9.0, 2.0, 2.5)
ASKED = [{"role": "user", "content": "was the film good ?"}]


def _dataset(*rows: dict):
    return datasets.Dataset.from_list([*rows])


def _said(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


PAIR = {"prompt": ASKED, "chosen": _said("very good"), "rejected": _said("bad")}
NECTAR = {
    "prompt": "\n\nHuman: was the film good ?\n\nAssistant: ",
    "answers": [
        {"answer": text, "model": "a", "rank": rank}
        for text, rank in zip(TEXTS, RANKS, strict=True)
    ],
    "turns": 1,
}
ULTRAFEEDBACK = {
    "instruction": "was the film good ?",
    "models": ["a", "b"],
    "completions": [
        {"response": text, "overall_score": 10 - score, "fine-grained_score": score}
        for text, score in zip(TEXTS, SCORES, strict=True)
    ],
}
BESIDE = {"prompt": "was the film good ?", "responses": [*TEXTS], "scores": [*SCORES]}
DIALOGUE = {
    "prompt": "\n\nHuman: was the film good ?\n\nAssistant:",
    "chosen": " very good",
    "rejected": " bad",
}
CASES = {
    "Nectar (prompt, answers)": (NECTAR, DIALOGUE),
    "UltraFeedback, ranked (instruction, completions)": (ULTRAFEEDBACK, PAIR),
    "rankings (prompt, responses, scores)": (BESIDE, PAIR),
    "rankings (system, question, answers, ranks)": (
        {"question": ASKED[0]["content"], "answers": [*TEXTS], "ranks": [2, 1, 4, 3], "system": ""},
        PAIR,
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("paired", [True, False])
def test_the_best_answer_is_chosen_over_the_worst(name, paired):
    row, pair = CASES[name]
    make = data.tokenize_preferences if paired else data.tokenize_examples
    found, report = make(_dataset(row, row), TOKENIZER)
    expected, _ = make(_dataset(pair, pair), TOKENIZER)
    assert found.to_list() == expected.to_list()
    assert (report.read_as, report.converted, report.tied) == (name, 2, 0)


@pytest.mark.parametrize("name", CASES)
def test_every_pair_of_a_ranking(name):
    """Six pairs of four answers, in the order of their ranks."""
    row, pair = CASES[name]
    found = data.ranked_pairs(_dataset(row, row))
    best = sorted(TEXTS, key=dict(zip(TEXTS, RANKS, strict=True)).__getitem__)
    expected = [*itertools.combinations(best, 2)] * 2
    assert [(each["chosen"].strip(), each["rejected"].strip()) for each in found] == expected
    tokens, report = data.tokenize_preferences(found, TOKENIZER)
    assert report.pairs == 12
    whole, _ = data.tokenize_preferences(_dataset(pair), TOKENIZER)
    # Best against worst is among them.
    assert tokens[2] == whole[0]


def test_ties_are_left_out_and_counted():
    tied = {**BESIDE, "scores": [3.0] * 4}
    one = {**BESIDE, "responses": ["fine"], "scores": [3.0]}
    half = {**BESIDE, "scores": [1.0, 3.0, 1.0, 3.0]}
    tokens, report = data.tokenize_preferences(_dataset(tied, BESIDE, one, half), TOKENIZER)
    assert (len(tokens), report.tied, report.converted) == (2, 2, 4)
    assert "2 rankings left out, whose answers have one score" in report.summary
    assert len(data.ranked_pairs(_dataset(tied, one, half))) == 4
    with pytest.raises(ValueError, match="has no row with two answers of different scores"):
        data.tokenize_preferences(_dataset(tied), TOKENIZER)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({**BESIDE, "scores": [1.0, 2.0]}, "'responses' has 4 answers and 'scores' 2 numbers"),
        (
            {**BESIDE, "scores": [1.0, None, 2.0, 3.0]},
            "a number in 'scores', got 'very good' with N",
        ),
        (
            {**BESIDE, "responses": ["a", "b", None, "d"]},
            "must be a text with a number in 'scores'",
        ),
        (
            {**NECTAR, "prompt": "film ?"},
            "'prompt' must be a dialogue up to 'Assistant:', as in the",
        ),
    ],
)
def test_rankings_that_cannot_be_read(row, says):
    good = NECTAR if "turns" in row else BESIDE
    with pytest.raises(ValueError, match=f"row 1, read as .*{says}"):
        data.tokenize_preferences(_dataset(good, row), TOKENIZER)


def test_rows_without_rankings_have_no_pairs():
    with pytest.raises(
        ValueError, match="dataset has no rankings: expected 'answers', 'completions'"
    ):
        data.ranked_pairs(_dataset({"prompt": "a", "chosen": "b", "rejected": "c"}))
    # Numbers that are no scores, and answers without numbers.
    for more in ({}, {"scores": ["a", "b", "c", "d"]}):
        row = {"prompt": "film ?", "responses": [*TEXTS], **more}
        with pytest.raises(ValueError, match="no column 'chosen' and no column 'rejected'"):
            data.tokenize_preferences(_dataset(row), TOKENIZER)
    ranked = {"instruction": "a", "input": "", "output": ["a", "b", "c"]}
    with pytest.raises(ValueError, match="got 3; more answers need 'scores' or 'ranks' beside"):
        data.tokenize_preferences(_dataset(ranked), TOKENIZER)
