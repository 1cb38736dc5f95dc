"""The protocol of a backend: the functions on tiles that the passes call.

`prefkern_kernels` has them in Triton and `torch_tiles` in torch, with these names and arguments. The
docstrings there describe them.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class TileOps(Protocol):
    """A module with the functions on tiles of n tokens by v entries of the vocabulary."""

    @staticmethod
    def fold(
        tile: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        maximum: Tensor,
        total: Tensor,
        label_logit: Tensor,
        label_slope: Tensor,
        rescale: Tensor | None,
        weights: Tensor | None,
        shifted: Tensor | None = None,
        logit_sum: Tensor | None = None,
        before: Tensor | None = None,
        squares: Tensor | None = None,
        *,
        ref_tile: Tensor | None = None,
        ref_bias: Tensor | None = None,
        ref_maximum: Tensor | None = None,
        ref_total: Tensor | None = None,
        ref_label_logit: Tensor | None = None,
        cross: Tensor | None = None,
        ref_rescale: Tensor | None = None,
        ref_weights: Tensor | None = None,
        start: int,
        first: bool,
        logit_scale: float,
        softcap: float | None,
        temperature: float,
    ) -> None: ...

    @staticmethod
    def rescale_rows(accumulator: Tensor, factor: Tensor) -> None: ...

    @staticmethod
    def finish(
        maximum: Tensor,
        total: Tensor,
        label_logit: Tensor,
        label_slope: Tensor,
        labels: Tensor,
        logps: Tensor,
        unit: Tensor | None = None,
        share: Tensor | None = None,
        label_value: Tensor | None = None,
        derivative: Tensor | None = None,
        weight: Tensor | None = None,
        *,
        factor: float = 1.0,
        compute_dtype: torch.dtype = torch.float32,
        operand_dtype: torch.dtype = torch.float32,
    ) -> None: ...

    @staticmethod
    def settle(
        kept: Tensor,
        maxima: Tensor,
        unit: Tensor,
        label_value: Tensor,
        labels: Tensor,
        vocab_tile: int,
    ) -> None: ...

    @staticmethod
    def remake_weights(
        tile: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        unit: Tensor,
        factor: Tensor,
        label_gradient: Tensor,
        weights: Tensor,
        *,
        ref_tile: Tensor | None = None,
        ref_bias: Tensor | None = None,
        ref_unit: Tensor | None = None,
        ref_factor: Tensor | None = None,
        is_kept: bool = False,
        start: int,
        logit_scale: float,
        softcap: float | None,
        temperature: float,
    ) -> None: ...

    @staticmethod
    def scatter_scaled(
        values: Tensor,
        scale: Tensor,
        rows: Tensor | None,
        out: Tensor,
        others: Tensor | None = None,
        other_scale: Tensor | None = None,
    ) -> None: ...
