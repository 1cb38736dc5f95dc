"""What becomes of a model before it is trained: loaded, adapted, its dropout switched off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
from prefkern.hub import is_trusted

# In the names of rates: attention_dropout, attn_pdrop, layerdrop.
_DROPOUTS = ("dropout", "pdrop", "layerdrop")


def load_model(name: str, args: PreferenceConfig, **defaults: Any) -> Any:
    """A causal LM by name or path, in float32 unless arguments or `defaults` say otherwise.

    It may be one that takes images as well, of which the text is trained.
    """
    kwargs = {"dtype": torch.float32, **defaults, **(args.model_init_kwargs or {})}  # pyright: ignore[reportGeneralTypeIssues]
    remote = is_trusted(kwargs)
    kwargs.pop("trust_remote_code", None)
    # Keywords that are the model's and not the config's are of no matter to its kind.
    config, _ = AutoConfig.from_pretrained(
        name, trust_remote_code=remote, return_unused_kwargs=True, **kwargs
    )
    kind = type(config)
    takes_images = kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if takes_images and kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForImageTextToText.from_pretrained(name, trust_remote_code=remote, **kwargs)
    return AutoModelForCausalLM.from_pretrained(name, trust_remote_code=remote, **kwargs)


def is_peft_model(model: Any) -> bool:
    if not is_peft_available():
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)


def is_trained_adapter(model: nn.Module) -> bool:
    """Whether a LoRA adapter changes its base model; a fresh one has B = 0."""
    return any("lora_B" in name and bool(weight.any()) for name, weight in model.named_parameters())


def check_unmerged(model: nn.Module) -> None:
    """Raise ValueError for adapters that are merged into their weights, where nothing trains them.

    Switched off, a layer takes its adapter out again only at its next forward, so that until then
    its weights are those of no reference either.
    """
    if not is_peft_model(model):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    merged = {
        adapter
        for module in model.modules()
        if isinstance(module, BaseTunerLayer)
        for adapter in module.merged_adapters
    }
    if merged:
        names = ", ".join(map(repr, sorted(merged)))
        raise ValueError(
            f"the model's adapter {names} is merged into its weights, where it is not trained: "
            "call model.unmerge_adapter() first, or model.merge_and_unload() and give a peft_config"
        )


@contextmanager
def adapter_in_use(model: Any, name: str | None) -> Iterator[None]:
    """A PEFT model under another of its adapters, or under none; then as it was."""
    if name is None:
        with model.disable_adapter():
            yield
        return
    active = list(model.base_model.active_adapters)
    # set_adapter makes what it switches on trainable, and freezes what it switches off.
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.set_adapter(name)
    try:
        yield
    finally:
        if len(active) == 1:
            model.set_adapter(active[0])
        else:
            model.base_model.set_adapter(active)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)


def check_reference_adapter(model: Any, name: str | None, ref_model: Any) -> None:
    """Raise ValueError unless `name` is an adapter of the model, and not the one that is trained."""
    if name is None:
        if is_peft_model(model) and ref_model is None:
            _check_biases(model)
        return
    if ref_model is not None:
        raise ValueError(f"give either ref_adapter_name ({name!r}) or ref_model, not both")
    if not is_peft_model(model):
        raise ValueError(
            f"ref_adapter_name is {name!r}, and the model is a {type(model).__name__}; "
            "it names an adapter of a PEFT model"
        )
    if name not in model.peft_config:
        known = ", ".join(map(repr, model.peft_config))
        raise ValueError(
            f"ref_adapter_name must be an adapter of the model ({known}), got {name!r}"
        )
    if name in model.base_model.active_adapters:
        raise ValueError(
            f"ref_adapter_name is {name!r}, the adapter that is trained: load the reference's "
            "under a name of its own (model.load_adapter(path, adapter_name=...))"
        )


def _check_biases(model: Any) -> None:
    for name, config in model.peft_config.items():
        bias = getattr(config, "bias", "none")
        if bias != "none":
            raise ValueError(
                f"the adapter {name!r} trains biases of the base model (bias={bias!r}), so that "
                "switching it off does not give the reference back; use bias='none', or pass "
                "ref_model"
            )


def adapt(model: Any, peft_config: Any, args: PreferenceConfig) -> Any:
    """The model with its adapter, if one is asked for."""
    if peft_config is not None:
        if is_peft_model(model):
            raise ValueError("model is a PEFT model already; pass no peft_config with it")
        from peft import PeftConfig

        if not isinstance(peft_config, PeftConfig):
            raise TypeError(f"peft_config must be a peft.PeftConfig or None, got {peft_config!r}")
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
