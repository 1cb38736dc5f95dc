"""Attention along paths: in a packed row each sequence sees itself and its prefix, and no one else.

A path is one sequence of the row, preceded by a prefix: earlier tokens of the row that it also
sees. Positions and windows count along the path, as they count along a key-value cache. Without
prefixes it is a packed row; with them, the two responses of a pair share their prompt:

    [p1 c1 p2 c2 ... | t1 r1 t2 r2 ...]

p, c and r are the tokens of prompt, chosen and rejected response. t is the last token of the prompt
again, which predicts the first token of r. The prefix of `t1 r1` is p1 without its last token.

transformers computes attention between all tokens of a row and masks what is of other sequences:
M^2 products for M tokens, most of them thrown away. On a GPU one kernel takes the row and the bounds
of its paths (`prefkern.models.varlen`). Elsewhere the row is split at the sequences' bounds, and
each part goes through the same attention function by itself, after its prefix. Where that cannot be
done, attention is over the whole row, with a mask by sequence and position.

How it reaches the layers: within `along`, the mask that transformers makes for a row is a
`PathMask`. It goes where the mask goes, so a checkpointed layer that is computed again has it, and
no family has to hand on a keyword. `sdpa` in transformers' tables of attention and of masks, and
`eager` in that of masks, are replaced by functions that know it; outside of `along` they call the
original. A family whose attention is not looked up there never sees a PathMask, or fails on it; the
probe of `prefkern.models.packing` finds that out.
"""

from __future__ import annotations

import inspect
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from prefkern.devices import sent
from prefkern.models import varlen

IMPLEMENTATION = "sdpa"
# The entry of a packed batch's inputs that `head_forward` takes out. Without it the other inputs are
# those of a row whose attention is masked.
KEYWORD = "prefkern_paths"


@dataclass(frozen=True)
class Paths:
    """The sequences of a packed row, in its order.

    Args:
        lengths: of each sequence, without its prefix.
        prefixes: (start, length) of each in the row; length 0: no prefix.
        is_masked: whether attention is over the whole row, with a mask; else each path is computed
            by itself.
    """

    lengths: tuple[int, ...]
    prefixes: tuple[tuple[int, int], ...]
    is_masked: bool = False

    @staticmethod
    def of(
        bounds: Sequence[int],
        prefixes: Sequence[tuple[int, int]] | None = None,
        is_masked: bool = False,
    ) -> Paths:
        """From the sequences' bounds in the row, S + 1 numbers; None: there are no prefixes."""
        lengths = tuple(b - a for a, b in itertools.pairwise(bounds))
        prefixes = ((0, 0),) * len(lengths) if prefixes is None else tuple(prefixes)
        return Paths(lengths, tuple((start, length) for start, length in prefixes), is_masked)

    def of_tokens(self, values: Tensor) -> Tensor:  # (S,) -> (M,)
        """Each token's sequence's value."""
        lengths = sent(torch.tensor(self.lengths), values.device)
        return values.repeat_interleave(lengths, output_size=sum(self.lengths))

    def numbers(self, device: torch.device) -> Tensor:  # (M,)
        """The number of each token's sequence."""
        return self.of_tokens(torch.arange(len(self.lengths), dtype=torch.int32, device=device))

    def positions(self, device: torch.device) -> Tensor:  # (M,)
        """The place of each token along its path."""
        ends = itertools.accumulate(self.lengths)
        shapes = zip(ends, self.lengths, self.prefixes, strict=True)
        begins = torch.tensor([end - n - before for end, n, (_, before) in shapes])
        places = torch.arange(sum(self.lengths), device=device)
        return places - self.of_tokens(sent(begins, places.device))

    def counts(self, device: torch.device) -> Tensor:  # (M,)
        """The number of paths that each token is on."""
        counts = torch.ones(sum(self.lengths), dtype=torch.int64)
        for start, length in self.prefixes:
            counts[start : start + length] += 1
        return sent(counts, device)

    def visible(self, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
        """Whether the token at index q is on a path with the token at k: `visible(q, k)`."""
        sequence = self.numbers(device)
        starts, sizes = sent(torch.tensor(self.prefixes), sequence.device).unbind(1)
        low, high = starts[sequence], (starts + sizes)[sequence]

        def function(q: Tensor, k: Tensor) -> Tensor:
            return (sequence[q] == sequence[k]) | ((k >= low[q]) & (k < high[q]))

        return function


class PathMask:
    """The mask of a packed row for one kind of layer: a mask for each path, made when it is needed.

    Args:
        paths: the row's sequences.
        make: makes transformers' mask of q_length queries that follow on q_offset keys.
        reach: how many tokens before itself a token sees; -1: all of them; None: the mask is
            neither causal nor a sliding window.
    """

    def __init__(
        self, paths: Paths, make: Callable[..., Tensor | None], reach: int | None = None
    ) -> None:
        self.paths = paths
        self.reach = reach
        self._make = make
        # A model's layers may lie on several devices.
        self._layouts: dict[torch.device, varlen.Layout] = {}
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

    def layout(self, device: torch.device) -> varlen.Layout:
        if device not in self._layouts:
            lengths, prefixes = self.paths.lengths, self.paths.prefixes
            self._layouts[device] = varlen.Layout.of(lengths, prefixes, device)
        return self._layouts[device]


_current: ContextVar[Paths | None] = ContextVar("prefkern_paths", default=None)
# How many contexts of `along` are open, in all threads. torch.compile can read it, and cannot read
# a context variable: outside of `along` a model compiles as if nothing had been replaced.
_open = 0
_lock = threading.Lock()


@contextmanager
def along(paths: Paths | None) -> Iterator[None]:
    """Masks that transformers makes within the context are of these paths; None: as always."""
    if paths is None:
        yield
        return
    global _open
    _install()
    token = _current.set(paths)
    with _lock:
        _open += 1
    try:
        yield
    finally:
        with _lock:
            _open -= 1
        _current.reset(token)


def _install() -> None:
    """Put the functions that know of paths into transformers' tables, once."""
    attention: Any = AttentionInterface()[IMPLEMENTATION]
    if getattr(attention, "knows_paths", False):
        return
    AttentionInterface.register(IMPLEMENTATION, _attention_of(attention))
    masks = AttentionMaskInterface()
    for name in (IMPLEMENTATION, "eager"):
        AttentionMaskInterface.register(name, _mask_of(masks[name]))


def _mask_of(original: Callable[..., Any]) -> Callable[..., Any]:
    def mask(*args: Any, **kwargs: Any) -> Any:
        paths = _current.get() if _open else None
        if paths is None or args:
            return original(*args, **kwargs)
        # The row has no padding. The ones that it came with only asked for a mask without bounds.
        kwargs = {**kwargs, "batch_size": 1, "attention_mask": None}
        if paths.is_masked:
            return original(**_by_branch(paths, **kwargs))
        for name in ("q_length", "q_offset", "kv_length", "kv_offset"):
            kwargs.pop(name, None)

        def make(**sizes: int) -> Tensor | None:
            return original(**kwargs, kv_offset=0, **sizes)

        reach = varlen.reach_of(kwargs.get("mask_function"), kwargs.get("local_size"))
        return PathMask(paths, make, reach)

    return mask


def _by_branch(
    paths: Paths, mask_function: Callable[..., Tensor], device: Any = "cpu", **kwargs: Any
) -> dict[str, Any]:
    """The arguments of a mask over the whole row, by sequence and position instead of by index."""
    positions, visible = paths.positions(device), paths.visible(device)

    def function(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return visible(q, k) & mask_function(batch, head, positions[q], positions[k])

    # A window that is wider than the row may still end within a path.
    kwargs |= {"allow_is_causal_skip": False, "local_size": None}
    return {**kwargs, "mask_function": function, "device": device}


def _attention_of(original: Callable[..., Any]) -> Callable[..., Any]:
    # Of these a kernel knows nothing: a bias by position, a paged cache.
    others = {*inspect.signature(original).parameters, "softcap"}
    others -= {"module", "query", "key", "value", "attention_mask", "kwargs"}
    others -= {"dropout", "scaling", "is_causal"}

    def is_plain(module: torch.nn.Module, options: dict[str, Any]) -> bool:
        """Whether this is causal attention and nothing else."""
        is_causal = options.get("is_causal")
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        has_more = any(options.get(name) is not None for name in others)
        return is_causal and not options.get("dropout") and not has_more

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
        if attention_mask.reach is not None and is_plain(module, kwargs):
            layout, scale = attention_mask.layout(query.device), kwargs.get("scaling")
            whole = varlen.attention(query, key, value, layout, attention_mask.reach, scale)
            if whole is not None:
                return whole, None
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
