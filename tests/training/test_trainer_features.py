"""transformers' Trainer on pairs: mixed precision, best models, loggers, masked rows."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers

from support import tiny

pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")

from safetensors.torch import load_file

import prefkern
from prefkern import objectives
from prefkern.models.scoring import IGNORE_INDEX
from support.training import Record, lora, reference_for, step_logs, trainer


def first_step(path: Path, **options):
    """The gradients and the log of one step, and the dtype that a layer computed in."""
    record, dtypes = Record(), []
    options = {"ref_model": tiny.model(seed=1), "max_grad_norm": 0.0, "optim": "sgd", **options}
    model = options.pop("model", None) or tiny.model()
    run = trainer(path, count=4, model=model, callbacks=[record], max_steps=1, **options)
    layer = model.model.layers[1].mlp.up_proj
    layer.register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
    run.train()
    return record.gradients[0], step_logs(run)[0], dtypes[-1]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_bf16_autocast_on_a_cpu(tmp_path, checkpointed):
    """The body runs in bf16; gradients are float32 and equal float32's up to bf16's rounding."""
    expected, exact, dtype = first_step(tmp_path)
    assert dtype == torch.float32
    gradients, log, dtype = first_step(tmp_path, gradient_checkpointing=checkpointed, bf16=True)
    assert dtype == torch.bfloat16
    assert prefkern.last_plan().backend == "torch"
    assert log["loss"] == pytest.approx(exact["loss"], rel=2e-2)
    assert log["loss"] != exact["loss"]
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error < 0.1, name


def with_float32_head(seed: int = 0):
    """What kbit training and some loaders leave: a body in bf16, and the head in float32."""
    model = tiny.model(seed=seed).bfloat16()
    model.lm_head.float()
    return model


FLOAT32_HEADS = {
    "full": dict,
    "reference model": lambda: {"ref_model": tiny.model(seed=1)},
    "packed": lambda: {"padding_free": True},
    "precomputed": lambda: {"precompute_ref_log_probs": True},
    "lora": lambda: {"peft_config": peft.LoraConfig(r=4)},
    "lora on the head": lambda: {
        "peft_config": peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
    },
    "lora, precomputed": lambda: {
        "peft_config": peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"]),
        "precompute_ref_log_probs": True,
    },
    "tdpo": lambda: {"objective": "tdpo1"},
}


@pytest.mark.parametrize("case", FLOAT32_HEADS)
def test_a_float32_head_on_a_bf16_body(tmp_path, case):
    """The head is probed under the autocast that it trains under (transformers#43828)."""
    options = {"ref_model": None, **FLOAT32_HEADS[case]()}
    expected, exact, _ = first_step(tmp_path, **options)
    mixed = {**options, "model": with_float32_head(), "bf16": True}
    if options["ref_model"] is not None:
        mixed["ref_model"] = with_float32_head(seed=1)
    gradients, log, _ = first_step(tmp_path / "mixed", **mixed)
    if options["ref_model"] is None:
        assert log["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert log["loss"] == pytest.approx(exact["loss"], rel=2e-2)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        if name == "lm_head.weight":
            assert gradient.dtype == torch.float32
        error = (gradient - expected[name]).norm() / expected[name].norm().clamp(min=1e-30)
        assert error < 0.15, name


def test_a_float32_head_without_autocast_is_named(tmp_path):
    message = (
        r"LlamaForCausalLM fails on weights of several dtypes, torch.bfloat16 \(model.norm.weight\) "
        r"and torch.float32 \(lm_head.weight\): give all of them one dtype, or run under autocast "
        r"\(bf16=True or"
    )
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, model=with_float32_head())
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, model=tiny.model().bfloat16(), ref_model=with_float32_head(1))


def test_norms_in_float32_need_autocast(tmp_path):
    """As kbit training leaves them (unsloth#3723): the body's own products fail without it."""

    def model():
        made = tiny.model().bfloat16()
        for name, module in made.named_modules():
            if "norm" in name:
                module.float()
        return made

    run = trainer(tmp_path, model=model(), bf16=True, objective="dpo", max_steps=2)
    run.train()
    first, second = (log["loss"] for log in step_logs(run))
    assert first == pytest.approx(math.log(2), abs=1e-6) and second < first
    message = r"weights of several dtypes, torch.bfloat16 \(.*\) and torch.float32 \(.*norm.*autoc"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, model=model())


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("adapted", [False, True])
def test_the_cache_is_as_it_was(tmp_path, use_cache, adapted):
    """Trainer sets use_cache to False. It would be saved, and generate() would run without one."""
    model = tiny.model(use_cache=use_cache)
    calls = []
    # PEFT before 0.21 calls the causal LM's forward, past its hooks.
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["use_cache"]), with_kwargs=True
    )
    run = trainer(tmp_path, model=model, **({"peft_config": lora()} if adapted else {}))
    run.train()
    assert calls and not any(calls)
    assert model.config.use_cache is use_cache
    run.save_model(str(tmp_path / "saved"))
    if not adapted:
        saved = transformers.AutoConfig.from_pretrained(tmp_path / "saved")
        assert saved.use_cache is use_cache


def test_the_config_of_a_model_of_parts_gets_no_cache(tmp_path):
    """Its text part has the entry; Trainer adds one for the whole."""
    text = dict(tiny.SIZES, use_cache=True)
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=90,
        boi_token_index=91, eoi_token_index=92,
    )  # fmt: skip
    model = transformers.Gemma3ForConditionalGeneration(config)
    run = trainer(tmp_path, model=model, max_steps=1)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "use_cache" not in saved and saved["text_config"]["use_cache"] is True


def test_fp16_is_refused_on_a_cpu(tmp_path):
    with pytest.raises(ValueError, match="fp16 has no effect on a CPU; use bf16"):
        trainer(tmp_path, fp16=True)
    with pytest.raises(ValueError, match="fp16 and bf16"):
        trainer(tmp_path, fp16=True, bf16=True)


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("metric", ["eval_loss", "eval_rewards/accuracies", "rewards/margins"])
def test_the_best_model_is_the_one_that_stays(tmp_path, metric, adapted):
    run = trainer(
        tmp_path,
        count=16,
        learning_rate=0.1,
        peft_config=lora() if adapted else None,
        eval_dataset=tiny.dataset(8, seed=3),
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model=metric,
    )
    run.train()
    name = metric if metric.startswith("eval_") else f"eval_{metric}"
    logged = [log[name] for log in run.state.log_history if name in log]
    assert len(logged) == 4 and len(set(logged)) > 1
    best = min(logged) if metric == "eval_loss" else max(logged)
    step = logged.index(best) + 1
    assert run.state.best_model_checkpoint.endswith(f"checkpoint-{step}")
    assert run.evaluate()[name] == pytest.approx(best, abs=1e-6)
    saved = load_file(
        tmp_path / f"checkpoint-{step}" / f"{'adapter_' if adapted else ''}model.safetensors"
    )
    held = {n.replace(".default", ""): w for n, w in run.model.state_dict().items()}
    assert saved
    for each, weight in saved.items():
        assert torch.equal(held[each], weight), each


class Writer:
    """Replaces tensorboard's writer."""

    scalars: dict[str, list[float]]

    def __init__(self, **_):
        Writer.scalars = {}

    def add_scalar(self, name, value, step):
        assert isinstance(value, float | int)
        self.scalars.setdefault(name, []).append(value)

    def add_text(self, *_):
        pass

    flush = close = add_text


class Listener(transformers.TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **_):
        self.logs.append(dict(logs))


@pytest.mark.parametrize("objective", ["adadpo", "alphadpo", "betadpo"])
def test_loggers_are_told_under_trls_names(tmp_path, objective, monkeypatch, caplog):
    """Without compute_metrics a callback gets each mean, and tensorboard writes it as a number."""
    monkeypatch.setattr(
        "transformers.integrations.integration_utils.is_tensorboard_available", lambda: True
    )
    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer)
    )
    listener = Listener()
    run = trainer(
        tmp_path,
        objective=objective,
        report_to="tensorboard",
        callbacks=[listener],
        eval_dataset=tiny.dataset(3, seed=3),
        eval_strategy="epoch",
    )
    assert run.compute_metrics is None
    run.train()
    names = {
        "loss",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
        "logits/chosen",
        "logits/rejected",
        "entropy",
        "mean_token_accuracy",
    }
    steps = [log for log in listener.logs if "loss" in log]
    (evaluated,) = (log for log in listener.logs if "eval_loss" in log)
    assert len(steps) == 3
    assert all(names <= log.keys() for log in steps)
    assert {f"eval_{name}" for name in names} <= evaluated.keys()
    for name in names:
        assert Writer.scalars[f"train/{name}"] == [log[name] for log in steps]
        assert Writer.scalars[f"eval/{name}"] == [evaluated[f"eval_{name}"]]
    assert "not a scalar" not in caplog.text and "attempting to log" not in caplog.text


def masked_batch(run, pairs: int, masked: dict[int, tuple[int, ...]]):
    """A batch of the run's first pairs; some responses (0 chosen, 1 rejected) are not scored."""
    batch = run.data_collator([run.train_dataset[i] for i in range(pairs)])
    for pair, sides in masked.items():
        for side in sides:
            batch["labels"][side * pairs + pair] = IGNORE_INDEX
    return batch


def sums_from_logits(model, batch):  # -> (2, B) sums and (2, B) lengths
    """From the model's own logits, in its own dtype."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"][:, 1:]
    scored = labels != IGNORE_INDEX
    logps = logits[:, :-1].log_softmax(-1).gather(-1, (labels * scored)[..., None])[..., 0]
    return (logps * scored).sum(1).view(2, -1), scored.sum(1).view(2, -1)


def dpo(rho, sums, n):
    return -F.logsigmoid(0.3 * (rho[0] - rho[1]))


def simpo(rho, sums, n):
    mean = sums / n.clamp(min=1)
    return -F.logsigmoid(2.0 * (mean[0] - mean[1]) - 0.5)


def ipo(rho, sums, n):
    return (rho[0] - rho[1] - 1 / (2 * 0.2)) ** 2


def adadpo(rho, sums, n):
    x = (rho / n.clamp(min=1)).detach()
    ratio = (x[0] - x[1]).exp().clamp(max=1.5)
    return -F.logsigmoid(0.3 * (ratio * rho[0] - rho[1]))


TEXTBOOK = {
    "dpo": (dpo, objectives.DPO(beta=0.3)),
    "simpo": (simpo, objectives.SimPO(beta=2.0, gamma=0.5)),
    "ipo": (ipo, objectives.IPO(tau=0.2)),
    "adadpo": (adadpo, objectives.DPO(beta=0.3, adaptive=objectives.Adaptive(clip=1.5))),
}


@pytest.mark.parametrize("name", TEXTBOOK)
@pytest.mark.parametrize("items", [None, 10])
def test_masked_responses_count_as_pairs_of_empty_ones(tmp_path, name, items):
    """One pair whole, one without a rejected response, one without either; against float64."""
    formula, objective = TEXTBOOK[name]
    model = tiny.model()
    reference = reference_for(objective, tiny.model(seed=1))
    run = trainer(tmp_path, model=model, ref_model=reference, objective=objective, count=3)
    batch = masked_batch(run, 3, {1: (1,), 2: (0, 1)})
    loss = run.compute_loss(run.model, batch, num_items_in_batch=items)
    loss.backward()

    exact = tiny.model().double()
    sums, lengths = sums_from_logits(exact, batch)
    assert lengths[1, 1] == 0 and lengths[:, 2].tolist() == [0, 0]
    with torch.no_grad():
        reference = sums_from_logits(tiny.model(seed=1).double(), batch)[0]
    losses = formula(sums - reference, sums, lengths)
    expected = losses.sum() / (items or 3)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    pushed = 0
    for (each, mine), true in zip(model.named_parameters(), exact.parameters(), strict=True):
        scale = max(true.grad.abs().max().item(), 1e-3)
        assert (mine.grad - true.grad).abs().max() < 1e-4 * scale, each
        pushed += scale > 1e-3
    assert pushed > 10


@pytest.mark.parametrize("name", [*TEXTBOOK, "cpo", "orpo", "alphadpo", "betadpo"])
def test_a_batch_without_anything_to_score_gives_a_differentiable_zero(tmp_path, name):
    objective = TEXTBOOK[name][1] if name in TEXTBOOK else objectives.build(name)
    reference = reference_for(objective, tiny.model(seed=1))
    run = trainer(tmp_path, ref_model=reference, objective=objective, count=2)
    batch = masked_batch(run, 2, {0: (0, 1), 1: (0, 1)})
    loss = run.compute_loss(run.model, batch)
    assert math.isfinite(loss.item())
    loss.backward()
    for each, weight in run.model.named_parameters():
        assert weight.grad is not None and weight.grad.eq(0).all(), each
    run.model.zero_grad()
    # Beside a pair that is scored, such a pair adds nothing to the gradient.
    half = masked_batch(run, 2, {1: (0, 1)})
    run.compute_loss(run.model, half, num_items_in_batch=1).backward()
    gradients = [weight.grad for weight in run.model.parameters()]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.abs().max() > 1e-4 for gradient in gradients)
