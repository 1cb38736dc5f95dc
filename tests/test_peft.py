"""PEFT's adapters: log-probs and every trained parameter's gradient against the model's own logits."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F

import prefkern
from prefkern import PreferenceConfig, PreferenceTrainer
from prefkern.preparation import adapter_in_use

peft = pytest.importorskip("peft")

BODY = ["q_proj", "v_proj", "down_proj"]


def _lora(**options) -> peft.LoraConfig:
    # Weights that are not 0 where PEFT would begin at 0, so that every term counts.
    options = {"r": 4, "init_lora_weights": False, "target_modules": BODY, **options}
    return peft.LoraConfig(task_type="CAUSAL_LM", **options)


class _Quantised(nn.Linear):
    """A frozen layer of 8-bit weights, as a QLoRA base has them: raised for each product."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False)
        self.scale = layer.weight.detach().abs().amax() / 127
        levels = (layer.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(levels, requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.scale)


def _quantised_base() -> nn.Module:
    model = tiny.model()
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, child in list(block.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(block, name, _Quantised(child))
    return peft.get_peft_model(model, _lora())


def _two_adapters() -> nn.Module:
    model = peft.get_peft_model(tiny.model(), _lora(target_modules=["lm_head", "q_proj"]))
    model.add_adapter("second", _lora(r=3, lora_alpha=5, target_modules=["lm_head"]))
    model.base_model.set_adapter(["default", "second"])
    return model


def _merged() -> nn.Module:
    model = _adapted(_lora())
    model.merge_adapter()
    return model


def _adalora() -> nn.Module:
    config = peft.AdaLoraConfig(total_step=9, target_modules=["lm_head"], task_type="CAUSAL_LM")
    return peft.get_peft_model(tiny.model(), config)


def _adapted(config, family: str = "Llama", **options) -> nn.Module:
    return peft.get_peft_model(tiny.model(family, **options), config)


# name -> the model, and whether its head is trained (True), frozen (False) or of rank R (an int)
MODELS = {
    "lora": (lambda: _adapted(_lora()), False),
    "softcap": (lambda: _adapted(_lora(), "Gemma2", final_logit_softcapping=2.0), False),
    "dora": (lambda: _adapted(_lora(use_dora=True)), False),
    "quantised base": (_quantised_base, False),
    "head": (lambda: _adapted(_lora(target_modules=["lm_head"])), 4),
    "head and body": (lambda: _adapted(_lora(target_modules=[*BODY, "lm_head"])), 4),
    "tied head": (
        lambda: _adapted(_lora(target_modules=["lm_head", "q_proj"]), tie_word_embeddings=True),
        4,
    ),
    "head with a softcap": (
        lambda: _adapted(_lora(target_modules=["lm_head"]), "Gemma2", final_logit_softcapping=2.0),
        4,
    ),
    "head with biases": (
        lambda: _adapted(_lora(target_modules=["lm_head"], lora_bias=True), "Phi"),
        4,
    ),
    "rank-stabilised head": (
        lambda: _adapted(_lora(r=9, use_rslora=True, target_modules=["lm_head"])),
        9,
    ),
    "two adapters": (_two_adapters, 7),
    "whole head": (lambda: _adapted(_lora(modules_to_save=["lm_head"])), True),
    "whole tied head": (
        lambda: _adapted(_lora(modules_to_save=["lm_head"]), tie_word_embeddings=True),
        True,
    ),
}


def _batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(3, tiny.VOCAB_SIZE, (3, 9), generator=draw)
    mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3, [1] * 4 + [0] * 5])
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return ids, mask, labels


def _oracle(model: nn.Module, ids, mask, labels) -> torch.Tensor:
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
    targets = labels[:, 1:]
    picked = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return torch.where(targets == -100, 0.0, picked)


def _gradients(model: nn.Module, logps: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (logps * torch.linspace(-1, 2, logps.numel()).view(logps.shape)).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_values_and_gradients_equal_the_models_own(name):
    build, head = MODELS[name]
    model = build().eval()
    batch = _batch()
    expected = _oracle(model, *batch)
    wanted = _gradients(model, expected)
    actual = prefkern.token_logprobs(model, *batch)
    plan = prefkern.last_plan()
    gradients = _gradients(model, actual)

    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert gradients.keys() == wanted.keys() == trained and trained
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, wanted[parameter], atol=2e-5, rtol=2e-4, msg=lambda m, p=parameter: p + m
        )
    assert plan.trains_head is (head is not False)
    assert plan.rank == (0 if isinstance(head, bool) else head)
    if head is False:
        # Everything of a frozen head is done in forward: 4NHV.
        assert plan.structure == "one_pass" and plan.operations_nhv == 4
        assert plan.backward_operations == 0


@pytest.mark.parametrize("name", MODELS)
def test_switched_off_it_is_the_base_model(name):
    model = MODELS[name][0]().eval()
    batch = _batch()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    on = prefkern.token_logprobs(model, *batch)
    with adapter_in_use(model, None), torch.no_grad():
        expected = _oracle(model, *batch)
        off = prefkern.token_logprobs(model, *batch)
    torch.testing.assert_close(off, expected, atol=2e-5, rtol=2e-5)
    if not name.startswith("whole"):  # whose copy begins as the original
        assert (on - off).abs().max() > 1e-2
    assert torch.equal(prefkern.token_logprobs(model, *batch), on)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained


@pytest.mark.parametrize("merged", [False, True])
def test_merged_adapters_are_part_of_the_weight(merged):
    model = _adapted(_lora(target_modules=["lm_head"])).eval()
    expected = prefkern.token_logprobs(model, *_batch())
    if merged:
        model.merge_adapter()
    actual = prefkern.token_logprobs(model, *_batch())
    assert prefkern.last_plan().rank == (0 if merged else 4)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    with adapter_in_use(model, None), torch.no_grad():
        off = prefkern.token_logprobs(model, *_batch())
        torch.testing.assert_close(off, _oracle(model, *_batch()), atol=1e-5, rtol=1e-5)
    assert (off - actual).abs().max() > 1e-2


def test_float32_adapters_over_a_bfloat16_base():
    """PEFT keeps them so; A and B get float32 gradients close to float64's."""
    model = tiny.model().bfloat16()
    model = peft.get_peft_model(model, _lora(target_modules=["lm_head"])).eval()
    assert model.base_model.model.lm_head.lora_A["default"].weight.dtype == torch.float32
    exact = copy.deepcopy(model).double()
    wanted = _gradients(exact, _oracle(exact, *_batch()))
    gradients = _gradients(model, prefkern.token_logprobs(model, *_batch()))
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        error = (gradient.double() - wanted[name]).norm() / wanted[name].norm()
        # The body rounds its hidden states to bfloat16, 2^-9 a value.
        assert error < 3e-2, name


def test_dropout_of_an_adapter_on_the_head_is_pefts_own():
    """The same draws fall on the same values as in the model's own forward."""
    model = _adapted(_lora(target_modules=["lm_head"], lora_dropout=0.5))
    model.train()
    prefkern.token_logprobs(model, *_batch())  # probes once, which draws nothing
    torch.manual_seed(5)
    expected = _oracle(model, *_batch())
    torch.manual_seed(5)
    actual = prefkern.token_logprobs(model, *_batch())
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)
    torch.manual_seed(6)
    assert (prefkern.token_logprobs(model, *_batch()) - actual).abs().max() > 1e-3


# The trainer


def _trainer(path, model, objective="dpo", peft_config=None, **options) -> PreferenceTrainer:
    defaults = {"max_steps": 1, "learning_rate": 1e-2, "logging_steps": 1, "report_to": "none"}
    arguments = PreferenceConfig(
        output_dir=str(path), objective=objective, use_cpu=True, save_strategy="no",
        per_device_train_batch_size=4, gradient_checkpointing=False, lr_scheduler_type="constant",
        **{**defaults, **options},
    )  # fmt: skip
    return PreferenceTrainer(
        model, arguments, tiny.dataset(8), processing_class=tiny.tokenizer(),
        peft_config=peft_config,
    )  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        _lora(target_modules=["lm_head", "q_proj"], init_lora_weights=True),
        _lora(modules_to_save=["lm_head"], init_lora_weights=True),
    ],
    ids=["lora on the head", "whole head"],
)
def test_a_trained_head_trains_and_its_reference_does_not_move(tmp_path, config):
    trained = _trainer(tmp_path, tiny.model(), "adadpo", config, max_steps=6)
    batch = trained._prepare_inputs(next(iter(trained.get_train_dataloader())))
    before = trained._reference_logps(batch)
    trained.train()
    logs = [log for log in trained.state.log_history if "loss" in log]
    assert logs[0]["loss"] == pytest.approx(0.693147, abs=2e-6)
    assert logs[-1]["loss"] < logs[0]["loss"]
    assert torch.equal(trained._reference_logps(batch), before)
    head = {n: p for n, p in trained.model.named_parameters() if "lm_head" in n and p.requires_grad}
    assert head
    moved = [name for name, p in head.items() if "lora_B" in name or "modules_to_save" in name]
    assert moved and all(head[name].abs().max() > 0 for name in moved)

    trained.save_model(str(tmp_path / "saved"))
    loaded = peft.PeftModel.from_pretrained(tiny.model(), str(tmp_path / "saved")).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            prefkern.token_logprobs(loaded, *_batch()), _oracle(trained.model.eval(), *_batch())
        )


def test_the_trainers_gradients_on_an_adapted_head_are_the_textbooks(tmp_path):
    """One step's gradients, of A and B of the head too, against DPO on the model's own logits."""
    config = _lora(target_modules=["lm_head", "q_proj"])
    trainer = _trainer(tmp_path, tiny.model(), peft_config=config)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.compute_loss(trainer.model, batch).backward()
    gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    plan = prefkern.last_plan()
    assert plan.rank == 4 and plan.trains_head

    exact = copy.deepcopy(trainer.model).double()
    exact.zero_grad()

    def sums() -> torch.Tensor:
        logits = exact(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        targets = batch["labels"][:, 1:]
        picked = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        return torch.where(targets == -100, 0.0, picked).sum(1)

    with torch.no_grad(), exact.disable_adapter():
        reference = sums()
    chosen, rejected = (sums() - reference).chunk(2)
    (-F.logsigmoid(0.1 * (chosen - rejected))).mean().backward()
    for name, parameter in exact.named_parameters():
        if parameter.requires_grad:
            error = (gradients[name].double() - parameter.grad).norm() / parameter.grad.norm()
            assert error < 1e-4, name


def test_a_named_adapter_as_reference(tmp_path):
    model = _adapted(_lora(target_modules=["lm_head", "q_proj"]))
    model.add_adapter("reference", _lora(target_modules=["lm_head", "v_proj"]))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    trainer = _trainer(tmp_path, model, ref_adapter_name="reference", max_steps=2)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    sums = trainer._reference_logps(batch)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    assert model.active_adapters == ["default"]
    model.set_adapter("reference")
    with torch.no_grad():
        expected = _oracle(model, *(batch[k] for k in ("input_ids", "attention_mask", "labels")))
    model.set_adapter("default")
    torch.testing.assert_close(sums, expected.sum(1), atol=2e-5, rtol=1e-5)
    frozen = {n: p.clone() for n, p in model.named_parameters() if n not in trained}
    trainer.train()
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (tiny.model, {"ref_adapter_name": "a"}, "names an adapter of a PEFT model"),
        (
            lambda: _adapted(_lora()),
            {"ref_adapter_name": "a"},
            r"adapter of the model \('default'\)",
        ),
        (lambda: _adapted(_lora()), {"ref_adapter_name": "default"}, "the adapter that is trained"),
        (
            lambda: _adapted(_lora()),
            {"ref_adapter_name": "a", "objective": "simpo"},
            "this objective has no reference",
        ),
        (_merged, {"objective": "simpo"}, "adapter 'default' is merged into its weights"),
        (_merged, {"precompute_ref_log_probs": True}, "call model.unmerge_adapter"),
        (_adalora, {}, r"PEFT adapter other than LoRA \(SVDLinear\)"),
        (lambda: _adapted(_lora(bias="all")), {}, "trains biases of the base model"),
        (
            lambda: _adapted(_lora(target_modules=["lm_head"])),
            {"objective": "tdpo1"},
            "TDPO does not support LoRA on the output head",
        ),
    ],
)
def test_what_has_no_effect_or_would_be_wrong_is_refused(tmp_path, build, options, message):
    with pytest.raises(ValueError, match=message):
        _trainer(tmp_path, build(), **options)
