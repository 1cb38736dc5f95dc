"""Runs on pictures: what is refused before a model is loaded, kept sums, evaluation, what is saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("PIL")

from accelerate import ParallelismConfig
from datasets import Dataset, Image, IterableDataset, List
from huggingface_hub import ModelCard

import prefkern
from prefkern import PreferenceConfig, PreferenceTrainer
from prefkern.data import DatasetMix, streams
from prefkern.training import context_parallel
from prefkern.training import pictures as of_training
from support import pictures, tiny
from support.pictures import IDEFICS, QWEN
from support.training import config
from support.versions import PARALLELISM


def text_first(count: int = 1) -> IterableDataset:
    """A stream that does not say what columns it has: some rows of text, then four with pictures."""
    text = {"prompt": "what is this", "chosen": " a red circle", "rejected": " a blue square"}
    rows = [text] * count + pictures.rows(QWEN, 4)
    return IterableDataset.from_generator(lambda: iter(rows))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding_free": True}, "padding_free is True and dataset 'train' has pictures: a packed"),
        (
            {"generate_samples": 2, "eval_dataset": True},
            "generate_samples is 2 and dataset 'train' has pictures: samples are of text alone",
        ),
        ({"assistant_only_loss": True}, "assistant_only_loss is not supported beside pictures"),
        (
            {"processing_class": tiny.tokenizer()},
            "which need the model's processor, and .* is none",
        ),
        ({"processing_class": None}, "the processor of 'nowhere', which pictures need, cannot be"),
        ({"train_dataset": "stream", "max_steps": 1}, "dataset 'train' is a stream with pictures"),
        ({"eval_dataset": "rows of text first"}, "dataset 'eval' is a stream with pictures"),
        (
            {"train_dataset": "rows of text first", "max_steps": 1},
            "dataset 'train' is a stream with pictures",
        ),
        PARALLELISM.param(
            {"parallelism_config": ParallelismConfig(cp_size=2)},
            r"context parallelism \(cp_size=2\) does not cut pictures, which dataset 'train' has",
        ),
    ],
)
def test_what_is_refused_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch, options, message
) -> None:
    # Context parallelism needs FSDP2 beside it, which needs several processes.
    monkeypatch.setattr(context_parallel, "mode_of", lambda args: "FSDP2")
    data = pictures.dataset(QWEN, 4)
    given = {"train_dataset": data, "processing_class": QWEN.make()[1]}
    for name in ("train_dataset", "eval_dataset", "processing_class"):
        if name in options:
            options = {**options}
            given[name] = options.pop(name)
    values = {"stream": data.to_iterable_dataset(), "rows of text first": text_first(), True: data}
    for name in ("train_dataset", "eval_dataset"):
        if isinstance(given.get(name), str | bool):
            given[name] = values[given[name]]
    # There is no such model, and that is no matter yet.
    with pytest.raises(ValueError, match=message):
        PreferenceTrainer("nowhere", config(tmp_path, **options), **given)


def test_a_model_of_text_is_refused(tmp_path: Path) -> None:
    _, processor = QWEN.make()
    blind = tiny.model("Qwen2")
    with pytest.raises(ValueError, match=r"Qwen2ForCausalLM takes none \(no pixel_values"):
        PreferenceTrainer(
            blind, config(tmp_path), pictures.dataset(QWEN, 4), processing_class=processor
        )


def test_sums_are_of_these_pictures(tmp_path: Path) -> None:
    """Kept sums are found again for the same pictures and processor, and for no others."""
    model, processor = QWEN.make()
    rows = pictures.rows(QWEN, 4)
    options = {"objective": "dpo", "precompute_ref_log_probs": True, "max_steps": 1}

    def kept(rows) -> int:
        PreferenceTrainer(
            model,
            config(tmp_path, **options),
            Dataset.from_list(rows),
            processing_class=processor,
        )
        return len([*(tmp_path / "reference-sums").iterdir()])

    assert kept(rows) == 1 and kept(rows) == 1
    # Of the same size, so that the tokens are the same.
    first = rows[0]["images"][0]
    other = {**rows[0], "images": [pictures.picture("black", "square", *first.size)]}
    assert kept([other, *rows[1:]]) == 2
    processor.image_processor.image_mean = [0.0, 0.0, 0.0]
    assert kept(rows) == 3


@pytest.mark.parametrize("name", ["images", "image"])
def test_the_hash_of_pictures_is_of_their_files(tmp_path: Path, name: str) -> None:
    _, processor = QWEN.make()
    path = tmp_path / "a.png"

    def found(colour: str) -> str:
        pictures.picture(colour, "circle").save(path)
        cell = str(path) if name == "image" else [str(path)]
        return of_training.hash_pictures(Dataset.from_list([{name: cell}] * 2), processor)

    assert found("red") == found("red") != found("blue")
    cell = str(path) if name == "image" else [str(path)]
    hashes = set()
    for mode in ("RGB", "L"):
        shape = Image(mode=mode)
        data = Dataset.from_list([{name: cell}])
        data = data.cast_column(name, shape if name == "image" else List(shape))
        hashes.add(of_training.hash_pictures(data, processor))
    assert len(hashes) == 2, "the mode in which files are read is left out"


def test_it_is_evaluated_saved_and_loaded_again(tmp_path: Path) -> None:
    model, processor = IDEFICS.make()
    data = pictures.dataset(IDEFICS, 8, chats=True)
    evaluation = pictures.dataset(IDEFICS, 4, seed=5, chats=True)
    options = {
        "objective": "dpo",
        "eval_strategy": "steps",
        "eval_steps": 1,
        "max_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "dataloader_num_workers": 1,
        "remove_unused_columns": True,
    }
    trained = PreferenceTrainer(
        model,
        config(tmp_path, **options),
        data,
        {"drawn": evaluation, "text": evaluation},
        processing_class=processor,
    )
    trained.train()
    again = trained.evaluate(evaluation)["eval_loss"]
    logs = [log for log in trained.state.log_history if "eval_drawn_loss" in log]
    assert logs[-1]["eval_drawn_loss"] == pytest.approx(again, rel=1e-6) and len(logs) == 2

    trained.save_model(str(tmp_path / "end"))
    for folder in (tmp_path / "end", tmp_path / "checkpoint-2"):
        files = {path.name for path in folder.iterdir()}
        assert {"processor_config.json", "tokenizer.json", "chat_template.jinja"} <= files, files
    card = ModelCard.load(tmp_path / "end/README.md")
    assert card.data.pipeline_tag == "image-text-to-text"
    assert "8 pairs with pictures" in card.text and "AutoModelForCausalLM" not in card.text
    assert 'pipeline("image-text-to-text", model="end")' in card.text

    pictures.skip_unless_idefics_loads()
    loaded = PreferenceTrainer(str(tmp_path / "end"), config(tmp_path / "more"), data)
    batch = next(iter(loaded.get_train_dataloader()))
    expected = prefkern.token_logprobs(trained.model, **batch)
    torch.testing.assert_close(prefkern.token_logprobs(loaded.model, **batch), expected)


def test_a_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    ends = []
    for name, start in (("whole", None), ("parts", "checkpoint-2")):
        model, processor = IDEFICS.make()
        options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        args: PreferenceConfig = config(tmp_path / name, **options)
        data = pictures.dataset(IDEFICS, 12)
        trained = PreferenceTrainer(model, args, data, processing_class=processor)
        trained.train(resume_from_checkpoint=start and str(tmp_path / "whole" / start))
        ends.append(trained.model.state_dict())
    for key, weight in ends[0].items():
        assert torch.equal(weight, ends[1][key]), key


def test_kwargs_of_the_loss_for_a_loop_of_ones_own() -> None:
    """`preference_outputs` on a batch that a processor made: what it holds goes to the model."""
    model, processor = QWEN.make()
    rows = pictures.rows(QWEN, 2)
    texts = [row["prompt"] + row[side] for side in ("chosen", "rejected") for row in rows]
    batch = processor(
        text=texts, images=[row["images"] for row in rows] * 2, padding=True, return_tensors="pt"
    )
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    loss_fn = prefkern.FusedPreferenceLoss(prefkern.objectives.build("simpo", beta=2.0, gamma=0.5))
    out = prefkern.preference_outputs(model, {**batch, "labels": labels}, loss_fn)
    logps = model(**batch).logits[:, :-1].log_softmax(-1)
    targets = labels[:, 1:]
    picked = logps.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * (targets != -100)
    found = torch.cat([out.chosen_logps, out.rejected_logps])
    torch.testing.assert_close(found, picked.sum(1), atol=1e-4, rtol=0)


def test_evaluation_on_text_after_pictures_and_on_pictures_after_text(tmp_path: Path) -> None:
    model, processor = QWEN.make()
    rows = pictures.rows(QWEN, 4)
    text = Dataset.from_list(
        [{"prompt": "what is this", "chosen": row["chosen"], "rejected": " a"} for row in rows]
    )
    seen = Dataset.from_list(rows)
    trained = PreferenceTrainer(model, config(tmp_path), seen, processing_class=processor)
    assert trained.evaluate(text)["eval_loss"] > 0
    trained = PreferenceTrainer(model, config(tmp_path), text, processing_class=processor)
    with pytest.raises(ValueError, match="'eval' has pictures, and those given to the constructor"):
        trained.evaluate(seen)


def test_pictures_after_the_first_rows_of_a_stream_are_refused(tmp_path: Path, monkeypatch) -> None:
    """A generator does not say what columns it has, and the first rows that are read have none."""
    monkeypatch.setattr(streams, "ROWS", 4)
    model, processor = QWEN.make()
    options = {"max_steps": 4, "objective": "simpo", "per_device_train_batch_size": 2}
    trained = PreferenceTrainer(
        model, config(tmp_path, **options), text_first(4), processing_class=processor
    )
    with pytest.raises(ValueError, match="in rows 4 to 7: dataset 'train' is a stream with pict"):
        trained.train()


def test_two_sets_with_pictures_are_mixed(tmp_path: Path) -> None:
    model, processor = QWEN.make()
    parts = {name: pictures.dataset(QWEN, 4, seed=at) for at, name in enumerate(("a", "b"))}
    options = {"objective": "dpo", "dataset_num_proc": 2}
    for weights in (None, [0.5, 0.5]):
        mix = DatasetMix(parts, weights)
        trained = PreferenceTrainer(
            model, config(tmp_path, **options), mix, processing_class=processor
        )
        trained.train()
        assert sum(each.pictures for each in trained.dataset_reports.values()) == 10
    blind = tiny.dataset(4)
    with pytest.raises(ValueError, match="cannot be mixed: one of them alone has 'images'; give"):
        PreferenceTrainer(
            model,
            config(tmp_path),
            DatasetMix({"a": parts["a"], "b": blind}),
            processing_class=processor,
        )
