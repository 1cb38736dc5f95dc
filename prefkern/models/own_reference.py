"""A model as its own reference, for the time of a pass: whatever the pass changes is put back.

With an adapter, the reference is the same model in another state:

- its adapter switched off, or another one switched on (`adapter_in_use`);
- its adapter with the weights that it had before training (`InitialAdapter`).

PEFT's own switches do not restore what they find: they make frozen weights of an adapter trainable,
switch on layers that were off, and leave the forward of a prompt's model replaced. Here all of this
is noted before and restored after, also after an exception.

An initial adapter is not another adapter of the model: its values stand in for the trained ones
during the pass. So it works for every kind of adapter, and no checkpoint holds it. Under FSDP2 and
tensor parallelism each rank keeps its part of the values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from prefkern.models.adapters import BASE, base_parameters

# What PEFT sets on modules to switch adapters.
_SWITCHES = (
    "_active_adapter",
    "_adapters_disabled",
    "_disable_adapters",
    "active_adapter",
    "forward",
    "prepare_inputs_for_generation",
)
_CHECKPOINTED = "_checkpoint_wrapped_module."
# What to do where an initial adapter cannot be the reference.
ALTERNATIVES = (
    "set precompute_ref_log_probs, or load the adapter a second time under a name of its own "
    "(model.load_adapter(folder, adapter_name=...)) and name it in ref_adapter_name"
)


@contextmanager
def adapter_in_use(model: Any, name: str | None) -> Iterator[None]:
    """Use another adapter of a PEFT model, or none (None or "__base__"), within the context."""
    with switches_put_back(model):
        if name is None or name == BASE:
            with model.disable_adapter():
                yield
            return
        active = list(model.active_adapters)
        model.set_adapter(name)
        try:
            yield
        finally:
            if len(active) == 1:
                model.set_adapter(active[0])
            else:
                model.base_model.set_adapter(active)


@contextmanager
def switches_put_back(model: nn.Module) -> Iterator[None]:
    """At the end, the weights train that trained before, and the same adapters are in use."""
    trained = {
        name: (parameter, parameter.requires_grad) for name, parameter in model.named_parameters()
    }
    found = [
        (module, {name: vars(module)[name] for name in _SWITCHES if name in vars(module)})
        for module in model.modules()
    ]
    try:
        yield
    finally:
        for module, switches in found:
            for name in vars(module).keys() & {*_SWITCHES} - switches.keys():
                delattr(module, name)
            vars(module).update(switches)
        # FSDP2 exchanges a parameter for its shard and back: both have to be as before.
        for name, parameter in model.named_parameters():
            if name in trained:
                parameter.requires_grad_(trained[name][1])
        for parameter, requires_grad in trained.values():
            parameter.requires_grad_(requires_grad)


class InitialAdapter:
    """The values that the adapters of a PEFT model have now, to be its reference later."""

    def __init__(self, model: Any) -> None:
        base = {id(parameter) for _, parameter in base_parameters(model)}
        self._values = {
            name: parameter.detach().clone()
            for name, parameter in model.named_parameters()
            if id(parameter) not in base
        }

    def items(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._values.items()

    @contextmanager
    def in_use(self, model: nn.Module) -> Iterator[None]:
        """These values in the model's parameters within the context; then its own again.

        Raises ValueError if the parameters are sharded by now, and not by FSDP2.
        """
        units = [module for module in model.modules() if _is_fsdp2(module)]
        _reshard(units)
        # FSDP's checkpointing puts a module between.
        parameters = {
            name.replace(_CHECKPOINTED, ""): parameter
            for name, parameter in model.named_parameters()
        }
        for name, value in self._values.items():
            own = parameters.get(name)
            is_other = own is not None and not units and _is_in_shards(own) > _is_in_shards(value)
            if own is None or own.shape != value.shape or is_other:
                raise ValueError(
                    "the reference is the adapter before training, and the adapter's weights are "
                    f"sharded now ({name}): {ALTERNATIVES}"
                )
        own = {name: parameters[name] for name in self._values}
        # An autocast around the whole run keeps its cast of a parameter, whatever the values are.
        torch.clear_autocast_cache()
        in_shards = {name: each for name, each in own.items() if _is_in_shards(each)}
        whole = {name: each for name, each in own.items() if name not in in_shards}
        try:
            with self._in_shards(in_shards), self._in_data(whole):
                yield
        finally:
            # What is gathered and cast is of these values.
            _reshard(units)
            torch.clear_autocast_cache()

    @contextmanager
    def _in_data(self, parameters: dict[str, nn.Parameter]) -> Iterator[None]:
        trained = {name: parameter.data for name, parameter in parameters.items()}
        try:
            for name, parameter in parameters.items():
                self._values[name] = value = self._values[name].to(parameter.device)
                parameter.data = value.to(parameter.dtype)
            yield
        finally:
            for name, value in trained.items():
                parameters[name].data = value

    @contextmanager
    def _in_shards(self, parameters: dict[str, Any]) -> Iterator[None]:
        """In place: FSDP2 gathers from memory of its own, of which a shard is a view."""
        from torch.distributed.tensor import DTensor, distribute_tensor

        for name, parameter in parameters.items():
            value = self._values[name]
            if not isinstance(value, DTensor):
                # From rank 0: where one rank alone loads the weights, the others' are of no use.
                mesh, placements = parameter.device_mesh, parameter.placements
                whole = value.to(mesh.device_type, parameter.dtype)
                self._values[name] = distribute_tensor(whole, mesh, placements)
        locals_ = {name: parameter.detach().to_local() for name, parameter in parameters.items()}
        trained = {name: shard.clone() for name, shard in locals_.items()}
        try:
            for name, shard in locals_.items():
                shard.copy_(self._values[name].to_local())
            yield
        finally:
            for name, shard in locals_.items():
                shard.copy_(trained[name])


def _is_in_shards(value: Tensor) -> bool:
    return is_traceable_wrapper_subclass(value.data)


def _is_fsdp2(module: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def _reshard(units: list[Any]) -> None:
    """Free what FSDP2 has gathered of these units, and has not freed itself."""
    for unit in units:
        unit.reshard()
