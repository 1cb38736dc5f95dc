"""Streamed datasets: trained on as datasets are, read again at their end, resumed or refused."""

from __future__ import annotations

import pytest

pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")

from accelerate.data_loader import prepare_data_loader
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader

from prefkern.data import DatasetMix, streams
from prefkern.data.truncation import NothingToScore
from support import chats, tiny
from support.training import assert_same_weights, made, step_logs, stream, trainer, weights

ROWS = tiny.pairs(20)
# In the dataset's own order, as a stream is read.
IN_ORDER = {"train_sampling_strategy": "sequential"}


def _stream(rows=ROWS):
    return stream(rows)


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
        ({"eval_dataset": _stream([])}, ValueError, "dataset 'eval' is empty"),
        (
            {"train_dataset": DatasetMix({"a": tiny.dataset(4), "b": _stream()}, [1, 1])},
            TypeError,
            r"train_dataset mixes streams \('b'\) and datasets \('a'\): make all of them streams",
        ),
        (
            {"train_dataset": DatasetMix({"a": _stream(), "b": _stream()})},
            ValueError,
            "weights is None, and the sizes of streams are not known: give .* each of 'a', 'b'",
        ),
        (
            {"train_dataset": DatasetMix({"a": _stream(), "b": _stream([DIALOGUE, {}])}, [1, 0.5])},
            ValueError,
            "dataset 'train_b', row 1",
        ),
        (
            {"train_dataset": split_dataset_by_node(_stream(), rank=0, world_size=2)},
            ValueError,
            "train_dataset was split by split_dataset_by_node, and the trainer spreads a stream",
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
    given = {"objective": "simpo", "max_steps": 5, "dataset_num_proc": 2}
    alone = trainer(tmp_path, train_dataset=_stream(), **given)
    run = trainer(tmp_path, train_dataset=_stream(), dataloader_num_workers=workers, **given)
    assert _losses(run) == _losses(alone)


def _prompts(run, count: int) -> list[list[int]]:
    return [row["prompt_ids"] for row, _ in zip(run.train_dataset, range(count), strict=False)]


def test_workers_take_the_shards_of_a_stream(tmp_path):
    """Each row is read once before one is read again, and a run resumes on them bit for bit."""
    given = {"objective": "simpo", "max_steps": 8, "dataloader_num_workers": 2}
    given |= {"save_strategy": "steps", "save_steps": 3}
    sharded = stream(ROWS, shards=2)
    whole = trainer(tmp_path / "a", train_dataset=sharded, **given)
    loader = iter(whole.get_train_dataloader())
    batches = [next(loader)["input_ids"][:4].tolist() for _ in range(4)]
    seen = [tuple(token for token in row if token) for batch in batches for row in batch]
    assert len({*seen}) == 16
    losses = _losses(whole)
    resumed = trainer(tmp_path / "b", train_dataset=sharded, **given)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-6"))
    assert [log["loss"] for log in step_logs(resumed)] == losses
    assert_same_weights(weights(resumed.model), weights(whole.model), atol=0, rtol=0)


CHAT = {
    "prompt": [{"role": "user", "content": "film"}],
    "chosen": [{"role": "assistant", "content": "good"}],
    "rejected": [{"role": "assistant", "content": "bad"}],
}


def test_streams_are_mixed_by_weights(tmp_path):
    """Texts and conversations, three to one; one of them is read again while the other goes on."""
    mix = DatasetMix({"texts": _stream(), "chats": _stream([CHAT] * 3)}, [3, 1])
    given = {"objective": "simpo", "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    run = trainer(tmp_path / "a", train_dataset=mix, **given)
    (chat,) = trainer(tmp_path, train_dataset=made([CHAT])).train_dataset["prompt_ids"][:]
    prompts = _prompts(run, 400)
    assert abs(prompts.count(chat) - 100) < 4 * (400 * 3 / 16) ** 0.5
    own = [prompt for prompt in prompts if prompt != chat]
    texts = trainer(tmp_path, train_dataset=made(ROWS)).train_dataset["prompt_ids"][:]
    assert own[:40] == [*texts, *texts]
    names = {key: report.name for key, report in run.dataset_reports.items()}
    assert names == {f"train_{key}": f"train_{key}, first rows" for key in ("texts", "chats")}
    losses = _losses(run)
    again = trainer(tmp_path / "b", train_dataset=mix, **given)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert [log["loss"] for log in step_logs(again)] == losses
    for other in (DatasetMix(mix.parts, [1, 1]), DatasetMix(dict([*mix.parts.items()][:1]), [3])):
        differs = trainer(tmp_path / "c", train_dataset=other, **given)
        with pytest.raises(
            ValueError, match="or the weights or the seed of several streams differ"
        ):
            differs.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert _prompts(trainer(tmp_path, train_dataset=mix, seed=1, **given), 50) != prompts[:50]


def test_a_worker_without_a_shard_of_one_stream_reads_the_others(tmp_path):
    class Idle(streams.TokenStream):
        def __iter__(self):
            return iter(())

    run = trainer(tmp_path, train_dataset=_stream(), objective="simpo", max_steps=1)
    idle = Idle(_stream(), lambda rows: rows, made(ROWS), shuffles=False)
    mixed = streams.MixedStream([idle, run.train_dataset], [5, 1], seed=0)
    found = [row["prompt_ids"] for row, _ in zip(mixed, range(9), strict=False)]
    assert found == _prompts(run, 9)
    assert [*streams.MixedStream([idle], [1], seed=0)] == []


def test_a_stream_is_evaluated_on_whole(tmp_path):
    given = {"objective": "simpo", "train_dataset": made(ROWS)}
    expected = trainer(tmp_path, eval_dataset=made(ROWS[:5]), **given).evaluate()["eval_loss"]
    taken = _stream().take(5)
    run = trainer(tmp_path, eval_dataset={"a": taken, "b": DatasetMix({"c": taken})}, **given)
    assert run.dataset_reports["eval_a"].pairs == run.dataset_reports["eval_b_c"].pairs == 5
    found = run.evaluate()
    assert found["eval_a_loss"] == found["eval_b_loss"] == expected
    assert run.evaluate(taken)["eval_loss"] == run.predict(taken).metrics["test_loss"] == expected
    # The first row has no column of tools, and is read as a dataset's.
    ragged = datasets.IterableDataset.from_generator(lambda: iter([{"a": 1}, {"a": 2, "b": 3}]))
    assert streams.whole(ragged)["b"][:] == [None, 3]
