"""token_logprobs against the model's own logits: values, and every parameter's gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import prefkern
from prefkern.models import transform
from prefkern.models.transform import head_transform
from support import tiny
from support.family_table import batch as _batch
from support.family_table import oracle as _oracle


def test_no_logits_are_made():
    """The largest last dimension of any output of a module is H or the MLP's, never V."""
    model = tiny.model()
    seen = []
    for module in model.modules():
        module.register_forward_hook(
            lambda m, i, o: seen.append(o.shape) if isinstance(o, torch.Tensor) else None
        )
    ids, mask, labels = _batch()
    head_transform(model)
    seen.clear()
    prefkern.token_logprobs(model, ids, mask, labels)
    assert any(shape[-1] == 1 for shape in seen)  # the head's hooks fire, with the stand-in
    assert all(shape[-1] != tiny.VOCAB_SIZE for shape in seen)


def test_backward_passes_through_the_wrappers_output():
    """DDP and FSDP hang their backward hooks on what the wrapped forward returns."""
    model = tiny.model()
    ids, mask, labels = _batch()
    fired = []

    def on_output(module, inputs, output):
        if output.logits.requires_grad:
            output.logits.register_hook(lambda gradient: fired.append(gradient.shape))

    model.register_forward_hook(on_output)
    prefkern.token_logprobs(model, ids, mask, labels).sum().backward()
    assert fired == [(3, 9, 1)]


def test_temperature_and_default_labels():
    model = tiny.model()
    ids, mask, _ = _batch()
    expected = _oracle(model, ids, mask, ids.masked_fill(mask == 0, -100), temperature=0.7)
    actual = prefkern.token_logprobs(model, ids, mask, temperature=0.7)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_left_padding_scores_no_token_from_a_pad():
    model = tiny.model()
    ids, _, _ = _batch()
    row = ids[:1]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), row], dim=1)
    mask = (torch.arange(12)[None] >= 3).long()
    positions = (torch.arange(12)[None] - 3).clamp(min=0)
    actual = prefkern.token_logprobs(model, padded, mask, position_ids=positions)
    expected = prefkern.token_logprobs(model, row)
    torch.testing.assert_close(actual[:, 3:], expected, atol=1e-5, rtol=1e-5)
    assert not actual[:, :3].any()


def test_bf16_model_is_at_least_as_exact_as_its_own_logits():
    model = tiny.model()
    ids, mask, labels = _batch()
    half = copy.deepcopy(model).to(torch.bfloat16)
    truth_model = copy.deepcopy(half).double()
    with torch.no_grad():
        # The hidden states are bf16 for both; only the head's arithmetic differs.
        hidden = half.model(input_ids=ids, attention_mask=mask).last_hidden_state.double()
        logits = truth_model.lm_head(hidden)[:, :-1].log_softmax(-1)
        targets = labels[:, 1:]
        truth = logits.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        truth = torch.where(targets == -100, 0.0, truth)
        ours = (prefkern.token_logprobs(half, ids, mask, labels) - truth).abs().max()
        eager = (_oracle(half, ids, mask, labels) - truth).abs().max()
    assert ours < 1e-4 < eager


def test_autocast():
    model = tiny.model()
    ids, mask, labels = _batch()
    with torch.autocast("cpu", torch.bfloat16):
        expected = _oracle(model, ids, mask, labels)
        actual = prefkern.token_logprobs(model, ids, mask, labels)
    torch.testing.assert_close(actual, expected, atol=0.05, rtol=0.02)
    actual.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_gradient_checkpointing_changes_nothing():
    model = tiny.model()
    ids, mask, labels = _batch()
    plain = prefkern.token_logprobs(model, ids, mask, labels)
    plain.sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model.train()
    prefkern.token_logprobs(model, ids, mask, labels).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-6, rtol=1e-5)


def test_prompt_tuning_scores_the_real_tokens():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(tiny.model(), config).eval()
    ids, mask, labels = _batch()
    logits = model(input_ids=ids, attention_mask=mask).logits[:, 3:-1].log_softmax(-1)
    targets = labels[:, 1:]
    expected = logits.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    actual = prefkern.token_logprobs(model, ids, mask, labels)
    torch.testing.assert_close(
        actual, torch.where(targets == -100, 0.0, expected), atol=1e-5, rtol=1e-5
    )


def test_accelerates_device_hooks_on_the_head_still_fire():
    hooks = pytest.importorskip("accelerate.hooks")

    class Count(hooks.ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    model, count = tiny.model(), Count()
    ids, mask, labels = _batch()
    expected = prefkern.token_logprobs(model, ids, mask, labels)
    hooks.add_hook_to_module(model.lm_head, count)
    actual = prefkern.token_logprobs(model, ids, mask, labels)
    assert count.calls == 1
    torch.testing.assert_close(actual, expected, atol=0, rtol=0)
    assert model(input_ids=ids).logits.shape[-1] == tiny.VOCAB_SIZE


def test_probe_leaves_no_trace():
    model = tiny.model(attention_dropout=0.3)
    model.train()
    model.model.layers[0].eval()
    model.gradient_checkpointing_enable()
    modes = [module.training for module in model.modules()]
    checkpointing = [getattr(m, "gradient_checkpointing", None) for m in model.modules()]
    state = torch.get_rng_state()
    during = []
    handle = model.model.layers[1].register_forward_hook(
        lambda module, *_: during.append((module.training, torch.is_grad_enabled()))
    )
    head_transform(model)
    handle.remove()
    assert during == [(False, False)]
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert [getattr(m, "gradient_checkpointing", None) for m in model.modules()] == checkpointing
    assert "forward" not in vars(model.lm_head)
    assert all(p.grad is None for p in model.parameters())


def test_probe_runs_once_and_again_for_an_edited_config(monkeypatch):
    calls = []
    probe = transform._probe
    monkeypatch.setattr(transform, "_probe", lambda *a: calls.append(1) or probe(*a))
    model = tiny.model("Gemma2", final_logit_softcapping=30.0)
    assert head_transform(model).softcap == 30
    assert head_transform(model).softcap == 30
    assert len(calls) == 1
    # Gemma 2 reads its config at every call, so the new value is the true one.
    model.config.final_logit_softcapping = 5.0
    assert head_transform(model).softcap == 5
    assert len(calls) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["Cohere", "Gemma2"])
def test_transform_that_the_config_does_not_tell_is_an_error(family, dtype):
    model = tiny.model(family).to(dtype)
    if family == "Cohere":
        # Cohere keeps its scale from construction: the config now lies.
        model.config.logit_scale = 0.07
        message = r"logit_scale=0\.07.* other readings .*model turns it into"
    else:
        hidden_cap = model.config.final_logit_softcapping
        _change_logits(model, lambda z: 1.01 * z)
        message = rf"softcap={hidden_cap}.*model turns it into"
    with pytest.raises(ValueError, match=message):
        prefkern.token_logprobs(model, torch.arange(5)[None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z: 1.02 * z, "turns it into"),
        (lambda z: (1.1 * z).to(torch.bfloat16), "turns it into"),
        (lambda z: z + 0.01, "turns it into"),
        (lambda z: z.flip(-1), "turns it into"),
        (lambda z: torch.roll(z, 1, dims=-1), "turns it into"),
        (lambda z: z.roll(1, dims=1), "turns it into"),
        (lambda z: z.index_fill(-1, torch.tensor([7]), -torch.inf), "model turns it into -inf"),
        (lambda z: z.index_fill(-1, torch.tensor([7]), torch.nan), "turns it into"),
        (lambda z: torch.cat([z[..., 1:2], z[..., 1:]], -1), "turns it into"),
        (lambda z: z.clamp(max=90.0), "turns it into 90"),
        (lambda z: 50 * torch.tanh(z / 50), "turns it into"),
        (lambda z: z.log_softmax(-1), "turns it into"),
        (lambda z: z[..., :90], r"logits of shape \[1, 4, 90\], but its head returns \[1, 4, 97\]"),
        (lambda z: z[:, -1:], r"logits of shape \[1, 1, 97\]"),
    ],
    ids=[
        *(
            "scale",
            "scale, rounded",
            "offset",
            "flipped entries",
            "rolled entries",
            "rolled tokens",
        ),
        *("masked entry", "nan", "one entry", "clamped", "capped", "normalised", "cropped", "last"),
    ],
)
def test_whatever_is_done_to_logits_that_no_config_names_is_an_error(change, message, dtype):
    model = tiny.model().to(dtype)
    _change_logits(model, change)
    with pytest.raises(ValueError, match=f"LlamaForCausalLM.*{message}"):
        prefkern.token_logprobs(model, torch.arange(5)[None])


def test_probe_asks_for_no_image():
    """The probe avoids tokens that a config names, also if these come first or are nearly all."""
    config = tiny.model().config
    config.image_token_index = 3
    assert transform._plain_tokens(config, 4)[0] > 4
    named = {"vocab_size", "pad_token_id", "eos_token_id", "bos_token_id"}
    assert not {getattr(config, name) for name in named} & set(transform._plain_tokens(config, 90))
    config.vocab_size = 2
    assert transform._plain_tokens(config, 4) == [0] * 4


def _change_logits(model, change):
    forward = model.forward
    model.forward = lambda **inputs: _with_logits(forward(**inputs), change)


def _with_logits(output, change):
    output.logits = change(output.logits)
    return output


def test_head_that_computes_something_else_is_an_error():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = tiny.model()
    head = Doubled(32, tiny.VOCAB_SIZE, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    with pytest.raises(ValueError, match=r"Doubled.* does not compute hidden @ weight"):
        prefkern.token_logprobs(model, torch.arange(5)[None])


def test_unsupported_heads_and_wrappers_are_named():
    peft = pytest.importorskip("peft")
    ids = torch.arange(5)[None]
    adapters = {
        "LoRA .DoraLinearVariant, adapter 'default'.": peft.LoraConfig(
            target_modules=["lm_head"], use_dora=True
        ),
        "PEFT adapter other than LoRA": peft.IA3Config(
            target_modules=["lm_head"], feedforward_modules=[]
        ),
    }
    for message, config in adapters.items():
        with pytest.raises(ValueError, match=f"{message}.*leave the head out of the adapter"):
            prefkern.token_logprobs(peft.get_peft_model(tiny.model(), config), ids)
    quantised = tiny.model()
    weight = quantised.lm_head.weight.detach().to(torch.int8)
    quantised.lm_head.weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(ValueError, match="int8.*quantised"):
        prefkern.token_logprobs(quantised, ids)
    with pytest.raises(TypeError, match="torchrun"):
        prefkern.token_logprobs(nn.DataParallel(tiny.model()), ids)
    with pytest.raises(ValueError, match="no output head"):
        prefkern.token_logprobs(tiny.model().model, ids)


def test_wrong_arguments():
    model = tiny.model()
    ids = torch.arange(5)[None]
    with pytest.raises(ValueError, match=r"\[B, T\]"):
        prefkern.token_logprobs(model, ids[0])
    with pytest.raises(ValueError, match="labels must have the shape"):
        prefkern.token_logprobs(model, ids, labels=ids[:, 1:])
    with pytest.raises(ValueError, match="logits_to_keep"):
        prefkern.token_logprobs(model, ids, logits_to_keep=1)
    with pytest.raises(ValueError, match="labels must be in"):
        prefkern.token_logprobs(model, ids, labels=ids + tiny.VOCAB_SIZE)
