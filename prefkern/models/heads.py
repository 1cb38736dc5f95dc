"""Reads an output head, plain or adapted by PEFT, into its tensors: weight, bias, low-rank term.

To avoid logits, prefkern never calls a head's forward. So it must know from the head's tensors what
that forward would compute. It supports three kinds of heads:

- a linear layer: `h W^T + b`;
- a layer that PEFT trains as a whole (`modules_to_save`): the adapter's copy of the layer, or the
  original layer while adapters are switched off;
- a linear layer with LoRA: `h W^T + b + s (dropout(h) A^T) B^T`, summed over all active adapters.
  PEFT's own modules compute the product with A here, [.., R]. The product with B is as wide as the
  vocabulary, so the operator adds it tile by tile.

Every other head (DoRA, quantised weights, several modules) is an error that names it: its log-probs
would be those of another model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from prefkern.ops.checks import FLOATS

ONE_PROCESS_PER_GPU = (
    "start one process per GPU with `accelerate launch` or `torchrun`, or make a single GPU visible "
    "with CUDA_VISIBLE_DEVICES"
)
_LEAVE_OUT = "its log-probs would ignore that; leave the head out of the adapter, or use LoRA there"


def unwrap(model: Any) -> Any:
    """The Hugging Face model inside DDP, FSDP, DeepSpeed, torch.compile and PEFT wrappers.

    Raises TypeError for nn.DataParallel.
    """
    while True:
        if isinstance(model, nn.DataParallel):
            raise TypeError(
                "nn.DataParallel is not supported, since its replicas share one Python head: "
                f"{ONE_PROCESS_PER_GPU}"
            )
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif not hasattr(type(model), "get_output_embeddings") and hasattr(model, "module"):
            # The class is asked: DeepSpeed's engine answers for the model that it holds.
            model = model.module
        else:
            return model


def find_head(model: nn.Module, with_encoder: bool = False) -> tuple[Any, Any]:
    """The unwrapped model and its output head, a linear layer or one that PEFT adapts.

    Raises ValueError if there is no head, if `prefkern.models.heads` cannot read it, and for an
    encoder-decoder unless `with_encoder`.
    """
    base = unwrap(model)
    get_head = getattr(base, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    if head is None:
        raise ValueError(
            f"{type(base).__name__} has no output head (get_output_embeddings() returns none); "
            "a Hugging Face causal LM is needed"
        )
    if getattr(base.config, "is_encoder_decoder", False) and not with_encoder:
        raise ValueError(f"{type(base).__name__} is an encoder-decoder; a causal LM is needed")
    wrong = problem(head)
    if wrong:
        raise ValueError(f"the output head of {type(base).__name__} is {wrong}")
    return base, head


@dataclass(frozen=True)
class HeadInputs:
    """The hidden states that a model's output head was called with, and the head's own tensors."""

    hidden: Tensor  # (B, T, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    lora_hidden: Tensor | None = None  # (B, T, R), scaling * lora_A(hidden)
    lora_weight: Tensor | None = None  # (V, R), lora_B

    def of_tokens(self, labels: Tensor, is_packed: bool = False) -> HeadInputs:  # labels (B, T)
        """The same for real tokens only: prompt-learning adapters put virtual tokens before them.

        A packed batch is one row; its hidden states become (T, H).
        Raises ValueError if there are fewer positions than labels.
        """
        positions, length = self.hidden.shape[1], labels.shape[1]
        if positions < length:
            raise ValueError(
                f"the head received {positions} positions for {length} tokens; "
                "do not pass logits_to_keep"
            )

        def real(states: Tensor) -> Tensor:
            states = states[:, -length:]
            return states[0] if is_packed else states

        lora_hidden = None if self.lora_hidden is None else real(self.lora_hidden)
        return replace(self, hidden=real(self.hidden), lora_hidden=lora_hidden)

    def of_vocab(self, count: int | None) -> HeadInputs:
        """The same for the first `count` vocabulary entries: some models drop padding rows."""
        if count is None:
            return self
        bias = None if self.bias is None else self.bias[:count]
        lora_weight = None if self.lora_weight is None else self.lora_weight[:count]
        return replace(self, weight=self.weight[:count], bias=bias, lora_weight=lora_weight)

    def adapter(self) -> dict[str, Any]:
        """Keyword arguments for the operator and the loss; empty if there is no adapter."""
        if self.lora_hidden is None or self.lora_weight is None:
            return {}
        return {"lora_hidden": self.lora_hidden, "lora_weight": self.lora_weight}


def read(head: nn.Module, hidden: Tensor) -> HeadInputs:
    """The tensors that a head, in its present state, would multiply hidden states [B, T, H] by.

    They are differentiable in all parameters that the head's own forward is differentiable in.
    """
    layer = _layer(head)
    base, names = _lora(layer)
    weight, bias = base.weight, getattr(base, "bias", None)
    if not names:
        return HeadInputs(hidden, weight, bias)
    states, weights = [], []
    for name in names:
        a, b = layer.lora_A[name], layer.lora_B[name]
        x = layer._cast_input_dtype(hidden, a.weight.dtype)
        states.append(a(layer.lora_dropout[name](x)) * layer.scaling[name])
        weights.append(b.weight)
        if b.bias is not None:
            # Added in the wider dtype of the two, then rounded to the head's.
            added = b.bias * layer.scaling[name]
            bias = (added if bias is None else bias + added).to(weight.dtype)
    return HeadInputs(hidden, weight, bias, torch.cat(states, -1), torch.cat(weights, -1))


def reading(head: nn.Module) -> tuple[Any, ...]:
    """A key for what `read` depends on apart from values; heads with equal keys are read alike."""
    layer = _layer(head)
    return type(layer).__name__, layer is not head, *_lora(layer)[1]


def has_low_rank_term(head: nn.Module) -> bool:
    """Whether LoRA adds a term to this head, now or with another adapter in use."""
    return hasattr(_layer(head), "base_layer")


def problem(head: nn.Module) -> str | None:
    """Why a head cannot be read, and what to do about it; None if it can be read."""
    layer = _layer(head)
    kind = type(layer).__name__
    if hasattr(layer, "token_adapter"):
        return f"trained at single tokens by PEFT ({kind}): {_LEAVE_OUT}"
    if hasattr(layer, "base_layer"):
        factors = [getattr(layer, name, None) for name in ("lora_A", "lora_B")]
        # AdaLoRA keeps its factors as parameters, with a third one between them.
        if not all(isinstance(factor, nn.ModuleDict) for factor in factors):
            return f"wrapped in a PEFT adapter other than LoRA ({kind}): {_LEAVE_OUT}"
        variants = sorted(getattr(layer, "lora_variant", {}))
        if variants:
            variant = type(layer.lora_variant[variants[0]]).__name__
            return f"under a variant of LoRA ({variant}, adapter {variants[0]!r}): {_LEAVE_OUT}"
        layer = layer.base_layer
        kind = type(layer).__name__
    if any(True for _ in layer.children()):
        return f"a {kind} with modules inside, but a linear layer is needed"
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):
        return f"a {kind} without a weight, but a linear layer is needed"
    if weight.dtype not in FLOATS:
        return (
            f"a {kind} with a weight of {weight.dtype}, probably quantised: leave the head out of "
            "quantisation"
        )
    # No check of the shape: outside the forward FSDP flattens weights. The operator checks it
    # later.
    return None


def _layer(head: Any) -> Any:
    """The layer in use: the head itself, or PEFT's copy of it (`modules_to_save`)."""
    if not hasattr(head, "modules_to_save") or not hasattr(head, "original_module"):
        return head
    active = head.active_adapters
    if head.disable_adapters or not active or active[0] not in head.modules_to_save:
        return head.original_module
    return head.modules_to_save[active[0]]


def _lora(layer: Any) -> tuple[Any, list[str]]:
    """The linear layer itself, and the names of the adapters that are active on it."""
    if not hasattr(layer, "base_layer"):
        return layer, []
    # PEFT's own forward undoes a merge when adapters are switched off.
    if layer.merged and layer.disable_adapters:
        layer.unmerge()
    if layer.merged or layer.disable_adapters:
        return layer.base_layer, []
    return layer.base_layer, [name for name in layer.active_adapters if name in layer.lora_A]
