"""The launches of one call of the operator, in order, with what each reads, writes and multiplies.

The operator's passes run on meta tensors, so no number is computed and no memory is used. A
`Recorder` sees every launch: the products and small operations by torch's dispatcher, the Triton
kernels by the functions on tiles that the passes call. Those call the real launchers, which
`support.compile_ahead` makes compile for a target and not run.

What depends on numbers is counted at its expectation, where a token's largest logit is equally
likely anywhere in the vocabulary: the i-th tile raises the maximum with probability 1 / i.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from prefkern.ops import backward, passes
from prefkern.ops.operands import Head, LowRank, Operands, Transform
from prefkern.ops.plan import Gradients, Plan, make_plan
from prefkern_bench.providers import eager_logps
from prefkern_bench.shapes import Shape


@dataclass(frozen=True)
class Task:
    """A call of the operator, forward and, if it has gradients, backward."""

    gradients: Gradients
    with_divergence: bool = False  # the KL to a reference with a head of its own
    rank: int = 0  # of a LoRA adapter on the head
    rows: int = 1  # hidden has so many times N rows, of which N are scored: packed with prompts
    workspace_mb: float | None = None  # None: the default

    @property
    def has_gradients(self) -> bool:
        return self.gradients.states or self.gradients.head


_FROZEN = Gradients(hidden=True, weight=False, bias=False)
_TRAINED = Gradients(hidden=True, weight=True, bias=False)
# At every shape, and beside logits in memory.
TASKS = {
    "forward": Task(Gradients(hidden=False, weight=False, bias=False)),
    "frozen": Task(_FROZEN),
    "trained": Task(_TRAINED),
}
# At the shape `MORE_AT` alone.
MORE_TASKS = {
    "trained, in 1 GiB": Task(_TRAINED, workspace_mb=1024),
    "frozen, packed": Task(_FROZEN, rows=2),
    "frozen, LoRA on the head": Task(
        Gradients(hidden=True, weight=False, bias=False, lora_hidden=True, lora_weight=True),
        rank=16,
    ),
    "frozen, KL": Task(_FROZEN, with_divergence=True),
    "trained, KL": Task(_TRAINED, with_divergence=True),
}
MORE_AT = "Llama-3-8B"
DTYPE = torch.bfloat16
# They reserve memory and launch nothing.
_NO_LAUNCH = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
_INDEXED = ("index_select", "gather", "embedding")


@dataclass(frozen=True)
class Region:
    """Part of a tensor's memory that a launch touches."""

    key: tuple
    bytes: float

    @staticmethod
    def of(x: Tensor, share: float = 1.0) -> Region:
        """What a tensor covers, however it is transposed or expanded."""
        sizes = sorted((n, s) for n, s in zip(x.shape, x.stride(), strict=True) if s and n > 1)
        elements = 1
        for size, _ in sizes:
            elements *= size
        key = (x.untyped_storage()._cdata, x.storage_offset(), *sizes)
        return Region(key, share * elements * x.element_size())


@dataclass(frozen=True)
class Launch:
    """One launch; `kernel` names a Triton kernel of prefkern, a product, or torch's operator."""

    kernel: str
    reads: list[Region]
    writes: list[Region]
    product: tuple[int, int, int, str] | None = None  # rows, columns, inner size, dtype
    rows: int = 0  # of a kernel that walks rows
    row_size: int = 0
    row_bytes: float = 0.0  # that a program reads and writes of memory in one walk
    share: float = 1.0  # of the programs, that walk their rows; the others return at once
    readings: int = 1
    tiles: int = 1  # float32 rows that each program reads: two of a pair
    serial: int = 1  # loads that a program waits for, one after the other, beside those of its row
    compiled: Any = None  # what Triton compiled for this launch


@dataclass
class Recorder(TorchDispatchMode):
    """Records what torch launches; the functions on tiles add their own launches."""

    launches: list[Launch] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        # A freed storage's address would be given to another one.
        self._alive: list[Any] = []

    def add(self, kernel: str, reads: Sequence[Any], writes: Sequence[Any], **more: Any) -> None:
        """Add a launch, from tensors or regions; None is skipped."""
        self.launches.append(Launch(kernel, self._regions(reads), self._regions(writes), **more))

    def _regions(self, touched: Sequence[Any]) -> list[Region]:
        self._alive += [x.untyped_storage() for x in touched if isinstance(x, Tensor)]
        return [Region.of(x) if isinstance(x, Tensor) else x for x in touched if x is not None]

    def region(self, x: Tensor, share: float = 1.0, rows: int | None = None) -> Region:
        """A share of a tensor, or `rows` of its rows."""
        self._alive.append(x.untyped_storage())
        return Region.of(x, share if rows is None else rows / x.shape[0])

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # torch 2.11 cannot run it on meta tensors: it takes the dtype for beta.
        is_meta_sum = func is torch.ops.aten.addmm.dtype_out and kwargs["out"].is_meta
        out = kwargs["out"] if is_meta_sum else func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if func.is_view or name in (*_NO_LAUNCH, "detach") or not isinstance(out, Tensor):
            return out
        # An operator on several tensors has them in a list.
        flat = [y for x in args for y in (x if isinstance(x, list | tuple) else [x])]
        given = [x for x in (*flat, *kwargs.values()) if isinstance(x, Tensor)]
        if name in ("mm", "addmm", "addmm_"):
            a, b = given[-3:-1] if "out" in kwargs else given[-2:]
            reads = [a, b, *([] if name == "mm" else [out])]
            size = (a.shape[0], b.shape[1], a.shape[1], str(a.dtype).removeprefix("torch."))
            self.add("product", reads, [out], product=size)
            return out
        written = {out.untyped_storage()._cdata}
        reads = [x for x in given if x.untyped_storage()._cdata not in written]
        if name in _INDEXED:
            reads = [self.region(x, min(1.0, out.numel() / x.numel())) for x in reads]
        elif name in ("scatter", "scatter_"):
            reads = []
        in_place = name.endswith("_") and name not in ("copy_", "zero_", "fill_")
        self.add(f"torch {name.strip('_')}", [*reads, *([out] if in_place else [])], [out])
        return out


class RecordedOps:
    """The functions on tiles, of `prefkern.ops.tile_ops`, each of which adds its launch.

    Args:
        kernels: the launchers that run.
        compiled: gives what Triton compiled for the latest launch, a `time_model.Compiled`.
    """

    def __init__(
        self, recorder: Recorder, kernels: ModuleType, compiled: Callable[[], Any]
    ) -> None:
        self._recorder, self._kernels, self._compiled = recorder, kernels, compiled
        self._number = 0

    def _add(self, name: str, reads: list[Any], writes: list[Any], tile: Tensor, **more) -> None:
        size = {"rows": tile.shape[0], "row_size": tile.shape[-1]}
        compiled = self._compiled()
        self._recorder.add(name, reads, writes, compiled=compiled, **(size | more))

    def fold(self, tile: Tensor, labels: Tensor, bias: Tensor | None, *args: Any, **more) -> None:
        self._number = 1 if more["first"] else self._number + 1
        *state, _rescale, weights = args[:6]
        self._kernels.fold(tile, labels, bias, *args, **more)
        pair = {name: x for name, x in more.items() if isinstance(x, Tensor)}
        ref_tile, ref_weights = pair.pop("ref_tile", None), pair.pop("ref_weights", None)
        pair.pop("ref_rescale", None)
        tiles = 1 if ref_tile is None else 2
        is_held = tiles == 1 and tile.shape[1] <= self._compiled().block
        size = 4 + (0 if weights is None else weights.element_size())
        self._add(
            "fold" if tiles == 1 else "fold of pairs",
            [tile, ref_tile, labels, bias, *state, *pair.values()],
            [weights, ref_weights, *state, *pair.values()],
            tile,
            row_bytes=tiles * tile.shape[1] * size,
            readings=1 if is_held else 2,
            tiles=tiles,
            # Of a held row nothing waits for the label, or for the old state. Else the label, the
            # maximum and the sum each wait for what is before them.
            serial=0 if is_held else 3,
        )

    def rescale_rows(self, accumulator: Tensor, factor: Tensor) -> None:
        self._kernels.rescale_rows(accumulator, factor)
        share = 1 / self._number
        part = self._recorder.region(accumulator, share)
        self._add("rescale_rows", [factor, part], [part], accumulator, share=share)

    def finish(self, *args: Any, **more: Any) -> None:
        self._kernels.finish(*args, **more)
        *state, labels, logps = args[:6]
        numbers, derivative, weight = args[6:9], args[9], args[10]
        rows = None if derivative is None else self._recorder.region(weight, rows=len(labels))
        reads, writes = [*state, labels, derivative, rows], [logps, *numbers, derivative]
        self._add("finish", reads, writes, logps.unsqueeze(1) if derivative is None else derivative)

    def settle(self, kept: Tensor, maxima: Tensor, *vectors: Any) -> None:
        self._kernels.settle(kept, maxima, *vectors)
        # Tile k of K has another maximum than the row with probability 1 - k / K.
        share = (1 - 1 / maxima.shape[0]) / 2
        part, programs = self._recorder.region(kept, share), kept.shape[0] * maxima.shape[0]
        size = {"rows": programs, "row_size": kept.numel() // programs, "share": share}
        self._add("settle", [part, maxima, *vectors[:3]], [part], kept, **size)

    def remake_weights(self, tile: Tensor, *args: Any, **more: Any) -> None:
        self._kernels.remake_weights(tile, *args, **more)
        *vectors, weights = args[:6]
        pair = [x for x in more.values() if isinstance(x, Tensor)]
        name = "remake_weights" if more.get("ref_tile") is None else "remake_weights of pairs"
        self._add(name, [tile, *vectors, *pair], [weights], tile)

    def scatter_scaled(self, values: Tensor, scale: Tensor, rows: Any, out: Tensor, *args) -> None:
        self._kernels.scatter_scaled(values, scale, rows, out, *args)
        self._add("scatter_scaled", [values, scale, rows], [out], values)


def inputs(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, the head's weight and labels of a shape, without memory."""
    hidden = torch.empty(shape.tokens, shape.hidden_size, dtype=DTYPE, device="meta")
    weight = torch.empty(shape.vocab_size, shape.hidden_size, dtype=DTYPE, device="meta")
    return hidden, weight, torch.empty(shape.tokens, dtype=torch.int64, device="meta")


def operator(
    shape: Shape,
    task: Task,
    workspace_mb: float,
    kernels: ModuleType,
    compiled: Callable[[], Any],
    upcasts: bool = False,
) -> tuple[Plan, list[Launch]]:
    """The launches of the operator, forward and, if the task has one, backward.

    `upcasts`: the device has no products with a float32 result.
    """
    hidden, weight, labels = inputs(shape)
    rows = None
    if task.rows > 1:
        hidden = hidden.new_empty(task.rows * shape.tokens, shape.hidden_size)
        rows = torch.empty_like(labels)
    low_rank = None
    if task.rank:
        low_rank = LowRank(
            hidden.new_empty(len(hidden), task.rank), weight.new_empty(len(weight), task.rank)
        )
    operands = Operands(DTYPE, upcasts)
    head = Head(hidden, weight, None, operands, low_rank)
    reference = None
    if task.with_divergence:
        head, reference = head.unrounded(), Head(*inputs(shape)[:2], None, operands).unrounded()
    transform = Transform(softcap=shape.softcap)
    plan = make_plan(
        tokens=shape.tokens,
        vocab_size=shape.vocab_size,
        head=head.size,
        gradients=task.gradients,
        backend="triton",
        workspace_mb=task.workspace_mb or workspace_mb,
        has_softcap=shape.softcap is not None,
        reference=None if reference is None else reference.size,
        with_divergence=task.with_divergence,
    )
    with Recorder() as recorder:
        ops: Any = RecordedOps(recorder, kernels, compiled)
        passed = passes.forward(head, reference, rows, labels, transform, plan, ops)
        if task.has_gradients:
            states = [hidden] if low_rank is None else [hidden, low_rank.hidden]
            backward.backward(
                [passed.logps, *([] if passed.kl is None else [passed.kl])],
                head if plan.trains_head else None,
                reference if plan.trains_head else None,
                rows,
                labels,
                passed.gathered,
                [(x.shape, x.dtype) for x in states],
                transform,
                plan,
                ops,
                task.gradients,
            )
    return plan, recorder.launches


def eager(shape: Shape, task: str) -> list[Launch]:
    """The launches of logits in memory, differentiated by autograd."""
    hidden, weight, labels = inputs(shape)
    hidden.requires_grad_(task != "forward")
    weight.requires_grad_(task == "trained")
    with Recorder() as recorder:
        logps = eager_logps(hidden, weight, labels, shape.softcap)
        if task != "forward":
            logps.sum().backward()
    return recorder.launches
