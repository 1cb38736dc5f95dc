"""transformers' tensor parallelism: what it cannot do is refused before anything is loaded.

A model that `from_pretrained(..., distributed_config=DistributedConfig(tp_size=N))` loads has a part
of each large weight on each of N processes. All of them compute the same batch together, so they
have the same hidden states and the same loss, and transformers' hooks add the parts of a gradient.
The output head has some of the vocabulary's rows on each process: the operator reads them as they
are (`prefkern.ops.shards`), and no logits are gathered.

So the processes count as one where data are counted: one batch, one set of pairs. All processes are
in one such group. A copy of a model would call the model's own weights, since the hooks are closures:
a reference is loaded, never copied.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from packaging.version import Version
from torch import Tensor, nn

from prefkern.models.adapters import is_peft_model
from prefkern.models.heads import unwrap
from prefkern.objectives.running import counted_once
from prefkern.ops.shards import is_dtensor
from prefkern.training.launched import launched_parallelism
from prefkern.training.sharding import mode_of

# Where transformers keeps the parts as DTensors, and PEFT those of its adapters.
_TRANSFORMERS, _PEFT = "5.23", "0.21"
_KEYWORDS = ("distributed_config", "tp_plan", "tp_size")
# How PEFT draws a new adapter without the layer's weight, and the plans whose layers it splits.
_DRAWN, _SPLIT = (True, False, "gaussian"), ("colwise", "rowwise")
# The plan of a weight that all ranks have, and of whose gradient each has a part.
_SUMMED = "replicated_with_grad_allreduce"
_OTHER_SIZES = ("fsdp_size", "dp_replicate_size", "pp_size", "ep_size")
_INSTEAD = "use FSDP2 (fsdp_config={'version': 2}), which shards weights without it"


def size_of(model: Any) -> int:
    """The processes that hold a model together by tensor parallelism; 1: each has all of it."""
    return getattr(unwrap(model), "_tp_size", None) or 1


def with_parallelism(init_kwargs: Mapping[str, Any], args: Any, model: Any) -> dict[str, Any]:
    """Keywords of `from_pretrained` that load a model as the run, or a model of it, is spread."""
    if any(name in init_kwargs for name in _KEYWORDS):
        return dict(init_kwargs)
    size = size_of(model) if isinstance(model, nn.Module) else _launched_size(args)
    if size == 1:
        return dict(init_kwargs)
    if isinstance(model, nn.Module):
        given: Any = unwrap(model).config
        return {**init_kwargs, "distributed_config": given.distributed_config}
    return {**init_kwargs, "distributed_config": {"tp_size": size}}


def check_tensor_parallel(
    args: Any, model: Any, ref_model: Any, peft_config: Any, init_kwargs: Mapping[str, Any]
) -> None:
    """Raise ValueError for what tensor parallelism does not do here. Call it before models are loaded.

    Args:
        args: the run's arguments.
        model, ref_model: as they were given: a model, a name, or None.
        peft_config: of the adapter that the model gets.
        init_kwargs: from `with_parallelism`, of the models that are given by name.
    """
    sizes = {
        what: size_of(each) if isinstance(each, nn.Module) else _size_in(init_kwargs)
        for what, each in (("model", model), ("ref_model", ref_model))
        if each is not None
    }
    size = sizes["model"]
    asked = _launched_size(args)
    if asked not in (1, size):
        raise ValueError(
            f"parallelism_config has tp_size={asked}, and the model is loaded for tp_size={size}: "
            "give the model by its name, or load it with "
            f"distributed_config=DistributedConfig(tp_size={asked})"
        )
    if sizes.get("ref_model", size) != size:
        raise ValueError(
            f"the model is loaded for tp_size={size} and ref_model for tp_size="
            f"{sizes['ref_model']}: load both with the same distributed_config, so that both round "
            "alike"
        )
    if size == 1:
        return
    _check_versions(peft_config is not None or is_peft_model(model))
    _check_alone(args, size, _config_of(model, init_kwargs))
    _check_options(args, peft_config, model)


def _check_versions(is_adapted: bool) -> None:
    from peft import __version__ as peft_version

    needed = [("transformers", transformers.__version__, _TRANSFORMERS)]
    if is_adapted:
        needed.append(("peft", peft_version, _PEFT))
    for package, found, least in needed:
        if Version(found) < Version(least):
            raise ValueError(
                f"tensor parallelism needs {package} {least} or newer, and {found} is installed: "
                f"upgrade it, or {_INSTEAD}"
            )


def _check_alone(args: Any, size: int, config: Any) -> None:
    mode = mode_of(args)
    if mode is not None:
        raise ValueError(
            f"tensor parallelism is not supported together with {mode}: leave one of them out"
        )
    others = {name: getattr(config, name, 1) for name in _OTHER_SIZES}
    found = next((f"{name}={value}" for name, value in others.items() if value > 1), None)
    if found is None and size != args.world_size:
        found = f"{args.world_size} processes"
    if found is not None:
        raise ValueError(
            f"tensor parallelism (tp_size={size}) is not supported together with {found}: set "
            f"tp_size to the number of processes, or {_INSTEAD}"
        )


def _check_options(args: Any, peft_config: Any, model: Any) -> None:
    # transformers refuses it too, once the models are loaded.
    saves = args.save_strategy != "no" and not args.save_only_model
    for is_refused, name, remedy in (
        (saves, "a checkpoint to resume from", f"set save_only_model, or {_INSTEAD}"),
        (args.load_best_model_at_end, "load_best_model_at_end", f"leave it out, or {_INSTEAD}"),
        (not args.disable_dropout, "dropout", "set disable_dropout"),
        (args.use_liger_kernel, "use_liger_kernel", "leave it out"),
        (args.sync_ref_model, "sync_ref_model", "leave it out, or train under DDP"),
    ):
        if is_refused:
            raise ValueError(f"{name} is not supported under tensor parallelism: {remedy}")
    configs = [peft_config] if peft_config is not None else []
    if is_peft_model(model):
        configs += model.peft_config.values()
    for each in configs:
        if getattr(each, "peft_type", None) != "LORA":
            raise ValueError(
                "tensor parallelism is supported for LoRA alone, whose factors PEFT splits as the "
                f"layers are, got {type(each).__name__}: {_INSTEAD}"
            )
        for name in ("modules_to_save", "use_dora", "target_parameters", "trainable_token_indices"):
            value = getattr(each, name, None)
            if value:
                raise ValueError(
                    f"{name}={value!r} of the peft_config is not supported under tensor "
                    f"parallelism, of which PEFT does not know there: {_INSTEAD}"
                )
        if peft_config is not None and each.init_lora_weights not in _DRAWN:
            raise ValueError(
                f"init_lora_weights={each.init_lora_weights!r} is not supported under tensor "
                f"parallelism, where it sees parts of weights: leave it out, or {_INSTEAD}"
            )


def check_summed_gradients(model: Any, args: Any) -> None:
    """Raise ValueError if transformers would sum a gradient over the ranks once for each batch of a step.

    It sums what a norm of one head has gathered so far, earlier batches included.
    """
    base = unwrap(model)
    plan = getattr(base, "_tp_plan", None) or {}
    if size_of(model) == 1 or args.gradient_accumulation_steps == 1:
        return
    for name, module in base.named_modules():
        is_summed = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name)) == _SUMMED
        if is_summed and any(each.requires_grad for each in module.parameters(recurse=False)):
            raise ValueError(
                f"gradient_accumulation_steps={args.gradient_accumulation_steps} is not supported "
                f"under tensor parallelism while {name} is trained, whose gradient transformers "
                "would sum more than once: raise per_device_train_batch_size in its place, or "
                "train with LoRA"
            )


def refuse_tensor_parallel(args: Any, model: Any = None) -> None:
    """Raise ValueError for a reward model, by the arguments or by the model itself."""
    if _launched_size(args) > 1 or (model is not None and size_of(model) > 1):
        raise ValueError(
            f"tensor parallelism is not supported for reward models: leave it out, and {_INSTEAD}"
        )


def check_split_heads(model: Any) -> None:
    """Raise ValueError for heads of attention that do not divide among the processes that split them."""
    base, size = unwrap(model), size_of(model)
    plan: dict[str, str] = getattr(base, "_tp_plan", None) or {}
    if not any(
        rule == "colwise" and name.endswith("self_attn.k_proj") for name, rule in plan.items()
    ):
        return
    config = base.config.get_text_config()
    for name in ("num_attention_heads", "num_key_value_heads"):
        count = getattr(config, name, None) or size
        if count % size:
            raise ValueError(
                f"tensor parallelism (tp_size={size}) splits the heads of attention, and the "
                f"model's {name}={count} does not divide by that: set tp_size to a divisor of "
                f"{count}, or {_INSTEAD}"
            )


@contextmanager
def adapting(model: Any, peft_config: Any) -> Iterator[None]:
    """Within the context PEFT makes an adapter. Raises ValueError for layers that it does not split."""
    check_split_heads(model)
    try:
        yield
    except AttributeError as error:
        if size_of(model) == 1:
            raise
        # It takes a layer's weight for its width, and the experts of a mixture are not such layers.
        raise ValueError(
            f"PEFT does not adapt {peft_config.target_modules!r} under tensor parallelism ({error}),"
            " as where a mixture's experts are one weight: leave these out of target_modules, or "
            f"{_INSTEAD}"
        ) from error


def complete_adapter(model: Any, seed: int | None) -> None:
    """Make the LoRA factors of a model's parts those of the whole layers.

    PEFT gives a factor the width of this rank's part, which transformers takes for the whole width.
    It also draws each part with the same seed, so that all parts would be equal.

    Args:
        seed: draws new factors; None: they have their values.

    Raises ValueError for an adapter on a layer that PEFT does not split: the head, an embedding.
    """
    if size_of(model) == 1 or not is_peft_model(model):
        return
    from peft.tuners.lora import LoraLayer

    draw = None if seed is None else torch.Generator().manual_seed(seed)
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        base: Any = layer.get_base_layer()
        if is_dtensor(base.weight) and getattr(base, "_hf_tp_plan", None) not in _SPLIT:
            raise ValueError(
                f"LoRA on {name.removeprefix('base_model.model.')} is not supported under tensor "
                f"parallelism: leave it out of target_modules, or {_INSTEAD}"
            )
        for adapter in layer.lora_A:
            factors: list[Any] = [layer.lora_A[adapter], layer.lora_B[adapter]]
            for factor in factors:
                factor.out_features, factor.in_features = factor.weight.shape
            first = factors[0].weight
            if draw is not None and is_dtensor(first):
                how = model.peft_config[adapter].init_lora_weights
                _copy_part(first, _drawn(first.shape, how, draw))


def _drawn(shape: torch.Size, how: Any, draw: torch.Generator) -> Tensor:
    """A new first factor, as PEFT draws one."""
    whole = torch.empty(shape)
    if how == "gaussian":
        return nn.init.normal_(whole, std=1 / shape[0], generator=draw)
    return nn.init.kaiming_uniform_(whole, a=math.sqrt(5), generator=draw)


@torch.no_grad()
def _copy_part(weight: Any, whole: Tensor) -> None:
    """Copy this rank's part of a tensor into a DTensor."""
    from torch.distributed.tensor import distribute_tensor

    whole = whole.to(weight.device, weight.dtype)
    part = distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None)
    weight.copy_(part)


def counting_batches_once(accelerator: Accelerator) -> AbstractContextManager[None]:
    """In this region an objective counts a batch that all processes have once.

    With a head over the processes it does so anyway; a plan may leave the head whole.
    """
    given = accelerator.parallelism_config
    if given is None or not given.tp_enabled:
        return nullcontext()
    mesh: Any = accelerator.torch_device_mesh
    return counted_once(None, mesh.get_group("tp"))


def _launched_size(args: Any) -> int:
    return getattr(launched_parallelism(args), "tp_size", 1)


def _config_of(model: Any, init_kwargs: Mapping[str, Any]) -> Any:
    """The DistributedConfig that a model was loaded with, or will be; None without one."""
    if isinstance(model, nn.Module):
        return getattr(unwrap(model).config, "distributed_config", None)
    if not any(init_kwargs.get(name) is not None for name in _KEYWORDS):
        return None
    from transformers.distributed.configuration_utils import DistributedConfig

    given = init_kwargs.get("distributed_config")
    if given is None:
        return DistributedConfig(
            tp_plan=init_kwargs.get("tp_plan"), tp_size=init_kwargs.get("tp_size")
        )
    return DistributedConfig.from_dict(dict(given)) if isinstance(given, Mapping) else given


def _size_in(init_kwargs: Mapping[str, Any]) -> int:
    return getattr(_config_of(None, init_kwargs), "tp_size", 1)
