"""`differentiable_once`: a backward whose own derivative raises, always.

torch's `once_differentiable` raises only where the incoming gradient itself requires one. The usual
case, `autograd.grad(loss, hidden, create_graph=True)`, then returns a constant, and a gradient
penalty silently lacks a term. Here every gradient that is made while a graph is being built hangs
on a node that raises.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Raises(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, anchor: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, None]:
        raise RuntimeError(
            "prefkern's log-probs and losses can be differentiated once: "
            "their gradient was differentiated again"
        )


def differentiable_once(backward: Callable[..., tuple]) -> Callable[..., tuple]:
    """Decorate the backward of an autograd function that computes plain numbers."""

    @functools.wraps(backward)
    def wrapped(ctx: Any, *grads: Tensor) -> tuple:
        builds_graph = torch.is_grad_enabled()
        with torch.no_grad():
            gradients = backward(ctx, *grads)
        if not builds_graph:
            return gradients
        anchor = torch.zeros((), requires_grad=True)
        return tuple(None if g is None else _Raises.apply(g, anchor) for g in gradients)

    return wrapped
