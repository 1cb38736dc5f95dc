"""Liger's layer kernels under a model whose head is prefkern's.

`use_liger_kernel=True` has transformers' Trainer replace a model's layers (RMS norm, rotary
embedding, SwiGLU, ...) by Liger's kernels when training starts, and its forward by one with Liger's
own loss. Here the layers alone are: the head and the loss are prefkern's. They are replaced in the
reference as well, and before anything is computed, so that policy and reference go through the same
kernels and equal models have equal log-probs. Liger replaces some functions (the rotary embedding)
in transformers' module of the family, so for every model of it in the process.

Liger passes over what it does not know, a model's type or an option's name, without a word. That is
an error here, and so is a CPU, on which Liger's layers do not run.
"""

from __future__ import annotations

import inspect
import os
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.utils.import_utils import is_liger_kernel_available

from prefkern.models.heads import unwrap

# What Liger would do to the head and to the loss.
_HEAD = ("fused_linear_cross_entropy", "cross_entropy")


def check_liger(args: TrainingArguments, device: torch.device) -> None:
    """Raise unless Liger's kernels can be applied as `args` ask; loads no model and no kernel.

    Raises ImportError without liger-kernel, ValueError for options without effect, and on a CPU.
    """
    options = _options(args)
    if not args.use_liger_kernel:
        if options:
            raise ValueError("liger_kernel_config has no effect without use_liger_kernel=True")
        return
    for name in _HEAD:
        if options.get(name):
            raise ValueError(
                f"liger_kernel_config's {name} would replace the loss, which is prefkern's: "
                "leave it out. Liger's layer kernels are applied without it"
            )
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "use_liger_kernel=True needs a GPU: Liger's layers are Triton kernels, which do not "
            "run on a CPU"
        )
    if not is_liger_kernel_available():
        raise ImportError("use_liger_kernel=True needs liger-kernel: pip install liger-kernel")


def apply_liger(args: TrainingArguments, *models: nn.Module) -> None:
    """Replace layers of Hugging Face models, bare or wrapped, by Liger's where `args` ask for it.

    `args.liger_kernel_config` is set so that Trainer, which does it again to the policy when
    training starts, leaves the head alone.

    Raises ValueError for a model that Liger has no kernels for, and for an option that it does not
    know.
    """
    if not args.use_liger_kernel:
        return
    import liger_kernel.transformers as liger
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    options = {**_options(args), **dict.fromkeys(_HEAD, False)}
    for model in models:
        base = unwrap(model)
        apply_to_type = MODEL_TYPE_TO_APPLY_LIGER_FN.get(base.config.model_type)
        if apply_to_type is None:
            raise ValueError(
                f"use_liger_kernel=True: Liger has no kernels for {type(base).__name__} (model "
                f"type {base.config.model_type!r})"
            )
        known = set(inspect.signature(apply_to_type).parameters) - {"model", *_HEAD}
        unknown = [name for name in options if name not in known and name not in _HEAD]
        if unknown:
            raise ValueError(
                f"liger_kernel_config has no effect on {type(base).__name__} by "
                f"{', '.join(map(repr, unknown))}; expected some of {', '.join(sorted(known))}"
            )
        liger._apply_liger_kernel_to_instance(model=base, **options)
    args.liger_kernel_config = options


def _options(args: TrainingArguments) -> dict[str, Any]:
    options = args.liger_kernel_config or {}
    if not isinstance(options, dict):
        raise TypeError(f"liger_kernel_config must be a dict, got {options!r}")
    return options
