"""AOT (Melnyk et al. 2024): a preference loss of sorted numbers, over the batch of all ranks.

DPO compares the two responses of a pair. AOT asks that one distribution lies above another, and
compares their quantiles, the sorted values of a batch:

    AOT           sort(L_w - L_l) - sort(R_w - R_l)    margins of the policy and of the reference
    AOTUnpaired   sort(rho_w) - sort(rho_l)            chosen and rejected log-ratios

Batches are those of all ranks while training. Each rank gets the exact gradient of its own pairs
in the mean over all of them. In evaluation, ranks may end at different times, so each sorts its own
batch. Differences are taken in float64: two responses of other prompts have sums of other sizes.

Adaptive coefficients (AdaDPO, Eq. 8) are those of the two responses that a term compares. In
`AOTUnpaired` these are of two pairs. In `AOT` a term compares a pair's policy with another pair's
reference, so each margin has the coefficient of its own pair. For a batch of one pair, both are DPO.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from prefkern.devices import as_double, back
from prefkern.objectives import citations
from prefkern.objectives.adaptive import Adaptive
from prefkern.objectives.base import PairLoss, Pairs, weighed
from prefkern.objectives.checks import require_below, require_kind, require_positive
from prefkern.objectives.contrastive import Contrastive
from prefkern.objectives.links import linked
from prefkern.objectives.running import gather

# What a term reads of each pair.
_COLUMNS = (
    "chosen_logps",
    "rejected_logps",
    "ref_chosen_logps",
    "ref_rejected_logps",
    "chosen_lengths",
    "rejected_lengths",
)


class _Sorted(Contrastive):
    """What both have in common."""

    weighs_pairs = False

    def __init__(
        self, beta: float = 0.1, label_smoothing: float = 0.0, adaptive: Adaptive | None = None
    ) -> None:
        super().__init__()
        self.set_options(
            beta=require_positive("beta", beta),
            label_smoothing=require_below("label_smoothing", label_smoothing, 0.5),
            adaptive=adaptive,
        )

    def forward(self, pairs: Pairs) -> PairLoss:
        require_kind("pairs", pairs, Pairs)
        pairs.reference(self._name)
        values = {name: getattr(pairs, name) for name in _COLUMNS}
        wide = replace(pairs, **{name: as_double(x) for name, x in values.items() if x is not None})
        return PairLoss(*(back(value, pairs.chosen_logps) for value in self._terms(wide)))

    def _terms(self, pairs: Pairs) -> PairLoss:
        raise NotImplementedError(f"{type(self).__name__} does not define _terms(pairs)")

    def _everyone(self, values: Tensor) -> tuple[Tensor, slice]:  # (B, ...)
        """The values of all ranks, and where this rank's lie among them."""
        return gather(values) if self.training else (values, slice(0, len(values)))

    def _loss(self, delta: Tensor) -> Tensor:
        return linked(self.link, delta, self.label_smoothing)

    def pair_kernel_options(self) -> None:
        """None: a pair's loss depends on the others."""


class AOT(_Sorted):
    """AOT on pairs: `-logsigmoid(m_w - m_r)`, the k-th smallest margin of policy and reference.

    `m_w = sort(b_w L_w - b_l L_l)`, `m_r = sort(b_w R_w - b_l R_l)`. A pair's loss is that of its
    policy's margin.

    Args:
        beta: as in DPO, > 0.
        label_smoothing: probability that a preference is flipped, in [0, 0.5).
        adaptive: coefficients of each pair's two margins.
    """

    papers = (citations.AOT,)

    def _terms(self, pairs: Pairs) -> PairLoss:
        ref_chosen, ref_rejected = pairs.reference(self._name)
        beta_chosen, beta_rejected = self.coefficients(pairs)

        def margin(chosen: Tensor, rejected: Tensor) -> Tensor:
            return weighed(beta_chosen, chosen) - beta_rejected * rejected

        policy = margin(pairs.chosen_logps, pairs.rejected_logps)
        with torch.no_grad():
            margins = torch.stack([policy, margin(ref_chosen, ref_rejected)], dim=1)
            everyone, mine = self._everyone(margins)
            quantiles = everyone[:, 1].sort().values
            places = _inverse(everyone[:, 0].argsort(stable=True))[mine]
        return PairLoss(
            self._loss(policy - quantiles[places]),
            beta_chosen,
            beta_rejected,
            weighed(beta_chosen, pairs.chosen_logps - ref_chosen).detach(),
            (beta_rejected * (pairs.rejected_logps - ref_rejected)).detach(),
        )


class AOTUnpaired(_Sorted):
    """AOT on log-ratios: `-logsigmoid(b_w rho_w - b_l rho_l)`, each the k-th smallest of its kind.

    A pair's loss is that of its chosen response, whose partner may be of another pair.

    Args:
        beta: as in DPO, > 0.
        label_smoothing: probability that a preference is flipped, in [0, 0.5).
        adaptive: coefficients of the two responses that are compared.
    """

    papers = (citations.AOT,)

    def _terms(self, pairs: Pairs) -> PairLoss:
        own = {name: getattr(pairs, name) for name in _COLUMNS}
        own = {name: value for name, value in own.items() if value is not None}
        gathered, mine = self._everyone(torch.stack([*own.values()], dim=1).detach())
        everyone = dict(zip(own, gathered.unbind(1), strict=True))
        # This rank's own log-probs carry their gradients.
        for name in ("chosen_logps", "rejected_logps"):
            others = everyone[name]
            everyone[name] = torch.cat([others[: mine.start], own[name], others[mine.stop :]])
        rho = {
            side: (everyone[f"{side}_logps"] - everyone[f"ref_{side}_logps"])
            for side in ("chosen", "rejected")
        }
        order = {side: x.detach().argsort(stable=True) for side, x in rho.items()}
        # The k-th pair has the k-th smallest chosen and the k-th smallest rejected response.
        compared = Pairs(
            **{
                name: value[order["rejected" if "rejected" in name else "chosen"]]
                for name, value in everyone.items()
            }
        )
        beta_chosen, beta_rejected = self.coefficients(compared)
        delta = weighed(beta_chosen, rho["chosen"][order["chosen"]])
        terms = self._loss(delta - beta_rejected * rho["rejected"][order["rejected"]])
        place = {side: _inverse(x)[mine] for side, x in order.items()}
        losses = terms[place["chosen"]]
        # A rejected response whose partner is on another rank: that rank has the loss, this one
        # the gradient.
        partner = order["chosen"][place["rejected"]]
        is_elsewhere = (partner < mine.start) | (partner >= mine.stop)
        lent = terms[place["rejected"]]
        losses = losses + torch.where(is_elsewhere, lent - lent.detach(), 0.0)
        beta_chosen, beta_rejected = beta_chosen[place["chosen"]], beta_rejected[place["rejected"]]
        return PairLoss(
            losses,
            beta_chosen,
            beta_rejected,
            weighed(beta_chosen, rho["chosen"][mine]).detach(),
            (beta_rejected * rho["rejected"][mine]).detach(),
        )


def _inverse(order: Tensor) -> Tensor:  # (N,) int64
    """The place of each element in an order."""
    places = torch.arange(len(order), device=order.device)
    return torch.empty_like(order).scatter_(0, order, places)
