"""`differentiable_once`: a backward whose own derivative raises, always.

torch's `once_differentiable` raises only where the incoming gradient itself requires one. The usual
case, `autograd.grad(loss, hidden, create_graph=True)`, then returns a constant, and a gradient
penalty silently lacks a term. Here every gradient that is made while a graph is being built hangs
on a node that raises. Autograd runs only the nodes between what it differentiates and what it is
asked for, so that node descends from all that the gradient depends on: from the inputs, by way of
`anchors`, and from the incoming gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


class _Raises(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *_: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, ...]:
        raise RuntimeError(
            "prefkern's log-probs and losses can be differentiated once: "
            "their gradient was differentiated again"
        )


def anchors(*inputs: Tensor | None) -> tuple[Tensor, ...]:
    """Empty tensors that descend from the inputs which need a gradient, and keep none of them.

    An input itself, kept for no other purpose, would hold its memory until backward.
    """
    if not torch.is_grad_enabled():
        return ()
    return tuple(x[..., :0].clone() for x in inputs if x is not None and x.requires_grad)


def refuse_tangents(**inputs: Tensor | None) -> None:
    """Raise NotImplementedError for an input that is differentiated in forward mode.

    Kernels read its numbers and would drop its tangent.
    """
    for name, value in inputs.items():
        if value is not None and forward_ad.unpack_dual(value).tangent is not None:
            raise NotImplementedError(
                f"{name} has a tangent of torch.autograd.forward_ad; log-probs and losses have "
                "reverse-mode gradients only: take torch.autograd.grad or backward"
            )


def differentiable_once(backward: Callable[..., tuple]) -> Callable[..., tuple]:
    """Decorate the backward of an autograd function that computes plain numbers.

    Its forward sets `ctx.anchors`, those of its inputs, which are made outside of it.
    """

    @functools.wraps(backward)
    def wrapped(ctx: Any, *grads: Tensor | None) -> tuple:
        builds_graph = torch.is_grad_enabled()
        with torch.no_grad():
            gradients = backward(ctx, *grads)
        if not builds_graph:
            return gradients
        given = (*ctx.anchors, *(g for g in grads if g is not None))
        return tuple(None if g is None else _Raises.apply(g, *given) for g in gradients)

    return wrapped
