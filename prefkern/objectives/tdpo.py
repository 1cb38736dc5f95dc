"""TDPO (Zeng et al. 2024): DPO with the sequential KL to the reference, token by token.

`K = sum_t KL(reference || policy)` over a response's tokens needs the distributions of both heads,
which the operator folds tile by tile. With rho = log P/R,

    TDPO1   -logsigmoid(beta ((rho_w - rho_l) - (K_l - K_w)))             alpha-DPO's Eq. 17 and 18
    TDPO2   -logsigmoid(beta ((rho_w - rho_l) - alpha (K_l - sg[K_w])))

so that gradients reach the two divergences as well as the log-probs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prefkern.objectives import citations
from prefkern.objectives.base import Objective, PairLoss, Pairs
from prefkern.objectives.checks import require_kind, require_not_negative, require_positive


class TDPO1(Objective):
    """TDPO1: `-logsigmoid(beta ((rho_w - rho_l) - (K_l - K_w)))`.

    Args:
        beta: strength of the pull to the reference, > 0.
    """

    papers = (citations.TDPO,)
    needs_kls = True

    def __init__(self, beta: float = 0.1) -> None:
        super().__init__()
        self.beta = require_positive("beta", beta)

    def forward(self, pairs: Pairs) -> PairLoss:
        require_kind("pairs", pairs, Pairs)
        ref_chosen, ref_rejected = pairs.reference(type(self).__name__)
        chosen_kls, rejected_kls = pairs.kls(type(self).__name__)
        rho_chosen = pairs.chosen_logps - ref_chosen
        rho_rejected = pairs.rejected_logps - ref_rejected
        delta = (rho_chosen - rho_rejected) - self.divergence(chosen_kls, rejected_kls)
        betas = rho_chosen.new_full(rho_chosen.shape, self.beta)
        # A reward is ratio plus divergence, as in the authors' code.
        return PairLoss(
            -F.logsigmoid(self.beta * delta),
            betas,
            betas,
            (self.beta * (rho_chosen + chosen_kls)).detach(),
            (self.beta * (rho_rejected + rejected_kls)).detach(),
        )

    def divergence(self, chosen_kls: Tensor, rejected_kls: Tensor) -> Tensor:  # (B,)
        return rejected_kls - chosen_kls

    def metrics(self, pairs: Pairs, result: PairLoss) -> dict[str, Tensor]:
        chosen_kls, rejected_kls = pairs.kls(type(self).__name__)
        return {"kl/chosen": chosen_kls.detach(), "kl/rejected": rejected_kls.detach()}

    def extra_repr(self) -> str:
        return f"beta={self.beta}"


class TDPO2(TDPO1):
    """TDPO2: `-logsigmoid(beta ((rho_w - rho_l) - alpha (K_l - sg[K_w])))`.

    Args:
        beta: strength of the pull to the reference, > 0.
        alpha: weight of the divergences, >= 0; 0 is DPO.
    """

    papers = (citations.TDPO,)

    def __init__(self, beta: float = 0.1, alpha: float = 0.5) -> None:
        super().__init__(beta)
        self.alpha = require_not_negative("alpha", alpha)

    def divergence(self, chosen_kls: Tensor, rejected_kls: Tensor) -> Tensor:
        # A divergence may be infinite, and 0 times that is NaN.
        if not self.alpha:
            return torch.zeros_like(rejected_kls)
        return self.alpha * (rejected_kls - chosen_kls.detach())

    def extra_repr(self) -> str:
        return f"beta={self.beta}, alpha={self.alpha}"
