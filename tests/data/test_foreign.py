"""The formats of others: each row against the row of TRL's that it stands for, and its tokens.

TRL is the oracle: its trainer makes of the row after conversion the tokens that are made here of
the row before, and its own conversions of ShareGPT's messages and of pairs give the same.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from support import foreign_cases, tiny
from support.foreign_cases import ASKED, BAD, CASES, GOOD, HUMAN, SYSTEM, TEXTS

datasets = pytest.importorskip("datasets")

from prefkern import data
from prefkern.data import foreign, formats, tokenisation

TOKENIZER = tiny.tokenizer()
APART = {"chosen": " very good", "rejected": " bad"}
IDS = [case.home for case in CASES]
PAGE = Path(__file__).parent.parent.parent / "docs/data.md"


def _dataset(*rows: dict):
    return datasets.Dataset.from_list([*rows])


def _tokenize(dataset, paired: bool, **options):
    make = data.tokenize_preferences if paired else data.tokenize_examples
    return make(dataset, TOKENIZER, **options)


def _read(dataset, paired: bool) -> list[dict]:
    """The rows in TRL's columns, as they go to the chat template."""
    converted, _ = tokenisation._converted(dataset, None, "x", paired=paired)
    rows = []
    for row in converted:
        answer = {"chosen": row.get("completion"), "rejected": row.get("completion")}
        pair = row if paired else {**row, **answer}
        prompt, chosen, rejected = formats.read_row(pair, ("chosen", "rejected"), ())
        sides = {"chosen": chosen, "rejected": rejected}
        made = sides if paired else {"completion": chosen, "label": row["label"]}
        rows.append({"prompt": prompt, **made})
    return rows


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_row_is_read_as_one_of_trls(case):
    # A second row, so that a format is that of a dataset.
    dataset = _dataset(case.before, case.before)
    assert _read(dataset, case.paired) == [case.after, case.after]
    tokens, report = _tokenize(dataset, case.paired)
    expected, plain = _tokenize(_dataset(case.after, case.after), case.paired)
    columns = [c for c in expected.column_names if c != "reward_margin"]
    assert [{c: row[c] for c in columns} for row in tokens] == expected.to_list()
    assert report.read_as.startswith(f"{case.name} (") and report.converted == 2
    assert (plain.read_as, plain.converted) == ("", 0)
    assert report.dropped == 0 and report.unread == ()


@pytest.mark.parametrize("case", [c for c in CASES if c.paired], ids=lambda case: case.home)
def test_tokens_are_those_that_trl_makes_of_the_converted_row(case):
    trainer = pytest.importorskip("trl.trainer.dpo_trainer")
    owner = type("Owner", (), {"_tokenizer": TOKENIZER})()
    config = type("Args", (), {"dataset_num_proc": None, "max_length": None})()
    config.truncation_mode = "keep_start"
    theirs = trainer.DPOTrainer._prepare_dataset(
        owner, _dataset(case.after), TOKENIZER, config, "train"
    )
    ours, _ = _tokenize(_dataset(case.before), True)
    for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert ours[0][column] == theirs[0][column], column


def test_sharegpts_messages_are_converted_as_trl_converts_them():
    convert = pytest.importorskip("trl.data_utils").maybe_convert_to_chatml
    # TRL keeps the names of speakers, so they are its roles here.
    speakers = {"human": "user", "gpt": "assistant"}
    for case in CASES:
        if case.name == "ShareGPT" and case.paired:
            text = json.dumps(case.before)
            for speaker, role in speakers.items():
                text = text.replace(f'"{speaker}"', f'"{role}"')
            row = json.loads(text)
            chosen = row["chosen"] if isinstance(row["chosen"], list) else [row["chosen"]]
            theirs = convert({"messages": row.get("conversations", []), "chosen": chosen})
            (ours,) = _read(_dataset(case.before), True)
            assert theirs["messages"] + theirs["chosen"] == ours["prompt"] + ours["chosen"]


def test_pairs_of_others_are_the_single_responses_that_trl_makes_of_them():
    unpair = pytest.importorskip("trl.data_utils").unpair_preference_dataset
    for case in CASES:
        if case.paired:
            ours, report = _tokenize(_dataset(case.before), False)
            theirs, _ = _tokenize(unpair(_dataset(case.after)), False)
            assert ours.to_list() == theirs.to_list()
            assert report.pairs == 2 and report.read_as.startswith(case.name)


def test_no_row_is_left_out_or_changed_without_a_count():
    row = {"question": "film ?", "system": "", **TEXTS, "id": "a"}
    rows = [row, {**row, "chosen": ""}, {**row, "rejected": "very good"}, {**row, "system": "b"}]
    tokens, report = _tokenize(_dataset(*rows), True)
    assert (report.pairs, report.empty, report.identical) == (3, 1, 1) and len(tokens) == 3
    assert report.unread == ("id",)
    assert "4 rows converted from Orca (system, question, chosen, rejected)" in report.summary


def test_three_converted_rows_are_shown():
    rows = [{"system": "", "question": f"film {at}", **TEXTS} for at in range(5)]
    rows[1]["system"] = "a\nb"
    rows[2]["chosen"] = "good " * 30 + "end"
    report = _tokenize(_dataset(*rows), True)[1]
    shown = str(report)
    assert "row 0\n  user      film 0\n  chosen    very good\n  rejected  bad\n" in shown
    assert "row 1\n  system    a\\nb\n  user      film 1\n" in shown
    assert "row 2\n" in shown and "row 3\n" not in shown
    (long,) = [text for who, text in report.samples[2] if who == "chosen"]
    assert len(long) <= 72 and long.startswith("good good") and long.endswith("good end")
    assert " ... " in long
    single = {"question": "film ?", "completion": "bad", "label": False}
    (sample,) = _tokenize(_dataset(single), False)[1].samples
    assert sample == (("user", "film ?"), ("completion", "bad"))
    turns = {**TEXTS, "prompt": "a"}
    assert _tokenize(_dataset(turns), True)[1].samples == ()


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (
            {"question": "a", "instruction": "b", "system": "c", **TEXTS},
            (
                "'question' and 'instruction' may be the prompt; columns={'prompt': 'question', "
                "'system': 'system'} (--columns prompt=question system=system) reads the first"
            ),
        ),
        ({"question": "a", "input": "b", **TEXTS}, "'question' and 'input' may be the prompt"),
        (
            {"messages": ASKED, "question": "a", **TEXTS},
            "'question' and 'messages' may be the prompt; columns={'prompt': 'question'} (--col",
        ),
        (
            {"messages": ASKED, "conversations": HUMAN, **TEXTS},
            "'conversations' and 'messages' may be the prompt; remove what nothing should read",
        ),
        (
            {"messages": ASKED, "conversations": HUMAN, "chosen": GOOD[0], "rejected": BAD[0]},
            "'conversations' and 'messages' may be the prompt",
        ),
        (
            {"question": "a", "system": "b", "system_prompt": "c", **TEXTS},
            "'system' and 'system_prompt' may be the system message; columns={'system': 'system'}",
        ),
        (
            {"question": "a", **TEXTS, "chosen_response": "c", "rejected_response": "d"},
            "'chosen' and 'chosen_response' may be the responses",
        ),
        (
            {"question": "film ?", "chosen": "the film ? good", "rejected": "the film ? bad"},
            (
                "'question' may be the prompt, but 'chosen' and 'rejected' have its text already; "
                "remove 'question' to take their common beginning as the prompt, or put it before "
                "them with columns={'prompt': 'question'}"
            ),
        ),
    ],
)
def test_what_can_be_read_in_two_ways_is_refused_with_the_mapping(row, says):
    for read in (data.tokenize_preferences, data.tokenize_examples):
        with pytest.raises(ValueError, match="dataset 'train' can be read in two ways: ") as error:
            read(_dataset(row), TOKENIZER)
        assert says in str(error.value)
    with pytest.raises(ValueError, match="can be read in two ways"):
        data.check_columns(_dataset(row), "x")


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"question": "film", "instruction": "b", **APART}, {"prompt": "question"}),
        ({"question": "film", "system": "was", "system_prompt": "", **APART}, {"system": "system"}),
        ({"messages": ASKED, "question": "film", **APART}, {"prompt": "question"}),
        (
            {"messages": ASKED, "conversations": HUMAN, "chosen": GOOD[0], "rejected": BAD[0]},
            {"prompt": "conversations"},
        ),
        (
            {"question": "film", "chosen": "film good", "rejected": "film bad"},
            {"prompt": "question"},
        ),
    ],
)
def test_the_mapping_of_the_refusal_will_do(row, columns):
    _, report = _tokenize(_dataset(row), True, columns=columns)
    assert report.pairs == 1


@pytest.mark.parametrize(
    ("rows", "paired", "says"),
    [
        ([{"question": " ", **TEXTS}], True, "read as Orca: 'question': the question is empty"),
        (
            [
                {"instruction": "", "input": None, **TEXTS},
                {"instruction": "", "input": "", **TEXTS},
            ],
            True,
            "read as Alpaca: 'instruction' and 'input': the question is empty",
        ),
        (
            [{"instruction": "a", "output": ["b", "c", "d"]}],
            True,
            "'output' must be two texts, chosen and rejected, got 3",
        ),
        (
            [{"instruction": "a", "output": ["b", None]}],
            True,
            "'output' must be two texts, chosen and rejected, got 2",
        ),
        (
            [{"instruction": "a", "history": [["b"]], **TEXTS}],
            True,
            r"'history' must be pairs of question and answer: \['b'\]",
        ),
        (
            [{"messages": [], "chosen": GOOD[0], "rejected": BAD[0]}] * 2
            + [{"messages": ASKED, "chosen": GOOD[0], "rejected": BAD[0]}],
            True,
            "'messages' is empty, so the row has no question",
        ),
        (
            [{"messages": GOOD, "label": True}],
            False,
            "'messages' has one message; expected a question before it",
        ),
        (
            [{"question": "a", "completion": "b", "label": 3}],
            False,
            "'label' must be true or false, got 3",
        ),
        (
            [{"messages": [*ASKED, {"role": "user", "content": "a"}], "label": True}],
            False,
            "'completion' begins with a message of role 'user'",
        ),
        (
            [{"question": "a", "completion": "b", "label": True, "kto_tag": True}],
            False,
            "'label' and 'kto_tag' may be the label; remove what nothing should read",
        ),
        (
            [
                {
                    "chosen": "\n\nHuman: film\n\nAssistant: good",
                    "rejected": "\n\nHuman: plot\n\nAssistant: bad",
                }
            ],
            True,
            "begin with different questions: no 'Assistant:' stands in their common beginning",
        ),
    ],
)
def test_rows_without_the_format_are_refused_by_their_number(rows, paired, says):
    with pytest.raises(ValueError, match=says) as error:
        _tokenize(_dataset(*rows), paired)
    assert "row 0" in str(error.value) or "two ways" in str(error.value)


def test_the_last_answer_of_hhs_dialogues_is_scored_whole():
    begun = "\n\nHuman: film ?\n\nAssistant: fine\n\nHuman: was it ?\n\nAssistant:"
    row = {"chosen": f"{begun} very good", "rejected": f"{begun} very bad\n\nHuman: a"}
    (read,) = _read(_dataset(row), True)
    assert read == {"prompt": begun, "chosen": " very good", "rejected": " very bad\n\nHuman: a"}
    # One row that is no dialogue, and the common beginning is the prompt, as in TRL.
    other = {"chosen": "the film is good", "rejected": "the film is bad"}
    rows = _dataset(row, other)
    assert foreign.recognise(rows, "x") is None
    assert _read(rows, True)[0]["prompt"] == f"{begun} very"


def test_the_gold_response_of_hhs_dialogues_is_cut_as_the_others_are():
    """It may be the whole dialogue, as chosen and rejected are, or the answer alone."""
    begun = "\n\nHuman: film ?\n\nAssistant:"
    row = {"chosen": f"{begun} good", "rejected": f"{begun} bad", "reference": f"{begun} best"}
    rows = _dataset(row, {**row, "reference": " best"})
    tokens, _ = data.tokenize_preferences(rows, TOKENIZER, gold=True)
    whole, own = tokens
    assert whole == own
    form = foreign.recognise(rows, "x")
    assert form is not None
    assert [{**row, **form.convert(row)}["reference"] for row in rows] == [" best"] * 2
    other = _dataset({**row, "reference": "\n\nHuman: plot ?\n\nAssistant: best"})
    with pytest.raises(ValueError, match="row 0, .* 'reference' is a dialogue that does not begin"):
        data.tokenize_preferences(other, TOKENIZER, gold=True)


def test_columns_come_first_and_trls_formats_stay():
    # As text, without the chat template: that is what the mapping asks for.
    row = {"question": "film", "extra": 1, **APART}
    asked, report = _tokenize(_dataset(row), True, columns={"prompt": "question"})
    assert report.read_as == "" and TOKENIZER.decode(asked[0]["prompt_ids"]) == "film"
    tokens, report = _tokenize(_dataset(row), True)
    assert report.read_as == "Orca (question, chosen, rejected)"
    assert _tokenize(tokens, True)[1].read_as == ""
    examples, _ = _tokenize(_dataset(row), False)
    assert _tokenize(examples, False)[1].read_as == ""
    # Beside whole conversations, a list of messages is one of them again.
    whole = {"chosen": ASKED + GOOD, "rejected": ASKED + BAD, "messages": ASKED + GOOD}
    before = copy.deepcopy(whole)
    _, report = _tokenize(_dataset(whole), True)
    assert report.read_as == "" and report.unread == ("messages",) and whole == before
    spoken = {
        "messages": [SYSTEM, *ASKED],
        "system": "very fine",
        "chosen": GOOD[0],
        "rejected": BAD[0],
    }
    assert _read(_dataset(spoken), True)[0]["prompt"] == [SYSTEM, *ASKED]


def test_rows_in_another_format_of_datasets_are_read_as_well():
    for case in CASES:
        dataset = _dataset(case.before)
        plain, expected = _tokenize(dataset, case.paired)
        tokens, report = _tokenize(dataset.with_format("numpy"), case.paired)
        assert tokens.to_list() == plain.to_list() and report == expected
    # A transform makes the rows itself.
    row = {"question": "film", **APART}
    made = _dataset(row).with_transform(lambda batch: {**batch, "prompt": batch["question"]})
    assert foreign.recognise(made, "x") is None


def test_what_is_beside_pairs_is_not_their_label():
    row = {"messages": ASKED, "chosen": GOOD[0], "rejected": BAD[0], "label": True}
    examples, report = _tokenize(_dataset(row), False)
    assert report.read_as.startswith("OpenAI's messages (messages, chosen, rejected)")
    assert examples["desirable"][:] == [True, False]
    single = {"prompt": "film ?", "output": "very good", "kto_tag": False}
    _, report = _tokenize(_dataset(single), False)
    assert report.read_as == "LLaMA-Factory (prompt, output, kto_tag)" and report.pairs == 1


def test_rows_without_tools_may_have_an_empty_text():
    row = {"conversations": HUMAN, "chosen": GOOD[0], "rejected": BAD[0]}
    (found,), _ = _tokenize(_dataset({**row, "tools": ""}), True)
    (without,), _ = _tokenize(_dataset(row), True)
    assert found == without


def test_a_tokenizer_without_a_template_is_refused():
    row = {"question": "film ?", **TEXTS}
    with pytest.raises(ValueError, match="row 0: .*no chat template"):
        data.tokenize_preferences(_dataset(row), tiny.tokenizer(chat=False))


def test_files_of_others_are_loaded(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("question,system,chosen,rejected\nNA,,good,007\n")
    (row,) = data.load_preference_dataset(str(path))
    assert row == {"question": "NA", "system": "", "chosen": "good", "rejected": "007"}
    for at, case in enumerate(CASES):
        path = tmp_path / f"{at}.jsonl"
        path.write_text(f"{json.dumps(case.before)}\n" * 2)
        assert len(data.load_preference_dataset(str(path))) == 2
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps({"instruction": "a", "input": "", "output": "b"}) + "\n")
    with pytest.raises(ValueError, match="no column 'chosen' and no column 'rejected'; found"):
        data.load_preference_dataset(str(path))
    single = {"question": "a", "completion": "b", "label": True}
    with pytest.raises(ValueError, match="single responses are for the objective 'kto'"):
        data.check_columns(_dataset(single), "x")
    with pytest.raises(ValueError, match="has no margins, which this objective"):
        data.check_columns(_dataset({"question": "a", **TEXTS}), "x", margins=True)


def test_turns_of_people_in_hhs_responses_are_counted():
    """They are scored: chosen and rejected part before the last question."""
    asked = "\n\nHuman: film ?\n\nAssistant:"
    rows = [
        {"chosen": f"{asked} fine\n\nHuman: film\n\nAssistant: good", "rejected": f"{asked} bad"},
        {"chosen": f"{asked} good", "rejected": f"{asked} bad"},
        {"chosen": f"{asked} good", "rejected": asked},
    ]
    _, report = _tokenize(_dataset(*rows), True)
    assert (report.pairs, report.empty, report.turns) == (2, 1, 1)
    assert "1 whose responses have scored turns of other roles" in report.summary


def test_the_page_has_the_table():
    assert foreign_cases.table() in PAGE.read_text()
