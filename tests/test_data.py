"""Datasets: formats, tokenisation against TRL's, truncation, counts, collation, loading."""

from __future__ import annotations

import json

import pytest
import tiny
import torch

datasets = pytest.importorskip("datasets")

from prefkern import data

TOKENIZER = tiny.tokenizer()
EOS = TOKENIZER.eos_token_id


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _ids(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


def _tokenize(rows: list[dict], **options):
    dataset = datasets.Dataset.from_list(rows)
    return data.tokenize_preferences(dataset, TOKENIZER, **options)


STANDARD = {"prompt": "the film is", "chosen": " very good", "rejected": " bad"}
CONVERSATION = {
    "prompt": [_user("film ?")],
    "chosen": [_assistant("very good")],
    "rejected": [_assistant("bad")],
}
FORMATS = {
    "standard": STANDARD,
    "standard, eos given": {**STANDARD, "chosen": " very good <eos>"},
    "standard, implicit prompt": {"chosen": "the film is good", "rejected": "the film is bad"},
    "conversational": CONVERSATION,
    "conversational, implicit prompt": {
        "chosen": CONVERSATION["prompt"] + CONVERSATION["chosen"],
        "rejected": CONVERSATION["prompt"] + CONVERSATION["rejected"],
    },
    "conversational, two turns": {
        **CONVERSATION,
        "prompt": [_user("film ?"), _assistant("fine"), _user("really ?")],
    },
}


@pytest.mark.parametrize("row", FORMATS.values(), ids=FORMATS.keys())
def test_tokens_are_trls(row):
    trainer = pytest.importorskip("trl.trainer.dpo_trainer")
    owner = type("Owner", (), {"_tokenizer": TOKENIZER})()
    config = type("Args", (), {"dataset_num_proc": None, "max_length": None})()
    config.truncation_mode = "keep_start"
    theirs = trainer.DPOTrainer._prepare_dataset(
        owner, datasets.Dataset.from_list([row]), TOKENIZER, config, "train"
    )
    ours, report = _tokenize([row])
    for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert ours[0][column] == theirs[0][column], column
    assert report.pairs == 1
    assert ours.column_names == ["prompt_ids", "chosen_ids", "rejected_ids"]


def test_what_the_formats_mean():
    standard, _ = _tokenize([STANDARD])
    assert standard[0]["prompt_ids"] == _ids("the film is")
    assert standard[0]["chosen_ids"] == [*_ids("very good"), EOS]
    assert standard[0]["rejected_ids"] == [*_ids("bad"), EOS]
    chat, _ = _tokenize([CONVERSATION])
    assert chat[0]["prompt_ids"] == _ids("<user> film ? <eos> <assistant>")
    assert chat[0]["chosen_ids"] == [*_ids("very good"), EOS]
    # Some hubs' conversational datasets carry the first question as text, too.
    both, _ = _tokenize([{**FORMATS["conversational, implicit prompt"], "prompt": "film ?"}])
    assert both[0] == chat[0]


def test_implicit_prompts():
    assert data.extract_prompt("a b c", "a b d") == ("a b", " c", " d")
    assert data.extract_prompt("a b", "a b c") == ("a b", "", " c")
    assert data.extract_prompt("b", "c") == ("", "b", "c")
    turns = [_user("a"), _assistant("b")]
    assert data.extract_prompt(turns, turns) == (turns[:1], turns[1:], turns[1:])


def test_prompt_that_merges_with_the_response_is_counted():
    rows = [STANDARD, {"prompt": "the fi", "chosen": "lm good", "rejected": "lm bad"}]
    tokenised, report = _tokenize(rows)
    assert report.merged == 1
    assert tokenised[1]["prompt_ids"] == _ids("the")
    assert tokenised[1]["chosen_ids"] == [*_ids("film good"), EOS]


@pytest.mark.parametrize(
    ("options", "expected", "cut"),
    [
        # prompt, chosen, rejected lengths left of 6, 3 and 2
        ({}, (6, 3, 2), (0, 0)),
        ({"max_length": 9}, (6, 3, 2), (0, 0)),
        ({"max_length": 7}, (4, 3, 2), (1, 0)),
        ({"max_length": 4}, (1, 3, 2), (1, 0)),
        ({"max_length": 3}, (1, 2, 2), (1, 1)),
        ({"max_prompt_length": 2}, (2, 3, 2), (1, 0)),
        ({"max_prompt_length": 2, "max_length": 4}, (1, 3, 2), (1, 0)),
    ],
)
def test_truncation_keeps_responses_and_counts(options, expected, cut):
    row = {"prompt": "the a was is film plot", "chosen": " very good", "rejected": " bad"}
    full, _ = _tokenize([row])
    tokenised, report = _tokenize([row], **options)
    prompt, chosen, rejected = (
        tokenised[0][column] for column in ("prompt_ids", "chosen_ids", "rejected_ids")
    )
    assert (len(prompt), len(chosen), len(rejected)) == expected
    assert prompt == full[0]["prompt_ids"][-len(prompt) :]
    assert chosen == full[0]["chosen_ids"][: len(chosen)]
    assert (report.prompts_truncated, report.responses_truncated) == cut


def test_dropped_and_identical_pairs_are_counted():
    rows = [
        STANDARD,
        {**STANDARD, "rejected": STANDARD["chosen"]},
        # Nothing precedes the only token of these, so nothing of them can be scored.
        {"prompt": "", "chosen": "", "rejected": "good"},
    ]
    tokenised, report = _tokenize(rows)
    assert len(tokenised) == report.pairs == 2
    assert (report.dropped, report.identical) == (1, 1)
    assert "2 pairs (1 dropped" in str(report)
    assert "1 with identical responses" in str(report)
    with pytest.raises(ValueError, match="no pair with two responses"):
        _tokenize(rows[2:])


def test_extra_columns():
    rows = [{**STANDARD, "ref_chosen_logps": -1.5, "ref_rejected_logps": -2.5, "id": 7}]
    tokenised, _ = _tokenize(rows)
    assert set(tokenised.column_names) == set(data.COLUMNS) - {"reward_margin"}
    assert (tokenised[0]["ref_chosen_logps"], tokenised[0]["ref_rejected_logps"]) == (-1.5, -2.5)
    for extra in (
        {"reward_margin": 0.5},
        {"margin": 0.5},
        {"score_chosen": 2.0, "score_rejected": 1.5},
    ):
        assert _tokenize([{**STANDARD, **extra}])[0][0]["reward_margin"] == 0.5
    with pytest.raises(ValueError, match="only one of ref_chosen_logps"):
        _tokenize([{**STANDARD, "ref_chosen_logps": 0.0}])


@pytest.mark.parametrize("value", [None, float("nan")])
@pytest.mark.parametrize(
    ("columns", "what"),
    [
        (["reward_margin"], "margin"),
        (["margin"], "margin"),
        (["score_chosen", "score_rejected"], "margin"),
        (["ref_chosen_logps", "ref_rejected_logps"], "reference sum"),
    ],
)
def test_missing_numbers_are_named(columns, what, value):
    for absent in columns:
        good = {**STANDARD, **dict.fromkeys(columns, 1.0)}
        with pytest.raises(ValueError, match=f"dataset 'train', row 1: no {what} .'{absent}' is"):
            _tokenize([good, {**good, absent: value}])


def test_tokenising_again_changes_nothing():
    tokenised, _ = _tokenize([STANDARD, CONVERSATION][:1])
    again, report = data.tokenize_preferences(tokenised, TOKENIZER)
    assert again[:] == tokenised[:]
    assert report.dropped == 0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**STANDARD, "rejected": None}, "row 1: 'rejected' must be text or a list"),
        ({**STANDARD, "chosen": 3}, "row 1: 'chosen' must be text"),
        ({"prompt": "a", "chosen": "b"}, "row 1: 'rejected' must be text"),
    ],
)
def test_bad_rows_are_named(row, message):
    # Arrow needs one type a column, so rows are fed one by one.
    good = {key: value for key, value in STANDARD.items()}

    class Rows:
        def map(self, function, **_):
            for i, example in enumerate((good, row)):
                function(example, i)

    rows = Rows()
    rows.column_names = list(STANDARD)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match=message):
        patch.setattr(data, "check_columns", lambda *_: None)
        data.tokenize_preferences(rows, TOKENIZER)


def test_text_prompts_of_conversations():
    chat, _ = _tokenize([CONVERSATION])
    answers = {key: CONVERSATION[key] for key in ("chosen", "rejected")}
    alone, _ = _tokenize([{**answers, "prompt": "film ?"}])
    assert alone[0] == chat[0]
    both = FORMATS["conversational, implicit prompt"]
    assert _tokenize([{**both, "prompt": ""}])[0][0] == chat[0]
    with pytest.raises(ValueError, match="row 0: 'prompt' is 'plot \\?', and no message"):
        _tokenize([{**both, "prompt": "plot ?"}])
    apart = {**both, "rejected": [_user("plot ?"), _assistant("bad")]}
    with pytest.raises(ValueError, match="row 0: .* begin with different questions"):
        _tokenize([{**apart, "prompt": "film ?"}])


def test_conversations_need_a_chat_template():
    with pytest.raises(ValueError, match="row 0: .*no chat template"):
        data.tokenize_preferences(
            datasets.Dataset.from_list([CONVERSATION]), tiny.tokenizer(chat=False)
        )


def test_collator():
    examples = [
        {"prompt_ids": [5], "chosen_ids": [6, 7], "rejected_ids": [8]},
        {"prompt_ids": [9, 10], "chosen_ids": [11], "rejected_ids": [12, 13]},
    ]
    extra = {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0, "reward_margin": 0.5}
    batch = data.PreferenceCollator(pad_token_id=0)([{**e, **extra} for e in examples])
    assert batch["input_ids"].tolist() == [
        [5, 6, 7, 0],
        [9, 10, 11, 0],
        [5, 8, 0, 0],
        [9, 10, 12, 13],
    ]
    assert batch["labels"].tolist() == [
        [-100, 6, 7, -100],
        [-100, -100, 11, -100],
        [-100, 8, -100, -100],
        [-100, -100, 12, 13],
    ]
    assert batch["attention_mask"].sum(1).tolist() == [3, 3, 2, 4]
    assert batch["ref_logps"].tolist() == [-1, -1, -2, -2]
    assert batch["reward_margins"].tolist() == [0.5, 0.5]
    assert all(batch[k].dtype == torch.int64 for k in ("input_ids", "labels", "attention_mask"))
    wide = data.PreferenceCollator(pad_token_id=0, pad_to_multiple_of=8)(examples)
    assert wide["input_ids"].shape == (4, 8)
    assert "ref_logps" not in wide


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "csv", "disk", "folder"])
def test_loading(tmp_path, kind):
    rows = tiny.pairs(5)
    dataset = datasets.Dataset.from_list(rows)
    path = tmp_path / f"pairs.{kind}"
    if kind == "jsonl":
        dataset.to_json(path)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "disk":
        datasets.DatasetDict({"train": dataset}).save_to_disk(path)
    elif kind == "folder":
        path.mkdir()
        dataset.to_parquet(path / "train.parquet")
    else:
        getattr(dataset, f"to_{kind}")(path)
    assert data.load_preference_dataset(str(path)).to_list() == rows


def test_loading_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        data.load_preference_dataset(str(tmp_path / "none.jsonl"))
    with pytest.raises(FileNotFoundError, match="no such file"):
        data.load_preference_dataset("none.parquet")

    def written(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    with pytest.raises(ValueError, match="no column 'rejected'; found prompt, chosen; expected"):
        data.load_preference_dataset(written("a.jsonl", '{"prompt": "a", "chosen": "b"}\n'))
    for name, text in (("b.jsonl", ""), ("c.json", "[]"), ("d.csv", "chosen,rejected\n")):
        with pytest.raises(ValueError, match="empty|cannot be loaded"):
            data.load_preference_dataset(written(name, text))
    with pytest.raises(ValueError, match="cannot be loaded"):
        data.load_preference_dataset(written("e.jsonl", "{not json\n"))
    with pytest.raises(ValueError, match=r"unknown file type '\.txt'"):
        data.load_preference_dataset(written("f.txt", "x"))
    with pytest.raises(TypeError, match="not streaming"):
        data.check_columns(datasets.Dataset.from_list([STANDARD]).to_iterable_dataset(), "x")
