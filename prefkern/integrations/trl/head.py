"""TRL's own trainers on prefkern's operator: `fuse_head`.

DPO, KTO, SFT, GRPO and RLOO ask their models for log-probs in place of logits; `fused_forward`
answers. This file also does CPO, SimPO and ORPO, which ask for logits.

Those trainers hold `[2B, T, V]` logits. They read three things from them: the log-probs of the
labels, an NLL and, for a metric, the mean of the logits. `fuse_head` replaces one trainer's
`concatenated_forward`. The replacement computes these numbers from hidden states and head in tiles;
losses, metrics and everything else stay TRL's code. Instead of logits it returns `[B, T, 1]` means
over the vocabulary, so that TRL's mean of them is the mean of the logits.

TRL's metric also covers padding and prompts, for which nothing else is computed. Without a softcap
the mean logit of a position is `hidden . mean(weight) + mean(bias)`, at almost no cost. With a
softcap it needs an extra pass over all positions.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prefkern.integrations.trl.asking import (
    ASKING,
    AsksForLogProbs,
    accepting_adapted_heads,
    check_version,
    restore,
)
from prefkern.models.heads import ONE_PROCESS_PER_GPU, find_head
from prefkern.models.scoring import IGNORE_INDEX, align_labels, forward_scored
from prefkern.models.transform import DECODER_IDS
from prefkern.ops import plain
from prefkern.ops.logprobs import linear_logprobs
from prefkern.ops.outputs import TokenStats

_FORWARD = "concatenated_forward"
# The methods that make or read logits: a subclass must not override them.
_READERS = (_FORWARD, "get_batch_loss_metrics", "get_batch_logps")


def fuse_head(
    trainer: Any, *, workspace_mb: float | None = None, backend: str | None = None
) -> Any:
    """Put prefkern's operator under one of TRL's own trainers.

    It takes the `DPOTrainer`, `KTOTrainer`, `SFTTrainer`, `GRPOTrainer` and `RLOOTrainer` of TRL
    1.16, whose models compute log-probs in tiles already, and the `CPOTrainer` (SimPO included) and
    `ORPOTrainer` of `trl.experimental`, from which it removes the logits. Losses, metrics and
    gradients stay the same to float32 accuracy. Only this trainer changes. A second call only
    changes the options. `restore_head` undoes it.

    `fuse_head(SFTTrainer)` returns a constructor: `fuse_head(SFTTrainer)(model, ...)` makes the
    trainer and fuses it. It also takes LoRA on the output head, which TRL's constructors refuse.

    Args:
        trainer: one of these trainers, or its class; a subclass of your own too.
        workspace_mb, backend: as in `prefkern.linear_logprobs`.

    Returns:
        The trainer; for a class, its constructor.

    Raises TypeError for another trainer, ImportError for a version of TRL whose trainers work
    differently, and ValueError for a setup that cannot run without logits: a head that cannot be
    read, an encoder-decoder that adds a bias after its head (BART; T5 does not), torch_compile,
    nn.DataParallel, an option of the trainer that reads more than the operator gives, or a subclass
    that overrides a method which reads logits.
    """
    known = _known(trainer)
    if workspace_mb is not None:
        plain.positive("workspace_mb", workspace_mb)
    if backend is not None and backend not in plain.BACKENDS:
        raise ValueError(f"backend must be None or one of {plain.BACKENDS}, got {backend!r}")
    options = {"workspace_mb": workspace_mb, "backend": backend}
    if isinstance(trainer, type):
        return functools.partial(_build, trainer, known, options)
    _check_trainer(trainer)
    if isinstance(known, AsksForLogProbs):
        known.fuse(trainer, options)
    else:
        _check_holder(trainer)
        setattr(trainer, _FORWARD, known(trainer, workspace_mb, backend))
    return trainer


def restore_head(trainer: Any) -> Any:
    """Undo `fuse_head`; any other trainer stays unchanged. Returns the trainer."""
    restore(trainer)
    if isinstance(vars(trainer).get(_FORWARD), _FusedForward):
        delattr(trainer, _FORWARD)
    return trainer


def _build(kind: type, known: Any, options: dict[str, Any], /, *args: Any, **keywords: Any) -> Any:
    """Make a trainer of this class, and fuse it."""
    if not isinstance(known, AsksForLogProbs):
        return fuse_head(kind(*args, **keywords), **options)
    with accepting_adapted_heads(known.module):
        trainer = kind(*args, **keywords)
    known.check_adapted_head(trainer)
    return fuse_head(trainer, **options)


@dataclass(frozen=True)
class _FusedForward:
    """Replaces a trainer's `concatenated_forward`, with TRL's arguments and results."""

    trainer: Any
    workspace_mb: float | None
    backend: str | None

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Any, ...]:
        raise NotImplementedError(f"{type(self).__name__} does not define __call__(model, batch)")

    def rows(self, batch: dict[str, Any], padding_value: int) -> dict[str, Tensor]:
        """TRL's rows of a batch: chosen, then rejected."""
        return self.trainer.concatenated_inputs(
            batch,
            is_encoder_decoder=self.trainer.is_encoder_decoder,
            padding_value=padding_value,
            device=self.trainer.accelerator.device,
        )

    def labels(self, rows: dict[str, Tensor]) -> Tensor:  # (2B, T)
        """The responses' labels, aligned; those of a decoder are so already."""
        labels = rows["concatenated_labels"]
        return labels if self.trainer.is_encoder_decoder else align_labels(labels)

    def tokens(
        self,
        model: nn.Module,
        rows: dict[str, Tensor],
        labels: Tensor,  # (2B, T), aligned
    ) -> _Tokens:
        def score(*head: Any, **how: Any) -> tuple[Tensor, Tensor]:
            how |= {"workspace_mb": self.workspace_mb, "backend": self.backend}
            logps = linear_logprobs(*head, ignore_index=IGNORE_INDEX, **how)
            assert isinstance(logps, Tensor)
            return logps, _mean_logits(*head, **how)

        inputs: dict[str, Any] = {
            "input_ids": rows["concatenated_input_ids"],
            "attention_mask": rows["concatenated_attention_mask"],
        }
        if self.trainer.is_encoder_decoder:
            inputs[DECODER_IDS] = self.trainer._shift_right(rows["concatenated_labels"])
        if self.trainer.aux_loss_enabled:
            inputs["output_router_logits"] = True
        (logps, means), returned = forward_scored(model, inputs, labels, score)
        router_loss = getattr(returned, "aux_loss", None)
        return _Tokens(logps + returned.logits.sum(), means, router_loss)

    def results(
        self, logps: Tensor, means: Tensor, nll: Tensor, tokens: _Tokens
    ) -> tuple[Any, ...]:
        """TRL's result tuple: (2B,) log-probs and (2B, T) means, each split into halves."""
        returned = (*logps.chunk(2), *means.unsqueeze(-1).chunk(2), nll)
        return (*returned, tokens.router_loss) if self.trainer.aux_loss_enabled else returned


@dataclass(frozen=True)
class _Tokens:
    logps: Tensor  # (2B, T), 0 where not scored
    mean_logits: Tensor  # (2B, T)
    router_loss: Tensor | None


@torch.no_grad()
def _mean_logits(
    hidden: Tensor,  # (2B, T, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (2B, T)
    bias: Tensor | None,  # (V,)
    *,
    logit_scale: float,
    softcap: float | None,
    lora_hidden: Tensor | None = None,
    lora_weight: Tensor | None = None,
    **options: Any,
) -> Tensor:  # (2B, T)
    """The mean logit of each position over the vocabulary."""
    if softcap is not None:
        stats = linear_logprobs(
            hidden.detach(),
            weight.detach(),
            torch.zeros_like(labels),
            bias,
            logit_scale=logit_scale,
            softcap=softcap,
            lora_hidden=lora_hidden,
            lora_weight=lora_weight,
            return_stats=True,
            **options,
        )
        assert isinstance(stats, TokenStats)
        return stats.mean_logit
    # mean_v (h . W_v + b_v) = h . mean_v W_v + mean_v b_v
    means = hidden.float() @ weight.mean(0, dtype=torch.float32)
    if lora_hidden is not None and lora_weight is not None:
        means = means + lora_hidden.float() @ lora_weight.mean(0, dtype=torch.float32)
    if bias is not None:
        means = means + bias.mean(dtype=torch.float32)
    return logit_scale * means


class _CPOForward(_FusedForward):
    """CPO and SimPO: the NLL is over the chosen responses, which are scored in any case."""

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Any, ...]:
        rows = self.rows(batch, self.trainer.pad_token_id)
        labels = self.labels(rows)
        tokens = self.tokens(model, rows, labels)
        lengths = (labels != IGNORE_INDEX).sum(1)
        sums = tokens.logps.sum(1)
        nll = torch.zeros((), device=sums.device)
        if self.trainer.cpo_alpha != 0:
            nll = -sums.chunk(2)[0].sum() / lengths.chunk(2)[0].sum()
        is_mean = self.trainer.loss_type in ("ipo", "simpo")
        logps = sums / lengths if is_mean else sums
        return self.results(logps, tokens.mean_logits, nll, tokens)


class _ORPOForward(_FusedForward):
    """ORPO: the NLL is over the whole chosen rows, with the prompts unless an encoder reads them."""

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Any, ...]:
        rows = self.rows(batch, self.trainer.padding_value)
        responses = full = self.labels(rows)
        with_encoder = self.trainer.is_encoder_decoder
        if not with_encoder:
            is_token = rows["concatenated_attention_mask"] == 1
            full = align_labels(rows["concatenated_input_ids"].masked_fill(~is_token, IGNORE_INDEX))
        chosen, rejected = responses.chunk(2)
        chosen_full = full.chunk(2)[0]
        in_response, in_full = chosen != IGNORE_INDEX, chosen_full != IGNORE_INDEX
        both = torch.where(in_full, chosen_full, chosen)
        if bool((in_response & (both != chosen)).any()):
            raise ValueError(
                "chosen_labels and chosen_input_ids differ, and both are scored: ORPO's two terms "
                "cannot share a pass then; restore_head(trainer) undoes fuse_head"
            )
        tokens = self.tokens(model, rows, torch.cat([both, rejected]))
        scored = responses != IGNORE_INDEX
        logps = (tokens.logps * scored).sum(1) / scored.sum(1)
        nll = -(tokens.logps.chunk(2)[0] * in_full).sum() / in_full.sum()
        # TRL leaves the last position out of the mean, because it predicts nothing.
        means = tokens.mean_logits if with_encoder else tokens.mean_logits[:, :-1]
        return self.results(logps, means, nll, tokens)


def _known(trainer: Any) -> AsksForLogProbs | type[_FusedForward]:
    """How a trainer, or a class of trainers, is fused."""
    kind = trainer if isinstance(trainer, type) else type(trainer)
    trls = next((each for each in kind.__mro__ if each.__module__.startswith("trl.")), None)
    own = next((each for each in kind.__mro__ if each.__module__.startswith("prefkern.")), None)
    if own is not None:
        raise TypeError(
            f"fuse_head takes TRL's own trainers; prefkern's {own.__name__} needs no call: its "
            "operator is inside"
        )
    name = "" if trls is None else f"{trls.__module__}.{trls.__name__}"
    if name in ASKING:
        check_version()
        return ASKING[name]
    if trls is None or name not in _FORWARDS:
        raise TypeError(
            f"fuse_head takes TRL's {', '.join(_names())}, or a subclass of your own; got "
            f"{kind.__name__ if trls is None else f'{trls.__name__} ({trls.__module__})'}"
        )
    for reader in _READERS:
        if getattr(kind, reader) is not getattr(trls, reader):
            raise ValueError(
                f"{kind.__name__} overrides {reader}, which may read logits; fuse_head supports "
                f"only the {reader} of {trls.__name__}"
            )
    return _FORWARDS[name]


_FORWARDS: dict[str, type[_FusedForward]] = {
    "trl.experimental.cpo.cpo_trainer.CPOTrainer": _CPOForward,
    "trl.experimental.orpo.orpo_trainer.ORPOTrainer": _ORPOForward,
}


def _names() -> list[str]:
    return [name.rsplit(".", 1)[1] for name in (*ASKING, *_FORWARDS)]


def _check_trainer(trainer: Any) -> None:
    if trainer.args.n_gpu > 1:
        raise ValueError(f"nn.DataParallel is not supported: {ONE_PROCESS_PER_GPU}")
    if trainer.args.torch_compile:
        raise ValueError("args.torch_compile is not supported yet")


def _check_holder(trainer: Any) -> None:
    """Raise ValueError for a trainer whose logits `_FusedForward` cannot replace."""
    replaced = vars(trainer).get(_FORWARD)
    if replaced is not None and not isinstance(replaced, _FusedForward):
        raise ValueError(f"the trainer's {_FORWARD} was replaced by {replaced!r} already")
    # BART and others add a bias of the whole vocabulary after their head.
    if (
        getattr(find_head(trainer.model, with_encoder=True)[0], "final_logits_bias", None)
        is not None
    ):
        raise ValueError(
            f"{type(trainer.model).__name__} adds final_logits_bias to its logits, which fuse_head "
            "does not make; of encoder-decoders T5 and its kin are supported"
        )
