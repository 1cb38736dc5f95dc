"""How a command's process holds memory on a CPU.

glibc gives a large block back to the system when it is freed, and takes it again, zeroed page by
page, at the next allocation of that size. The tensors of a training step are such blocks. A process
that keeps them spends less time in the system, and holds the memory of its largest moment until it
ends.
"""

from __future__ import annotations

import ctypes
import os
import platform

# The numbers of <malloc.h>, and the environment's names for the same.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST = 2**31 - 1
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory(device_type: str) -> bool:
    """Keep what is freed, in a process that computes on a CPU with glibc; whether it is kept.

    What the environment says about the allocator is left as it is.
    """
    if device_type != "cpu" or any(name in os.environ for name in _VARIABLES):
        return False
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Older versions than 2.35 refuse a threshold above 32 MiB.
    is_set = any(mallopt(_MMAP_THRESHOLD, size) for size in (_LARGEST, 2**25))
    return is_set and bool(mallopt(_TRIM_THRESHOLD, _LARGEST))
