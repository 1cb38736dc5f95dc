"""TRL's options of `trl dpo` that mean something here under another name, or as part of another.

A file that was written for `trl dpo --config` runs under `prefkern train --objective dpo`: the model,
the data and the adapter have TRL's names as further names of options here, and TRL's losses are read
into `objective`, `beta` and `objective_options`, with TRL's defaults:

    loss_type: ipo, beta: 0.1   ->   objective ipo, tau 0.1, length_normalized true

`trl dpo` is the name of a command, and its loss is `loss_type`: so beside `--objective dpo` the
latter decides, and beside any other objective it is an error.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import Any

from prefkern.training.options import json_object

# TRL's own default.
_BETA = 0.1
# What a loss takes beside beta. `loss` holds TRL's defaults where nothing was given.
_LOSS_OPTIONS = {
    "ipo": lambda loss, beta: {"tau": beta, "length_normalized": True},
    "discopop": lambda loss, beta: {"tau": loss.discopop_tau},
    "bco_pair": lambda loss, beta: {"reward_shift": False},
    "sft": lambda loss, beta: {"token_mean": True},
    **dict.fromkeys(
        ("robust", "exo_pair", "aot", "aot_unpaired"),
        lambda loss, beta: {"label_smoothing": loss.label_smoothing},
    ),
}
_WITHOUT_BETA = ("ipo", "sft")
# The rank of TRL's adapters.
_RANK = 16


@dataclass
class LossArguments:
    """TRL's names of losses."""

    _argument_group_name = "TRL's names of losses"

    loss_type: list[str] | None = field(
        default=None,
        metadata={"help": "The objective by TRL's name, with TRL's defaults; several are a sum."},
    )
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "A weight for each of several."}
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": "Probability that a preference is flipped."}
    )
    f_divergence_type: str = field(
        default="reverse_kl", metadata={"help": "Divergence of policy and reference."}
    )
    f_alpha_divergence_coef: float = field(
        default=0.5, metadata={"help": "Coefficient of f_divergence_type alpha_divergence."}
    )
    discopop_tau: float = field(default=0.05, metadata={"help": "tau of discopop."})


def read_losses(loss: LossArguments, config: dict[str, Any]) -> None:
    """Put TRL's options of a loss into the options of the training config that were given.

    These are objective, beta and objective_options. Raises ValueError where both say something
    else.
    """
    names = loss.loss_type or []
    own = json_object("objective_options", config.get("objective_options")) or {}
    beta = config.get("beta")
    options: dict[str, Any] = {}
    if names:
        objective = config.get("objective", "dpo")
        if objective.lower() not in ("dpo", "+".join(names)):
            raise ValueError(
                f"--loss_type is {' '.join(names)} and --objective {objective}; give one (beside "
                "--objective dpo, --loss_type decides)"
            )
        config["objective"] = "+".join(names)
        beta = own.get("beta", _BETA) if beta is None else beta
        config["beta"] = None if set(names) <= set(_WITHOUT_BETA) else beta
        for name in names:
            for option, value in _LOSS_OPTIONS.get(name, lambda *_: {})(loss, beta).items():
                if options.setdefault(option, value) != value:
                    raise ValueError(
                        f"--loss_type {' '.join(names)}: two of them take {option!r} of other values, "
                        "which a sum here does not; train with one, or build a Mixture in Python"
                    )
    given = LossArguments()
    for option in ("label_smoothing", "f_divergence_type", "f_alpha_divergence_coef"):
        value = getattr(loss, option)
        if value != getattr(given, option):
            options.setdefault(option, value)
    if loss.discopop_tau != given.discopop_tau and "discopop" not in names:
        raise ValueError(
            f"--discopop_tau is {loss.discopop_tau}, and has no effect without discopop"
        )
    if loss.loss_weights is not None:
        options["loss_weights"] = loss.loss_weights
    if not options:
        return
    for option, value in options.items():
        if own.setdefault(option, value) != value:
            raise ValueError(
                f"objective_options has {option} {own[option]!r}, and TRL's options say {value!r}; "
                "give one"
            )
    config["objective_options"] = own


def read_peft(lora: Any, given: set[str]) -> None:
    """Give `lora` TRL's rank under `use_peft`. Raises ValueError for a rank beside its opposite."""
    if lora.use_peft and "lora_r" not in given:
        lora.lora_r = _RANK
        given.add("lora_r")
    if lora.use_peft is not None and bool(lora.use_peft) != bool(lora.lora_r):
        raise ValueError(
            f"--use_peft is {str(lora.use_peft).lower()}, and --lora_r {lora.lora_r}; give one"
        )


def quantization(model: Any, is_adapted: bool) -> dict[str, Any] | None:
    """The quantization_config of `load_in_4bit` and `load_in_8bit`, as TRL makes it; or None.

    Raises ValueError for both, or without an adapter, and ImportError without bitsandbytes.
    """
    bits = [name for name in ("load_in_4bit", "load_in_8bit") if getattr(model, name)]
    for name in ("bnb_4bit_quant_type", "use_bnb_nested_quant"):
        is_default = getattr(model, name) == type(model).__dataclass_fields__[name].default
        if not is_default and "load_in_4bit" not in bits:
            raise ValueError(f"--{name} has no effect without --load_in_4bit")
    if not bits:
        return None
    if len(bits) == 2:
        raise ValueError("give either --load_in_4bit or --load_in_8bit, not both")
    if not is_adapted:
        raise ValueError(
            f"--{bits[0]} needs an adapter, since quantised weights are not trained: give --use_peft, "
            "--lora_r or --adapter"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(f"--{bits[0]} needs bitsandbytes: pip install bitsandbytes")
    made: dict[str, Any] = {"quant_method": "bitsandbytes", bits[0]: True}
    if model.load_in_4bit:
        made["bnb_4bit_quant_type"] = model.bnb_4bit_quant_type
        made["bnb_4bit_use_double_quant"] = model.use_bnb_nested_quant
        if model.dtype != "auto":
            made["bnb_4bit_compute_dtype"] = model.dtype
    return made
