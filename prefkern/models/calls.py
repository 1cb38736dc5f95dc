"""Helpers to call a model from prefkern: replace a module's forward, and leave no trace of a call.

`replaced_forward` swaps the forward of an output head for one call. `evaluation_mode` and
`without_checkpointing` restore each module's own setting, where `model.train()` would give all of
them the same. `undisturbed` runs a probe in evaluation mode and restores the random state as well.
The other functions switch the cache off, look for compiled modules, and make the error for a model
that does not call its head.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_CHECKPOINTED = "gradient_checkpointing"


@contextmanager
def replaced_forward(
    module: nn.Module, replacement: Callable[[Tensor], Tensor]
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Replace a module's forward within the context; yields the original. Its hooks still fire."""
    # accelerate puts its device hooks into `forward`, which calls `_old_forward`: keep them there.
    attribute = "_old_forward" if hasattr(module, "_hf_hook") else "forward"
    original = getattr(module, attribute)
    is_own = attribute in vars(module)
    setattr(module, attribute, replacement)
    try:
        yield original
    finally:
        if is_own:
            setattr(module, attribute, original)
        else:
            delattr(module, attribute)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within the context; then each module's own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def without_checkpointing(model: nn.Module) -> Iterator[None]:
    """No gradient checkpointing within the context; then in the same blocks as before."""
    blocks = [module for module in model.modules() if getattr(module, _CHECKPOINTED, False)]
    for module in blocks:
        setattr(module, _CHECKPOINTED, False)
    try:
        yield
    finally:
        for module in blocks:
            setattr(module, _CHECKPOINTED, True)


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode without gradients; restores modes and random state at the end."""
    devices = [device] if device.type == "cuda" else []
    with evaluation_mode(model), torch.no_grad(), torch.random.fork_rng(devices=devices):
        yield


def without_cache(base: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(base.forward).parameters
    return {"use_cache": False, **inputs} if "use_cache" in parameters else dict(inputs)


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile compiles this module."""
    if module._compiled_call_impl is not None:
        return True
    # Importing it takes seconds, and is done by whoever compiles.
    dynamo: Any = sys.modules.get("torch._dynamo.eval_frame")
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def uncalled(base: Any, head: nn.Module) -> RuntimeError:
    return RuntimeError(
        f"{type(base).__name__} did not call its output head ({type(head).__name__}) as a module, "
        "so its log-probs cannot be computed without logits"
    )
