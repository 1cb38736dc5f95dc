"""Attention along paths by one variable-length kernel for the whole row, on a GPU.

The kernel takes queries and keys without padding, and the bounds of each path in both. A path's
queries are the tokens of its sequence; its keys are the prefix and the sequence. So the keys of a
row that shares prompts hold each prefix once for each path that sees it. They are put together by
one split and one concatenation, whose gradients are a concatenation and sums in a fixed order.

    attention   the whole row's attention, or None where no kernel takes these tensors: on other
                devices than GPUs, in float32, with head sizes that flash attention lacks, with
                masks other than the two below. Then `prefkern.models.paths` goes path by path.
    reach_of    what the kernel must know of a mask: causal, or causal within a sliding window
    Layout      the bounds, and the order of the keys

Queries follow on the prefix, so the last query must see the last key (aligned at the lower right).
No kernel's documentation promises that, and versions of torch choose among several kernels. So for
each kind of tensors the first call compares a kernel with products in float32, values and gradients,
on short paths with prefixes. A kernel that differs or raises is not used, and a warning says so.

Flash attention adds a query's gradient up in an order that changes from run to run, here as under
sdpa. After `torch.use_deterministic_algorithms(True)` it does not.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from prefkern.devices import sent

_DEVICES = ("cuda",)
_DTYPES = (torch.bfloat16, torch.float16)
_LARGEST_HEAD = 256

# The probe's sequences: own length and the length of the prefix, which begins the row. They are
# longer than a kernel's blocks, shorter, and of one token.
_PROBE = ((150, 0), (7, 143), (200, 60), (1, 149), (1, 0))
# The probe's sliding window: a token sees that many before itself.
_PROBE_REACH = 15
# Of the mean norm of a token's output or gradient. Rounding to bf16 makes 0.05, a mask that is wrong
# by one token 1.9.
_TOLERANCE = 0.3


@dataclass(frozen=True)
class Layout:
    """Where a row's paths lie among its queries, and among the keys that are gathered for them."""

    # The row is split into pieces of these sizes, and the keys are these pieces.
    sizes: tuple[int, ...]
    order: tuple[int, ...]
    bounds_q: Tensor  # (S + 1,) int32
    bounds_k: Tensor  # (S + 1,) int32
    longest_q: int
    longest_k: int

    @property
    def bounds(self) -> tuple[Tensor, Tensor, int, int]:
        """As both kernels take them, after queries, keys and values."""
        return self.bounds_q, self.bounds_k, self.longest_q, self.longest_k

    @staticmethod
    def of(
        lengths: Sequence[int], prefixes: Sequence[tuple[int, int]], device: torch.device
    ) -> Layout:
        """From each sequence's length and the (start, length) of its prefix."""
        bounds = [0, *itertools.accumulate(lengths)]
        own = [*itertools.pairwise(bounds)]
        before = [(start, start + length) for start, length in prefixes if length]
        cuts = sorted({*bounds, *itertools.chain.from_iterable(before)})
        piece = {cut: number for number, cut in enumerate(cuts)}
        order: list[int] = []
        for (start, length), (begin, end) in zip(prefixes, own, strict=True):
            if length:
                order += range(piece[start], piece[start + length])
            order += range(piece[begin], piece[end])
        keys = [n + before for n, (_, before) in zip(lengths, prefixes, strict=True)]

        def tensor(values: Sequence[int]) -> Tensor:
            return sent(torch.tensor(values, dtype=torch.int32), device)

        return Layout(
            sizes=tuple(b - a for a, b in itertools.pairwise(cuts)),
            order=tuple(order),
            bounds_q=tensor(bounds),
            bounds_k=tensor([0, *itertools.accumulate(keys)]),
            longest_q=max(lengths),
            longest_k=max(keys),
        )

    def gathered(self, keys: Tensor) -> Tensor:  # (M, heads, d) -> (K, heads, d)
        """The keys, or values, of all paths, end to end."""
        if self.order == tuple(range(len(self.sizes))):
            return keys
        pieces = keys.split(self.sizes)
        return torch.cat([pieces[number] for number in self.order])


def reach_of(mask_function: Callable[..., Any] | None, local_size: int | None) -> int | None:
    """How many tokens before itself a token sees; -1: all of them; None: the mask is another one.

    Args:
        mask_function: of transformers, for one kind of layer.
        local_size: the size of its window or chunk, as transformers hands it on.
    """
    if mask_function is causal_mask_function:
        return -1
    # A chunk has a size as well, so the function decides.
    if local_size and _is_same(mask_function, sliding_window_causal_mask_function(local_size)):
        return local_size - 1
    return None


def _is_same(one: Any, other: Any) -> bool:
    """Whether two functions run the same code on the same values."""
    if isinstance(one, FunctionType) and isinstance(other, FunctionType):
        cells = (each.__closure__ or () for each in (one, other))
        values = [tuple(cell.cell_contents for cell in each) for each in cells]
        return one.__code__ is other.__code__ and _is_same(*values)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_is_same, one, other))
    return isinstance(one, int) and isinstance(other, int) and one == other


def attention(
    query: Tensor,  # (1, heads, M, d)
    key: Tensor,
    value: Tensor,
    layout: Layout,
    reach: int,
    scale: float | None,
) -> Tensor | None:  # (1, M, heads, d)
    """Attention along the paths of a row, or None if no kernel takes these tensors.

    Args:
        query, key, value: of the row; several query heads may share a key head.
        layout: of the row's paths, on the query's device.
        reach: how many tokens before itself a token sees; -1: all of them.
        scale: of the products; None: 1 / sqrt(d).
    """
    device = query.device
    if device.type not in _DEVICES:
        return None
    rows = [x.squeeze(0).transpose(0, 1) for x in (query, key, value)]
    if torch.is_autocast_enabled(device.type):
        # As sdpa does.
        rows = [x.to(torch.get_autocast_dtype(device.type)) for x in rows]
    queries, keys, values = rows
    tokens, size = sum(layout.sizes), queries.shape[2]
    is_taken = (
        all(x.dtype == queries.dtype and x.shape[::2] == (tokens, size) for x in rows)
        and queries.dtype in _DTYPES
        and size % 8 == 0
        and size <= _LARGEST_HEAD
    )
    if not is_taken:
        return None
    if reach + 1 >= layout.longest_k:
        reach = -1
    kind = _Kind(device, queries.dtype, queries.shape[1], keys.shape[1], size, reach >= 0)
    kernel = _kernel_for(kind)
    if kernel is None:
        return None
    return _applied(kernel, queries, keys, values, layout, reach, scale)[None]


# kernel(queries, keys, values, layout, reach, scale), each path's keys by themselves.
Kernel = Callable[[Tensor, Tensor, Tensor, Layout, int, float | None], Tensor]


def _applied(
    kernel: Kernel,
    queries: Tensor,  # (M, heads, d)
    keys: Tensor,
    values: Tensor,
    layout: Layout,
    reach: int,
    scale: float | None,
) -> Tensor:  # (M, heads, d)
    keys, values = layout.gathered(keys), layout.gathered(values)
    # Only the last dimension must lie in one piece.
    queries, keys, values = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (queries, keys, values)
    )
    return kernel(queries, keys, values, layout, reach, scale)


def _torch_varlen(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    layout: Layout,
    reach: int,
    scale: float | None,
) -> Tensor:
    from torch.nn.attention import varlen

    # A tensor, or a tuple where more is asked for.
    varlen_attn: Any = varlen.varlen_attn
    options = {}
    groups = queries.shape[1] // keys.shape[1]
    if groups > 1:
        # torch 2.11 does not have it.
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options["enable_gqa"] = True
        else:
            keys, values = (x.repeat_interleave(groups, 1) for x in (keys, values))
    # It compares the window with a tuple.
    return varlen_attn(
        queries,
        keys,
        values,
        *layout.bounds,
        scale=scale,
        window_size=(reach, 0),
        **options,
    )


def _flash_attn(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    layout: Layout,
    reach: int,
    scale: float | None,
) -> Tensor:
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    return flash_attn_varlen_func(
        queries,
        keys,
        values,
        *layout.bounds,
        softmax_scale=scale,
        causal=True,
        window_size=(reach, 0),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


_KERNELS: dict[str, Kernel] = {"torch's varlen_attn": _torch_varlen, "flash_attn": _flash_attn}


@dataclass(frozen=True)
class _Kind:
    """What a kernel's choice within torch may depend on."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    key_heads: int
    size: int
    has_window: bool


@functools.cache
def _kernel_for(kind: _Kind) -> Kernel | None:
    """The first kernel that is right for this kind of tensors."""
    problems = []
    for name, kernel in _KERNELS.items():
        # A thread of its own has no autocast, no hooks on saved tensors (a checkpointed layer's
        # would count the probe's), no dispatch modes, and keeps gradients.
        with ThreadPoolExecutor(1) as clean:
            problem = clean.submit(_problem, kernel, kind).result()
        if problem is None:
            return kernel
        problems.append(f"{name} {problem}")
    warnings.warn(
        f"on {kind.device} the attention of a packed row is computed one sequence at a time, which "
        f"is exact and slower: no kernel takes the whole row ({'; '.join(problems)})",
        stacklevel=2,
    )
    return None


def _problem(kernel: Kernel, kind: _Kind) -> str | None:
    """The reason why a kernel cannot be used for this kind of tensors; None if it can."""
    device = torch.cuda.device(kind.device) if kind.device.type == "cuda" else nullcontext()
    with device:
        try:
            error = _error(kernel, kind)
        except torch.OutOfMemoryError:
            raise
        except (ImportError, RuntimeError, TypeError, ValueError, AttributeError) as raised:
            return f"raised {type(raised).__name__}: {raised}".rstrip(".")
    if error <= _TOLERANCE:
        return None
    return f"differs from causal attention after a prefix by {error:.2g} of its norm"


def _error(kernel: Kernel, kind: _Kind) -> float:
    """The largest error of a token's output or gradient, relative to their mean norm."""
    lengths = tuple(length for length, _ in _PROBE)
    prefixes = tuple((0, before) for _, before in _PROBE)
    layout = Layout.of(lengths, prefixes, kind.device)
    reach = _PROBE_REACH if kind.has_window else -1
    generator = torch.Generator().manual_seed(0)

    def random(heads: int) -> Tensor:
        drawn = torch.randn(sum(lengths), heads, kind.size, generator=generator)
        return drawn.to(kind.device, kind.dtype)

    upstream = random(kind.heads)
    heads = (kind.heads, kind.key_heads, kind.key_heads)
    inputs = [random(count).requires_grad_() for count in heads]
    q, k, v = inputs
    output = _applied(kernel, q, k, v, layout, reach, None)
    found = [output, *torch.autograd.grad(output, inputs, upstream)]
    inputs = [x.detach().float().requires_grad_() for x in inputs]
    q, k, v = inputs
    expected = _by_products(q, k, v, lengths, prefixes, reach)
    true = [expected, *torch.autograd.grad(expected, inputs, upstream.float())]
    return max(
        ((x.float() - y).norm(dim=-1).max() / y.norm(dim=-1).mean()).item()
        for x, y in zip(found, true, strict=True)
    )


def _by_products(
    queries: Tensor,  # (M, heads, d)
    keys: Tensor,
    values: Tensor,
    lengths: Sequence[int],
    prefixes: Sequence[tuple[int, int]],
    reach: int,
) -> Tensor:  # (M, heads, d)
    """Attention along paths, with all scores in memory."""
    groups = queries.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(groups, 1).transpose(0, 1) for x in (keys, values))
    outputs, begin = [], 0
    for length, (start, before) in zip(lengths, prefixes, strict=True):
        seen = [*range(start, start + before), *range(begin, begin + length)]
        q = queries[begin : begin + length].transpose(0, 1)
        k, v = keys[:, seen], values[:, seen]
        distance = torch.arange(before, before + length)[:, None] - torch.arange(len(seen))
        is_seen = (distance >= 0) & ((distance <= reach) | torch.tensor(reach < 0))
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~is_seen.to(q.device), -math.inf)
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
        begin += length
    return torch.cat(outputs)
