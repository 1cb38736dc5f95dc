"""Options that compose with any pairwise objective: WPO's weights and an NLL term.

Each wraps an objective and is one itself: `WithNLL(WPO(DPO(0.1)), rpo_alpha=1.0)`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prefkern.objectives.adaptive import MAX_LOG_RATIO, Adaptive
from prefkern.objectives.base import (
    Objective,
    PairLoss,
    Pairs,
    check_kind,
    require_bool,
    require_positive,
    weighed,
)


class Wrapper(Objective):
    """An objective around another one: needs what it needs, and has its beta."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        if not isinstance(objective, Objective):
            raise TypeError(f"objective must be a pairwise objective, got {objective!r}")
        self.objective = objective

    @property
    def needs_reference(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.objective.needs_reference

    @property
    def needs_reward_margins(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.objective.needs_reward_margins

    @property
    def needs_alignments(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.objective.needs_alignments

    @property
    def needs_kls(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.objective.needs_kls

    @property
    def observes(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.objective.observes

    @property
    def adaptive(self) -> Adaptive | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.objective.adaptive

    @property
    def beta(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.objective.beta

    def observe(self, pairs: Pairs) -> None:
        self.objective.observe(pairs)

    def metrics(self, pairs: Pairs, result: PairLoss) -> dict[str, Tensor]:
        return self.objective.metrics(pairs, result)


class WithNLL(Wrapper):
    """`loss - rpo_alpha L_w / n_w`: the chosen response's NLL per token beside a preference loss.

    As in RPO (Pang et al. 2024) and TRL's `rpo_alpha`; the mean is over a response's tokens. A
    pair that the objective's own draw leaves out (BetaDPO) has the term still.

    Args:
        objective: any pairwise objective.
        rpo_alpha: weight of the term, > 0.
    """

    def __init__(self, objective: Objective, rpo_alpha: float = 1.0) -> None:
        super().__init__(objective)
        self.rpo_alpha = require_positive("rpo_alpha", rpo_alpha)

    def forward(self, pairs: Pairs) -> PairLoss:
        check_kind("pairs", pairs, Pairs)
        # Asked for first: an objective that raises must not have moved its statistics.
        lengths, _ = pairs.lengths("rpo_alpha")
        result = self.objective(pairs)
        nll = -pairs.chosen_logps / lengths
        return result._replace(losses=result.losses + self.rpo_alpha * nll)

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
        alignment: whether a token's probability is set against what sampling would expect of it,
            so that responses of the policy itself have weights around 1.
    """

    def __init__(self, objective: Objective, alignment: bool = True) -> None:
        super().__init__(objective)
        self.alignment = require_bool("alignment", alignment)

    @property
    def needs_alignments(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.alignment or self.objective.needs_alignments

    def forward(self, pairs: Pairs) -> PairLoss:
        check_kind("pairs", pairs, Pairs)
        weight = self.weight(pairs)
        result = self.objective(pairs)
        return result._replace(losses=weighed(weight, result.losses))

    @torch.no_grad()
    def weight(self, pairs: Pairs) -> Tensor:  # (B,)
        if self.alignment:
            chosen, rejected = pairs.alignments("WPO")
        else:
            n_chosen, n_rejected = pairs.lengths("WPO")
            chosen, rejected = pairs.chosen_logps / n_chosen, pairs.rejected_logps / n_rejected
        return (chosen + rejected).clamp(max=MAX_LOG_RATIO).exp()

    def metrics(self, pairs: Pairs, result: PairLoss) -> dict[str, Tensor]:
        return {**super().metrics(pairs, result), "wpo/weight": self.weight(pairs)}

    def extra_repr(self) -> str:
        return f"alignment={self.alignment}"
