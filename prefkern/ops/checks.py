"""Checks of arguments: each error names the argument, what was given and what is expected.

The checks look at types, shapes, dtypes, devices and Python numbers. So they cost no device
synchronisation and take no memory. One check needs values, the range of the labels: it is in
`prefkern.ops.sequences.select`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prefkern.ops import plain
from prefkern.ops.plain import shown

if TYPE_CHECKING:
    from prefkern.ops.shards import VocabShard

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_FLOATS = "float32, bfloat16, float16 or float64"
# Factors and divisors of logits are within 1e-6 and 1e6: beyond, logits would overflow float32.
LARGEST = 1e6


def head(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    prefix: str = "",
    shard: VocabShard | None = None,
) -> None:
    """Check hidden states against a head; `prefix` is "ref_" for a reference's.

    The part of a head that a shard has may be empty.
    """
    for name, value, shape in (("hidden", hidden, "[..., H]"), ("weight", weight, "[V, H]")):
        if not isinstance(value, Tensor):
            raise TypeError(f"{prefix}{name} must be a tensor {shape}, got {shown(value)}")
        if value.dtype not in FLOATS:
            raise TypeError(f"{prefix}{name} must be {_FLOATS}, got {value.dtype}")
        dense(f"{prefix}{name}", value)
        if value.device.type == "meta":
            raise ValueError(
                f"{prefix}{name} must hold numbers, got a tensor {list(value.shape)} on meta; "
                "prefkern.plan_for says what a call of that shape costs"
            )
    if weight.ndim != 2 or 0 in weight.shape[0 if shard is None else 1 :]:
        raise ValueError(f"{prefix}weight must have shape [V, H], got {list(weight.shape)}")
    if hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{prefix}hidden must have shape [..., H] with H = {weight.shape[1]} as in "
            f"{prefix}weight {list(weight.shape)}, got {list(hidden.shape)}"
        )
    if weight.device != hidden.device:
        raise ValueError(
            f"{prefix}weight is on {weight.device} and {prefix}hidden on {hidden.device}; "
            "they must be on one device"
        )
    if shard is not None and shard.start + weight.shape[0] > shard.size:
        raise ValueError(
            f"{prefix}weight has {weight.shape[0]} rows, and vocab has "
            f"{shard.size - shard.start} entries from its start, {shard.start}, to its size, "
            f"{shard.size}"
        )
    # Autocast leaves float64 as it is.
    autocast = torch.is_autocast_enabled(hidden.device.type) and torch.float64 not in (
        hidden.dtype,
        weight.dtype,
    )
    if weight.dtype != hidden.dtype and not autocast:
        raise TypeError(
            f"{prefix}hidden is {hidden.dtype} and {prefix}weight {weight.dtype}; "
            "they must have one dtype, or the call must run under torch.autocast "
            "(which leaves float64 alone)"
        )
    if bias is None:
        return
    if not isinstance(bias, Tensor):
        raise TypeError(f"{prefix}bias must be a tensor [V] or None, got {shown(bias)}")
    dense(f"{prefix}bias", bias)
    if bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{prefix}bias must have shape [V] = [{weight.shape[0]}], got {list(bias.shape)}"
        )
    # Autocast rounds all three to one dtype, except float64.
    is_odd = torch.float64 in (bias.dtype, weight.dtype) or not autocast
    if bias.dtype not in FLOATS or (bias.dtype != weight.dtype and is_odd):
        raise TypeError(f"{prefix}bias must be {weight.dtype} as weight is, got {bias.dtype}")
    if bias.device != weight.device:
        raise ValueError(f"{prefix}bias is on {bias.device} and weight on {weight.device}")


def dense(name: str, value: Tensor) -> None:
    if value.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got a nested one")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {value.layout}")


def low_rank(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    lora_hidden: Tensor | None,  # (..., R)
    lora_weight: Tensor | None,  # (V, R)
) -> None:
    """Check an adapter of the head against the head."""
    given = {"lora_hidden": (lora_hidden, "[..., R]"), "lora_weight": (lora_weight, "[V, R]")}
    if all(value is None for value, _ in given.values()):
        return
    for name, (value, shape) in given.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{name} must be a tensor {shape}, got {shown(value)}; an adapter has both "
                "lora_hidden and lora_weight"
            )
        if value.dtype not in FLOATS:
            raise TypeError(f"{name} must be {_FLOATS}, got {value.dtype}")
        dense(name, value)
        if value.dtype == torch.float64 != hidden.dtype:
            raise TypeError(
                f"{name} is float64 and hidden {hidden.dtype}; cast one to the dtype of the other"
            )
        if value.device != hidden.device:
            raise ValueError(f"{name} is on {value.device} and hidden on {hidden.device}")
    assert lora_hidden is not None and lora_weight is not None
    if lora_weight.ndim != 2 or lora_weight.shape[0] != weight.shape[0] or not lora_weight.shape[1]:
        raise ValueError(
            f"lora_weight must have shape [V, R] with V = {weight.shape[0]} as in weight, "
            f"got {list(lora_weight.shape)}"
        )
    expected = [*hidden.shape[:-1], lora_weight.shape[1]]
    if list(lora_hidden.shape) != expected:
        raise ValueError(
            f"lora_hidden must have hidden's shape with R = {lora_weight.shape[1]} in place of H, "
            f"{expected}, got {list(lora_hidden.shape)}"
        )


def same_tokens(hidden: Tensor, ref_hidden: Tensor) -> None:
    """Check that a reference has the policy's tokens and device."""
    if ref_hidden.shape[:-1] != hidden.shape[:-1] or ref_hidden.device != hidden.device:
        raise ValueError(
            f"ref_hidden must have hidden's shape (H may differ) and device, "
            f"{list(hidden.shape)} on {hidden.device}; "
            f"got {list(ref_hidden.shape)} on {ref_hidden.device}"
        )


def same_entries(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> None:
    """Check that both have the same vocabulary, and both are float64 or neither."""
    if ref_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"ref_weight has {ref_weight.shape[0]} vocabulary entries and weight "
            f"{weight.shape[0]}: a divergence needs two distributions over the same entries"
        )
    if (ref_hidden.dtype == torch.float64) != (hidden.dtype == torch.float64):
        raise TypeError(
            f"ref_hidden is {ref_hidden.dtype} and hidden {hidden.dtype}: "
            "a divergence needs both distributions in float64, or neither"
        )


def labels(labels: Tensor, shape: torch.Size, device: torch.device) -> None:
    """Check the labels' type and shape, which is that of hidden without its last dimension."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be an int64 tensor, got {shown(labels)}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    dense("labels", labels)
    if labels.shape != shape:
        raise ValueError(
            f"labels must have the shape of hidden without its last dimension, {list(shape)}, "
            f"got {list(labels.shape)}"
        )
    if labels.device != device:
        raise ValueError(f"labels are on {labels.device} and hidden on {device}")


def vector(name: str, value: Tensor, size: int, device: torch.device) -> None:
    """Check that there is one number for each pair, or each sequence."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor of shape [{size}], got {shown(value)}")
    dense(name, value)
    if value.shape != (size,):
        raise ValueError(f"{name} must have shape [{size}], got {list(value.shape)}")
    if (value.dtype == torch.bool) != (name == "desirable") or value.is_complex():
        kind = "a bool tensor" if name == "desirable" else "real numbers"
        raise TypeError(f"{name} must be {kind}, got {value.dtype}")
    if value.device != device:
        raise ValueError(f"{name} is on {value.device} and hidden on {device}")


def transform(logit_scale: float, softcap: float | None, temperature: float) -> None:
    plain.number("logit_scale", logit_scale)
    if abs(logit_scale) > LARGEST:
        raise ValueError(f"logit_scale must be within +-{LARGEST:g}, got {logit_scale!r}")
    _scale("temperature", temperature)
    if softcap is not None:
        _scale("softcap", softcap)


def _scale(name: str, value: float) -> None:
    plain.positive(name, value)
    if not 1 / LARGEST <= value <= LARGEST:
        none = " (None for no cap)" if name == "softcap" else ""
        raise ValueError(f"{name} must be in [{1 / LARGEST:g}, {LARGEST:g}]{none}, got {value!r}")


def ignore_index(value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"ignore_index must be an int, got {value!r}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"ignore_index must be an int64, got {shown(value)}")
