"""Hugging Face causal LMs: a model's own forward, with a function of ours where its head was.

The model's own forward runs, wrapped as it is (DDP, PEFT, FSDP, autocast hooks all fire), with the
`forward` of its output head replaced for the length of the call. The replacement receives what the
head would have received, scores it without logits, and hands the model a `[B, T, 1]` tensor of
zeros in place of logits. Whatever a family does before its head is therefore untouched; what it does
after its head is `transform`'s.

The zeros carry the autograd graph. Added to the loss they change nothing, but the loss then depends
on the wrapper's output, which is where DDP and FSDP hang their backward hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prefkern.models import heads
from prefkern.models.calls import replaced_forward, uncalled, without_cache
from prefkern.models.heads import HeadInputs, find_head
from prefkern.models.transform import head_transform

Score = Callable[[HeadInputs], tuple[Any, Tensor]]


def forward_with_head(model: nn.Module, inputs: Mapping[str, Any], fn: Score) -> tuple[Any, Tensor]:
    """Run a model's forward with its output head replaced by `fn`.

    Args:
        model: a Hugging Face causal LM, bare or wrapped.
        inputs: keyword arguments of its forward, without labels.
        fn: `fn(head) -> (result, anchor)`, called where the head would have been. `anchor` is a
            tensor of the result that carries its autograd graph.

    Returns:
        The result, and a scalar that is exactly 0 and depends on `anchor` through the wrapped
        model's output. Add it to what is differentiated, so that the wrapper's hooks fire.

    Raises RuntimeError if the forward does not call its head once.
    """
    result, output = head_forward(model, inputs, fn)
    return result, output.logits.sum()


def head_forward(model: nn.Module, inputs: Mapping[str, Any], fn: Score) -> tuple[Any, Any]:
    """As `forward_with_head`, returning what the model returned, in which logits are [B, T, 1].

    Their sum is the scalar that `forward_with_head` speaks of.
    """
    base, head = find_head(model)
    words = head_transform(model).words
    results: list[Any] = []

    def replacement(hidden: Tensor) -> Tensor:
        if results:
            raise RuntimeError(f"{type(base).__name__} calls its output head more than once")
        result, anchor = fn(heads.read(head, hidden).of_words(words))
        results.append(result)
        zeros = torch.zeros(*hidden.shape[:-1], 1, dtype=torch.float32, device=hidden.device)
        return zeros + 0.0 * anchor.float().sum()

    with replaced_forward(head, replacement):
        output = model(**without_cache(base, inputs))
    if not results:
        raise uncalled(base, head)
    return results[0], output
