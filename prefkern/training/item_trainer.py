"""What the trainers share: a loss that is the mean over the items of an optimiser step.

An item is a pair, two sequences of a batch, or for KTO a response, one of them. Trainer would
divide a sum over tokens, or take the mean of batches' means; here items are counted over
accumulated batches and over ranks, so that 1 x 8 pairs trains like 4 x 2, the last partial batch
included. What accelerate repeats from the beginning of an epoch so that every rank's last batch is
full counts as items, too; `accelerator_config={"even_batches": False}` and `dataloader_drop_last`
are the ways around that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prefkern.data.collate import sequence_count
from prefkern.data.columns import COLUMNS
from prefkern.models.adapters import base_parameters, check_no_native_adapter, is_peft_model
from prefkern.training.checkpoints import CheckpointTrainer
from prefkern.training.unsaved import fingerprint


class ItemTrainer(CheckpointTrainer):
    """transformers' Trainer over items; `compute_loss` of a subclass scales by `_share`.

    Raises ValueError under nn.DataParallel, and for an adapter that is not PEFT's own.
    """

    _sequences_an_item = 2

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                "nn.DataParallel is not supported: start one process per GPU with `accelerate "
                "launch` or `torchrun`, or make a single GPU visible with CUDA_VISIBLE_DEVICES"
            )
        check_no_native_adapter(self.model)
        if is_peft_model(self.model):
            self._unsaved = {"base model": fingerprint(base_parameters(self.model))}
        # Other classes of arguments have it on. It would put the mean of earlier losses where one is
        # NaN, at two synchronisations a step: what is not finite raises where it arises.
        self.args.logging_nan_inf_filter = False
        # compute_loss scales by the number of items itself; Trainer must not divide once more.
        self.model_accepts_loss_kwargs = True

    def _share(self, mean: Tensor, items: int, num_items_in_batch: Tensor | int | None) -> Tensor:
        """A batch's share of the mean over a step's items; None: the batch's own mean."""
        if num_items_in_batch is None:
            return mean
        # Ranks' gradients are averaged, and the mean is over the items of all ranks.
        return mean * (items * self.accelerator.num_processes / num_items_in_batch)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Items of an optimiser step, over its accumulated batches and over ranks."""
        sequences = sum(sequence_count(batch) for batch in batch_samples)
        items = torch.tensor(sequences / self._sequences_an_item, device=device)
        return self.accelerator.reduce(items, "sum")

    def _track_num_input_tokens(self, inputs: Any) -> None:
        # Without a mask Trainer leaves out whatever equals the pad token, which may end each text.
        if "cu_seqlens" in inputs:
            inputs = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
        super()._track_num_input_tokens(inputs)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = list(COLUMNS)
