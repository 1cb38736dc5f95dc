"""What a step costs, counted: matrix-product operations and bytes, without a GPU and without timing.

`Meter` watches every torch operator that runs while it is active, forward and backward. A product
of an `[m, k]` and a `[k, n]` matrix is 2mkn operations. Bytes are those of storages that came into
being while it was active: a view costs nothing, a tensor that was there before costs nothing, and
what is freed is given back at the moment it is freed, so that `peak_bytes` is the most that was
alive at once. Both are properties of the algorithm, the same on every machine, where a process's
resident memory also shows the allocator's habits.

A custom operator that is written in torch is taken apart, so that its products and its memory are
seen too. What it cannot see: scratch memory inside an operator, products inside a Triton kernel. On
CUDA, bytes are therefore the caching allocator's record (`cost_of`).

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

_aten = torch.ops.aten

# Operator -> the positions of its two factors. An overload (out, dtype, ...) keeps the positions.
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
}

_BUILT_IN = ("aten", "prim", "prims")
# Where `torch.library.custom_op` keeps an operator's code for any device, below autograd.
_CUSTOM_CODE = torch._C.DispatchKey.CompositeExplicitAutograd


class Meter(TorchDispatchMode):
    """Counts matrix-product operations and live bytes of what runs inside `with Meter() as meter:`.

    `operations` counts up; `live_bytes` is what is alive now of the storages that were allocated
    inside, and `peak_bytes` the most that it has been. A meter may be left and entered again.
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
        # In inference mode, composite operators (linear, matmul) arrive whole: take them apart.
        if func is not torch.ops.prim.device.default:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts

        # A custom operator is code around torch's operators: run that, and watch inside.
        if func.namespace not in _BUILT_IN and func.has_kernel_for_dispatch_key(_CUSTOM_CODE):
            with self:
                return func._op_dk(_CUSTOM_CODE, *args, **kwargs)

        # A result on a storage that an argument already had is a view or written in place.
        given = {_address(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **kwargs)
        if func.overloadpacket in _FACTORS:
            left, right = (args[position] for position in _FACTORS[func.overloadpacket])
            columns = right.shape[-1] if right.dim() > 1 else 1
            self.operations += 2 * left.numel() * columns
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
        # An operator with an `out` argument may have grown a storage that was seen before.
        self.live_bytes += size - self._bytes_of[address]
        self._bytes_of[address] = size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _forget(self, address: int) -> None:
        self.live_bytes -= self._bytes_of.pop(address)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@dataclass(frozen=True)
class Cost:
    """Matrix-product operations of a step, and the most bytes alive beyond what was there before.

    What the step leaves behind or returns, gradients for one, is part of `peak_bytes`.
    """

    operations: int
    peak_bytes: int


def cost_of(
    step: Callable[[], object],
    device: torch.device,
    counted: Callable[[], object] | None = None,
) -> Cost:
    """Run `step` and say what it cost.

    On CUDA, memory and operations are taken in a run each, so that neither disturbs the other.
    `counted` is then the same step in a form whose operators can be seen, for one that is compiled.
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
