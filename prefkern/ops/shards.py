"""A head over several ranks: each holds some rows of it, and folds the logits of those entries.

The state of a token (`fold_state`) is a sum over the vocabulary, so ranks add theirs. A call has
four collectives, whatever its number of tiles:

- `Agreement` (`prefkern.ops.agreement`), before anything is computed: each rank sends its entries, a
  checksum of its labels, and its options; or that it raised. So all ranks go on, or all raise.
- `join`, when a rank has folded all of its entries: one all-reduce with MAX, (N,) maxima, and one
  with SUM, (N,) sums and label logits, float32. `D` stays where it is: each rank brings its own
  part to the common maximum.
- `add_up`, in backward: the gradient of the states, (N, H) float32. The states are the same on all
  ranks, and each rank's entries give a part of their gradient.

The gradient of a rank's rows stays on that rank. All ranks get the same log-probs, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

from prefkern.ops import sequences
from prefkern.ops.agreement import Party, checksum
from prefkern.ops.fold_state import FoldState
from prefkern.ops.operands import Head, are_own
from prefkern.ops.plain import shown

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class VocabShard:
    """The entries of a vocabulary whose rows of the head this rank holds.

    Args:
        group: the process group of the ranks that hold the head together. Each has a part, which
            may be empty; together they have each entry once.
        start: the first entry of this rank. Its last one follows from the rows of its weight.
        size: V, the entries of the whole vocabulary.
    """

    group: ProcessGroup
    start: int
    size: int

    def __post_init__(self) -> None:
        if not dist.is_available() or not isinstance(self.group, dist.ProcessGroup):
            raise TypeError(
                "group must be a torch.distributed.ProcessGroup that this rank is in, such as "
                f"torch.distributed.group.WORLD after init_process_group, got {shown(self.group)}"
            )
        for name, value, least in (("size", self.size, 1), ("start", self.start, 0)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int, got {shown(value)}")
            if value < least:
                raise ValueError(f"{name} must be >= {least}, got {value}")
        if self.start > self.size:
            raise ValueError(
                f"start must be in [0, size] = [0, {self.size}], got {self.start}; a rank without "
                "entries has start = size and a weight without rows"
            )


def size_of(shard: VocabShard | None, weight: Tensor) -> int:
    """The entries that labels may name."""
    return weight.shape[0] if shard is None else shard.size


def refuse_graphs(shard: VocabShard | None, weight: object, labels: object) -> None:
    """Raise NotImplementedError where there are no collectives of ours: in graphs of any kind."""
    if shard is None and not is_dtensor(weight):
        return
    is_captured = isinstance(labels, Tensor) and sequences.is_capturing(labels)
    if torch.compiler.is_compiling() or is_captured:
        raise NotImplementedError(
            "a head over several ranks (vocab, or weight as a DTensor) runs outside of "
            "torch.compile and CUDA graphs: ranks first agree upon the call, which reads numbers "
            "from the device. Leave the call out of the compiled or captured region"
        )


def party(vocab: object, weight: object) -> Party | None:
    """Those who must agree upon a call, by its arguments, which may be wrong on this rank.

    Each sends "entries", (first, last + 1) of this rank, and "size".
    """
    group = vocab.group if isinstance(vocab, VocabShard) else None
    if group is None and is_dtensor(weight) and weight.device_mesh.ndim == 1:
        group = None if _is_everywhere(weight) else weight.device_mesh.get_group()
    if group is None:
        return None

    def check(everyone: list[dict[str, Any]]) -> None:
        _refuse_gaps(everyone[0]["size"], [theirs["entries"] for theirs in everyone])

    return Party("vocab's group", group, "which score the same tokens", ("entries",), check)


def _refuse_gaps(size: int, parts: list[tuple[int, int]]) -> None:
    """Raise ValueError unless the parts have each entry once; the same on all ranks."""
    reached = 0
    for start, stop in sorted(parts):
        if start != reached and start != stop:
            break
        reached = max(reached, stop)
    else:
        if reached == size:
            return
    shown = ", ".join(
        f"rank {rank} [{start}, {stop})" for rank, (start, stop) in enumerate(parts[:8])
    )
    raise ValueError(
        f"vocab: the ranks' start and rows of weight must have each entry of [0, {size}) "
        f"once, got {shown}{', ...' if len(parts) > 8 else ''}"
    )


def facts_of(
    shard: VocabShard,
    head: Head,
    labels: Tensor,  # (...)
    **others: object,
) -> dict[str, object]:
    """What ranks must agree upon before they sum anything. One device synchronisation."""

    def described(states: Tensor) -> str:
        needs = torch.is_grad_enabled() and states.requires_grad
        dtype = str(head.operands.compute_dtype).removeprefix("torch.")
        return f"{list(states.shape)} in {dtype}, {'a' if needs else 'no'} gradient"

    low_rank = head.low_rank
    return {
        "entries": (shard.start, shard.start + head.weight.shape[0]),
        "size": shard.size,
        "hidden": described(head.hidden),
        "lora_hidden": None if low_rank is None else described(low_rank.hidden),
        "labels": checksum(labels),
        # It decides the order of tokens.
        "PREFKERN_CPU_BF16": head.operands.rounds,
        **others,
    }


def join(
    shard: VocabShard,
    labels: Tensor,  # (N,) relative to the shard's start
    rows: int,
    has_slope: bool,
    state: FoldState,  # (N,), in place
    reference: FoldState | None = None,
) -> list[Tensor]:  # (N,) each
    """Make states of the whole vocabulary from those of its parts.

    Returns exp(own maximum - maximum) of each state, which brings its `A` to the common maximum.
    """
    states = [each for each in (state, reference) if each is not None]
    largest = [x for each in states for x in (each.maximum, each.before) if x is not None]
    maxima = torch.stack(largest)
    dist.all_reduce(maxima, dist.ReduceOp.MAX, group=shard.group)
    tops, factors, sums = iter(maxima), [], []
    inside = are_own(labels, rows)
    for each in states:
        part, factor = each.relative_to(next(tops))
        if each.before is not None:
            each.before.copy_(next(tops))
        factors.append(factor)
        each.maximum.copy_(part.maximum)
        # One rank has the label; a sum with zeros is exact, and keeps a NaN.
        label_logit = torch.where(inside, each.label_logit, 0.0)
        sums.append((each.total, part.total))
        sums.append((each.label_logit, label_logit))
        if has_slope and each is state:
            sums.append((each.label_slope, torch.where(inside, each.label_slope, 0.0)))
        for name in ("shifted", "logit_sum", "squares", "cross"):
            if (vector := getattr(each, name)) is not None:
                sums.append((vector, getattr(part, name)))
    added = torch.stack([part for _, part in sums])
    dist.all_reduce(added, dist.ReduceOp.SUM, group=shard.group)
    for (vector, _), value in zip(sums, added, strict=True):
        vector.copy_(value)
    return factors


def add_up(shard: VocabShard, gradient: Tensor) -> None:  # (N, W) float32, in place
    """The gradient of states that all ranks share, from the parts of it."""
    dist.all_reduce(gradient, dist.ReduceOp.SUM, group=shard.group)


# torch.distributed.tensor takes a third of a second to import, and a plain call does not need it.


def is_dtensor(value: object) -> TypeGuard[DTensor]:
    if not isinstance(value, Tensor) or type(value) in (Tensor, torch.nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def local_states(**states: Any) -> tuple[Any, ...]:
    """Plain tensors in place of DTensors that every rank has in full; others as they are.

    Raises TypeError for a DTensor with another placement.
    """
    return tuple(
        _replicated(name, value) if is_dtensor(value) else value for name, value in states.items()
    )


def _is_everywhere(value: DTensor) -> bool:
    """Whether every rank has all of it."""
    from torch.distributed.tensor import Replicate

    return all(isinstance(placement, Replicate) for placement in value.placements)


def _replicated(name: str, value: DTensor) -> Tensor:
    from torch.distributed.tensor import Replicate

    if not _is_everywhere(value):
        raise TypeError(
            f"{name} must be a tensor, or a DTensor with placement Replicate, got a DTensor with "
            f"{value.placements}; {name}.full_tensor() gathers it"
        )
    return value.to_local(grad_placements=[Replicate()] * value.device_mesh.ndim)


def local_head(vocab: VocabShard | None, **parts: Any) -> tuple[VocabShard | None, tuple[Any, ...]]:
    """A head as this rank has it: its shard of the vocabulary, and plain tensors.

    Args:
        vocab: the shard that the caller gave. A weight that is a DTensor has its own.
        parts: weight first; the others are plain, or placed as weight is.

    Raises TypeError and ValueError for another placement than Shard(0) on a mesh of one dimension,
    or Replicate.
    """
    if vocab is not None and not isinstance(vocab, VocabShard):
        raise TypeError(f"vocab must be a prefkern.VocabShard or None, got {shown(vocab)}")
    (name_of_weight, weight), *_ = parts.items()
    if not is_dtensor(weight):
        return vocab, local_states(**parts)
    from torch.distributed.tensor import Shard

    if vocab is not None:
        raise ValueError(
            f"vocab was given, and {name_of_weight} is a DTensor, which has its own shard: leave "
            "vocab None, or give the rank's rows as a plain tensor"
        )
    mesh, placements = weight.device_mesh, weight.placements
    if _is_everywhere(weight):
        return None, local_states(**parts)
    # Not a subclass of Shard, which has its rows in another order.
    if len(placements) != 1 or type(placements[0]) is not Shard or placements[0].dim != 0:
        raise TypeError(
            f"{name_of_weight} must be a tensor, or a DTensor with placement Replicate, or with "
            f"Shard(0) on a mesh of one dimension, got a DTensor with {placements} on a mesh of "
            f"{mesh.ndim} dimensions"
        )
    size, rank, ranks = weight.shape[0], mesh.get_local_rank(), mesh.size()
    # As torch.chunk cuts: the first ranks have equal parts, the last ones less or nothing.
    each = -(-size // ranks)
    vocab = VocabShard(mesh.get_group(), min(rank * each, size), size)
    local = []
    for name, value in parts.items():
        if is_dtensor(value):
            if value.device_mesh != mesh or value.placements != placements:
                raise TypeError(
                    f"{name} must be placed as {name_of_weight} is, {placements}, or be the "
                    f"rank's rows as a plain tensor, got a DTensor with {value.placements}"
                )
            value = value.to_local()
        local.append(value)
    return vocab, tuple(local)


def local_reference(vocab: VocabShard | None, **parts: Any) -> tuple[Any, ...]:
    """A reference's head as this rank has it, which must be sharded as the policy's is."""
    shard, local = local_head(None, **parts)
    if shard is not None and shard != vocab:
        raise ValueError(
            "ref_weight is a DTensor with placement Shard(0), and weight has other entries: both "
            "must be sharded alike, over the same ranks"
        )
    return local
