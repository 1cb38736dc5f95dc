"""Counts the cost of a step: matrix-product operations and bytes, without a GPU and without timing.

`Meter` watches every torch operator that runs while it is active, forward and backward. A product
of an `[m, k]` and a `[k, n]` matrix is 2mkn operations. Fused attention counts the pairs of a query
and a key that it computes: causal attention without a mask skips half. Bytes are those of storages that are
allocated while it is active. A view costs nothing, and a tensor that existed before costs nothing.
Freed storages are subtracted at once, so that `peak_bytes` is the largest number of bytes alive at
one time. Both counts are properties of the algorithm and equal on every machine. A process's
resident memory, in contrast, also depends on the allocator.

A custom operator that is written in torch is opened, so that its products and memory count too. The
meter cannot see scratch memory inside an operator, or products inside a Triton kernel. So on CUDA
the bytes come from the caching allocator (`cost_of`).

    with Meter() as meter:
        loss_fn(hidden, weight, labels).loss.backward()
    meter.operations, meter.peak_bytes
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import prefkern.ops.cpu

_aten = torch.ops.aten

# Operator -> the positions of its two factors, which are the same for its overloads (out, dtype).
_FACTORS = {
    _aten.mm: (0, 1),
    _aten.addmm: (1, 2),
    _aten.addmm_: (1, 2),
    _aten.bmm: (0, 1),
    _aten.baddbmm: (1, 2),
    _aten.baddbmm_: (1, 2),
    _aten.addbmm: (1, 2),
    _aten.addbmm_: (1, 2),
    _aten.mv: (0, 1),
    _aten.addmv: (1, 2),
    _aten.addmv_: (1, 2),
    _aten.dot: (0, 1),
    _aten.vdot: (0, 1),
    # Each row of the first factor meets one of the second's matrices.
    _aten._grouped_mm: (0, 1),
}

# Fused attention: two products of queries and keys, and five in backward, where it computes the
# first one again. (operator, position of the query, products)
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu: (0, 2),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: (1, 5),
    _aten._scaled_dot_product_flash_attention: (0, 2),
    _aten._scaled_dot_product_flash_attention_backward: (1, 5),
    _aten._scaled_dot_product_efficient_attention: (0, 2),
    _aten._scaled_dot_product_efficient_attention_backward: (1, 5),
    # Within torch's varlen_attn, with bounds of sequences.
    _aten._flash_attention_forward: (0, 2),
    _aten._flash_attention_backward: (1, 5),
}

# A CPU's product of the rows of two matrices.
_OF_ROWS = prefkern.ops.cpu.operator

_BUILT_IN = ("aten", "prim", "prims")
# The key under which `torch.library.custom_op` registers code for any device, below autograd.
_CUSTOM_CODE = torch._C.DispatchKey.CompositeExplicitAutograd


class Meter(TorchDispatchMode):
    """Counts matrix-product operations and live bytes of the code inside `with Meter() as meter:`.

    `operations` only grows. `live_bytes` is the size of the storages that were allocated inside and
    are alive now; `peak_bytes` is its largest value so far. A meter may be entered again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.live_bytes = 0
        self.peak_bytes = 0
        self._bytes_of: dict[int, int] = {}  # a storage's address -> its bytes

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # In inference mode, composite operators (linear, matmul) arrive whole: decompose them.
        if func is not torch.ops.prim.device.default:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts

        # A custom operator is code around torch's operators: run that code under the meter.
        if func.namespace not in _BUILT_IN and func.has_kernel_for_dispatch_key(_CUSTOM_CODE):
            with self:
                return func._op_dk(_CUSTOM_CODE, *args, **kwargs)

        # A result that shares its storage with an argument is a view, or was written in place.
        given = {_address(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **kwargs)
        if func.overloadpacket in _FACTORS:
            left, right = (args[position] for position in _FACTORS[func.overloadpacket])
            columns = right.shape[-1] if right.dim() > 1 else 1
            self.operations += 2 * left.numel() * columns
        elif func.overloadpacket == _OF_ROWS:
            self.operations += 2 * args[0].numel() * args[1].shape[0]
        elif func.overloadpacket in _ATTENTION:
            self.operations += _attention_operations(func, args, kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf, is_new=_address(leaf) not in given)
        return result

    def _see(self, tensor: Tensor, is_new: bool) -> None:
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address not in self._bytes_of:
            if not is_new:
                return
            self._bytes_of[address] = 0
            weakref.finalize(storage, self._forget, address)
        # An operator with an `out` argument may enlarge a known storage.
        self.live_bytes += size - self._bytes_of[address]
        self._bytes_of[address] = size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _forget(self, address: int) -> None:
        self.live_bytes -= self._bytes_of.pop(address)


def _attention_operations(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Products of queries and keys in fused attention, which skips those above the diagonal."""
    given = dict(zip((each.name for each in func._schema.arguments), args, strict=False)) | kwargs
    first, products = _ATTENTION[func.overloadpacket]
    query, key, value = args[first : first + 3]
    width = (query.shape[-1] + value.shape[-1]) // 2
    if given.get("cum_seq_q") is not None:  # (tokens, heads, d)
        return 2 * products * query.shape[1] * _pairs_of_sequences(given) * width
    queries, keys = query.shape[-2], key.shape[-2]
    pairs = queries * keys
    if given.get("is_causal"):
        # The query i sees the keys 0 to i.
        seen = min(queries, keys)
        pairs = seen * (seen + 1) // 2 + (queries - seen) * keys
    return 2 * products * query.shape[:-2].numel() * pairs * width


def _pairs_of_sequences(given: dict[str, Any]) -> int:
    """Queries and keys that see each other; a sequence's last query is aligned with its last key."""
    left, right = (given.get(f"window_size_{side}") for side in ("left", "right"))
    is_causal = given["is_causal"] or right == 0
    pairs = 0
    sizes = (given[name].diff().tolist() for name in ("cum_seq_q", "cum_seq_k"))
    for queries, keys in zip(*sizes, strict=True):
        if not is_causal:
            pairs += queries * keys
            continue
        seen = range(keys - queries + 1, keys + 1)
        pairs += sum(seen) if left is None or left < 0 else sum(min(n, left + 1) for n in seen)
    return pairs


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@dataclass(frozen=True)
class Cost:
    """Matrix-product operations of a step, and its peak of bytes beyond those alive before it.

    Tensors that the step returns or leaves behind, such as gradients, are part of `peak_bytes`.
    """

    operations: int
    peak_bytes: int


def cost_of(
    step: Callable[[], object],
    device: torch.device,
    counted: Callable[[], object] | None = None,
) -> Cost:
    """Run `step` and return its cost.

    On CUDA, memory and operations are measured in separate runs, so that they do not disturb each
    other. `counted` is the same step without compilation, for a step whose operators are hidden.
    """
    peak_bytes = cuda_peak_bytes(step, device) if device.type == "cuda" else None
    with Meter() as meter:
        result = (counted or step)()
    del result
    return Cost(meter.operations, meter.peak_bytes if peak_bytes is None else peak_bytes)


def cuda_peak_bytes(step: Callable[[], object], device: torch.device) -> int:
    """The caching allocator's peak while `step` runs, beyond what was allocated before."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = step()
    torch.cuda.synchronize(device)
    peak_bytes = torch.cuda.max_memory_allocated(device) - before
    del result
    return peak_bytes
