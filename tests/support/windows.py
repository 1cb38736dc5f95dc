"""Buffers cut out of larger ones, whose rest a kernel must leave as it was."""

from __future__ import annotations

import torch

GUARD = 12345.0


def guarded(n: int, v: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A whole buffer and an (n, v) window of it, in the middle of rows and columns."""
    whole = torch.full((n + 2, v + 5), GUARD, dtype=dtype, device=device)
    return whole, whole[1 : n + 1, 2 : v + 2]


def assert_guard_kept(whole: torch.Tensor, n: int, v: int) -> None:
    outside = torch.ones_like(whole, dtype=torch.bool)
    outside[1 : n + 1, 2 : v + 2] = False
    assert (whole[outside] == torch.tensor(GUARD, dtype=whole.dtype)).all()
