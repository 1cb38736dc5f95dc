"""A pass that uses a model as its own reference leaves nothing of the model changed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from prefkern.models.adapters import BASE, is_trained_adapter
from prefkern.models.calls import evaluation_mode, without_checkpointing
from prefkern.models.own_reference import InitialAdapter, adapter_in_use
from support import tiny, versions

peft = pytest.importorskip("peft")

from support.adapters import TASK, lora

PROMPT = peft.PromptTuningConfig(num_virtual_tokens=3, **TASK)
ATTENTION = peft.AdaptionPromptConfig(adapter_len=2, adapter_layers=1, **TASK)


def adapted(config, model=None) -> nn.Module:
    torch.manual_seed(0)
    return peft.get_peft_model(tiny.model() if model is None else model, config)


def two_active() -> nn.Module:
    model = adapted(lora())
    model.add_adapter("second", lora(target_modules=["lm_head"]))
    model.base_model.set_adapter(["default", "second"])
    return model


MODELS = {
    "lora": lambda: adapted(lora()),
    "two active": two_active,
    "whole head": lambda: adapted(lora(modules_to_save=["lm_head"])),
    "tokens": lambda: adapted(lora(trainable_token_indices=[5, 6])),
    "prompt": lambda: adapted(PROMPT),
    "attention": lambda: adapted(ATTENTION),
}


def layers(model: nn.Module) -> list:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def make_irregular(model: nn.Module) -> None:
    """What a user may have set: weights frozen, a layer switched off, modes that differ."""
    model.train()
    for i, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        parameter.requires_grad_(i % 2 == 1)
    for layer in layers(model)[:1]:
        layer._disable_adapters = True
    model.get_base_model().model.layers[0].eval()


def state_of(model: nn.Module) -> dict:
    modules = dict(model.named_modules())
    return {
        "trains": {n: p.requires_grad for n, p in model.named_parameters()},
        "values": {n: p.data_ptr() for n, p in model.named_parameters()},
        "modes": {n: m.training for n, m in modules.items()},
        "attributes": {n: {*vars(m)} for n, m in modules.items()},
        "forwards": {n: vars(m).get("forward") for n, m in modules.items()},
        "switches": {
            n: [getattr(m, s, None) for s in ("active_adapters", "_disable_adapters")]
            for n, m in modules.items()
            if "peft" in type(m).__module__
        },
    }


@pytest.mark.parametrize("fails", [False, True], ids=["ends", "raises"])
@pytest.mark.parametrize("switch", ["off", "other", "initial"])
@pytest.mark.parametrize("name", MODELS)
def test_nothing_of_the_model_is_changed(name, switch, fails):
    model = MODELS[name]()
    if switch == "other":
        config = {"prompt": PROMPT, "attention": ATTENTION}.get(name, lora())
        model.add_adapter("other", copy.deepcopy(config))
        if name == "attention" and not versions.PROMPTS_ADDED_UNUSED.is_here:
            model.set_adapter("default")
    in_use = {
        "off": lambda: adapter_in_use(model, None),
        "other": lambda: adapter_in_use(model, "other"),
        "initial": lambda: InitialAdapter(model).in_use(model),
    }[switch]
    make_irregular(model)
    before = state_of(model)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad(), evaluation_mode(model):
        expected = model(ids).logits
    context = pytest.raises(ZeroDivisionError) if fails else torch.no_grad()
    with context, in_use(), evaluation_mode(model), torch.no_grad():
        assert not any(module.training for module in model.modules())
        model(ids)
        if fails:
            raise ZeroDivisionError
    assert state_of(model) == before
    assert torch.equal(model.eval()(ids).logits, expected)


def test_the_base_by_its_name_is_the_adapter_switched_off():
    model = adapted(lora(init_lora_weights=False)).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with adapter_in_use(model, BASE), torch.no_grad():
        torch.testing.assert_close(model(ids).logits, tiny.model()(ids).logits)


def test_a_prompts_model_can_be_copied_after_a_pass():
    """PEFT would leave a forward in the model that belongs to the first model in every copy."""
    model = adapted(PROMPT).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with adapter_in_use(model, None):
        model(ids)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.prompt_encoder["default"].embedding.weight.add_(1.0)
        assert (copied(ids).logits - model(ids).logits).abs().max() > 1e-3


def test_blocks_that_were_checkpointed_are_again():
    model = tiny.model(num_hidden_layers=4).train()
    for block in model.model.layers[::2]:
        block.gradient_checkpointing = True
    with pytest.raises(ZeroDivisionError), without_checkpointing(model):
        assert not any(block.gradient_checkpointing for block in model.model.layers)
        raise ZeroDivisionError
    assert [block.gradient_checkpointing for block in model.model.layers] == [True, False] * 2


def draw(model: nn.Module) -> nn.Module:
    """The model, with every parameter that is trained drawn anew."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model


def test_the_initial_values_are_those_of_before_and_gradients_are_of_the_trained_ones():
    """Also if the pass comes between a forward and its backward."""
    model = draw(adapted(lora(target_modules=["q_proj", "lm_head"]))).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        wanted = model(ids).logits
    initial = InitialAdapter(model)
    draw(model)
    model(ids).logits.square().mean().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    loss = model(ids).logits.square().mean()
    with initial.in_use(model), torch.no_grad():
        assert torch.equal(model(ids).logits, wanted)
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, gradients[name]), name


def test_the_initial_values_have_the_dtype_of_the_model():
    model = draw(adapted(lora())).eval()
    initial = InitialAdapter(model)
    ids = torch.tensor([[5, 6, 7, 8]])
    model.to(torch.bfloat16)
    with torch.no_grad():
        expected = model(ids).logits
        with initial.in_use(model):
            assert torch.equal(model(ids).logits, expected)
    assert all(value.dtype == torch.float32 for _, value in initial.items())


def test_sharded_weights_are_refused():
    model = adapted(lora())
    initial = InitialAdapter(model)
    name, parameter = next((n, p) for n, p in model.named_parameters() if p.requires_grad)
    parameter.data = torch.empty(0)
    message = rf"sharded now \({name}\): set precompute_ref_log_probs, or load the adapter a second"
    with pytest.raises(ValueError, match=message), initial.in_use(model):
        pass


def with_bias_alone() -> nn.Module:
    model = adapted(lora(target_modules=["q_proj"], lora_bias=True))
    nn.init.ones_(model.base_model.model.model.layers[1].self_attn.q_proj.lora_B["default"].bias)
    return model


def changed(model: nn.Module, part: str) -> nn.Module:
    for name, parameter in model.named_parameters():
        if part in name:
            nn.init.normal_(parameter)
    return model


FRESH = {
    "lora": lambda: adapted(lora()),
    "head": lambda: adapted(lora(target_modules=["lm_head"])),
    "embedding": lambda: adapted(lora(target_modules=["embed_tokens"])),
    "experts": lambda: adapted(
        peft.LoraConfig(target_parameters=["mlp.experts.down_proj"]),
        tiny.model("Mixtral", num_local_experts=4),
    ),
    "biases": lambda: adapted(lora(lora_bias=True)),
    "copies": lambda: adapted(lora(modules_to_save=["lm_head", "norm"])),
    "two": two_active,
    "frozen": lambda: adapted(lora(inference_mode=True)),
}
# The last ones may be fresh too, but that cannot be seen from their weights.
TRAINED = {
    "lora": lambda: adapted(lora(init_lora_weights=False)),
    "one layer": lambda: changed(adapted(lora()), "layers.1.self_attn.v_proj.lora_B"),
    "bias": with_bias_alone,
    "embedding": lambda: changed(
        adapted(lora(target_modules=["embed_tokens"])), "lora_embedding_A"
    ),
    "copy": lambda: changed(adapted(lora(modules_to_save=["norm"])), "modules_to_save"),
    "second": lambda: changed(two_active(), "lora_B.second"),
    "dora": lambda: adapted(lora(use_dora=True)),
    "tokens": lambda: adapted(lora(trainable_token_indices=[5, 6])),
    "ia3": lambda: adapted(peft.IA3Config(**TASK)),
    "vera": lambda: adapted(peft.VeraConfig(r=4, target_modules=["q_proj"], **TASK)),
    "adalora": lambda: adapted(peft.AdaLoraConfig(total_step=9, target_modules=["q_proj"], **TASK)),
    "prompt": lambda: adapted(PROMPT),
    "attention": lambda: adapted(ATTENTION),
}


@pytest.mark.parametrize("name", FRESH)
def test_an_adapter_that_provably_changes_nothing(name):
    model = FRESH[name]().eval()
    assert not is_trained_adapter(model)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        on = model(ids).logits
        with adapter_in_use(model, None):
            assert torch.equal(model(ids).logits, on)


@pytest.mark.parametrize("name", TRAINED)
def test_every_other_adapter_may_change_its_base(name):
    assert is_trained_adapter(TRAINED[name]())
