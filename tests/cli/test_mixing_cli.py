"""`prefkern train` on several datasets, by their sizes or by weights."""

from __future__ import annotations

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("peft")

import pyarrow
import pyarrow.parquet

from prefkern.cli import __main__ as cli
from prefkern.cli import train
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


@pytest.mark.parametrize(
    ("sources", "words", "says"),
    [
        ([0, 1], ["--dataset_weights", "1"], "one for each of 2 datasets, got [1.0]"),
        ([0, 1], ["--dataset_weights", "1", "-1"], "--dataset_weights must be finite and above 0"),
        ([0], ["--dataset_weights", "1"], "--dataset_weights has no effect on one dataset"),
        ([0, 0], [], "twice; give each dataset once"),
        ([0, "a.jsonl"], [], "dataset 'a.jsonl': no such file or folder"),
        ([0, "b.json"], [], "dataset 'b.json': no such file or folder"),
        ([0, "hub"], ["--eval_strategy", "epoch"], "--eval_dataset is required beside several"),
    ],
)
def test_what_is_refused_of_several_datasets(files, tmp_path, capsys, sources, words, says):
    rest, known = _files(files, tmp_path)
    named = [known[each] if isinstance(each, int) else each for each in sources]
    assert says in error([*flags(rest), "--dataset", *named, *words], capsys)
