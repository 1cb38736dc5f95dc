"""Omni-DPO (later named Uni-DPO): a weight from the data's quality, and one from the policy."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prefkern.objectives import citations
from prefkern.objectives.adaptive import Adaptive
from prefkern.objectives.base import PairLoss, Pairs, weighed
from prefkern.objectives.checks import require_not_negative, require_number, require_positive
from prefkern.objectives.contrastive import Contrastive
from prefkern.objectives.madpo import MAX_MARGIN


class OmniDPO(Contrastive):
    """Omni-DPO (Peng et al. 2025): `-w_qual w_perf logsigmoid(b_w rho_w/n_w - b_l rho_l/n_l) + NLL`.

        w_qual = sigmoid(eta h)                                        h the reward margin
        w_perf = (1 - sigmoid(beta (L_w/n_w - L_l/n_l) - tau))^gamma   falls as the pair is learnt
        NLL    = -nll_weight L_w/n_w where R_w > L_w, else 0

    w_perf carries a gradient, as in the authors' code. There the NLL term also asks that the chosen
    response's own score reach a bound; a pair has the margin of the scores only, so here it does
    not. As in SimPO, the adaptive ratio counts tokens.

    Args:
        beta: scale of the log-ratios per token, > 0.
        eta: how fast the weight rises with the margin, >= 0.
        tau: the policy's margin at which a pair counts as learnt, any number.
        gamma: how much less a learnt pair counts, >= 0; 0 leaves w_perf out.
        nll_weight: weight of the chosen response's NLL per token, >= 0.
        adaptive: per-pair coefficients of the log-ratios.
    """

    papers = (citations.OMNI_DPO,)
    score = "mean_log_ratio"
    counts_lengths = True
    needs_reward_margins = True
    eta: float
    tau: float
    gamma: float

    def __init__(
        self,
        beta: float = 2.0,
        eta: float = 0.7,
        tau: float = 0.8,
        gamma: float = 3.0,
        nll_weight: float = 1e-3,
        adaptive: Adaptive | None = None,
    ) -> None:
        super().__init__()
        self.set_options(
            beta=require_positive("beta", beta),
            eta=require_not_negative("eta", eta),
            tau=require_number("tau", tau),
            gamma=require_not_negative("gamma", gamma),
            nll_weight=require_not_negative("nll_weight", nll_weight),
            adaptive=adaptive,
        )

    def weight(self, pairs: Pairs) -> Tensor:
        h = pairs.margins(self._name).detach().to(pairs.chosen_logps.dtype)
        n_chosen, n_rejected = pairs.lengths(self._name)
        log_weight = F.logsigmoid(self.eta * h.clamp(-MAX_MARGIN, MAX_MARGIN))
        # A gamma of 0 leaves the policy's margin out even where it is infinite.
        if self.gamma:
            gap = self.beta * (pairs.chosen_logps / n_chosen - pairs.rejected_logps / n_rejected)
            # (1 - sigmoid(x))^gamma = exp(gamma logsigmoid(-x))
            log_weight = log_weight + self.gamma * F.logsigmoid(self.tau - gap)
        return log_weight.exp()

    def nll(self, pairs: Pairs) -> Tensor:
        ref_chosen, _ = pairs.reference(self._name)
        # A NaN is below nothing, and must stay visible.
        is_above = (pairs.chosen_logps >= ref_chosen).to(pairs.chosen_logps.dtype)
        return weighed(1 - is_above, super().nll(pairs))

    def metrics(self, pairs: Pairs, result: PairLoss) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"omni_dpo/weight": self.weight(pairs)}

    def pair_kernel_options(self) -> dict[str, Any] | None:
        options = super().pair_kernel_options()
        assert options is not None
        focal = {"eta": self.eta, "tau": self.tau, "gamma": self.gamma, "max_margin": MAX_MARGIN}
        return {**options, "focal_weight": focal, "nll_below_reference": True}
