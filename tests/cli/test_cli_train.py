"""`prefkern train`: a run from flags and from YAML, and its errors, one line each."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys

import pytest
import torch
import transformers

from support import tiny
from support.processes import environment

pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")
yaml = pytest.importorskip("yaml")

from prefkern.cli import __main__ as cli
from prefkern.cli import train
from prefkern.models.loading import load_adapted
from support.cards import card, run_quick_start
from support.command_line import error, flags


def test_lora_run_from_flags(files, tmp_path, capsys):
    argv = flags({**files, "objective": "adadpo", "lora_r": 4, "eval_fraction": 0.25})
    assert cli.main(["train", *argv]) == 0
    out = capsys.readouterr().out
    assert "train: 9 pairs (0 dropped" in out
    assert "eval: 3 pairs" in out
    assert "eval_rewards/accuracies" in out
    assert f"saved to {files['output_dir']}" in out
    model = peft.PeftModel.from_pretrained(tiny.model(), files["output_dir"])
    assert any("lora_B" in n and p.any() for n, p in model.named_parameters())
    assert transformers.AutoTokenizer.from_pretrained(files["output_dir"]).chat_template
    metrics = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert metrics["eval_loss"] > 0


@pytest.mark.parametrize("rank", [0, 4], ids=["full", "lora"])
def test_the_folder_has_a_model_card(files, tmp_path, monkeypatch, rank):
    monkeypatch.chdir(tmp_path)
    options = {**files, "model_name_or_path": "model", "output_dir": "out", "lora_r": rank}
    assert cli.main(["train", *flags({**options, "beta": 0.2})]) == 0
    text = card(tmp_path / "out").content
    assert "trained with AdaDPO" in text and "| `beta` | 0.2 |" in text
    # One of the twelve rows has equal responses, and is still a pair.
    assert "trained on 12 pairs of `pairs.jsonl`" in text and str(tmp_path) not in text
    assert ("| `r` | 4 |" in text) == bool(rank)
    run_quick_start(text, tmp_path)


def test_batches_by_tokens(files):
    del files["per_device_train_batch_size"]
    options = {"padding_free": True, "share_prompt": True, "max_tokens_per_batch": 50}
    options |= {"objective": "dpo", "logging_steps": 1, "max_steps": 5}
    assert cli.main(["train", *flags({**files, **options})]) == 0
    with open(f"{files['output_dir']}/trainer_state.json") as file:
        logs = [log for log in json.load(file)["log_history"] if "loss" in log]
    assert len(logs) == 5
    assert all(log["batch/tokens"] <= 50 for log in logs)
    assert sum(log["batch/tokens"] for log in logs) > 5 * 30
    assert len({log["batch/pairs"] for log in logs}) > 1


def sft(path, files, *, model=None, **options) -> str:
    """A folder with a trained adapter of the model, and its tokenizer."""
    base = transformers.AutoModelForCausalLM.from_pretrained(model or files["model_name_or_path"])
    torch.manual_seed(0)
    options = {"r": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM", **options}
    peft.get_peft_model(base, peft.LoraConfig(**options)).save_pretrained(path)
    return str(path)


def first_loss(files) -> float:
    with open(f"{files['output_dir']}/trainer_state.json") as file:
        return next(log["loss"] for log in json.load(file)["log_history"] if "loss" in log)


def test_an_adapter_is_trained_on(files, tmp_path, capsys):
    folder = sft(tmp_path / "sft", files)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<eos>", "<eos> <eos>")
    tokenizer.save_pretrained(folder)
    options = {**files, "objective": "dpo", "adapter": folder, "logging_steps": 1}
    options |= {"save_strategy": "steps", "save_steps": 1}
    assert cli.main(["train", *flags(options)]) == 0
    assert first_loss(files) == pytest.approx(0.693147, abs=1e-6)
    out = files["output_dir"]
    before = peft.PeftModel.from_pretrained(tiny.model(), folder).state_dict()
    after = peft.PeftModel.from_pretrained(tiny.model(), out).state_dict()
    assert {n for n, x in after.items() if not torch.equal(x, before[n])} == {
        n for n in before if "lora_" in n
    }
    # Its own tokenizer is used and saved again, with the template that it was trained with.
    saved = transformers.AutoTokenizer.from_pretrained(out)
    assert saved.chat_template == tokenizer.chat_template
    options = {**options, "resume_from_checkpoint": f"{out}/checkpoint-1"}
    assert cli.main(["train", *flags({**options, "output_dir": str(tmp_path / "again")})]) == 0
    again = peft.PeftModel.from_pretrained(tiny.model(), tmp_path / "again").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in after.items())
    assert "another reference" not in capsys.readouterr().err


def test_the_reference_of_an_adapter_may_be_its_base_or_another_model(files, tmp_path):
    options = {**files, "objective": "dpo", "adapter": sft(tmp_path / "sft", files)}
    options["logging_steps"] = 1
    assert cli.main(["train", *flags({**options, "ref_adapter_name": "__base__"})]) == 0
    based = first_loss(files)
    assert abs(based - 0.693147) > 1e-3
    options["ref_model_name_or_path"] = files["model_name_or_path"]
    assert cli.main(["train", *flags(options)]) == 0
    assert first_loss(files) == pytest.approx(based, abs=1e-6)
    # Without a tokenizer of its own it has the model's.
    assert transformers.AutoTokenizer.from_pretrained(files["output_dir"]).chat_template


def test_an_adapter_that_cannot_be_trained_on(files, tmp_path, capsys, caplog):
    def said(adapter, **change) -> str:
        return error(flags({**files, "adapter": str(adapter), **change}), capsys)

    folder = sft(tmp_path / "sft", files)
    for name, size in (("deep", {"num_hidden_layers": 4}), ("wide", {"hidden_size": 64})):
        tiny.model(**size).save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
    deep, wide = str(tmp_path / "deep"), str(tmp_path / "wide")
    assert "--lora_r has no effect on --adapter, which is a trained" in said(folder, lora_r=4)
    assert "--adapter: no such folder:" in said(tmp_path / "no" / "such" / "name")
    assert "adapter must be a folder or a hub name, got" in said("no/such/name")
    assert "holds no adapter: it has no adapter_config.json" in said(files["model_name_or_path"])
    base = files["model_name_or_path"]
    message = said(folder, model_name_or_path=wide)
    assert f"adapter '{folder}', trained on '{base}', cannot be used on '{wide}': " in message
    message = said(folder, model_name_or_path=deep)
    assert (
        f"does not fit '{deep}': it has no weights for base_model.model.model.layers.2" in message
    )
    # A model that it fits may have been moved.
    tiny.model(seed=3).save_pretrained(tmp_path / "moved")
    caplog.clear()
    load_adapted(str(tmp_path / "moved"), folder)
    assert f"'{folder}' was trained on '{base}', and is used on '{tmp_path}/moved'" in caplog.text
    longer = sft(tmp_path / "longer", files, model=deep)
    assert "it has unused weights for base_model.model.model.layers.2" in said(longer)
    other = sft(tmp_path / "classifier", files, task_type="SEQ_CLS")
    assert "has task type SEQ_CLS; that of a language model is CAUSAL_LM" in said(other)
    message = error(flags({**files, "model_name_or_path": folder}), capsys)
    assert f"train the adapter on with --adapter {folder}" in message


def _write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


RUNS = {
    "simpo": ({"objective_options": '{"gamma": 0.3}', "beta": 2.5}, {"rewards/margins"}),
    "alphadpo": ({"rpo_alpha": 0.2}, {"alpha_dpo/margin"}),
    "madpo": ({"use_weighting": "true"}, {"madpo/weight", "wpo/weight"}),
    "kto": ({"beta": 0.2}, {"kl", "rewards/chosen"}),
    "tdpo2": ({"lora_r": 4}, {"kl/chosen", "kl/rejected"}),
    "adaorpo": ({"objective_options": '{"clip": 3.0}'}, {"adaptive/beta_ratio"}),
}


@pytest.mark.parametrize("name", RUNS)
def test_objectives_from_flags(files, tmp_path, capsys, name):
    options, metrics = RUNS[name]
    rows = tiny.pairs(12)
    if name == "madpo":
        rows = [{**row, "margin": i - 5.0} for i, row in enumerate(rows)]
    if name == "kto":
        rows = [
            {"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2 == 0}
            for i, row in enumerate(rows)
        ]
    argv = {**files, "objective": name, **options, "dataset": _write(tmp_path / "d.jsonl", rows)}
    assert cli.main(["train", *flags({**argv, "logging_steps": 1, "eval_fraction": 0.25})]) == 0
    out = capsys.readouterr().out
    unit = "responses" if name == "kto" else "pairs"
    assert f"train: 9 {unit} (0 dropped" in out and f"eval: 3 {unit}" in out
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    logs = [log for log in state["log_history"] if "loss" in log]
    assert len(logs) == 2 and all(metrics <= log.keys() for log in logs)
    evaluated = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert {f"eval_{metric}" for metric in metrics} <= evaluated.keys()


def test_a_finished_run_that_is_queued_again(files, tmp_path, capsys):
    """It takes no step, evaluates and saves the model, and keeps the figures of its steps."""
    out = tmp_path / "out"
    options = {**files, "max_steps": 3, "save_steps": 1, "eval_fraction": 0.25, "lora_r": 4}
    assert cli.main(["train", *flags(options)]) == 0
    first = json.loads((out / "all_results.json").read_text())
    adapter = (out / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(out / "checkpoint-1")
    for left in ("adapter_model.safetensors", "README.md"):
        (out / left).unlink()
    assert cli.main(["train", *flags({**options, "resume_from_checkpoint": "true"})]) == 0
    assert (out / "adapter_model.safetensors").read_bytes() == adapter
    assert sorted(path.name for path in out.glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-3",
    ]
    again = json.loads((out / "all_results.json").read_text())
    own = ("train_loss", "train_steps_per_second", "eval_loss", "eval_rewards/margins")
    assert {name: again[name] for name in own} == {name: first[name] for name in own}
    assert "train_loss" in capsys.readouterr().out


def test_full_run_from_yaml_and_flags(files, tmp_path, capsys):
    options = {
        **files,
        "objective": "dpo",
        "objective_options": {"label_smoothing": 0.1},
        "dtype": "bfloat16",
        "learning_rate": "1e-3",
        "max_steps": 1,
        "precompute_ref_log_probs": True,
        "ref_cache_dir": str(tmp_path / "reference-sums"),
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
    other = str(tmp_path / "other")
    argv = [str(tmp_path / "run.yaml"), "--output_dir", other, "--max_steps", "2"]
    *_, config = train.parse(argv)
    assert config.build_objective().label_smoothing == 0.1
    assert (config.learning_rate, config.max_steps, config.output_dir) == (1e-3, 2, other)
    assert cli.main(["train", *argv]) == 0
    assert "identical" in capsys.readouterr().out
    model = transformers.AutoModelForCausalLM.from_pretrained(other)
    assert model.dtype == torch.bfloat16
    state = json.loads((tmp_path / "other" / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert list((tmp_path / "reference-sums").glob("*/*.safetensors"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": "missing.jsonl"}, "no such file"),
        ({"dataset": None}, "--dataset is required"),
        ({"model_name_or_path": None}, "--model_name_or_path is required"),
        (
            {"objective": "adadopo"},
            "unknown objective 'adadopo' (did you mean 'adadpo'?); known: dpo, ",
        ),
        ({"objective_options": '{"klip": 3}'}, "no option 'klip' (did you mean 'clip'?); it takes"),
        ({"objective_options": '{"clip": -3}'}, "clip must be a finite number > 0"),
        ({"betta": 0.1}, "unknown argument '--betta'"),
        ({"dtype": "int4"}, "--dtype/--torch_dtype: invalid choice: 'int4'"),
        ({"learning_rate": "fast"}, "invalid float value: 'fast'"),
        ({"eval_fraction": 1.5}, "--eval_fraction must be in [0, 1)"),
        ({"eval_strategy": "epoch"}, "--eval_strategy needs --eval_dataset"),
        ({"lora_dropout": 0.1}, "--lora_dropout has no effect"),
        ({"lora_alpha": 16}, "--lora_alpha has no effect without --lora_r"),
        ({"lora_target_modules": "q_proj"}, "--lora_target_modules has no effect"),
        ({"eval_split": "test"}, "--eval_split has no effect without --eval_dataset"),
        ({"dataset_config": "main"}, "--dataset_config has no effect on a file"),
        ({"lora_r": -1}, "--lora_r must be >= 0, got -1"),
        ({"lora_r": 4, "lora_alpha": 0}, "--lora_alpha must be > 0, got 0"),
        ({"lora_dropout": 1.0, "disable_dropout": "false"}, "--lora_dropout must be in [0, 1)"),
        ({"backend": "cuda"}, "backend must be None or one of 'triton', 'torch'"),
        ({"workspace_mb": -1}, "workspace_mb must be > 0"),
        ({"max_length": 1}, "max_length must be None or an int >= 2"),
        ({"train_sampling_strategy": "group_by_length"}, "batches by length are not supported"),
        ({"eval_dataset": "none.csv"}, "no such file"),
        ({"label_smoothing_factor": 0.1}, "no effect on preference pairs"),
        ({"objective": "ipo", "beta": 0.1}, "'ipo' has no option 'beta'"),
        ({"objective": "kto", "rpo_alpha": 0.1}, "'kto' has no option 'rpo_alpha'"),
        ({"objective": "kto", "use_weighting": "true"}, "'kto' has no option 'use_weighting'"),
        ({"beta": 0.1, "objective_options": '{"beta": 0.2}'}, "beta is 0.1, and 0.2 in"),
        ({"rpo_alpha": -1}, "rpo_alpha must be a finite number > 0, from 1e-12 to 1e+06, got -1"),
        ({"objective": "madpo"}, "dataset 'train' has no margins"),
        (
            {"objective": "kto", "per_device_train_batch_size": 1},
            "per_device_train_batch_size must be at least 2, got 1",
        ),
        (
            {"objective": "tdpo1", "precompute_ref_log_probs": True},
            "precompute_ref_log_probs keeps sums",
        ),
    ],
)
def test_errors_come_before_the_model_is_loaded(files, capsys, monkeypatch, change, message):
    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    options = {k: v for k, v in {**files, **change}.items() if v is not None}
    assert message in error(flags(options), capsys)


def test_errors_of_datasets(files, tmp_path, capsys):
    path = tmp_path / "wrong.jsonl"
    path.write_text('{"prompt": "a", "better": "b", "rejected": "c"}\n')
    message = error(flags({**files, "dataset": path}), capsys)
    assert "no column 'chosen'; found prompt, better, rejected; expected" in message
    _write(path, [{"prompt": "a", "completion": "b", "label": True}] * 4)
    message = error(flags({**files, "dataset": path}), capsys)
    assert "no column 'chosen' and no column 'rejected'; found prompt, completion, label" in message
    assert "single responses are for the objective 'kto'" in message
    _write(path, [{"prompt": "a", "completion": "b", "label": "yes"}] * 4)
    message = error(flags({**files, "dataset": path, "objective": "kto"}), capsys)
    assert "row 0: 'label' must be true or false, got 'yes'" in message
    path.write_text("")
    assert "empty" in error(flags({**files, "dataset": path}), capsys)


def test_errors_of_yaml(files, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    assert "no such file" in error([str(path)], capsys)
    path.write_text(yaml.safe_dump({**files, "lora_alhpa": 4}))
    assert "unknown option 'lora_alhpa'; did you mean 'lora_alpha'?" in error([str(path)], capsys)
    path.write_text("a: [1\n")
    assert "run.yaml, line 2, column 1: expected ',' or ']'" in error([str(path)], capsys)
    path.write_text("beta: 0.1\nlora_r: 4\nbeta: 0.2\n")
    assert "run.yaml, line 3, column 1: 'beta' occurs twice, first in line 1" in error(
        [str(path)], capsys
    )
    path.write_text("beta: \x07\n")
    assert "run.yaml is not YAML: unacceptable character #x0007" in error([str(path)], capsys)
    assert "argument --beta: invalid float value: 'x'" in error(["--beta", "x"], capsys)
    path.write_bytes(b"beta: 0.1 # \xff\n")
    assert "run.yaml is not UTF-8: invalid start byte at byte 12" in error([str(path)], capsys)
    path.write_text("- a\n")
    assert "must be a mapping" in error([str(path)], capsys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"dtype": "float8"},
            "line 3: 'dtype' must be one of auto, float32, bfloat16, float16, got 'float8'",
        ),
        ({"max_length": 12.5}, "line 4: 'max_length' must be an int, got '12.5'"),
        ({"beta": True}, "line 1: 'beta' must be a number, got 'true'"),
        ({"lora_r": 2.5}, "line 4: 'lora_r' must be an int, got '2.5'"),
        ({"use_cpu": "perhaps"}, "line 9: 'use_cpu' must be true or false, got 'perhaps'"),
        ({"dtype": ["float32"]}, "'dtype' takes one value, got the list ['float32']"),
        ({"model": "x"}, "'model' and 'model_name_or_path' are the same option"),
        ({"help": True}, "unknown option 'help'"),
    ],
)
def test_values_of_yaml_are_checked_as_flags_are(files, tmp_path, capsys, change, message):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**files, **change}))
    assert message in error([str(path)], capsys)


def test_what_yaml_says(files, tmp_path):
    path = tmp_path / "run.yaml"
    renamed = {"model_name_or_path": "model", "dataset": "dataset_name"}
    options = {
        **{renamed.get(name, name): value for name, value in files.items()},
        "max_length": None,
        "dtype": None,
        "gradient_checkpointing": False,
        "lora_r": 4,
        "lora_target_modules": "q_proj",
        "objective_options": {"clip": 3.0, "exponent": [0.1, 0.2]},
        "report_to": ["tensorboard", "wandb"],
        "run_name": "-a run",
        "learning_rate": 1e-5,
    }
    path.write_text(yaml.safe_dump(options))
    model, data, lora, config = train.parse([str(path), "--beta", "0.2"])
    assert (model.model_name_or_path, data.dataset) == (
        files["model_name_or_path"],
        [files["dataset"]],
    )
    assert (config.max_length, model.dtype, config.gradient_checkpointing) == (
        None,
        "float32",
        False,
    )
    assert lora.lora_target_modules == ["q_proj"]
    assert config.build_objective().adaptive.exponent == (0.1, 0.2)
    assert config.report_to == ["tensorboard", "wandb"]
    assert (config.run_name, config.learning_rate, config.beta) == ("-a run", 1e-5, 0.2)
    path.write_text(yaml.safe_dump({**options, "lora_target_modules": ["q_proj", "v_proj"]}))
    assert train.parse([str(path)])[2].lora_target_modules == ["q_proj", "v_proj"]
    assert train.parse([str(path), "--max_length", "64"])[3].max_length == 64


def test_error_of_a_model_that_does_not_exist(files, tmp_path, capsys):
    options = {**files, "model_name_or_path": str(tmp_path / "no-model")}
    assert "no-model" in error(flags(options), capsys)


def test_missing_extra_is_named(files, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "peft" else find(n))
    said = error(flags(files), capsys)
    assert said.endswith(": peft not installed: pip install 'prefkern[train]'")


def test_help_and_unknown_commands(capsys):
    assert cli.main(["--help"]) == 0
    assert "prefkern COMMAND" in capsys.readouterr().out
    assert cli.main(["trian"]) == 2
    assert "unknown command 'trian'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_:
        cli.main(["train", "--help"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert "--objective_options" in out and "--lora_r" in out


def test_help_does_not_import_transformers():
    code = (
        "import sys; from prefkern.cli.__main__ import main; main(['--help']);"
        "sys.exit('transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())


NAMES = {"prompt": "question", "chosen": "answer_a"}


def _renamed(tmp_path) -> str:
    """The rows of the file of pairs under names of their own."""
    rows = [
        {"question": row["prompt"], "answer_a": row["chosen"], "rejected": row["rejected"]}
        for row in tiny.pairs(12)
    ]
    return _write(tmp_path / "renamed.jsonl", rows)


def test_columns_of_other_names(files, tmp_path, capsys):
    options = {**files, "dataset": _renamed(tmp_path), "eval_fraction": 0.25}
    assert "no column 'chosen'; found question, answer_a" in error(flags(options), capsys)
    pairs = [f"{name}={column}" for name, column in NAMES.items()]
    assert cli.main(["train", *flags(options), "--columns", *pairs]) == 0
    out = capsys.readouterr().out
    assert "train: 9 pairs (0 dropped" in out and "eval: 3 pairs" in out
    assert "columns gives 'prompt' twice" in error(
        [*flags(options), "--columns", "prompt=a", "prompt=b"], capsys
    )
    assert "has no column 'qestion' (did you mean 'question'?)" in error(
        [*flags(options), "--columns", "prompt=qestion", pairs[1]], capsys
    )


@pytest.mark.parametrize("value", [NAMES, [f"{name}={column}" for name, column in NAMES.items()]])
def test_columns_in_yaml(files, tmp_path, value):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**files, "columns": value}))
    assert train.parse([str(path)])[3].columns == NAMES
    assert train.parse([str(path), "--columns", "prompt=other"])[3].columns == {"prompt": "other"}
