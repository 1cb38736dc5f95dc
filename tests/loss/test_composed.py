"""Composed objectives and TPO with holes, against formulas written out here on logits in float64.

Value, hidden states' gradient and the head's, of the reference in float64 and of the fused loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from prefkern import FusedPreferenceLoss, objectives, reference
from prefkern.objectives import CPO, DPO, IPO, TPO, WPO, Mixture, SimPO, WithNLL
from support.machine import BACKENDS

F = torch.nn.functional
B, T, H, V = 3, 7, 8, 29
IGNORED = -100
LENGTHS = {2: [5, 3, 7, 4, 6, 1], 3: [5, 3, 7, 4, 6, 1, 2, 7, 3]}


class Sums(NamedTuple):
    """Of each pair's responses: sums of log-probs, lengths, the reference's sums, alignments."""

    logps: torch.Tensor  # (responses, B)
    lengths: torch.Tensor
    ref: torch.Tensor
    aligned: torch.Tensor

    @property
    def means(self) -> torch.Tensor:
        """A response without tokens has no mean to add."""
        return self.logps / self.lengths.clamp(min=1)

    @property
    def rho(self) -> torch.Tensor:
        return self.logps[:2] - self.ref[:2]


def batch(lengths: list[int]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    rows = len(lengths)
    labels = torch.randint(V, (rows, T), generator=generator)
    for row, length in enumerate(lengths):
        labels[row, length:] = IGNORED
    return {
        "hidden": torch.randn((rows, T, H), generator=generator, dtype=torch.float64),
        "weight": torch.randn((V, H), generator=generator, dtype=torch.float64),
        "labels": labels,
        "ref_logps": -20 * torch.rand(rows, generator=generator, dtype=torch.float64),
    }


def summed(given: dict[str, torch.Tensor], responses: int) -> Sums:
    """Row by row, from the logits."""
    logps, lengths, aligned = [], [], []
    for hidden, labels in zip(given["hidden"], given["labels"], strict=True):
        log_p = (hidden @ given["weight"].T).log_softmax(-1)
        own = [log_p[t, y] for t, y in enumerate(labels.tolist()) if y != IGNORED]
        gaps = [
            log_p[t, y] - log_p[t].exp().square().sum().log()
            for t, y in enumerate(labels.tolist())
            if y != IGNORED
        ]
        zero = hidden.sum() * 0
        logps.append(sum(own, zero))
        aligned.append(sum(gaps, zero).detach() / max(len(gaps), 1))
        lengths.append(len(own))
    found = (torch.stack(logps), torch.tensor(lengths), given["ref_logps"], torch.stack(aligned))
    return Sums(*(each.view(responses, -1) for each in found))


def dpo(s: Sums) -> torch.Tensor:
    return -F.logsigmoid(0.3 * (s.rho[0] - s.rho[1]))


def ipo(s: Sums) -> torch.Tensor:
    return (s.rho[0] - s.rho[1] - 1 / (2 * 0.4)).square()


def nll(s: Sums) -> torch.Tensor:
    return -s.means[0]


def simpo(s: Sums) -> torch.Tensor:
    return -F.logsigmoid(2.0 * (s.means[0] - s.means[1]) - 0.5)


def cpo(s: Sums) -> torch.Tensor:
    return -F.logsigmoid(0.2 * (s.logps[0] - s.logps[1])) + 0.5 * nll(s)


def weight(s: Sums, alignment: bool = True) -> torch.Tensor:
    return (s.aligned if alignment else s.means)[:2].sum(0).detach().exp()


def mixture() -> Mixture:
    parts = [DPO(0.3), IPO(0.4), CPO(0.2, nll_weight=0.5)]
    return Mixture(parts, loss_weights=[0.5, 1.5, 2.0])


def mixed(s: Sums) -> torch.Tensor:
    return 0.5 * dpo(s) + 1.5 * ipo(s) + 2.0 * cpo(s)


COMPOSED: dict[str, tuple[Callable, Callable[[Sums], torch.Tensor]]] = {
    "NLL around WPO around a mixture": (
        lambda: WithNLL(WPO(mixture()), 0.7),
        lambda s: weight(s) * mixed(s) + 0.7 * nll(s),
    ),
    "WPO around NLL around a mixture": (
        lambda: WPO(WithNLL(mixture(), 0.7), alignment=False),
        lambda s: weight(s, alignment=False) * (mixed(s) + 0.7 * nll(s)),
    ),
    "a mixture of both": (
        lambda: Mixture([WPO(DPO(0.3)), WithNLL(SimPO(2.0, 0.5), 0.7), IPO(0.4)], [2.0, 0.5, 1.5]),
        lambda s: 2.0 * weight(s) * dpo(s) + 0.5 * (simpo(s) + 0.7 * nll(s)) + 1.5 * ipo(s),
    ),
    "a mixture in a mixture under NLL": (
        lambda: WithNLL(Mixture([Mixture([DPO(0.3)], [3.0]), IPO(0.4)], [2.0, 0.5]), 0.1),
        lambda s: 6.0 * dpo(s) + 0.5 * ipo(s) + 0.1 * nll(s),
    ),
}


def tpo_terms(s: Sums, loss_type: str) -> torch.Tensor:
    chosen, rejected, _ = s.logps
    m_chosen, m_rejected, gold = s.means
    pair = {
        "sigmoid": lambda: -F.logsigmoid(0.4 * (chosen - rejected)),
        "hinge": lambda: (1 - 0.4 * (chosen - rejected)).relu(),
        "ipo": lambda: (m_chosen - m_rejected - 1 / (2 * 0.4)).square(),
        "tpo-l": lambda: -F.logsigmoid(0.4 * (m_chosen - m_rejected) - 0.5),
    }[loss_type]
    return pair() - 0.8 * gold


def held(objective: Callable, formula: Callable, lengths: list[int], responses: int, backend: str):
    """Of all in float64 on logits, and of the fused loss in float32."""
    given = batch(lengths)
    leaves = {name: given[name].requires_grad_() for name in ("hidden", "weight")}
    losses = formula(summed(given, responses))
    true = torch.autograd.grad(losses.mean(), [*leaves.values()])
    made = objective()
    options = {} if not made.needs_reference else {"ref_logps": given["ref_logps"][: 2 * B]}
    out = reference.preference_loss(made, **leaves, labels=given["labels"], **options)
    found = torch.autograd.grad(out.loss, [*leaves.values()])
    for mine, exact in zip((out.losses, *found), (losses, *true), strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-10, atol=1e-12)
    single = {name: value.detach().float().requires_grad_() for name, value in leaves.items()}
    options = {name: value.float() for name, value in options.items()}
    loss_fn = FusedPreferenceLoss(objective(), backend=backend)
    out = loss_fn(**single, labels=given["labels"], **options)
    found = torch.autograd.grad(out.loss, [*single.values()])
    for mine, exact in zip((out.losses, *found), (losses, *true), strict=True):
        error = (mine.double() - exact).norm()
        assert error <= 2e-5 * exact.norm().clamp(min=1.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", COMPOSED)
def test_composed_objectives_are_their_formulas(name, backend):
    held(*COMPOSED[name], LENGTHS[2], 2, backend)


HOLES = {
    "none": [],
    "a gold response without tokens": [6],
    "all gold responses without tokens": [6, 7, 8],
    "a chosen response without tokens": [1],
    "a rejected response without tokens": [4],
    "a pair without tokens": [2, 5],
    "a row without tokens": [0, 3, 6],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "tpo-l"])
@pytest.mark.parametrize("hole", HOLES)
def test_tpo_with_holes(hole, loss_type, backend):
    """A response that was cut to nothing adds nothing, and no NaN; others are as without it."""
    lengths = [0 if row in HOLES[hole] else length for row, length in enumerate(LENGTHS[3])]
    make = lambda: TPO(0.4, loss_type=loss_type, tpo_alpha=0.8)
    held(make, lambda s: tpo_terms(s, loss_type), lengths, 3, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tpo_with_holes_in_others(backend):
    """In a mixture, and under weights; the mean over gold tokens of a batch."""
    lengths = [5, 3, 7, 4, 0, 1, 0, 7, 3]
    mix = lambda: Mixture([TPO(0.4, tpo_alpha=0.8), DPO(0.3)], [0.5, 2.0])
    held(mix, lambda s: 0.5 * tpo_terms(s, "sigmoid") + 2.0 * dpo(s), lengths, 3, backend)
    weighed = lambda: WPO(TPO(0.4, tpo_alpha=0.8))
    held(weighed, lambda s: weight(s) * tpo_terms(s, "sigmoid"), lengths, 3, backend)
    by_tokens = lambda: TPO(0.4, tpo_alpha=0.8, token_mean=True)

    def formula(s: Sums) -> torch.Tensor:
        chosen, rejected, gold = s.logps
        return -F.logsigmoid(0.4 * (chosen - rejected)) - 0.8 * gold * B / s.lengths[2].sum()

    held(by_tokens, formula, lengths, 3, backend)
    built = objectives.build("tpo", beta=0.4, tpo_alpha=0.8)
    held(lambda: built, lambda s: tpo_terms(s, "sigmoid"), lengths, 3, backend)
