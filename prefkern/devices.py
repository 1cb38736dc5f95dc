"""What devices differ in, beside speed: float64, and how numbers of the host get there.

Apple's MPS has no float64, and a tensor of it there is a TypeError. What is a few numbers for each
sequence or token, and has to be exact, is then computed on the CPU: `as_double` brings it there. The
results are the same, bit for bit, and cost a copy each way.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WITHOUT_FLOAT64 = ("mps",)


def has_float64(device: torch.device) -> bool:
    """Whether tensors of this device may be float64."""
    return device.type not in _WITHOUT_FLOAT64


def as_double(x: Tensor) -> Tensor:
    """The same numbers in float64: where x is, or on the CPU if its device has no float64."""
    return x.double() if has_float64(x.device) else x.cpu().double()


def of_doubles(device: torch.device) -> torch.device:
    """Where `as_double` puts the numbers of a device."""
    return device if has_float64(device) else torch.device("cpu")


def back(x: Tensor, like: Tensor) -> Tensor:
    """A result of `as_double` in the dtype and on the device of what it was made from."""
    # The dtype first: float64 must not reach a device that lacks it. And no `to` that changes nothing:
    # where torch 2.11 traces an autograd.Function that returns its result, the gradient is 0.
    if x.dtype != like.dtype:
        x = x.to(like.dtype)
    return x if x.device == like.device else x.to(like.device)


def sent(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device. A GPU gets it from pinned memory, and the host does not wait.

    From other memory, the host would wait until the GPU has done all that it was asked for before.
    """
    if device.type != "cuda" or torch.compiler.is_compiling():
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
