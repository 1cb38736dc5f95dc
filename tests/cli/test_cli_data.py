"""`prefkern data`: what it shows is what the trainer makes of the same file."""

from __future__ import annotations

import io
import json
import re

import pytest
import torch
from rich.console import Console

from support import chatml, foreign_cases, tiny

datasets = pytest.importorskip("datasets")
pytest.importorskip("accelerate")

import prefkern
from prefkern.cli import __main__ as cli
from prefkern.cli import data as command
from prefkern.data.shown import Tokens, token_texts

ROWS = [
    {"prompt": "Name a fruit.", "chosen": " An apple.\nIt is red.", "rejected": " A car."},
    {"prompt": "Name a colour.", "chosen": " Red.", "rejected": " Seven, I think."},
]
CHAT = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "chosen": [{"role": "assistant", "content": row["chosen"].strip()}],
        "rejected": [{"role": "assistant", "content": row["rejected"].strip()}],
    }
    for row in ROWS
]
TEXTS = [text for row in (*ROWS, *CHAT) for text in chatml.texts_of(json.dumps(row))]
TOKENIZER = chatml.tokenizer(TEXTS)


def _file(tmp_path, rows) -> str:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    TOKENIZER.save_pretrained(tmp_path / "model")
    return str(path)


def _argv(tmp_path, rows, *options: str) -> list[str]:
    return ["data", _file(tmp_path, rows), "--model", str(tmp_path / "model"), *options]


def _shown(tmp_path, rows, capsys, *options: str) -> str:
    assert cli.main(_argv(tmp_path, rows, *options)) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("rows", [ROWS, CHAT], ids=["text", "chat"])
def test_it_prints_the_report_and_the_tokens_of_training(rows, tmp_path, capsys):
    model = tiny.model("Qwen2", vocab_size=len(TOKENIZER))
    config = prefkern.PreferenceConfig(
        output_dir=str(tmp_path / "out"), report_to="none", use_cpu=True
    )
    trainer = prefkern.PreferenceTrainer(
        model,
        config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=TOKENIZER,
    )
    out = _shown(tmp_path, rows, capsys, "--rows", "2")
    name = str(tmp_path / "pairs.jsonl")
    report = str(trainer.dataset_reports["train"]).replace("train: ", f"{name}: ", 1)
    assert out.startswith(f"{report}\n")
    # The marks say which tokens have labels in the trainer's batch.
    lines = iter(re.split(r"\n(?:chosen|rejected): .*\n", out)[1:])
    for row in trainer.train_dataset:
        batch = trainer.data_collator([row])
        for side in range(2):
            length = int(batch["attention_mask"][side].sum())
            ids, labels = (batch[each][side, :length] for each in ("input_ids", "labels"))
            shown = next(lines).split("\n\n")[0].removesuffix("\n").replace("↵\n", "\n")
            prompt, response = shown.split("‖")
            assert prompt == TOKENIZER.decode(row["prompt_ids"]) and "⟦" not in prompt
            assert prompt + re.sub("[⟦⟧]", "", response) == TOKENIZER.decode(ids)
            scored = TOKENIZER.decode(ids[labels >= 0])
            assert re.findall("⟦(.*?)⟧", response, re.DOTALL) == [scored]
    assert next(lines, None) is None


def test_what_it_shows_of_a_row(tmp_path, capsys):
    out = _shown(tmp_path, CHAT, capsys, "--rows", "1")
    assert out.endswith("""\

pair 1 of 2

chosen: 12 tokens of prompt, 10 of response, 10 scored
<|im_start|>user↵
Name a fruit.<|im_end|>↵
<|im_start|>assistant↵
‖⟦An apple.↵
It is red.<|im_end|>↵
⟧

rejected: 12 tokens of prompt, 5 of response, 5 scored
<|im_start|>user↵
Name a fruit.<|im_end|>↵
<|im_start|>assistant↵
‖⟦A car.<|im_end|>↵
⟧

""")
    assert "pair" not in _shown(tmp_path, CHAT, capsys, "--rows", "0").split("\n\n")[-2]
    cut = _shown(tmp_path, ROWS, capsys, "--max-length", "5", "--truncation-mode", "keep_start")
    assert "chosen: 4 tokens of prompt, 1 of response, 1 scored\nName a fruit.‖⟦ An⟧\n" in cut
    assert "max_length is 5" in cut and "2 with a truncated response" in cut


def test_the_third_response_of_tpo(tmp_path, capsys):
    rows = [{**row, "reference": " Red."} for row in ROWS]
    out = _shown(tmp_path, rows, capsys, "--gold", "--rows", "1")
    assert "reference: 4 tokens of prompt, 3 of response, 3 scored\nName a fruit.‖⟦ Red." in out
    # In a format of others, too.
    rows = [{"question": "Name a fruit.", **{k: v for k, v in rows[0].items() if k != "prompt"}}]
    out = _shown(tmp_path, rows, capsys, "--gold")
    assert "  rejected    A car.\n  reference   Red.\n" in out
    assert "reference: 12 tokens of prompt" in out
    assert "reference: " not in _shown(tmp_path, rows, capsys)
    assert cli.main(_argv(tmp_path, ROWS, "--gold")) == 2
    assert "has no column 'reference', the third response" in capsys.readouterr().err
    assert cli.main(_argv(tmp_path, rows, "--gold", "--unpaired")) == 2
    assert "not allowed with argument" in capsys.readouterr().err


def test_single_responses(tmp_path, capsys):
    out = _shown(tmp_path, ROWS, capsys, "--unpaired", "--rows", "9")
    assert "4 responses" in out and out.count("\ndesirable: ") == out.count("\nundesirable: ") == 2
    single = [{"question": "Name a fruit.", "completion": "A car.", "label": False}]
    out = _shown(tmp_path, single, capsys)
    assert "1 row converted from Orca (question, completion, label)" in out
    assert "row 0\n  user        Name a fruit.\n  completion  A car.\n" in out
    assert "response 1 of 1\n\nundesirable: " in out and "‖⟦A car.<|im_end|>↵\n⟧" in out


@pytest.mark.parametrize("case", foreign_cases.CASES, ids=lambda case: case.home)
def test_rows_of_others_are_shown_as_they_are_read(case, tmp_path, capsys):
    tiny.tokenizer().save_pretrained(tmp_path / "tiny")
    path = _file(tmp_path, [case.before] * 2)
    assert cli.main(["data", path, "--model", str(tmp_path / "tiny")]) == 0
    out = capsys.readouterr().out
    assert f"2 rows converted from {case.name} (" in out and "row 1\n" in out
    assert out.count("‖⟦") == (4 if case.paired else 2)


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_training_shows_the_converted_rows_first(objective, tmp_path, capsys):
    rows = [
        {"instruction": "Name", "input": "a fruit.", "chosen": "An apple.", "rejected": "A car."},
        {"instruction": "Name", "input": "", "chosen": "Red.", "rejected": "Seven, I think."},
    ]
    path = _file(tmp_path, rows)
    tiny.model("Qwen2", vocab_size=len(TOKENIZER)).save_pretrained(tmp_path / "model")
    argv = ["train", "--model", str(tmp_path / "model"), "--dataset", path, "--use_cpu", "true"]
    argv += ["--objective", objective, "--max_steps", "1", "--report_to", "none"]
    assert cli.main([*argv, "--output_dir", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    read_as = "2 rows converted from Alpaca (instruction, input, chosen, rejected)"
    shown = f"{read_as}\n\nrow 0\n  user      Name\\na fruit.\n  chosen    An apple.\n"
    assert shown in out and "row 1\n  user      Name\n" in out
    assert out.index("row 1") < out.index("train_loss")
    unpaired = ["--unpaired"] if objective == "kto" else []
    assert cli.main(["data", path, "--model", str(tmp_path / "model"), *unpaired]) == 0
    report = capsys.readouterr().out.split(" 1 of ")[0].rsplit("\n\n", 1)[0]
    assert report.replace(path, "train", 1) in out


def test_on_a_terminal_scored_tokens_are_coloured(monkeypatch):
    ids = TOKENIZER("Name a fruit. An apple.")["input_ids"]
    # Some tokens of the response are not scored, as another speaker's are not.
    labels = [-100] * 4 + [ids[4], -100, ids[6]]
    tokens = Tokens.of("chosen", ids, labels, 4, TOKENIZER)
    assert str(tokens) == "Name a fruit.‖⟦ An⟧ apple⟦.⟧"
    assert tokens.title == "chosen: 4 tokens of prompt, 3 of response, 2 scored"
    monkeypatch.delenv("NO_COLOR", raising=False)
    drawn = io.StringIO()
    terminal = Console(file=drawn, force_terminal=True, color_system="standard", highlight=False)
    command.show_rows([("pair 1 of 1", [tokens])], terminal)
    grey, green, bright = "\x1b[2m", "\x1b[30;42m", "\x1b[30;102m"
    end = "\x1b[0m"
    assert f"{grey} fruit{end}{grey}.{end}\x1b[1;31m‖{end}{green} An{end}" in drawn.getvalue()
    assert f"{grey} apple{end}{green}.{end}" in drawn.getvalue() and "⟦" not in drawn.getvalue()
    scored = Tokens.of("chosen", ids, ids, 0, TOKENIZER)
    # Nothing predicts the first token. The shades change from token to token.
    assert str(scored) == "‖Name⟦ a fruit. An apple.⟧"
    drawn.seek(0)
    command.show_rows([("", [scored])], terminal)
    assert f"{bright} a{end}{green} fruit{end}" in drawn.getvalue()
    # Without colours the marks are all there is.
    drawn.seek(0), drawn.truncate()
    command.show_rows([("", [tokens])], Console(file=drawn, force_terminal=True, no_color=True))
    assert "‖⟦ An⟧ apple⟦.⟧" in drawn.getvalue()


def test_texts_of_tokens_are_the_text():
    text = "Name a fruit. An apple.\nIt is red."
    ids = TOKENIZER(text)["input_ids"]
    texts = token_texts(TOKENIZER, ids)
    assert "".join(texts) == text and texts[:3] == ("Name", " a", " fruit")
    words = tiny.tokenizer()
    assert token_texts(words, words("the film is")["input_ids"]) == ("the", " film", " is")
    assert token_texts(TOKENIZER, torch.tensor([]).tolist()) == ()

    class Bytes:
        """A tokenizer with a token for each byte."""

        def decode(self, ids, **_):
            return bytes(ids).decode(errors="replace")

    # A character of several tokens is whole at its last.
    assert token_texts(Bytes(), list("aé€b".encode())) == ("a", "", "é", "", "", "€", "b")
    # What never becomes a character is shown as such.
    assert token_texts(Bytes(), [97, 0xE2, 0x82]) == ("a", "", "�")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--rows", "-1"], "--rows must be at least 0, got -1"),
        (["--max-length", "1"], "--max-length must be at least 2, got 1"),
        (["--max-prompt-length", "0"], "--max-prompt-length must be at least 1, got 0"),
        (["--dataset_num_proc", "0"], "--dataset-num-proc must be at least 1, got 0"),
        (["--columns", "prompt"], "columns must be a mapping such as"),
        (["--columns", "prompt=qestion"], "has no column 'qestion'"),
        (["--truncation-mode", "middle"], "invalid choice: 'middle'"),
        (["--learning-rate", "1"], "unrecognized arguments"),
        (["--dataset-split", "train[:x]"], "cannot be loaded"),
    ],
)
def test_errors_are_one_line(options, says, tmp_path, capsys):
    assert cli.main(_argv(tmp_path, ROWS, *options)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("prefkern data: error: ") and says in error


def test_missing_inputs(tmp_path, capsys, monkeypatch):
    for argv, says in (
        (["none.jsonl", "--model", "hub/name"], "dataset 'none.jsonl': no such file or folder"),
        ([_file(tmp_path, ROWS), "--model", "./none"], "--model: no such folder: ./none"),
        ([_file(tmp_path, ROWS)], "the following arguments are required: --model"),
    ):
        assert cli.main(["data", *argv]) == 2
        assert says in capsys.readouterr().err
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert cli.main(_argv(tmp_path, ROWS)) == 2
    assert "this needs datasets, which is not installed: pip install" in capsys.readouterr().err


def test_turns_that_are_not_scored_are_shown_so(tmp_path, capsys):
    """By the same options as training: one message of a response of three."""
    said = [("assistant", "Red."), ("user", "Name a fruit."), ("assistant", "An apple.")]
    row = {**CHAT[0], "chosen": [{"role": role, "content": text} for role, text in said]}
    whole = _shown(tmp_path, [row], capsys)
    last = _shown(tmp_path, [row], capsys, "--last-turn-only")
    assert "Red.<|im_end|>" in whole.split("⟦")[1] and "scored turns of other roles" in whole
    assert last.split("⟦")[1].startswith("An apple.") and "tokens of responses not scored" in last
    assert cli.main(_argv(tmp_path, [row], "--assistant-only-loss")) == 2
    assert "{% generation %}" in capsys.readouterr().err


def test_several_files_have_a_report_and_rows_each(tmp_path, capsys):
    argv = _argv(tmp_path, ROWS)
    other = tmp_path / "chats.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in CHAT[:1]))
    argv = [argv[0], argv[1], str(other), *argv[2:]]
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    first = str(tmp_path / "pairs.jsonl")
    assert f"{first}: 2 pairs (" in out and f"{other}: 1 pairs (" in out
    for title in (f"pair 2 of 2 of {first}", f"pair 1 of 1 of {other}"):
        assert f"\n{title}\n" in out
    assert "are in the mix" not in out
    assert cli.main([*argv, "--dataset-weights", "1", "1"]) == 0
    out = capsys.readouterr().out
    assert "1 of them are in the mix" in out
    # Beside single responses pairs are taken one by one, as kto trains on them.
    single = {"prompt": "Name a fruit.", "completion": " Red.", "label": False}
    other.write_text(json.dumps(single) + "\n")
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert f"{first}: 4 responses (" in out and f"response 1 of 1 of {other}" in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--dataset-weights", "1"], "--dataset_weights has no effect on one dataset"),
        (["--dataset-weights", "1", "2"], "--dataset_weights has no effect on one dataset"),
    ],
)
def test_weights_of_one_file_are_refused(tmp_path, capsys, words, says):
    assert cli.main(_argv(tmp_path, ROWS, *words)) == 2
    assert says in capsys.readouterr().err


def test_wrong_weights_and_files_are_named(tmp_path, capsys):
    path = _file(tmp_path, ROWS)
    (tmp_path / "b.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    two = [path, str(tmp_path / "b.jsonl")]
    for words, says in (
        ([*two, "--dataset-weights", "1"], "--dataset_weights must be finite and above 0, one for"),
        ([*two, "--dataset-weights", "1", "0"], "--dataset_weights must be finite and above 0"),
        ([path, path], "dataset has"),
        ([path, "nowhere.jsonl"], "dataset 'nowhere.jsonl': no such file"),
    ):
        assert cli.main(["data", *words, "--model", str(tmp_path / "model")]) == 2
        assert says in capsys.readouterr().err
