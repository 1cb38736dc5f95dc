"""Checks a causal LM's inputs: do token ids, mask and labels fit one another and the model?

A model accepts inputs that it cannot use. It stretches or cuts a mask of another shape, or one of
numbers between 0 and 1, until it fits. A keyword that nothing reads disappears in `**kwargs`. A
token id beyond the vocabulary stops a GPU until the process ends. So all of this is checked before
the forward, at the cost of one device synchronisation.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from prefkern.typos import nearest

_INTEGERS = (torch.int64, torch.int32)


def check(
    base: Any,
    input_ids: Tensor,  # (B, T)
    attention_mask: Tensor | None = None,  # (B, T)
    labels: Tensor | None = None,  # (B, T)
) -> None:
    """Raise TypeError or ValueError unless the tensors fit one another and the model.

    Args:
        base: the unwrapped Hugging Face model.
    """
    for name, value in (
        ("input_ids", input_ids),
        ("attention_mask", attention_mask),
        ("labels", labels),
    ):
        if value is None and name != "input_ids":
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor [B, T], got {value!r}"[:200])
    if input_ids.dtype not in _INTEGERS:
        raise TypeError(f"input_ids must be int64 or int32, got {input_ids.dtype}")
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ValueError(
            f"input_ids must be [B, T], with B and T at least 1, got shape {list(input_ids.shape)}"
        )
    for name, value in (("attention_mask", attention_mask), ("labels", labels)):
        if value is not None and value.shape != input_ids.shape:
            raise ValueError(
                f"{name} must have the shape of input_ids, {list(input_ids.shape)}, "
                f"got {list(value.shape)}"
            )
    if labels is not None and labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    if attention_mask is not None and attention_mask.dtype not in (torch.bool, *_INTEGERS):
        raise TypeError(
            "attention_mask must be bool or integers, 1 for tokens and 0 for padding, "
            f"got {attention_mask.dtype}"
        )
    _check_values(base, input_ids, attention_mask)


def embedding_rows(base: Any) -> int | None:
    """The number of rows of a Hugging Face model's embedding; None if the model does not say."""
    try:
        return getattr(base.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:
        return None


def check_names(base: Any, given: Mapping[str, Any], own: Collection[str]) -> None:
    """Raise TypeError for a keyword that is unknown to the model and close to a name in `own`."""
    known = inspect.signature(base.forward).parameters
    for name in given:
        close = nearest(name, own)
        if name not in known and close is not None:
            raise TypeError(
                f"{type(base).__name__}.forward has no argument {name!r}; did you mean {close!r}?"
            )


def _check_values(base: Any, input_ids: Tensor, attention_mask: Tensor | None) -> None:
    rows = embedding_rows(base)
    facts = list(torch.aminmax(input_ids.long()))
    if attention_mask is not None:
        facts += torch.aminmax(attention_mask.long())
    if input_ids.is_meta:
        return
    least, largest, *mask = torch.stack(facts).tolist()
    if rows is not None and (largest >= rows or least < 0):
        bad = largest if largest >= rows else least
        raise ValueError(
            f"input_ids must be in [0, {rows}), the rows of {type(base).__name__}'s embedding, "
            f"got {bad}: the tokenizer is probably another model's"
        )
    if mask and not 0 <= mask[0] <= mask[1] <= 1:
        raise ValueError(
            f"attention_mask must be 1 for tokens and 0 for padding, got {mask[0]} to {mask[1]}"
        )
