"""A sequence over several ranks: each rank of a group holds some of its tokens.

A preference loss sees a few sums of each sequence, and its gradient is one number a sequence. So
ranks that hold parts of the same sequences add their sums, and then each has the whole loss:

- `Agreement` (`prefkern.ops.agreement`), before anything is computed: each rank sends its number of
  sequences, the objective, and a checksum of the numbers that are of whole sequences;
- `whole_sums`: one all-reduce of all sums and lengths, (k, S) float64, so that the split does not
  show in the rounding. Its backward sends nothing: a token's gradient needs the whole loss and the
  token alone.

Which tokens are where does not matter to a sum. Labels are aligned before they are split: the label
of a part's last token is the first token of another part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from prefkern.devices import as_double, back, of_doubles
from prefkern.ops import sequences
from prefkern.ops.agreement import Party, checksum
from prefkern.ops.operands import Head
from prefkern.ops.plain import shown

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from prefkern.ops.shards import VocabShard


def check_group(group: object) -> None:
    """Raise TypeError unless it is None or a group that this rank is in."""
    if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise TypeError(
            "sequence_group must be None or a torch.distributed.ProcessGroup that this rank is in, "
            f"got {shown(group)}"
        )


def refuse_graphs(group: ProcessGroup | None, labels: object) -> None:
    """Raise NotImplementedError in graphs of any kind, where there are no collectives of ours."""
    if group is None:
        return
    is_captured = isinstance(labels, Tensor) and sequences.is_capturing(labels)
    if torch.compiler.is_compiling() or is_captured:
        raise NotImplementedError(
            "sequence_group runs outside of torch.compile and CUDA graphs: ranks first agree upon "
            "the call, which reads numbers from the device. Leave the call out of the compiled or "
            "captured region"
        )


def party(group: ProcessGroup | None) -> Party | None:
    """Those who must agree upon a loss."""
    if group is None:
        return None
    return Party("sequence_group", group, "which hold parts of the same sequences")


def check_apart(group: ProcessGroup, shard: VocabShard) -> None:
    """Raise ValueError if two ranks have the same tokens as well as other ones."""
    both = {*dist.get_process_group_ranks(group)} & {*dist.get_process_group_ranks(shard.group)}
    if len(both) > 1:
        raise ValueError(
            "sequence_group and vocab's group share the ranks "
            f"{', '.join(map(str, sorted(both)))}: ranks of one head score the same tokens, and "
            "those of sequence_group other tokens. Make two groups that meet in one rank, or gather "
            "hidden and labels over the ranks and leave sequence_group out"
        )


def facts_of(
    head: Head,
    n_sequences: int,
    entries: int,  # of the vocabulary
    whole: dict[str, Tensor | None],  # of sequences or pairs, by the name of the argument
    **others: object,
) -> dict[str, object]:
    """What ranks must agree upon before they add anything. Reads the numbers from the device."""
    return {
        "the number of sequences": n_sequences,
        "hidden": f"size {head.hidden.shape[-1]} in {head.operands.compute_dtype}",
        "weight": f"{entries} vocabulary entries",
        **{name: None if x is None else _described(x) for name, x in whole.items()},
        **others,
    }


def _described(numbers: Tensor) -> str:  # (...)
    return checksum(as_double(numbers.detach()).view(torch.int64))


def whole_sums(
    values: dict[str, Tensor],  # (N,) each, of this rank's tokens
    offsets: Tensor,  # (S + 1,)
    group: ProcessGroup,
) -> tuple[dict[str, Tensor], Tensor]:  # (S,) each, and (S,) int64 the tokens
    """The sums of sequences over all ranks, which get the same; added in float64, rounded once.

    Differentiable in this rank's values: every rank differentiates the same number.
    """
    bounds = offsets.to(of_doubles(offsets.device))
    own = [sequences.sequence_sums(as_double(x), bounds) for x in values.values()]
    *sums, lengths = _Joined.apply(torch.stack([*own, bounds.diff().double()]), group)
    rounded = [back(x, value) for x, value in zip(sums, values.values(), strict=True)]
    return dict(zip(values, rounded, strict=True)), back(lengths.detach(), offsets)


class _Joined(torch.autograd.Function):
    """The sum over ranks. Each rank's part has the gradient of the sum."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: ProcessGroup) -> Tensor:  # (k, S)
        whole = own.clone()
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
