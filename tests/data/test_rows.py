"""Rows that are something else than they look like: read as what they are, refused, or named.

Columns of other names, conversations as text, messages of other formats and roles, templates that
leave out what a row says, texts that end where the other goes on.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from support import tiny
from support.versions import TRL_DEEPSEEK, TRL_SMOLVLM

datasets = pytest.importorskip("datasets")

from prefkern import data
from prefkern.data import columns

TOKENIZER = tiny.tokenizer()
EOS = TOKENIZER.eos_token_id
STANDARD = {"prompt": "the film is", "chosen": " very good", "rejected": " bad"}
ORCA = {"system": "was fine", "question": "film ?", "chosen": "very good", "rejected": "bad"}


def _message(role: str, content: str, **more) -> dict:
    return {"role": role, "content": content, **more}


def _user(content: str) -> dict:
    return _message("user", content)


def _assistant(content: str, **more) -> dict:
    return _message("assistant", content, **more)


CHAT = {
    "prompt": [_user("film ?")],
    "chosen": [_assistant("very good")],
    "rejected": [_assistant("bad")],
}


def _tokenize(rows: list[dict], tokenizer=TOKENIZER, **options):
    return data.tokenize_preferences(datasets.Dataset.from_list(rows), tokenizer, **options)


def _texts(row: dict) -> tuple[str, ...]:
    return tuple(TOKENIZER.decode(row[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected"))


def _with_template(template: str):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    return tokenizer


# Columns of other names.


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (
            {"system": "a", "query": "b", "chosen": "c", "rejected": "d"},
            "'system', 'query' would .*{'prompt': 'query', 'system': 'system'} .--columns",
        ),
        ({"problem": "a", "input_": "b", "chosen": "c", "rejected": "d"}, "prompt=problem"),
        ({"Prompt": "a", "chosen": "c", "rejected": "d"}, "columns={'prompt': 'Prompt'}"),
        ({"messages": ["a"], "chosen": "c", "rejected": "d"}, "{'prompt': 'messages'}"),
    ],
)
def test_a_question_that_nothing_reads_is_an_error_before_a_row_is_read(row, says):
    dataset = datasets.Dataset.from_list([row])
    with pytest.raises(ValueError, match=f"'x' has no column 'prompt', and text column.*{says}"):
        data.check_columns(dataset, "x")
    with pytest.raises(ValueError, match=f"dataset 'train' has no column 'prompt'.*{says}"):
        data.tokenize_preferences(dataset, TOKENIZER)
    with pytest.raises(ValueError, match="dataset 'train' has no column 'prompt'"):
        data.tokenize_examples(dataset, TOKENIZER)


def test_prompts_are_not_empty_while_texts_go_unread():
    row = {"frage": "film ?", "chosen": "the film good", "rejected": "the film bad"}
    assert _tokenize([row])[1].unread == ("frage",)
    apart = {**row, "chosen": "good", "rejected": "bad"}
    hint = r"'frage' would not be read; .*columns={'prompt': 'frage'} .--columns prompt=frage"
    with pytest.raises(ValueError, match=f"row 1: 'chosen' and 'rejected' have no common.*{hint}"):
        _tokenize([row, apart])
    asked = {**apart, "prompt": ""}
    with pytest.raises(ValueError, match=f"every 'prompt' is empty, and .*{hint}"):
        _tokenize([asked, {**asked, "prompt": " \n"}])
    assert _tokenize([asked, {**asked, "prompt": "the"}])[1].pairs == 2
    # Where nothing else is there, nothing is wrong.
    assert _tokenize([{**STANDARD, "prompt": "", "id": 3}])[1].unread == ()
    single = {"prompt": "", "completion": "good", "label": True, "frage": "film ?"}
    with pytest.raises(ValueError, match="every 'prompt' is empty"):
        data.tokenize_examples(datasets.Dataset.from_list([single]), TOKENIZER)
    whole = {
        "fragen": CHAT["prompt"],
        "chosen": CHAT["chosen"],
        "rejected": CHAT["rejected"],
    }
    says = "different messages and there is no 'prompt'; .*{'prompt': 'fragen'}"
    with pytest.raises(ValueError, match=f"row 0: .*{says}"):
        _tokenize([whole])
    assert _tokenize([whole], columns={"prompt": "fragen"})[0][0] == _tokenize([CHAT])[0][0]


def test_unread_texts_are_in_the_report(caplog):
    more = {"system": "was fine", "source": "hub", "turns": [{"a": ["b"]}], "id": 3, "margin": 0.5}
    with caplog.at_level(logging.WARNING):
        tokens, report = _tokenize([{**STANDARD, **more}], name="mine")
    assert report.unread == ("system", "source", "turns")
    assert report.summary.endswith("); text columns not read: system, source, turns")
    assert "text columns not read: system, source, turns" in str(report)
    assert caplog.messages == ["dataset 'mine': nothing reads the text column 'system'"]
    assert "not read" not in data.tokenize_preferences(tokens, TOKENIZER)[1].summary
    single = {"prompt": "the", "completion": " film", "label": True, "chosen": "a", "tools": "[]"}
    _, report = data.tokenize_examples(datasets.Dataset.from_list([single]), TOKENIZER)
    assert report.unread == ("chosen",)


def test_columns_are_given_the_names_that_are_read():
    plain = _tokenize([STANDARD])[0][0]
    row = {"question": "the film is", "answer_a": " very good", "answer_b": " bad", "delta": 2.0}
    names = {"prompt": "question", "chosen": "answer_a", "rejected": "answer_b", "margin": "delta"}
    tokens, report = _tokenize([row], columns=names)
    assert tokens[0] == {**plain, "reward_margin": 2.0} and report.unread == ()
    turned = {"chosen": "rejected", "rejected": "chosen"}
    swapped = _tokenize([STANDARD], columns=turned)[0][0]
    assert (swapped["chosen_ids"], swapped["rejected_ids"]) == (
        plain["rejected_ids"],
        plain["chosen_ids"],
    )
    single = {"question": "the film is", "answer": " very good", "ok": True}
    examples, _ = data.tokenize_examples(
        datasets.Dataset.from_list([single]),
        TOKENIZER,
        columns={"prompt": "question", "completion": "answer", "label": "ok"},
    )
    assert examples[0]["completion_ids"] == plain["chosen_ids"]
    # Tokens have their names already.
    assert data.tokenize_preferences(tokens, TOKENIZER, columns=names)[0][0] == tokens[0]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, None),
        ({}, None),
        ({"prompt": "question"}, {"prompt": "question"}),
        ('{"prompt": "question"}', {"prompt": "question"}),
        (["prompt=question", "chosen=a=b"], {"prompt": "question", "chosen": "a=b"}),
        (['{"prompt": "question"}'], {"prompt": "question"}),
    ],
)
def test_spellings_of_columns(given, expected):
    assert columns.read_renaming(given) == expected


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["prompt=a", "prompt=b"], "columns gives 'prompt' twice, as 'a' and as 'b'; give one"),
        ({"prompt": "a", "chosen": "a"}, "columns reads 'a' twice; give it one name"),
        ({"answer": "a"}, "columns gives a name to 'answer', which is not read; known are prompt,"),
        ({"prompt": ["a", "b"]}, r"columns must name one column for 'prompt', got \['a', 'b'\]"),
        (["prompt"], "columns must be a mapping such as .*, got 'prompt'"),
        (3, "columns must be a mapping such as .*, got 3"),
        ('{"prompt": }', "columns is not JSON: Expecting value"),
        ({"prompt": "qestion"}, r"no column 'qestion' .did you mean 'question'.*found question,"),
        (
            {"chosen": "question"},
            "has a column 'chosen' already, so columns cannot give 'question'",
        ),
    ],
)
def test_columns_that_cannot_be_read(given, says):
    row = {"question": "the film", "chosen": " good", "rejected": " bad"}
    with pytest.raises(ValueError, match=says):
        _tokenize([row], columns=given)


def test_a_system_column_makes_a_conversation():
    names = {"prompt": "question", "system": "system"}
    system = [_message("system", "was fine")]
    expected = _tokenize([{**CHAT, "prompt": [*system, *CHAT["prompt"]]}])[0][0]
    without = _tokenize([CHAT])[0][0]
    rows = [ORCA, {**ORCA, "system": ""}, {**ORCA, "system": None}]
    tokens, report = _tokenize(rows, columns=names)
    assert tokens.to_list() == [expected, without, without] and report.unread == ()
    # Beside messages it comes first, once.
    chat = {**CHAT, "said": "was fine"}
    twice = {**chat, "prompt": [*system, *CHAT["prompt"]]}
    whole = {**chat, **{side: CHAT["prompt"] + CHAT[side] for side in ("chosen", "rejected")}}
    whole.pop("prompt")
    for row in (chat, twice, whole, {**chat, "prompt": "film ?"}):
        assert _tokenize([row], columns={"system": "said"})[0][0] == expected
    with pytest.raises(ValueError, match="'prompt' begins with another system message than that"):
        _tokenize([{**twice, "said": "other"}], columns={"system": "said"})
    with pytest.raises(ValueError, match="row 0: 'system' must be text, got 3"):
        _tokenize([{**chat, "said": 3}], columns={"system": "said"})
    with pytest.raises(ValueError, match="row 0: 'system' needs a 'prompt' beside it"):
        row = {"said": "was fine", "chosen": "the good", "rejected": "the bad"}
        _tokenize([row], columns={"system": "said"})
    with pytest.raises(ValueError, match="row 0: .*no chat template"):
        _tokenize([ORCA], tiny.tokenizer(chat=False), columns=names)


def test_files_are_loaded_with_names_of_columns(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("question,system,chosen,rejected\nNA,,good,bad\n007,was,very good,bad\n")
    names = {"prompt": "question", "system": "system"}
    loaded = data.load_preference_dataset(str(path), columns=names)
    assert [row["question"] for row in loaded] == ["NA", "007"]
    assert [row["system"] for row in loaded] == ["", "was"]
    path.write_text("query,system,chosen,rejected\nNA,,good,bad\n")
    with pytest.raises(ValueError, match="has no column 'prompt', and text columns? .*'system'"):
        data.load_preference_dataset(str(path))
    with pytest.raises(ValueError, match="columns={'chosen': 'Chosen'} reads another column"):
        data.check_columns(datasets.Dataset.from_list([{"prompt": "a", "Chosen": "b"}]), "x")
    stream = loaded.to_iterable_dataset()
    with pytest.raises(TypeError, match="only PreferenceTrainer takes streams"):
        data.tokenize_preferences(stream, TOKENIZER, columns=names)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        *((name, f"a column '{name}', but {name[:5]}.* not") for name in ("video", "videos")),
        *((name, f"a column '{name}', but {name[:5]}.* not") for name in ("audio", "audios")),
        *((name, "has pictures, which need the model's processor") for name in ("image", "images")),
        ("Images", "a column 'Images', .* pictures are read under the names 'images' and 'image'"),
    ],
)
def test_what_is_not_text_is_refused_by_name(column, message):
    for row, tokenize in (
        (CHAT, data.tokenize_preferences),
        ({"prompt": "a", "completion": "b", "label": True}, data.tokenize_examples),
    ):
        cell = "a.mp4" if column == "image" else ["a.mp4"]
        with pytest.raises(ValueError, match=message):
            tokenize(datasets.Dataset.from_list([{**row, column: cell}]), TOKENIZER)


# Conversations in other spellings.


def _written(write, row: dict) -> dict:
    return {column: write(cell) for column, cell in row.items()}


WHOLE = {side: CHAT["prompt"] + CHAT[side] for side in ("chosen", "rejected")}


WAYS = {
    "json": json.dumps,
    "python": repr,
    "after a line break": lambda cell: f"\n {json.dumps(cell)}",
    "other keys first": lambda cell: json.dumps([{"id": 3, "weight": 1.0, **m} for m in cell]),
    "in a mapping": lambda cell: json.dumps({"messages": cell}),
    "in a list": lambda cell: repr([cell]),
    "json in json": lambda cell: json.dumps(json.dumps(cell)),
    "json in python": lambda cell: repr(json.dumps(cell)),
}


@pytest.mark.parametrize("write", WAYS.values(), ids=[*WAYS])
@pytest.mark.parametrize("row", [CHAT, WHOLE])
def test_conversations_as_text_are_read(write, row):
    expected = _tokenize([CHAT])[0][0]
    assert _tokenize([_written(write, row)] * 2)[0].to_list() == [expected] * 2
    single = {"prompt": write(CHAT["prompt"]), "completion": write(CHAT["chosen"])}
    examples, _ = data.tokenize_examples(
        datasets.Dataset.from_list([{**single, "label": True}]), TOKENIZER
    )
    assert examples[0]["completion_ids"] == expected["chosen_ids"]


@pytest.mark.parametrize(
    ("cell", "said"),
    [("", "one of 'chosen' and 'rejected' is text"), (None, "'chosen' must be text or a list")],
)
def test_an_empty_cell_among_conversations_as_text_is_the_one_that_is_refused(cell, said):
    rows = [_written(json.dumps, CHAT), {**_written(json.dumps, CHAT), "chosen": cell}]
    with pytest.raises(ValueError, match=f"row 1: {said}"):
        _tokenize(rows)


ANSWERS = [
    '[{"name": "Ada", "role": "engineer"}]',
    '{"people": [{"role": "user", "content": "none"}]}',
    "{const a = {'role': 'admin'}}",
    "[INST] {'role': 'user'} [/INST]",
]


@pytest.mark.parametrize("answer", ANSWERS)
def test_data_with_roles_is_not_a_conversation(answer):
    expected = _tokenize([{**STANDARD, "chosen": "x " * answer.count(" ") + "x"}])[0][0]
    row = {**STANDARD, "chosen": answer}
    assert len(_tokenize([row] * 2)[0][0]["chosen_ids"]) == len(expected["chosen_ids"])


def test_conversations_as_text_come_through_a_csv_file(tmp_path):
    """As pandas prints them: one message as a list, several as its arrays, without commas."""
    path = tmp_path / "pairs.csv"
    datasets.Dataset.from_list([CHAT, CHAT]).to_pandas().to_csv(path, index=False)
    tokens, _ = data.tokenize_preferences(data.load_preference_dataset(str(path)), TOKENIZER)
    assert tokens[0] == _tokenize([CHAT])[0][0]
    datasets.Dataset.from_list([WHOLE]).to_pandas().to_csv(path, index=False)
    with pytest.raises(ValueError, match="row 0: 'chosen' looks like a conversation as text, but"):
        data.tokenize_preferences(data.load_preference_dataset(str(path)), TOKENIZER)


def test_conversations_as_text_are_refused_where_they_are_not_sure():
    rows = [STANDARD, _written(json.dumps, CHAT)]
    with pytest.raises(ValueError, match="row 1: 'prompt' is a conversation as text.*other rows"):
        _tokenize(rows)
    broken = "[{'content': 'film ?', 'role': 'user'}\n {'content': 'a', 'role': 'assistant'}]"
    for text in (broken, "array([{'role': 'user', 'content': 'a'}], dtype=object)"):
        with pytest.raises(ValueError, match="row 0: 'chosen' looks like a conversation as text"):
            _tokenize([{"prompt": "a", "chosen": text, "rejected": text}])
    transformed = datasets.Dataset.from_list([_written(json.dumps, CHAT)])
    transformed.set_transform(lambda batch: batch)
    with pytest.raises(ValueError, match="row 0: 'prompt' is a conversation as text"):
        data.tokenize_preferences(transformed, TOKENIZER)


@pytest.mark.parametrize(
    "text",
    [
        "[{'role': 'user', 'content': 'a'}] is",
        "[good",
        "[1, 2]",
        '[{"name": "plot"}]',
        '{"content": 3',
        '{"value": 1}',
        "{good}",
    ],
)
def test_text_that_begins_with_a_bracket_is_text(text):
    row = {"prompt": f"{text} the", "chosen": text, "rejected": f"{text} bad"}
    tokens, report = _tokenize([row])
    assert report.pairs == 1
    assert _tokenize([{**row, "chosen": f"{text} <eos>"}])[0][0] == tokens[0]


def test_messages_of_other_formats():
    expected = _tokenize([CHAT])[0][0]
    chat = {
        column: [
            {"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]}
            for m in messages
        ]
        for column, messages in CHAT.items()
    }
    alone = {**chat, **{side: chat[side][0] for side in ("chosen", "rejected")}}
    single = {**CHAT, **{side: CHAT[side][0] for side in ("chosen", "rejected")}}
    for row in (chat, alone, single, _written(json.dumps, chat), _written(json.dumps, single)):
        assert _tokenize([row])[0][0] == expected
    # TRL's reading takes the names of roles as they are.
    convert = pytest.importorskip("trl.data_utils").maybe_convert_to_chatml
    theirs = {
        column: [{"from": m["role"], "value": m["content"]} for m in messages]
        for column, messages in CHAT.items()
    }
    assert _tokenize([theirs])[0][0] == _tokenize([convert(theirs)])[0][0] == expected
    strange = [{"from": "narrator", "value": "{}"}]
    with pytest.raises(ValueError, match="row 0: a message in 'prompt' is from 'narrator'; known"):
        _tokenize([{**chat, "prompt": strange}])


def test_a_response_that_ends_where_the_prompt_does_is_dropped():
    """`chosen` holds the prompt and nothing after it."""
    silent = {**CHAT, "chosen": CHAT["prompt"], "rejected": [*CHAT["prompt"], _assistant("bad")]}
    _, report = _tokenize([CHAT, silent])
    assert report.empty == 1 and report.pairs == 1


@pytest.mark.parametrize(
    ("response", "says"),
    [
        ([_user("good")], "begins with a message of role 'user', which would be scored"),
        ([_message("gpt", "good")], "begins with a message of role 'gpt'"),
        ([_message("tool", "plot"), _assistant("good")], "begins with a message of role 'tool'"),
        ([_assistant("good"), _user("really ?")], "ends with a message of role 'user'"),
    ],
)
def test_responses_are_the_assistants(response, says):
    for side in ("chosen", "rejected"):
        with pytest.raises(ValueError, match=f"row 1: the response in '{side}' {says}"):
            _tokenize([CHAT, {**CHAT, side: response}])
    single = {"prompt": CHAT["prompt"], "completion": response, "label": True}
    with pytest.raises(ValueError, match=f"row 0: the response in 'completion' {says}"):
        data.tokenize_examples(datasets.Dataset.from_list([single]), TOKENIZER)


def test_turns_of_others_inside_a_response_are_counted():
    turns = [_assistant("fine"), _user("really ?"), _assistant("good")]
    report = _tokenize([CHAT, {**CHAT, "rejected": turns}])[1]
    assert report.turns == 1
    assert report.summary.endswith(", 1 whose responses have scored turns of other roles)")


# What a template leaves out.

BARE = tiny.CHAT_TEMPLATE[tiny.CHAT_TEMPLATE.index("{% for m in messages") :]
SAYS_ALL = BARE.replace(
    "{{ m['content'] }}",
    "{{ m['reasoning_content'] }} {{ m['content'] }} {% for c in m['tool_calls'] or [] %}"
    "{{ c['function']['name'] }} {{ c['function']['arguments'] }} {% endfor %}",
)
CALL = {"type": "function", "function": {"name": "plot", "arguments": {"a": "film"}}}
AS_JSON = {"type": "function", "function": {"name": "plot", "arguments": '{"a": "film"}'}}
ASKED = [_user("film ?"), _assistant("fine"), _user("really ?")]
TURNS = [_assistant("fine"), _user("a"), _assistant("good")]


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"chosen": [_assistant("good", tool_calls=[CALL])]}, "'tool_calls' of .* 'assistant'"),
        ({"chosen": [_assistant("good", tool_calls=[AS_JSON])]}, "'tool_calls' of .* 'assistant'"),
        ({"rejected": [_assistant("bad", reasoning_content="was")]}, "'reasoning_content' of"),
        ({"chosen": [_assistant("good", thinking="was")]}, "'thinking' of"),
        (
            {
                "prompt": [
                    _user("film ?"),
                    _assistant("", tool_calls=[CALL]),
                    _message("tool", "plot"),
                ]
            },
            "'tool_calls' of .* 'assistant'",
        ),
        ({"prompt": [*ASKED[:1], _assistant("a", tool_calls=[CALL]), *ASKED[2:]]}, "'tool_calls'"),
        ({"tools": [{"name": "plot"}]}, "'tools', so the model would train on another"),
    ],
)
def test_what_a_template_does_not_say_is_refused(row, what):
    rows = [{**CHAT, "tools": None}, {**CHAT, **row}]
    with pytest.raises(ValueError, match=f"row 1: the chat template leaves out {what}"):
        _tokenize(rows, _with_template(BARE))
    if "tools" not in row and "thinking" not in str(row):
        assert _tokenize(rows, _with_template(SAYS_ALL))[1].pairs == 2


def test_a_call_without_its_arguments_is_refused():
    names_only = SAYS_ALL.replace("{{ c['function']['arguments'] }}", "")
    row = {**CHAT, "chosen": [_assistant("good", tool_calls=[CALL])]}
    with pytest.raises(ValueError, match="leaves out 'tool_calls'"):
        _tokenize([row], _with_template(names_only))
    none = {"type": "function", "function": {"name": "plot"}}
    row = {**CHAT, "chosen": [_assistant("good", tool_calls=[none])]}
    assert _tokenize([row], _with_template(names_only))[1].pairs == 1


def test_contents_that_a_template_leaves_out():
    system = {**CHAT, "prompt": [_message("system", "good"), *ASKED]}
    without = BARE.replace("in messages", "in messages if m['role'] != 'system'")
    # "good" is in the response, too: what counts is the order.
    with pytest.raises(ValueError, match="leaves out 'content' of a message of role 'system'"):
        _tokenize([system], _with_template(without))
    # Llama's template prints what a tool returned as JSON.
    quoted = {**CHAT, "prompt": [_message("system", 'the "film"\n'), *ASKED]}
    as_json = BARE.replace("{{ m['content'] }}", "{{ m['content'] | tojson }}")
    assert _tokenize([quoted], _with_template(as_json))[1].unsaid == 0
    last = BARE.replace("in messages", "in messages | reverse")
    assert _tokenize([system], _with_template(last))[1].unsaid == 0
    blocks = {**CHAT, "prompt": [_user([{"type": "text", "text": "film ?"}])]}
    nothing = BARE.replace("{{ m['content'] }}", "{{ m['content'] if m['content'] is string }}")
    with pytest.raises(ValueError, match="leaves out 'content' of a message of role 'user'"):
        _tokenize([blocks], _with_template(nothing))


THOUGHT = "<think> plot </think> good"
STRIPS_ALL = BARE.replace("m['content']", "m['content'].split('</think>')[-1]")
STRIPS_EARLIER = BARE.replace(
    "{{ m['content'] }}",
    "{% if loop.last %}{{ m['content'] }}{% else %}{{ m['content'].split('</think>')[-1] }}"
    "{% endif %}",
)


def test_thoughts_may_be_left_out_of_earlier_answers_only():
    asked = {**CHAT, "prompt": [_user("film ?"), _assistant(THOUGHT), _user("really ?")]}
    answered = {**asked, "chosen": [_assistant(THOUGHT)]}
    for row in (asked, answered):
        report = _tokenize([CHAT, row], _with_template(STRIPS_EARLIER))[1]
        assert (report.pairs, report.unsaid) == (2, 1)
        assert report.summary.endswith("1 whose chat template leaves out parts of earlier answers)")
    with pytest.raises(ValueError, match="leaves out 'content' of a message of role 'assistant'"):
        _tokenize([answered], _with_template(STRIPS_ALL))
    earlier = _assistant("fine", reasoning_content="plot")
    for row in ({"prompt": [_user("a"), earlier, _user("b")]}, {"chosen": [earlier, *TURNS[1:]]}):
        assert _tokenize([{**CHAT, **row}], _with_template(BARE))[1].unsaid == 1
        assert _tokenize([{**CHAT, **row}], _with_template(SAYS_ALL))[1].unsaid == 0


REAL = {
    "qwen3": ({"thoughts", "earlier thoughts", "calls", "system"}, 1),
    "llama3_1": ({"thoughts", "earlier thoughts", "calls", "system"}, 0),
    "deepseek_r1_distill": ({"earlier thoughts", "system"}, 1),
    "phi3": ({"thoughts", "earlier thoughts", "system"}, 0),
    "smolvlm": (set(), 0),
}


SINCE = {"deepseek_r1_distill": TRL_DEEPSEEK, "smolvlm": TRL_SMOLVLM}


@pytest.mark.parametrize(
    "name", [SINCE[name].param(name) if name in SINCE else name for name in REAL]
)
def test_real_templates(name):
    trl = pytest.importorskip("trl")
    path = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    template = path.read_text().replace("<｜Assistant｜>", " <｜Assistant｜> ")
    thought = [_assistant("<think>\nplot\n</think>\n\nvery good\n")]
    tool = {"type": "function", "function": {"name": "plot", "parameters": {}}}
    rows = {
        "thoughts": {**CHAT, "chosen": thought},
        "earlier thoughts": {**CHAT, "prompt": [*ASKED[:1], *thought, *ASKED[2:]]},
        "calls": {**CHAT, "tools": [tool], "chosen": [_assistant("", tool_calls=[CALL])]},
        "system": {**CHAT, "prompt": [_message("system", " was\n fine "), _user("film ?")]},
    }
    takes, unsaid = set(), 0
    for what, row in rows.items():
        try:
            unsaid += _tokenize([row], _with_template(template))[1].unsaid
            takes.add(what)
        except ValueError as error:
            # The tokenizer splits at spaces alone, so a template may leave it nothing to score.
            if "no pair with two responses" in str(error):
                takes.add(what)
            else:
                assert "the chat template leaves out" in str(error), what
    assert (takes, unsaid) == REAL[name]


def test_rows_that_say_nothing_more_are_rendered_once(monkeypatch):
    """What is compared costs renderings only where a row has more than contents."""
    calls = []
    kind = type(TOKENIZER)
    render, encode = kind.apply_chat_template, kind.__call__
    monkeypatch.setattr(
        kind, "apply_chat_template", lambda *a, **k: calls.append("render") or render(*a, **k)
    )
    monkeypatch.setattr(kind, "__call__", lambda *a, **k: calls.append("encode") or encode(*a, **k))
    _tokenize([{**CHAT, "rejected": TURNS, "id": 7}] * 5)
    assert (calls.count("render"), calls.count("encode")) == (15, 15)
    calls.clear()
    _tokenize([{**STANDARD, "id": 7}] * 5)
    assert (calls.count("render"), calls.count("encode")) == (0, 15)
    calls.clear()
    _tokenize([{**CHAT, "tools": [{"name": "plot"}], "id": 7}] * 5)
    assert calls.count("render") == 20
    calls.clear()
    _tokenize([{**CHAT, "chosen": [_assistant("a", tool_calls=[CALL])]}], _with_template(SAYS_ALL))
    assert calls.count("render") == 4


# Where a text ends.


def test_a_text_that_the_other_goes_on_from_is_kept():
    yes, no = "the film is good", "the film is good bad"
    tokens, report = _tokenize([{"chosen": yes, "rejected": no}, {"chosen": no, "rejected": yes}])
    assert [_texts(row) for row in tokens] == [
        ("the film is good", "<eos>", "bad <eos>"),
        ("the film is good", "bad <eos>", "<eos>"),
    ]
    assert (report.empty, report.identical) == (0, 0)
    space = _tokenize([{"chosen": f"{yes} ", "rejected": no}])[0]
    assert _texts(space[0]) == _texts(tokens[0])
    # Two equal texts have no responses, and a response that is given as empty stays empty.
    assert (
        _tokenize([{"chosen": yes, "rejected": yes}, {"chosen": yes, "rejected": no}])[1].empty == 1
    )
    assert _tokenize([STANDARD, {**STANDARD, "chosen": ""}])[1].empty == 1


def _chatml(eos: str = "<eos>"):
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.eos_token = eos
    return tokenizer


@pytest.mark.parametrize("eos", ["<eos>", "<|im_end|>"])
@pytest.mark.parametrize("after", ["", "\n", " \n"])
def test_a_text_with_an_end_token_gets_no_second(eos, after):
    tokenizer = _chatml(eos)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    prompt = "<user> film <|im_end|>\n<assistant>"
    row = {
        "prompt": prompt,
        "chosen": f" good <|im_end|>{after}",
        "rejected": f" bad <|im_end|>{after}",
    }
    tokens, report = _tokenize([row], tokenizer)
    good, bad = tokenizer("good bad")["input_ids"]
    assert (tokens[0]["chosen_ids"], tokens[0]["rejected_ids"]) == ([good, end], [bad, end])
    assert report.empty == 0
    # Another special token ends nothing: <unk> is what the tokenizer does not know.
    unknown, _ = _tokenize([{**row, "chosen": " ? "}], tokenizer)
    assert unknown[0]["chosen_ids"][-1] == tokenizer.eos_token_id
    nothing = {**row, "chosen": f" <|im_end|>{after}"}
    assert _tokenize([row, nothing], tokenizer)[1].empty == 1


def test_only_white_space_is_no_response():
    assert _tokenize([STANDARD, {**STANDARD, "chosen": " \n "}])[1].empty == 1
