"""Runs the forward of a sequence classifier with a function of ours in place of its head.

The head of transformers' decoders is a linear layer, which scores every position of a row. As in
`prefkern.models.head_forward` the model's own forward runs, in its wrappers, and only the `forward`
of its head is replaced during the call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from prefkern.models import heads
from prefkern.models.calls import replaced_forward, uncalled
from prefkern.models.head_forward import row_forward

# The names that transformers gives it, and that PEFT trains.
NAMES = ("score", "classifier")
# `fn(hidden, score)` gets the states of all positions, [B, T, H], and the head's own forward.
Scored = Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]


def find_score_head(base: Any) -> nn.Module | None:
    """The head of an unwrapped sequence classifier; None for a model with an output head."""
    get_head = getattr(base, "get_output_embeddings", None)
    if get_head is not None and get_head() is not None:
        return None
    return next((getattr(base, name) for name in NAMES if hasattr(base, name)), None)


def score_forward(model: nn.Module, inputs: Mapping[str, Any], fn: Scored) -> Any:
    """Run a sequence classifier's forward with its head replaced by `fn`; returns its output.

    Raises ValueError for a model that has no linear head for each position.
    """
    base = heads.unwrap(model)
    kind, head = type(base).__name__, find_score_head(base)
    wrong = "missing" if head is None else heads.problem(head)
    if head is None or wrong:
        raise ValueError(
            f"the head of {kind} is {wrong}, so packed rows cannot be scored: leave out "
            "padding_free (cu_seqlens)"
        )
    is_called = False

    def replacement(hidden: Tensor) -> Tensor:
        nonlocal is_called
        is_called = True
        if hidden.shape[:-1] != inputs["input_ids"].shape:
            raise ValueError(
                f"{kind} pools the states of a row before its head, which gets "
                f"{list(hidden.shape)}, so packed rows cannot be scored: leave out padding_free "
                "(cu_seqlens)"
            )
        return fn(hidden, original)

    with replaced_forward(head, replacement) as original:
        output = row_forward(model, base, inputs)
    if not is_called:
        raise uncalled(base, head)
    return output
