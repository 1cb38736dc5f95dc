"""`differentiable_once`: a backward whose own derivative raises, always.

torch's `once_differentiable` raises only if the incoming gradient itself requires one. In the usual
case, `autograd.grad(loss, hidden, create_graph=True)`, it returns a constant, and a gradient
penalty silently lacks a term. Here, while a graph is being built, every gradient hangs on a node
that raises. Autograd runs only the nodes between a result and the inputs that it is asked for. So
the node descends from everything that the gradient depends on: from the inputs, through `anchors`,
and from the incoming gradients.
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
    """Empty tensors that descend from the inputs that need a gradient.

    They stand for the inputs: an input that was kept itself would hold its memory until backward.
    """
    if not torch.is_grad_enabled():
        return ()
    return tuple(x[..., :0].clone() for x in inputs if x is not None and x.requires_grad)


def refuse_tangents(**inputs: Tensor | None) -> None:
    """Raise NotImplementedError for an input with a forward-mode tangent: kernels would drop it."""
    for name, value in inputs.items():
        if value is not None and forward_ad.unpack_dual(value).tangent is not None:
            raise NotImplementedError(
                f"{name} has a tangent of torch.autograd.forward_ad; log-probs and losses have "
                "reverse-mode gradients only: take torch.autograd.grad or backward"
            )


def differentiable_once(backward: Callable[..., tuple]) -> Callable[..., tuple]:
    """Decorate the backward of an autograd function that computes plain numbers.

    The function's forward sets `ctx.anchors`. The anchors are made of its inputs, outside of it.
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
