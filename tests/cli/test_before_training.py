"""Errors that a user can mend are one line of `prefkern train`, before training if possible."""

from __future__ import annotations

import importlib.util
import json

import pytest
import transformers
import yaml
from safetensors.torch import load_file

from support import tiny

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
peft = pytest.importorskip("peft")

from prefkern.cli import __main__ as cli
from prefkern.cli import before_training
from prefkern.cli import train as command
from prefkern.training.item_trainer import ItemTrainer
from support.command_line import error, flags
from support.training import made, margin_rows, single_rows, trainer


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"lr_scheduler_type": "cosine_with_min_lr"},
            "--lr_scheduler_type cosine_with_min_lr cannot be made with --lr_scheduler_kwargs (none)",
        ),
        (
            {"lr_scheduler_kwargs": '{"foo": 1}'},
            "--lr_scheduler_type linear cannot be made with --lr_scheduler_kwargs ({'foo': 1})",
        ),
        ({"optim": "adamw_bnb_8bit"}, "--optim adamw_bnb_8bit cannot be used: "),
        ({"report_to": "wandb"}, "--report_to wandb: WandbCallback requires wandb"),
        ({"output_dir": "pairs.jsonl"}, "--output_dir must be a folder, got "),
        ({"output_dir": "pairs.jsonl/run"}, "pairs.jsonl is a file"),
        ({"gradient_checkpointing_kwargs": "{bad"}, "gradient_checkpointing_kwargs: is not JSON: "),
        ({"lr_scheduler_kwargs": "{bad"}, "lr_scheduler_kwargs: is not JSON: Expecting property"),
        ({"model_name_or_path": ""}, "--model_name_or_path is required"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_options_are_looked_at_before_the_model_is_loaded(
    files,
    tmp_path,
    capsys,
    monkeypatch,
    change,
    message,
):
    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    for package, option in (("wandb", "report_to"), ("bitsandbytes", "optim")):
        if option in change and importlib.util.find_spec(package) is not None:
            pytest.skip(f"{package} is installed")
    if "output_dir" in change:
        change = {"output_dir": str(tmp_path / change["output_dir"])}
    assert message in error(flags({**files, **change}), capsys)


def test_options_that_are_right_pass(tmp_path):
    for options in (
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-8}},
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 2}},
        {"optim": "sgd", "lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"},
    ):
        run = trainer(tmp_path, eval_dataset=tiny.dataset(4), max_steps=2, eval_steps=1, **options)
        before_training.check_options(run.args)
        before_training.check_optimizer(run.args, run.model)
        run.train()


def test_texts_that_yaml_reads_as_something_else(files, tmp_path):
    """An option's own type says how its text is read, as on the command line."""
    path = tmp_path / "run.yaml"
    for value, run_name in (("no", "1.10"), ('"no"', "2024-01-01"), ("'no'", "1e3")):
        path.write_text(
            yaml.safe_dump(files) + f"save_strategy: {value}\nrun_name: {run_name}\nbf16: off\n"
        )
        config = command.parse([str(path)])[3]
        assert (config.save_strategy, config.run_name, config.bf16) == ("no", run_name, False)


OBJECTIVES = {
    "dpo": {},
    "adadpo": {"use_weighting": True},
    "betadpo": {"token_metrics": False},
    "adasimpo": {},
    "alphadpo": {"rpo_alpha": 0.2},
    "madpo": {},
    "adaorpo": {},
    "kto": {},
    "tdpo2": {},
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_known_metrics_are_those_of_an_evaluation(tmp_path, objective):
    rows = {"madpo": margin_rows, "kto": single_rows}.get(objective, tiny.pairs)(6)
    options = {"eval_strategy": "steps", **OBJECTIVES[objective]}
    evaluation = {"one": made(rows)} if objective == "dpo" else made(rows)
    prefix = "one_" if objective == "dpo" else ""
    run = trainer(
        tmp_path,
        objective=objective,
        train_dataset=made(rows),
        eval_dataset=evaluation,
        **options,
    )
    logged = {name.removeprefix("eval_") for name in run.evaluate()} - {"epoch"}
    known = {*before_training._metrics(run), *before_training._SPEEDS}
    assert logged <= {prefix + name for name in known}
    # A run logs all but what its pairs may have none of.
    missing = {prefix + name for name in known} - logged
    assert all("model_preparation_time" in name or "gradients/" in name for name in missing)
    for name in logged:
        run.args.metric_for_best_model = f"eval_{name}" if "loss" in name else name
        before_training.check_best_metric(run)
    run.args.metric_for_best_model = f"{prefix}rewards/margin"
    if objective != "kto":
        said = f"--metric_for_best_model is '{prefix}rewards/margin' .did you mean '{prefix}rewards"
        with pytest.raises(ValueError, match=said):
            before_training.check_best_metric(run)


def test_an_unknown_metric_is_told_before_training(files, capsys, monkeypatch):
    monkeypatch.setattr(ItemTrainer, "train", lambda *_, **__: pytest.fail("it trained"))
    options = {"eval_fraction": 0.25, "eval_strategy": "steps", "metric_for_best_model": "foo"}
    message = error(flags({**files, **options}), capsys)
    assert "--metric_for_best_model is 'foo', but evaluation does not log it; it logs " in message
    assert " rewards/accuracies, " in message


def test_a_spoilt_run_is_one_line(files, capsys):
    message = error(flags({**files, "learning_rate": 1e30, "objective": "simpo"}), capsys)
    assert "not finite" in message and "learning_rate" in message


@pytest.mark.parametrize("at", [0, 2])
def test_an_interrupted_run_says_where_it_goes_on(files, tmp_path, capsys, monkeypatch, at):
    compute = ItemTrainer._get_num_items_in_batch

    def interrupt(self, *args):
        if self.state.global_step == at:
            raise KeyboardInterrupt
        return compute(self, *args)

    argv = flags({**files, "max_steps": 3, "save_strategy": "steps", "save_steps": 1})
    monkeypatch.setattr(ItemTrainer, "_get_num_items_in_batch", interrupt)
    assert cli.main(["train", *argv]) == 130
    line = capsys.readouterr().err.strip().splitlines()[-1]
    if at == 0:
        assert line == f"prefkern train: interrupted; {tmp_path / 'out'} holds no checkpoint"
        return
    last = tmp_path / "out" / "checkpoint-2"
    assert line.endswith(
        f"interrupted; the last checkpoint is {last}; resume it with --resume_from_checkpoint true"
    )
    monkeypatch.undo()
    assert cli.main(["train", *argv, "--resume_from_checkpoint", "true"]) == 0
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 3


def test_an_interrupted_preparation(files, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_prepare", interrupt)
    assert cli.main(["train", *flags(files)]) == 130
    assert capsys.readouterr().err == "prefkern train: interrupted; nothing was saved\n"


def test_what_is_no_ones_doing_keeps_its_traceback(files, monkeypatch):
    def fault(*_, **__):
        raise KeyError("a bug")

    monkeypatch.setattr(ItemTrainer, "train", fault)
    with pytest.raises(KeyError, match="a bug"):
        cli.main(["train", *flags(files)])


def test_files_of_models_are_one_line_too(files, tmp_path, capsys):
    weights = tmp_path / "model" / "model.safetensors"
    assert load_file(weights)
    weights.write_bytes(weights.read_bytes()[:3000])
    assert "model.safetensors is damaged" in last_line(flags(files), capsys)
    adapter = tmp_path / "adapter"
    peft.get_peft_model(tiny.model(), peft.LoraConfig(r=2)).save_pretrained(adapter)
    options = {**files, "model_name_or_path": str(adapter)}
    assert f"model '{adapter}' is an adapter of " in last_line(flags(options), capsys)
    (tmp_path / "model" / "tokenizer.json").write_text("{bad")
    tiny.model().save_pretrained(tmp_path / "model")
    assert "model/tokenizer.json: " in last_line(flags(files), capsys)


def last_line(argv: list[str], capsys) -> str:
    """As `error`, but the last line, after progress bars."""
    assert cli.main(["train", *argv]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("prefkern train: error: ")
    return line


def test_reward_models_have_positions_too(tmp_path):
    from prefkern.training import rewards

    options = {"use_cpu": True, "report_to": "none", "disable_tqdm": True}
    settings = rewards.RewardConfig(str(tmp_path), **options)
    model = transformers.GPT2ForSequenceClassification(
        tiny.model("GPT2", n_positions=16, num_labels=1, pad_token_id=0).config
    )
    rows = [{**row, "prompt": "film " * 14} for row in tiny.pairs(4)]
    tokens, _ = rewards.tokenize_for_rewards(made(rows), tiny.tokenizer(), settings)
    with pytest.raises(ValueError, match="GPT2ForSequenceClassification. has 16 positions"):
        rewards.RewardTrainer(model, settings, tiny.tokenizer(), 0, train_dataset=tokens)
