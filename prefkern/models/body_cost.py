"""What a model's body computes and keeps for each token, from its config alone.

The body is everything before the output head. It runs forward and backward on the meta device,
where tensors have shapes but no bytes, so a model of any size is counted in seconds. Outside of
attention both counts are proportional to tokens (this is checked):

    products    operations of the matrix products, 2mkn for an [m, k] and a [k, n] matrix
    kept        bytes that autograd keeps between forward and backward

Attention is not run there, but noted: heads, widths and windows of each layer. It is computed as
sdpa does, in two products forward and five backward (fused kernels compute the first one again).
Causal attention of a sequence that sees only itself skips half of the pairs of query and key. With
a mask nothing is skipped, keys and values are repeated for each head of their group, and each layer
keeps the mask in the model's dtype. A mask is needed for padding, for a prefix, and for sequences
that are at least as long as the layer's window. A family that always makes a mask (Doge), and one
whose keys and values differ in width where no fused kernel takes them (latent attention on a CPU),
multiplies more pairs than counted.

In a padded batch each sequence is as long as the longest. In a packed one a sequence attends by
paths (`prefkern.models.paths`): after attention the outputs are copied into one row, and a sequence
with a prefix gets a copy of the prefix's keys and values. On a GPU one kernel computes all paths of
a row (`prefkern.models.varlen`): it multiplies fewer pairs than are counted here, and keeps no masks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy
import torch
import torch.utils.flop_counter
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from prefkern.models.adapters import disable_dropout
from prefkern.models.calls import replaced_forward, without_cache
from prefkern.models.heads import find_head

_NAME = "prefkern_counted"
_LENGTH = 64


@dataclass(frozen=True)
class Sequences:
    """The sequences of a batch, as the body computes them.

    Args:
        lengths: (S,) tokens that are computed of each; of a padded batch with the padding.
        prefixes: (S,) tokens of the row before them that each also sees.
        is_padded: whether they are rows of one tensor; else they are end to end in one row.
        has_padding: whether some of the tokens are padding.
    """

    lengths: numpy.ndarray
    prefixes: numpy.ndarray
    is_padded: bool
    has_padding: bool = False

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    def needs_mask(self, window: int | None) -> numpy.ndarray:  # (S,)
        paths = self.lengths + self.prefixes
        too_long = numpy.zeros(len(paths), bool) if window is None else paths >= window
        return (self.prefixes > 0) | too_long | self.has_padding


@dataclass(frozen=True)
class AttentionLayer:
    heads: int
    groups: int  # query heads for each head of keys and values
    key_width: int
    value_width: int
    window: int | None

    def pairs(self, sequences: Sequences) -> int:
        """The pairs of a query and a key that are multiplied."""
        n, before = sequences.lengths, sequences.prefixes
        masked = sequences.needs_mask(self.window)
        return int(numpy.where(masked, n * (before + n), n * (n + 1) // 2).sum())

    def operations(self, pairs: int) -> tuple[int, int]:
        """Of forward and of backward."""
        key, value = (
            2 * self.heads * width * pairs for width in (self.key_width, self.value_width)
        )
        return key + value, 3 * key + 2 * value

    def kept(self, sequences: Sequences, itemsize: int) -> int:
        """Bytes beyond those of queries, keys, values and outputs that have no copies."""
        n, before = sequences.lengths, sequences.prefixes
        masked = sequences.needs_mask(self.window)
        keys_and_values = (self.key_width + self.value_width) * self.heads * itemsize
        masks = int((masked * n * (before + n)).sum()) * itemsize
        if sequences.is_padded:
            repeated = keys_and_values - keys_and_values // self.groups
            return masks + int((masked * n).sum()) * repeated
        outputs = sequences.tokens * self.heads * self.value_width * itemsize
        # Of one sequence's keys a view is enough, unless they are repeated or follow on a prefix.
        is_copied = masked & ((before > 0) | (self.groups > 1))
        return masks + outputs + int((is_copied * (before + n)).sum()) * keys_and_values


@dataclass(frozen=True)
class Cost:
    """Of one batch.

    Bytes are those that forward keeps; under checkpointing, also those of one layer that backward
    computes again.
    """

    forward: int  # operations
    backward: int
    recomputed: int  # in backward, under gradient checkpointing
    kept: int  # bytes
    kept_checkpointed: int


@dataclass(frozen=True)
class BodyCost:
    """Of one token, outside of attention; and the attention layers."""

    forward: float
    backward: float
    recomputed: float
    kept: float
    kept_checkpointed: float
    layers: int
    attention: tuple[AttentionLayer, ...]
    itemsize: int

    def of(self, sequences: Sequences) -> Cost:
        """The cost of a batch."""
        tokens = sequences.tokens
        forward, backward, extra = 0, 0, 0
        for layer in self.attention:
            ahead, back = layer.operations(layer.pairs(sequences))
            forward, backward = forward + ahead, backward + back
            extra += layer.kept(sequences, self.itemsize)
        kept = self.kept * tokens + extra
        # Layers that are computed again read the model's own masks, of one byte an entry.
        paths = sequences.lengths + sequences.prefixes
        masks = int((sequences.needs_mask(None) * sequences.lengths * paths).sum())
        return Cost(
            forward=round(self.forward * tokens) + forward,
            backward=round(self.backward * tokens) + backward,
            recomputed=round(self.recomputed * tokens) + forward,
            kept=round(kept),
            kept_checkpointed=round(self.kept_checkpointed * tokens + kept / self.layers) + masks,
        )


def body_cost(model: Any, dtype: torch.dtype, *, trains_weights: bool = True) -> BodyCost:
    """Count a model's body.

    Args:
        model: a Hugging Face causal LM on the meta device with sdpa attention. It is of no other
            use afterwards.
        dtype: of weights and activations.
        trains_weights: False if the body's own weights are frozen, as with LoRA. Adapters' own
            products and states, of the width of their rank, are not counted.

    Raises ValueError for a model that cannot be counted.
    """
    base, head = find_head(model)
    kind = type(base).__name__
    implementation = str(getattr(base.config.get_text_config(), "_attn_implementation", None))
    if implementation != "sdpa":
        raise ValueError(
            f"the body of {kind} cannot be counted: its attention is {implementation!r}, and only "
            "sdpa is counted"
        )
    AttentionInterface.register(_NAME, _noted)
    model.to(dtype).train()
    disable_dropout(model)
    try:
        model.set_attn_implementation(_NAME)
        if not trains_weights:
            for parameter in model.parameters():
                # An adapter's matrix has the input of the one beside it. Norms have no adapter.
                parameter.requires_grad_(parameter.ndim > 1)
        plain = _Run(base, head, _LENGTH)
        twice = _Run(base, head, 2 * _LENGTH)
        # The newer name, from transformers 5.2x on.
        name = "activation_checkpointing_enable"
        enable = getattr(model, name, None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        checkpointed = _Run(base, head, _LENGTH)
        trained = plain
        if not trains_weights:
            # In evaluation mode nothing is checkpointed.
            model.eval().requires_grad_(False)
            model.enable_input_require_grads()
            trained = _Run(base, head, _LENGTH)
    # Each kind of layer has its own error for tensors without bytes.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"the body of {kind} cannot be counted in {str(dtype).removeprefix('torch.')}: without "
            f"weights it raises {type(error).__name__}: {reason}"
        ) from error
    if not plain.layers or twice.forward != 2 * plain.forward:
        raise ValueError(
            f"the body of {kind} cannot be counted: not all of its attention goes through "
            "transformers' table of attention functions"
        )
    # Backward computes a layer again until it has what it needs. That leaves out a last product of
    # the weights, but not one beside an adapter, which comes later.
    recomputed = checkpointed.backward - plain.backward if trains_weights else plain.forward
    blocks = sum(isinstance(each, GradientCheckpointingLayer) for each in base.modules())
    return BodyCost(
        forward=plain.forward / _LENGTH,
        backward=trained.backward / _LENGTH,
        recomputed=recomputed / _LENGTH,
        kept=plain.kept / _LENGTH,
        kept_checkpointed=checkpointed.kept / _LENGTH,
        layers=max(blocks, 1),
        attention=tuple(plain.layers),
        itemsize=dtype.itemsize,
    )


class _Run:
    """Counts of one forward and backward of a row."""

    def __init__(self, base: Any, head: nn.Module, length: int) -> None:
        ids = torch.zeros(1, length, dtype=torch.int64, device="meta")
        # Without a mask, GPT-2 looks for padding among the ids.
        inputs = without_cache(base, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        with (
            replaced_forward(head, _end),
            _products() as forward,
            _notes() as self.layers,
            _kept(base) as kept,
        ):
            output = base(**inputs)
        self.forward = forward.get_total_flops()
        self.kept = sum(storage.nbytes() for storage in kept)
        with _products() as backward:
            output.logits.sum().backward()
        self.backward = backward.get_total_flops()


def _end(hidden: Tensor) -> Tensor:
    """In place of the head: the end of the graph, which keeps nothing."""
    return hidden.sum(-1, keepdim=True)


class _Attention(torch.autograd.Function):
    """Keeps what a fused kernel keeps, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, length, _ = query.shape
        output = query.new_empty(batch, length, heads, value.shape[-1])
        sums = query.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, sums)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return tuple(torch.empty_like(each) for each in ctx.saved_tensors[:3])


_layers: list[AttentionLayer] | None = None


@contextmanager
def _notes() -> Iterator[list[AttentionLayer]]:
    """The attention layers that run within the context."""
    global _layers
    _layers = found = []
    try:
        yield found
    finally:
        _layers = None


def _noted(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    if _layers is not None:
        heads, groups = query.shape[1], query.shape[1] // key.shape[1]
        widths = query.shape[-1], value.shape[-1]
        _layers.append(AttentionLayer(heads, groups, *widths, kwargs.get("sliding_window")))
    return _Attention.apply(query, key, value), None  # pyright: ignore[reportReturnType]


@contextmanager
def _kept(base: nn.Module) -> Iterator[list[Any]]:
    """The storages that autograd keeps of what runs within the context, without the weights."""
    tensors = [*base.parameters(), *base.buffers()]
    own = {tensor.untyped_storage()._cdata for tensor in tensors}
    storages: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage
        return tensor

    found: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield found
    found += storages.values()


def _products() -> torch.utils.flop_counter.FlopCounterMode:
    # Experts' products: each row of the first matrix meets one of the second ones.
    grouped = getattr(torch.ops.aten, "_grouped_mm", None)
    formulas = {} if grouped is None else {grouped: _grouped_operations}
    return torch.utils.flop_counter.FlopCounterMode(display=False, custom_mapping=formulas)


def _grouped_operations(left: Any, right: Any, *_: Any, **__: Any) -> int:
    """From the shapes of the two factors."""
    return 2 * int(numpy.prod(left)) * right[-1]
