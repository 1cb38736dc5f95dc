"""Which turns of a conversation are scored: masks, truncation, batches, reports, what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from support import chats

datasets = pytest.importorskip("datasets")

import prefkern
from prefkern import data
from prefkern.data.collate import ExampleCollator, PreferenceCollator
from support import tiny

TOKENIZER = chats.tokenizer()
ASSISTANT, LAST = {"assistant_only_loss": True}, {"last_turn_only": True}
SIDES = ("chosen", "rejected")
END = "<|im_end|>"
# A model's template, and what of the trajectory's chosen response it marks as the assistant's.
CALL = '<tool_call>\n{"name": "rate", "arguments": {"film": "Gigli"}}\n</tool_call>'
REAL = {
    "qwen3": (
        f"<think>\n\n</think>\n\n{CALL}{END}\n<think>\n\n</think>\n\nNo, 2.{END}\n",
        f"<think>\n\n</think>\n\nNo, 2.{END}\n",
    ),
    "qwen3_instruct_2507": (f"{CALL}{END}\nNo, 2.{END}\n", f"No, 2.{END}\n"),
    "gptoss": (
        (
            ' to=functions.rate<|channel|>commentary json<|message|>{"film": "Gigli"}<|call|>'
            "<|start|>assistant<|channel|>final<|message|>No, 2.<|return|>"
        ),
        "<|channel|>final<|message|>No, 2.<|return|>",
    ),
}


def _tokenize(rows: list[dict], tokenizer=TOKENIZER, **options):
    return data.tokenize_preferences(datasets.Dataset.from_list(rows), tokenizer, **options)


def _examples(rows: list[dict], tokenizer, **options):
    return data.tokenize_examples(datasets.Dataset.from_list(rows), tokenizer, **options)


def _scored(row: dict, side: str, tokenizer=TOKENIZER) -> str:
    pairs = zip(row[f"{side}_ids"], row[f"{side}_mask"], strict=True)
    return tokenizer.decode([token for token, kept in pairs if kept])


@pytest.mark.parametrize("implicit", [False, True])
@pytest.mark.parametrize("name", REAL)
def test_trajectories_are_scored_as_transformers_marks_them(name, implicit):
    """Rows with a prompt and whole conversations have the same tokens and the same masks."""
    tokenizer = chats.tokenizer(chats.training_template(name))
    row = chats.trajectory()
    given = dict(row)
    if implicit:
        prompt = given.pop("prompt")
        given |= {side: prompt + row[side] for side in SIDES}
    (found,), report = _tokenize([given], tokenizer, **ASSISTANT)
    for side in SIDES:
        true = tokenizer.apply_chat_template(
            row["prompt"] + row[side],
            tools=row["tools"],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        start = len(found["prompt_ids"])
        assert found["prompt_ids"] + found[f"{side}_ids"] == true["input_ids"]
        assert found[f"{side}_mask"] == [bool(mark) for mark in true["assistant_masks"][start:]]
        # The prompt has turns of the assistant as well, which are no response.
        assert any(true["assistant_masks"][:start])
    assert _scored(found, "chosen", tokenizer) == REAL[name][0]
    assert report.turns == 0
    (last,), _ = _tokenize([given], tokenizer, **LAST)
    assert _scored(last, "chosen", tokenizer) == REAL[name][1]
    assert _scored(last, "rejected", tokenizer) == tokenizer.decode(last["rejected_ids"])
    (both,), _ = _tokenize([given], tokenizer, **ASSISTANT, **LAST)
    assert both["chosen_mask"] == last["chosen_mask"]
    (whole,), report = _tokenize([given], tokenizer)
    assert {**found, **dict.fromkeys(("chosen_mask", "rejected_mask"))} == {
        **whole,
        **dict.fromkeys(("chosen_mask", "rejected_mask")),
    }
    assert "chosen_mask" not in whole and report.turns == 1


def _forms_of_the_trajectory() -> dict[str, dict]:
    """ShareGPT's ways to write a trajectory with calls of tools."""
    spoken = chats.spoken_trajectory()
    turns = spoken["conversations"]
    whole = {side: turns + spoken[side] for side in SIDES}
    tools = json.loads(spoken["tools"])
    renamed = json.loads(json.dumps(spoken).replace("observation", "tool"))
    return {
        "turns": spoken,
        "turns, other names": renamed,
        "tools as a list": {**spoken, "tools": tools},
        "tools as TRL has them": {**spoken, "tools": chats.TOOLS},
        "whole": {**whole, "tools": spoken["tools"]},
        "prompt": {**spoken, "prompt": turns, "conversations": "x"},
        "one message": {**spoken, "rejected": spoken["rejected"][0]},
    }


@pytest.mark.parametrize("name", [*REAL])
@pytest.mark.parametrize("form", _forms_of_the_trajectory())
def test_sharegpts_trajectories_have_the_tokens_of_tool_calls(form, name):
    """LLaMA-Factory's and others' calls of tools, their results, and tools without an outer part."""
    tokenizer = chats.tokenizer(chats.training_template(name))
    row = _forms_of_the_trajectory()[form]
    for options in ({}, ASSISTANT, LAST, {**ASSISTANT, **LAST}):
        (expected,), _ = _tokenize([chats.trajectory()], tokenizer, **options)
        (found,), _ = _tokenize([row], tokenizer, **options)
        assert found == expected


@pytest.mark.parametrize("options", [ASSISTANT, LAST, {**ASSISTANT, **LAST}], ids=str)
def test_single_responses_of_trajectories(options):
    """KTO's rows, TRL's and LLaMA-Factory's: the masks of a pair's responses."""
    tokenizer = chats.tokenizer(chats.training_template("qwen3"))
    row, spoken = chats.trajectory(), chats.spoken_trajectory()
    (pair,), _ = _tokenize([row], tokenizer, **options)
    single = {
        "prompt": row["prompt"],
        "completion": row["chosen"],
        "label": True,
        "tools": chats.TOOLS,
    }
    (found,), report = _examples([single], tokenizer, **options)
    assert found == {
        "prompt_ids": pair["prompt_ids"],
        "completion_ids": pair["chosen_ids"],
        "completion_mask": pair["chosen_mask"],
        "desirable": True,
    }
    assert report.scored == sum(pair["chosen_mask"]) < len(pair["chosen_mask"])
    (of_pair, rejected), _ = _examples([spoken], tokenizer, **options)
    assert of_pair == found and rejected["completion_mask"] == pair["rejected_mask"]
    # LLaMA-Factory's response is the last message.
    turns = spoken["conversations"] + spoken["rejected"]
    rows = [{"conversations": turns, "kto_tag": False, "tools": spoken["tools"]}]
    assert [*_examples(rows, tokenizer, **options)[0]] == [rejected]


@pytest.mark.parametrize("spoken", [False, True])
@pytest.mark.parametrize("options", [ASSISTANT, {"assistant_only_loss": False, **LAST}], ids=str)
def test_labels_of_a_trajectory_are_what_token_logprobs_scores(spoken, options):
    """Each assistant's turn, its calls of tools too, against the model's own logits."""
    tokenizer = chats.tokenizer(chats.training_template("qwen3_instruct_2507"))
    row = chats.spoken_trajectory() if spoken else chats.trajectory()
    turns = [*row["conversations" if spoken else "prompt"], *row["chosen"]]
    tools = json.loads(row["tools"]) if spoken else row["tools"]
    found = data.conversation_labels(tokenizer, turns, tools=tools, **options)
    ids, labels = (torch.tensor([found[key]]) for key in ("input_ids", "labels"))
    texts = [turn for turn in tokenizer.decode(labels[labels != -100]).split(f"{END}\n") if turn]
    of_prompt = [CALL.replace("Gigli", "Alien"), "Yes, 9."]
    assert texts == (["No, 2."] if "last_turn_only" in options else [*of_prompt, CALL, "No, 2."])
    model = tiny.model(vocab_size=chats.SIZE)
    logps = prefkern.token_logprobs(model, ids, labels=labels)
    true = model(ids).logits.double().log_softmax(-1)[0, :-1]
    true = true.gather(-1, ids[0, 1:, None])[:, 0] * (labels[0, 1:] != -100)
    torch.testing.assert_close(logps[0].double(), true, atol=1e-5, rtol=1e-5)


def test_several_calls_and_thoughts_of_sharegpts():
    tokenizer = chats.tokenizer(chats.training_template("qwen3_instruct_2507"))
    call = {"name": "rate", "arguments": {"film": "Gigli"}}
    row = chats.spoken_trajectory()
    value = "<think>hm</think>\n" + json.dumps([call, {**call, "arguments": {"film": "Alien"}}])
    (found,), _ = _tokenize(
        [{**row, "rejected": [{"from": "function_call", "value": value}]}], tokenizer
    )
    text = tokenizer.decode(found["rejected_ids"])
    assert text == f"<think>hm</think>\n{CALL}\n{CALL.replace('Gigli', 'Alien')}{END}\n"
    for wrong in ("rate(Gigli)", "{}", '["a"]', "7"):
        bad = {**row, "rejected": [{"from": "function_call", "value": wrong}]}
        with pytest.raises(
            ValueError, match="'rejected' is from 'function_call', and its value is"
        ):
            _tokenize([bad], tokenizer)
    with pytest.raises(ValueError, match="row 0: 'tools' is text but not JSON"):
        _tokenize([{**row, "tools": "rate"}], tokenizer)
    with pytest.raises(ValueError, match="row 0: 'tools' must be a list of schemas"):
        _tokenize([{**row, "tools": '{"name": "rate"}'}], tokenizer)


def test_the_last_turn_needs_no_marks():
    (row,), _ = _tokenize([chats.pair()], chats.tokenizer(chats.UNMARKED), **LAST)
    (marked,), _ = _tokenize([chats.pair()], **LAST)
    assert row == marked
    assert [_scored(row, side) for side in SIDES] == [f"good{END}", f"bad{END}"]


def test_the_report_counts_what_is_scored():
    rows = [chats.pair(number) for number in range(3)]
    tokens, report = _tokenize(rows, **ASSISTANT)
    scored = [sum(row[f"{side}_mask"]) for row in tokens for side in SIDES]
    unscored = [
        len(row[f"{side}_mask"]) - sum(row[f"{side}_mask"]) for row in tokens for side in SIDES
    ]
    assert scored == [11, 4, 15, 7, 19, 4]
    assert (report.scored, report.unscored) == (sum(scored), sum(unscored)) == (60, 72)
    assert report.lengths["chosen, scored"].max == 19
    assert list(report.lengths) == ["prompt", *SIDES, *(f"{side}, scored" for side in SIDES)]
    assert report.summary.endswith(", 72 tokens of responses not scored, 60 scored)")
    assert "chosen, scored" in str(report)
    plain = _tokenize(rows)[1]
    assert (plain.scored, plain.unscored) == (132, 0) and "scored, " not in str(plain)
    assert list(plain.lengths) == ["prompt", *SIDES]


@pytest.mark.parametrize("mode", data.TRUNCATION_MODES)
def test_masks_are_cut_with_their_tokens(mode):
    rows = [chats.pair(), {**chats.pair(), "chosen": chats.pair()["rejected"]}]
    tokens, report = _tokenize(rows, max_length=32, truncation_mode=mode, **ASSISTANT)
    for row in tokens:
        for side in SIDES:
            assert len(row[f"{side}_mask"]) == len(row[f"{side}_ids"])
    if mode == "drop":
        assert (report.pairs, report.too_long) == (1, 1)
    else:
        # The prompt goes first, or the end of the response.
        kept = {"keep_end": ("which<|im_end|>g", 31), "keep_start": ("which<|im_end|>", 7)}[mode]
        assert _scored(tokens[0], "chosen") == kept[0] and len(tokens[0]["chosen_ids"]) == kept[1]
        assert report.responses_truncated == 1


def test_rows_without_a_scored_token_are_dropped_and_counted():
    """A last turn that is cut away is too long; a template may mark nothing; some say nothing."""
    rows = [chats.pair(), {**chats.pair(), "chosen": chats.pair()["rejected"]}]
    _, report = _tokenize(rows, max_length=30, **LAST)
    assert (report.pairs, report.too_long, report.masked, report.dropped) == (1, 1, 0, 1)
    of_model = {**chats.pair(1), "rejected": [chats.message("model", "bad")]}
    _, report = _tokenize([rows[0], of_model], **ASSISTANT)
    assert (report.pairs, report.masked, report.empty, report.dropped) == (1, 1, 0, 1)
    assert ", 1 dropped for a response without a scored turn, " in report.summary
    silent = [*chats.pair()["chosen"][:2], chats.message("assistant", " ")]
    for options, empty in (({}, 0), (ASSISTANT, 0), (LAST, 1)):
        _, report = _tokenize([rows[0], {**rows[0], "chosen": silent}], **options)
        assert (report.pairs, report.empty) == (2 - empty, empty)
    with pytest.raises(ValueError, match="has no pair with two responses that can be scored$"):
        _tokenize([of_model], **ASSISTANT)


def test_single_responses_have_a_mask():
    pair = chats.pair()
    single = {"prompt": pair["prompt"], "completion": pair["chosen"], "label": True}
    for rows in ([single], [pair]):
        made = datasets.Dataset.from_list(rows)
        examples, report = data.tokenize_examples(made, TOKENIZER, **ASSISTANT)
        assert _scored(examples[0], "completion") == f"which{END}good{END}"
        assert report.unscored == 24 and report.lengths["response, scored"].max == 11
        assert "chosen_mask" not in examples.column_names
        again, _ = data.tokenize_examples(examples, TOKENIZER, **ASSISTANT)
        assert again[:] == examples[:]


def test_batches_of_all_layouts_have_the_same_labels():
    tokens, _ = _tokenize([chats.pair(number) for number in range(3)], **ASSISTANT)
    rows = [*tokens]
    padded = PreferenceCollator(0)(rows)
    true = []
    for side in SIDES:
        for row in rows:
            pairs = zip(row[f"{side}_ids"], row[f"{side}_mask"], strict=True)
            labels = [token if kept else -100 for token, kept in pairs]
            true.append([-100] * len(row["prompt_ids"]) + labels)
    for row, labels in zip(padded["labels"].tolist(), true, strict=True):
        assert row[: len(labels)] == labels and set(row[len(labels) :]) <= {-100}
    packed = PreferenceCollator(0, padding_free=True)(rows)
    assert packed["labels"][0].tolist() == [label for row in true for label in row]
    shared = PreferenceCollator(0, padding_free=True, share_prompt=True)(rows)
    scored = [label for row in true for label in row if label != -100]
    assert [label for label in shared["labels"][0].tolist() if label != -100] == scored
    for batch in (padded, packed, shared):
        known = batch["labels"] != -100
        assert torch.equal(batch["labels"][known], batch["input_ids"][known])


@pytest.mark.parametrize("padding_free", [False, True])
def test_mismatched_responses_bring_their_masks(padding_free):
    rows = datasets.Dataset.from_list([chats.pair(number) for number in range(2)])
    examples, _ = data.tokenize_examples(rows, TOKENIZER, **ASSISTANT)
    chosen = [*examples][:2]
    batch = ExampleCollator(0, max_length=40, padding_free=padding_free)(chosen)
    for name in ("labels", "mismatched_labels"):
        scored = batch[name][batch[name] != -100].tolist()
        order = chosen if name == "labels" else chosen[::-1]
        texts = [_scored(row, "completion") for row in order]
        assert TOKENIZER.decode(scored) == "".join(texts)


def test_tokens_with_masks_stay_as_they_are():
    tokens, _ = _tokenize([chats.pair(number) for number in range(3)], **ASSISTANT)
    for options in ({}, ASSISTANT, LAST):
        again, report = _tokenize([*tokens], **options)
        assert again[:] == tokens[:]
        assert report.unscored == 72


ROW = {"prompt_ids": [3, 4], "chosen_ids": [5, 6], "rejected_ids": [7]}
SINGLE = {"prompt_ids": [3], "completion_ids": [5, 6], "desirable": True}


@pytest.mark.parametrize(
    ("row", "options", "says"),
    [
        (
            ROW,
            ASSISTANT,
            "assistant_only_loss reads turns, and dataset 'train' is token ids.* give ",
        ),
        (ROW, LAST, "last_turn_only reads .* give chosen_mask and rejected_mask beside them"),
        (SINGLE, LAST, "give completion_mask beside them, lists of bools"),
        ({**ROW, "chosen_mask": [True, False]}, {}, "only some of chosen_mask and rejected_mask"),
        (
            {**ROW, "chosen_mask": [True], "rejected_mask": [True]},
            {},
            r"row 0: 'chosen_mask' must have True or False for each of the 2 .* got \[True\]",
        ),
        (
            {**ROW, "chosen_mask": [1, 0], "rejected_mask": [2]},
            {},
            r"'rejected_mask' must have True or False for each of the 1 tokens .* got \[2\]",
        ),
        (
            {**chats.pair(), "ref_chosen_logps": -9.0, "ref_rejected_logps": -9.0},
            LAST,
            "'train' carries reference sums .* and last_turn_only leaves turns out: remove the col",
        ),
        ({**SINGLE, "completion_mask": None}, LAST, "'completion_mask' must have .* got None"),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            ASSISTANT,
            "row 0: assistant_only_loss scores turns .* the row is text",
        ),
        (
            {"prompt": "a", "completion": "b", "label": True},
            LAST,
            "row 0: last_turn_only scores turns .* make it lists of messages",
        ),
    ],
)
def test_rows_without_turns_are_refused(row, options, says):
    tokenize = data.tokenize_examples if "completion" in str(row) else data.tokenize_preferences
    with pytest.raises(ValueError, match=says):
        tokenize(datasets.Dataset.from_list([row]), TOKENIZER, **options)


@pytest.mark.parametrize(
    ("template", "options", "says"),
    [
        (chats.UNMARKED, ASSISTANT, "has none: put what .* or set last_turn_only"),
        (
            chats.MARKED.replace(
                "{% for m in messages %}", "{% for m in messages %}{% generation %}"
            )
            .replace("{% generation %}{{", "{{")
            .replace("{% endgeneration %}", "")
            .replace("{% endfor %}", "{% endgeneration %}{% endfor %}", 1),
            ASSISTANT,
            "marks cover a message of role 'user'",
        ),
        (
            chats.UNMARKED.replace("{% for m", "{{ messages | length }}{% for m"),
            LAST,
            "last_turn_only finds no beginning of the last turn",
        ),
    ],
)
def test_templates_that_do_not_show_turns_are_refused(template, options, says):
    with pytest.raises(ValueError, match=f"dataset 'train', row 0: .*{says}"):
        _tokenize([chats.pair()], chats.tokenizer(template), **options)


def test_marks_beside_white_space_that_the_tokenizer_drops_are_refused():
    """transformers would go on to the end of the text, over the user's turns."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}> {% if m['role'] == 'assistant' %}{% generation %}"
        "{{ m['content'] }} <eos> {% endgeneration %}{% else %}{{ m['content'] }} {% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    row = {
        "prompt": [chats.message("user", "film")],
        "chosen": [chats.message(*each) for each in (("assistant", "good"), ("user", "plot"))]
        + [chats.message("assistant", "fine")],
        "rejected": [chats.message("assistant", "bad")],
    }
    with pytest.raises(ValueError, match="marks cover a message of role 'user'.* white space"):
        _tokenize([row], tokenizer, **ASSISTANT)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "<eos> {% endgeneration %}", "<eos>{% endgeneration %} "
    )
    (found,), _ = _tokenize([row], tokenizer, **ASSISTANT)
    assert _scored(found, "chosen", tokenizer) == "good <eos> fine <eos>"


def test_slow_tokenizers_and_templates_that_change_are_refused(monkeypatch):
    tokenizer = chats.tokenizer()
    kind = type(tokenizer)
    monkeypatch.setattr(kind, "is_fast", False)
    with pytest.raises(ValueError, match="needs a fast tokenizer.* got TokenizersBackend"):
        _tokenize([chats.pair()], tokenizer, **ASSISTANT)
    monkeypatch.undo()
    render, calls = kind.apply_chat_template, []

    def at_another_time(self, messages, **options):
        calls.append(messages)
        first = chats.message("system", str(len(calls)))
        return render(self, [first, *messages], **options)

    monkeypatch.setattr(kind, "apply_chat_template", at_another_time)
    with pytest.raises(ValueError, match="renders other tokens each time"):
        data.conversation_labels(tokenizer, chats.pair()["chosen"])


def test_labels_of_a_conversation():
    """`token_logprobs` with them scores the same tokens as the model's own logits do."""
    messages = chats.pair()["prompt"] + chats.pair()["chosen"]
    true = TOKENIZER.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    given = data.conversation_labels(TOKENIZER, messages)
    ids, mask = true["input_ids"], true["assistant_masks"]
    assert given["input_ids"] == ids
    assert given["labels"] == [t if kept else -100 for t, kept in zip(ids, mask, strict=True)]
    last = data.conversation_labels(TOKENIZER, messages, assistant_only_loss=False, **LAST)
    scored = [token for token in last["labels"] if token != -100]
    assert TOKENIZER.decode(scored) == f"good{END}"
    model = tiny.model(vocab_size=chats.SIZE).double()
    for each in (given, last):
        batch = {name: torch.tensor([values]) for name, values in each.items()}
        mine = prefkern.token_logprobs(model, batch["input_ids"], labels=batch["labels"])
        logits = model(batch["input_ids"]).logits[:, :-1].log_softmax(-1)
        labels = batch["labels"][:, 1:]
        own = logits.gather(2, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)
        torch.testing.assert_close(mine.double(), own, atol=1e-5, rtol=1e-5)
        gradient, expected = (
            torch.autograd.grad(x.sum(), [*model.parameters()]) for x in (mine, own)
        )
        for found, needed in zip(gradient, expected, strict=True):
            assert (found - needed).norm() <= 1e-5 * needed.norm().clamp(min=1)


@pytest.mark.parametrize(
    ("messages", "error", "says"),
    [
        ([], ValueError, r"messages must be a list of messages, got \[\]"),
        ("a", ValueError, "messages must be a list of messages, got 'a'"),
        ([{"content": "a"}], ValueError, "a message has no 'role'"),
    ],
)
def test_what_is_no_conversation_has_no_labels(messages, error, says):
    with pytest.raises(error, match=says):
        data.conversation_labels(TOKENIZER, messages)
    with pytest.raises(TypeError, match="last_turn_only must be True or False, got int 1"):
        data.conversation_labels(TOKENIZER, chats.pair()["prompt"], last_turn_only=1)


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "glm4moe"])
def test_arguments_of_calls_as_json_are_those_of_mappings(name):
    """A template that prints arguments as JSON would print text as JSON in JSON."""
    tokenizer = chats.tokenizer(chats.training_template(name))

    def written(messages: list[dict]) -> list[dict]:
        def as_text(call: dict) -> dict:
            function = call["function"]
            return {
                **call,
                "function": {**function, "arguments": json.dumps(function["arguments"])},
            }

        return [
            {**each, "tool_calls": [as_text(call) for call in each["tool_calls"]]}
            if each.get("tool_calls")
            else each
            for each in messages
        ]

    row = chats.trajectory()
    texts = {**row, **{part: written(row[part]) for part in ("prompt", *SIDES)}}
    found, true = (_tokenize([each], tokenizer, **ASSISTANT)[0][0] for each in (texts, row))
    assert found == true
