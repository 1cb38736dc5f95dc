"""Tied weights of an adapted model under FSDP2, which Accelerate and transformers look for by class.

Accelerate puts two tied modules into one unit, as FSDP2 asks, but does not see one that PEFT keeps
behind its copy (`modules_to_save`). Where rank 0 alone holds the weights, it has transformers tie
them again, and that fails for a head inside an adapter. Here ties are found by identity.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from prefkern.models.adapters import is_peft_model


def untie_originals(model: nn.Module) -> None:
    """Give each tied module that an adapter trains a copy of a weight of its own.

    The weight is frozen, so the two stay equal.
    """
    if not is_peft_model(model):
        return
    from peft.utils.other import ModulesToSaveWrapper

    for module in [each for each in model.modules() if isinstance(each, ModulesToSaveWrapper)]:
        original: Any = module.original_module
        tied = {id(model.get_parameter(names[0])) for names in _ties(model)}
        for name, parameter in [*original.named_parameters(recurse=False)]:
            if id(parameter) in tied and not parameter.requires_grad:
                own = nn.Parameter(parameter.detach().clone(), requires_grad=False)
                setattr(original, name, own)


@contextmanager
def own_ties(model: nn.Module) -> Iterator[None]:
    """Within the context `model.tie_weights` of an adapted model ties what is tied now."""
    if not is_peft_model(model):
        yield
        return
    ties = _ties(model)

    def tie_weights() -> None:
        for first, *others in ties:
            weight = model.get_parameter(first)
            for name in others:
                path, _, last = name.rpartition(".")
                setattr(model.get_submodule(path), last, weight)

    vars(model)["tie_weights"] = tie_weights
    try:
        yield
    finally:
        del vars(model)["tie_weights"]


def _ties(model: nn.Module) -> list[list[str]]:
    """The names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [each for each in names.values() if len(each) > 1]
