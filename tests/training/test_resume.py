"""A run that is stopped and resumed equals one that is not: weights, logs, evaluations, bitwise."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")

from support.processes import PYTHONPATH
from support.resumed import CASES, STEPS, assert_same_runs, llama, logs_of, run_of
from support.training import assert_same_weights, weights


@pytest.mark.parametrize("case", CASES)
@pytest.mark.long(case=["bf16 autocast", "bf16 weights", "checkpointed blocks", "alphadpo"])
def test_resumed_run_is_the_uninterrupted_one(tmp_path, case):
    """Stopped in an epoch, after a log, between two logs, at an epoch's end, in the last one."""
    whole = run_of(tmp_path, case)
    whole.train()
    for step in (3, 4, 7) if case in ("full", "betadpo", "moving reference") else (3,):
        torch.manual_seed(step)
        resumed = run_of(tmp_path, case, save_strategy="no")
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same_runs(resumed, whole)


def test_dropout_matters_here(tmp_path):
    """Without draws the comparisons above would not notice a lost random state."""
    whole = run_of(tmp_path, "full")
    whole.train()
    checkpoint = tmp_path / "checkpoint-3"
    (checkpoint / "rng_state.pth").unlink()
    torch.manual_seed(1)
    resumed = run_of(tmp_path, "full", save_strategy="no", seed=42)
    torch.manual_seed(1)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert logs_of(resumed) != logs_of(whole)


def test_resumed_in_another_process(tmp_path):
    whole = run_of(tmp_path, "betadpo")
    whole.train()
    command = [sys.executable, __file__, str(tmp_path)]
    environment = {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1", "PATH": ""}
    subprocess.run(command, check=True, env=environment, timeout=240)
    resumed = torch.load(tmp_path / "resumed.pt")
    assert_same_weights(resumed["weights"], weights(whole.model), atol=0, rtol=0)
    assert resumed["logs"] == logs_of(whole)


class Stop(transformers.TrainerCallback):
    """Stops a run, as a signal would."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_broken_off_and_resumed_by_the_same_trainer(tmp_path):
    """Metrics of the stopped steps are not counted twice."""
    whole = run_of(tmp_path / "whole", "lora", save_strategy="no")
    whole.train()
    broken = run_of(tmp_path / "broken", "lora", save_steps=2, callbacks=[Stop(3)])
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    assert broken._train_sums
    broken.remove_callback(Stop)
    broken.train(resume_from_checkpoint=True)
    assert_same_runs(broken, whole)


def test_broken_off_and_started_anew(tmp_path):
    """Nothing is learnt: both attempts have the same metrics if each counts its own pairs."""
    options = {"learning_rate": 0.0, "disable_dropout": True, "save_strategy": "no"}
    whole = run_of(tmp_path, "full", **options)
    whole.train()
    broken = run_of(tmp_path, "full", callbacks=[Stop(3)], **options)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    broken.remove_callback(Stop)
    broken.train()
    assert logs_of(broken) == logs_of(whole)


def test_mean_loss_of_a_resumed_run_is_over_its_own_steps(tmp_path):
    options = {"learning_rate": 0.0, "disable_dropout": True, "eval_strategy": "no"}
    each = run_of(tmp_path / "each", "full", **{**options, "logging_steps": 1})
    each.train()
    expected = sum(log["loss"] for log in each.state.log_history[3:-1])
    run_of(tmp_path, "full", **options, logging_steps=5).train()
    resumed = run_of(tmp_path, "full", **options, logging_steps=5)
    metrics = resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3")).metrics
    # Versions of transformers differ in what they divide by.
    steps = (STEPS - 3, STEPS)
    assert any(metrics["train_loss"] == pytest.approx(expected / n, rel=1e-6) for n in steps)


def test_early_stopping_remembers_its_patience(tmp_path):
    """transformers restores the state of callbacks if the arguments ask for it."""

    def stopping(**options):
        options = {
            "learning_rate": 0.0,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "eval_steps": 1,
            "num_train_epochs": 4,
            "restore_callback_states_from_checkpoint": True,
            "callbacks": [transformers.EarlyStoppingCallback(early_stopping_patience=3)],
            **options,
        }
        return run_of(tmp_path, "full", **options)

    whole = stopping()
    whole.train()
    # The first evaluation is the best: nothing is learnt.
    assert whole.state.global_step == 4
    resumed = stopping()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == 4


class NoStep(transformers.TrainerCallback):
    def on_step_begin(self, *_, **__):
        raise AssertionError("a step was taken")


# Options of a run. 4 steps are an epoch.
FINISHED = {
    "in an epoch": {"max_steps": 3},
    "in the second epoch": {"max_steps": 6},
    "at an epoch's end": {"num_train_epochs": 2},
    "past the end": {"max_steps": 6, "stopped at": 5},
    "adapted": {"max_steps": 3, "case": "lora"},
    "precomputed": {"max_steps": 3, "case": "precomputed"},
}


@pytest.mark.parametrize("name", FINISHED)
@pytest.mark.long(name=["adapted", "precomputed", "past the end"])
def test_a_finished_run_is_left_alone(tmp_path, caplog, name):
    """As a scheduler does that queues a job again, finished or not."""
    options = dict(FINISHED[name])
    case = options.pop("case", "full")
    # An end that was moved forward after the run.
    end = options.pop("stopped at", None)
    whole = run_of(tmp_path, case, **options)
    before = whole.train()
    checkpoints = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    options |= {} if end is None else {"max_steps": end}
    for _ in range(2):
        caplog.clear()
        resumed = run_of(tmp_path, case, callbacks=[NoStep()], **options)
        after = resumed.train(resume_from_checkpoint=True)
        assert after.global_step == before.global_step
        assert_same_weights(weights(resumed.model), weights(whole.model), atol=0, rtol=0)
        assert f"checkpoint-{before.global_step} is the end of a finished run" in caplog.text
        assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == checkpoints
        # No loss and no speed of no steps.
        assert math.isnan(after.training_loss)
        assert not {"train_loss", "train_steps_per_second"} & after.metrics.keys()
        assert "train_loss" not in resumed.state.log_history[-1]
        assert resumed.evaluate()["eval_loss"] == whole.evaluate()["eval_loss"]


@pytest.mark.parametrize("limit", [1, 2])
def test_a_finished_run_with_an_earlier_best_model_is_left_alone(tmp_path, limit):
    """transformers deletes the last checkpoint if one is to be kept and another one is the best."""
    options = {
        "max_steps": 6, "save_steps": 2, "save_total_limit": limit, "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss", "greater_is_better": True,
    }  # fmt: skip
    whole = run_of(tmp_path, "full", **options)
    whole.train()
    best = whole.state.best_model_checkpoint
    assert best is not None and Path(best).name == "checkpoint-2"
    for _ in range(2):
        resumed = run_of(tmp_path, "full", callbacks=[NoStep()], **options)
        assert resumed.train(resume_from_checkpoint=True).global_step == 6
        assert_same_weights(weights(resumed.model), weights(whole.model), atol=0, rtol=0)
        kept = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
        assert kept == ["checkpoint-2", "checkpoint-6"]
    assert whole.args.save_total_limit == limit


def test_a_run_that_was_told_to_leave_goes_on(tmp_path):
    """A callback's time limit is not the end of the run."""
    whole = run_of(tmp_path / "whole", "full")
    whole.train()
    left = run_of(tmp_path, "full", callbacks=[Leave(3)])
    assert left.train().global_step == 3
    resumed = run_of(tmp_path, "full")
    resumed.train(resume_from_checkpoint=True)
    assert_same_runs(resumed, whole)


def test_a_finished_run_trains_on_with_more_steps(tmp_path, caplog):
    options = {"lr_scheduler_type": "constant", "eval_strategy": "no"}
    run_of(tmp_path, "full", max_steps=3, **options).train()
    whole = run_of(tmp_path / "whole", "full", max_steps=6, **options)
    whole.train()
    resumed = run_of(tmp_path, "full", max_steps=6, **options)
    output = resumed.train(resume_from_checkpoint=True)
    assert output.global_step == 6 and "train_loss" in output.metrics
    assert "finished run" not in caplog.text
    assert_same_weights(weights(resumed.model), weights(whole.model), atol=0, rtol=0)


@pytest.mark.parametrize("restores", [True, False])
def test_a_run_that_stopped_early_is_left_alone(tmp_path, caplog, restores):
    def stopping(patience, **options):
        options = {
            "learning_rate": 0.0,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "eval_steps": 1,
            "restore_callback_states_from_checkpoint": restores,
            "callbacks": [transformers.EarlyStoppingCallback(patience)],
            **options,
        }
        return run_of(tmp_path, "full", **options)

    stopping(patience=2).train()
    resumed = stopping(patience=2)
    resumed.add_callback(NoStep())
    assert resumed.train(resume_from_checkpoint=True).global_step == 3
    assert "checkpoint-3 is the end of a finished run (step 3 of 8)" in caplog.text
    # Before its end, and with more patience, it goes on.
    earlier = stopping(patience=2)
    earlier.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert earlier.state.global_step > 2
    if not restores:
        assert stopping(patience=4).train(resume_from_checkpoint=True).global_step > 3


class Leave(transformers.TrainerCallback):
    """Ends a run early, as a time limit would."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("where", ["spelt otherwise", "from another folder", "moved", "linked"])
@pytest.mark.long(where=["moved", "linked"])
def test_the_best_checkpoint_is_kept_wherever_it_is_resumed(tmp_path, monkeypatch, where):
    """The first evaluation is the best; its checkpoint and the last one are kept."""

    def run(folder, step):
        options = {
            "eval_steps": 1,
            "save_total_limit": 1,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "greater_is_better": True,
            "learning_rate": 3e-2,
            "callbacks": [Leave(step)],
        }
        return run_of(folder, "full", **options)

    monkeypatch.chdir(tmp_path)
    first = run(Path("out"), 3)
    first.add_callback(_NoEnd())
    with pytest.raises(KeyboardInterrupt):
        first.train()
    assert sorted(os.listdir("out")) == ["README.md", "checkpoint-1", "checkpoint-3"]
    folder = tmp_path / "out"
    if where == "from another folder":
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
    if where == "moved":
        folder = (tmp_path / "out").rename(tmp_path / "moved")
    if where == "linked":
        folder = tmp_path / "link"
        folder.symlink_to(tmp_path / "out")
    resumed = run(folder, 5)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 5 and resumed.state.best_global_step == 1
    names = sorted(path.name for path in folder.glob("checkpoint-*"))
    assert names == ["checkpoint-1", "checkpoint-5"]
    assert resumed.evaluate()["eval_loss"] == resumed.state.best_metric


class _NoEnd(transformers.TrainerCallback):
    """Killed before the end."""

    def on_save(self, args, state, control, **_):
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_weights_alone_are_told(tmp_path, caplog):
    run_of(tmp_path, "lora", save_only_model=True, save_steps=3, num_train_epochs=1).train()
    with caplog.at_level("WARNING"):
        run_of(tmp_path, "lora", save_strategy="no").train(resume_from_checkpoint=True)
    told = f"{tmp_path}/checkpoint-4 holds weights alone (save_only_model): optimiser, learning"
    assert told in caplog.text
    run_of(tmp_path / "whole", "lora", save_steps=4, num_train_epochs=1).train()
    caplog.clear()
    run_of(tmp_path / "whole", "lora", save_strategy="no").train(resume_from_checkpoint=True)
    assert "holds weights alone" not in caplog.text


# The run, what it is resumed with instead, and the warning.
OTHERS = {
    "the same": ("full", lambda saved: llama(), None),
    "the same, with an adapter": ("lora", lambda saved: llama(), None),
    "the same, precomputed": ("precomputed", lambda saved: llama(), None),
    "another base": ("lora", lambda saved: llama(seed=7), "another base model: of 21 weights 16 "),
    "another reference": ("full", lambda saved: llama(seed=7), "another reference: of 21 weights "),
    "its checkpoint": (
        "full",
        transformers.AutoModelForCausalLM.from_pretrained,
        "another reference: of 21 weights 21 differ",
    ),
    "its checkpoint, precomputed": (
        "precomputed",
        transformers.AutoModelForCausalLM.from_pretrained,
        "another reference: of",
    ),
    "another precision": ("lora", lambda saved: llama().bfloat16(), "resume with .* in its dtype"),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.long(name=[*OTHERS][1::2])
def test_other_weights_than_a_run_began_with_are_told(tmp_path, caplog, name):
    case, other, told = OTHERS[name]
    run_of(tmp_path, case, eval_strategy="no", max_steps=1).train()
    checkpoint = str(tmp_path / "checkpoint-1")
    caplog.clear()
    resumed = run_of(
        tmp_path, case, save_strategy="no", eval_strategy="no", model=other(checkpoint)
    )
    resumed.train(resume_from_checkpoint=checkpoint)
    warnings = [record.message for record in caplog.records if "was trained with" in record.message]
    if told is None:
        assert not warnings
    else:
        assert len(warnings) == 1 and re.search(told, warnings[0]), warnings


def test_one_row_of_a_base_is_not_overlooked(tmp_path, caplog):
    """A row added to an embedding is drawn again in each process."""
    run_of(tmp_path, "lora", eval_strategy="no", max_steps=1).train()
    model = llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[-1] += 0.1
    options = {"save_strategy": "no", "eval_strategy": "no", "max_steps": 1}
    resumed = run_of(tmp_path, "lora", model=model, **options)
    resumed.train(resume_from_checkpoint=True)
    assert "another base model: of 21 weights 1 differ, the first of them model.emb" in caplog.text


def test_a_best_model_without_statistics_is_told(tmp_path, caplog):
    options = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    run_of(tmp_path, "alphadpo", save_only_model=True, save_steps=2, **options).train()
    assert (
        "objective.pt is missing: the objective's statistics stay those of the las" in caplog.text
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    run = run_of(folder, "betadpo", save_strategy="no")
    run.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    torch.save({"weights": weights(run.model), "logs": logs_of(run)}, folder / "resumed.pt")
