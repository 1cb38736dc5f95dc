"""Runs the forward of a Hugging Face causal LM with a function of ours in place of its head.

The model's own forward runs, in its wrappers (DDP, PEFT, FSDP and autocast hooks all fire). Only
the `forward` of its output head is replaced during the call. The replacement gets the hidden
states, scores them without logits, and returns a `[B, T, 1]` tensor of zeros to the model instead
of logits. So everything that a model family does before its head stays the same. What it does after
its head is the subject of `transform`.

The zeros carry the autograd graph. Added to the loss they change no value, but they make the loss
depend on the wrapper's output, where DDP and FSDP put their backward hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from prefkern.models import heads, paths
from prefkern.models.calls import replaced_forward, uncalled, without_cache
from prefkern.models.heads import HeadInputs, find_head
from prefkern.models.transform import DECODER_IDS, head_transform

Score = Callable[[HeadInputs], tuple[Any, Tensor]]


def forward_with_head(model: nn.Module, inputs: Mapping[str, Any], fn: Score) -> tuple[Any, Tensor]:
    """Run a model's forward with its output head replaced by `fn`.

    Args:
        model: a Hugging Face causal LM, bare or wrapped.
        inputs: keyword arguments of its forward, without labels.
        fn: `fn(head) -> (result, anchor)`, called in place of the head. `anchor` is a tensor of the
            result that carries its autograd graph.

    Returns:
        The result, and a scalar that is exactly 0 and depends on `anchor` through the wrapped
        model's output. Add it to the loss, so that the wrapper's hooks fire.

    Raises RuntimeError unless the forward calls its head exactly once.
    """
    result, output = head_forward(model, inputs, fn)
    return result, output.logits.sum()


def head_forward(model: nn.Module, inputs: Mapping[str, Any], fn: Score) -> tuple[Any, Any]:
    """As `forward_with_head`, but returns the model's whole output, with logits [B, T, 1] of zeros.

    The sum of these logits is the scalar that `forward_with_head` returns. An encoder-decoder is
    run if the inputs have its `decoder_input_ids`.
    """
    with_encoder = DECODER_IDS in inputs
    base, head = find_head(model, with_encoder)
    vocab_size = head_transform(model, with_encoder).vocab_size
    results: list[Any] = []

    def replacement(hidden: Tensor) -> Tensor:
        if results:
            raise RuntimeError(f"{type(base).__name__} calls its output head more than once")
        result, anchor = fn(heads.read(head, hidden).of_vocab(vocab_size))
        results.append(result)
        zeros = torch.zeros(*hidden.shape[:-1], 1, dtype=torch.float32, device=hidden.device)
        return zeros + 0.0 * anchor.float().sum()

    with replaced_forward(head, replacement):
        output = row_forward(model, base, inputs)
    if not results:
        raise uncalled(base, head)
    return results[0], output


def row_forward(model: nn.Module, base: Any, inputs: Mapping[str, Any]) -> Any:
    """Run a model's forward, along the paths of a packed row if the inputs have some.

    Args:
        model: bare or wrapped.
        base: the same without its wrappers.
        inputs: keyword arguments of its forward, and perhaps the one of `prefkern.models.paths`.
    """
    sequences = inputs.get(paths.KEYWORD)
    if sequences is not None:
        # With a mask transformers looks for no bounds in the positions. Where it is above 1, a
        # router's loss counts a shared token for each of its paths.
        mask = sequences.counts(inputs["input_ids"].device)[None]
        inputs = {"attention_mask": mask, **inputs}
        del inputs[paths.KEYWORD]
    with paths.along(sequences):
        return model(**without_cache(base, inputs))
