"""A model as its own reference, for the time of a pass: whatever the pass changes is put back.

With an adapter, the reference is the same model in another state:

- its adapter switched off, or another one switched on (`adapter_in_use`);
- its adapter with the weights that it had before training (`InitialAdapter`).

PEFT's own switches do not restore what they find: they make frozen weights of an adapter trainable,
switch on layers that were off, and leave the forward of a prompt's model replaced. Here all of this
is noted before and restored after, also after an exception.

An initial adapter is not another adapter of the model: its values stand in for the trained ones
during the pass. So it works for every kind of adapter, and no checkpoint holds it.
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

        Raises ValueError if the parameters are sharded by now.
        """
        parameters = dict(model.named_parameters())
        for name, value in self._values.items():
            own = parameters.get(name)
            if own is None or own.shape != value.shape or is_traceable_wrapper_subclass(own.data):
                raise ValueError(
                    "the reference is the adapter before training, and the adapter's weights are "
                    f"sharded now ({name}): {ALTERNATIVES}"
                )
        trained = {name: parameters[name].data for name in self._values}
        # An autocast around the whole run keeps its cast of a parameter, whatever the values are.
        torch.clear_autocast_cache()
        try:
            for name, value in self._values.items():
                own = parameters[name]
                self._values[name] = value = value.to(own.device)
                own.data = value.to(own.dtype)
            yield
        finally:
            for name, value in trained.items():
                parameters[name].data = value
            torch.clear_autocast_cache()
