"""What this machine has to run the tests on.

On a GPU the Triton kernels are compiled; without one they run under Triton's interpreter, which has
to be chosen before triton is first imported.
"""

from __future__ import annotations

import importlib.util
import os

import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
DEVICE = "cuda" if HAS_GPU else "cpu"
HAS_TRITON = importlib.util.find_spec("triton") is not None
BACKENDS = ["torch", "triton"] if HAS_TRITON else ["torch"]
