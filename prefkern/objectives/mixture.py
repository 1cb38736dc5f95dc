"""Several objectives on the same pairs, as one: `sum_i w_i loss_i`.

    Mixture([DPO(0.1), BCO(0.1), SFT()], loss_weights=[0.8, 0.2, 1.0])      MPO (Wang et al. 2024)

The policy's log-probs are computed once, however many objectives read them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

from torch import Tensor, nn

from prefkern.objectives import citations
from prefkern.objectives.adaptive import Adaptive
from prefkern.objectives.base import Objective, PairLoss, Pairs
from prefkern.objectives.checks import require_kind, require_positive, shown


def _any(name: str) -> Any:
    """Whether any of the objectives declares a need."""
    return property(lambda mixture: any(getattr(part, name) for part in mixture.parts))


class Mixture(Objective):
    """A weighted sum of pairwise objectives, as TRL's lists of `loss_type` with `loss_weights`.

    Each pair's loss is `sum_i w_i loss_i`; it needs what any of the objectives needs. Coefficients,
    rewards, `beta` and `adaptive` are those of the first objective, so put the one first that the
    log shall show. A metric that several objectives have carries the position of each after the
    first: "wpo/weight", "wpo/weight_2".

    Args:
        objectives: at least one pairwise objective, each of them an object of its own. A Mixture
            among them counts as its objectives.
        loss_weights: a weight > 0 for each of them; None: 1 for each.

    Raises TypeError for anything but pairwise objectives, and ValueError for another number of
    weights, or for one that is not positive.
    """

    papers = (citations.MPO,)
    needs_reference = _any("needs_reference")
    needs_reward_margins = _any("needs_reward_margins")
    needs_alignments = _any("needs_alignments")
    needs_kls = _any("needs_kls")
    needs_gold = _any("needs_gold")
    observes = _any("observes")
    weighs_pairs: bool = property(lambda mixture: all(each.weighs_pairs for each in mixture.parts))  # pyright: ignore[reportAssignmentType]
    # Of the first objective.
    adaptive: Adaptive | None = property(lambda mixture: mixture.parts[0].adaptive)  # pyright: ignore[reportAssignmentType]
    beta: float = property(lambda mixture: mixture.parts[0].beta)  # pyright: ignore[reportAssignmentType]

    def __init__(
        self, objectives: Sequence[Objective], loss_weights: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        given = list(objectives) if isinstance(objectives, Iterable) else []
        if not given or not all(isinstance(each, Objective) for each in given):
            raise TypeError(f"objectives must be pairwise objectives, got {shown(objectives)}")
        if loss_weights is None:
            loss_weights = [1.0] * len(given)
        if not isinstance(loss_weights, list | tuple) or len(loss_weights) != len(given):
            raise ValueError(
                f"loss_weights must be {len(given)} numbers, one for each objective, got "
                f"{shown(loss_weights)}"
            )
        parts: list[Objective] = []
        self.loss_weights: list[float] = []
        for i, (objective, weight) in enumerate(zip(given, loss_weights, strict=True)):
            weight = require_positive(f"loss_weights[{i}]", weight)
            is_mixture = isinstance(objective, Mixture)
            parts += objective.objectives if is_mixture else [objective]
            inner = objective.loss_weights if is_mixture else [1.0]
            self.loss_weights += [weight * each for each in inner]
        if len({id(each) for each in parts}) < len(parts):
            raise ValueError("objectives has the same objective twice; give it once, with a weight")
        self.parts = nn.ModuleList(parts)
        # Of the last batch, for the metrics.
        self._results: list[PairLoss] = []

    @property
    def moves_beta(self) -> bool:
        return self.objectives[0].moves_beta

    @property
    def title(self) -> str:
        return " + ".join(part.title for part in self.objectives)

    def citations(self) -> tuple[citations.Paper, ...]:
        cited = [paper for part in self.objectives for paper in part.citations()]
        return citations.without_repeats([*cited, *self.papers])

    def forward(self, pairs: Pairs) -> PairLoss:
        require_kind("pairs", pairs, Pairs)
        # If a number is missing, no statistics must have moved: those that keep any come last.
        order = sorted(range(len(self.parts)), key=lambda i: self.objectives[i].observes)
        results = {i: self.parts[i](pairs) for i in order}
        return self.combined([results[i] for i in range(len(results))])

    def combined(self, results: Sequence[PairLoss]) -> PairLoss:
        """The mixture of what its objectives returned, in their order; kept for the metrics."""
        self._results = [PairLoss(*(value.detach() for value in result)) for result in results]
        return results[0].with_losses(self.weighted([result.losses for result in results]))

    def weighted(self, values: Iterable[Tensor]) -> Tensor:
        """`sum_i w_i x_i` of one tensor for each objective."""
        first, *others = (w * x for w, x in zip(self.loss_weights, values, strict=True))
        return sum(others, first)

    def observe(self, pairs: Pairs) -> None:
        for part in self.objectives:
            if part.observes:
                part.observe(pairs)

    def metrics(self, pairs: Pairs, result: PairLoss) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for i, (part, own) in enumerate(zip(self.objectives, self._results, strict=True)):
            for name, value in part.metrics(pairs, own).items():
                values[name if name not in values else f"{name}_{i + 1}"] = value
        return values

    def gold_terms(self, pairs: Pairs) -> Tensor | None:
        terms = [part.gold_terms(pairs) for part in self.objectives]
        weighed = [w * x for w, x in zip(self.loss_weights, terms, strict=True) if x is not None]
        return sum(weighed[1:], weighed[0]) if weighed else None

    def pair_kernel_terms(self) -> list[dict[str, Any]] | None:
        terms = [part.pair_kernel_options() for part in self.objectives]
        return None if None in terms else cast(list[dict[str, Any]], terms)

    def extra_repr(self) -> str:
        return f"loss_weights={self.loss_weights}"

    @property
    def objectives(self) -> list[Objective]:
        return cast(list[Objective], list(self.parts))
