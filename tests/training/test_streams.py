"""Streamed datasets: trained on as datasets are, read again at their end, resumed or refused."""

from __future__ import annotations

import pytest

pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")

from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from prefkern.data import streams
from prefkern.data.truncation import NothingToScore
from support import chats, tiny
from support.training import assert_same_weights, made, step_logs, trainer, weights

ROWS = tiny.pairs(20)
# In the dataset's own order, as a stream is read.
IN_ORDER = {"train_sampling_strategy": "sequential"}


def _stream(rows=ROWS):
    return datasets.IterableDataset.from_generator(lambda: iter(rows))


def _losses(run) -> list[float]:
    run.train()
    return [log["loss"] for log in step_logs(run)]


@pytest.mark.parametrize("group", [3, 256])
@pytest.mark.parametrize("objective", ["dpo", "simpo", "tdpo1"])
def test_a_stream_trains_as_a_dataset_in_its_order(tmp_path, monkeypatch, objective, group):
    """However many rows are tokenised together; it is read again when it ends."""
    monkeypatch.setattr(streams, "ROWS", group)
    given = {"objective": objective, "max_steps": 8, "ref_model": tiny.model(seed=1)}
    whole = trainer(tmp_path, train_dataset=made(ROWS), **given, **IN_ORDER)
    run = trainer(tmp_path, train_dataset=_stream(), **given)
    assert _losses(run) == _losses(whole)
    assert len(step_logs(run)) == 8
    assert_same_weights(weights(run.model), weights(whole.model), atol=0, rtol=0)
    report = run.dataset_reports["train"]
    assert (report.name, report.pairs) == ("train, first rows", min(group, 20))


def test_turns_and_layouts_of_a_stream(tmp_path):
    rows = [chats.pair(number) for number in range(8)]
    given = {
        "objective": "dpo",
        "max_steps": 2,
        "last_turn_only": True,
        "padding_free": True,
        "share_prompt": True,
    }
    whole = trainer(tmp_path, train_dataset=made(rows), **given, **IN_ORDER)
    run = trainer(tmp_path, train_dataset=_stream(rows), **given)
    assert "chosen_mask" in run.train_dataset.column_names
    assert _losses(run) == _losses(whole)


def test_single_responses_of_a_stream_are_mixed(tmp_path):
    run = trainer(
        tmp_path,
        train_dataset=_stream(),
        objective="kto",
        max_steps=3,
        ref_model=tiny.model(seed=1),
    )
    rows = [row for row, _ in zip(run.train_dataset, range(40), strict=False)]
    assert sum(row["desirable"] for row in rows) == 20
    assert 0 < sum(row["desirable"] for row in rows[:20]) < 20
    assert len(_losses(run)) == 3


def test_sums_that_a_stream_carries_are_used(tmp_path):
    first = trainer(
        tmp_path,
        train_dataset=made(ROWS),
        objective="dpo",
        precompute_ref_log_probs=True,
        ref_model=tiny.model(seed=1),
    )
    carried = [*first.train_dataset]
    run = trainer(tmp_path, train_dataset=_stream(carried), objective="dpo", max_steps=2)
    given = {"objective": "dpo", "max_steps": 2, "ref_model": tiny.model(seed=1)}
    other = trainer(tmp_path, train_dataset=_stream(), **given)
    assert run.ref_model is None
    assert _losses(run) == pytest.approx(_losses(other), rel=1e-5)


DIALOGUE = {
    "chosen": "\n\nHuman: film ?\n\nAssistant: the plot is good",
    "rejected": "\n\nHuman: film ?\n\nAssistant: the plot is bad",
}
ASKED = {"question": "film", "chosen": "very good", "rejected": "very bad"}
REPEATED = {"question": "film", "chosen": "film is good", "rejected": "film is bad"}
FILM = {"chosen": "the film is good", "rejected": "the film is bad"}


@pytest.mark.parametrize(
    "rows", [[ASKED] * 4 + [REPEATED], [FILM] * 4 + [DIALOGUE] * 4], ids=["question", "dialogue"]
)
def test_the_first_rows_decide_on_the_format_of_a_stream(tmp_path, monkeypatch, rows):
    """A few rows at its end may look like another one."""
    monkeypatch.setattr(streams, "ROWS", 4)
    given = {"objective": "simpo", "max_steps": 2}
    run = trainer(tmp_path, train_dataset=_stream(rows), **given)
    whole = trainer(tmp_path, train_dataset=made(rows), **given)
    found = [row for row, _ in zip(run.train_dataset, rows, strict=False)]
    assert found == [*whole.train_dataset]


def test_rows_of_another_format_than_the_first_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "ROWS", 4)
    stream = _stream([DIALOGUE] * 4 + [FILM] * 4)
    run = trainer(tmp_path, train_dataset=stream, objective="simpo", max_steps=2)
    with pytest.raises(
        ValueError, match="in rows 4 to 7: .* row 0, read as HH: .* different quest"
    ):
        run.train()


def test_the_first_rows_have_the_columns_of_all():
    first = streams.first_rows(_stream([ASKED, {**ASKED, "system": "be brief"}]), "train")
    assert first["system"][:] == [None, "be brief"]


def test_a_stream_without_a_row_to_train_on_ends():
    """As a worker's part of one may be."""

    def tokenize(rows):
        raise NothingToScore

    stream = streams.TokenStream(_stream(), tokenize, made(ROWS), shuffles=False)
    assert [*stream] == []


@pytest.mark.parametrize("stop", [2, 6])
def test_a_stream_resumes_where_it_stopped(tmp_path, stop):
    """Also after it was read a second time: 20 pairs are five batches."""
    given = {"objective": "adadpo", "max_steps": 8, "save_strategy": "steps", "save_steps": 2}
    given |= {"ref_model": tiny.model(seed=1), "logging_steps": 1}
    whole = trainer(tmp_path / "a", train_dataset=_stream(), **given)
    losses = _losses(whole)
    resumed = trainer(tmp_path / "b", train_dataset=_stream(), **given)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{stop}"))
    assert [log["loss"] for log in step_logs(resumed)] == losses
    assert_same_weights(weights(resumed.model), weights(whole.model), atol=0, rtol=0)


def test_another_stream_does_not_resume(tmp_path):
    given = {"objective": "simpo", "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, train_dataset=_stream(), **given).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    other = trainer(tmp_path / "b", train_dataset=_stream(ROWS[1:]), **given)
    with pytest.raises(ValueError, match="first rows are not those that .*checkpoint-2 was"):
        other.train(resume_from_checkpoint=checkpoint)
    goes_on = trainer(
        tmp_path / "c", train_dataset=_stream(ROWS[1:]), ignore_data_skip=True, **given
    )
    goes_on.train(resume_from_checkpoint=checkpoint)
    assert goes_on.state.global_step == 4


def test_later_rows_are_checked_as_they_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "ROWS", 4)
    empty = [{**row, "chosen": " "} for row in ROWS[4:8]]
    run = trainer(tmp_path, train_dataset=_stream(ROWS[:4] + empty + ROWS[8:]), max_steps=3)
    # A group without a pair that can be scored is passed over.
    assert len(_losses(run)) == 3
    wrong = [*ROWS[:9], {**ROWS[9], "rejected": None}, *ROWS[10:]]
    run = trainer(tmp_path, train_dataset=_stream(wrong), max_steps=5)
    with pytest.raises(ValueError, match="in rows 8 to 11: dataset 'train', row 1: 'rejected'"):
        run.train()


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"max_steps": -1}, ValueError, "max_steps is -1, and train_dataset is a stream"),
        ({"precompute_ref_log_probs": True}, ValueError, "precompute_ref_log_probs is True, which"),
        (
            {"max_tokens_per_batch": 99, "padding_free": True},
            ValueError,
            "max_tokens_per_batch is 99, which needs all rows",
        ),
        (
            {"accelerator_config": {"dispatch_batches": True}},
            ValueError,
            "dispatch_batches cuts a batch by its rows",
        ),
        ({"eval_dataset": _stream()}, TypeError, "eval_dataset must be a datasets.Dataset, got a"),
        (
            {"eval_dataset": {"a": tiny.dataset(4), "b": _stream()}},
            TypeError,
            "take rows of it: datasets.Dataset.from_list",
        ),
        ({"train_dataset": _stream([])}, ValueError, "dataset 'train' is empty"),
        ({"train_dataset": _stream([{"a": "b"}])}, ValueError, "'train' has no column 'chosen'"),
        (
            {"train_dataset": _stream([{**ROWS[0], "chosen": " "}])},
            ValueError,
            "dataset 'train' has no pair with two responses that can be scored",
        ),
    ],
)
def test_what_is_refused_of_a_stream(tmp_path, options, kind, says):
    given = {"train_dataset": _stream(), "max_steps": 2, **options}
    if "max_tokens_per_batch" in given:
        given["per_device_train_batch_size"] = 8
    with pytest.raises(kind, match=says):
        trainer(tmp_path, **given)


def test_ranks_take_their_own_rows_of_a_stream(tmp_path):
    """Pairs are spread before they are collated, so that none is cut in two."""
    run = trainer(tmp_path, train_dataset=_stream(), objective="simpo", max_steps=2)
    assert run.accelerator.dispatch_batches is False
    first = [row["prompt_ids"] for row, _ in zip(run.train_dataset, range(16), strict=False)]
    found = []
    for rank in range(2):
        loader = prepare_data_loader(
            DataLoader(run.train_dataset, batch_size=4, collate_fn=lambda rows: rows),
            num_processes=2,
            process_index=rank,
            dispatch_batches=run.accelerator.dispatch_batches,
        )
        batches = iter(loader)
        found.append([[row["prompt_ids"] for row in next(batches)] for _ in range(2)])
    spread = [row for batches in zip(*found, strict=True) for batch in batches for row in batch]
    assert spread == first


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_read_a_stream_once(tmp_path, workers):
    given = {"objective": "simpo", "max_steps": 5}
    alone = trainer(tmp_path, train_dataset=_stream(), **given)
    run = trainer(tmp_path, train_dataset=_stream(), dataloader_num_workers=workers, **given)
    assert _losses(run) == _losses(alone)
