"""TPO: the gold response's term, and how it goes with other objectives."""

from __future__ import annotations

import pytest
import torch

from prefkern import Pairs, objectives
from prefkern.objectives import CPO, TPO, WPO, Adaptive, Hinge, Mixture, SimPO, WithNLL
from support import oracles
from support.objective_cases import CASES, ORDINARY, columns

TPO_CASES = [name for name, case in CASES.items() if case.objective == "tpo"]


@pytest.mark.parametrize("name", TPO_CASES)
def test_gradients_in_the_gold_log_probs(name):
    case = CASES[name]
    values = columns(ORDINARY)
    losses = case.make()(Pairs(**values)).losses
    leaves = [values["gold_logps"]]
    (mine,) = torch.autograd.grad(losses.sum(), leaves, materialize_grads=True)
    for row, sample in enumerate(ORDINARY):
        options = dict(case.options_for(sample, ORDINARY))
        expected = oracles.gradient(case.oracle, sample.pair, ("L_g",), **options)
        assert mine[row].item() == pytest.approx(expected[0], rel=1e-11, abs=1e-280)


def test_token_mean_is_over_the_batchs_gold_tokens():
    values = columns(ORDINARY)
    pairs = Pairs(**values)
    plain = TPO(tpo_alpha=0.0)(pairs).losses.mean()
    mean = TPO(tpo_alpha=0.7, token_mean=True)(pairs).losses.mean() - plain
    expected = -0.7 * values["gold_logps"].sum() / values["gold_lengths"].sum()
    torch.testing.assert_close(mean, expected, rtol=1e-12, atol=0)
    (slopes,) = torch.autograd.grad(mean, values["gold_logps"])
    true = torch.full_like(slopes, -0.7 / values["gold_lengths"].sum().item())
    torch.testing.assert_close(slopes, true, rtol=1e-12, atol=0)


def test_the_pairs_part_is_that_of_its_kin():
    pairs = Pairs(**columns(ORDINARY))
    for mine, other in (
        (TPO(0.3, tpo_alpha=0.0, label_smoothing=0.1), CPO(0.3, 0.0, label_smoothing=0.1)),
        (TPO(2.0, "tpo-l", tpo_alpha=0.0, tpo_l_gamma=0.8), SimPO(2.0, 0.8)),
        (
            TPO(2.0, "tpo-l", tpo_alpha=0.0, adaptive=Adaptive(clip=1.5)),
            SimPO(2.0, 0.5, adaptive=Adaptive(clip=1.5)),
        ),
    ):
        assert not mine.needs_gold and not mine.needs_reference
        for x, y in zip(mine(pairs), other(pairs), strict=True):
            assert torch.equal(x, y)
    # Without a reference's log-probs, a hinge is on log-ratios to one of probability 1.
    zeros = torch.zeros_like(pairs.chosen_logps)
    of_ones = Pairs(pairs.chosen_logps, pairs.rejected_logps, zeros, zeros)
    losses = TPO(0.05, "hinge", tpo_alpha=0.0)(pairs).losses
    assert torch.equal(losses, Hinge(0.05)(of_ones).losses)


def test_it_composes():
    pairs = Pairs(**columns(ORDINARY))
    tpo, cpo = TPO(0.1), CPO(0.1)
    alone = [each(pairs).losses for each in (tpo, cpo)]
    mixture = Mixture([cpo, tpo], [0.5, 2.0])
    assert mixture.needs_gold and mixture.responses == 3 and not Mixture([cpo]).needs_gold
    torch.testing.assert_close(mixture(pairs).losses, 0.5 * alone[1] + 2 * alone[0])
    gold = tpo.gold_terms(pairs)
    torch.testing.assert_close(mixture.gold_terms(pairs), 2 * gold)
    nll = WithNLL(tpo, 0.3)
    torch.testing.assert_close(nll.gold_terms(pairs), gold)
    expected = alone[0] - 0.3 * pairs.chosen_logps / pairs.chosen_lengths
    torch.testing.assert_close(nll(pairs).losses, expected)
    wpo = WPO(tpo)
    assert wpo.needs_gold
    torch.testing.assert_close(wpo(pairs).losses, wpo.weight(pairs) * alone[0])
    assert cpo.gold_terms(pairs) is None and Mixture([cpo]).gold_terms(pairs) is None


def test_of_sequences_gives_the_gold_ones_last():
    values = torch.arange(6.0)
    pairs = Pairs.of_sequences(values, lengths=values.long(), ref_logps=-values[:4], responses=3)
    assert pairs.chosen_logps.tolist() == [0, 1] and pairs.rejected_logps.tolist() == [2, 3]
    assert pairs.gold_logps.tolist() == [4, 5] and pairs.gold_lengths.tolist() == [4, 5]
    assert pairs.ref_rejected_logps.tolist() == [-2, -3]
    # What was computed for all sequences is taken of the pairs.
    pairs = Pairs.of_sequences(values, kls=values, responses=3)
    assert pairs.rejected_kls.tolist() == [2, 3]
    assert Pairs.of_sequences(values).gold_logps is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "simpo"}, "loss_type must be one of 'sigmoid', 'hinge', 'ipo', 'tpo-l'"),
        ({"loss_type": "ipo", "label_smoothing": 0.1}, "'square' has no label smoothing"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "'hinge' has no label smoothing"),
        ({"tpo_l_gamma": 0.3}, "tpo_l_gamma is of loss_type='tpo-l', got 0.3 with 'sigmoid'"),
    ],
)
def test_an_option_without_effect_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        objectives.build("tpo", **options)


def test_what_it_is_called():
    assert "tau=0.01, loss_type='ipo'" in repr(TPO(loss_type="ipo"))
    assert "beta=0.01, loss_type='tpo-l'" in repr(TPO(loss_type="tpo-l"))
    assert objectives.build("tpo", loss_type="tpo-l").fixed_margin == 0.5
    with pytest.raises(ValueError, match="here it is 'tpo' with that loss_type"):
        objectives.build("tpo-l")
    with pytest.raises(ValueError, match="TPO needs gold_logps and gold_lengths, got None"):
        TPO()(Pairs(*torch.zeros(2, 3)))
