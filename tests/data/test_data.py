"""Datasets: formats, tokenisation against TRL's, truncation, counts, collation, loading."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from support import tiny

datasets = pytest.importorskip("datasets")

import prefkern
from prefkern import data
from prefkern.data import formats, tokenisation
from prefkern.data.collate import ExampleCollator, PreferenceCollator

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
    "conversational, system": {
        **CONVERSATION,
        "prompt": [{"role": "system", "content": "was fine"}, _user("film ?")],
    },
    "conversational, tools": {**CONVERSATION, "tools": [{"name": "plot"}, {"name": "film"}]},
    "conversational, tools as JSON": {**CONVERSATION, "tools": '[{"name": "plot"}]'},
    "conversational, template options": {
        **CONVERSATION,
        "chat_template_kwargs": {"greeting": "was the"},
    },
}


def _trls(rows: list[dict], max_length: int | None = None):
    """The dataset as TRL's DPOTrainer tokenises it, in its default mode of truncation."""
    trainer = pytest.importorskip("trl.trainer.dpo_trainer")
    owner = type("Owner", (), {"_tokenizer": TOKENIZER})()
    config = type("Args", (), {"dataset_num_proc": None, "max_length": max_length})()
    config.truncation_mode = "keep_start"
    return trainer.DPOTrainer._prepare_dataset(
        owner, datasets.Dataset.from_list(rows), TOKENIZER, config, "train"
    )


@pytest.mark.parametrize("row", FORMATS.values(), ids=FORMATS.keys())
def test_tokens_are_trls(row):
    theirs = _trls([row])
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


@pytest.mark.parametrize(
    ("options", "expected", "cut"),
    [
        ({}, (6, 3, 2), (0, 0)),
        ({"max_length": 9}, (6, 3, 2), (0, 0)),
        ({"max_length": 8}, (6, 2, 2), (0, 1)),
        ({"max_length": 7}, (6, 1, 1), (0, 1)),
        ({"max_prompt_length": 2}, (2, 3, 2), (1, 0)),
        ({"max_prompt_length": 2, "max_length": 4}, (2, 2, 2), (1, 1)),
    ],
)
def test_keep_start_cuts_ends(options, expected, cut):
    row = {"prompt": "the a was is film plot", "chosen": " very good", "rejected": " bad"}
    full, _ = _tokenize([row])
    tokenised, report = _tokenize([row], truncation_mode="keep_start", **options)
    for column, length in zip(("prompt_ids", "chosen_ids", "rejected_ids"), expected, strict=True):
        assert tokenised[0][column] == full[0][column][:length], column
    assert (report.prompts_truncated, report.responses_truncated) == cut


def test_keep_start_is_trls_truncation():
    """Batch by batch: TRL cuts in its collator, and drops pairs whose prompt leaves no room."""
    trainer = pytest.importorskip("trl.trainer.dpo_trainer")
    rows = tiny.pairs(40)
    theirs = _trls(rows, max_length=6)
    ours, report = _tokenize(rows, max_length=6, truncation_mode="keep_start")
    assert report.responses_truncated > 5
    collate = trainer.DataCollatorForPreference(pad_token_id=0, max_length=6)
    their_batch = collate(theirs.to_list())
    our_batch = PreferenceCollator(pad_token_id=0)(ours.to_list())
    assert our_batch["input_ids"].tolist() == their_batch["input_ids"].tolist()
    scored = (our_batch["labels"] != -100).int()
    assert scored.tolist() == their_batch["completion_mask"].tolist()
    theirs = _trls(rows, max_length=4)
    ours, report = _tokenize(rows, max_length=4, truncation_mode="keep_start")
    assert report.too_long == len(rows) - len(theirs) > 5
    assert ours["prompt_ids"][:] == theirs["prompt_ids"][:]


def test_drop_cuts_nothing_and_counts():
    rows = tiny.pairs(40)
    full, _ = _tokenize(rows)
    lengths = [
        len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
        for row in full
    ]
    tokenised, report = _tokenize(rows, max_length=10, truncation_mode="drop")
    expected = [row for row, length in zip(full, lengths, strict=True) if length <= 10]
    assert 0 < len(expected) < 40 and tokenised.to_list() == expected
    assert (report.too_long, report.empty, report.dropped) == (40 - len(expected), 0) + (
        40 - len(expected),
    )
    assert (report.prompts_truncated, report.responses_truncated) == (0, 0)
    by_prompt, _ = _tokenize(rows, max_prompt_length=3, truncation_mode="drop")
    assert by_prompt.to_list() == [row for row in full if len(row["prompt_ids"]) <= 3]
    with pytest.raises(ValueError, match="no pair with two responses .* within max_length"):
        _tokenize(rows, max_length=2, truncation_mode="drop")
    with pytest.raises(ValueError, match="truncation_mode must be one of 'keep_end', .*'middle'"):
        _tokenize(rows, truncation_mode="middle")
    # Of single responses each is dropped for its own length.
    singles = [{**SINGLE, "completion": " very very very good"}, SINGLE]
    examples, report = _examples(singles, max_length=6, truncation_mode="drop")
    assert (len(examples), report.pairs, report.too_long) == (1, 1, 1)


def test_pairs_that_truncation_makes_identical_are_counted():
    row = {"prompt": "the", "chosen": " very very good", "rejected": " very very bad"}
    rows = [row, {**row, "rejected": row["chosen"]}, STANDARD]
    _, report = _tokenize(rows, max_length=3)
    assert (report.identical, report.made_identical) == (2, 1)
    assert "2 with identical responses, 1 by truncation" in str(report)


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


BLOCKS = "{% if m['content'] is string %}{{ m['content'] }}{% elif m['content'] %}{% for b in "
BLOCKS += "m['content'] %}{{ b['text'] }}{% endfor %}{% endif %}"
BLOCKS += "{% for c in m['tool_calls'] or [] %}{{ c['function']['name'] }} {% endfor %}"
CALLS = {"role": "assistant", "tool_calls": [{"function": {"name": "plot"}}]}


def _taking_blocks():
    """A tokenizer with a template that takes lists of blocks and tool calls as content."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = tiny.CHAT_TEMPLATE.replace("{{ m['content'] }}", BLOCKS)
    return tokenizer


@pytest.mark.parametrize(
    "row",
    [
        {**STANDARD, "chosen": ""},
        {**STANDARD, "rejected": " <eos>"},
        # Of such a prompt the end is cut off and scored, whatever the response is.
        {"prompt": "the fi", "chosen": "", "rejected": "lm good"},
        {**CONVERSATION, "chosen": [_assistant("")]},
        {**CONVERSATION, "rejected": [_assistant(" \n"), _assistant("")]},
        {"prompt_ids": [5], "chosen_ids": [6, EOS], "rejected_ids": [EOS]},
    ],
)
def test_responses_that_say_nothing_are_dropped_as_empty(row):
    is_text = "prompt_ids" not in row
    good = {key: [7, 8] for key in row}
    if is_text:
        good = CONVERSATION if isinstance(row["chosen"], list) else STANDARD
    tokenised, report = _tokenize([good, row])
    assert (len(tokenised), report.pairs, report.empty, report.too_long) == (1, 1, 1, 0)
    assert "1 dropped for an empty response" in report.summary
    with pytest.raises(ValueError, match="has no pair with two responses that can be scored"):
        _tokenize([row])
    if is_text:
        singles = [
            {"prompt": each["prompt"], "completion": each[side], "label": True}
            for each in (good, row)
            for side in ("chosen", "rejected")
        ]
        assert _examples(singles)[1].empty == 1


def test_calls_of_tools_and_blocks_say_something():
    block = [{"type": "text", "text": "bad"}]
    row = {**CONVERSATION, "chosen": [{**CALLS, "content": None}]}
    for content, empty in ((block, 0), ([{"type": "text", "text": ""}], 1)):
        rows = [row, {**row, "rejected": [{"role": "assistant", "content": content}]}]
        both = [datasets.Dataset.from_list([each]) for each in rows]
        tokenised, report = data.tokenize_preferences(both[0], _taking_blocks())
        assert tokenised[0]["chosen_ids"] == [*_ids("plot"), EOS] and report.empty == 0
        if empty:
            with pytest.raises(ValueError, match="no pair with two responses"):
                data.tokenize_preferences(both[1], _taking_blocks())
        else:
            again, _ = data.tokenize_preferences(both[1], _taking_blocks())
            assert again[0] == tokenised[0]


def test_prompts_that_whole_conversations_repeat_are_left_out():
    plain, _ = _tokenize([CONVERSATION])
    two = [_user("film ?"), _assistant("fine"), _user("really ?")]
    for prompt in (CONVERSATION["prompt"], two):
        row = {**CONVERSATION, "prompt": prompt}
        whole = {**row, **{side: prompt + row[side] for side in ("chosen", "rejected")}}
        # Arrow gives the messages of a response keys that those of the prompt have not.
        extra = {**whole, "chosen": [*whole["chosen"][:-1], {**whole["chosen"][-1], "name": "a"}]}
        expected = _tokenize([row])[0][0]
        for each in (whole, extra):
            assert _tokenize([each])[0][0] == expected
        single = {"prompt": prompt, "completion": whole["chosen"], "label": True}
        assert _examples([single])[0][0]["completion_ids"] == expected["chosen_ids"]
        for other in ("chosen", "rejected"):
            with pytest.raises(ValueError, match=f"row 0: .*, but '{other}' does not; expected"):
                _tokenize([{**whole, other: row[other]}])
    assert _tokenize([{**CONVERSATION}])[0][0] == plain[0]


def test_prompts_that_texts_repeat_are_counted():
    whole = {"prompt": "the film", "chosen": "the film good", "rejected": "the film bad"}
    rows = [STANDARD, whole, {**whole, "rejected": "bad"}, {**whole, "prompt": "the fil"}]
    rows += [{**whole, "prompt": ""}, {**whole, "prompt": " "}]
    tokenised, report = _tokenize(rows)
    assert (report.pairs, report.repeated) == (6, 1)
    assert report.summary.endswith(", 1 whose responses repeat the prompt)")
    # As TRL does, it is scored: that it is meant cannot be excluded.
    assert tokenised[1]["chosen_ids"] == [*_ids("filmthe film good"), EOS]
    assert "repeat" not in _tokenize([STANDARD])[1].summary


def test_text_that_brings_the_first_token_gets_no_second():
    processors = pytest.importorskip("tokenizers.processors")
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    bos = tokenizer.bos_token_id
    rows = [STANDARD, {**STANDARD, "prompt": "<bos> the film is"}]
    dataset = datasets.Dataset.from_list([*rows, {**rows[0], "prompt": "<bos> <bos> the film is"}])
    # A tokenizer that adds none: what the text has is what it means.
    own, report = data.tokenize_preferences(dataset, tokenizer)
    assert [row["prompt_ids"].count(bos) for row in own] == [0, 1, 2] and report.begun == 0
    processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    tokenizer._tokenizer.post_processor = processor
    tokenised, report = data.tokenize_preferences(dataset, tokenizer)
    assert tokenised[0] == tokenised[1]
    assert [row["prompt_ids"].count(bos) for row in tokenised] == [1, 1, 2]
    assert all(row["chosen_ids"] == [*_ids("very good"), EOS] for row in tokenised)
    assert report.begun == 2 and "2 whose text has the tokenizer's first token" in report.summary
    # Without a prompt the text that has it is the response's.
    rows = [{**STANDARD, "prompt": "", "chosen": "<bos> very good"}]
    empty, _ = data.tokenize_preferences(datasets.Dataset.from_list(rows), tokenizer)
    assert empty[0]["prompt_ids"] == [bos] and empty[0]["chosen_ids"] == [*_ids("very good"), EOS]


@pytest.mark.parametrize("kind", ["torch", "numpy", "pandas", "arrow"])
def test_the_format_of_a_dataset_does_not_matter(kind, tmp_path):
    rows = [{**row, "score_chosen": 1.0, "score_rejected": 0.5} for row in tiny.pairs(3)]
    dataset = datasets.Dataset.from_list(rows)
    expected = data.tokenize_preferences(dataset, TOKENIZER)[0].to_list()
    found, _ = data.tokenize_preferences(dataset.with_format(kind), TOKENIZER)
    assert found.to_list() == expected and found[0] == expected[0]
    singles = datasets.Dataset.from_list([SINGLE, {**SINGLE, "label": False}])
    examples, _ = data.tokenize_examples(singles.with_format(kind), TOKENIZER)
    assert examples.to_list() == data.tokenize_examples(singles, TOKENIZER)[0].to_list()
    dataset.with_format(kind).save_to_disk(tmp_path)
    assert data.load_preference_dataset(str(tmp_path)).to_list() == rows
    # A transform says what the rows are.
    dataset.set_transform(lambda batch: batch)
    assert tokenisation.plain(dataset) is dataset


def test_tokens_of_another_version_are_not_taken_from_the_cache(tmp_path, monkeypatch):
    datasets.Dataset.from_list([STANDARD]).to_json(tmp_path / "pairs.jsonl")
    loaded = data.load_preference_dataset(str(tmp_path / "pairs.jsonl"))
    singles = loaded.map(lambda row: {"completion": row["chosen"], "label": True})
    singles = singles.remove_columns(["chosen", "rejected"])

    def found():
        tokens, _ = data.tokenize_preferences(loaded, TOKENIZER)
        examples, _ = data.tokenize_examples(singles, TOKENIZER)
        return tokens[0]["chosen_ids"], examples[0]["completion_ids"]

    first = found()
    # Code that the mapped function calls, and does not hold.
    other = ([[5], [5, 6], [5, 7]], False)
    monkeypatch.setattr(formats, "_text_ids", lambda *_: other)
    assert found() == first, "nothing is cached, so that this test shows nothing"
    versions = tokenisation._versions()
    for changed in (("0.0", *versions[1:]), (*versions[:1], "of other code", *versions[2:])):
        monkeypatch.setattr(tokenisation, "_versions", lambda changed=changed: changed)
        assert found() == ([6, EOS], [6, EOS])


def test_versions_are_of_the_code_that_makes_tokens(tmp_path, monkeypatch):
    shutil.copytree(Path(tokenisation.__file__).parent, tmp_path / "data")
    ours = tokenisation._versions()
    assert ours[0] == prefkern.__version__ and transformers.__version__ in ours
    monkeypatch.setattr(tokenisation, "__file__", str(tmp_path / "data/tokenisation.py"))
    read = tokenisation._versions.__wrapped__
    assert read() == ours
    for name in ("formats.py", "truncation.py"):
        before = read()
        with (tmp_path / "data" / name).open("a") as file:
            file.write("# changed\n")
        assert read() != before


def test_extra_columns():
    rows = [{**STANDARD, "ref_chosen_logps": -1.5, "ref_rejected_logps": -2.5, "id": 7}]
    tokenised, _ = _tokenize(rows)
    sums = {"ref_chosen_logps", "ref_rejected_logps"}
    assert set(tokenised.column_names) == {"prompt_ids", "chosen_ids", "rejected_ids"} | sums
    assert set(tokenised.column_names) < set(data.COLUMNS)
    assert (tokenised[0]["ref_chosen_logps"], tokenised[0]["ref_rejected_logps"]) == (-1.5, -2.5)
    for extra in (
        {"reward_margin": 0.5},
        {"margin": 0.5},
        {"score_chosen": 2.0, "score_rejected": 1.5},
    ):
        assert _tokenize([{**STANDARD, **extra}])[0][0]["reward_margin"] == 0.5
    with pytest.raises(ValueError, match="only one of ref_chosen_logps"):
        _tokenize([{**STANDARD, "ref_chosen_logps": 0.0}])


@pytest.mark.parametrize("options", [{"max_length": 4}, {"max_prompt_length": 1}])
def test_reference_sums_are_of_the_tokens_that_they_came_with(options):
    row = {**STANDARD, "ref_chosen_logps": -1.5, "ref_rejected_logps": -2.5}
    tokens, _ = _tokenize([row])
    for rows in ([row], tokens.to_list()):
        with pytest.raises(ValueError, match="row 0: truncation would cut it, but its reference"):
            _tokenize(rows, **options)
        with pytest.raises(ValueError, match="no pair with two responses that can be scored"):
            _tokenize(rows, truncation_mode="drop", **options)
        assert _tokenize(rows, max_length=100)[1].pairs == 1


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
        good = {**STANDARD, **dict.fromkeys(columns, -1.0)}
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
        (
            {**STANDARD, "prompt": None},
            "row 1: 'prompt' must be text or a list .*, got None; leave",
        ),
        ({**STANDARD, "prompt": 3}, "row 1: 'prompt' must be text or a list of messages, got 3"),
        ({**STANDARD, "prompt": []}, "row 1: 'prompt' is a conversation, and 'chosen' and 'rej"),
    ],
)
def test_bad_rows_are_named(row, message):
    # Arrow needs one type a column, so rows are fed one by one.
    good = {key: value for key, value in STANDARD.items()}

    class Rows:
        def __len__(self):
            return 2

        def map(self, function, **_):
            for i, example in enumerate((good, row)):
                function(example, i)

    rows = Rows()
    rows.column_names, rows.features, rows.format = list(STANDARD), {}, {"type": "custom"}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match=message):
        patch.setattr(tokenisation, "check_columns", lambda *_, **__: None)
        data.tokenize_preferences(rows, TOKENIZER)


def test_text_prompts_of_conversations():
    chat, _ = _tokenize([CONVERSATION])
    answers = {key: CONVERSATION[key] for key in ("chosen", "rejected")}
    alone, _ = _tokenize([{**answers, "prompt": "film ?"}])
    assert alone[0] == chat[0]
    both = FORMATS["conversational, implicit prompt"]
    assert _tokenize([{**both, "prompt": ""}])[0][0] == chat[0]
    with pytest.raises(ValueError, match="row 0: 'prompt' is 'plot \\?', but no user"):
        _tokenize([{**both, "prompt": "plot ?"}])
    apart = {**both, "rejected": [_user("plot ?"), _assistant("bad")]}
    with pytest.raises(ValueError, match="row 0: .* begin with different questions"):
        _tokenize([{**apart, "prompt": "film ?"}])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tools": "[{"}, "'tools' is text but not JSON"),
        ({"tools": '{"name": "plot"}'}, "'tools' must be a list of schemas"),
        ({"chat_template_kwargs": "greeting"}, "'chat_template_kwargs' must be a mapping"),
        (
            {"prompt": [{"role": "robot", "content": "a"}]},
            "does not take these messages: no robots",
        ),
        (
            {"prompt": [{"from": "user", "text": "a"}]},
            "a message has no 'role', only 'from', 'tex",
        ),
        (
            {"prompt": [{"role": "user", "value": "film ?"}]},
            r"of role 'user' in 'prompt' has neither .*: {'role': 'user', 'value': 'film \?'}; ",
        ),
        ({"chosen": [_assistant(None)]}, "role 'assistant' in 'chosen' has neither 'content' nor"),
        ({"rejected": [_assistant(3)]}, "'content' of .* in 'rejected' must be text or .*, got 3"),
        ({"prompt": [{"role": 1, "content": "a"}]}, "'role' of a message in 'prompt' must be text"),
        ({"prompt": ["film ?"]}, "'prompt' must be text or a list of messages .* is 'film \\?'"),
        ({"prompt": [_user("a"), None]}, "'prompt' must be .*, but one of its messages is None"),
        ({"chosen": [_assistant("a"), None]}, "'chosen' must be .* one of its messages is None"),
        (
            {"prompt": [_user([{"type": "image", "url": "a.png"}])]},
            "'user' has content of type 'image', but only text is read here; the pictures .* 'images'",
        ),
        (
            {"prompt": [_user([{"type": "text", "text": "film ?"}])]},
            "the chat template expects text as content and would print the list of blocks",
        ),
    ],
)
def test_conversations_that_cannot_be_rendered(change, message):
    with pytest.raises(ValueError, match=f"dataset 'train', row 0: .*{message}"):
        _tokenize([{**CONVERSATION, **change}])


def test_templates_that_take_blocks_are_given_them():
    tokenizer = _taking_blocks()
    row = {**CONVERSATION, "prompt": [_user([{"type": "text", "text": "film ?"}])]}
    blocks, _ = data.tokenize_preferences(datasets.Dataset.from_list([row]), tokenizer)
    assert blocks[0] == _tokenize([CONVERSATION])[0][0]


def test_keys_that_arrow_fills_in_are_not_rendered():
    """A column of mappings has every row's keys in every row, None where a row has none."""
    tools = [[{"name": "plot"}], [{"name": "film", "parameters": {"a": 1}}]]
    rows = [{**CONVERSATION, "tools": each} for each in tools]
    together, _ = _tokenize(rows)
    assert together[0] == _tokenize(rows[:1])[0][0]
    kwargs = [{"greeting": "was the"}, {"other": "x"}, {"greeting": None}]
    rows = [{**CONVERSATION, "chat_template_kwargs": each} for each in kwargs]
    together, _ = _tokenize(rows)
    plain = _tokenize([CONVERSATION])[0][0]
    assert together[0] != plain and together[1] == together[2] == plain
    assert _tokenize([{**CONVERSATION, "tools": []}])[0][0] == plain


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
    batch = PreferenceCollator(pad_token_id=0)([{**e, **extra} for e in examples])
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
    wide = PreferenceCollator(pad_token_id=0, pad_to_multiple_of=8)(examples)
    assert wide["input_ids"].shape == (4, 8)
    assert "ref_logps" not in wide


def _examples(rows: list[dict], **options):
    dataset = datasets.Dataset.from_list(rows)
    return data.tokenize_examples(dataset, TOKENIZER, **options)


SINGLE = {"prompt": "the film is", "completion": " very good", "label": True}
SINGLE_CHAT = {
    "prompt": CONVERSATION["prompt"],
    "completion": CONVERSATION["chosen"],
    "label": False,
}
TURNS = {**SINGLE_CHAT, "completion": [_assistant("fine"), _user("really ?"), _assistant("a")]}
CHAT_PROMPT = "<user> film ? <eos> <assistant>"


@pytest.mark.parametrize("name", FORMATS)
def test_both_responses_of_a_pair_are_examples(name):
    row = FORMATS[name]
    pairs, _ = _tokenize([row])
    examples, report = _examples([row])
    prompt, chosen, rejected = (
        pairs[0][column] for column in ("prompt_ids", "chosen_ids", "rejected_ids")
    )
    assert examples.to_list() == [
        {"prompt_ids": prompt, "completion_ids": chosen, "desirable": True},
        {"prompt_ids": prompt, "completion_ids": rejected, "desirable": False},
    ]
    assert (report.pairs, report.unit, report.dropped) == (2, "responses", 0)


@pytest.mark.parametrize(
    ("rows", "prompt", "completion", "desirable"),
    [
        ([SINGLE], "the film is", "very good", True),
        ([{**SINGLE, "label": 0}], "the film is", "very good", False),
        ([{**SINGLE, "completion": " very good <eos>"}], "the film is", "very good", True),
        ([SINGLE_CHAT], CHAT_PROMPT, "very good", False),
        ([{**SINGLE_CHAT, "prompt": "film ?"}], CHAT_PROMPT, "very good", False),
        ([TURNS], CHAT_PROMPT, "fine <eos> <user> really ? <eos> <assistant> a", False),
    ],
)
def test_single_responses(rows, prompt, completion, desirable):
    # A column that pairs would need is of no concern here.
    examples, report = _examples([{**row, "margin": None, "id": 1} for row in rows])
    assert examples.to_list() == [
        {
            "prompt_ids": _ids(prompt),
            "completion_ids": [*_ids(completion), EOS],
            "desirable": desirable,
        }
    ]
    assert str(report).startswith("train: 1 responses (0 dropped for an empty response")
    assert "identical" not in str(report)


def test_single_responses_are_trls():
    unpair = pytest.importorskip("trl.data_utils").unpair_preference_dataset
    rows = tiny.pairs(4)
    theirs = unpair(datasets.Dataset.from_list(rows)).to_list()
    ours = _examples(rows)[0].to_list()

    def order(examples):
        return sorted(examples, key=lambda row: (row["prompt_ids"], row["completion_ids"]))

    assert order(_examples(theirs)[0].to_list()) == order(ours)


def test_truncation_of_single_responses_is_counted():
    rows = [
        {**SINGLE, "prompt": "the a was is film plot"},
        {**SINGLE, "completion": " very very very very good"},
    ]
    examples, report = _examples(rows, max_length=5)
    assert [len(row["prompt_ids"]) for row in examples] == [2, 1]
    assert [len(row["completion_ids"]) for row in examples] == [3, 4]
    assert (report.prompts_truncated, report.responses_truncated) == (2, 1)
    # What is tokenised already is truncated, too.
    again, report = data.tokenize_examples(examples, TOKENIZER, max_length=4)
    assert [len(row["prompt_ids"]) for row in again] == [1, 1]
    assert [len(row["completion_ids"]) for row in again] == [3, 3]
    assert (report.prompts_truncated, report.responses_truncated) == (1, 1)
    assert data.tokenize_examples(examples, TOKENIZER)[0].to_list() == examples.to_list()
    # Of a pair, each response counts by itself.
    pair = {"prompt": "the a was", "chosen": " very very very good", "rejected": " bad"}
    _, report = _examples([pair], max_length=4)
    assert (report.prompts_truncated, report.responses_truncated) == (2, 1)


def test_single_responses_without_a_scored_token_are_dropped_and_counted():
    empty = {"prompt": "", "completion": "", "label": False}
    examples, report = _examples([SINGLE, empty, SINGLE])
    assert len(examples) == report.pairs == 2
    assert report.dropped == 1
    _, report = _examples([STANDARD, {"prompt": "", "chosen": "", "rejected": "good"}])
    assert (report.pairs, report.dropped) == (2, 2)
    with pytest.raises(ValueError, match="'train' has no response that can be scored"):
        _examples([empty])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": None}, "row 1: 'label' must be true or false, got None"),
        ({"label": 2}, "row 1: 'label' must be true or false, got 2"),
        ({"label": -1}, "row 1: 'label' must be true or false, got -1"),
        ({"prompt": None}, "row 1: 'prompt' must not be null"),
        ({"completion": None}, "row 1: 'completion' must be text or a list of messages, got None"),
    ],
)
def test_bad_single_responses_are_named(change, message):
    good = {**SINGLE, "label": 1}
    with pytest.raises(ValueError, match=f"dataset 'train', {message}"):
        _examples([good, {**good, **change}])
    with pytest.raises(
        ValueError, match="row 0: a message of role 'assistant' in 'completion' has"
    ):
        _examples([{**SINGLE_CHAT, "completion": [_assistant(None)]}])
    with pytest.raises(ValueError, match="row 0: 'label' must be true or false, got 'yes'"):
        _examples([{**SINGLE, "label": "yes"}])


def _example(prompt: list[int], completion: list[int], desirable: bool = True) -> dict:
    return {"prompt_ids": prompt, "completion_ids": completion, "desirable": desirable}


def test_example_collator():
    # Both responses of a pair lie next to one another: neither is the other's mismatched one.
    examples = [
        _example([5], [6, 7]),
        _example([5], [8], False),
        _example([9, 10], [11]),
    ]
    batch = ExampleCollator(pad_token_id=0)(examples)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [5, 8, 0], [9, 10, 11]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, 8, -100], [-100, -100, 11]]
    assert batch["attention_mask"].sum(1).tolist() == [3, 2, 3]
    assert batch["desirable"].tolist() == [True, False, True]
    # The next response of another prompt, around the end of the batch.
    assert batch["mismatched_input_ids"].tolist() == [[5, 11, 0, 0], [5, 11, 0, 0], [9, 10, 6, 7]]
    assert batch["mismatched_labels"].tolist() == [
        [-100, 11, -100, -100],
        [-100, 11, -100, -100],
        [-100, -100, 6, 7],
    ]
    assert batch["mismatched_attention_mask"].sum(1).tolist() == [2, 2, 4]
    # A long prompt meets a long response: the bound on the sum holds here, too.
    short = ExampleCollator(pad_token_id=0, max_length=3)(examples)
    assert short["mismatched_input_ids"].tolist() == [[5, 11, 0], [5, 11, 0], [10, 6, 7]]
    assert short["input_ids"].tolist() == batch["input_ids"].tolist()
    wide = ExampleCollator(pad_token_id=0, pad_to_multiple_of=8)(examples)
    assert wide["input_ids"].shape == wide["mismatched_labels"].shape == (3, 8)


@pytest.mark.parametrize(
    "examples", [[_example([5], [6])], [_example([5], [6]), _example([5], [7, 8])]]
)
def test_one_prompt_has_no_mismatched_response(examples):
    batch = ExampleCollator(pad_token_id=0)(examples)
    assert len(batch["input_ids"]) == len(examples)
    for name in ("input_ids", "attention_mask", "labels"):
        assert batch[f"mismatched_{name}"].shape[0] == 0
        assert batch[f"mismatched_{name}"].dtype == torch.int64


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_loading_single_responses(tmp_path, kind):
    rows = [SINGLE, {**SINGLE, "label": False}]
    path = tmp_path / f"responses.{kind}"
    dataset = datasets.Dataset.from_list(rows)
    dataset.to_json(path) if kind == "jsonl" else getattr(dataset, f"to_{kind}")(path)
    loaded = data.load_preference_dataset(str(path))
    assert loaded.to_list() == rows
    examples, _ = data.tokenize_examples(loaded, TOKENIZER)
    assert examples["desirable"][:] == [True, False]
    with pytest.raises(ValueError, match="no column 'chosen' .*; single responses are for .*'kto'"):
        data.check_columns(loaded, "x")
    with pytest.raises(ValueError, match="found prompt, completion; .* or 'prompt', 'completion'"):
        data.check_columns(loaded.remove_columns("label"), "x", paired=False)


def test_margins_are_asked_for_where_they_are_needed():
    rows = datasets.Dataset.from_list([STANDARD])
    data.check_columns(rows, "x")
    with pytest.raises(ValueError, match="'x' has no margins, .*score_chosen.*found prompt, chos"):
        data.check_columns(rows, "x", margins=True)
    for columns in (["reward_margin"], ["margin"], ["score_chosen", "score_rejected"]):
        extra = {**STANDARD, **dict.fromkeys(columns, 1.0)}
        data.check_columns(datasets.Dataset.from_list([extra]), "x", margins=True)
    half = datasets.Dataset.from_list([{**STANDARD, "score_chosen": 1.0}])
    with pytest.raises(ValueError, match="'x' has no margins"):
        data.check_columns(half, "x", margins=True)


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


def test_text_of_csv_stays_text(tmp_path):
    path = tmp_path / "pairs.csv"
    lines = ["prompt,chosen,rejected,margin,id", "NA,good film,good plot,1.5,3", "null,007,7,,4"]
    path.write_text("\n".join([*lines, '"",good,None,2,NA', "the film,very good,bad,-1,5"]) + "\n")
    rows = data.load_preference_dataset(str(path)).to_list()
    assert [[row[key] for key in ("prompt", "chosen", "rejected")] for row in rows] == [
        ["NA", "good film", "good plot"],
        ["null", "007", "7"],
        ["", "good", "None"],
        ["the film", "very good", "bad"],
    ]
    # Numbers are read as before, and where there is none, none is.
    assert [row["margin"] for row in rows] == [1.5, None, 2.0, -1.0]
    assert [row["id"] for row in rows] == [3, 4, None, 5]
    tokenised, _ = _tokenize([{**rows[0], "margin": 0.0}])
    assert tokenised[0]["prompt_ids"] == _ids("NA")
    path.write_text("prompt,completion,label\nNA,7,true\na,,false\n")
    assert data.load_preference_dataset(str(path)).to_list() == [
        {"prompt": "NA", "completion": "7", "label": True},
        {"prompt": "a", "completion": "", "label": False},
    ]


def test_missing_prompts_are_named(tmp_path):
    """In JSONL, and in a folder of CSV as pandas reads it."""
    rows = [STANDARD, {**STANDARD, "prompt": None}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv/train.csv").write_text("prompt,chosen,rejected\na,b,c\nNA,good film,good a\n")
    for source in ("a.jsonl", "csv"):
        loaded = data.load_preference_dataset(str(tmp_path / source))
        with pytest.raises(ValueError, match="row 1: 'prompt' must be text .*, got None; .* 'NA'"):
            data.tokenize_preferences(loaded, TOKENIZER)
    with pytest.raises(ValueError, match="row 0: 'chosen_ids' has None among its token ids"):
        _tokenize([{"prompt_ids": [5], "chosen_ids": [6, None], "rejected_ids": [7]}])


def test_slices_of_splits(tmp_path):
    rows = tiny.pairs(10)
    dataset = datasets.Dataset.from_list(rows)
    file, folder, saved = tmp_path / "pairs.jsonl", tmp_path / "folder", tmp_path / "saved"
    dataset.to_json(file)
    folder.mkdir()
    dataset.to_parquet(folder / "train.parquet")
    datasets.DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(saved)
    dataset.save_to_disk(tmp_path / "one")
    for source in (file, folder, saved, tmp_path / "one"):
        for split, expected in (
            ("train[:4]", rows[:4]),
            ("train[-3:]", rows[-3:]),
            ("train[50%:]", rows[5:]),
            ("train[:1]+train[9:]", [rows[0], rows[9]]),
        ):
            assert data.load_preference_dataset(str(source), split).to_list() == expected, source
    assert data.load_preference_dataset(str(saved), "train+test").to_list() == [*rows, rows[0]]
    # A file is whatever split it is asked for as.
    assert data.load_preference_dataset(str(file), "test[2:]").to_list() == rows[2:]
    for split, message in (
        ("dev", "no split 'dev'; found train, test"),
        ("[:3]", "split must be a name"),
    ):
        with pytest.raises(ValueError, match=f"cannot be loaded: {message}"):
            data.load_preference_dataset(str(saved), split)


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
    with pytest.raises(TypeError, match="only PreferenceTrainer takes streams"):
        data.check_columns(datasets.Dataset.from_list([STANDARD]).to_iterable_dataset(), "x")
