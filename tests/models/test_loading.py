"""Folders without a model that can be trained: each gives an error with its name and what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from support import tiny

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
peft = pytest.importorskip("peft")

from prefkern import PreferenceTrainer
from prefkern.cli import plan
from prefkern.models.loading import load_model, load_processor, load_tokenizer
from prefkern.training import rewards
from support.training import config, lora

FAMILIES = {
    "Llama": {},
    "Llama tied": {"tie_word_embeddings": True},
    "GPT2": {},
    "Gemma2": {},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}


def saved(path: Path, family: str = "Llama", **options) -> str:
    tiny.model(family, **options).save_pretrained(path)
    return str(path)


def change_weights(folder: str, change) -> None:
    path = Path(folder) / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, {"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_weights_are_not_drawn(tmp_path, family):
    folder = saved(tmp_path / "model", family.split()[0], **FAMILIES[family])
    # Neither a tied head nor a buffer is missing.
    whole = load_model(folder)
    expected = tiny.model(family.split()[0], **FAMILIES[family]).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in whole.state_dict().items())
    names = list(load_file(tmp_path / "model" / "model.safetensors"))
    # Experts are stacked: of some that are missing, the shape is wrong.
    lost = [name for name in names if "lm_head" in name or ".1." in name and "experts" not in name]
    change_weights(folder, lambda weights: [weights.pop(name) for name in lost])
    with pytest.raises(ValueError, match=r"ref_model '.*model' has no weights for ") as caught:
        load_model(folder, None, "ref_model")
    assert "they would be drawn at random. Download its files again" in str(caught.value)
    if family.startswith("Llama"):
        assert ("lm_head.weight" in str(caught.value)) == (family == "Llama")


@pytest.mark.parametrize("place", ["model", "ref_model"])
def test_the_trainer_refuses_them_of_policy_and_reference(tmp_path, place):
    broken, whole = saved(tmp_path / "broken"), saved(tmp_path / "whole", seed=1)
    change_weights(broken, lambda weights: weights.pop("model.layers.1.mlp.down_proj.weight"))
    names = {"model": whole, "ref_model": whole, place: broken}
    with pytest.raises(ValueError, match=rf"^{place} '.*has no weights for model.layers.1.mlp"):
        PreferenceTrainer(
            names["model"],
            config(tmp_path, objective="dpo"),
            tiny.dataset(4),
            processing_class=tiny.tokenizer(),
            ref_model=names["ref_model"],
        )


def test_a_missing_expert_is_no_other_shape_that_passes(tmp_path):
    folder = saved(tmp_path / "model", "Qwen3Moe", **FAMILIES["Qwen3Moe"])
    lost = [
        name
        for name in load_file(tmp_path / "model" / "model.safetensors")
        if ".experts.2." in name
    ]
    change_weights(folder, lambda weights: [weights.pop(name) for name in lost])
    with pytest.raises(ValueError, match="weights have other shapes .*experts are stacked"):
        load_model(folder)


def test_damaged_files_and_other_shapes(tmp_path):
    folder = saved(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    change_weights(folder, lambda d: d.update({"model.norm.weight": torch.ones(7)}))
    with pytest.raises(ValueError, match="weights have other shapes than its config.json says"):
        load_model(folder)
    weights.write_bytes(weights.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged or incomplete"):
        load_model(folder)
    tiny.tokenizer().save_pretrained(folder)
    with pytest.raises(ValueError, match=r"model.safetensors is damaged or incomplete"):
        rewards.new_reward_model(folder)
    (tmp_path / "model" / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="the tokenizer of .*tokenizer.json.* Repair its files"):
        rewards.new_reward_model(folder)


@pytest.mark.parametrize("beside", ["alone", "with the base's config"])
def test_an_adapter_is_no_model(tmp_path, beside):
    base = saved(tmp_path / "base")
    model = peft.get_peft_model(load_model(base), lora())
    folder = str(tmp_path / "adapter")
    model.save_pretrained(folder)
    if beside != "alone":
        # transformers would load the base and train it together with the adapter.
        model.config.save_pretrained(folder)
    message = r" is an adapter of '.*base', not a model: name the base model.*merge_and_unload"
    with pytest.raises(ValueError, match=f"^model '{folder}'{message}"):
        load_model(folder)
    reference = r" is an adapter of .*: in Python, load it beside .*ref_adapter_name.*merge_and"
    with pytest.raises(ValueError, match=f"^ref_model '{folder}'{reference}"):
        load_model(folder, None, "ref_model")
    with pytest.raises(ValueError, match=message):
        plan.empty_model(folder)
    settings = tmp_path / "adapter" / "adapter_config.json"
    settings.write_text(
        json.dumps({**json.loads(settings.read_text()), "base_model_name_or_path": None})
    )
    with pytest.raises(ValueError, match="is an adapter of a base model that it does not name"):
        load_model(folder)


def test_a_model_without_a_name_needs_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="_name_or_path is empty.*: pass processing_class"):
        PreferenceTrainer(tiny.model(), config(tmp_path), tiny.dataset(4))
    with pytest.raises(ValueError, match="model must be a folder or a hub name, got ''"):
        PreferenceTrainer("", config(tmp_path), tiny.dataset(4))
    with pytest.raises(ValueError, match="model must be a folder or a hub name, got ' '"):
        plan.empty_model(" ")


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_tokenizer_is_named(tmp_path, file):
    tiny.tokenizer().save_pretrained(tmp_path)
    assert len(load_tokenizer(str(tmp_path), {})) == len(tiny.tokenizer())
    (tmp_path / file).write_text("{bad")
    with pytest.raises(ValueError, match=f"cannot be loaded: {tmp_path / file}: ") as caught:
        load_tokenizer(str(tmp_path), {})
    assert "Repair its files, or pass processing_class" in str(caught.value)


def test_what_a_processor_lacks_is_said(monkeypatch):
    """Versions of transformers before 5.18 need torchvision for some: their message says so last."""
    reason = (
        "Could not load any image processor class for /a/model. The model configuration resolves to "
        f"these classes: {', '.join(['pil: Idefics3ImageProcessorPil'] * 8)}. None could be imported. "
        "Missing optional dependencies: torchvision. Please install them."
    )

    def refuse(*_, **__):
        raise ValueError(reason)

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", refuse)
    with pytest.raises(ValueError, match="the processor of 'a', which pictures") as caught:
        load_processor("a", {})
    assert f"cannot be loaded: {reason} Pass processing_class, or" in str(caught.value)
