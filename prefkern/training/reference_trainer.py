"""The part of PreferenceTrainer that computes the reference: its sums, its states, what is kept of them.

The reference is a model of its own (`ref_model`), or the policy itself: with the adapter off, with
another adapter, with the initial values of a trained one, or before the first step. Its forward goes
through the policy's code, in the same precision, so that equal models give equal sums. Sums that are
computed before training go into the datasets, and to disk (`prefkern.training.reference_cache`).
Under FSDP2 a sharded copy of the policy computes them (`prefkern.training.sharding`), under DeepSpeed
an engine around the policy (`prefkern.training.zero`).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from prefkern.data.collate import first_sequence, sequence_count
from prefkern.data.columns import picture_column
from prefkern.loss.fused import FusedPreferenceLoss
from prefkern.models.adapters import is_peft_model
from prefkern.models.calls import evaluation_mode
from prefkern.models.own_reference import InitialAdapter, adapter_in_use
from prefkern.models.routers import RouterLoss
from prefkern.models.scoring import MISMATCHED, align_labels, model_inputs, preference_outputs
from prefkern.models.transform import forget_transform
from prefkern.ops import cpu
from prefkern.ops.call import resolve_backend
from prefkern.training.checks import carry_sums
from prefkern.training.context_parallel import ContextParallelTrainer
from prefkern.training.objective_trainer import reference_states, sums_alone, sums_of
from prefkern.training.pictures import hash_pictures
from prefkern.training.reference_cache import (
    SumsOnDisk,
    default_folder,
    description,
    open_cache,
    with_sums,
)
from prefkern.training.sharding import is_sharded, sharded
from prefkern.training.unsaved import fingerprint
from prefkern.training.zero import destroy, forward_engine

logger = logging.getLogger(__name__)


class ReferenceTrainer(ContextParallelTrainer):
    """ContextParallelTrainer with a reference; PreferenceTrainer sets these attributes."""

    # The reference, if it is a model of its own.
    ref_model: Any
    # The values of a trained adapter that was given; None: there is none.
    _initial_adapter: InitialAdapter | None
    # Whether a data_collator was given.
    _collates_otherwise: bool
    # Sums alone, in place of the loss.
    _sum_fn: FusedPreferenceLoss
    _warned_of_no_mismatch: bool
    # Datasets whose sums were computed here, by fingerprint.
    _computed_sums: set[str]
    # Of the reference, before it is sharded (rank 0), and what computes sums before training: a copy
    # of the policy (FSDP2), or an engine around it (DeepSpeed).
    _described: dict[str, Any] | None
    _for_sums: Any

    def _reference_logps(self, inputs: dict[str, Any]) -> Tensor:  # (S,), of pairs (2B,)
        with torch.no_grad(), self._reference() as model, self._autocast():
            return self._sums(model, inputs)

    def _whole_reference_logps(self, inputs: dict[str, Any]) -> Tensor:
        with self._cut(self._prepare_inputs(inputs)) as rows:
            return self._reference_logps(rows)

    def _autocast(self) -> Any:
        """The policy's autocast for the reference: a wrapped model has its own, another has none.

        FSDP2 has none: it casts weights and inputs, of the policy and of a reference that is sharded.
        DeepSpeed casts weights.
        """
        return nullcontext() if self.accelerator.is_fsdp2 else self.accelerator.autocast()

    def _sums(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:  # (S,), of pairs (2B,)
        """Log-prob sums of a batch's rows under a model, without gradient."""
        options = sums_alone(self._sum_fn, sequence_count(inputs), inputs["input_ids"].device)
        with torch.no_grad():
            outputs = preference_outputs(
                model, inputs, self._sum_fn, router_loss=RouterLoss(), **options
            )
        # Casts that an outer autocast made of the policy's weights here have no gradient.
        torch.clear_autocast_cache()
        return sums_of(outputs, self.loss_fn.objective.responses)

    def _mismatched_log_ratios(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:  # (M,)
        """Log policy / reference of the batch's mismatched prompts and responses (KTO)."""
        rows = {
            name.removeprefix(MISMATCHED): value
            for name, value in inputs.items()
            if name.startswith(MISMATCHED)
        }
        count = sequence_count(rows)
        if count == 0:
            if not self._warned_of_no_mismatch:
                self._warned_of_no_mismatch = True
                logger.warning(
                    "a batch of %d has one prompt only, so no mismatched pairs: its reference "
                    "point is 0. Larger batches, or shuffled ones, make it meaningful",
                    sequence_count(inputs),
                )
            # A wrapped forward is collective (DDP's buffers, FSDP's weights): every rank must run
            # one.
            rows = first_sequence({name: inputs[name] for name in rows})
        return (self._sums(model, rows) - self._reference_logps(rows))[:count]

    def _reference_states(self, policy: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
        """The reference's hidden states and head, for objectives that compare distributions."""
        cu_seqlens = inputs.get("cu_seqlens")
        is_part = "shift_labels" in inputs
        labels = inputs["shift_labels"] if is_part else align_labels(inputs["labels"], cu_seqlens)
        # FSDP2 and ZeRO-3 free a head when its forward ends. FSDP2 gathers that of an adapter's base
        # again, into the same memory, with the policy's own head, for its forward and its backward.
        is_base = self.ref_model is None and self._initial_adapter is None
        copies_head = self.accelerator.is_fsdp2 and not is_base or is_deepspeed_zero3_enabled()
        with torch.no_grad(), self._reference() as model, self._autocast():
            inputs = {**model_inputs(model, inputs), **RouterLoss().asked_of(model)}
            return reference_states(
                model, policy, inputs, labels, cu_seqlens is not None, copies_head
            )

    @contextmanager
    def _reference(self) -> Iterator[nn.Module]:
        """The reference model, in evaluation mode."""
        if self.ref_model is not None:
            yield self.ref_model
            return
        self._check_is_initial()
        model: Any = self.accelerator.unwrap_model(self.model)
        if self.accelerator.is_fsdp2 and not is_sharded(model):
            if self._for_sums is None:
                self._for_sums = sharded(copy.deepcopy(model), self.accelerator)
            model = self._for_sums
        elif self.is_deepspeed_enabled and self.deepspeed is None and self._for_sums is None:
            # The module has hooks now, which do as the engine that trains.
            self._for_sums = forward_engine(model, self.accelerator)
        with self._as_reference(model):
            yield model

    def _check_is_initial(self) -> None:
        if self.ref_model is not None or self.state.global_step == 0:
            return
        if not is_peft_model(self.accelerator.unwrap_model(self.model)):
            raise ValueError(
                "the reference is the initial model, which training has changed: pass this "
                "dataset to the constructor, or pass ref_model"
            )

    @contextmanager
    def _as_reference(self, model: Any) -> Iterator[None]:
        """The policy, or its copy, as its own reference within the context."""
        in_use: Any = nullcontext()
        # Before training the adapter has its initial values.
        if self._initial_adapter is not None and self._for_sums is None:
            in_use = self._initial_adapter.in_use(model)
        elif self._initial_adapter is None and is_peft_model(model):
            in_use = adapter_in_use(model, self.args.ref_adapter_name)
        with in_use, evaluation_mode(model):
            yield

    @contextmanager
    def _computing_sums(self) -> Iterator[None]:
        """What computes sums, if it is not the policy itself, is gone at the end."""
        try:
            yield
        finally:
            engine, self._for_sums = self._for_sums, None
            if engine is not None and self.is_deepspeed_enabled:
                destroy(engine)

    def _reference_fingerprint(self) -> dict[str, str]:
        """Of the weights that the reference has and the base model has not."""
        if self._initial_adapter is not None:
            return fingerprint(self._initial_adapter.items())
        if self.ref_model is None and is_peft_model(self.model):
            return {}
        # With precomputed sums it is the model before training, or before a checkpoint is loaded.
        initial: Any = self.model if self.ref_model is None else self.ref_model
        return fingerprint(initial.named_parameters())

    def _with_reference(self, dataset: Any) -> Any:
        """The dataset with the reference's sums as columns, computed unless it has them."""
        if isinstance(dataset, dict):
            return {key: self._with_reference(value) for key, value in dataset.items()}
        if not carry_sums(dataset):
            dataset = self._computed(dataset)
        if dataset is not None:
            self._computed_sums.add(dataset._fingerprint)
        return dataset

    def _computed(self, dataset: Any) -> Any:
        self._check_is_initial()
        args = self.args
        return with_sums(
            dataset,
            self._whole_reference_logps,
            self.data_collator,
            self.accelerator,
            batch_size=args.precompute_ref_batch_size or args.per_device_eval_batch_size,
            batches_of=self._token_batches,
            on_disk=self._reference_cache(dataset) if self.is_world_process_zero() else None,
            shows_progress=not args.disable_tqdm and self.is_local_process_zero(),
        )

    def _reference_cache(self, dataset: Any) -> SumsOnDisk | None:
        folder = self.args.ref_cache_dir
        folder = default_folder() if folder is None else folder
        if not folder:
            return None
        if self._collates_otherwise:
            logger.warning("reference sums are not kept: a data_collator was given")
            return None
        precision = self.accelerator.mixed_precision
        if self._shards_reference and precision != "no":
            precision = f"{precision} by {'FSDP2' if self.accelerator.is_fsdp2 else 'DeepSpeed'}"
        # Without it, keys stay what they were.
        ld_alpha = {} if self._sum_fn.ld_alpha is None else {"ld_alpha": self._sum_fn.ld_alpha}
        pictures = {}
        if picture_column(dataset.column_names) is not None:
            pictures["pictures"] = hash_pictures(dataset, self.processing_class)
        cut = {"cp_size": self._cp_size} if self._cp_size > 1 else {}
        on_cpu = self.args.device.type == "cpu"
        return open_cache(
            folder,
            self._description(),
            dataset,
            autocast=precision,
            tf32=self.args.tf32,
            device=self.args.device.type,
            bfloat16_units=on_cpu and cpu.has_bfloat16_units(),
            wide_product=on_cpu and cpu.has_wide_product(),
            backend=resolve_backend(self.args.backend, self.args.device),
            layout=self._layout,
            **ld_alpha,
            **pictures,
            **cut,
        )

    def _description(self) -> dict[str, Any] | None:
        """What sums depend on of the reference; of a sharded one, as it was before."""
        model: Any = self.accelerator.unwrap_model(self.model)
        in_use: Any = self._as_reference(model)
        if self.ref_model is not None:
            model, in_use = self.ref_model, nullcontext()
        if is_sharded(model) or self._for_sums is not None:
            return self._described
        with in_use, self.accelerator.autocast():
            self._described = description(model)
        if self._shards_reference:
            # This rank's probe was not in shards: there every rank has to run one.
            forget_transform(model)
        return self._described

    @property
    def _shards_reference(self) -> bool:
        """Whether what computes the reference is made as what computes the policy (FSDP2, DeepSpeed)."""
        return self.accelerator.is_fsdp2 or self.is_deepspeed_enabled

    @property
    def _layout(self) -> str:
        """How batches are laid out: rounding depends on it."""
        if self.args.share_prompt:
            return "shared"
        return "packed" if self.args.padding_free else "padded"
