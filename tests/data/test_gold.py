"""Rows with a third, gold response (`reference`): read, cut, reported, collated; and refused."""

from __future__ import annotations

import itertools

import datasets
import pytest

from prefkern.data import tokenize_preferences
from prefkern.data.collate import PreferenceCollator
from prefkern.data.truncation import truncate_responses
from support import tiny

TOKENIZER = tiny.tokenizer()


def made(*rows: dict) -> datasets.Dataset:
    return datasets.Dataset.from_list(list(rows))


def tokens(*rows: dict, **options) -> datasets.Dataset:
    return tokenize_preferences(made(*rows), TOKENIZER, gold=True, **options)[0]


def words(ids: list[int]) -> str:
    return TOKENIZER.decode(ids)


ROW = {
    "prompt": "the film is",
    "chosen": " good",
    "rejected": " bad the",
    "reference": " very good plot",
}


def test_text():
    (row,) = tokens(ROW)
    assert words(row["prompt_ids"]) == "the film is"
    assert words(row["reference_ids"]) == "very good plot <eos>"
    assert words(row["rejected_ids"]) == "bad the <eos>"
    # The pair is what it is without the third response.
    (pair,) = tokenize_preferences(made(ROW), TOKENIZER)[0]
    assert "reference_ids" not in pair
    assert pair == {name: ids for name, ids in row.items() if name != "reference_ids"}


def test_an_implicit_prompt_is_taken_off_all_three():
    whole = {side: ROW["prompt"] + ROW[side] for side in ("chosen", "rejected", "reference")}
    assert tokens(whole)[:] == tokens(ROW)[:]
    with pytest.raises(ValueError, match="row 0: 'reference' does not begin with the common begin"):
        tokens({**whole, "reference": " very good plot"})


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@pytest.mark.parametrize("form", ["explicit", "implicit", "repeated", "text prompt"])
def test_conversations(form):
    prompt = [message("user", "the film is")]
    sides = {
        side: [message("assistant", ROW[side])] for side in ("chosen", "rejected", "reference")
    }
    row = {"prompt": prompt, **sides}
    if form == "implicit":
        row = {side: prompt + rest for side, rest in sides.items()}
    if form == "repeated":
        row = {"prompt": prompt, **{side: prompt + rest for side, rest in sides.items()}}
    if form == "text prompt":
        row = {"prompt": "the film is", **sides}
    (found,) = tokens(row)
    assert words(found["prompt_ids"]) == "<user> the film is <eos> <assistant>"
    assert words(found["reference_ids"]) == "very good plot <eos>"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"reference": None}, "'reference' must be text or a list of messages, got None"),
        (
            {"reference": [message("assistant", "good")]},
            "one of 'chosen' and 'reference' is text and the other a conversation",
        ),
    ],
)
def test_a_cell_of_another_kind_is_refused(change, says):
    with pytest.raises(ValueError, match=f"dataset 'train', row 0: {says}"):
        tokens({**ROW, **change})


def test_only_one_that_repeats_the_prompt_is_refused():
    prompt = [message("user", "the film is")]
    sides = {
        side: [message("assistant", ROW[side])] for side in ("chosen", "rejected", "reference")
    }
    row = {"prompt": prompt, **sides, "reference": prompt + sides["reference"]}
    with pytest.raises(
        ValueError, match="'reference' begins with the messages of 'prompt', but 'ch"
    ):
        tokens(row)
    # A conversation that ends with the question has no response.
    whole = {side: prompt + rest for side, rest in sides.items()}
    with pytest.raises(ValueError, match="'reference' does not begin with the common beginning"):
        tokens({**whole, "reference": prompt})


def test_an_empty_one_drops_the_row():
    _, report = tokenize_preferences(made(ROW, {**ROW, "reference": " "}), TOKENIZER, gold=True)
    assert (report.pairs, report.empty) == (1, 1)
    # As where a pair's own response may be its end token alone.
    whole = {"chosen": "the film is good", "rejected": "the film is", "reference": "the film is"}
    with pytest.raises(ValueError, match="no pair with three responses that can be scored"):
        tokens(whole)


def test_other_names_and_what_is_not_read():
    row = {**ROW, "answer": ROW["reference"]}
    del row["reference"]
    assert tokens(row, columns={"reference": "answer"})[:] == tokens(ROW)[:]
    _, report = tokenize_preferences(made(ROW), TOKENIZER, gold=True)
    assert report.unread == () and report.lengths["reference"].max == 4
    assert "reference" in str(report)
    _, report = tokenize_preferences(made(ROW), TOKENIZER)
    assert report.unread == ("reference",) and "reference" not in report.lengths


def test_a_missing_column_is_named():
    bare = {name: text for name, text in ROW.items() if name != "reference"}
    with pytest.raises(ValueError, match="'train' has no column 'reference', the third response"):
        tokens(bare)
    pair = {"prompt_ids": [5], "chosen_ids": [6, 1], "rejected_ids": [7, 1]}
    with pytest.raises(ValueError, match="'train' has no column 'reference_ids', the third"):
        tokens(pair)
    assert tokens({**pair, "reference_ids": [8, 1]})[0]["reference_ids"] == [8, 1]
    # Nothing reads it where no third response is asked for.
    kept = tokenize_preferences(made({**pair, "reference_ids": [8, 1]}), TOKENIZER)[0]
    assert kept.column_names == ["prompt_ids", "chosen_ids", "rejected_ids"]
    with pytest.raises(ValueError, match="'reference_ids' must be lists of integers"):
        tokens({**pair, "reference_ids": [8.5, 1.0]})
    with pytest.raises(ValueError, match="'reference_ids' has None among its token ids"):
        tokens({**pair, "reference_ids": [8, None]})


@pytest.mark.parametrize("mode", ["keep_end", "keep_start", "drop"])
def test_all_responses_keep_one_prompt(mode):
    prompt, responses = [1, 2, 3], [[4], [5, 6], [7, 8, 9, 10]]
    found = truncate_responses(prompt, responses, 6, None, mode)
    expected = {
        "keep_end": ([2, 3], responses),
        "keep_start": (prompt, [[4], [5, 6], [7, 8, 9]]),
        "drop": (prompt, [[], [], []]),
    }
    assert found == expected[mode]
    assert truncate_responses(prompt, responses, 7, None, mode) == (prompt, responses)


def test_the_third_response_counts_for_truncation():
    found, report = tokenize_preferences(made(ROW), TOKENIZER, gold=True, max_length=6)
    assert words(found[0]["prompt_ids"]) == "film is"
    assert report.prompts_truncated == 1 and report.responses_truncated == 0
    # Sums of the pair's own responses are still of whole rows where only the third is cut.
    row = {**ROW, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}
    kept = tokens(row, max_length=6, truncation_mode="keep_start")
    assert words(kept[0]["reference_ids"]) == "very good plot"


def test_batches():
    rows = [*tokens(ROW, {**ROW, "prompt": "a plot", "reference": " fine"})]
    padded = PreferenceCollator(0, gold=True)(rows)
    assert padded["input_ids"].shape == (6, 7)
    labels = [row[row != -100].tolist() for row in padded["labels"]]
    columns = ("chosen_ids", "rejected_ids", "reference_ids")
    assert labels == [row[column] for column in columns for row in rows]
    packed = PreferenceCollator(0, padding_free=True, gold=True)(rows)
    lengths = (padded["attention_mask"].sum(1)).tolist()
    assert packed["cu_seqlens"].diff().tolist() == lengths
    shared = PreferenceCollator(0, padding_free=True, share_prompt=True, gold=True)(rows)
    starts = shared["cu_seqlens"].tolist()
    assert shared["prefixes"].tolist() == [[0, 0]] * 2 + [[0, 2], [starts[1], 1]] * 2
    # Each response but the chosen one has one token of its prompt.
    own = [1 + len(row[column]) for column in columns[1:] for row in rows]
    assert shared["cu_seqlens"].diff().tolist() == lengths[:2] + own
    for batch in (packed, shared):
        scored = batch["labels"][0]
        assert scored[scored != -100].tolist() == [*itertools.chain(*labels)]
    assert len(PreferenceCollator(0)(rows)["input_ids"]) == 4
