"""Checks that a run can change its model, since one that cannot would end as if it had trained.

Nothing requires a gradient after `PeftModel.from_pretrained` (which freezes an adapter by default),
or after freezing a model by hand. With gradient checkpointing, torch does not notice either, since
the inputs of the checkpointed blocks require one. An optimizer that was made before the model was
adapted, or for another copy of it, steps over parameters that get no gradient. Parameters may also
require a gradient and take no part in the loss: the first backward shows that.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from prefkern.models.adapters import is_peft_model

logger = logging.getLogger(__name__)


def check_trainable(model: Any) -> None:
    """Raise ValueError if no parameter of the model requires a gradient."""
    if any(parameter.requires_grad for parameter in model.parameters()):
        return
    if is_peft_model(model):
        if _is_switched_off(model):
            raise ValueError(
                "nothing can be trained: the model's adapter is switched off; call "
                "model.base_model.enable_adapter_layers() first"
            )
        beside = ""
        if len(model.peft_config) > 1:
            beside = (
                ". PEFT before 0.21 freezes it also when another is loaded beside it: call "
                f"model.set_adapter({model.active_adapters[0]!r}) then"
            )
        raise ValueError(
            "nothing can be trained: the model's adapter is frozen, which is PEFT's default for one "
            f"that is loaded; use PeftModel.from_pretrained(base, folder, is_trainable=True){beside}"
        )
    raise ValueError(
        f"nothing can be trained: no parameter of the {type(model).__name__} requires a gradient; "
        "use model.requires_grad_(True), or give a peft_config"
    )


@contextmanager
def must_reach_parameters(model: Any) -> Iterator[None]:
    """Raise ValueError at the end unless a backward within has reached a parameter to train."""
    is_reached = False

    def reached(_: Tensor) -> None:
        nonlocal is_reached
        is_reached = True

    # Not a look at the gradients afterwards: some optimizers step and clear them in the backward.
    hooks = [
        parameter.register_post_accumulate_grad_hook(reached)
        for parameter in model.parameters()
        if parameter.requires_grad
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if not is_reached:
        raise unreached(model)


def unreached(model: Any) -> ValueError:
    """The error for parameters that take no part in the loss, as of an adapter not in use."""
    trained = [name for name, each in model.named_parameters() if each.requires_grad]
    remedy = "freeze them, and make trainable what the model uses"
    if is_peft_model(model):
        active = ", ".join(map(repr, model.active_adapters))
        remedy = f"the active adapter is {active}: model.set_adapter(name) makes another active"
    return ValueError(
        f"nothing is trained: the loss depends on none of the {len(trained)} parameters that "
        f"require a gradient, such as {trained[0] if trained else 'none'}; {remedy}"
    )


def _is_switched_off(model: Any) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(
        module.disable_adapters for module in model.modules() if isinstance(module, BaseTunerLayer)
    )


def check_optimizer(model: nn.Module, optimizer: Any) -> None:
    """Raise ValueError for an optimizer that holds none of the parameters to train.

    One that holds some of them may be meant so: the others are counted in a warning.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = sum(id(parameter) in held for parameter in trained)
    if trained and not found:
        raise ValueError(
            f"optimizers: the {type(optimizer).__name__} that was given holds none of the model's "
            f"{len(trained)} trainable parameters, so nothing would be trained; make it from the "
            "parameters of the model that is given (with an adapter: get_peft_model first, and "
            "no peft_config)"
        )
    if found < len(trained):
        logger.warning(
            "the optimizer that was given holds %d of the model's %d trainable parameters; the "
            "others stay as they are",
            found,
            len(trained),
        )
