"""What becomes of a model before it is trained: loaded, adapted, its dropout switched off."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)
from transformers.utils.import_utils import is_peft_available

from prefkern.config import PreferenceConfig

# In the names of rates: attention_dropout, attn_pdrop, layerdrop.
_DROPOUTS = ("dropout", "pdrop", "layerdrop")


def load_model(name: str, args: PreferenceConfig, **defaults: Any) -> Any:
    """A causal LM by name or path, in float32 unless arguments or `defaults` say otherwise.

    It may be one that takes images as well, of which the text is trained.
    """
    kwargs = {"dtype": torch.float32, **defaults, **(args.model_init_kwargs or {})}  # pyright: ignore[reportGeneralTypeIssues]
    # Keywords that are the model's and not the config's are of no matter to its kind.
    config, _ = AutoConfig.from_pretrained(name, return_unused_kwargs=True, **kwargs)
    kind = type(config)
    takes_images = kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if takes_images and kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForImageTextToText.from_pretrained(name, **kwargs)
    return AutoModelForCausalLM.from_pretrained(name, **kwargs)


def is_peft_model(model: Any) -> bool:
    if not is_peft_available():
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)


def is_trained_adapter(model: nn.Module) -> bool:
    """Whether a LoRA adapter changes its base model; a fresh one has B = 0."""
    return any("lora_B" in name and bool(weight.any()) for name, weight in model.named_parameters())


def adapt(model: Any, peft_config: Any, args: PreferenceConfig) -> Any:
    """The model with its adapter, if one is asked for."""
    if peft_config is not None:
        if is_peft_model(model):
            raise ValueError("model is a PEFT model already; pass no peft_config with it")
        rates = _dropout_rates(peft_config)
        if rates and args.disable_dropout:
            raise ValueError(
                f"peft_config's {next(iter(rates))} has no effect under disable_dropout; set "
                "disable_dropout=False, or the adapter's dropout to 0"
            )
        from peft import get_peft_model

        model = get_peft_model(model, peft_config)
    if is_peft_model(model) and args.gradient_checkpointing:
        # Without this the checkpointed blocks of a frozen model have no input to differentiate.
        model.enable_input_require_grads()
    return model


def _dropout_rates(owner: Any) -> dict[str, float]:
    """The attributes of a module or config that are dropout rates above 0."""
    return {
        name: value
        for name, value in vars(owner).items()
        if isinstance(value, float) and value > 0 and any(part in name for part in _DROPOUTS)
    }


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout rate to 0, also those kept outside of dropout modules."""
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        # Llama's attention keeps its rate as a number, and Falcon reads it off the config each time.
        config = getattr(module, "config", None)
        for owner in (module, config) if isinstance(config, PreTrainedConfig) else (module,):
            for name in _dropout_rates(owner):
                setattr(owner, name, 0.0)
