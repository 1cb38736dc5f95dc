"""Products of half-precision operands with a float32 result, which a GPU has, on a CPU."""

from __future__ import annotations

import pytest
from torch import Tensor

from prefkern.ops import backward, operands, passes
from prefkern.ops.operands import Operands


def products_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Half-precision operands reach the products as they are, where a CPU would raise them."""
    if device != "cpu":
        return

    def product(a: Tensor, b: Tensor, out: Tensor) -> None:
        assert a.dtype == b.dtype
        out.copy_(a.float() @ b.float())

    def add_product(a: Tensor, b: Tensor, out: Tensor) -> None:
        assert a.dtype == b.dtype
        out.add_(a.float() @ b.float())

    monkeypatch.setattr(operands, "operands_for", lambda dtype, _: Operands(dtype, upcasts=False))
    for module in (operands, passes, backward):
        monkeypatch.setattr(module, "product", product)
        monkeypatch.setattr(module, "add_product", add_product)
