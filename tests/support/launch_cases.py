"""Each launcher on a few rows of any size, for tests of guards, sanitizer and large offsets.

A case takes the module with the functions on tiles (`prefkern_kernels` or the twins in torch), the
size of a row and a device. It returns everything that the launch wrote.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

ROWS = 3
CAPPED = {"logit_scale": 1.7, "softcap": 8.0, "temperature": 0.6}
Outputs = dict[str, torch.Tensor]


class Draw:
    """Draws numbers that are the same for every backend."""

    def __init__(self, size: int, device: str) -> None:
        self._generator = torch.Generator().manual_seed(size)
        self.device = device

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator).to(self.device, dtype)

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self._generator).to(self.device)

    def labels(self, start: int, size: int) -> torch.Tensor:
        """Labels of ROWS tokens: in another tile, in the last column, and anywhere in the tile."""
        anywhere = int(torch.randint(size, (), generator=self._generator))
        labels = [start + size + 3, start + size - 1, start + anywhere]
        return torch.tensor(labels, device=self.device)


def fold(ops: ModuleType, size: int, device: str) -> Outputs:
    draw, start = Draw(size, device), 100
    state = {
        name: draw.uniform(ROWS) + 0.5
        for name in (
            "maximum", "total", "label_logit", "label_slope", "rescale", "shifted", "logit_sum",
            "before", "squares",
        )
    }  # fmt: skip
    weights = torch.empty(ROWS, size, dtype=torch.bfloat16, device=device)
    sums = [state[name] for name in ("maximum", "total", "label_logit", "label_slope", "rescale")]
    moments = [state[name] for name in ("shifted", "logit_sum", "before", "squares")]
    ops.fold(
        draw.normal(ROWS, size) * 6, draw.labels(start, size),
        draw.normal(size, dtype=torch.bfloat16), *sums, weights, *moments,
        start=start, first=False, **CAPPED,
    )  # fmt: skip
    return {**state, "weights": weights}


def remake_weights(ops: ModuleType, size: int, device: str) -> Outputs:
    draw, start = Draw(size, device), 100
    weights = torch.empty(ROWS, size, dtype=torch.float16, device=device)
    labels = draw.labels(start, size)
    ops.remake_weights(
        draw.normal(ROWS, size), labels, draw.normal(size), draw.uniform(ROWS) + 13,
        draw.normal(ROWS), -draw.uniform(ROWS), weights, start=start, **CAPPED,
    )  # fmt: skip
    return {"weights": weights}


def settle(ops: ModuleType, size: int, device: str) -> Outputs:
    draw, vocab = Draw(size, device), 2 * size + size // 2 + 1
    kept = draw.uniform(ROWS, vocab).to(torch.bfloat16)
    maxima = torch.tensor([[0.0, 1, 2], [1, 1, 2], [1, 2, 2]], device=device)
    labels = torch.tensor([0, vocab - 1, size], device=device)
    ops.settle(kept, maxima, maxima[-1].clone(), -draw.uniform(ROWS), labels, size)
    return {"kept": kept}


def finish(ops: ModuleType, size: int, device: str) -> Outputs:
    draw, vocab = Draw(size, device), 7
    out = {name: torch.empty(ROWS, device=device) for name in ("logps", "unit", "share", "value")}
    derivative = draw.normal(ROWS, size)
    ops.finish(
        draw.normal(ROWS), draw.uniform(ROWS) + 1, draw.normal(ROWS), draw.uniform(ROWS),
        torch.tensor([0, vocab - 1, 3], device=device), *out.values(), derivative,
        draw.normal(vocab, size, dtype=torch.bfloat16), factor=-1.7,
        compute_dtype=torch.bfloat16, operand_dtype=torch.float16,
    )  # fmt: skip
    return {**out, "derivative": derivative}


def rescale_rows(ops: ModuleType, size: int, device: str) -> Outputs:
    rows = Draw(size, device).normal(ROWS, size)
    ops.rescale_rows(rows, torch.tensor([1.0, 0.5, 0.0], device=device))
    return {"rows": rows}


def scatter_scaled(ops: ModuleType, size: int, device: str) -> Outputs:
    draw = Draw(size, device)
    out = torch.zeros(5, size, dtype=torch.bfloat16, device=device)
    rows = torch.tensor([4, 0, 2], device=device)
    ops.scatter_scaled(draw.normal(ROWS, size), draw.normal(ROWS), rows, out)
    return {"out": out}


def fold_of_pairs(ops: ModuleType, size: int, device: str) -> Outputs:
    draw, start = Draw(size, device), 100
    names = ("maximum", "total", "label_logit", "label_slope", "rescale")
    ref_names = ("ref_maximum", "ref_total", "ref_label_logit", "cross", "ref_rescale")
    state = {name: draw.uniform(ROWS) + 0.5 for name in names}
    ref_state = {name: draw.uniform(ROWS) + 0.5 for name in ref_names}
    weights, ref_weights = (
        torch.empty(ROWS, size, dtype=torch.bfloat16, device=device) for _ in range(2)
    )
    ops.fold(
        draw.normal(ROWS, size) * 6, draw.labels(start, size),
        draw.normal(size, dtype=torch.bfloat16), *state.values(), weights,
        ref_tile=draw.normal(ROWS, size) * 6, ref_bias=draw.normal(size), **ref_state,
        ref_weights=ref_weights, start=start, first=False, **CAPPED,
    )  # fmt: skip
    return {**state, **ref_state, "weights": weights, "ref_weights": ref_weights}


def remake_weights_of_pairs(ops: ModuleType, size: int, device: str) -> Outputs:
    draw, start = Draw(size, device), 100
    weights = torch.empty(ROWS, size, dtype=torch.float16, device=device)
    ops.remake_weights(
        draw.normal(ROWS, size), draw.labels(start, size), draw.normal(size),
        draw.uniform(ROWS) + 13, draw.normal(ROWS), draw.normal(ROWS), weights,
        ref_tile=draw.normal(ROWS, size), ref_bias=draw.normal(size, dtype=torch.bfloat16),
        ref_unit=draw.uniform(ROWS) + 13, ref_factor=draw.normal(ROWS), start=start, **CAPPED,
    )  # fmt: skip
    return {"weights": weights}


def remake_weights_of_kept_pairs(ops: ModuleType, size: int, device: str) -> Outputs:
    draw, start = Draw(size, device), 100
    weights = torch.empty(ROWS, size, dtype=torch.float32, device=device)
    kept, ref_kept = (draw.uniform(ROWS, size).to(torch.bfloat16) for _ in range(2))
    ops.remake_weights(
        kept, draw.labels(start, size), None, draw.uniform(ROWS), draw.normal(ROWS),
        draw.normal(ROWS), weights, ref_tile=ref_kept, ref_unit=draw.uniform(ROWS),
        ref_factor=draw.normal(ROWS), is_kept=True, start=start, **CAPPED,
    )  # fmt: skip
    return {"weights": weights}


def scatter_scaled_of_pairs(ops: ModuleType, size: int, device: str) -> Outputs:
    draw = Draw(size, device)
    out = torch.zeros(5, size, dtype=torch.bfloat16, device=device)
    rows = torch.tensor([4, 0, 2], device=device)
    ops.scatter_scaled(
        draw.normal(ROWS, size), draw.normal(ROWS), rows, out,
        draw.normal(ROWS, size), draw.normal(ROWS),
    )  # fmt: skip
    return {"out": out}


CASES: dict[str, Callable[[ModuleType, int, str], Outputs]] = {
    function.__name__: function
    for function in (
        fold, remake_weights, settle, finish, rescale_rows, scatter_scaled, fold_of_pairs,
        remake_weights_of_pairs, remake_weights_of_kept_pairs, scatter_scaled_of_pairs,
    )
}  # fmt: skip


def launcher_of(name: str) -> str:
    """The launcher that a case drives."""
    return name.partition("_of_")[0]


def product(n: int, v: int, h: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Arguments of `product_fold`: labels at both ends of the vocabulary, and an empty state."""
    draw = Draw(n * v + h, device)
    labels = torch.randint(v, (n,), generator=torch.Generator().manual_seed(n)).to(device)
    labels[0], labels[-1] = 0, v - 1
    state = torch.tensor([-math.inf, 0.0, -math.inf, 1.0], device=device)
    state = state.unsqueeze(1).repeat(1, n).unbind(0)
    names = ("maximum", "total", "label_logit", "label_slope")
    return {
        "hidden": draw.normal(n, h, dtype=dtype),
        "weight": (draw.normal(v, h) * 4 / math.sqrt(h)).to(dtype),
        "bias": None,
        "labels": labels,
        **dict(zip(names, (x.clone() for x in state), strict=True)),
    }
