"""Options that compose with any pairwise objective: WPO's weights and an NLL term.

Each wraps an objective and is one itself: `WithNLL(WPO(DPO(0.1)), rpo_alpha=1.0)`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prefkern.objectives import citations
from prefkern.objectives.adaptive import MAX_LOG_RATIO
from prefkern.objectives.base import Objective, PairLoss, Pairs, weighed
from prefkern.objectives.checks import require_bool, require_kind, require_positive


def _inner(name: str) -> Any:
    """An attribute that is the wrapped objective's."""
    return property(lambda wrapper: getattr(wrapper.objective, name))


class Wrapper(Objective):
    """An objective around another one: it needs what that one needs, and has its beta."""

    needs_reference = _inner("needs_reference")
    needs_reward_margins = _inner("needs_reward_margins")
    needs_alignments = _inner("needs_alignments")
    needs_kls = _inner("needs_kls")
    needs_gold = _inner("needs_gold")
    observes = _inner("observes")
    weighs_pairs = _inner("weighs_pairs")
    adaptive = _inner("adaptive")
    beta = _inner("beta")
    # What it adds to the title of the wrapped objective.
    _adds: str

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        if not isinstance(objective, Objective):
            raise TypeError(f"objective must be a pairwise objective, got {objective!r}")
        self.objective = objective

    @property
    def moves_beta(self) -> bool:
        return self.objective.moves_beta

    @property
    def title(self) -> str:
        return f"{self.objective.title}, with {self._adds}"

    def citations(self) -> tuple[citations.Paper, ...]:
        return citations.without_repeats([*self.objective.citations(), *self.papers])

    def observe(self, pairs: Pairs) -> None:
        self.objective.observe(pairs)

    def metrics(self, pairs: Pairs, result: PairLoss) -> dict[str, Tensor]:
        return self.objective.metrics(pairs, result)


class WithNLL(Wrapper):
    """`loss - rpo_alpha L_w / n_w`: a preference loss plus the chosen response's NLL per token.

    As in RPO (Pang et al. 2024) and TRL's `rpo_alpha`; the mean is over a response's tokens. A pair
    that BetaDPO does not draw still has this term.

    Args:
        objective: any pairwise objective.
        rpo_alpha: weight of the term, > 0.
    """

    papers = (citations.RPO,)
    _adds = "an NLL term"

    def __init__(self, objective: Objective, rpo_alpha: float = 1.0) -> None:
        super().__init__(objective)
        self.rpo_alpha = require_positive("rpo_alpha", rpo_alpha)

    def forward(self, pairs: Pairs) -> PairLoss:
        require_kind("pairs", pairs, Pairs)
        # Before the objective runs: if lengths are missing, its statistics must not have moved.
        lengths, _ = pairs.lengths("rpo_alpha")
        result = self.objective(pairs)
        nll = -pairs.whole()[0] / lengths
        return result.with_losses(result.losses + self.rpo_alpha * nll)

    def gold_terms(self, pairs: Pairs) -> Tensor | None:
        return self.objective.gold_terms(pairs)

    def pair_kernel_options(self) -> dict[str, Any] | None:
        options = self.objective.pair_kernel_options()
        if options is None:
            return None
        return {**options, "nll_weight": options["nll_weight"] + self.rpo_alpha}

    def extra_repr(self) -> str:
        return f"rpo_alpha={self.rpo_alpha}"


class WPO(Wrapper):
    """WPO (Zhou et al. 2024): a pair's loss times how probable the policy finds its responses.

    `w_w w_l loss`, where w of a response is `exp(mean_t a_t)`, a constant, and

        a_t = log p(y_t) - log sum_v p(v)^2   with alignment (the paper's sampled alignment)
        a_t = log p(y_t)                      without

    Args:
        objective: any pairwise objective.
        alignment: compare a token's log-prob with its mean under sampling, so that responses of
            the policy itself have weights around 1.
    """

    papers = (citations.WPO,)
    _adds = "WPO's weights"

    def __init__(self, objective: Objective, alignment: bool = True) -> None:
        super().__init__(objective)
        if not self.weighs_pairs:
            raise ValueError(
                "use_weighting (WPO) weighs pairs, and the terms of AOT compare responses of "
                "different pairs; leave it out"
            )
        self.alignment = require_bool("alignment", alignment)

    @property
    def needs_alignments(self) -> bool:
        return self.alignment or self.objective.needs_alignments

    def forward(self, pairs: Pairs) -> PairLoss:
        require_kind("pairs", pairs, Pairs)
        weight = self.weight(pairs)
        result = self.objective(pairs)
        return result.with_losses(weighed(weight, result.losses))

    @torch.no_grad()
    def weight(self, pairs: Pairs) -> Tensor:  # (B,)
        if self.alignment:
            chosen, rejected = pairs.alignments("WPO")
        else:
            n_chosen, n_rejected = pairs.lengths("WPO")
            chosen, rejected = pairs.whole()
            chosen, rejected = chosen / n_chosen, rejected / n_rejected
        return (chosen + rejected).clamp(max=MAX_LOG_RATIO).exp()

    def metrics(self, pairs: Pairs, result: PairLoss) -> dict[str, Tensor]:
        return {**super().metrics(pairs, result), "wpo/weight": self.weight(pairs)}

    def extra_repr(self) -> str:
        return f"alignment={self.alignment}"
