"""Several datasets in one run: by sizes or weights, a report for each, resumed where it stopped."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")

from prefkern.data import DatasetMix
from support import tiny
from support.training import assert_same_weights, made, step_logs, trainer, weights

CHAT = {
    "prompt": [{"role": "user", "content": "film"}],
    "chosen": [{"role": "assistant", "content": "good"}],
    "rejected": [{"role": "assistant", "content": "bad"}],
}


def _parts(many: int = 12, few: int = 4) -> dict:
    """Text pairs, and conversations: each part has a format of its own."""
    return {"texts": tiny.dataset(many), "chats": made([CHAT] * few)}


def _chats(run) -> int:
    """How many rows of a run's dataset are the conversations."""
    true = trainer(run.args.output_dir, train_dataset=made([CHAT])).train_dataset[0]
    return sum(row["prompt_ids"] == true["prompt_ids"] for row in run.train_dataset)


def test_by_sizes_every_row_is_there_once(tmp_path):
    run = trainer(tmp_path, train_dataset=DatasetMix(_parts()), eval_dataset=DatasetMix(_parts(6)))
    assert len(run.train_dataset) == 16 and _chats(run) == 4
    assert {name: report.pairs for name, report in run.dataset_reports.items()} == {
        "train_texts": 12,
        "train_chats": 4,
        "eval_texts": 6,
        "eval_chats": 4,
    }
    run.train()
    assert len(step_logs(run)) == 4
    assert run.evaluate()["eval_loss"] > 0
    assert run.evaluate(DatasetMix(_parts(6))).keys() >= {"eval_loss"}


def test_by_weights_a_mix_ends_with_the_first_part(tmp_path):
    mix = DatasetMix(_parts(400, 400), [3, 1])
    run = trainer(tmp_path, train_dataset=mix)
    rows, chats = len(run.train_dataset), _chats(run)
    # The texts are drawn three times of four, and are used up first.
    assert rows - chats == 400
    assert abs(chats - 400 / 3) < 4 * math.sqrt(400 / 3)
    drawn = {name: report.drawn for name, report in run.dataset_reports.items()}
    assert drawn == {"train_texts": 400, "train_chats": chats}
    assert f"; {chats} of them are in the mix" in run.dataset_reports["train_chats"].summary
    same = trainer(tmp_path, train_dataset=mix).train_dataset
    assert same[:] == run.train_dataset[:]
    other = trainer(tmp_path, train_dataset=mix, seed=7).train_dataset
    assert other["prompt_ids"][:50] != same["prompt_ids"][:50]


def test_a_mix_resumes_where_it_stopped(tmp_path):
    given = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2}
    mix = DatasetMix(_parts(12, 12), [1.0, 2.0])
    whole = trainer(tmp_path / "a", train_dataset=mix, **given)
    whole.train()
    resumed = trainer(tmp_path / "b", train_dataset=mix, **given)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert [log["loss"] for log in step_logs(resumed)] == [log["loss"] for log in step_logs(whole)]
    assert_same_weights(weights(resumed.model), weights(whole.model), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("weights", "kind", "says"),
    [
        ([1.0], ValueError, r"one for each of 2 datasets, got \[1.0\]"),
        ([1.0, 0.0], ValueError, "finite and above 0"),
        ([1.0, math.nan], ValueError, "finite and above 0"),
        ([1.0, "2"], TypeError, "weights must be a list of numbers or None"),
        ("12", TypeError, "weights must be a list of numbers or None"),
        (3, TypeError, "weights must be a list of numbers or None"),
    ],
)
def test_weights_that_are_refused(weights, kind, says):
    with pytest.raises(kind, match=says):
        DatasetMix(_parts(), weights)


def test_parts_that_are_refused(tmp_path):
    with pytest.raises(TypeError, match="parts must be a mapping of names to datasets, got"):
        DatasetMix([tiny.dataset(3)])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="dataset 'train_other' has no column 'chosen'"):
        trainer(tmp_path, train_dataset=DatasetMix({**_parts(), "other": made([{"a": "b"}])}))
    carried = tiny.dataset(4)
    for column in ("ref_chosen_logps", "ref_rejected_logps"):
        carried = carried.add_column(column, [-9.0] * 4)
    with pytest.raises(
        ValueError, match="'train_texts' and 'train_sums' cannot be mixed.*'ref_chosen_logps'"
    ):
        trainer(tmp_path, train_dataset=DatasetMix({**_parts(), "sums": carried}))
    with pytest.raises(TypeError, match="or train on several as a prefkern.data.DatasetMix"):
        trainer(tmp_path, train_dataset=_parts())
