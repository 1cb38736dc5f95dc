"""The part of PreferenceTrainer that batches pairs by tokens (`max_tokens_per_batch`).

Trainer makes its loaders, with their options; here they get other batches. In an evaluation ranks
then hold different numbers of pairs: their values are gathered with rows of zeros, which have no
weight in a mean. Without `max_tokens_per_batch` everything is ObjectiveTrainer's.

    token_batches.json    what the batches of a checkpoint's run depend on

A run that resumes with others, after memory ran out for example, goes on at another place of the
epoch, and warns.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput

from prefkern.data.collate import sequence_count
from prefkern.training.config import PreferenceConfig
from prefkern.training.files import write_json
from prefkern.training.objective_trainer import ObjectiveTrainer, add_to
from prefkern.training.sharing import shares_batches
from prefkern.training.token_batches import TokenBatches, pair_tokens, with_batches

logger = logging.getLogger(__name__)

_FILE = "token_batches.json"


class TokenBatchTrainer(ObjectiveTrainer):
    """ObjectiveTrainer whose batches may have a budget of tokens.

    A training log then has the means of `batch/tokens` and `batch/pairs` as well.
    """

    args: PreferenceConfig

    # This rank's batches of training; None: not by tokens.
    _train_batches: TokenBatches | None = None
    # Whether this rank's last batch of an evaluation repeats pairs.
    _repeats_last = False

    def get_train_dataloader(self) -> Any:
        loader: Any = super().get_train_dataloader()
        strategy = getattr(self.args, "train_sampling_strategy", "random")
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        batches = self._token_batches(loader.dataset, None if strategy == "sequential" else seed)
        self._train_batches = batches
        if batches is None:
            return loader
        logger.info("an epoch has %s", batches)
        if batches.repeats:
            logger.warning(
                "%d of %d pairs are trained on twice in each epoch, so that each of %d processes "
                "has as many batches",
                batches.repeats,
                len(loader.dataset),
                self.args.world_size,
            )
        return with_batches(loader, batches, self.accelerator.device)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        return self._by_tokens(super().get_eval_dataloader(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        return self._by_tokens(super().get_test_dataloader(test_dataset))

    def get_total_train_batch_size(self, args: Any) -> int:
        """Pairs of an optimiser step, for the speeds that Trainer logs: by tokens, on average."""
        if self._train_batches is None:
            return super().get_total_train_batch_size(args)
        dataset: Any = self.train_dataset
        pairs_a_round = len(dataset) / len(self._train_batches)
        return round(pairs_a_round * self.args.gradient_accumulation_steps)

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
            counts = {
                "tokens": row.numel(),
                "pairs": sequence_count(inputs) / self._sequences_an_item,
            }
            for name, count in counts.items():
                total = torch.tensor([count, 1.0], device=row.device)
                add_to(self._train_sums, f"batch/{name}", total)
        return result

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        batches = getattr(dataloader, "batch_sampler", None)
        self._repeats_last = isinstance(batches, TokenBatches) and batches.repeats_last
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def _gathered(self, values: Tensor) -> Tensor:  # (B, metrics, 2)
        if self.args.max_tokens_per_batch is None or shares_batches(self.accelerator):
            return super()._gathered(values)
        if self._repeats_last and self.accelerator.gradient_state.end_of_dataloader:
            values = torch.zeros_like(values)
        return self.accelerator.gather(self.accelerator.pad_across_processes(values))  # pyright: ignore[reportReturnType]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._train_batches is not None and self.args.should_save:
            write_json(Path(output_dir) / _FILE, self._train_batches.description)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        file, batches = Path(checkpoint) / _FILE, self._train_batches
        theirs = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
        ours = None if batches is None else batches.description
        if theirs != ours:
            logger.warning(
                "%s was trained with other batches (%s) than this run has (%s): the epoch goes on "
                "after as many batches, so that some pairs may be in it twice, and some not at all",
                checkpoint,
                theirs or "not by tokens",
                ours or "not by tokens",
            )

    def _by_tokens(self, loader: Any) -> Any:
        batches = self._token_batches(loader.dataset)
        return loader if batches is None else with_batches(loader, batches, self.accelerator.device)

    def _token_batches(self, dataset: Any, seed: int | None = None) -> TokenBatches | None:
        """This rank's batches of tokenised pairs; None without a budget of tokens."""
        budget = self.args.max_tokens_per_batch
        if budget is None:
            return None
        is_one = shares_batches(self.accelerator)
        return TokenBatches(
            pair_tokens(dataset, self.args.share_prompt, self._sequences_an_item == 3),
            budget,
            seed=seed,
            rank=0 if is_one else self.args.process_index,
            ranks=1 if is_one else self.args.world_size,
        )
