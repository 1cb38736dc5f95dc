"""PEFT's adapters: log-probs and every trained parameter's gradient against the model's own logits."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import prefkern
from prefkern import PreferenceConfig, PreferenceTrainer
from prefkern.models.adapters import base_parameters, check_reference_adapter
from prefkern.models.own_reference import adapter_in_use
from support import tiny

peft = pytest.importorskip("peft")

BODY = ["q_proj", "v_proj", "down_proj"]


def _lora(**options) -> peft.LoraConfig:
    # Weights that are not 0 where PEFT would begin at 0, so that every term counts.
    options = {"r": 4, "init_lora_weights": False, "target_modules": BODY, **options}
    return peft.LoraConfig(task_type="CAUSAL_LM", **options)


class _Quantised(nn.Linear):
    """A frozen layer of 8-bit weights, as in a QLoRA base; they are raised for each product."""

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
    """PEFT keeps adapters in float32; A and B get float32 gradients close to float64's."""
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
    """The same values are dropped as in the model's own forward."""
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


def test_tdpo_trains_an_adapted_head(tmp_path):
    """Its reference is the model without the adapter, head included."""
    config = _lora(target_modules=["lm_head", "q_proj"], init_lora_weights=True)
    trained = _trainer(tmp_path, tiny.model(), "tdpo2", config, max_steps=6)
    trained.train()
    logs = [log for log in trained.state.log_history if "loss" in log]
    assert logs[0]["loss"] == pytest.approx(0.693147, abs=2e-6)
    assert logs[-1]["loss"] < logs[0]["loss"]
    head = {n: p for n, p in trained.model.named_parameters() if "lm_head.lora_B" in n}
    assert len(head) == 1 and all(p.abs().max() > 0 for p in head.values())


def test_tdpo_refuses_an_adapted_head_of_a_reference_model(tmp_path):
    ref_model = _adapted(_lora(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="LoRA on the reference's output head"):
        _trainer_on(tmp_path, tiny.model(), ref_model=ref_model, objective="tdpo1")


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
        (tiny.model, {"ref_adapter_name": "a"}, "must be that of an adapter of a PEFT model"),
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
        (
            _adalora,
            {},
            r"the output head of \w+ is wrapped in a PEFT adapter other than LoRA \(SVDLinear\)",
        ),
        (lambda: _adapted(_lora(bias="all")), {}, "trains biases of the base model"),
    ],
)
def test_what_has_no_effect_or_would_be_wrong_is_refused(tmp_path, build, options, message):
    with pytest.raises(ValueError, match=message):
        _trainer(tmp_path, build(), **options)


# The reference


def _trainer_on(path, model, **options) -> PreferenceTrainer:
    given = {name: options.pop(name) for name in ("ref_model", "peft_config") if name in options}
    options.setdefault("objective", "dpo")
    arguments = PreferenceConfig(
        output_dir=str(path), use_cpu=True, save_strategy="no", report_to="none",
        disable_tqdm=True, gradient_checkpointing=False, learning_rate=0.1, max_steps=2, **options,
    )  # fmt: skip
    return PreferenceTrainer(
        model, arguments, tiny.dataset(8), tiny.dataset(5, seed=3),
        processing_class=tiny.tokenizer(), **given,
    )  # fmt: skip


def _prepared_for_corda(model: nn.Module) -> None:
    for name, layer in model.named_modules():
        if name.endswith(tuple(BODY)):
            left, values, right = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
            layer.eigens = SimpleNamespace(
                U_WC=left[:, :4], S_WC=values[:4].clone(), V_WC=right[:4].T
            )


def _prepared_for_lora_ga(model: nn.Module) -> None:
    for name, layer in model.named_modules():
        if name.endswith(tuple(BODY)):
            layer._peft_loraga_grad = torch.randn_like(layer.weight)


# All that PEFT has, but for loftq, which needs scipy; and what has to be done before.
INITIALISERS = {
    True: None,
    False: None,
    "gaussian": None,
    "eva": None,
    "orthogonal": None,
    "mica": None,
    "pissa": None,
    "pissa_niter_2": None,
    "olora": None,
    "corda": _prepared_for_corda,
    "lora_ga": _prepared_for_lora_ga,
}


# MiCA is not in every version.
KNOWN = str(peft.LoraConfig.__dataclass_fields__["init_lora_weights"].type)
NAMES = [name for name in INITIALISERS if name != "mica" or "mica" in KNOWN]


@pytest.mark.parametrize("name", NAMES, ids=str)
def test_initialisers_that_change_the_base_are_refused_and_no_others(tmp_path, name):
    ga = {"lora_ga_config": peft.tuners.lora.LoraGAConfig()} if name == "lora_ga" else {}
    config = _lora(init_lora_weights=name, **ga)

    def prepared() -> nn.Module:
        model = tiny.model()
        if INITIALISERS[name] is not None:
            INITIALISERS[name](model)
        return model

    model = peft.get_peft_model(prepared(), config).eval()
    with torch.no_grad(), model.disable_adapter():
        off = _oracle(model, *_batch())
    is_initial = torch.allclose(off, _oracle(tiny.model(), *_batch()), atol=1e-5)
    # An adapter that is there is its own reference, as it was before training.
    trainer = _trainer_on(tmp_path, model)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    if is_initial:
        return
    trainer.train()
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    initial = trainer._sums(tiny.model(), batch)
    torch.testing.assert_close(trainer._reference_logps(batch), initial, atol=1e-3, rtol=1e-4)
    assert (trainer._sums(model, batch) - initial).abs().max() > 1e-2
    message = f"init_lora_weights='{name}', which changes the base .*=True, or pass ref_model"
    given = {"precompute_ref_log_probs": name == "pissa"}
    with pytest.raises(ValueError, match=message):
        _trainer_on(tmp_path, prepared(), peft_config=config, **given)
    with pytest.raises(ValueError, match=message):
        _trainer_on(tmp_path, model, ref_adapter_name="__base__", **given)
    # With a reference of its own it is trained, from the initial model.
    model = peft.get_peft_model(prepared(), config).eval()
    evaluated = _trainer_on(tmp_path, model, ref_model=tiny.model()).evaluate()["eval_loss"]
    assert evaluated == pytest.approx(math.log(2), abs=1e-4)


def test_replicated_layers_are_refused(tmp_path):
    config = _lora(layer_replication=[[0, 2], [1, 2]], init_lora_weights=True)
    with pytest.raises(
        ValueError, match=r"layer_replication=\[\[0, 2\], \[1, 2\]\], .* leave it out"
    ):
        _trainer_on(tmp_path, tiny.model(), peft_config=config)


def test_loftq_is_refused():
    model = _adapted(_lora())
    model.peft_config["default"].init_lora_weights = "loftq"
    with pytest.raises(ValueError, match="init_lora_weights='loftq'"):
        check_reference_adapter(model, None, None)


def test_sums_that_are_carried_stand_for_any_reference_until_others_are_needed(tmp_path):
    rows = tiny.dataset(4).add_column("ref_chosen_logps", [-9.0] * 4)
    rows = rows.add_column("ref_rejected_logps", [-9.0] * 4)
    arguments = PreferenceConfig(
        output_dir=str(tmp_path), objective="dpo", use_cpu=True, report_to="none", max_steps=1
    )
    trainer = PreferenceTrainer(
        tiny.model(), arguments, rows, processing_class=tiny.tokenizer(),
        peft_config=_lora(init_lora_weights="pissa"),
    )  # fmt: skip
    trainer.evaluate(rows)
    for call in (trainer.evaluate, trainer.predict):
        with pytest.raises(ValueError, match="init_lora_weights='pissa'"):
            call(tiny.dataset(3))


@pytest.mark.parametrize("reference", [None, "reference"])
def test_a_base_that_is_trained_beside_its_adapter_is_refused(tmp_path, reference):
    """resize_token_embeddings leaves such a base; the reference would change with it."""
    model = _adapted(_lora(init_lora_weights=True))
    if reference is not None:
        model.add_adapter(reference, _lora())
    model.get_input_embeddings().weight.requires_grad_(True)
    message = "model.embed_tokens.weight would be trained, but the reference uses the same"
    options = {} if reference is None else {"ref_adapter_name": reference}
    with pytest.raises(ValueError, match=message):
        _trainer_on(tmp_path, model, **options)
    model.base_model.model.model.layers[0].self_attn.k_proj.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="embed_tokens.weight and 1 others .*modules_to_save"):
        _trainer_on(tmp_path, model, precompute_ref_log_probs=True, **options)
    # A layer below an adapter is the base's as well.
    model.requires_grad_(False)
    model.base_model.model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="self_attn.q_proj.weight would be trained"):
        _trainer_on(tmp_path, model, **options)


def test_a_base_that_is_trained_has_a_reference_of_its_own(tmp_path):
    model = _adapted(_lora(init_lora_weights=True))
    model.get_input_embeddings().weight.requires_grad_(True)
    trainer = _trainer_on(tmp_path, model, ref_model=tiny.model())
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    before = trainer._reference_logps(batch)
    trainer.train()
    assert torch.equal(trainer._reference_logps(batch), before)
    embedded = model.get_input_embeddings().weight
    assert not torch.equal(embedded, tiny.model().get_input_embeddings().weight)


@pytest.mark.parametrize(
    "config",
    [
        lambda: _lora(modules_to_save=["embed_tokens", "norm"]),
        lambda: _lora(trainable_token_indices={"embed_tokens": [5, 6]}),
        lambda: _lora(target_parameters=["mlp.down_proj.weight"], target_modules=[]),
        lambda: _lora(target_modules=["embed_tokens", "q_proj"]),
        lambda: peft.LNTuningConfig(task_type="CAUSAL_LM"),
        lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        lambda: peft.AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM"),
    ],
    ids=["copies", "tokens", "parameters", "embedding", "norms", "prompt", "attention"],
)
def test_what_an_adapter_trains_of_its_own_is_not_the_bases(config):
    model = tiny.model()
    adapted = {id(parameter) for parameter in model.parameters()}
    model = peft.get_peft_model(model, config())
    base = {id(parameter): parameter for _, parameter in base_parameters(model)}
    assert adapted == base.keys()
    assert not any(parameter.requires_grad for parameter in base.values())
    assert any(parameter.requires_grad for parameter in model.parameters())


def _native(path) -> nn.Module:
    """As transformers loads the folder of an adapter."""
    from transformers import AutoModelForCausalLM

    tiny.model().save_pretrained(path / "base")
    model = AutoModelForCausalLM.from_pretrained(path / "base")
    peft.get_peft_model(model, _lora()).save_pretrained(path / "adapter")
    return AutoModelForCausalLM.from_pretrained(path / "adapter")


def test_an_adapter_that_transformers_loaded_is_refused(tmp_path):
    message = r"holds an adapter \('default'\) that transformers loaded .*is_trainable=True"
    fresh = _lora(init_lora_weights=True)
    loaded = _native(tmp_path)
    for options in ({}, {"peft_config": fresh}, {"ref_model": tiny.model()}):
        with pytest.raises(ValueError, match=message):
            _trainer_on(tmp_path, loaded, **options)
    # It was not replaced by a fresh one on the way.
    saved = peft.PeftModel.from_pretrained(tiny.model(), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(_oracle(loaded.eval(), *_batch()), _oracle(saved, *_batch()))
    with pytest.raises(ValueError, match="adapter' is an adapter of .*merge_and_unload"):
        _trainer_on(tmp_path, str(tmp_path / "adapter"))
    added = tiny.model()
    added.add_adapter(fresh, "mine")
    with pytest.raises(ValueError, match=r"holds an adapter \('mine'\)"):
        _trainer_on(tmp_path, added)
    two = peft.get_peft_model(_native(tmp_path), fresh, adapter_name="two")
    with pytest.raises(ValueError, match=r"holds an adapter \('default', 'two'\)"):
        _trainer_on(tmp_path, two)


def test_what_is_recommended_there_trains_on(tmp_path):
    _native(tmp_path)
    folder = str(tmp_path / "adapter")
    model = peft.PeftModel.from_pretrained(tiny.model(), folder, is_trainable=True)
    before = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    _trainer_on(tmp_path, model).train()
    assert before
    assert all(not torch.equal(before[n], p) for n, p in model.named_parameters() if n in before)
    merged = peft.PeftModel.from_pretrained(tiny.model(), folder).merge_and_unload()
    trainer = _trainer_on(tmp_path, merged, peft_config=_lora(init_lora_weights=True))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)
