"""The arguments of one call of the loss: as they were given, and as this rank's own tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from prefkern.ops import parts, shards
from prefkern.ops.agreement import Agreement
from prefkern.ops.operands import Head, LowRank, Transform
from prefkern.ops.shards import VocabShard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Given:
    """The arguments of one call of the loss."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None
    ref_hidden: Tensor | None
    ref_weight: Tensor | None
    ref_bias: Tensor | None
    ref_logps: Tensor | None
    reward_margins: Tensor | None
    cu_seqlens: Tensor | None
    logit_scale: float
    softcap: float | None
    temperature: float
    return_stats: bool
    desirable: Tensor | None
    mismatched_log_ratios: Tensor | None
    lora_hidden: Tensor | None
    lora_weight: Tensor | None
    vocab: VocabShard | None

    @property
    def is_packed(self) -> bool:
        return self.cu_seqlens is not None

    @property
    def vocab_size(self) -> int:
        return shards.size_of(self.vocab, self.weight)

    def transform(self) -> Transform:
        return Transform(float(self.logit_scale), self.softcap, float(self.temperature))

    def head(self) -> Head:
        adapter = LowRank.of(self.lora_hidden, self.lora_weight)
        return Head.of(self.hidden, self.weight, self.bias, adapter)

    def reference(self) -> Head | None:
        if self.ref_hidden is None or self.ref_weight is None:
            return None
        return Head.of(self.ref_hidden, self.ref_weight, self.ref_bias)


def local(
    given: Given, ranks: Agreement, group: ProcessGroup | None
) -> tuple[Given, dict[str, object]]:
    """A call's arguments as this rank's own tensors, and the facts of the vocabulary's ranks."""
    facts = ranks.admit(shards.party(given.vocab, given.weight))
    vocab, (weight, bias, lora_weight) = shards.local_head(
        given.vocab, weight=given.weight, bias=given.bias, lora_weight=given.lora_weight
    )
    ref_weight, ref_bias = shards.local_reference(
        vocab, ref_weight=given.ref_weight, ref_bias=given.ref_bias
    )
    hidden, labels, lora_hidden, ref_hidden = shards.local_states(
        hidden=given.hidden,
        labels=given.labels,
        lora_hidden=given.lora_hidden,
        ref_hidden=given.ref_hidden,
    )
    if group is not None and vocab is not None:
        parts.check_apart(group, vocab)
    given = replace(
        given,
        hidden=hidden,
        weight=weight,
        labels=labels,
        bias=bias,
        ref_hidden=ref_hidden,
        ref_weight=ref_weight,
        ref_bias=ref_bias,
        lora_hidden=lora_hidden,
        lora_weight=lora_weight,
        vocab=vocab,
    )
    return given, facts
