"""What a class declares: names that are checked, and links with right second derivatives."""

from __future__ import annotations

import pytest
import torch

from prefkern import Pairs, objectives
from prefkern.objectives import BCO, REGISTRY, Contrastive, Objective, OmniDPO


def declared(**parts) -> type[Contrastive]:
    def made(self):
        Contrastive.__init__(self)
        self.set_options(beta=0.5)

    return type("Mine", (Contrastive,), {"__init__": made, **parts})


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"score": "log_ratios"}, "score must be one of 'log_ratio', .*, got 'log_ratios'"),
        ({"link": "logit"}, "link must be one of 'logistic', .*, got 'logit'"),
        ({"link": "exo"}, "shape of the link 'exo' must be a finite number > 0, .*, got 0.0"),
        ({"link": "discopop", "shape": -1.0}, "shape of the link 'discopop' must be .* got -1.0"),
        ({"link": "squares"}, "shape of the link 'squares' must be a finite number > 0"),
        (
            {"link": "nca", "fixed_margin": 0.5},
            "the link 'nca' reads no margin, got fixed_margin 0.5 and length_penalty 0.0; leave",
        ),
        ({"link": "apo_down", "length_penalty": 0.1}, "'apo_down' reads no margin"),
        (
            {"link": "hinge", "label_smoothing": 0.1},
            "the link 'hinge' has no label smoothing, got label_smoothing 0.1; leave it 0",
        ),
    ],
)
def test_a_part_that_is_not_there_or_has_no_effect_is_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        declared(**parts)()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adasft", "unknown objective 'adasft': 'sft' has no adaptive form; known: dpo, "),
        ("ada_madpo", "unknown objective 'ada_madpo': 'madpo' has no adaptive form"),
        ("ada_nll", "unknown objective 'ada_nll': 'sft' has no adaptive form"),
        ("dpo+adakto", "unknown objective 'adakto': 'kto' has no adaptive form"),
        ("dpo+", "the name of an objective is empty, got ''; known: dpo, "),
    ],
)
def test_a_name_that_is_not_there_says_why(name, message):
    with pytest.raises(ValueError, match=message):
        objectives.build(name)


def test_spaces_in_a_name_do_not_matter():
    mixture = objectives.build("Ada DPO + sft", loss_weights=[1, 2])
    assert [type(each) for each in mixture.objectives] == [REGISTRY["dpo"], REGISTRY["sft"]]
    assert mixture.adaptive is not None


def pairs_of(chosen, rejected) -> Pairs:
    reference = chosen.new_tensor([-4.0, -9.0, -6.5]), chosen.new_tensor([-7.0, -3.0, -6.5])
    lengths = torch.tensor([2, 3, 9]), torch.tensor([3, 1, 5])
    return Pairs(
        chosen,
        rejected,
        *reference,
        *lengths,
        chosen.new_tensor([1.0, -2.0, 0.0]),
        gold_logps=chosen.new_tensor([-3.0, -2.0, -1.0]),
        gold_lengths=torch.tensor([4, 1, 2]),
    )


PAIRED = [name for name, cls in REGISTRY.items() if issubclass(cls, Contrastive)]


@pytest.mark.parametrize("name", PAIRED)
def test_second_derivatives(name):
    """Of finite differences of the gradient; APO-down has a slope of its own."""
    objective = objectives.build(name).eval()
    assert isinstance(objective, Objective)
    leaves = [
        torch.tensor(x, dtype=torch.float64, requires_grad=True)
        for x in ([-5.5, -8.0, -2.0], [-6.0, -3.5, -9.0])
    ]
    losses = lambda *sums: objective(pairs_of(*sums)).losses
    assert torch.autograd.gradgradcheck(losses, leaves)


def test_apo_downs_second_derivatives_of_equal_models():
    """At a = b = 0 |a| and |b| have kinks, and the loss has none: it is its third-order series."""
    beta = 0.1
    sums = [torch.zeros(1, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    zero = torch.zeros(1, dtype=torch.float64)
    losses = objectives.build("apo_down", beta=beta)(Pairs(*sums, zero, zero)).losses
    slopes = torch.autograd.grad(losses.sum(), sums, create_graph=True)
    assert [x.item() for x in slopes] == [0.0, pytest.approx(beta / 4)]
    # sigmoid is odd around 0: all its second derivatives there vanish.
    for slope in slopes:
        for second in torch.autograd.grad(slope.sum(), sums, retain_graph=True):
            assert second.item() == pytest.approx(0.0, abs=1e-15)


def test_omni_dpo_without_its_policys_weight_takes_infinite_log_probs():
    chosen = torch.full((3,), -5.0, requires_grad=True)
    rejected = torch.full((3,), -torch.inf, requires_grad=True)
    result = OmniDPO(gamma=0.0, nll_weight=0.0)(pairs_of(chosen, rejected))
    slopes = torch.autograd.grad(result.losses.sum(), [chosen, rejected])
    assert all((x == 0).all() for x in (result.losses, *slopes))


def test_adaptive_bco_without_numbers_moves_nothing():
    """An infinite log-ratio is left out of the mean, and a coefficient of 0 gives no NaN."""
    objective = objectives.build("ada_bco_pair", clip=1.5)
    assert isinstance(objective, BCO)
    chosen, rejected = torch.tensor([-torch.inf] * 3), torch.tensor([-7.0, -3.0, -torch.inf])
    result = objective(pairs_of(chosen, rejected))
    assert objective.statistics.batches == 0 and objective.statistics.mean == 0
    assert result.losses[:2].isfinite().all() and (result.beta_chosen[:2] == 0).all()
