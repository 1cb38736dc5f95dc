"""A call in a process whose memory ends: `python -m support.refused DEVICE BACKEND`; tests/ops/test_refusals.py.

It runs a call with a trained head once without a limit. Then the device's own allocator gets less
than that took: on a GPU by a limit on this process's part of it, on a CPU by one on the process's
address space. The call must warn, run in half the workspace, and give the same numbers. With almost
nothing left it must raise, and name what would fit. Prints a line for each.
"""

from __future__ import annotations

import gc
import resource
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor

import prefkern

N, H, V = 2048, 64, 16384
WORKSPACE_MB = 256.0
MIB = 2**20


def limit(device: torch.device, free: int) -> None:
    """From here on the allocator has so many bytes more than it has taken."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(device).total_memory
        part = (torch.cuda.memory_reserved(device) + free) / total
        torch.cuda.set_per_process_memory_fraction(min(part, 1.0), device)
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + free, hard))


def call(leaves: tuple[Tensor, Tensor], labels: Tensor, backend: str) -> tuple[Tensor, ...]:
    """Log-probs and gradients, in the largest tiles that the workspace admits."""
    logps = prefkern.linear_logprobs(*leaves, labels, workspace_mb=WORKSPACE_MB, backend=backend)
    assert isinstance(logps, Tensor)
    return logps.detach(), *torch.autograd.grad(logps.sum(), leaves)


def main(device: torch.device, backend: str) -> None:
    torch.manual_seed(0)
    sizes = ((N, H), (V, H))
    hidden, weight = (torch.randn(*s, device=device).mul_(0.2).requires_grad_() for s in sizes)
    labels = torch.randint(V, (N,), device=device)
    expected = [x.cpu() for x in call((hidden, weight), labels, backend)]
    first = prefkern.last_plan()
    assert first is not None
    limit(device, int(0.75 * first.workspace_bytes) + 4 * (V * H + N * H))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [x.cpu() for x in call((hidden, weight), labels, backend)]
    said = [str(each.message) for each in caught if each.category is RuntimeWarning]
    second = prefkern.last_plan()
    assert second is not None and second.workspace_bytes <= 0.6 * first.workspace_bytes
    assert len(said) == 1 and said[0].startswith("out of memory in the "), said
    for mine, true in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-5)
    print("halved:", said[0])
    del found
    limit(device, MIB // 4)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call((hidden, weight), labels, backend)
    except torch.OutOfMemoryError as error:
        print("refused:", error)
    # The process has its memory back.
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0, device)


if __name__ == "__main__":
    main(torch.device(sys.argv[1]), sys.argv[2])
