"""The default bound on temporary memory, in MiB: by the device, what is trained, and a call's size."""

from __future__ import annotations

import torch

from prefkern.ops.plan import MIB, Gradients, HeadSize

# Of a GPU's memory; and where the head is trained, with the probabilities that forward keeps for
# backward.
_SHARE_OF_GPU, _SHARE_OF_GPU_TRAINED = 1 / 128, 1 / 24
_LEAST_MB_OF_GPU = 256.0
_LEAST_MB_OF_CPU, _MOST_MB_OF_CPU = 8.0, 64.0
# Narrower tiles beside kept probabilities make a small batch's products slow.
_TILES_MB_OF_CPU = 16.0


def default_workspace_mb(device: torch.device, trains_head: bool = False) -> float:
    """The default for a call of any size: 64 MiB on a CPU, `workspace_of_gpu` on a GPU."""
    if device.type != "cuda":
        return _MOST_MB_OF_CPU
    return workspace_of_gpu(torch.cuda.get_device_properties(device).total_memory, trains_head)


def workspace_of_gpu(memory: float, trains_head: bool) -> float:
    """The default on a GPU of so many bytes: 1/128 of them, at least 256 MiB.

    If the head is trained, 1/24: each token whose probabilities are kept saves a quarter of its
    operations. A call takes no more than these and its tiles need.
    """
    share = _SHARE_OF_GPU_TRAINED if trains_head else _SHARE_OF_GPU
    return max(_LEAST_MB_OF_GPU, memory * share / MIB)


def workspace_of_call(
    device: torch.device,
    tokens: int,
    vocab_size: int,
    head: HeadSize,
    gradients: Gradients,
    with_divergence: bool = False,
) -> float:
    """The default for one call. On a CPU a small one has a quarter of what its logits take.

    That is for bfloat16, whose logits in memory take 10 bytes an entry, or 12 with a gradient. A
    trained head gets as much as keeps all its probabilities, in any dtype, and tiles beside them
    that are worth a product. With a divergence there are logits of two models.
    """
    most = default_workspace_mb(device, gradients.head)
    if device.type == "cuda":
        return most
    entries = (1 + with_divergence) * tokens * vocab_size / MIB
    if gradients.head:
        share = head.compute_dtype.itemsize * entries + max(entries, _TILES_MB_OF_CPU)
    else:
        share = 2.5 * entries
    return min(max(share, _LEAST_MB_OF_CPU), most)
