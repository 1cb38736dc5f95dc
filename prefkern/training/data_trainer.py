"""The part of PreferenceTrainer that prepares datasets: checks, tokens, reports, positions.

The constructor and every evaluation on other rows go through it, and so does a stream, group of
rows by group of rows.
"""

from __future__ import annotations

import logging
from typing import Any

from prefkern.data import (
    DatasetMix,
    DatasetReport,
    check_columns,
    check_labels,
    tokenize_examples,
    tokenize_preferences,
    without_unused,
)
from prefkern.data.columns import ID_COLUMNS, renamed
from prefkern.data.streams import refuse_streamed_pictures
from prefkern.models.adapters import check_reference_adapter
from prefkern.models.heads import unwrap
from prefkern.models.positions import check_positions
from prefkern.models.vocabulary import check_tokens
from prefkern.training.checks import (
    Needs,
    carry_sums,
    check_batches,
    check_carried_sums,
    named,
)
from prefkern.training.config import PreferenceConfig
from prefkern.training.pictures import check_sees, read_whole
from prefkern.training.reference_trainer import ReferenceTrainer

logger = logging.getLogger(__name__)


class DataTrainer(ReferenceTrainer):
    """ReferenceTrainer that prepares its datasets; PreferenceTrainer sets these attributes."""

    dataset_reports: dict[str, DatasetReport]
    _objective_needs: Needs
    # The arguments that name a reference.
    _reference_given: dict[str, Any]
    _tokenizer: Any
    # What tokenises rows: the tokenizer, or a processor, which rows with pictures need.
    _processor: Any
    # The rows of the model's embedding; None: unknown.
    _rows: int | None
    _ranks_with_batches: int

    def _tokenized(self, dataset: Any, args: PreferenceConfig, name: str) -> Any:
        if dataset is None:
            return None
        if isinstance(dataset, DatasetMix):
            parts = {
                f"{name}_{key}": self._tokenized(value, args, f"{name}_{key}")
                for key, value in dataset.parts.items()
            }
            seed = args.seed if args.data_seed is None else args.data_seed
            return dataset.of(parts).mixed(seed, self.dataset_reports)
        if isinstance(dataset, dict):
            return {
                key: self._tokenized(value, args, f"{name}_{key}") for key, value in dataset.items()
            }
        is_prepared = any(column.endswith("_ids") for column in dataset.column_names)
        dataset, report = self._tokens_of(dataset, args, name, args.dataset_num_proc)
        # A dataset that was tokenised before adds nothing to a report that is there already.
        if not is_prepared or report.dropped or name not in self.dataset_reports:
            self.dataset_reports[name] = report
            logger.info("%s", report.summary)
        return dataset

    def _tokens_of_stream(self, args: PreferenceConfig, base: Any, rows: Any, name: str) -> Any:
        """The tokens of some rows of a stream, checked as those of a dataset are."""
        # The first rows had none.
        refuse_streamed_pictures(rows.column_names, name)
        self._check_columns(rows, args, name)
        # A worker of the loader may start no processes, and so few rows need none.
        tokens, _ = self._tokens_of(rows, args, name, num_proc=None)
        self._check_positions(tokens, args, name, base)
        return tokens

    def _tokens_of(
        self, dataset: Any, args: PreferenceConfig, name: str, num_proc: int | None
    ) -> tuple[Any, DatasetReport]:
        needs = self._objective_needs
        dataset = renamed(dataset, args.columns, name)  # pyright: ignore[reportArgumentType]
        dataset = without_unused(
            dataset, references=needs.reference and needs.sums_suffice, margins=needs.margins
        )
        options: dict[str, Any] = {
            "max_length": args.max_length,
            "max_prompt_length": args.max_prompt_length,
            "truncation_mode": args.truncation_mode,
            "num_proc": num_proc,
            "name": name,
            "assistant_only_loss": args.assistant_only_loss,
            "last_turn_only": args.last_turn_only,
        }
        if needs.paired:
            options["gold"] = needs.gold
        tokenize = tokenize_preferences if needs.paired else tokenize_examples
        dataset, report = tokenize(dataset, self._processor, **options)
        check_tokens(dataset, ID_COLUMNS, self._rows, name)
        return dataset, report

    def _check_positions(
        self, dataset: Any, args: PreferenceConfig, name: str, base: Any, whose: str = "model"
    ) -> None:
        if self._collates_otherwise:
            return
        bounds = {"max_length": args.max_length, "multiple": args.pad_to_multiple_of}
        for each, part in named(dataset, name):
            check_positions(part, base, each, **bounds, whose=whose)

    def _prepared(self, dataset: Any, name: str) -> Any:
        """A dataset to evaluate on, from raw pairs."""
        dataset = read_whole(dataset, name)
        for each, part in named(dataset, name):
            self._check_columns(part, self.args, each)
            if not self._collates_otherwise:
                check_sees(self.data_collator, part, each)
        dataset = self._tokenized(dataset, self.args, name)
        ranks = self._ranks_with_batches
        gold = self._objective_needs.gold
        check_batches(dataset, self.args.eval_batch_size, self.args, name, ranks, gold=gold)
        if self._objective_needs.reference and not carry_sums(dataset):
            # The constructor did not check this if its datasets carried sums.
            model = self.accelerator.unwrap_model(self.model)
            check_reference_adapter(
                model, self.args.ref_adapter_name, self.ref_model, self._initial_adapter
            )
        for model in (self.accelerator.unwrap_model(self.model), self.ref_model):
            if model is not None:
                whose = "model" if model is not self.ref_model else "reference"
                self._check_positions(dataset, self.args, name, unwrap(model), whose)
        if self._objective_needs.reference and self.args.precompute_ref_log_probs:
            with self._computing_sums():
                dataset = self._with_reference(dataset)
        return dataset

    def _check_columns(self, dataset: Any, args: PreferenceConfig, name: str) -> None:
        needs = self._objective_needs
        dataset = renamed(dataset, args.columns, name)  # pyright: ignore[reportArgumentType]
        check_columns(
            dataset,
            name,
            paired=needs.paired,
            margins=needs.margins,
            gold=needs.gold,
            pictures=True,
        )
        if dataset._fingerprint not in self._computed_sums:
            check_carried_sums(dataset, name, needs, self._reference_given, args)
        if not needs.paired:
            check_labels(dataset, name)
