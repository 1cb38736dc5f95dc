"""`prefkern train` on several datasets, by their sizes or by weights, and on streams."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")
pytest.importorskip("peft")

import pyarrow
import pyarrow.parquet

from prefkern.cli import __main__ as cli
from prefkern.cli import train
from prefkern.data import load_preference_stream
from support.cards import card
from support.command_line import error, flags

CHAT = {
    "prompt": [{"role": "user", "content": "film"}],
    "chosen": [{"role": "assistant", "content": "good"}],
    "rejected": [{"role": "assistant", "content": "bad"}],
}


def _files(files: dict, tmp_path) -> tuple[dict, list[str]]:
    table = pyarrow.Table.from_pylist([CHAT] * 5)
    pyarrow.parquet.write_table(table, tmp_path / "chats.parquet")
    rest = {name: value for name, value in files.items() if name != "dataset"}
    return rest, [files["dataset"], str(tmp_path / "chats.parquet")]


def test_several_datasets_on_the_command_line(files, tmp_path, capsys):
    rest, sources = _files(files, tmp_path)
    argv = [*flags({**rest, "eval_fraction": 0.25}), "--dataset", *sources]
    assert cli.main(["train", *argv]) == 0
    out = capsys.readouterr().out
    for says in ("train_pairs: 9 pairs", "train_chats: 3 pairs", "eval_pairs: 3", "eval_chats: 2"):
        assert says in out
    text = card(tmp_path / "out").content
    assert "trained on 12 pairs of `pairs.jsonl, chats.parquet`" in text


def test_weights_on_the_command_line(files, tmp_path, capsys):
    rest, sources = _files(files, tmp_path)
    argv = [*flags(rest), "--dataset", *sources, "--dataset_weights", "3", "1"]
    assert train.parse(argv)[1].dataset_weights == [3.0, 1.0]
    assert cli.main(["train", *argv]) == 0
    out = capsys.readouterr().out
    assert "train_chats: 5 pairs" in out
    # A line of the report for each dataset.
    assert out.count(" of them are in the mix") == 2


def test_each_of_several_datasets_is_evaluated_on(files, tmp_path, capsys):
    rest, sources = _files(files, tmp_path)
    given = [*flags(rest), "--dataset", *sources, "--eval_dataset", *sources]
    given += ["--eval_strategy", "steps", "--metric_for_best_model", "eval_chats_loss"]
    assert cli.main(["train", *given]) == 0
    results = json.loads((tmp_path / "out/all_results.json").read_text())
    assert {"eval_pairs_loss", "eval_chats_loss"} <= results.keys()
    capsys.readouterr()


def test_streams_on_the_command_line(files, tmp_path, capsys):
    """In the files' order as datasets are trained on in theirs; mixed, shuffled and resumed."""
    rest, sources = _files(files, tmp_path)
    one = [*flags(rest), "--dataset", sources[0], "--logging_steps", "1"]

    def losses(*words: str) -> list[float]:
        assert cli.main(["train", *one, *words]) == 0
        state = json.loads((tmp_path / "out/trainer_state.json").read_text())
        return [log["loss"] for log in state["log_history"] if "loss" in log]

    streamed = losses("--streaming", "--shuffle_buffer", "0")
    assert streamed == losses("--train_sampling_strategy", "sequential")
    assert losses("--dataset_streaming") != streamed
    capsys.readouterr()
    words = ["--dataset", sources[1], "--dataset_weights", "3", "1", "--streaming"]
    words += ["--save_steps", "1"]
    first = losses(*words)
    out = capsys.readouterr().out
    assert "train_pairs, first rows: 12 pairs" in out
    assert "train_chats, first rows: 5 pairs" in out
    checkpoint = str(tmp_path / "out/checkpoint-1")
    assert losses(*words, "--resume_from_checkpoint", checkpoint) == first


def test_a_folder_and_a_saved_dataset_are_streamed(files, tmp_path):
    rows = [{"prompt": "the", "chosen": " film", "rejected": " plot"}] * 3
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("saved", "folder"):
        assert list(load_preference_stream(str(tmp_path / name))) == rows
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "chosen": "b"}\n')
    with pytest.raises(ValueError, match="bad.jsonl' has no column 'rejected'"):
        load_preference_stream(str(tmp_path / "bad.jsonl"))
    (tmp_path / "worse.jsonl").write_text('{"prompt": "a", \n')
    with pytest.raises(ValueError, match="worse.jsonl' cannot be loaded: line 1, column"):
        load_preference_stream(str(tmp_path / "worse.jsonl"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--streaming", "--max_steps", "-1"], "--streaming needs --max_steps above 0, got -1"),
        (["--streaming", "--eval_fraction", "0.1"], "--eval_fraction needs the number of rows"),
        (["--shuffle_buffer", "9"], "--shuffle_buffer has no effect without --streaming"),
        (["--streaming", "--shuffle_buffer", "-9"], "--shuffle_buffer must be >= 0, got -9"),
        (["--streaming", "--dataset_split", "train[:9]"], "split must be the name of a split"),
    ],
)
def test_what_is_refused_beside_a_stream(files, capsys, words, says):
    assert says in error([*flags(files), *words], capsys)


@pytest.mark.parametrize(
    ("sources", "words", "says"),
    [
        ([0, 1], ["--dataset_weights", "1"], "one for each of 2 datasets, got [1.0]"),
        ([0, 1], ["--dataset_weights", "1", "-1"], "--dataset_weights must be finite and above 0"),
        ([0], ["--dataset_weights", "1"], "--dataset_weights has no effect on one dataset"),
        ([0, 0], [], "twice; give each dataset once"),
        (
            [0, 1],
            ["--eval_dataset", "a.jsonl", "a.jsonl"],
            "--eval_dataset has a.jsonl twice; give",
        ),
        ([0, 1], ["--streaming"], "--streaming of several datasets needs --dataset_weights"),
        ([0, "a.jsonl"], [], "dataset 'a.jsonl': no such file or folder"),
        ([0, "b.json"], [], "dataset 'b.json': no such file or folder"),
        ([0, "hub"], ["--eval_strategy", "epoch"], "--eval_dataset is required beside several"),
    ],
)
def test_what_is_refused_of_several_datasets(files, tmp_path, capsys, sources, words, says):
    rest, known = _files(files, tmp_path)
    named = [known[each] if isinstance(each, int) else each for each in sources]
    assert says in error([*flags(rest), "--dataset", *named, *words], capsys)
