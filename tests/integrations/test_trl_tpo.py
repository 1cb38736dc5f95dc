"""TRL's TPOTrainer and prefkern's: the same whole runs, adaptive coefficients, and refusals."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
pytest.importorskip("trl.experimental.tpo")

from trl.experimental.tpo import TPOConfig
from trl.experimental.tpo import TPOTrainer as PlainTPOTrainer

import prefkern
import twins
from prefkern.integrations.trl import DPOTrainer, TPOTrainer, tpo
from prefkern.objectives import TPO, Adaptive
from support import tiny

DATA = {"train_dataset": tiny.triple_dataset(8), "eval_dataset": tiny.triple_dataset(4, seed=3)}


def run(kind=TPOTrainer, **options) -> twins.Run:
    return twins.run(kind, TPOConfig, max_steps=2, **DATA, **options)


@pytest.mark.parametrize("name", twins.TPO_LOSSES)
def test_runs_are_trls(name):
    twin = twins.compare(name, *(run(kind, **twins.WHOLE, **twins.TPO_LOSSES[name])
                                 for kind in (PlainTPOTrainer, TPOTrainer)))  # fmt: skip
    assert twin.worst <= twins.BOUND
    assert prefkern.last_plan().backend == "torch"


def test_adapters_and_accumulated_batches_are_trls():
    options = {"peft_config": twins.lora(), "beta": 0.1}
    runs = [run(kind, **options) for kind in (PlainTPOTrainer, TPOTrainer)]
    assert twins.compare("lora", *runs, without=twins._OF_TOKENS).worst <= twins.BOUND


def test_adaptive_coefficients():
    ours = run(adaptive=Adaptive(clip=1.5), beta=2.0, loss_type="tpo-l", **twins.WHOLE)
    objective = ours.trainer.loss_fn.objective
    assert isinstance(objective, TPO) and objective.adaptive == Adaptive("policy", clip=1.5)
    assert objective.token_mean and objective.tpo_l_gamma == 0.5
    log = ours.logs[0]
    assert log["adaptive/beta_ratio"] <= 1.5 and log["adaptive/clip_fraction"] > 0
    plain = run(beta=2.0, loss_type="tpo-l", **twins.WHOLE)
    assert plain.logs[0]["loss"] != log["loss"]


def test_compute_metrics_gets_logits():
    seen = []

    def metrics(prediction):
        seen.append(prediction.predictions.shape)
        return {"of_mine": 1.0}

    trainer = TPOTrainer(
        tiny.model(),
        TPOConfig("out", use_cpu=True, bf16=False, report_to="none", per_device_eval_batch_size=4),
        processing_class=tiny.tokenizer(),
        compute_metrics=metrics,
        **DATA,
    )
    assert trainer.evaluate()["eval_of_mine"] == 1.0
    assert seen[0][0] == 12 and seen[0][-1] == tiny.VOCAB_SIZE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"label_smoothing": 0.1, "loss_type": "ipo"},
            "args.label_smoothing is 0.1, but args.loss",
        ),
        (
            {"tpo_l_gamma": 0.1},
            "args.tpo_l_gamma is 0.1, but args.loss_type is 'sigmoid'; it is an",
        ),
        ({"torch_compile": True}, "args.torch_compile is True, which is not supported yet"),
        (
            {"label_smoothing_factor": 0.1},
            "args.label_smoothing_factor is 0.1, which has no effect",
        ),
        ({"loss_type": "simpo"}, "loss_type must be one of 'sigmoid', 'hinge', 'ipo', 'tpo-l'"),
    ],
)
def test_arguments_without_effect_are_refused(options, message, tmp_path):
    args = TPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    for name, value in options.items():
        setattr(args, name, value)
    with pytest.raises(ValueError, match=message):
        TPOTrainer(tiny.model(), args, processing_class=tiny.tokenizer(), **DATA)


def test_other_arguments_are_refused(tmp_path):
    with pytest.raises(TypeError, match="args must be a trl TPOConfig, got dict"):
        TPOTrainer(tiny.model(), {}, **DATA)
    from trl import DPOConfig

    args = DPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match="objective needs a third response to each prompt"):
        DPOTrainer(tiny.model(), args=args, train_dataset=tiny.dataset(4), objective=TPO(0.1))
    with pytest.raises(AttributeError, match="has no attribute 'SPOTrainer'"):
        prefkern.integrations.trl.SPOTrainer  # noqa: B018


def test_a_default_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny.model()
    model.config._name_or_path = "some/model"
    made = []
    plain = tpo.TPOConfig

    def config(folder):
        made.append(plain(folder, use_cpu=True, bf16=False, report_to="none"))
        raise KeyboardInterrupt

    monkeypatch.setattr(tpo, "TPOConfig", config)
    with pytest.raises(KeyboardInterrupt):
        TPOTrainer(model, processing_class=tiny.tokenizer(), **DATA)
    assert made[0].output_dir == "model-TPO"
