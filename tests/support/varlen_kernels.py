"""Stand-ins for the variable-length kernels, which run on GPUs alone.

`Kernel` computes in float64 what `torch.nn.attention.varlen.varlen_attn` documents, and holds each
call to what the kernel asks for. Its options make it wrong in one way each.
"""

from __future__ import annotations

import functools
import math
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from prefkern.models import varlen


@dataclass
class Kernel:
    """A kernel that notes (tokens, keys, window) of each call.

    Args:
        shift: moves the causal mask by that many tokens.
        widens: widens the window by that many tokens.
        upper_left: aligns the mask at the first key instead of the last.
        halves: the input, of "queries", "keys", "values", that gets half its gradient.
        problem: raised at each call.
        knows_groups: whether a key head may serve several query heads.
    """

    shift: int = 0
    widens: int = 0
    upper_left: bool = False
    halves: str = ""
    problem: Exception | None = None
    knows_groups: bool = True
    calls: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def function(self) -> Any:
        """With the signature of torch 2.13, or of 2.11, which has no `enable_gqa`."""

        def newer(
            query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
            window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None,
            num_splits=None,
        ):  # fmt: skip
            bounds = (cu_seq_q, cu_seq_k, max_q, max_k)
            return self._run(query, key, value, *bounds, scale, window_size, enable_gqa)

        def older(
            query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
            window_size=(-1, -1),
        ):  # fmt: skip
            bounds = (cu_seq_q, cu_seq_k, max_q, max_k)
            return self._run(query, key, value, *bounds, scale, window_size, False)

        return newer if self.knows_groups else older

    def flash_attn_varlen_func(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
        softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
        deterministic=False, return_attn_probs=False, block_table=None,
    ) -> Tensor:  # fmt: skip
        """With the signature of flash_attn."""
        assert causal
        bounds = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return self._run(q, k, v, *bounds, softmax_scale, window_size, True)

    def _run(
        self, queries, keys, values, bounds_q, bounds_k, longest_q, longest_k, scale, window, groups
    ) -> Tensor:
        if self.problem is not None:
            raise self.problem
        assert isinstance(window, tuple)
        assert window[1] == 0
        for bounds, longest, tokens in (
            (bounds_q, longest_q, len(queries)),
            (bounds_k, longest_k, len(keys)),
        ):
            assert bounds.dtype == torch.int32
            assert [bounds[0], bounds[-1]] == [0, tokens]
            assert longest == bounds.diff().max()
        inputs = {"queries": queries, "keys": keys, "values": values}
        assert {x.dtype for x in inputs.values()} == {queries.dtype}
        assert all(x.ndim == 3 and x.stride(-1) == 1 for x in inputs.values())
        if not groups and keys.shape[1] != queries.shape[1]:
            raise ValueError("Expect query and key/value to have the same number of heads")
        self.calls.append((len(queries), len(keys), window[0]))
        shared = queries.shape[1] // keys.shape[1]
        q, k, v = (
            ((x + x.detach()) / 2 if name == self.halves else x).double().transpose(0, 1)
            for name, x in inputs.items()
        )
        k, v = (x.repeat_interleave(shared, 0) for x in (k, v))
        outputs = []
        ends_q, ends_k = bounds_q.tolist(), bounds_k.tolist()
        for a, b, c, d in zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False):
            before = 0 if self.upper_left else (d - c) - (b - a)
            distance = before + self.shift + torch.arange(b - a)[:, None] - torch.arange(d - c)
            reach = math.inf if window[0] < 0 else window[0] + self.widens
            scores = q[:, a:b] @ k[:, c:d].mT * (scale or queries.shape[2] ** -0.5)
            hidden = (distance < 0) | (distance > reach)
            outputs.append(scores.masked_fill(hidden, -math.inf).softmax(-1) @ v[:, c:d])
        return torch.cat(outputs, 1).transpose(0, 1).to(queries.dtype)


def put(
    monkeypatch: pytest.MonkeyPatch, torchs: Kernel, flash: Kernel | None = None
) -> tuple[Kernel, Kernel | None]:
    """Let stand-ins take the rows of this machine; without `flash`, flash_attn is not installed."""
    import torch.nn.attention.varlen as module

    monkeypatch.setattr(varlen, "_DEVICES", ("cpu",))
    monkeypatch.setattr(varlen, "_DTYPES", (torch.float32, torch.bfloat16))
    monkeypatch.setattr(module, "varlen_attn", torchs.function)
    package = None
    if flash is not None:
        package = types.ModuleType("flash_attn")
        package.flash_attn_varlen_func = flash.flash_attn_varlen_func  # pyright: ignore
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    # What is found for this test is forgotten after it.
    monkeypatch.setattr(varlen, "_kernel_for", functools.cache(varlen._kernel_for.__wrapped__))
    return torchs, flash


@contextmanager
def flash_attention_of_shapes() -> Iterator[list[dict[str, Any]]]:
    """torch's flash attention, which runs on GPUs alone, with outputs that are only shaped.

    So `varlen_attn` itself runs here. Yields whether each call is causal, and its window.
    """
    calls = []

    def noted(is_causal: bool, options: dict[str, Any]) -> None:
        window = tuple(options[f"window_size_{side}"] for side in ("left", "right"))
        calls.append({"is_causal": is_causal, "window": window, "scale": options.get("scale")})

    def forward(query, key, value, bq, bk, longest_q, longest_k, dropout, causal, *_, **options):
        noted(causal, options)
        empty = torch.empty(0)
        return torch.zeros_like(query), query.new_zeros(query.shape[1::-1]), empty, empty, empty

    def backward(
        upstream, query, key, value, out, sums, bq, bk, longest_q, longest_k, dropout, causal,
        *_, **options,
    ):  # fmt: skip
        noted(causal, options)
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    try:
        yield calls
    finally:
        library._destroy()
