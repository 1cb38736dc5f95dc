"""What will be the reference: checked before a model is loaded, and copied from the initial model."""

from __future__ import annotations

import copy
from typing import Any

from prefkern.data.columns import renamed
from prefkern.models.loading import load_model
from prefkern.training.checks import Needs, carry_sums, named
from prefkern.training.sharding import check_sharded_reference, mode_of
from prefkern.training.tensor_parallel import size_of
from prefkern.training.zero import is_partitioned


def check_reference_of_shards(
    args: Any, needs: Needs, train_dataset: Any, eval_dataset: Any
) -> None:
    """Raise ValueError for a reference that cannot be sharded as the run shards its model."""
    parts = [
        renamed(part, args.columns, name)
        for dataset, name in ((train_dataset, "train"), (eval_dataset, "eval"))
        for name, part in named(dataset, name)
    ]
    check_sharded_reference(
        mode_of(args), needs, is_carried=needs.sums_suffice and carry_sums(*parts)
    )


def second_copy(model: Any, name: str | None, init_kwargs: Any) -> Any:
    """A copy of the model that is trained, to be its reference.

    Raises ValueError where the model holds no whole weights and has no name to load it by.
    """
    holder = "ZeRO-3" if is_partitioned(model) else "tensor parallelism"
    if not is_partitioned(model) and size_of(model) == 1:
        return copy.deepcopy(model)
    if name is None:
        raise ValueError(
            f"{holder} holds the weights of the model that was given, so that they cannot be copied "
            "for the reference: give the model by its name, pass ref_model, or set "
            "precompute_ref_log_probs"
        )
    return load_model(name, {"dtype": model.dtype, **init_kwargs})
