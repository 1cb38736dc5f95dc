"""The load-balancing loss of mixtures of experts: the model's own, TRL's, and none unless asked."""

from __future__ import annotations

import math
from pathlib import Path

import peft
import pytest
import torch

import prefkern
from prefkern.models import routers
from prefkern.models.routers import RouterLoss
from support import tiny
from support.training import (
    assert_same_weights,
    config,
    first_dpo_loss,
    step_logs,
    trainer,
    weights,
)

ON = {"output_router_logits": True}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {**EXPERTS, "num_experts": 4},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "GraniteMoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def mixture(family: str = "Mixtral", **options):
    return tiny.model(family, **FAMILIES[family], **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_the_models_own(tmp_path: Path, family: str) -> None:
    model = mixture(family, router_aux_loss_coef=0.7, **ON)
    run = trainer(tmp_path, model=model, objective="dpo", beta=0.1)
    batch = next(iter(run.get_train_dataloader()))
    assert (batch["attention_mask"] == 0).any()  # padding is not routed
    expected, output = first_dpo_loss(model, batch, 0.7)
    if family == "GraniteMoe" and output.aux_loss == 0:
        # transformers 5.17 does not find its router's logits: its own loss is silently without.
        with pytest.raises(ValueError, match="returned none"):
            run.compute_loss(model, batch)
        return
    expected.backward()
    theirs = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss, outputs = run.compute_loss(model, batch, return_outputs=True)
    loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    assert loss.item() == pytest.approx(math.log(2) + 0.7 * output.aux_loss.item(), abs=1e-5)
    torch.testing.assert_close(outputs.losses.mean(), expected, atol=1e-5, rtol=1e-5)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=2e-6, rtol=2e-4)
    routers = [name for name in theirs if "gate.weight" in name or "router" in name]
    assert any(theirs[name].abs().max() > 1e-3 for name in routers)
    assert prefkern.last_plan().backend == "torch"


def test_trains_as_trls_does(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    options = {"router_aux_loss_coef": 0.5, "gradient_accumulation_steps": 2}
    arguments = config(tmp_path, **options).to_dict()
    names = {field.name for field in trl.DPOConfig.__dataclass_fields__.values()}
    skipped = ("accelerator_config", "beta", "model_init_kwargs")
    shared = {k: v for k, v in arguments.items() if k in names and k not in skipped}
    theirs = trl.DPOTrainer(
        mixture(),
        ref_model=mixture(),
        args=trl.DPOConfig(**shared),
        train_dataset=tiny.dataset(16),
        eval_dataset=tiny.dataset(4, 1),
        processing_class=tiny.tokenizer(),
    )
    ours = trainer(
        tmp_path,
        16,
        mixture(),
        objective="dpo",
        eval_dataset=tiny.dataset(4, 1),
        **options,
    )
    ours.train()
    theirs.train()
    assert len(step_logs(ours)) == len(step_logs(theirs)) == 2
    for mine, reference in zip(step_logs(ours), step_logs(theirs), strict=True):
        assert mine["aux_loss"] > 0.5
        for name in ("loss", "aux_loss", "rewards/margins", "grad_norm"):
            assert mine[name] == pytest.approx(reference[name], rel=1e-4, abs=1e-5), name
    assert_same_weights(weights(ours.model), weights(theirs.model), atol=1e-4, rtol=1e-3)
    mine, reference = ours.evaluate(), theirs.evaluate()
    for name in ("eval_loss", "eval_aux_loss"):
        assert mine[name] == pytest.approx(reference[name], rel=1e-4), name


@pytest.mark.parametrize("options", [{}, {**ON, "asked": 0.0}], ids=["config off", "asked for 0"])
def test_without_being_asked_nothing_changes(tmp_path: Path, options: dict) -> None:
    asked = {"router_aux_loss_coef": options.pop("asked")} if "asked" in options else {}
    model = mixture(router_aux_loss_coef=0.7, **options)
    calls: list[bool] = []
    model.register_forward_hook(lambda module, inputs, output: calls.append("aux_loss" in output))
    run = trainer(tmp_path, model=model, ref_model=mixture(), max_steps=1, **asked)
    run.train()
    (log,) = step_logs(run)
    assert log["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert "aux_loss" not in log
    # Nor is it computed to be dropped.
    assert calls and not any(calls[1:])


def test_a_reference_is_not_asked(tmp_path: Path) -> None:
    reference, policy = mixture(**ON), mixture(**ON)
    computed: dict[str, list[bool]] = {"reference": [], "policy": []}
    for name, model in (("reference", reference), ("policy", policy)):
        model.register_forward_hook(
            lambda module, inputs, output, name=name: computed[name].append("aux_loss" in output)
        )
    run = trainer(tmp_path, model=policy, ref_model=reference, max_steps=1)
    # The probes run as the configs have it.
    prefkern.models.head_transform(reference), prefkern.models.head_transform(policy)
    computed["reference"].clear(), computed["policy"].clear()
    run.train()
    assert computed == {"reference": [False], "policy": [True]}


@pytest.mark.parametrize("objective", ["dpo", "kto", "tdpo1"])
def test_what_is_logged_is_the_mean_over_pairs(tmp_path: Path, objective: str) -> None:
    """3 pairs in batches of 2 and 1, of one step, and in an evaluation."""
    run = trainer(
        tmp_path,
        count=3,
        model=mixture(router_aux_loss_coef=0.3, **ON),
        objective=objective,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=3 if objective == "kto" else 2,
        learning_rate=0.0,
        eval_dataset=tiny.dataset(3),
    )
    values, losses = [], []
    with torch.no_grad():
        for batch in run.get_train_dataloader():
            _, outputs = run.compute_loss(run.model, batch, return_outputs=True)
            values += [outputs.metrics["aux_loss"][0].item()] * len(outputs.losses)
            losses += outputs.losses.tolist()
    run._train_sums.clear()
    assert len(set(values)) > 1
    run.train()
    (log,) = step_logs(run)
    assert log["aux_loss"] == pytest.approx(sum(values) / len(values), rel=0.02)
    assert log["loss"] > 0.3 * log["aux_loss"]
    metrics = run.evaluate()
    assert metrics["eval_aux_loss"] > 0.5
    if objective == "dpo":
        expected = math.log(2) + 0.3 * metrics["eval_aux_loss"]
        assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_adapters_are_pushed_through_a_frozen_router(tmp_path: Path) -> None:
    """LoRA below a router changes the router's choices."""
    moved = {}
    for coefficient in (0.0, 5.0):
        run = trainer(
            tmp_path,
            model=mixture(),
            peft_config=peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
            router_aux_loss_coef=coefficient,
            gradient_checkpointing=True,
        )
        run.train()
        moved[coefficient] = weights(run.model)
    changed = [n for n, w in moved[5.0].items() if not torch.equal(w, moved[0.0][n])]
    assert changed and all("lora" in name for name in changed)


def test_what_cannot_be_had_is_an_error(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(ValueError, match="router_aux_loss_coef must be >= 0, got -1"):
        config(tmp_path, router_aux_loss_coef=-1.0)
    with pytest.raises(
        ValueError, match="router_aux_loss_coef is 0.1, but LlamaForCausalLM has no"
    ):
        trainer(tmp_path, router_aux_loss_coef=0.1)
    trainer(tmp_path, router_aux_loss_coef=0.0)
    # A config that knows the name of what its model does not have.
    model = tiny.model("Llama", **ON)
    assert RouterLoss.of(model) == RouterLoss(0.0)
    assert RouterLoss.of(model).asked_of(model) == {}
    with monkeypatch.context() as patch:
        patch.setattr(routers, "_COEFFICIENTS", ("another_coef", "third_coef"))
        with pytest.raises(ValueError, match="router_logits but has no another_coef or third_coef"):
            RouterLoss.of(mixture(**ON))
    output = prefkern.loss.outputs.UnpairedOutput(*[torch.zeros(2)] * 8)
    for returned in ({}, 0, None):
        with pytest.raises(ValueError, match="returned none"):
            RouterLoss(0.1).added_to(output, type("Output", (), {"aux_loss": returned})())
