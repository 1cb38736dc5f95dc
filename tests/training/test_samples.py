"""`generate_samples`: the model's responses at evaluation, in the terminal and in trackers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
peft = pytest.importorskip("peft")

from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from prefkern import PreferenceConfig, PreferenceTrainer
from prefkern.training import samples
from support import tiny
from support.command_line import flags
from support.ranks import run_on_two_ranks

NEW = 5


def made(folder: Path, model: Any = None, eval_dataset: Any = None, **options: Any) -> Any:
    given = {"generate_samples": 2, "generate_max_new_tokens": NEW, "max_steps": 4, "eval_steps": 2}
    given |= {"report_to": "none", "use_cpu": True, "eval_strategy": "steps", "disable_tqdm": True}
    given |= {"objective": "dpo", "learning_rate": 1e-2, "per_device_train_batch_size": 2}
    return PreferenceTrainer(
        tiny.model() if model is None else model,
        PreferenceConfig(str(folder), **{**given, **options}),
        train_dataset=tiny.dataset(8),
        eval_dataset=tiny.dataset(3) if eval_dataset is None else eval_dataset,
        processing_class=tiny.tokenizer(),
    )


def likeliest(model: Any, prompt: list[int]) -> list[int]:
    """The response token by token, each from the whole row without a cache."""
    ids = list(prompt)
    for _ in range(NEW):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tiny.tokenizer().eos_token_id:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding_free": True, "share_prompt": True},
        {"bf16": True},
        {"gradient_checkpointing": False},
    ],
    ids=["padded", "packed", "bf16", "not checkpointed"],
)
def test_responses_are_the_models_own(options, tmp_path, capsys) -> None:
    trainer = made(tmp_path, **options)
    trainer.train()
    trainer.evaluate()
    rows = shower(trainer)._rows
    # At steps 2 and 4; the evaluation after training is of step 4 again.
    assert [step for step, *_ in rows] == [2, 2, 4, 4]
    model, tokenizer = trainer.model.eval(), tiny.tokenizer()
    for row, (_, prompt, response) in zip(trainer.eval_dataset, rows[2:], strict=False):
        assert prompt == tokenizer.decode(row["prompt_ids"], skip_special_tokens=True) != ""
        if not options.get("bf16"):
            ids = likeliest(model, row["prompt_ids"])
            assert response == tokenizer.decode(ids, skip_special_tokens=True)
    out = capsys.readouterr().out
    assert out.index("Step 2") < out.index("Step 4") and out.count("Step 4") == 1
    assert all(text.split()[0] in out for _, *texts in rows for text in texts if text.strip())


def shower(trainer: Any) -> samples.ShowsSamples:
    callbacks = trainer.callback_handler.callbacks
    (found,) = (each for each in callbacks if isinstance(each, samples.ShowsSamples))
    return found


def test_a_run_with_samples_trains_like_one_without(tmp_path) -> None:
    """Bit for bit, with dropout, which draws from the same generator."""
    weights = []
    for count in (0, 2):
        options = {"disable_dropout": False, "seed": 3, "generate_samples": count}
        trainer = made(tmp_path / str(count), tiny.model(attention_dropout=0.3), **options)
        trainer.train()
        weights.append(trainer.model.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_an_adapter_answers_and_several_datasets_are_asked_once(tmp_path) -> None:
    model = peft.get_peft_model(tiny.model(), peft.LoraConfig(init_lora_weights=False))
    sets = {"a": tiny.dataset(2), "b": tiny.dataset(4)}
    trainer = made(tmp_path, model, sets, generate_samples=9)
    trainer.evaluate()
    rows = shower(trainer)._rows
    assert [step for step, *_ in rows] == [0, 0]
    prompts = [row["prompt_ids"] for row in trainer.eval_dataset["a"]]
    texts = [tiny.tokenizer().decode(likeliest(model.eval(), ids)) for ids in prompts]
    decoded = [text.replace("<eos>", "").strip() for text in texts]
    assert [response.strip() for *_, response in rows] == decoded


class Table:
    """As wandb.Table and trackio.Table: of a DataFrame."""

    def __init__(self, dataframe: Any) -> None:
        self.rows = dataframe.to_dict("split")


def test_trackers_get_the_table(tmp_path, caplog) -> None:
    """By the attributes that transformers' callbacks have; each tracker's own API is below."""
    trainer = made(tmp_path)
    logged: list[dict[str, Any]] = []
    texts: list[tuple[Any, ...]] = []
    tracker = SimpleNamespace(Table=Table, log=logged.append)
    for kind, name in ((WandbCallback, "_wandb"), (TrackioCallback, "_trackio")):
        callback = kind.__new__(kind)
        setattr(callback, name, tracker)
        trainer.callback_handler.callbacks.append(callback)
    board = TensorBoardCallback.__new__(TensorBoardCallback)
    board.tb_writer = SimpleNamespace(add_text=lambda *given: texts.append(given))
    trainer.callback_handler.callbacks.append(board)
    shows = shower(trainer)
    for step in (1, 2):
        trainer.state.global_step = step
        shows.on_evaluate(trainer.args, trainer.state, trainer.control)
    steps = [[row[0] for row in each["samples"].rows["data"]] for each in logged]
    # Both trackers, with the rows of earlier evaluations.
    assert steps == [[1, 1], [1, 1], [1, 1, 2, 2], [1, 1, 2, 2]]
    assert logged[0]["samples"].rows["columns"] == ["step", "prompt", "response"]
    assert [each["train/global_step"] for each in logged] == [1, 1, 2, 2]
    assert [(name, step) for name, _, step in texts] == [("samples", 1), ("samples", 2)]
    head, line, *rows = texts[1][1].splitlines()
    assert head == "| step | prompt | response |" and line == "|---|---|---|"
    assert len(rows) == 2 and all(row.startswith("| 2 | ") for row in rows)
    text = samples._markdown([(3, "a|b", "c\nd")])
    assert text.endswith("| 3 | a\\|b | c<br>d |")
    config = SimpleNamespace(generate_samples=1, report_to=["mlflow", "wandb"])
    config.fsdp_plugin_args = config.deepspeed_plugin = config.deepspeed = None
    config.parallel_mode = SimpleNamespace(value="not_distributed")
    samples.check_samples(config, tiny.dataset(2))
    assert "generate_samples: mlflow has no table of them" in caplog.text


def test_tensorboard_reads_them(tmp_path, monkeypatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = made(tmp_path, report_to="tensorboard")
    trainer.train()
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    texts = [
        (event.step, event.tensor_proto.string_val[0].decode())
        for event in events.Tensors("samples/text_summary")
    ]
    assert [step for step, _ in texts] == [2, 4]
    assert all("| step | prompt | response |" in text for _, text in texts)


def test_wandb_takes_them(tmp_path, monkeypatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    trainer = made(tmp_path, report_to="wandb")
    trainer.train()
    files = [*(tmp_path / "wandb").rglob("samples*.table.json")]
    assert files and all(
        '"columns":["step","prompt","response"]' in file.read_text().replace(" ", "")
        for file in files
    )
    wandb.finish()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"generate_samples": -1}, "generate_samples must be an int >= 0, got -1"),
        ({"generate_samples": True}, "generate_samples must be an int >= 0, got True"),
        ({"generate_max_new_tokens": 0}, "generate_max_new_tokens must be an int >= 1, got 0"),
    ],
)
def test_numbers(options, said, tmp_path) -> None:
    with pytest.raises(ValueError, match=said):
        made(tmp_path, **options)


def test_where_there_are_none(tmp_path, monkeypatch) -> None:
    with pytest.raises(
        ValueError, match="generate_samples is 2, and without eval_dataset there are"
    ):
        PreferenceTrainer(
            tiny.model(),
            PreferenceConfig(str(tmp_path), generate_samples=2, report_to="none", use_cpu=True),
            train_dataset=tiny.dataset(4),
            processing_class=tiny.tokenizer(),
        )
    monkeypatch.setattr(samples, "mode_of", lambda args: "FSDP2")
    with pytest.raises(ValueError, match="generate_samples is not supported under FSDP2, which"):
        made(tmp_path)


@pytest.mark.long
def test_the_first_of_two_ranks_answers(tmp_path) -> None:
    """The other waits for it, and both train on."""
    tiny.model().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    tiny.dataset(8).to_json(tmp_path / "pairs.jsonl")
    given = {
        "model": tmp_path / "model",
        "dataset": tmp_path / "pairs.jsonl",
        "eval_fraction": 0.5,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "max_steps": 2,
        "generate_samples": 1,
        "output_dir": tmp_path / "out",
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    first, second = run_on_two_ranks("-m", "prefkern.cli", "train", *flags(given))
    assert first.count("Step 1") == first.count("Step 2") == 1
    assert "Step" not in second and (tmp_path / "out/model.safetensors").exists()
