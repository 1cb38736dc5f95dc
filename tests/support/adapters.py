"""Models with trained adapters of every kind that PEFT has for a causal LM: their weights are drawn."""

from __future__ import annotations

import peft
import torch
from torch import nn

from support import tiny

TASK = {"task_type": "CAUSAL_LM"}


def lora(**options) -> peft.LoraConfig:
    return peft.LoraConfig(r=4, **{"target_modules": ["q_proj", "v_proj"], **TASK, **options})


def trained(config=None, base: nn.Module | None = None, seed: int = 0, name: str = "default"):
    """A model with an adapter that has been trained: its weights are drawn."""
    torch.manual_seed(0)
    base = tiny.model() if base is None else base
    model = peft.get_peft_model(base, config or lora(), adapter_name=name)
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=draw)
    return model.eval()


def tied() -> nn.Module:
    return tiny.model(tie_word_embeddings=True)


def experts() -> nn.Module:
    return tiny.model("Mixtral", num_local_experts=4)


# The adapter, and its base.
ADAPTERS = {
    "lora": (lora, tiny.model),
    "dora": (lambda: lora(use_dora=True), tiny.model),
    "on the head": (lambda: lora(target_modules=["lm_head", "q_proj"]), tiny.model),
    "on a tied head": (lambda: lora(target_modules=["lm_head", "q_proj"]), tied),
    "on the embedding": (lambda: lora(target_modules=["embed_tokens", "q_proj"]), tiny.model),
    "whole head": (lambda: lora(modules_to_save=["lm_head"]), tiny.model),
    "whole tied head": (lambda: lora(modules_to_save=["lm_head"]), tied),
    "tokens": (lambda: lora(trainable_token_indices=[5, 6, 7]), tiny.model),
    "experts": (
        lambda: lora(target_parameters=["mlp.experts.down_proj"], target_modules=[]),
        experts,
    ),
    "ia3": (lambda: peft.IA3Config(**TASK), tiny.model),
    "vera": (lambda: peft.VeraConfig(r=4, target_modules=["q_proj"], **TASK), tiny.model),
    "adalora": (
        lambda: peft.AdaLoraConfig(total_step=9, target_modules=["q_proj"], **TASK),
        tiny.model,
    ),
    "norms": (lambda: peft.LNTuningConfig(**TASK), tiny.model),
    "prompt": (lambda: peft.PromptTuningConfig(num_virtual_tokens=3, **TASK), tiny.model),
    "prefix": (lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, **TASK), tiny.model),
    "attention": (
        lambda: peft.AdaptionPromptConfig(adapter_len=2, adapter_layers=1, **TASK),
        tiny.model,
    ),
}
