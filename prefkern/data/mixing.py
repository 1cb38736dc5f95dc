"""Several datasets as one: each is tokenised and reported on its own, then they are mixed.

Without weights every row of every dataset is there once, so that a dataset has a share by its size.
With weights each row is drawn from a dataset with the probability of its weight, and the mix ends
with the first dataset that has no row left: no row is there twice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from prefkern.data.columns import TYPE_COLUMNS
from prefkern.data.report import DatasetReport


@dataclass(frozen=True)
class DatasetMix:
    """Datasets to train on together.

    Args:
        parts: the datasets by name.
        weights: a number above 0 for each, in their order; None: by their sizes.

    Raises TypeError and ValueError for parts or weights of another kind.
    """

    parts: Mapping[str, Any]
    weights: Sequence[float] | None = field(default=None)

    def __post_init__(self) -> None:
        if not (isinstance(self.parts, Mapping) and self.parts):
            raise TypeError(f"parts must be a mapping of names to datasets, got {self.parts!r}")
        check_weights("weights", self.weights, len(self.parts))

    def of(self, parts: Mapping[str, Any]) -> DatasetMix:
        """The same mix of other forms of its datasets."""
        return DatasetMix(parts, self.weights)

    def mixed(self, seed: int, reports: dict[str, DatasetReport]) -> Any:
        """One tokenised dataset of these, whose weights put into the reports what was drawn.

        Raises ValueError unless all have the same columns.
        """
        import datasets

        (first, model), *others = self.parts.items()
        for name, part in others:
            different = {*model.column_names} ^ {*part.column_names}
            if different:
                # A dataset has the types of tokens by its pictures.
                given = sorted(different - {*TYPE_COLUMNS.values()} or different)
                raise ValueError(
                    f"datasets {first!r} and {name!r} cannot be mixed: one of them alone has "
                    f"{', '.join(map(repr, given))}; give it to both, or remove it"
                )
        parts = [model, *(part.cast(model.features) for _, part in others)]
        if self.weights is None:
            return datasets.concatenate_datasets(parts)
        total = sum(self.weights)
        probabilities = [weight / total for weight in self.weights]
        marked = [part.add_column("_part", [at] * len(part)) for at, part in enumerate(parts)]
        mix = datasets.interleave_datasets(marked, probabilities=probabilities, seed=seed)
        drawn = mix.with_format("numpy")["_part"][:]
        for at, name in enumerate(self.parts):
            reports[name] = replace(reports[name], drawn=int((drawn == at).sum()))
        return mix.remove_columns("_part")


def check_weights(name: str, weights: Any, count: int) -> None:
    """Raise unless there is a weight above 0 for each of `count` datasets, or None."""
    if weights is None:
        return
    are_numbers = isinstance(weights, Sequence) and all(
        isinstance(each, int | float) and not isinstance(each, bool) for each in weights
    )
    if not are_numbers or isinstance(weights, str):
        raise TypeError(f"{name} must be a list of numbers or None, got {weights!r}")
    if len(weights) != count or not all(math.isfinite(each) and each > 0 for each in weights):
        raise ValueError(
            f"{name} must be finite and above 0, one for each of {count} datasets, got {weights!r}"
        )
