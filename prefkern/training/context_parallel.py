"""The part of PreferenceTrainer that cuts sequences over ranks: Accelerate's context parallelism.

With `ParallelismConfig(cp_size=N)`, which Accelerate takes beside FSDP2, N ranks have the same batch,
and each computes some tokens of every row. Attention is left to torch: its `context_parallel` cuts
the rows, in an order that balances causal attention, and makes of
`scaled_dot_product_attention` a ring in which keys and values go round.

    labels      shifted on whole rows, then cut: a part's last token predicts another part's first
    mask        none: rows are padded on the right, so that no scored token sees padding
    loss        a pair's sums are of all N ranks (`FusedPreferenceLoss(sequence_group=...)`), and each
                rank has the gradient of its own tokens. FSDP2 takes the mean over all ranks, so that
                a rank's loss counts N times; it is logged once
    metrics     of whole pairs, equal on the N ranks, and counted once; of tokens, summed over them

The reference goes through the same parts, whatever it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from prefkern.loss.outputs import PreferenceOutput, UnpairedOutput
from prefkern.models.heads import unwrap
from prefkern.models.scoring import IGNORE_INDEX, MISMATCHED, align_labels
from prefkern.models.transform import head_transform
from prefkern.training.launched import launched_parallelism
from prefkern.training.metrics import NUM_TOKENS, OF_TOKENS, token_count
from prefkern.training.objective_trainer import add_to
from prefkern.training.sharding import mode_of
from prefkern.training.sharing import ranks_a_batch
from prefkern.training.token_trainer import TokenBatchTrainer

_ROWS = ("input_ids", "attention_mask", "labels")
_OF_PAIRS = ("ref_logps", "reward_margins", "desirable")
_INSTEAD = "leave cp_size out, and use FSDP2 alone"


def size_of_launch(args: Any) -> int:
    """The ranks that a sequence is cut over, by a run's arguments or its launcher."""
    return getattr(launched_parallelism(args), "cp_size", 1)


def check_context_parallel(args: Any) -> None:
    """Raise ValueError for what context parallelism does not do here. Call it before models are loaded."""
    size = size_of_launch(args)
    if size == 1:
        return
    given = f"context parallelism (cp_size={size})"
    mode = mode_of(args)
    if mode != "FSDP2":
        raise ValueError(
            f"{given} needs FSDP2, and this run has {mode or 'no sharding'}: set fsdp=True and "
            "fsdp_config={'version': 2}, or accelerate launch --use_fsdp --fsdp_version 2"
        )
    tensor_size = getattr(launched_parallelism(args), "tp_size", 1)
    if tensor_size > 1:
        raise ValueError(
            f"{given} is not supported together with tensor parallelism (tp_size={tensor_size}): "
            "leave one of them out"
        )
    if not args.disable_dropout:
        raise ValueError(
            f"dropout is not supported under {given}, in whose ring each part of attention would draw "
            "for itself: set disable_dropout"
        )
    for name in (
        "padding_free",
        "share_prompt",
        "ld_alpha",
        "use_liger_kernel",
        "neftune_noise_alpha",
    ):
        value = getattr(args, name)
        if value not in (None, False):
            raise ValueError(f"{name}={value} is not supported under {given}: leave it out")


def check_cut_model(model: Any, size: int, router_coefficient: float, whose: str = "model") -> None:
    """Raise ValueError for a model whose attention does not reach other ranks' tokens."""
    base = unwrap(model)
    config = base.config.get_text_config()
    given = f"context parallelism (cp_size={size})"
    attention = getattr(base.config, "_attn_implementation", None)
    if attention != "sdpa":
        raise ValueError(
            f"{given} is torch's, of scaled_dot_product_attention, and the {whose} has "
            f"attn_implementation={attention!r}: load it with attn_implementation='sdpa'"
        )
    layers = sorted({*(getattr(config, "layer_types", None) or ())} - {"full_attention"})
    if not getattr(config, "layer_types", None) and getattr(config, "sliding_window", None):
        layers = ["sliding_attention"]
    is_known = any(name.endswith("self_attn") for name, _ in base.named_modules())
    takes_positions = "position_ids" in inspect.signature(base.forward).parameters
    if layers or not is_known or not takes_positions or getattr(base, "_is_stateful", False):
        found = f"layers of {', '.join(layers)}" if layers else "other layers"
        raise ValueError(
            f"{given} has full causal attention alone, in layers that transformers names self_attn, "
            f"and the {whose} ({type(base).__name__}) has {found}: {_INSTEAD}"
        )
    if router_coefficient:
        raise ValueError(
            f"{given} does not support the load-balancing loss of a mixture of experts "
            f"(router_aux_loss_coef={router_coefficient}), of which a rank sees its own tokens "
            "alone: set router_aux_loss_coef=0"
        )


def cut_rows(batch: Mapping[str, Any], size: int) -> tuple[dict[str, Any], list[Tensor]]:
    """A batch of whole rows as a model under context parallelism takes it, and what is to be cut.

    All rows get one length that 2 x size divides, those of KTO's mismatched pairs too: torch takes
    the order of the first for all. Labels are shifted (`shift_labels`), and the mask is of ones,
    which transformers leaves out.

    Raises ValueError for a batch that is not padded on the right, or has other entries.
    """
    prefixes = [prefix for prefix in ("", MISMATCHED) if f"{prefix}input_ids" in batch]
    known = {*_OF_PAIRS, *(prefix + name for prefix in prefixes for name in _ROWS)}
    others = sorted(batch.keys() - known)
    if others:
        raise ValueError(
            f"a batch has {', '.join(others)}, which context parallelism does not know how to cut: "
            "leave cp_size out"
        )
    longest = max(batch[f"{prefix}input_ids"].shape[1] for prefix in prefixes)
    length = longest + -longest % (2 * size)
    whole = {name: batch[name] for name in _OF_PAIRS if name in batch}
    cut = []
    for prefix in prefixes:
        ids, mask, labels = (batch[prefix + name] for name in _ROWS)
        if (mask[:, 1:] > mask[:, :-1]).any():
            raise ValueError(
                "a batch is padded on the left, and context parallelism computes attention without "
                "a mask: pad it on the right"
            )
        # Nobody sees the padding, so it may have the last position again: tables of positions end.
        positions = torch.arange(length, device=ids.device).clamp(max=longest - 1)
        rows = {
            "input_ids": _padded(ids, length, 0),
            "shift_labels": _padded(align_labels(labels), length, IGNORE_INDEX),
            "attention_mask": mask.new_ones(len(ids), length),
            "position_ids": positions.repeat(len(ids), 1),
        }
        whole |= {prefix + name: value for name, value in rows.items()}
        # Of no rows there is nothing to cut.
        cut += [*rows.values()] if len(ids) else []
    return whole, cut


def _padded(rows: Tensor, length: int, fill: int) -> Tensor:  # (S, T) -> (S, length), a copy
    whole = rows.new_full((len(rows), length), fill)
    whole[:, : rows.shape[1]] = rows
    return whole


class ContextParallelTrainer(TokenBatchTrainer):
    """TokenBatchTrainer whose rows may be cut over ranks."""

    ref_model: Any
    _router_loss: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        size = size_of_launch(kwargs["args"])
        if size > 1:
            coefficient = self._router_loss.coefficient
            check_cut_model(kwargs["model"], size, coefficient)
            if self.ref_model is not None:
                check_cut_model(self.ref_model, size, 0.0, "reference")
        super().__init__(*args, **kwargs)
        if size > 1:
            self.loss_fn.sequence_group = self._sum_fn.sequence_group = self._cp_mesh.get_group()

    @property
    def _cp_size(self) -> int:
        given: Any = self.accelerator.parallelism_config
        return 1 if given is None else given.cp_size

    @property
    def _cp_mesh(self) -> Any:
        mesh: Any = self.accelerator.torch_device_mesh
        return mesh["cp"]

    @contextmanager
    def _cut(self, batch: dict[str, Any], *models: Any) -> Iterator[dict[str, Any]]:
        """This rank's part of a batch's rows, within which attention reaches the other ranks.

        A backward belongs inside. The models' heads are looked at before, on whole rows.
        """
        if self._cp_size == 1:
            yield batch
            return
        from torch.distributed.tensor.experimental import context_parallel

        for model in models:
            head_transform(model)
        rows, cut = cut_rows(batch, self._cp_size)
        with context_parallel(
            self._cp_mesh,
            buffers=cut,
            buffer_seq_dims=[1] * len(cut),
            no_restore_buffers={*cut},
        ):
            yield rows

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        whole = self._prepare_inputs(inputs)
        add_to(self._train_sums, NUM_TOKENS, token_count(whole))
        with self._cut(whole, model) as rows:
            loss = super().training_step(model, rows, *args, **kwargs)
        # Trainer logs the mean over ranks.
        return loss / self._cp_size

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        with self._cut(self._prepare_inputs(inputs), model) as rows:
            return super().prediction_step(model, rows, *args, **kwargs)

    def _prepare_context_parallel_inputs(self, model: nn.Module, inputs: Any) -> Any:
        # Trainer would cut them again, and without KTO's mismatched pairs.
        return nullcontext, inputs

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        items = super()._get_num_items_in_batch(batch_samples, device)
        # All ranks of a sequence count its batch. Tensor parallelism has one batch in all.
        return items / self._cp_size

    def _item_values(
        self, outputs: PreferenceOutput | UnpairedOutput, inputs: dict[str, Any]
    ) -> dict[str, Tensor]:
        values = super()._item_values(outputs, inputs)
        names = [name for name in OF_TOKENS if name in values] if self._cp_size > 1 else []
        if names:
            numerators = torch.stack([values[name][:, 0] for name in names])
            dist.all_reduce(numerators, group=self._cp_mesh.get_group())
            for name, sums in zip(names, numerators, strict=True):
                values[name] = torch.stack([sums, values[name][:, 1]], dim=1)
        return values

    def _track_num_input_tokens(self, inputs: Any) -> None:
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)
        seen = self.state.num_input_tokens_seen - before
        self.state.num_input_tokens_seen = before + seen // ranks_a_batch(self.accelerator)
