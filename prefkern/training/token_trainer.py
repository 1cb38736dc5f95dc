"""The part of PreferenceTrainer that batches pairs by tokens (`max_tokens_per_batch`).

Trainer makes its loaders, with their options; here they get other batches. In an evaluation ranks
then hold different numbers of pairs: their values are gathered with rows of zeros, which have no
weight in a mean. Without `max_tokens_per_batch` everything is ObjectiveTrainer's.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput

from prefkern.data.collate import sequence_count
from prefkern.training.config import PreferenceConfig
from prefkern.training.objective_trainer import ObjectiveTrainer, add_to
from prefkern.training.token_batches import TokenBatches, pair_tokens, with_batches

logger = logging.getLogger(__name__)


class TokenBatchTrainer(ObjectiveTrainer):
    """ObjectiveTrainer whose batches may have a budget of tokens.

    A training log then has the means of `batch/tokens` and `batch/pairs` as well.
    """

    args: PreferenceConfig

    # Pairs of all ranks that are computed at the same time, on average; None: not by tokens.
    _pairs_a_round: float | None = None
    # Whether this rank's last batch of an evaluation repeats pairs.
    _repeats_last = False

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        strategy = getattr(self.args, "train_sampling_strategy", "random")
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        loader = self._by_tokens(loader, None if strategy == "sequential" else seed)
        batches = loader.batch_sampler
        if isinstance(batches, TokenBatches):
            self._pairs_a_round = len(loader.dataset) / max(len(batches), 1)
            logger.info("an epoch has %s", batches)
            if batches.repeats:
                logger.warning(
                    "%d of %d pairs are trained on twice in each epoch, so that each of %d "
                    "processes has as many batches",
                    batches.repeats,
                    len(loader.dataset),
                    self.args.world_size,
                )
        return loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        return self._by_tokens(super().get_eval_dataloader(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        return self._by_tokens(super().get_test_dataloader(test_dataset))

    def get_total_train_batch_size(self, args: Any) -> int:
        """Pairs of an optimiser step, for the speeds that Trainer logs: by tokens, on average."""
        if self._pairs_a_round is None:
            return super().get_total_train_batch_size(args)
        return round(self._pairs_a_round * self.args.gradient_accumulation_steps)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.args.max_tokens_per_batch is not None:
            row = inputs["input_ids"]
            counts = {"tokens": row.numel(), "pairs": sequence_count(inputs) / 2}
            for name, count in counts.items():
                total = torch.tensor([count, 1.0], device=row.device)
                add_to(self._train_sums, f"batch/{name}", total)
        return result

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        batches = getattr(dataloader, "batch_sampler", None)
        self._repeats_last = isinstance(batches, TokenBatches) and batches.repeats_last
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def _gathered(self, values: Tensor) -> Tensor:  # (B, metrics, 2)
        if self.args.max_tokens_per_batch is None:
            return super()._gathered(values)
        if self._repeats_last and self.accelerator.gradient_state.end_of_dataloader:
            values = torch.zeros_like(values)
        return self.accelerator.gather(self.accelerator.pad_across_processes(values))  # pyright: ignore[reportReturnType]

    def _by_tokens(self, loader: Any, seed: int | None = None) -> Any:
        batches = self._token_batches(loader.dataset, seed)
        return loader if batches is None else with_batches(loader, batches, self.accelerator.device)

    def _token_batches(self, dataset: Any, seed: int | None = None) -> TokenBatches | None:
        """This rank's batches of tokenised pairs; None without a budget of tokens."""
        budget = self.args.max_tokens_per_batch
        if budget is None:
            return None
        return TokenBatches(
            pair_tokens(dataset, self.args.share_prompt),
            budget,
            seed=seed,
            rank=self.args.process_index,
            ranks=self.args.world_size,
        )
