"""Calls of the log-prob operator: cases, a drawn problem, a run of either side, and its error."""

from __future__ import annotations

import torch

TRANSFORM = {"logit_scale": 1.3, "softcap": 6.0, "temperature": 0.7}
# name: (V, spread of the logits, options, has bias)
CASES = {
    "plain": (129, 5.0, {}, False),
    "one entry": (1, 1.0, {}, False),
    "two entries": (2, 5.0, {}, True),
    "127 entries": (127, 5.0, {}, True),
    "transform": (300, 8.0, TRANSFORM, True),
    "softcap": (129, 40.0, {"softcap": 30.0}, False),
    "scale": (129, 5.0, {"logit_scale": -0.25}, False),
    "temperature": (129, 5.0, {"temperature": 3.0}, True),
    "saturated": (129, 200.0, {}, False),
}
SMALL = 0.005  # MiB: several tiles of tokens and of vocabulary entries
HEADS = {"frozen": (False, False), "trained": (True, True), "bias only": (False, True)}


def make(V: int, spread: float, N: int = 21, H: int = 16) -> dict[str, torch.Tensor]:
    hidden = torch.randn(3, N // 3, H) * spread / H**0.5
    weight = torch.randn(V, H)
    labels = torch.randint(V, (3, N // 3))
    labels[0, :3] = -100
    # Half of the tokens confident: the label is the argmax.
    labels[1] = (hidden[1] @ weight.T).argmax(-1)
    return {"hidden": hidden, "weight": weight, "bias": torch.randn(V), "labels": labels}


def run(function, case, dtype, device, *, trains=(True, True), has_bias=True, grad, **options):
    """Log-probs and the gradients of hidden, weight and bias (None where there is none)."""
    leaves = {
        name: case[name].to(device=device, dtype=dtype, copy=True)
        for name in ("hidden", "weight", "bias")
    }
    for name, needs in zip(leaves, (True, *trains), strict=True):
        leaves[name].requires_grad_(needs)
    bias = leaves["bias"] if has_bias else None
    logps = function(leaves["hidden"], leaves["weight"], case["labels"].to(device), bias, **options)
    logps.backward(grad.to(device=device, dtype=logps.dtype))
    return logps.detach(), *(leaf.grad for leaf in leaves.values())


def relative(error: torch.Tensor, truth: torch.Tensor) -> float:
    return ((error.double() - truth).norm() / truth.norm().clamp(min=1e-30)).item()
