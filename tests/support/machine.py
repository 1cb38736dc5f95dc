"""The devices and backends of this machine that the tests can use.

On a GPU the Triton kernels are compiled. Without a GPU they run in Triton's interpreter, which must
be chosen before triton is first imported.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from support import interpreter

HAS_GPU = torch.cuda.is_available()
if HAS_GPU:
    # The tests ask for deterministic algorithms, and without it torch warns at every product.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
else:
    os.environ["TRITON_INTERPRET"] = "1"
DEVICE = "cuda" if HAS_GPU else "cpu"
HAS_TRITON = importlib.util.find_spec("triton") is not None
BACKENDS = ["torch", "triton"] if HAS_TRITON else ["torch"]
if HAS_TRITON and not HAS_GPU:
    interpreter.look_once()
