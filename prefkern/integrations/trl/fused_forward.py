"""TRL's `model(..., fused_lm_head=True)`, answered by prefkern's operator.

TRL 1.16 adds a keyword to the models of its DPO, KTO, SFT, GRPO and RLOO trainers. A call with
`fused_lm_head=True` returns no logits, but a `FusedCausalLMOutput`: per-token log-probs, the
statistics that the trainer's metrics need, and their mean loss. `serve` puts a forward over TRL's
that answers these calls. Every other call (generation, evaluation with logits) goes to TRL's
forward unchanged.

TRL multiplies the backbone's hidden states by `lm_head.weight`. Here the model's own forward runs,
with the operator in place of its head (`prefkern.models.head_forward`), so that an adapter on the
head counts and a router's loss is the model's own. That forward is called directly, not through the
model: the call is inside the model's hooks and wrappers already.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from prefkern.models.heads import find_head
from prefkern.models.scoring import IGNORE_INDEX, align_labels, forward_scored
from prefkern.ops.logprobs import linear_logprobs
from prefkern.ops.outputs import TokenStats

# TRL's names of what the operator's statistics hold.
_STATISTICS = {"entropy": "entropy", "mean_logits": "mean_logit", "is_top1": "is_top1"}
_COLLISION = "log_sum_sq_probs"


@dataclass
class Served:
    """A model whose `fused_lm_head=True` calls prefkern answers, until `undo`."""

    base: Any
    before: Any  # the forward that it had
    is_active: bool = True

    def undo(self) -> None:
        """Give the calls back to TRL's forward."""
        # Something else may have wrapped the forward since: then ours lets every call through.
        self.is_active = False
        if getattr(self.base.forward, "served", None) is self:
            self.base.forward = self.before


def serve(
    model: nn.Module, outputs: tuple[str, ...], temperature: float = 1.0, **options: Any
) -> Served:
    """Have prefkern answer the `fused_lm_head=True` calls of a model.

    Args:
        model: a model that TRL has given a fused head, bare or wrapped.
        outputs: the fields of `FusedCausalLMOutput` that are computed, as in TRL.
        temperature: divides the logits.
        options: `workspace_mb` and `backend` of the operator.

    Raises ValueError for a head that cannot be read.
    """
    base, _ = find_head(model)
    served = Served(base, base.forward)
    inner = _Direct(base, served.before)
    names = [*inspect.signature(served.before).parameters]
    score = functools.partial(_score, outputs, temperature=temperature, **options)

    # `generate` reads the signature; accelerate follows `__wrapped__`, as with TRL's own forward.
    @functools.wraps(type(base).forward)
    def forward(
        self: Any,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Any = None,
        **inputs: Any,
    ) -> Any:
        direct, before, is_copy = inner, served.before, self is not base
        if is_copy:
            # A deep copy of the model has this forward too; those below it read the model's weights.
            before = type(self).forward.__get__(self)
            direct = _Direct(self, before)
        if fused_lm_head and (served.is_active or is_copy):
            inputs |= dict(zip(names, args, strict=False))
            return _answer(direct, inputs, labels, shift_labels, num_items_in_batch, score)
        given = {
            "labels": labels,
            "shift_labels": shift_labels,
            "num_items_in_batch": num_items_in_batch,
            "fused_lm_head": fused_lm_head or None,
        }
        given = {name: value for name, value in given.items() if value is not None}
        return before(*args, **given, **inputs)

    vars(forward)["served"] = served
    base.forward = MethodType(forward, base)
    return served


class _Direct(nn.Module):
    """A model whose call is its forward alone, without the hooks of a call."""

    def __init__(self, base: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.module = base
        self._forward = forward

    def forward(self, **inputs: Any) -> Any:
        return self._forward(**inputs)


def _answer(
    model: _Direct,
    inputs: Mapping[str, Any],
    labels: Tensor | None,  # (B, T), not shifted
    shift_labels: Tensor | None,  # (B, T), aligned
    num_items_in_batch: Any,
    score: Callable[..., Any],
) -> Any:
    """TRL's `FusedCausalLMOutput`, with columns (B, T - 1), or (B, T) with shift_labels."""
    from trl.trainer.utils import FusedCausalLMOutput

    if shift_labels is not None:
        aligned, columns = shift_labels, slice(None)
    else:
        assert labels is not None
        # The last position predicts nothing.
        aligned, columns = align_labels(labels), slice(-1)
    fields, returned = forward_scored(model, {**inputs, "use_cache": False}, aligned, score)
    logps, others = fields
    logps = logps[:, columns] + returned.logits.sum().to(logps.device)
    mask = (aligned[:, columns] != IGNORE_INDEX).to(logps.device)
    count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    loss = -logps.sum() / count
    router_loss = getattr(returned, "aux_loss", None)
    if router_loss is not None:
        base: Any = model.module
        config = base.config.get_text_config()
        loss = loss + getattr(config, "router_aux_loss_coef", 0.0) * router_loss
    return FusedCausalLMOutput(
        loss=loss,
        log_probs=logps,
        label_mask=mask,
        aux_loss=router_loss,
        **{name: value[:, columns] for name, value in others.items()},
    )


def _score(
    outputs: tuple[str, ...],
    hidden: Tensor,  # (B, T, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (B, T), aligned
    bias: Tensor | None,  # (V,)
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The log-probs (B, T), and TRL's statistics of the same shape by TRL's names."""
    labels = labels.to(hidden.device)
    options["ignore_index"] = IGNORE_INDEX
    with_stats = any(name in outputs for name in _STATISTICS)
    result = linear_logprobs(hidden, weight, labels, bias, return_stats=with_stats, **options)
    if not isinstance(result, TokenStats):
        return result, {}
    others = {name: getattr(result, ours) for name, ours in _STATISTICS.items() if name in outputs}
    if _COLLISION in outputs:
        others[_COLLISION] = _collision(result.logps, hidden, weight, labels, bias, **options)
    return result.logps, others


@torch.no_grad()
def _collision(logps: Tensor, *head: Any, temperature: float, **options: Any) -> Tensor:  # (B, T)
    """log sum_v p_v^2 of each token.

    With z the logits and y the label, log sum_v p_v^2 = lse(2 z) - 2 lse(z). At half the temperature
    the label's log-prob is 2 z_y - lse(2 z), so that it is 2 logp minus that one.
    """
    head = tuple(x.detach() if isinstance(x, Tensor) else x for x in head)
    sharper = linear_logprobs(*head, temperature=temperature / 2, **options)
    assert isinstance(sharper, Tensor)
    return 2 * logps - sharper
