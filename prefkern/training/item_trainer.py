"""What the trainers share: a loss that is the mean over the items of an optimiser step.

An item is a pair (two sequences of a batch) or, for KTO, a response (one). Trainer would divide a
sum over tokens, or take the mean of the batches' means. Here items are counted over accumulated
batches and over ranks, so that 1 x 8 pairs trains like 4 x 2, with a partial last batch too. To
fill the ranks' last batches, accelerate repeats items from the start of the epoch; these count as
well. `accelerator_config={"even_batches": False}` or `dataloader_drop_last` avoids that.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_utils import EvalLoopOutput

from prefkern.data.collate import sequence_count
from prefkern.data.columns import COLUMNS
from prefkern.models.adapters import (
    base_parameters,
    check_no_native_adapter,
    is_peft_model,
)
from prefkern.models.heads import ONE_PROCESS_PER_GPU
from prefkern.models.ties import own_ties, untie_originals
from prefkern.training.checkpoints import CheckpointTrainer
from prefkern.training.launched import warn_of_missing_processes
from prefkern.training.sharding import is_sharded, sharded
from prefkern.training.trainable import (
    check_optimizer,
    check_trainable,
    must_reach_parameters,
    unreached,
)
from prefkern.training.unsaved import fingerprint
from prefkern.training.zero import cast_added, configuration, destroy, forward_engine


class ItemTrainer(CheckpointTrainer):
    """transformers' Trainer over items; `compute_loss` of a subclass scales by `_share`.

    Raises ValueError under nn.DataParallel, for an adapter that is not PEFT's own, and for an
    optimizer that is given and holds none of the parameters to train.
    """

    _sequences_an_item = 2
    # Whether a step's backward has reached parameters of the model.
    _reaches_parameters = False

    def __init__(self, *args: Any, model: Any, **kwargs: Any) -> None:
        config: Any = getattr(model, "config", None)
        had_cache = hasattr(config, "use_cache")
        use_cache = getattr(config, "use_cache", None)
        super().__init__(*args, model=model, **kwargs)
        warn_of_missing_processes(self.args.world_size)
        # Trainer switches the cache off for good, and saves that. Forwards here run without it. The
        # config of a model of several parts had no such entry.
        if had_cache:
            config.use_cache = use_cache
        elif hasattr(config, "use_cache"):
            del config.use_cache
        if self.args.n_gpu > 1:
            raise ValueError(f"nn.DataParallel is not supported: {ONE_PROCESS_PER_GPU}")
        check_no_native_adapter(self.model)
        sharding = configuration(self.args)
        if sharding is not None:
            cast_added(self.model, sharding)  # pyright: ignore[reportArgumentType]
        if self.accelerator.is_fsdp2:
            untie_originals(self.model)  # pyright: ignore[reportArgumentType]
        if self.optimizer is not None:
            check_optimizer(self.model, self.optimizer)  # pyright: ignore[reportArgumentType]
        if is_peft_model(self.model):
            self._unsaved = {"base model": fingerprint(base_parameters(self.model))}
        # Other classes of arguments have it on. It would log the mean of earlier losses in place of
        # a NaN, at two synchronisations a step. Here a loss that is not finite raises instead.
        self.args.logging_nan_inf_filter = False
        # compute_loss scales by the number of items; Trainer must not divide again.
        self.model_accepts_loss_kwargs = True

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's. Raises ValueError, before anything else, if nothing can be trained.

        Not the constructor: a frozen model may be evaluated.
        """
        check_trainable(self.model)
        self._reaches_parameters = False
        return super().train(*args, **kwargs)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        with own_ties(self.model):  # pyright: ignore[reportArgumentType]
            return super()._prepare_for_training(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As Trainer's. Raises ValueError if the first backward reaches nothing that is trained."""
        # DeepSpeed and FSDP keep gradients elsewhere.
        if self._reaches_parameters or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return super().training_step(*args, **kwargs)
        with must_reach_parameters(self.model):
            loss = super().training_step(*args, **kwargs)
        self._reaches_parameters = True
        return loss

    def _share(self, mean: Tensor, items: int, num_items_in_batch: Tensor | int | None) -> Tensor:
        """A batch's share of the mean over a step's items; None: the batch's own mean."""
        if self.is_in_train and torch.is_grad_enabled() and not mean.requires_grad:
            raise unreached(self.model)
        if num_items_in_batch is None:
            return mean
        # Ranks' gradients are averaged, and the mean is over the items of all ranks.
        return mean * (items * self.accelerator.num_processes / num_items_in_batch)

    def evaluation_loop(
        self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Trainer's loop, with means over items in place of its mean over batches."""
        with self._sharded_by_now():
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        assert output.metrics is not None
        means = self._evaluated(output.predictions)
        output.metrics.update({f"{metric_key_prefix}_{name}": x for name, x in means.items()})
        return output

    @contextmanager
    def _sharded_by_now(self) -> Iterator[None]:
        """Before training under FSDP2, a sharded copy of the model in its place; under DeepSpeed, an
        engine around it.

        The model itself is sharded with its optimizer, when training begins: Accelerate shards them
        only together.
        """
        whole: Any = self.model
        if self.is_deepspeed_enabled and self.deepspeed is None:
            with self._in_engine(whole):
                yield
            return
        if not self.accelerator.is_fsdp2 or is_sharded(whole):
            yield
            return
        self.model = sharded(copy.deepcopy(whole), self.accelerator)
        # Trainer prepares a model, for evaluation, if there is none here.
        self.accelerator._models.append(self.model)
        try:
            yield
        finally:
            self.accelerator._models.pop()
            self.model = whole

    @contextmanager
    def _in_engine(self, model: Any) -> Iterator[None]:
        """Within the context DeepSpeed casts and shards a model for forwards alone."""
        engine: Any = forward_engine(model, self.accelerator)
        self.deepspeed = engine
        # Trainer prepares a model, for evaluation, if there is none here.
        self.accelerator._models.append(engine)
        try:
            yield
        finally:
            self.accelerator._models.pop()
            self.deepspeed = None
            destroy(engine)

    def _evaluated(self, predictions: Any) -> dict[str, float]:
        """The metrics of an evaluation, from what `prediction_step` returned for all items."""
        raise NotImplementedError(f"{type(self).__name__} does not define _evaluated")

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Items of an optimiser step, over its accumulated batches and over ranks."""
        sequences = sum(sequence_count(batch) for batch in batch_samples)
        items = torch.tensor(sequences / self._sequences_an_item, device=device)
        return self.accelerator.reduce(items, "sum")

    def _prepare_input(self, data: Any) -> Any:
        # Under DeepSpeed Trainer casts them to the model's dtype: sums and margins lose digits.
        if isinstance(data, Tensor) and data.is_floating_point():
            return data.to(self.args.device)
        return super()._prepare_input(data)

    def _track_num_input_tokens(self, inputs: Any) -> None:
        # Without a mask Trainer leaves out every pad token, and a text may end with that token.
        if "cu_seqlens" in inputs:
            inputs = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
        super()._track_num_input_tokens(inputs)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = list(COLUMNS)
