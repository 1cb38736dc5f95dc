"""Prepares a model for training: its PEFT adapter, its dropout, and checks of its reference.

With an adapter the same model also serves as the reference (`prefkern.models.own_reference`). That
is right only if everything else in the model stays as it was. So these checks refuse an adapter
that is merged, one that trains or has changed the base model, and one that transformers holds by
itself. `disable_dropout` sets every dropout rate to 0, so that policy and reference compute the
same function; the saved configs keep their own rates.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedConfig
from transformers.utils.import_utils import is_peft_available

from prefkern.models.heads import unwrap

# The names of dropout rates contain one of these: attention_dropout, attn_pdrop, layerdrop.
_DROPOUTS = ("dropout", "pdrop", "layerdrop")
# Values of init_lora_weights that subtract the adapter's first product from the base weights.
_ALTERS_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# The name of the model without its adapters, where the name of an adapter is expected: PEFT's own.
BASE = "__base__"


def is_peft_model(model: Any) -> bool:
    if not is_peft_available():
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)


def is_trained_adapter(model: Any) -> bool:
    """Whether the adapters of a PEFT model may change it: False only if they provably do not.

    A low-rank product does not if A or B is 0, as in a fresh LoRA adapter, nor does a copy of a
    module that equals the module. Everything else may.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper

    shown = {id(parameter) for _, parameter in base_parameters(model)}
    modules: Iterator[Any] = model.modules()
    for module in modules:
        if isinstance(module, LoraLayer):
            pairs = [(module.lora_A, module.lora_B)]
            pairs += [(module.lora_embedding_A, module.lora_embedding_B)]
            for first, second in pairs:
                for name in first:
                    # Of an embedding they are parameters; elsewhere layers, B with a bias or not.
                    up: Any = second[name]
                    a: Any = getattr(first[name], "weight", first[name])
                    b, bias = getattr(up, "weight", up), getattr(up, "bias", None)
                    if bool(a.any() and b.any()) or (bias is not None and bool(bias.any())):
                        return True
                    shown |= {id(a), id(b), id(bias)}
        elif isinstance(module, ModulesToSaveWrapper):
            whole: Any = module.original_module
            original = dict(whole.named_parameters())
            for copied in module.modules_to_save.values():
                for name, value in copied.named_parameters():
                    if not torch.equal(value, original[name]):
                        return True
                    shown.add(id(value))
    return any(id(parameter) not in shown for parameter in model.parameters())


def check_unmerged(model: nn.Module) -> None:
    """Raise ValueError for adapters that are merged into the weights: they would not be trained.

    They would spoil the reference too: a layer that is switched off removes a merged adapter only
    at its next forward, so until then its weights are not the reference's.
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
            f"the model's adapter {names} is merged into its weights, so it would not be trained: "
            "call model.unmerge_adapter() first, or model.merge_and_unload() and give a peft_config"
        )


def check_no_native_adapter(model: Any) -> None:
    """Raise ValueError for an adapter that transformers itself has loaded into the model.

    PEFT would replace it by a new one. Such an adapter is not trained, and a checkpoint does not
    bring it back.
    """
    base = unwrap(model)
    if getattr(base, "_hf_peft_config_loaded", False):
        names = ", ".join(map(repr, base.peft_config))
        raise ValueError(
            f"the model holds an adapter ({names}) that transformers loaded or added: load it with "
            "peft.PeftModel.from_pretrained(base, folder, is_trainable=True) to train it on, or "
            "give the model that merge_and_unload() makes of that"
        )


def check_reference_adapter(
    model: Any, name: str | None, ref_model: Any, initial: Any = None
) -> None:
    """Raise ValueError unless the reference stays as it is while the model is trained.

    A `ref_model` must not share parameters that are trained. Without one the model is its own
    reference, with the adapter `name` or none. `name` must be an adapter of the model, but not the
    one that is trained. Training must not change the base model. Where the base model is the
    reference, and not an `initial` adapter, it must also equal the model before it was adapted.
    """
    if name is not None:
        _check_name(model, name, ref_model)
    if ref_model is not None:
        _check_nothing_shared(model, ref_model)
    if not is_peft_model(model) or ref_model is not None:
        return
    _check_biases(model)
    _check_base_is_frozen(model)
    if initial is None and name in (None, BASE):
        _check_base_is_initial(model)


def _check_name(model: Any, name: str, ref_model: Any) -> None:
    if ref_model is not None:
        raise ValueError(f"give either ref_adapter_name ({name!r}) or ref_model, not both")
    if not is_peft_model(model):
        raise ValueError(
            f"ref_adapter_name is {name!r}, but the model is a {type(model).__name__}; the name "
            "must be that of an adapter of a PEFT model"
        )
    if name == BASE:
        return
    if name not in model.peft_config:
        known = ", ".join(map(repr, model.peft_config))
        raise ValueError(
            f"ref_adapter_name must be an adapter of the model ({known}), or {BASE!r} for the model "
            f"without its adapter, got {name!r}"
        )
    if name in model.active_adapters:
        raise ValueError(
            f"ref_adapter_name is {name!r}, which is the adapter that is trained: load the "
            "reference's adapter under another name (model.load_adapter(path, adapter_name=...))"
        )


def _check_nothing_shared(model: nn.Module, ref_model: nn.Module) -> None:
    shared = {id(parameter) for parameter in ref_model.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) in shared:
            raise ValueError(
                f"ref_model shares {name} with the model that is trained, so it would change too; "
                "pass a copy (copy.deepcopy), or None to have one made"
            )


def _check_biases(model: Any) -> None:
    for name, config in model.peft_config.items():
        bias = getattr(config, "bias", "none")
        if bias != "none":
            raise ValueError(
                f"the adapter {name!r} trains biases of the base model (bias={bias!r}), so the "
                "model without the adapter is no longer the reference; use bias='none', or pass "
                "ref_model"
            )


def _check_base_is_frozen(model: Any) -> None:
    trained = [name for name, each in base_parameters(model) if each.requires_grad]
    if trained:
        more = f" and {len(trained) - 1} others" if len(trained) > 1 else ""
        raise ValueError(
            f"{trained[0]}{more} would be trained, but the reference uses the same parameters: it "
            "would change too. Freeze them (requires_grad_(False)), let the adapter train a copy "
            "(modules_to_save, trainable_token_indices), or pass ref_model"
        )


def base_parameters(model: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """The names and parameters that are still in use when all adapters are switched off."""
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
                # LLaMA-Adapter's layers are not a BaseTunerLayer.
                if not key.split(".")[-1].startswith("adaption_"):
                    yield key, parameter
            for key, child in module.named_children():
                yield from below(child, f"{name}.{key}" if name else key)

    return below(model.get_base_model(), "")


def _check_base_is_initial(model: Any) -> None:
    """Raise ValueError for an adapter whose initialisation changes the base model."""
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
            "the model without the adapter is not the initial model, which is the reference; "
            f"{instead}, or pass ref_model"
        )


def adapt(
    model: Any, peft_config: Any, *, disable_dropout: bool, gradient_checkpointing: bool
) -> Any:
    """The model, with a new adapter if `peft_config` is given.

    Args:
        disable_dropout: True if dropout will be switched off; an adapter with dropout is then an
            error.
        gradient_checkpointing: True if the model's blocks are checkpointed.
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
        # Otherwise no input of a frozen model's checkpointed blocks requires a gradient.
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
    """Set every dropout rate to 0, including rates that are kept outside of dropout modules.

    Returns the changes in configs, (config, name, old rate), for `with_own_rates`.
    """
    of_configs = []
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        # Llama's attention keeps its rate as a number; Falcon reads it from the config at each
        # call.
        config = getattr(module, "config", None)
        for owner in (module, config) if isinstance(config, PreTrainedConfig) else (module,):
            for name, rate in _dropout_rates(owner).items():
                setattr(owner, name, 0.0)
                if owner is config:
                    of_configs.append((config, name, rate))
    return of_configs


@contextmanager
def with_own_rates(of_configs: list[tuple[Any, str, float]]) -> Iterator[None]:
    """Restore the configs' own dropout rates within the context, so that these are saved."""
    for config, name, rate in of_configs:
        setattr(config, name, rate)
    try:
        yield
    finally:
        for config, name, _ in of_configs:
            setattr(config, name, 0.0)
