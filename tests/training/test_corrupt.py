"""Damaged or hostile files, or files of another run, are named in an error and never executed.

The hostile file is a pickle that makes a folder when it is loaded. The tests assert that there is
no such folder.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from support import tiny

pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")

import prefkern.cli.__main__ as cli
from prefkern import PreferenceTrainer, data
from prefkern.training import checkpoint_files, files
from prefkern.training.checkpoint_files import CheckpointError
from support.training import config, lora, trainer, weights

RUN = {"count": 8, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}


def full(path: Path, **options) -> PreferenceTrainer:
    return trainer(path, **{**RUN, "objective": "alphadpo", **options})


def adapted(path: Path, **options) -> PreferenceTrainer:
    return trainer(path, **{**RUN, "objective": "dpo", "peft_config": lora(), **options})


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    """Folders with checkpoint-1 and checkpoint-2, of a whole model and of an adapter."""
    folders = {}
    for name, make in (("full", full), ("adapter", adapted)):
        folders[name] = tmp_path_factory.mktemp(name)
        make(folders[name]).train()
    return folders


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return shutil.copytree(saved["full"], tmp_path / "run")


class Execute:
    """A pickle of this makes a folder when it is loaded."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self):
        return os.mkdir, (str(self.made),)


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGES = {
    "model.safetensors": (halve, "SafetensorError"),
    "optimizer.pt": (halve, "PytorchStreamReader"),
    "scheduler.pt": (halve, "PytorchStreamReader"),
    "rng_state.pth": (halve, "Error"),
    "objective.pt": (halve, "PytorchStreamReader"),
    "since_last_log.pt": (halve, "PytorchStreamReader"),
    "trainer_state.json": (halve, "JSONDecodeError"),
    "config.json": (halve, "JSONDecodeError"),
    "unsaved_weights.json": (halve, "JSONDecodeError"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_named(folder, name, caplog):
    damage, reason = DAMAGES[name]
    file = folder / "checkpoint-2" / name
    damage(file)
    with pytest.raises(CheckpointError, match="resume from .*checkpoint-1$") as error:
        full(folder).train(resume_from_checkpoint=str(file.parent))
    assert str(file) in str(error.value)
    assert "is damaged or was not written to its end" in str(error.value)
    assert reason in str(error.value)
    # And passed over where the last complete one is asked for.
    assert checkpoint_files.last_complete(folder) == folder / "checkpoint-1"
    assert f"resuming from {folder / 'checkpoint-1'}: {file} is damaged" in caplog.text


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("trainer_state.json", "it has no trainer_state.json, which is written last"),
        ("model.safetensors", "it has no weights"),
        ("optimizer.pt", "it has no optimizer.pt"),
        ("scheduler.pt", "it has no scheduler.pt"),
    ],
)
def test_a_missing_file_is_named(folder, missing, message):
    (folder / "checkpoint-2" / missing).unlink()
    with pytest.raises(CheckpointError, match=f"checkpoint-2 is incomplete: {message}"):
        checkpoint_files.require_complete(folder / "checkpoint-2")


def test_a_missing_shard_is_named(folder):
    checkpoint = folder / "checkpoint-2"
    tensors = load_file(checkpoint / "model.safetensors")
    names = sorted(tensors)
    parts = {
        "model-00001-of-00002.safetensors": names[:5],
        "model-00002-of-00002.safetensors": names[5:],
    }
    for part, own in parts.items():
        save_file({name: tensors[name] for name in own}, checkpoint / part, {"format": "pt"})
    (checkpoint / "model.safetensors").unlink()
    weight_map = {name: part for part, own in parts.items() for name in own}
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert checkpoint_files.problem(checkpoint) is None
    run = full(folder)
    run._load_from_checkpoint(str(checkpoint))
    torch.testing.assert_close(
        weights(run.model), tensors | {"lm_head.weight": tensors["lm_head.weight"]}
    )
    (checkpoint / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match="no model-00002-of-00002.safetensors, which model.saf"
    ):
        checkpoint_files.require_complete(checkpoint)


def test_no_complete_checkpoint(folder, tmp_path):
    for number in (1, 2):
        halve(folder / f"checkpoint-{number}" / "optimizer.pt")
    with pytest.raises(CheckpointError, match="holds no complete checkpoint; .*-2/optim.*-1/optim"):
        full(folder).train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match="damaged .*; start anew, without it"):
        full(folder).train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    with pytest.raises(CheckpointError, match="must be a folder, True or None, got .*nowhere"):
        full(folder).train(resume_from_checkpoint=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    "name",
    [
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "objective.pt",
        "since_last_log.pt",
        "training_args.bin",
    ],
)
@pytest.mark.parametrize("way", ["torch", "pickle"])
def test_nothing_in_a_checkpoint_is_executed(folder, tmp_path, name, way):
    made = tmp_path / "executed"
    file = folder / "checkpoint-2" / name
    if way == "torch":
        torch.save({"state": Execute(made)}, file)
    else:
        file.write_bytes(pickle.dumps(Execute(made)))
    if name == "training_args.bin":
        # Nobody reads it.
        full(folder).train(resume_from_checkpoint=str(file.parent))
    else:
        with pytest.raises(CheckpointError, match=f"checkpoint-2/{name} is damaged") as error:
            full(folder).train(resume_from_checkpoint=str(file.parent))
        assert way == "pickle" or "it would call posix.mkdir" in str(error.value)
    assert not made.exists()


def test_pickled_weights_are_not_executed(folder, tmp_path):
    """Neither a model's nor a checkpoint's."""
    made = tmp_path / "executed"
    checkpoint = folder / "checkpoint-2"
    (checkpoint / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Execute(made)}, checkpoint / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pytorch_model.bin is damaged"):
        full(folder).train(resume_from_checkpoint=str(checkpoint))
    with pytest.raises(Exception, match=r"weights_only|Weights only|unsafe|Unsupported"):
        PreferenceTrainer(str(checkpoint), config(tmp_path), tiny.dataset(4))
    assert not made.exists()


def test_code_of_others_is_not_executed(folder, tmp_path):
    """Neither model code, nor a dataset's script, nor a chat template that leaves its sandbox."""
    made = tmp_path / "executed"
    model = folder / "checkpoint-2"
    code = f"import os\nos.mkdir({str(made)!r})\n"
    (model / "evil.py").write_text(code)
    described = json.loads((model / "config.json").read_text())
    described["auto_map"] = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    described["model_type"] = "evil"
    (model / "config.json").write_text(json.dumps(described))
    with pytest.raises((ValueError, KeyError)):
        PreferenceTrainer(str(model), config(tmp_path), tiny.dataset(4))

    script = tmp_path / "scripted"
    script.mkdir()
    (script / "scripted.py").write_text(code)
    with pytest.raises(ValueError, match="scripted' cannot be loaded"):
        data.load_preference_dataset(str(script))

    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        f"{{{{ ''.__class__.__mro__[1].__subclasses__() }}}}{{{{ cycler.__init__.__globals__.os"
        f".mkdir('{made}') }}}}"
    )
    message = [{"role": "user", "content": "good"}]
    rows = [{"prompt": message, "chosen": message, "rejected": message}]
    with pytest.raises(ValueError, match="row 0: the chat template does not take these messages"):
        data.tokenize_preferences(datasets.Dataset.from_list(rows), tokenizer)
    assert not made.exists()


def test_a_checkpoint_of_another_model(folder, saved, tmp_path):
    whole, adapter = (str(saved[name] / "checkpoint-2") for name in ("full", "adapter"))
    for model in (tiny.model(hidden_size=16), tiny.model(num_hidden_layers=3), tiny.model("Qwen3")):
        with pytest.raises(CheckpointError, match="is of another model than this .*has shape"):
            full(tmp_path, model=model).train(resume_from_checkpoint=whole)
    with pytest.raises(CheckpointError, match="holds an adapter, .* without an adapter"):
        full(tmp_path).train(resume_from_checkpoint=adapter)
    with pytest.raises(CheckpointError, match="holds a whole model, and the model has an adapter"):
        adapted(tmp_path).train(resume_from_checkpoint=whole)
    for change in ({"r": 2}, {"target_modules": ["q_proj"]}):
        other = peft.LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", **change})
        with pytest.raises(CheckpointError, match="another adapter than 'default' .*has shape"):
            adapted(tmp_path, peft_config=other).train(resume_from_checkpoint=adapter)
    scaled = peft.LoraConfig(r=4, lora_alpha=99, task_type="CAUSAL_LM")
    with pytest.raises(
        CheckpointError, match="adapter_config.json: lora_alpha is 8 there and 99 h"
    ):
        adapted(tmp_path, peft_config=scaled).train(resume_from_checkpoint=adapter)


def test_a_checkpoint_of_another_objective(saved, tmp_path, caplog):
    adapter = str(saved["adapter"] / "checkpoint-2")
    with pytest.raises(CheckpointError, match=r"was trained with DPO\(.* objective is IPO\("):
        adapted(tmp_path, objective="ipo").train(resume_from_checkpoint=adapter)
    with caplog.at_level(logging.WARNING):
        adapted(tmp_path, objective="dpo", beta=0.7).train(resume_from_checkpoint=adapter)
    assert "was trained with DPO(beta=0.1" in caplog.text
    assert "goes on with DPO(beta=0.7" in caplog.text


def test_statistics_of_the_best_model_that_are_damaged(folder):
    """They are read at the end of a run, where nothing was checked before."""
    from prefkern.training.run_state import load_objective

    file = folder / "checkpoint-2" / "objective.pt"
    halve(file)
    message = f"{file} cannot be read .*: resume from another checkpoint"
    with pytest.raises(CheckpointError, match=message):
        load_objective(full(folder).loss_fn.objective, str(file.parent))


def test_another_number_of_processes_is_told(folder, caplog):
    checkpoint = folder / "checkpoint-1"
    for rank in range(2):
        shutil.copy(checkpoint / "rng_state.pth", checkpoint / f"rng_state_{rank}.pth")
    (checkpoint / "rng_state.pth").unlink()
    full(folder).train(resume_from_checkpoint=str(checkpoint))
    assert "was saved by 2 processes and is resumed by 1" in caplog.text


def test_experts_are_resumed_and_loaded(tmp_path):
    """Experts have other names in a file than in training."""
    options = {"num_experts": 2, "moe_intermediate_size": 16, "num_experts_per_tok": 1}

    def run(**more):
        return full(tmp_path, model=tiny.model("Qwen3Moe", **options), objective="simpo", **more)

    trained = run()
    trained.train()
    for name in ("train", "best"):
        again = run()
        if name == "train":
            again._load_from_checkpoint(str(tmp_path / "checkpoint-2"))
        else:
            again.state.best_model_checkpoint = str(tmp_path / "checkpoint-2")
            again._load_best_model()
        for parameter, value in weights(trained.model).items():
            assert torch.equal(value, weights(again.model)[parameter]), parameter


def test_the_commands_say_it_in_one_line(folder, tmp_path, capsys):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in tiny.pairs(8)))
    checkpoint = folder / "checkpoint-2"
    halve(checkpoint / "optimizer.pt")
    model = tmp_path / "model"
    tiny.model().save_pretrained(model)
    tiny.tokenizer().save_pretrained(model)
    command = ["train", "--model", str(model), "--dataset", str(pairs), "--use_cpu"]
    command += ["--objective", "alphadpo", "--output_dir", str(folder), "--report_to", "none"]
    assert cli.main([*command, "--resume_from_checkpoint", str(checkpoint)]) == 2
    assert "prefkern train: error: " in capsys.readouterr().err


ROW = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", ROW + '{"prompt": "a",\n' + ROW, "line 2, column 16 is not JSON: Expecting"),
        ("a.jsonl", ROW + "\n" + '["x"]\n', r'line 3 must be an object with columns, got \["x"\]'),
        ("a.jsonl", ROW.encode() + b"\xff\n", "line 2 is not UTF-8"),
        ("a.json", "[" + ROW + ",\n" + '{"prompt":]', "line 3, column 11 is not JSON"),
        ("a.csv", "prompt,chosen,rejected\na,b,c\na,b,c,d\n", "Expected 3 fields in line 3, saw 4"),
        ("a.parquet", b"PAR1", "[Pp]arquet"),
    ],
)
def test_the_line_of_a_dataset_is_named(tmp_path, name, content, message):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=f"dataset .*{name}' cannot be loaded: .*{message}"):
        data.load_preference_dataset(str(file))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_ids": [1.5]}, "'prompt_ids' must be lists of integers, token ids, got .*float"),
        (
            {"chosen_ids": [97]},
            "token id 97 in 'chosen_ids', but the model's embedding has 97 rows",
        ),
        ({"rejected_ids": [-2]}, "'train' has token id -2 in 'rejected_ids'"),
        (
            {"ref_chosen_logps": 4.0, "ref_rejected_logps": -1.0},
            "row 0: 'ref_chosen_logps' is 4.0, but a sum of log-probs is never above 0",
        ),
        ({"ref_chosen_logps": True, "ref_rejected_logps": True}, "row 0: no reference sum .*True"),
    ],
)
def test_numbers_that_would_be_taken_for_others(tmp_path, change, message):
    row = {"prompt_ids": [3], "chosen_ids": [4], "rejected_ids": [5], **change}
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, train_dataset=datasets.Dataset.from_list([row] * 4))


def test_other_vocabularies(tmp_path, caplog):
    model = tiny.model(vocab_size=10, pad_token_id=None)
    with pytest.raises(ValueError, match="'prompt_ids', but the model's embedding has 10 rows"):
        trainer(tmp_path, model=model)
    ids = datasets.Dataset.from_list(
        [{"prompt_ids": [3], "chosen_ids": [4], "rejected_ids": [5]}] * 4
    )
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens([f"w{i}" for i in range(90)])
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    with pytest.raises(
        ValueError, match="pad token '<padding>' has id 107, .* embedding has 97 rows"
    ):
        PreferenceTrainer(tiny.model(), config(tmp_path), ids, processing_class=tokenizer)
    with pytest.raises(ValueError, match="the reference's embedding has 10 rows"):
        trainer(tmp_path, objective="dpo", ref_model=model)
    trainer(tmp_path, objective="dpo", ref_model=tiny.model(vocab_size=120))
    assert "embedding has 97 rows and the reference's 120" in caplog.text
    other = tmp_path / "other"
    tiny.model(seed=3).save_pretrained(other)
    words = tiny.tokenizer()
    vocabulary = {word: at for at, word in enumerate(reversed(tiny.SPECIAL + tiny.WORDS))}
    words.backend_tokenizer.model = type(words.backend_tokenizer.model)(vocabulary, "<unk>")
    words.save_pretrained(other)
    with pytest.raises(
        ValueError, match="has another vocabulary than the model: .* 1 of 17 entries"
    ):
        trainer(tmp_path, objective="dpo", ref_model=str(other))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "simpo", "ref_model": tiny.model(seed=1)}, "ref_model is .* no reference"),
        ({"objective": "simpo", "ref_model_name_or_path": "x"}, "ref_model_name_.* no reference"),
        ({"objective": "simpo", "precompute_ref_log_probs": True}, "precompute_.* no reference"),
        (
            {"ref_model": tiny.model(seed=1), "ref_model_name_or_path": "x"},
            "ref_model was given, and ref_model_name_or_path is 'x'",
        ),
        ({"ref_model": 3}, "ref_model must be a causal LM, a name or path .* got int 3"),
        (
            {"model_init_kwargs": {"dtype": "auto"}},
            "model_init_kwargs .* no effect on a model that",
        ),
        ({"precompute_ref_batch_size": 4}, "precompute_ref_batch_size is 4, which has no effect"),
        ({"peft_config": {"r": 4}}, "peft_config must be a peft.PeftConfig or None, got"),
        ({"padding_free": "no"}, "padding_free must be True or False, got str 'no'"),
        ({"bf16": "yes"}, "bf16 must be True or False, got str 'yes'"),
        ({"ref_adapter_name": 3}, "ref_adapter_name must be a string or None, got 3"),
        ({"learning_rate": float("nan")}, "learning_rate must be finite, got nan"),
        ({"learning_rate": -1.0}, "learning_rate must be >= 0, got -1.0"),
        ({"num_train_epochs": -1}, "num_train_epochs must be >= 0, got -1"),
        ({"seed": -1}, "seed must be an int >= 0, got -1"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be an int >= 1"),
        ({"gradient_accumulation_steps": 1.5}, "gradient_accumulation_steps must be an int >= 1"),
        ({"beta": float("nan")}, "beta must be a finite number > 0.* got nan"),
    ],
)
def test_what_has_no_effect_or_no_meaning_is_refused(tmp_path, options, message):
    given = {name: options[name] for name in ("ref_model", "peft_config") if name in options}
    options = {name: value for name, value in options.items() if name not in given}
    with pytest.raises((ValueError, TypeError), match=message):
        PreferenceTrainer(
            tiny.model(),
            config(tmp_path, **options),
            tiny.dataset(2),
            processing_class=tiny.tokenizer(),
            **given,
        )


def test_what_is_evaluated_must_be_there(tmp_path):
    run = trainer(tmp_path, eval_dataset={"held_out": tiny.dataset(2)})
    with pytest.raises(ValueError, match=r"one of those given \(held_out\), got 'other'"):
        run.evaluate("other")
    with pytest.raises(TypeError, match="test_dataset must be a dataset, got None"):
        run.predict(None)
    with pytest.raises(
        TypeError, match="processing_class must be a tokenizer or a processor, got 3"
    ):
        PreferenceTrainer(tiny.model(), config(tmp_path), tiny.dataset(2), processing_class=3)


def test_a_writer_that_fails_leaves_what_was_there(tmp_path):
    file = tmp_path / "results.json"
    files.write_json(file, {"run": 1})
    with pytest.raises(RuntimeError), files.replacing(file) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    with pytest.raises(TypeError):
        files.write_json(file, {"run": object()})
    assert json.loads(file.read_text()) == {"run": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ""])
def test_margins_that_cannot_be_written_leave_what_was_there(tmp_path, suffix, monkeypatch):
    from prefkern.cli.margins import _write

    path = tmp_path / f"margins{suffix}"
    _write(tiny.dataset(3), path)
    before = path.read_bytes() if suffix else sorted(p.name for p in path.iterdir())

    def full_disk(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "sync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        _write(tiny.dataset(5), path)
    after = path.read_bytes() if suffix else sorted(p.name for p in path.iterdir())
    assert after == before
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_a_report_that_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    from prefkern_bench.report import Report

    path = tmp_path / "bench.json"
    Report({"a": 1}, [], path).write(finished=True)
    with pytest.raises(TypeError):
        Report({"a": object()}, [], path).write(finished=True)
    assert json.loads(path.read_text()) == {"a": 1, "finished": True, "rows": []}
    assert len([*tmp_path.iterdir()]) == 1


def test_a_saved_model_replaces_all_of_an_earlier_one(tmp_path, monkeypatch):
    """From a whole file and parts transformers reads the whole file: it must not be an old one."""
    run = trainer(tmp_path)
    run.save_model()
    for name in ("results.txt", "adapter_model.safetensors"):
        (tmp_path / name).write_text("somebody's")
    save = run.model.save_pretrained
    monkeypatch.setattr(
        run.model, "save_pretrained", lambda *a, **k: save(*a, **{**k, "max_shard_size": 20_000})
    )
    run.save_model()
    names = {path.name for path in tmp_path.iterdir()}
    assert "model.safetensors.index.json" in names and "model.safetensors" not in names
    assert {"results.txt", "adapter_model.safetensors"} <= names
    assert not [name for name in names if name.startswith(".")]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(weights(loaded), weights(run.model))

    def broken(folder, **_):
        (Path(folder) / "model-00001-of-00002.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run.model, "save_pretrained", broken)
    with pytest.raises(OSError, match="No space left"):
        run.save_model()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(weights(loaded), weights(run.model))


def test_a_run_in_a_used_folder_is_warned_of(folder, caplog):
    full(folder).train()
    assert "holds checkpoints of an earlier run (checkpoint-1, checkpoint-2)" in caplog.text
