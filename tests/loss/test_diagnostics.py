"""The gradient balance: against finite differences in P, the paper's A.6, and between backends."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch

import prefkern
from prefkern import Pairs, objectives, reference
from prefkern.loss import diagnostics
from prefkern.loss.diagnostics import gradient_balance, objective_balance
from prefkern.objectives import CPO, DPO, Adaptive, AlphaDPO, BetaDPO, Hinge, Objective, WithNLL
from support.objective_cases import CASES, ORDINARY, columns

STABLE = Adaptive("policy", 1.0, 2.0)
PAIRED = [name for name, case in CASES.items() if isinstance(case.make(), Objective)]


class _Held(DPO):
    """An objective with constant coefficients, while log-probs change."""

    def __init__(self, objective: DPO, pairs: Pairs) -> None:
        super().__init__(objective.beta)
        self.held = objective.coefficients(pairs)

    def coefficients(self, pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
        return self.held


@pytest.mark.parametrize("adaptive", [None, Adaptive(), STABLE, Adaptive("ratio", 0.3, None)])
def test_against_finite_differences_in_the_probabilities(adaptive):
    """|dL/dP_w| / |dL/dP_l| from the loss at slightly different P."""
    P = torch.tensor([[0.4, 0.02, 0.3, 0.11], [0.1, 0.05, 0.3, 0.9]], dtype=torch.float64)
    refs = torch.tensor([[0.2, 0.04, 0.5, 0.1], [0.2, 0.02, 0.1, 0.8]], dtype=torch.float64).log()
    lengths = torch.tensor([[3, 7, 1, 2], [2, 9, 4, 1]])

    def pairs(P: torch.Tensor) -> Pairs:
        return Pairs(*P.log(), *refs, *lengths)

    objective = DPO(0.7, adaptive=adaptive)
    held = _Held(objective, pairs(P))
    balance = objective_balance(objective, pairs(P))
    slopes = []
    for side in range(2):
        step = torch.zeros_like(P)
        step[side] = 1e-6 * P[side]
        difference = held(pairs(P + step)).losses - held(pairs(P - step)).losses
        slopes.append(difference / (2 * step[side]))
    expected = (slopes[0] / slopes[1]).abs().log()
    torch.testing.assert_close(balance.log_balance, expected, rtol=0, atol=1e-7)
    for mine, slope, p in zip(balance[:2], slopes, P, strict=True):
        torch.testing.assert_close(mine, slope * p, rtol=1e-7, atol=0)
    share = (slopes[0] * P[0]).abs() / ((slopes[0] * P[0]).abs() + (slopes[1] * P[1]).abs())
    torch.testing.assert_close(balance.chosen_share, share, rtol=1e-7, atol=0)


@pytest.mark.parametrize(
    ("odds", "dpo", "stable"), [(5.0, 0.2, 0.4), (10.0, 0.1, 0.2), (1.5, 1 / 1.5, 1.0)]
)
def test_appendix_a6(odds, dpo, stable):
    rejected = torch.tensor([-20.0, -4000.0], dtype=torch.float64)
    pairs = Pairs(rejected + math.log(odds), rejected, rejected, rejected)
    for adaptive, expected in ((None, dpo), (STABLE, stable)):
        # P of e^-4000 has no representation; its balance has.
        balance = objective_balance(DPO(0.1, adaptive=adaptive), pairs)
        expected = torch.full((2,), expected, dtype=torch.float64)
        torch.testing.assert_close(balance.log_balance.exp(), expected, rtol=1e-12, atol=0)


def test_the_balance_is_that_of_the_coefficients():
    """log(beta_w / beta_l) + log P_l - log P_w, as in the paper, in each space."""
    values = columns(ORDINARY)
    for name in ("dpo: plain", "dpo: adaptive", "robust: k 2, clip 1.5", "ipo: adaptive"):
        objective, pairs = CASES[name].make(), Pairs(**values)
        result, balance = objective(pairs), objective_balance(objective, pairs)
        coefficients = (result.beta_chosen / result.beta_rejected).log()
        expected = coefficients + pairs.rejected_logps - pairs.chosen_logps
        torch.testing.assert_close(balance.log_balance, expected.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["dpo: plain", "dpo: smoothed", "robust: plain", "rdpo: plain"])
def test_plain_objectives_push_log_probs_alike(name):
    values = columns(ORDINARY)
    balance = objective_balance(CASES[name].make(), Pairs(**values))
    half = torch.full((len(ORDINARY),), 0.5, dtype=torch.float64)
    torch.testing.assert_close(balance.chosen_share, half, rtol=1e-12, atol=0)


def test_nan_only_where_nothing_is_pushed():
    """The hinge past its margin pushes neither; an NLL term pushes the chosen response alone."""
    chosen = torch.tensor([-1.0, -9.0, 0.0])
    zeros, ones = torch.zeros(3), torch.ones(3)
    pairs = Pairs(chosen, torch.tensor([-30.0, -9.0, -1e6]), zeros, zeros, ones, ones)
    hinge = objective_balance(Hinge(1.0), pairs)
    assert hinge.log_balance.isnan().tolist() == [True, False, True]
    assert hinge.chosen_share.isnan().tolist() == [True, False, True]
    assert hinge.chosen_share[1] == 0.5
    # A saturated sigmoid leaves only the NLL.
    cpo = objective_balance(CPO(1.0), pairs)
    assert not cpo.log_balance.isnan().any() and not cpo.chosen_share.isnan().any()
    assert cpo.log_balance[2] == math.inf and cpo.chosen_share[2] == 1


@pytest.mark.parametrize("name", PAIRED)
def test_of_every_objective(name):
    """The gradients are the loss's, and computing them does not change the objective."""
    objective = CASES[name].make().train()
    before = {key: str(value) for key, value in objective.state_dict().items()}
    values = columns(ORDINARY)
    balance = objective_balance(objective, Pairs(**values))
    assert objective.training
    assert before == {key: str(value) for key, value in objective.state_dict().items()}
    leaves = [values["chosen_logps"], values["rejected_logps"]]
    losses = objective.eval()(Pairs(**values)).losses
    slopes = torch.autograd.grad(losses.sum(), leaves, materialize_grads=True)
    assert torch.equal(balance.chosen_gradients, slopes[0])
    assert torch.equal(balance.rejected_gradients, slopes[1])
    assert not any(value.requires_grad for value in balance)
    pushed = slopes[0].abs() + slopes[1].abs() > 0
    assert (balance.log_balance.isnan() == ~pushed).all()
    with torch.no_grad():
        again = objective_balance(objective, Pairs(**values))
    torch.testing.assert_close(again, balance, rtol=0, atol=0, equal_nan=True)
    assert not objective.training


def test_sums_of_all_tokens_are_read_too():
    """Where some tokens weigh less (`ld_alpha`), an NLL term is of the other sums."""
    pairs = Pairs(**columns(ORDINARY))
    whole = replace(
        pairs, chosen_whole_logps=pairs.chosen_logps, rejected_whole_logps=pairs.rejected_logps
    )
    objective = WithNLL(DPO(), 0.5)
    expected, balance = (objective_balance(objective, each) for each in (pairs, whole))
    torch.testing.assert_close(balance, expected, rtol=1e-14, atol=0, equal_nan=True)


def batch(device: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(device, dtype)

    labels = torch.randint(50, (6, 7), generator=generator)
    labels[:, 0] = -100
    labels[1, 4:] = -100
    labels[5] = -100  # a response without tokens
    return {
        "hidden": normal(6, 7, 8).requires_grad_(),
        "weight": normal(50, 8),
        "labels": labels.to(device),
        "ref_hidden": normal(6, 7, 8),
        "ref_weight": normal(50, 8),
        "reward_margins": normal(3) * 4,
    }


OUTPUTS = ["dpo", "adadpo", "adaorpo", "adasimpo", "madpo", "alphadpo", "betadpo", "tdpo2"]


@pytest.mark.parametrize("name", OUTPUTS)
def test_of_an_output_of_either_backend(name, backend, device):
    options = {"use_weighting": True} if name == "betadpo" else {}
    make = functools.partial(objectives.build, name, **options)
    out = prefkern.FusedPreferenceLoss(make(), backend=backend).to(device)(**batch(device))
    truth = reference.preference_loss(make().to(device), **batch(device, torch.float64))
    mine, expected = gradient_balance(out), gradient_balance(truth)
    assert not any(value.requires_grad for value in mine)
    for actual, true in zip(mine, expected, strict=True):
        torch.testing.assert_close(actual.double(), true, rtol=2e-5, atol=2e-5, equal_nan=True)
    # They are what backward would send to a sequence's log-prob.
    chosen, rejected = torch.autograd.grad(
        out.losses.sum(), [out.chosen_logps, out.rejected_logps], allow_unused=True
    )
    if chosen is not None:
        torch.testing.assert_close(out.chosen_gradients, chosen)
        torch.testing.assert_close(out.rejected_gradients, rejected)


def test_an_evaluated_output_has_the_same_gradients(backend, device):
    loss_fn = prefkern.FusedPreferenceLoss(objectives.build("adadpo"), backend=backend)
    trained = loss_fn(**batch(device))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            balance = gradient_balance(loss_fn(**batch(device)))
            expected = gradient_balance(trained)
            for mine, true in zip(balance, expected, strict=True):
                torch.testing.assert_close(mine, true, rtol=1e-6, atol=1e-6)


def test_running_statistics_are_not_moved():
    for objective in (AlphaDPO(), BetaDPO(keep=0.5)):
        pairs = Pairs(**columns(ORDINARY))
        objective_balance(objective, pairs)
        assert objective.statistics.batches == 0 and objective.training
        assert getattr(objective, "draws", 0) == 0


def test_nothing_is_left_behind():
    """Neither the modules' modes nor the metrics of an earlier batch change."""
    inner = BetaDPO(keep=0.5)
    objective = objectives.WithNLL(objectives.WPO(inner, alignment=False))
    objective.objective.eval()
    modes = [module.training for module in objective.modules()]
    pairs = Pairs(**columns(ORDINARY))
    inner.train()
    result = objective(pairs)
    kept = objective.metrics(pairs, result)["beta_dpo/kept"].tolist()
    assert 0.0 in kept
    inner.eval()
    objective_balance(objective, pairs)
    assert [module.training for module in objective.modules()] == modes
    assert objective.metrics(pairs, result)["beta_dpo/kept"].tolist() == kept


@pytest.mark.parametrize("name", ["adadpo", "alphadpo", "betadpo", "madpo", "tdpo2"])
def test_in_inference_mode(name, device):
    """A formula's balance and the oracle's output are the same as outside of it."""
    pairs = Pairs(**columns(ORDINARY))
    objective = objectives.build(name, use_weighting=True)
    expected = objective_balance(objective, pairs)
    with torch.inference_mode():
        made = {key: value.clone() for key, value in vars(pairs).items() if value is not None}
        found = objective_balance(objective, Pairs(**made))
        evaluated = reference.preference_loss(objective.eval().to(device), **batch(device))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    truth = reference.preference_loss(objective, **batch(device))
    assert torch.equal(evaluated.losses, truth.losses.detach())
    assert torch.equal(evaluated.chosen_gradients, truth.chosen_gradients)
    assert not evaluated.loss.requires_grad and truth.loss.requires_grad


def test_bad_arguments():
    with pytest.raises(TypeError, match="PreferenceOutput"):
        gradient_balance(None)
    pairs = replace(Pairs(**columns(ORDINARY)), ref_chosen_logps=None)
    with pytest.raises(ValueError, match="ref_chosen_logps"):
        objective_balance(DPO(), pairs)
    # An objective that raises is left in the mode that it was in.
    objective = DPO()
    with pytest.raises(ValueError):
        objective_balance(objective, pairs)
    assert objective.training
    assert diagnostics.GradientBalance._fields[-1] == "chosen_share"
