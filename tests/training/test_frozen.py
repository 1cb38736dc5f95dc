"""What is frozen stays frozen, and a run in which nothing can move is refused before it starts."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import transformers
from torch import nn

from support import tiny

pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")

from peft.optimizers import create_lorafa_optimizer

from prefkern import PreferenceTrainer
from support.adapters import lora as adapter_config
from support.adapters import trained
from support.training import config, first_dpo_loss, lora, trainer, weights

ROWS = 4
# A clip that bites: one of the frozen factors would take most of it.
STEP = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.05}


def half_frozen() -> nn.Module:
    """A trained adapter whose A is frozen, as in LoRA-FA."""
    torch.manual_seed(0)
    options = {"r": 4, "task_type": "CAUSAL_LM", "init_lora_weights": False}
    model = peft.get_peft_model(tiny.model(), peft.LoraConfig(**options))
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    return model


def by_hand(model: nn.Module, batch: dict) -> dict[str, torch.Tensor]:
    """The weights after one clipped step of SGD on the model's own logits, with rate 1."""
    model = copy.deepcopy(model)
    first_dpo_loss(model, batch)[0].backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert nn.utils.clip_grad_norm_(trained, STEP["max_grad_norm"]) > STEP["max_grad_norm"]
    torch.optim.SGD(trained, lr=STEP["learning_rate"]).step()
    return weights(model)


def of_prefkern(path, model, **options):
    return trainer(path, ROWS, model=model, objective="dpo", beta=0.1, **STEP, **options)


def of_trl(path, model, **options):
    trl_runs = pytest.importorskip("support.trl_runs")
    given = {"train_dataset": tiny.dataset(ROWS), "objective": "dpo"}
    return trl_runs.build(path, model=model, **given, **STEP, **options)


@pytest.mark.parametrize("precompute", [False, True], ids=["each step", "precomputed"])
@pytest.mark.parametrize("make", [of_prefkern, of_trl])
def test_a_clipped_step_is_the_one_by_hand_and_frozen_weights_stay(tmp_path, make, precompute):
    model = half_frozen()
    before = weights(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    batch = of_prefkern(tmp_path / "batch", half_frozen()).get_train_dataloader()
    expected = by_hand(model.eval(), next(iter(batch)))
    run = make(tmp_path / "run", model, precompute_ref_log_probs=precompute)
    run.train()
    after = weights(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    assert after.keys() == before.keys()
    for name, value in after.items():
        assert torch.equal(value, before[name]) == (name not in trained), name
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-4, msg=name)
    moved = sum((after[name] - before[name]).square().sum() for name in trained).sqrt()
    assert moved.item() == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize("precompute", [False, True], ids=["each step", "precomputed"])
def test_lora_fa_trains_b_alone(tmp_path, precompute):
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny.model(), lora())
    optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2)
    before = weights(model)
    arguments = config(tmp_path, max_steps=2, precompute_ref_log_probs=precompute)
    PreferenceTrainer(
        model, arguments, tiny.dataset(8), processing_class=tiny.tokenizer(),
        optimizers=(optimizer, None),
    ).train()  # fmt: skip
    moved = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "lora_B" in name}


@pytest.mark.parametrize("reference", [None, "reference"], ids=["alone", "with a reference"])
@pytest.mark.parametrize("name", ["default", "sft"])
def test_what_is_frozen_stays_so_when_a_run_is_resumed_or_its_best_is_loaded(
    tmp_path, name, reference
):
    """transformers and PEFT make the whole adapter trainable when they load it from a folder."""

    def model() -> nn.Module:
        built = trained(name=name)
        if reference is not None:
            built.add_adapter(reference, adapter_config())
        for each, parameter in built.named_parameters():
            if "lora_A" in each:
                parameter.requires_grad_(False)
        return built

    options = {
        "objective": "dpo", "max_steps": 2, "save_strategy": "steps", "save_steps": 1,
        "ref_adapter_name": reference,
    }  # fmt: skip
    best = {
        "eval_dataset": tiny.dataset(4), "eval_strategy": "steps", "eval_steps": 1,
        "load_best_model_at_end": True, "metric_for_best_model": "eval_loss",
    }  # fmt: skip
    whole = trainer(tmp_path / "whole", model=model(), **options)
    whole.train()
    resumed = trainer(tmp_path / "resumed", model=model(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    with_best = trainer(tmp_path / "best", model=model(), **options, **best)
    with_best.train()
    expected = {each for each, p in model().named_parameters() if p.requires_grad}
    for run in (whole, resumed, with_best):
        assert {each for each, p in run.model.named_parameters() if p.requires_grad} == expected
        assert run.model.active_adapters == [name]
    for each, value in weights(whole.model).items():
        assert torch.equal(value, weights(resumed.model)[each]), each


def loaded(path) -> nn.Module:
    half_frozen().save_pretrained(path)
    return peft.PeftModel.from_pretrained(tiny.model(), str(path))


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
def test_a_frozen_adapter_is_not_trained_but_evaluated(tmp_path, checkpointed):
    model = loaded(tmp_path / "adapter")
    run = trainer(
        tmp_path, model=model, eval_dataset=tiny.dataset(4), objective="dpo",
        gradient_checkpointing=checkpointed,
    )  # fmt: skip
    assert run.evaluate()["eval_loss"] == pytest.approx(0.693147, abs=1e-6)
    with pytest.raises(ValueError, match="adapter is frozen, .*is_trainable=True"):
        run.train()
    assert run.state.global_step == 0


def test_an_adapter_that_another_froze_is_not_trained(tmp_path):
    """So does PEFT before 0.21, where the other is loaded beside it."""
    model = loaded(tmp_path / "adapter")
    model.load_adapter(str(tmp_path / "adapter"), "other")
    run = trainer(tmp_path, model=model, objective="dpo", ref_adapter_name="other", max_steps=1)
    with pytest.raises(
        ValueError, match=r"is_trainable=True\). .*: call model.set_adapter\('default'"
    ):
        run.train()
    model.set_adapter("default")
    run.train()


@pytest.mark.parametrize("objective", ["dpo", "simpo"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
def test_a_frozen_model_is_not_trained_but_evaluated(tmp_path, checkpointed, objective):
    run = trainer(
        tmp_path, model=tiny.model().requires_grad_(False), eval_dataset=tiny.dataset(4),
        gradient_checkpointing=checkpointed, objective=objective,
    )  # fmt: skip
    assert run.evaluate()["eval_loss"] > 0
    with pytest.raises(ValueError, match="no parameter of the LlamaForCausalLM requires a grad"):
        run.train()


def test_nor_is_a_frozen_one_by_trl(tmp_path):
    run = of_trl(tmp_path / "run", loaded(tmp_path / "adapter"), gradient_checkpointing=True)
    with pytest.raises(ValueError, match="is_trainable=True"):
        run.train()


def test_nor_a_frozen_reward_model(tmp_path):
    from prefkern.training import rewards

    options = {"use_cpu": True, "report_to": "none", "disable_tqdm": True}
    settings = rewards.RewardConfig(str(tmp_path), **options)
    sizes = tiny.model(num_labels=1, pad_token_id=0).config
    model = transformers.LlamaForSequenceClassification(sizes).requires_grad_(False)
    tokens, _ = rewards.tokenize_for_rewards(tiny.dataset(4), tiny.tokenizer(), settings)
    run = rewards.RewardTrainer(model, settings, tiny.tokenizer(), 0, train_dataset=tokens)
    assert run.rewards(tokens).shape == (4, 2)
    with pytest.raises(ValueError, match="no parameter of the LlamaForSequenceClassification"):
        run.train()


def with_optimizer(path, model, parameters, **options) -> PreferenceTrainer:
    return PreferenceTrainer(
        model, config(path, max_steps=1, objective="dpo"), tiny.dataset(4),
        processing_class=tiny.tokenizer(), optimizers=(torch.optim.SGD(parameters, lr=0.1), None),
        **options,
    )  # fmt: skip


def test_an_optimizer_of_other_parameters_is_refused(tmp_path):
    model = tiny.model()
    message = (
        r"optimizers: the SGD .* holds none of the model's 8 trainable .* get_peft_model first"
    )
    with pytest.raises(ValueError, match=message):
        with_optimizer(tmp_path, model, model.parameters(), peft_config=lora())
    with pytest.raises(ValueError, match="none of the model's 21 trainable parameters"):
        with_optimizer(tmp_path, tiny.model(), tiny.model().parameters())


def test_an_optimizer_of_some_parameters_trains_these(tmp_path, caplog):
    model = tiny.model()
    before = weights(model)
    some = dict([*model.named_parameters()][:3])
    run = with_optimizer(tmp_path, model, some.values())
    assert "holds 3 of the model's 21 trainable parameters" in caplog.text
    run.train()
    moved = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert moved == some.keys()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        with_optimizer(tmp_path, model, model.parameters())
    assert "trainable parameters" not in caplog.text


def test_a_reference_that_would_be_trained_too_is_refused(tmp_path):
    """A reference model is frozen, which would freeze what it shares with the policy."""
    reference, model = tiny.model(seed=1), tiny.model()
    reference.model.norm = model.model.norm
    with pytest.raises(ValueError, match=r"ref_model shares model.norm.weight with the model"):
        trainer(tmp_path, model=model, ref_model=reference, objective="dpo")
    assert model.model.norm.weight.requires_grad
    model.model.norm.requires_grad_(False)
    trainer(tmp_path, model=model, ref_model=reference, objective="dpo", max_steps=1).train()


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("make", [of_prefkern, of_trl])
def test_an_adapter_that_is_not_active_cannot_be_all_that_is_trained(tmp_path, make, checkpointed):
    model = trained()
    model.add_adapter("other", adapter_config())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("other" in name)
    before = weights(model)
    run = make(tmp_path, model, gradient_checkpointing=checkpointed)
    with pytest.raises(ValueError, match=r"none of the 8 parameters.*active adapter is 'default'"):
        run.train()
    assert run.state.global_step == 0
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
def test_nor_a_parameter_that_the_model_does_not_use(tmp_path, checkpointed):
    model = tiny.model().requires_grad_(False)
    model.unused = nn.Parameter(torch.zeros(3))
    run = trainer(tmp_path, model=model, objective="dpo", gradient_checkpointing=checkpointed)
    with pytest.raises(ValueError, match="none of the 1 parameters .* such as unused; freeze them"):
        run.train()
    # Gradients that an optimizer takes in the backward, and clears, are no error.
    model.lm_head.requires_grad_(True)
    model.lm_head.weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    run.train()


def test_nor_an_adapter_that_is_switched_off(tmp_path):
    model = trained()
    model.base_model.disable_adapter_layers()
    run = trainer(tmp_path, model=model, objective="dpo")
    with pytest.raises(ValueError, match="adapter is switched off; call .*enable_adapter_layers"):
        run.train()


@pytest.mark.parametrize("make", [of_prefkern, of_trl])
@pytest.mark.parametrize("model", [trained, tiny.model], ids=["its own reference", "full"])
def test_an_autocast_around_the_run_changes_nothing(tmp_path, model, make):
    """It keeps casts of weights: of the reference's values, without gradient, or before a step."""
    runs = []
    for name in ("within", "alone"):
        reference = {} if model is trained else {"ref_model": tiny.model()}
        run = make(
            tmp_path / name, model(), bf16=True, per_device_train_batch_size=1,
            eval_strategy="steps", eval_steps=1, eval_dataset=tiny.dataset(ROWS, 3),
            **reference,
        )  # fmt: skip
        run.args.max_steps = 3
        with torch.autocast("cpu", torch.bfloat16, enabled=name == "within"):
            run.train()
            run.evaluate()
        runs.append(run)
    within, alone = (weights(run.model) for run in runs)
    assert all(torch.equal(value, alone[name]) for name, value in within.items())
    within, alone = (
        [log[key] for log in run.state.log_history for key in ("loss", "eval_loss") if key in log]
        for run in runs
    )
    assert within == alone and len(alone) == 7 and len({*alone}) > 3


@pytest.mark.parametrize("objective", ["kto", "simpo"])
def test_nor_with_an_objective_of_more_passes_or_fewer(tmp_path, objective):
    """KTO's reference point takes a pass of the policy without gradient; SimPO has no reference."""
    losses = []
    for is_within in (True, False):
        run = trainer(
            tmp_path,
            6,
            objective=objective,
            bf16=True,
            max_steps=3,
            eval_strategy="steps",
            eval_steps=1,
            eval_dataset=tiny.dataset(4),
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=is_within):
            run.train()
        losses.append([log["loss"] for log in run.state.log_history if "loss" in log])
    assert losses[0] == losses[1] and len({*losses[0]}) == 3
