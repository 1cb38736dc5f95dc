"""Checks that PreferenceTrainer makes of its arguments and datasets before it trains.

It refuses an argument without effect on the objective, a reference that is given twice, and
datasets whose last batches would leave a rank with nothing to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from prefkern.data.columns import REFERENCE_COLUMNS
from prefkern.data.mixing import DatasetMix
from prefkern.objectives import Objective, UnpairedObjective
from prefkern.training.config import PreferenceConfig
from prefkern.training.token_batches import check_budget


@dataclass(frozen=True)
class Needs:
    """What the objective needs from the trainer."""

    paired: bool
    reference: bool
    margins: bool
    distributions: bool  # of the reference, and not only its sums
    gold: bool  # a third response to each prompt

    @property
    def sums_suffice(self) -> bool:
        """Whether the reference's log-prob sums of the dataset's responses are all it needs."""
        return self.paired and not self.distributions


def given_objective(objective: Any, args: PreferenceConfig) -> Objective | UnpairedObjective:
    """An objective that was passed itself; raise if args describe one as well."""
    if not isinstance(objective, Objective | UnpairedObjective):
        raise TypeError(
            f"objective must be an objective of prefkern.objectives, got {objective!r}; "
            'a name goes into args: PreferenceConfig(objective="adadpo")'
        )
    for name in ("beta", "rpo_alpha", "use_weighting", "objective_options"):
        if getattr(args, name):
            raise ValueError(
                f"args.{name} is {getattr(args, name)!r}, which has no effect on an objective that "
                "is passed itself; give it to the objective"
            )
    return objective


def check_data_arguments(args: PreferenceConfig, train_dataset: Any, data_collator: Any) -> None:
    """Raise for several training datasets in a dict, and for options of another collator."""
    if isinstance(train_dataset, dict):
        raise TypeError(
            f"train_dataset must be one dataset, got a {type(train_dataset).__name__} of "
            f"{', '.join(map(repr, train_dataset))}: choose one, as train_dataset[...], or "
            "train on several as a prefkern.data.DatasetMix"
        )
    if args.padding_free and data_collator is not None:
        raise ValueError(
            "padding_free has no effect on a data_collator that is given; leave it out, and "
            "let the collator return cu_seqlens if it packs"
        )
    if args.pad_to_multiple_of is not None and data_collator is not None:
        raise ValueError(
            "pad_to_multiple_of has no effect on a data_collator that is given; leave it out"
        )


def check_reference_arguments(model: Any, ref_model: Any, args: PreferenceConfig) -> None:
    """Raise for a reference that is given twice or of another type, and for unused keywords."""
    if not (ref_model is None or isinstance(ref_model, str | nn.Module)):
        raise TypeError(
            "ref_model must be a causal LM, a name or path to load, or None, got "
            f"{type(ref_model).__name__} {ref_model!r}"[:200]
        )
    if ref_model is not None and args.ref_model_name_or_path is not None:
        raise ValueError(
            f"ref_model was given, and ref_model_name_or_path is {args.ref_model_name_or_path!r}: "
            "give one of them"
        )
    names = (model, ref_model, args.ref_model_name_or_path)
    if args.model_init_kwargs and not any(isinstance(name, str) for name in names):
        raise ValueError(
            f"model_init_kwargs is {args.model_init_kwargs!r}, which has no effect on a model that "
            "is loaded already; leave it out, or give the model's name"
        )


def reference_arguments(args: PreferenceConfig, ref_model: Any) -> dict[str, Any]:
    """The arguments that choose the source of the reference's log-probs, by name."""
    given = {
        "ref_model": None if ref_model is None else type(ref_model).__name__,
        "ref_model_name_or_path": args.ref_model_name_or_path,
        "ref_adapter_name": args.ref_adapter_name,
        "precompute_ref_log_probs": args.precompute_ref_log_probs or None,
        "sync_ref_model": args.sync_ref_model or None,
    }
    return {name: value for name, value in given.items() if value is not None}


def check_carried_sums(
    dataset: Any, name: str, needs: Needs, given: dict[str, Any], args: PreferenceConfig
) -> None:
    """Raise ValueError if a dataset carries reference sums and arguments name a reference.

    The sums would be used, whatever reference they are of, and the arguments would have no effect.
    Nor is it known which tokens they are of, and with which weights.
    """
    carried = [column for column in REFERENCE_COLUMNS if column in dataset.column_names]
    if not (carried and needs.reference and needs.sums_suffice):
        return
    weights = {
        "ld_alpha": args.ld_alpha,
        "assistant_only_loss": args.assistant_only_loss or None,
        "last_turn_only": args.last_turn_only or None,
    }
    for option, value in weights.items():
        if value is not None:
            raise ValueError(
                f"dataset {name!r} carries reference sums ({' and '.join(carried)}), which do not "
                f"tell the weights of their tokens, and {option} is {value!r}: remove the columns "
                f"(dataset.remove_columns({carried!r})) to have sums with these weights computed"
            )
    if not given:
        return
    argument, value = next(iter(given.items()))
    raise ValueError(
        f"dataset {name!r} carries reference sums ({' and '.join(carried)}), beside which "
        f"{argument} ({value!r}) has no effect: leave {argument} out to train with these sums, or "
        f"remove the columns (dataset.remove_columns({carried!r})) to have them computed"
    )


def carry_sums(*datasets: Any) -> bool:
    """Whether each dataset, or each of a dict of them, has the reference's sums as columns."""
    parts = [part for dataset in datasets for _, part in named(dataset, "")]
    return all(REFERENCE_COLUMNS[0] in part.column_names for part in parts)


def check_needs(needs: Needs, args: PreferenceConfig, ref_model: Any) -> None:
    for name, value in reference_arguments(args, ref_model).items():
        if not needs.reference:
            raise ValueError(
                f"{name} is {value!r}, and this objective has no reference; leave it out"
            )
    if args.precompute_ref_log_probs and needs.reference and not needs.sums_suffice:
        what = "the reference's distributions" if needs.paired else "mismatched pairs of each batch"
        raise ValueError(
            f"precompute_ref_log_probs keeps sums, and this objective needs {what}; leave it out"
        )
    if args.share_prompt and not needs.paired:
        raise ValueError(
            "share_prompt has no effect on single responses: a batch is drawn from all of them, so "
            "the two of a pair rarely meet; leave it out"
        )
    if args.max_tokens_per_batch is not None and not needs.paired:
        raise ValueError(
            "max_tokens_per_batch is for pairs: this objective takes its reference point from the "
            "responses of a batch, whose number would differ; leave it out"
        )
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
        if not needs.paired and getattr(args, name) < 2:
            raise ValueError(
                "this objective takes its reference point from mismatched responses of a batch: "
                f"{name} must be at least 2, got {getattr(args, name)}"
            )


def named(dataset: Any, name: str) -> list[tuple[str, Any]]:
    """The datasets of a dict or a mix, at any depth, with their names in reports."""
    if dataset is None:
        return []
    parts = dataset.parts if isinstance(dataset, DatasetMix) else dataset
    if isinstance(parts, Mapping):
        return [
            found
            for key, value in parts.items()
            for found in named(value, f"{name}_{key}") or [(f"{name}_{key}", None)]
        ]
    return [(name, dataset)]


def check_batches(
    dataset: Any,
    batch_size: int,
    args: PreferenceConfig,
    name: str,
    ranks: int,
    *,
    gold: bool,
    trains: bool = False,
) -> None:
    """Raise if a dataset is below one batch, or its last batches differ between `ranks` with own ones.

    With batches by tokens: if a pair does not fit into one.
    """
    if args.max_tokens_per_batch is not None:
        for each, part in named(dataset, name):
            check_budget(part, each, args.max_tokens_per_batch, args.share_prompt, gold)
        return
    across_ranks = batch_size * ranks
    accelerator: Any = args.accelerator_config
    is_uneven = ranks > 1 and not (args.dataloader_drop_last or accelerator.even_batches)
    for each, part in named(dataset, name):
        if args.dataloader_drop_last and len(part) < across_ranks:
            raise ValueError(
                f"dataset {each!r} has {len(part)} pairs, fewer than a batch of {across_ranks} "
                "over all processes, and dataloader_drop_last drops partial batches"
            )
        # A rank without a batch would leave the others waiting. In training the ranks' last batches
        # may differ in size, in evaluation not even that.
        last = len(part) % across_ranks
        if is_uneven and last and not (trains and last > across_ranks - batch_size):
            raise ValueError(
                f"dataset {each!r} has {len(part)} pairs, which leave {last} for the last batches "
                f"of {batch_size} on {ranks} processes; even_batches=False does not "
                "support that: leave it out, or set dataloader_drop_last"
            )
