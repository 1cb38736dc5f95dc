"""Several objectives as one: each oracle's value and gradient, weighed and added."""

from __future__ import annotations

import itertools

import pytest
import torch

from prefkern import objectives
from prefkern.loss import pairwise
from prefkern.objectives import (
    DPO,
    IPO,
    KTO,
    MADPO,
    WPO,
    Adaptive,
    AlphaDPO,
    BetaDPO,
    Mixture,
    Pairs,
    SimPO,
    WithNLL,
)
from support.objective_cases import BOUNDS, CASES, GROUPS, ORDINARY, columns, scores

MIXTURES = {
    "one": (["dpo: plain"], [0.5]),
    "two": (["dpo: adaptive", "ipo: plain"], [0.8, 0.2]),
    "three, with and without a reference": (
        ["hinge: plain", "simpo: adaptive", "cpo: plain"],
        [1.0, 3.0, 0.25],
    ),
    "with statistics and margins": (
        ["alphadpo: plain", "madpo: plain", "dpo: plain"],
        [0.5, 2.0, 1.0],
    ),
    "an NLL term in one": (["nll: dpo", "robust: plain"], [0.5, 1.5]),
}


def expected(names: list[str], weights: list[float], samples: list) -> torch.Tensor:  # (3, B)
    """The oracles' losses and gradients, weighed, and the sums of their sizes."""
    truths = [CASES[name].expected(samples) for name in names]
    terms = torch.tensor(
        [
            [[weight * value for value in row[:3]] for row in truth]
            for weight, truth in zip(weights, truths, strict=True)
        ],
        dtype=torch.float64,
    )
    return torch.stack([terms.sum(0).T, terms.abs().sum(0).T])


def mixture(names: list[str], weights: list[float]) -> Mixture:
    return Mixture([CASES[name].make() for name in names], weights)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("name", MIXTURES)
def test_value_and_gradient_are_the_weighted_sums_of_the_oracles(name, group):
    samples = GROUPS[group]
    names, weights = MIXTURES[name]
    values = columns(samples, torch.float64, "cpu")
    losses = mixture(names, weights)(Pairs(**values)).losses
    gradients = torch.autograd.grad(
        losses.sum(), [values["chosen_logps"], values["rejected_logps"]]
    )
    exact, sizes = expected(names, weights, samples)
    mine = torch.stack([losses.detach(), *gradients])
    right = (mine - exact).abs() <= BOUNDS[torch.float64] * sizes + 1e-280
    # Where a square or a ratio is bounded against overflow, no oracle says what is right.
    rows = [
        [
            CASES[each].is_bounded(truth, sample.pair)
            for truth, sample in zip(CASES[each].expected(samples), samples, strict=True)
        ]
        for each in names
    ]
    bounded = torch.tensor(rows).any(0)
    assert right[:, ~bounded].all()
    assert not mine.isnan().any()


@pytest.mark.parametrize("name", MIXTURES)
def test_the_kernel_takes_one_launch_for_each_objective(name, device):
    kernels = pytest.importorskip("prefkern_kernels")
    names, weights = MIXTURES[name]
    objective = mixture(names, weights).to(device)
    asked = scores(ORDINARY, device, objective)
    before = kernels.launches["pair_loss"]
    out = pairwise.pair_loss(objective, asked, "triton")
    assert kernels.launches["pair_loss"] - before == len(names)
    (dlogps,) = torch.autograd.grad(out.result.losses.sum(), asked.logps)
    mine = torch.stack([out.result.losses, *dlogps[asked.offsets[:-1]].chunk(2)])
    exact, sizes = expected(names, weights, ORDINARY)
    bound = BOUNDS[torch.float32] * sizes
    assert ((mine.detach().cpu().double() - exact).abs() <= bound).all()
    assert torch.equal(torch.stack(out.gradients), mine[1:].detach())


def test_it_needs_what_its_objectives_need():
    plain = Mixture([SimPO(), SimPO()])
    assert not plain.needs_reference and not plain.observes and not plain.needs_alignments
    full = Mixture([SimPO(), MADPO(), WPO(AlphaDPO())])
    assert full.needs_reference and full.needs_reward_margins and full.needs_alignments
    assert full.observes and not full.needs_kls
    assert objectives.build("dpo+tdpo1").needs_kls


def test_coefficients_rewards_and_beta_are_the_first_objectives(backend, device):
    first = DPO(0.3, adaptive=Adaptive())
    objective = Mixture([first, IPO(0.2)], [0.1, 5.0])
    assert objective.beta == 0.3 and objective.adaptive is first.adaptive and objective.moves_beta
    asked = scores(ORDINARY, device, objective)
    out = pairwise.pair_loss(objective, asked, backend).result
    alone = pairwise.pair_loss(first, asked, backend).result
    for name in ("beta_chosen", "beta_rejected", "chosen_rewards", "rejected_rewards"):
        assert torch.equal(getattr(out, name), getattr(alone, name)), name
    assert not out.losses.equal(alone.losses)


def test_metrics_of_all_objectives_have_names_of_their_own():
    objective = Mixture([BetaDPO(0.1, keep=1.0), AlphaDPO(), BetaDPO(0.7, keep=1.0), MADPO()])
    pairs = Pairs(**columns(ORDINARY, torch.float64, "cpu"))
    values = objective.metrics(pairs, objective(pairs))
    assert set(values) == {
        *("beta_dpo/beta", "beta_dpo/kept", "beta_dpo/beta_3", "beta_dpo/kept_3"),
        *("alpha_dpo/margin", "madpo/weight"),
    }
    # Each beta is that of its own objective.
    for name, beta in (("beta_dpo/beta", 0.1), ("beta_dpo/beta_3", 0.7)):
        alone = BetaDPO(beta, keep=1.0)(pairs)
        assert torch.equal(values[name], alone.beta_chosen.detach()), name


@pytest.mark.parametrize("wrap", [lambda objective: objective, WithNLL, WPO])
def test_statistics_move_once_a_batch_and_not_in_evaluation(wrap, backend, device):
    inner = AlphaDPO().to(device)
    objective = wrap(Mixture([DPO(), inner]))
    asked = scores(ORDINARY, device, objective)
    for _ in range(2):
        pairwise.pair_loss(objective, asked, backend)
    assert inner.statistics.batches == 2
    pairwise.pair_loss(objective.eval(), asked, backend)
    assert inner.statistics.batches == 2
    restored = wrap(Mixture([DPO(), AlphaDPO()]))
    restored.load_state_dict(objective.state_dict())
    results = [pairwise.pair_loss(x.eval(), asked, backend).result for x in (objective, restored)]
    assert torch.equal(results[0].losses, results[1].losses)


@pytest.mark.parametrize("order", list(itertools.permutations(range(2))))
def test_no_statistics_move_where_a_number_is_missing(order):
    inner = AlphaDPO(length_normalized=False, implicit_reference="ratio")
    parts = [inner, IPO(length_normalized=True)]
    pairs = Pairs(*torch.zeros(4, 3))
    with pytest.raises(ValueError, match="IPO needs chosen_lengths"):
        Mixture([parts[i] for i in order])(pairs)
    assert inner.statistics.batches == 0


def test_a_mixture_in_a_mixture_counts_as_its_objectives():
    one, two, three = DPO(), IPO(), SimPO()
    nested = Mixture([Mixture([one, two], [0.5, 2.0]), three], [4.0, 1.0])
    assert nested.objectives == [one, two, three]
    assert nested.loss_weights == [2.0, 8.0, 1.0]


def test_by_name():
    built = objectives.build(
        "adadpo + ipo".replace(" ", ""), beta=0.2, tau=0.3, clip=2.0, loss_weights=[1, 0.5]
    )
    assert isinstance(built, Mixture) and built.loss_weights == [1.0, 0.5]
    first, second = built.objectives
    assert isinstance(first, DPO) and first.beta == 0.2
    assert first.adaptive == Adaptive(clip=2.0)
    assert isinstance(second, IPO) and second.tau == 0.3 and second.adaptive is None
    assert objectives.build("sigmoid+hinge").loss_weights == [1.0, 1.0]
    # What composes is around the sum.
    wrapped = objectives.build("dpo+simpo", use_weighting=True, rpo_alpha=0.1)
    assert isinstance(wrapped, WithNLL) and isinstance(wrapped.objective, WPO)
    assert isinstance(wrapped.objective.objective, Mixture)
    assert [*objectives.options("dpo+simpo")] == [
        *("beta", "label_smoothing", "adaptive", "f_divergence_type", "f_alpha_divergence_coef"),
        *("use_weighting", "rpo_alpha", "gamma", "loss_weights"),
    ]


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Mixture([]), TypeError, r"objectives must be pairwise objectives, got \[\]"),
        (lambda: Mixture(DPO()), TypeError, "objectives must be pairwise objectives, got DPO"),
        (lambda: Mixture([DPO(), KTO()]), TypeError, "objectives must be pairwise"),
        (lambda: Mixture([DPO(), "ipo"]), TypeError, "objectives must be pairwise"),
        (lambda: Mixture([DPO()] * 2), ValueError, "objectives has the same objective twice"),
        (lambda: Mixture([DPO()], [1, 2]), ValueError, r"loss_weights must be 1 numbers.*\[1, 2\]"),
        (lambda: Mixture([DPO()], 1.0), ValueError, "loss_weights must be 1 numbers.*got 1.0"),
        (
            lambda: Mixture([DPO()], [0.0]),
            ValueError,
            r"loss_weights\[0\] must be a finite number > 0",
        ),
        (lambda: Mixture([DPO()])(None), TypeError, "pairs must be"),
        (
            lambda: objectives.build("dpo+kto"),
            ValueError,
            "mixes pairwise objectives; 'kto' is on single responses",
        ),
        (lambda: objectives.build("dpo+nope"), ValueError, "unknown objective 'nope'"),
        (lambda: objectives.build("dpo+"), ValueError, "name of an objective is empty, got ''"),
        (
            lambda: objectives.build("dpo+ipo", gamma=1.0),
            TypeError,
            "'dpo\\+ipo' has no option 'gamma'",
        ),
        (
            lambda: objectives.build("dpo", loss_weights=[1.0]),
            TypeError,
            "no option 'loss_weights'",
        ),
    ],
)
def test_what_is_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()
