"""What becomes of a model before it is trained: adapted, its dropout switched off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedConfig
from transformers.utils.import_utils import is_peft_available

from prefkern.models.heads import unwrap

# In the names of rates: attention_dropout, attn_pdrop, layerdrop.
_DROPOUTS = ("dropout", "pdrop", "layerdrop")
# What init_lora_weights begins with where the adapter's first product is taken out of the base.
_ALTERS_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


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


def check_no_native_adapter(model: Any) -> None:
    """Raise ValueError for an adapter that transformers has loaded into the model itself.

    PEFT would put a new one in its place; it is neither trained nor found again in a checkpoint.
    """
    base = unwrap(model)
    if getattr(base, "_hf_peft_config_loaded", False):
        names = ", ".join(map(repr, base.peft_config))
        raise ValueError(
            f"the model holds an adapter ({names}) that transformers loaded or added: load it with "
            "peft.PeftModel.from_pretrained(base, folder, is_trainable=True) to train it on, or "
            "give the model that merge_and_unload() makes of that"
        )


def check_reference_adapter(model: Any, name: str | None, ref_model: Any) -> None:
    """Raise ValueError unless the model gives its reference back: with the adapter `name`, or none.

    `name` must be an adapter of the model, and not the one that is trained. The base must stay as
    it is, and, with no adapter in use, be the model that was adapted.
    """
    if name is not None:
        _check_name(model, name, ref_model)
    if not is_peft_model(model) or ref_model is not None:
        return
    _check_biases(model)
    _check_base_is_frozen(model)
    if name is None:
        _check_base_is_initial(model)


def _check_name(model: Any, name: str, ref_model: Any) -> None:
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


def _check_base_is_frozen(model: Any) -> None:
    trained = [name for name, each in base_parameters(model) if each.requires_grad]
    if trained:
        more = f" and {len(trained) - 1} others" if len(trained) > 1 else ""
        raise ValueError(
            f"{trained[0]}{more} would be trained, which the base model shares with its reference: "
            "the reference would move. Freeze it (requires_grad_(False)), have the adapter train a "
            "copy (modules_to_save, trainable_token_indices), or pass ref_model"
        )


def base_parameters(model: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters that stay in use while adapters are switched off, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    def below(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Parameter]]:
        if isinstance(module, BaseTunerLayer):
            yield from below(module.get_base_layer(), name)
        elif isinstance(module, AuxiliaryTrainingWrapper):
            original: Any = module.original_module
            yield from below(original, name)
        else:
            for key, parameter in module.named_parameters(name, recurse=False):
                # LLaMA-Adapter's layers are no BaseTunerLayer.
                if not key.split(".")[-1].startswith("adaption_"):
                    yield key, parameter
            for key, child in module.named_children():
                yield from below(child, f"{name}.{key}" if name else key)

    return below(model.get_base_model(), "")


def _check_base_is_initial(model: Any) -> None:
    """Raise for initialisers that leave in the base what the adapter does not hold."""
    for name, config in model.peft_config.items():
        given = {
            "init_lora_weights": getattr(config, "init_lora_weights", True),
            "layer_replication": getattr(config, "layer_replication", None),
        }
        if str(given["init_lora_weights"]).lower().startswith(_ALTERS_BASE):
            option, instead = "init_lora_weights", "use init_lora_weights=True"
        elif given["layer_replication"]:
            option, instead = "layer_replication", "leave it out"
        else:
            continue
        raise ValueError(
            f"the adapter {name!r} has {option}={given[option]!r}, which changes the base model, so "
            "that switching the adapter off does not give the initial model back as the reference; "
            f"{instead}, or pass ref_model"
        )


def adapt(
    model: Any, peft_config: Any, *, disable_dropout: bool, gradient_checkpointing: bool
) -> Any:
    """The model with its adapter, if one is asked for.

    Args:
        disable_dropout: dropout will be switched off, so that an adapter's own has no effect.
        gradient_checkpointing: the model's blocks are checkpointed.
    """
    check_no_native_adapter(model)
    if peft_config is not None:
        if is_peft_model(model):
            raise ValueError("model is a PEFT model already; pass no peft_config with it")
        from peft import PeftConfig

        if not isinstance(peft_config, PeftConfig):
            raise TypeError(f"peft_config must be a peft.PeftConfig or None, got {peft_config!r}")
        rates = _dropout_rates(peft_config)
        if rates and disable_dropout:
            raise ValueError(
                f"peft_config's {next(iter(rates))} has no effect under disable_dropout; set "
                "disable_dropout=False, or the adapter's dropout to 0"
            )
        from peft import get_peft_model

        model = get_peft_model(model, peft_config)
    if is_peft_model(model) and gradient_checkpointing:
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


def disable_dropout(model: nn.Module) -> list[tuple[Any, str, float]]:
    """Set every dropout rate to 0, also those kept outside of dropout modules.

    Returns what was changed in configurations, (config, name, rate), for `with_own_rates`.
    """
    of_configs = []
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        # Llama's attention keeps its rate as a number, and Falcon reads it off the config each time.
        config = getattr(module, "config", None)
        for owner in (module, config) if isinstance(config, PreTrainedConfig) else (module,):
            for name, rate in _dropout_rates(owner).items():
                setattr(owner, name, 0.0)
                if owner is config:
                    of_configs.append((config, name, rate))
    return of_configs


@contextmanager
def with_own_rates(of_configs: list[tuple[Any, str, float]]) -> Iterator[None]:
    """Configurations as they came, while they are saved: that nothing was dropped is no part of them."""
    for config, name, rate in of_configs:
        setattr(config, name, rate)
    try:
        yield
    finally:
        for config, name, _ in of_configs:
            setattr(config, name, 0.0)
