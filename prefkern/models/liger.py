"""Liger's layer kernels in a model whose head and loss are prefkern's.

With `use_liger_kernel=True`, transformers' Trainer replaces a model's layers (RMS norm, rotary
embedding, SwiGLU, ...) by Liger's kernels when training starts. It also replaces the model's
forward by one with Liger's own loss. prefkern replaces the layers only, because the head and the
loss are its own. It does so in the reference too, and before anything is computed. So policy and
reference run the same kernels, and equal models have equal log-probs. Liger replaces some functions
(the rotary embedding) in transformers' module of the model family, and so for every model of that
family in the process.

Liger silently ignores a model type or an option that it does not know. Here that is an error. A CPU
is an error too, because Liger's layers do not run on it.
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

# The options that would let Liger replace the head and the loss.
_HEAD = ("fused_linear_cross_entropy", "cross_entropy")


def check_liger(args: TrainingArguments, device: torch.device) -> None:
    """Raise unless Liger's kernels can be applied as `args` say; loads no model and no kernel.

    Raises ImportError if liger-kernel is missing, ValueError on a CPU and for an option that has no
    effect or would replace the loss.
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
    """Replace layers of Hugging Face models, bare or wrapped, by Liger's if `args` say so.

    Trainer applies Liger to the policy once more when training starts. So this sets
    `args.liger_kernel_config` to options that leave the head alone.

    Raises ValueError for a model that Liger has no kernels for, and for an option that Liger does
    not know.
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
                f"liger_kernel_config has options without effect on {type(base).__name__}: "
                f"{', '.join(map(repr, unknown))}; expected some of {', '.join(sorted(known))}"
            )
        liger._apply_liger_kernel_to_instance(model=base, **options)
    args.liger_kernel_config = options


def _options(args: TrainingArguments) -> dict[str, Any]:
    options = args.liger_kernel_config or {}
    if not isinstance(options, dict):
        raise TypeError(f"liger_kernel_config must be a dict, got {options!r}")
    return options
