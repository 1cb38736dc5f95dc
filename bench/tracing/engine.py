"""Autograd's backward in Python: the real engine asks the driver for a device before it starts.

The graph is the real one. Its nodes are called in an order in which each has all gradients of its
outputs, and only those on a way to what is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

# Functions that take None for a gradient of zeros (`ctx.set_materialize_grads(False)`).
_TAKE_NONE = ("_LinearLogprobsBackward", "GeneratedBackwardFor_prefkern_logprobs")


def grad(
    outputs: Tensor | Sequence[Tensor],
    inputs: Tensor | Sequence[Tensor],
    grad_outputs: Tensor | Sequence[Tensor] | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    allow_unused: bool | None = None,
    materialize_grads: bool = False,
) -> tuple[Tensor | None, ...]:
    """As `torch.autograd.grad`; the graph is kept."""
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    given = [grad_outputs] if isinstance(grad_outputs, Tensor) else grad_outputs
    given = [None] * len(outputs) if given is None else list(given)
    edges = [get_gradient_edge(x) for x in inputs]
    found = _run(outputs, given, {(e.node, e.output_nr) for e in edges})
    values = [found.get((e.node, e.output_nr)) for e in edges]
    if materialize_grads:
        values = [
            torch.zeros_like(x) if value is None else value
            for x, value in zip(inputs, values, strict=True)
        ]
    return tuple(values)


def backward(output: Tensor, gradient: Tensor | None = None, **_: Any) -> None:
    """As `Tensor.backward`: leaves get their `grad`."""
    leaves = _leaves(output.grad_fn)
    found = _run([output], [gradient], {(node, 0) for node in leaves})
    for (node, _number), value in found.items():
        x = node.variable
        x.grad = value if x.grad is None else x.grad + value


def _leaves(root: Any) -> list[Any]:
    return [node for node in _order(root) if hasattr(node, "variable")]


def _order(*roots: Any) -> list[Any]:
    """All nodes below some, each before those that it gives gradients to."""
    seen: set[Any] = set()
    order: list[Any] = []
    stack: list[tuple[Any, bool]] = [(root, False) for root in roots]
    while stack:
        node, is_done = stack.pop()
        if is_done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(below, False) for below, _ in node.next_functions if below is not None]
    return order[::-1]


def _run(
    outputs: list[Tensor], given: list[Tensor | None], wanted: set[tuple[Any, int]]
) -> dict[tuple[Any, int], Tensor]:
    starts = [get_gradient_edge(x) for x in outputs]
    order = _order(*(start.node for start in starts))
    targets = {node for node, _ in wanted}
    # From the leaves up: nodes from which something wanted is reached.
    needed: set[Any] = set()
    for node in reversed(order):
        if any(below in needed or below in targets for below, _ in node.next_functions):
            needed.add(node)
    gradients: dict[tuple[Any, int], Tensor] = {}

    def add(key: tuple[Any, int], value: Tensor) -> None:
        node, number = key
        expected = node._input_metadata[number]
        if value.shape != expected.shape:
            # The engine adds up what was broadcast.
            value = value.sum_to_size(tuple(expected.shape))
        gradients[key] = gradients[key] + value if key in gradients else value

    with torch.no_grad():
        for x, start, value in zip(outputs, starts, given, strict=True):
            add((start.node, start.output_nr), torch.ones_like(x) if value is None else value)
        for node in order:
            if node not in needed:
                continue
            for (below, number), value in _edges(node, _call(node, gradients)):
                is_read = below in needed or (below, number) in wanted
                if value is not None and is_read:
                    add((below, number), value)
    return {key: value for key, value in gradients.items() if key in wanted}


def _edges(node: Any, results: Any) -> list[tuple[tuple[Any, int], Tensor | None]]:
    """What each node below gets."""
    results = results if isinstance(results, tuple) else (results,)
    if hasattr(node, "needs_input_grad"):
        # A function in Python has a result for each argument, and an edge for each tensor.
        needs = node.needs_input_grad
        results = [value for value, need in zip(results, needs, strict=False) if need]
        edges = [edge for edge in node.next_functions if edge[0] is not None]
        return list(zip(edges, results, strict=False))
    pairs = zip(node.next_functions, results, strict=False)
    return [(edge, value) for edge, value in pairs if edge[0] is not None]


def _call(node: Any, gradients: dict[tuple[Any, int], Tensor]) -> Any:
    metadata = node._input_metadata
    values = [gradients.get((node, number)) for number in range(len(metadata))]
    if all(value is None for value in values):
        return ()
    if not hasattr(node, "apply"):
        return node(*values)
    if not node.name().startswith(_TAKE_NONE):
        values = [
            torch.zeros(tuple(m.shape), dtype=m.dtype, device=m.device) if value is None else value
            for value, m in zip(values, metadata, strict=True)
        ]
    return node.apply(*values)
