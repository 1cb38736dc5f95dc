"""Attention along paths: each sequence of a packed row attends to itself, and to no one else.

transformers computes attention between all tokens of a row and masks what is of other sequences:
M^2 products for M tokens, most of them thrown away. Here the row is split at the sequences' bounds,
and each part goes through the same attention function by itself.

A path is one sequence: its tokens, preceded by a prefix of earlier tokens of the row that it also
sees. Positions and windows count along the path, as they count along a key-value cache.

How it reaches the layers: within `along`, the mask that transformers makes for a row is a
`PathMask`. It goes where the mask goes, so a checkpointed layer that is computed again has it, and
no family has to hand on a keyword. `sdpa` in transformers' tables of attention and of masks is
replaced by functions that know it; for every other mask they call the original. A family whose
attention is not looked up there never sees a PathMask, or fails on it; the probe of
`prefkern.models.packing` finds that out.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

IMPLEMENTATION = "sdpa"
# The entry of a packed batch's inputs that `head_forward` takes out. Without it the other inputs are
# those of a row whose attention is masked.
KEYWORD = "prefkern_paths"


@dataclass(frozen=True)
class Paths:
    """The sequences of a packed row, in its order: their lengths, and each one's prefix."""

    lengths: tuple[int, ...]
    # (start, length) in the row; length 0: no prefix.
    prefixes: tuple[tuple[int, int], ...]

    @staticmethod
    def of(bounds: Sequence[int]) -> Paths:
        """Sequences without prefixes, from their bounds in the row."""
        lengths = tuple(b - a for a, b in itertools.pairwise(bounds))
        return Paths(lengths, ((0, 0),) * len(lengths))


class PathMask:
    """The mask of a packed row for one kind of layer: a mask for each path, made when it is needed.

    Args:
        paths: the row's sequences.
        make: makes transformers' mask of q_length queries that follow on q_offset keys.
    """

    def __init__(self, paths: Paths, make: Callable[..., Tensor | None]) -> None:
        self.paths = paths
        self._make = make
        # Paths of the same lengths have the same mask.
        self._made: dict[tuple[int, int], Tensor | None] = {}

    def of(self, length: int, prefix: int) -> Tensor | None:  # (1, 1, length, prefix + length)
        """The mask of a path; None if plain causal attention needs no mask."""
        sizes = (length, prefix)
        if sizes not in self._made:
            self._made[sizes] = self._make(
                q_length=length, q_offset=prefix, kv_length=prefix + length
            )
        return self._made[sizes]


_current: ContextVar[Paths | None] = ContextVar("prefkern_paths", default=None)


@contextmanager
def along(paths: Paths | None) -> Iterator[None]:
    """Masks that transformers makes within the context are of these paths; None: as always."""
    if paths is None:
        yield
        return
    _install()
    token = _current.set(paths)
    try:
        yield
    finally:
        _current.reset(token)


def _install() -> None:
    """Put the functions that know a PathMask into transformers' tables, once."""
    attention: Any = AttentionInterface()[IMPLEMENTATION]
    if getattr(attention, "knows_paths", False):
        return
    mask: Any = AttentionMaskInterface()[IMPLEMENTATION]
    AttentionInterface.register(IMPLEMENTATION, _attention_of(attention))
    AttentionMaskInterface.register(IMPLEMENTATION, _mask_of(mask))


def _mask_of(original: Callable[..., Any]) -> Callable[..., Any]:
    def mask(*args: Any, **kwargs: Any) -> Any:
        paths = _current.get()
        if paths is None or args:
            return original(*args, **kwargs)
        sizes = ("q_length", "q_offset", "kv_length", "kv_offset")
        # The row has no padding, and no mask of its own.
        shared = {name: value for name, value in kwargs.items() if name not in sizes}
        shared |= {"batch_size": 1, "attention_mask": None}

        def make(**sizes: int) -> Tensor | None:
            return original(**shared, kv_offset=0, **sizes)

        return PathMask(paths, make)

    return mask


def _attention_of(original: Callable[..., Any]) -> Callable[..., Any]:
    def attention(
        module: torch.nn.Module,
        query: Tensor,  # (1, heads, M, d)
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if not isinstance(attention_mask, PathMask):
            return original(module, query, key, value, attention_mask, **kwargs)
        paths = attention_mask.paths
        # One split, so that the gradient is one concatenation.
        parts = [x.split(paths.lengths, dim=2) for x in (query, key, value)]
        outputs = []
        for length, (start, prefix), q, k, v in zip(
            paths.lengths, paths.prefixes, *parts, strict=True
        ):
            if prefix:
                before = slice(start, start + prefix)
                k = torch.cat([key[:, :, before], k], 2)
                v = torch.cat([value[:, :, before], v], 2)
            mask = attention_mask.of(length, prefix)
            outputs.append(original(module, q, k, v, mask, **kwargs)[0])
        return torch.cat(outputs, 1), None  # (1, M, heads, d)

    attention.knows_paths = True  # pyright: ignore[reportFunctionMemberAccess]
    return attention
