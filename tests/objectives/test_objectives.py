"""Every objective against its oracle, the papers' numbers and special cases, and at extremes."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prefkern import Pairs, objectives
from prefkern.objectives import (
    AOT,
    BCO,
    CPO,
    DPO,
    EXO,
    IPO,
    KTO,
    LNDPO,
    MADPO,
    MAX_LOG_RATIO,
    NCA,
    ORPO,
    RDPO,
    REGISTRY,
    SFT,
    SPPO,
    TDPO1,
    TDPO2,
    TPO,
    WPO,
    Adaptive,
    AlphaDPO,
    AOTUnpaired,
    APODown,
    APOZero,
    BetaDPO,
    Contrastive,
    DiscoPOP,
    Examples,
    Hinge,
    Objective,
    OmniDPO,
    RobustDPO,
    SimPO,
    WithNLL,
    registry,
)
from support import oracles
from support.listing import listing_1
from support.objective_cases import (
    ADAPTIVES,
    BOUNDS,
    CASES,
    DIVERGENCES,
    GROUPS,
    MISMATCHED,
    ORDINARY,
    Case,
    columns,
    errors,
    evaluate,
)

PAIRED = {name: case for name, case in CASES.items() if case.oracle != "kto"}
# What the objectives of a difference take beside `adaptive`, chosen so that nothing is in the way of
# a balance: no NLL term.
DIFFERENCES = {
    "dpo": (DPO, {}),
    "lndpo": (LNDPO, {}),
    "robust": (RobustDPO, {"label_smoothing": 0.2}),
    "hinge": (Hinge, {}),
    "ipo": (IPO, {}),
    "rdpo": (RDPO, {}),
    "exo": (EXO, {}),
    "discopop": (DiscoPOP, {}),
    "cpo": (CPO, {"nll_weight": 0.0}),
    "orpo": (ORPO, {"nll_weight": 0.0}),
    "simpo": (SimPO, {}),
    "tpo": (TPO, {"tpo_alpha": 0.0}),
    "aot": (AOT, {}),
    "aotunpaired": (AOTUnpaired, {}),
}
# With those whose link has a slope for each side, and the one whose weight trains.
ADAPTABLE = {
    **{name: DIFFERENCES[name] for name in [*DIFFERENCES][:8]},
    "nca": (NCA, {}),
    "sppo": (SPPO, {}),
    "apozero": (APOZero, {}),
    "apodown": (APODown, {}),
    **{name: DIFFERENCES[name] for name in [*DIFFERENCES][8:-2]},
    "omnidpo": (OmniDPO, {"nll_weight": 0.0}),
    "bco": (BCO, {"reward_shift": False}),
    **{name: DIFFERENCES[name] for name in ("aot", "aotunpaired")},
}


def random_pairs(B=16, spread=20.0, dtype=torch.float64, seed=0) -> Pairs:
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected, drift_w, drift_l = torch.randn(4, B, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, 40, (2, B), generator=generator)
    ref_chosen, ref_rejected = -50 + spread * chosen, -50 + spread * rejected
    return Pairs(
        (ref_chosen + spread * drift_w).to(dtype).requires_grad_(),
        (ref_rejected + spread * drift_l).to(dtype).requires_grad_(),
        ref_chosen.to(dtype),
        ref_rejected.to(dtype),
        lengths[0],
        lengths[1],
        torch.randn(B, generator=generator, dtype=torch.float64),
        gold_logps=ref_chosen.to(dtype),
        gold_lengths=lengths[1],
    )


def gradients(loss: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    return torch.stack(torch.autograd.grad(loss, [pairs.chosen_logps, pairs.rejected_logps]))


def test_the_table_has_every_objective():
    rows = {case.objective for case in CASES.values()}
    assert rows >= set(REGISTRY)
    for name in objectives.names():
        if name not in REGISTRY:
            assert f"{name.removeprefix('ada')}: adaptive" in CASES
    makes = {type(case.make()) for case in CASES.values()}
    assert makes == {*REGISTRY.values(), WPO, WithNLL}


@pytest.mark.parametrize("name", CASES)
def test_value_gradient_and_coefficients_are_the_oracles(name):
    """In float64. Both keep constant what a paper puts under a stop-gradient."""
    case = CASES[name]
    for group, samples in GROUPS.items():
        worst = errors(case, samples, evaluate(case, samples), torch.float64)
        assert all(error < BOUNDS[torch.float64] for error in worst), (group, worst)


@pytest.mark.parametrize("name", CASES)
def test_float32_keeps_its_digits(name):
    """Loss and gradient of float32 pairs, P = 1 - 1e-12 and saturated margins included.

    What cancels (1 - P, 1 - sigmoid, log-odds) would be wrong in its first digit.
    """
    case = CASES[name]
    for group, samples in GROUPS.items():
        worst = errors(case, samples, evaluate(case, samples, torch.float32), torch.float32)
        assert all(error < BOUNDS[torch.float32] for error in worst), (group, worst)


def test_pairs_beyond_the_bounds_hold_them():
    """In the pairs that comparisons leave out, a coefficient or IPO's square is at its bound."""
    seen = set()
    for case in CASES.values():
        for samples in GROUPS.values():
            answer = evaluate(case, samples)
            for row, truth in enumerate(case.expected(samples)):
                if case.is_bounded(truth, samples[row].pair):
                    assert all(column[row].isfinite() for column in answer)
                    adaptive = case.options.get("adaptive") or Adaptive()
                    bound = truth[4] * adaptive.k * math.exp(MAX_LOG_RATIO)
                    expected = pytest.approx(min(truth[3], bound), rel=1e-12)
                    assert answer.beta_chosen[row].item() == expected
                    seen.add((case.objective, case.variant))
    assert {name for name, _ in seen} == set(ADAPTABLE)
    assert {("dpo", "forward KL"), ("dpo", "forward KL, adaptive")} < seen


@pytest.mark.parametrize("name", ["tdpo1: plain", "tdpo2: plain", "wpo: tdpo2", "nll: tdpo2"])
def test_gradients_in_the_divergences(name):
    case = CASES[name]
    values = columns(ORDINARY)
    losses = case.make()(Pairs(**values)).losses
    leaves = [values["chosen_kls"], values["rejected_kls"]]
    mine = torch.autograd.grad(losses.sum(), leaves, materialize_grads=True)
    for row, sample in enumerate(ORDINARY):
        options = dict(case.options_for(sample, ORDINARY))
        expected = oracles.gradient(case.oracle, sample.pair, ("K_w", "K_l"), **options)
        assert [g[row].item() for g in mine] == pytest.approx(expected, rel=1e-11, abs=1e-280)
    # Of TDPO2, K_w is under a stop-gradient.
    assert (mine[0] == 0).all() == ("tdpo2" in name)


@pytest.mark.parametrize("name", PAIRED)
def test_only_losses_carry_a_gradient_and_only_to_what_trains(name):
    objective = PAIRED[name].make()
    values = columns(ORDINARY)
    constants = [values["reward_margins"], values["chosen_alignments"]]
    constants.append(values["rejected_alignments"])
    for leaf in constants:
        leaf.requires_grad_()
    result = objective(Pairs(**values))
    assert [x.requires_grad for x in result] == [True, False, False, False, False]
    found = torch.autograd.grad(result.losses.sum(), constants, allow_unused=True)
    assert all(gradient is None for gradient in found)
    assert not any(x.requires_grad for x in objective.buffers())
    for value in objective.metrics(Pairs(**values), result).values():
        assert value.shape == (len(ORDINARY),)


@pytest.mark.parametrize("beta", [0.005, 0.1, 1.0])
@pytest.mark.parametrize("clip", [1.5, 2.0, 10.0])
def test_adadpo_is_listing_1(beta, clip):
    pairs = random_pairs()
    B = pairs.chosen_logps.shape[0]
    logps = torch.cat([pairs.chosen_logps, pairs.rejected_logps])
    ref_logps = torch.cat([pairs.ref_chosen_logps, pairs.ref_rejected_logps])
    expected = listing_1(
        logps,
        ref_logps,
        torch.arange(B),
        torch.arange(B, 2 * B),
        beta,
        clip,
        pairs.chosen_lengths,
        pairs.rejected_lengths,
    )
    result = objectives.build("adadpo", beta=beta, clip=clip)(pairs)
    torch.testing.assert_close(result.losses, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        gradients(result.losses.sum(), pairs), gradients(expected.sum(), pairs), rtol=1e-12, atol=0
    )
    at_the_clip = result.beta_chosen == beta * clip
    assert at_the_clip.any() and not at_the_clip.all()
    assert (result.beta_rejected == beta).all()


@pytest.mark.parametrize("space", ["ratio", "policy"])
@pytest.mark.parametrize("name", ADAPTABLE)
def test_exponent_0_without_a_clip_is_plain(name, space):
    cls, options = ADAPTABLE[name]
    pairs = random_pairs()
    plain = cls(**options)(pairs)
    for exponent in (0, (0.0, 0.0)):
        adaptive = cls(**options, adaptive=Adaptive(space, exponent, None))(pairs)
        for mine, expected in zip(adaptive, plain, strict=True):
            assert torch.equal(mine, expected)


@pytest.mark.parametrize("clip", [None, 1e6], ids=["no clip", "below the clip"])
@pytest.mark.parametrize("k", [1.0, 3.0])
@pytest.mark.parametrize("name", DIFFERENCES)
def test_proposition_1(name, k, clip):
    """Policy space, exponent 1: |dL/dP_w| = k |dL/dP_l|, P of a sequence (ORPO: of a token).

    The responses that `aotunpaired` compares are of two pairs.
    """
    cls, options = DIFFERENCES[name]
    chosen = [-3.0, -6.0, -0.5, -2.0, -11.0]
    rejected = [-5.0, -5.5, -4.0, -2.0, -9.0]
    n_w, n_l = torch.tensor([2, 5, 1, 4, 30]), torch.tensor([4, 3, 1, 4, 25])
    leaves = [torch.tensor(x, dtype=torch.float64).requires_grad_() for x in (chosen, rejected)]
    refs = [torch.tensor(x, dtype=torch.float64) for x in (chosen[::-1], rejected[::-1])]
    if name == "aotunpaired":
        refs[1] = refs[1].roll(1)
    objective = cls(**options, adaptive=Adaptive("policy", 1.0, clip, k))
    result = objective(Pairs(*leaves, *refs, n_w, n_l))
    slopes = torch.autograd.grad(result.losses.sum(), leaves)
    # d / dP = (d / dL) / P, or n (d / dL) / P where P = exp(L / n)
    per_token = name == "orpo"
    pushes = [
        slope.abs() * (n if per_token else 1) / (leaf.detach() / (n if per_token else 1)).exp()
        for slope, leaf, n in zip(slopes, leaves, (n_w, n_l), strict=True)
    ]
    if name == "aotunpaired":
        rho = [leaf.detach() - ref for leaf, ref in zip(leaves, refs, strict=True)]
        assert not torch.equal(rho[0].argsort(), rho[1].argsort())
        pushes = [push[x.argsort()] for push, x in zip(pushes, rho, strict=True)]
    pushed = pushes[1] > 0
    # The hinge is flat beyond its margin.
    assert pushed.all() or (name == "hinge" and pushed.any())
    torch.testing.assert_close(pushes[0], k * pushes[1], rtol=1e-12, atol=0)


def test_k_scales_the_balance():
    pairs = random_pairs()
    one, three = (DPO(0.2, adaptive=Adaptive(k=k))(pairs) for k in (1.0, 3.0))
    torch.testing.assert_close(three.beta_chosen, 3 * one.beta_chosen)
    assert (three.beta_rejected == 0.2).all()


@pytest.mark.parametrize(
    ("odds", "dpo", "stable"), [(5.0, 0.2, 0.4), (10.0, 0.1, 0.2), (1.5, 1 / 1.5, 1.0)]
)
def test_gradient_balance_of_appendix_a6(odds, dpo, stable):
    """|dL/dP_w| / |dL/dP_l| at P_w / P_l = odds: policy space, alpha = 1, C = 2."""

    def balance(adaptive: Adaptive | None) -> float:
        p = torch.tensor([[odds * 0.01], [0.01]], dtype=torch.float64, requires_grad=True)
        ref = torch.full((1,), math.log(0.02), dtype=torch.float64)
        result = DPO(0.1, adaptive=adaptive)(Pairs(p[0].log(), p[1].log(), ref, ref))
        (gradient,) = torch.autograd.grad(result.losses.sum(), p)
        return (gradient[0] / gradient[1]).abs().item()

    assert balance(None) == pytest.approx(dpo, rel=1e-12)
    assert balance(Adaptive(space="policy", exponent=1, clip=2.0)) == pytest.approx(
        stable, rel=1e-12
    )


def _eval_alpha(**options) -> AlphaDPO:
    objective = AlphaDPO(2.0, 0.7, **options)
    objective.statistics.mean.fill_(0.5)
    objective.statistics.variance.fill_(4.0)
    return objective.eval()


SAME = {
    "alpha-DPO without Z is SimPO": (lambda: _eval_alpha(alpha=0.0), lambda: SimPO(2.0, 0.7)),
    "alpha-DPO of no spread is SimPO": (
        lambda: AlphaDPO(2.0, 0.7, alpha=0.3).eval(),
        lambda: SimPO(2.0, 0.7),
    ),
    "TDPO2 of no divergence is DPO": (lambda: TDPO2(0.2, 0.0), lambda: DPO(0.2)),
    "robust DPO of no flips is DPO": (lambda: RobustDPO(0.2, 0.0), lambda: DPO(0.2)),
    "R-DPO of no penalty is DPO": (lambda: RDPO(0.2, 0.0), lambda: DPO(0.2)),
    "BCO before its first batch has no shift": (
        lambda: BCO(0.2).eval(),
        lambda: BCO(0.2, reward_shift=False),
    ),
    "beta-DPO that nothing moves is DPO": (lambda: BetaDPO(0.2, m=0.0), lambda: DPO(0.2)),
    "a forward KL is the alpha-divergence of 0": (
        lambda: DPO(0.2, f_divergence_type="forward_kl"),
        lambda: DPO(0.2, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.0),
    ),
    "the alpha-divergence of 1 is the reverse KL": (
        lambda: DPO(0.2, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1.0),
        lambda: DPO(0.2),
    ),
}


def test_alpha_dpo_without_both_mixes_the_reference_in():
    """Table 2's two ablations at once: Eq. 9 is SimPO with a share of the reference."""
    values = columns(ORDINARY)
    pairs = Pairs(**values)
    leaves = [values["chosen_logps"], values["rejected_logps"]]
    objective = AlphaDPO(2.0, 0.7, 0.3, normalize=False, stop_gradient=False)
    assert not objective.observes
    n, m = pairs.chosen_lengths, pairs.rejected_lengths
    u = 2.0 * (pairs.chosen_logps / n - pairs.rejected_logps / m)
    of_reference = 2.0 * (pairs.ref_chosen_logps / n - pairs.ref_rejected_logps / m)
    expected = -torch.nn.functional.logsigmoid(0.7 * u + 0.3 * of_reference - 0.7)
    losses = objective(pairs).losses
    torch.testing.assert_close(losses, expected, rtol=1e-14, atol=0)
    for mine, true in zip(
        *(torch.autograd.grad(x.sum(), leaves) for x in (losses, expected)), strict=True
    ):
        torch.testing.assert_close(mine, true, rtol=1e-13, atol=0)
    assert objective.state_dict() == {}


def test_omni_dpo_without_its_weights_is_half_of_lndpo():
    values = columns(ORDINARY)
    halved = OmniDPO(2.0, eta=0.0, gamma=0.0, nll_weight=0.0)(Pairs(**values)).losses
    torch.testing.assert_close(2 * halved, LNDPO(2.0)(Pairs(**values)).losses, rtol=1e-14, atol=0)


def test_omni_dpo_counts_what_is_hard_and_clear():
    """w_qual rises with the margin, w_perf falls with the policy's own, and the NLL term is one of
    chosen responses below the reference."""
    objective = OmniDPO(gamma=3.0, nll_weight=0.5)
    floats = {name: torch.tensor([-2.0, -2.0, -2.0]) for name in columns(ORDINARY[:3])}
    ones = {f"{side}_lengths": torch.ones(3) for side in ("chosen", "rejected")}
    given = {**floats, **ones, "reward_margins": torch.tensor([-1.0, 0.0, 1.0])}
    assert (objective.weight(Pairs(**given)).diff() > 0).all()
    given = {**floats, **ones, "rejected_logps": torch.tensor([-1.0, -2.0, -3.0])}
    assert (objective.weight(Pairs(**given)).diff() < 0).all()
    given = {**floats, **ones, "ref_chosen_logps": torch.tensor([-1.0, -2.0, -3.0])}
    assert objective.nll(Pairs(**given)).tolist() == [1.0, 0.0, 0.0]


def test_sft_over_tokens_is_the_mean_of_the_batchs_tokens():
    values = columns(ORDINARY)
    pairs = Pairs(**values)
    expected = -pairs.chosen_logps.sum() / pairs.chosen_lengths.sum()
    torch.testing.assert_close(SFT(token_mean=True)(pairs).losses.mean(), expected)
    by_pair = SFT()(pairs).losses
    torch.testing.assert_close(by_pair, -pairs.chosen_logps / pairs.chosen_lengths)
    assert SFT(token_mean=True).pair_kernel_options() is None
    empty = Pairs(*torch.zeros(4, 2), torch.zeros(2), torch.ones(2))
    assert (SFT(token_mean=True)(empty).losses == 0).all()


# One of each link and each form of a score.
DIFFERENTIABLE = [
    *(f"{name}: plain" for name, cls in REGISTRY.items() if issubclass(cls, Contrastive)),
    *(f"dpo: {name}, adaptive" for name in DIVERGENCES),
    "apodown: adaptive",
    "nca: adaptive",
    "omnidpo: adaptive",
    "alphadpo: ratio, no stop-gradient",
]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradcheck(name):
    """Finite differences of the whole loss, wherever no coefficient is held constant."""
    case = CASES[name]
    objective = case.make()
    if objective.adaptive is not None:
        objective.adaptive = Adaptive(exponent=0.0, clip=None, k=1.5)
    samples = ORDINARY[:2] + ORDINARY[3:]
    if "aotunpaired" in name:
        # The last one's rejected log-ratio equals another's: where two are sorted alike, there is
        # a kink. `test_whole_batch` has more pairs.
        samples = samples[:-1]
    values = columns(samples)

    def losses(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        pairs = Pairs(**{**values, "chosen_logps": chosen, "rejected_logps": rejected})
        if isinstance(objective, AlphaDPO) and objective.stop_gradient:
            # A margin that is held constant has no differences.
            objective.alpha = 0.0
        return objective(pairs).losses

    assert torch.autograd.gradcheck(losses, (values["chosen_logps"], values["rejected_logps"]))


@pytest.mark.parametrize("name", SAME)
def test_special_cases(name):
    make, make_other = SAME[name]
    results = []
    for each in (make(), make_other()):
        values = columns(ORDINARY)
        result = each(Pairs(**values))
        leaves = [values["chosen_logps"], values["rejected_logps"]]
        slopes = torch.autograd.grad(result.losses.sum(), leaves)
        # TDPO's rewards are values with the divergence in them: not compared.
        results.append([*result[:3], *slopes])
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-14, atol=1e-300)


@pytest.mark.parametrize("mode", ["full", "amplify", "regularize"])
def test_madpo_weight_is_continuous_at_tau(mode):
    """In every mode the weight is 1 at both |h| = tau, from either side."""
    objective = MADPO(tau=3.0, c_max=4.0, c_min=0.1, mode=mode)
    near = torch.tensor([-3.0 - 1e-9, -3.0, -3.0 + 1e-9, 3.0 - 1e-9, 3.0, 3.0 + 1e-9]).double()
    near = near * (1 + 1e-12)
    zeros = torch.zeros_like(near)
    weight = objective.weight(Pairs(zeros, zeros, reward_margins=near))
    torch.testing.assert_close(weight, torch.ones_like(near), rtol=0, atol=1e-8)
    inside = objective.weight(Pairs(zeros, zeros, reward_margins=near * 0.5))
    beyond = objective.weight(Pairs(zeros, zeros, reward_margins=near * 1.5))
    assert ((inside != 1) == (mode != "regularize")).all()
    assert ((beyond[near > 0] < 1) == (mode != "amplify")).all() and (beyond[near < 0] == 1).all()


EXTREMES = list(itertools.product([0.0, 1.0, -1.0, 1e4, -1e4], repeat=2))


def _extreme_inputs(dtype: torch.dtype, length: int) -> dict[str, torch.Tensor]:
    """Log-ratios from -1e4 to 1e4, equal responses, margins and alignments without bounds."""
    chosen, rejected = torch.tensor(EXTREMES).to(dtype).unbind(1)
    count = len(EXTREMES)

    def cycle(*values: float) -> torch.Tensor:
        return torch.tensor(list(itertools.islice(itertools.cycle(values), count))).to(dtype)

    if length == 0:
        # A response without tokens has a log-prob of 0.
        chosen, rejected = torch.zeros_like(chosen), torch.zeros_like(rejected)
    lengths = torch.full((count,), length)
    return {
        "chosen_logps": chosen.requires_grad_(),
        "rejected_logps": rejected.requires_grad_(),
        "ref_chosen_logps": torch.zeros_like(chosen),
        "ref_rejected_logps": torch.zeros_like(rejected),
        "chosen_lengths": lengths,
        "rejected_lengths": lengths,
        "reward_margins": cycle(0.0, 1e4, -1e4, math.inf, -math.inf, 7.0, -7.0),
        "chosen_alignments": cycle(0.0, 12.0, -1e4),
        "rejected_alignments": cycle(12.0, -1e4, 0.0, 1e-3),
        "chosen_kls": cycle(0.0, 1e4, 1e-4).requires_grad_(),
        "rejected_kls": cycle(1e4, 0.0).requires_grad_(),
        "gold_logps": chosen.detach().clone().requires_grad_(),
        "gold_lengths": lengths,
    }


@pytest.mark.parametrize("name", PAIRED)
def test_extremes_stay_finite(name):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for length, one in itertools.product((0, 7, 32768), (False, True)):
            values = _extreme_inputs(dtype, length)
            if one:
                values = {key: x.detach()[-1:].clone() for key, x in values.items()}
            leaves = [x.requires_grad_() for key, x in values.items() if key.endswith(("ps", "ls"))]
            leaves = [x for x in leaves if x.is_leaf]
            result = PAIRED[name].make()(Pairs(**values))
            assert all(value.dtype == torch.float32 for value in result)
            slopes = torch.autograd.grad(result.losses.sum(), leaves, allow_unused=True)
            for value in (*result, *(s for s in slopes if s is not None)):
                # A float16 leaf cannot hold a gradient beyond 65504; what reached it was finite.
                assert not value.isnan().any()
                assert value.isfinite().all() or value.dtype == torch.float16


def test_kto_stays_finite():
    values = torch.tensor([0.0, 1.0, -1.0, 1e4, -1e4] * 2)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for mismatched in ([], [1e4], [-1e4], [0.0, 3.0]):
            leaf = values.to(dtype).requires_grad_()
            result = KTO()(
                Examples(leaf, torch.arange(10) < 5, torch.zeros(10), torch.tensor(mismatched))
            )
            assert result.losses.dtype == torch.float32
            (slope,) = torch.autograd.grad(result.losses.sum(), leaf)
            assert all(x.isfinite().all() for x in (*result, slope))
            assert result.reference_point == max(0.0, sum(mismatched) / (len(mismatched) or 1))


def test_label_smoothing_is_cdpo():
    pairs = random_pairs(spread=3.0)
    delta = 0.3 * (
        (pairs.chosen_logps - pairs.ref_chosen_logps)
        - (pairs.rejected_logps - pairs.ref_rejected_logps)
    )
    logsigmoid = torch.nn.functional.logsigmoid
    expected = -0.9 * logsigmoid(delta) - 0.1 * logsigmoid(-delta)
    torch.testing.assert_close(DPO(0.3, label_smoothing=0.1)(pairs).losses, expected)


def test_adadpo_by_name_is_adadpo_by_class():
    by_name = objectives.build("adadpo", beta=0.1)
    assert isinstance(by_name, DPO) and by_name.adaptive == Adaptive(clip=2.0)
    assert objectives.build("dpo", beta=0.3).adaptive is None
    custom = objectives.build("adadpo", beta=0.1, clip=None, exponent=[0.5, 1.0], space="policy")
    assert custom.adaptive == Adaptive("policy", (0.5, 1.0), None)


def test_names():
    adaptive = [f"ada{name}" for name in ADAPTABLE]
    assert objectives.names() == [*REGISTRY, *adaptive]
    for name in objectives.names():
        built = objectives.build(name)
        assert type(built) is REGISTRY[name.removeprefix("ada")]
        assert (getattr(built, "adaptive", None) is not None) == name.startswith("ada")
        is_weighed = isinstance(built, Objective) and built.weighs_pairs
        assert ("use_weighting" in objectives.options(name)) == is_weighed
        assert is_weighed == ("aot" not in name and name != "kto")
    assert type(objectives.build("alpha-DPO")) is AlphaDPO
    assert type(objectives.build("Ada_SimPO")) is SimPO
    # TRL's own
    assert type(objectives.build("bco_pair")) is BCO
    assert type(objectives.build("aot_unpaired")) is AOTUnpaired
    assert type(objectives.build("aot_pair")) is AOT


def test_options_compose():
    built = objectives.build("adadpo", clip=3.0, use_weighting=True, rpo_alpha=0.5)
    assert isinstance(built, WithNLL) and isinstance(built.objective, WPO)
    assert isinstance(built.objective.objective, DPO) and built.adaptive.clip == 3.0
    assert built.needs_alignments and built.needs_reference and built.beta == 0.1
    plain = objectives.build("dpo", use_weighting=False, rpo_alpha=None)
    assert type(plain) is DPO
    # needs and statistics are those of what is inside
    assert objectives.build("madpo", rpo_alpha=1.0).needs_reward_margins
    assert objectives.build("tdpo1", use_weighting=True).needs_kls
    assert objectives.build("alphadpo", rpo_alpha=1.0).observes
    assert not objectives.build("simpo", use_weighting=True).needs_reference


# A value unlike the default, for each option of that name.
SECOND = {
    "adaptive": [Adaptive()],
    "alpha": [0.9],
    "beta": [0.37],
    "beta_min": [5.0],
    "c_max": [9.0],
    "c_min": [0.8],
    "clip": [1.02, None],
    "desirable_weight": [0.3],
    "eta": [0.2],
    "exponent": [0.05, (0.01, 0.2)],
    "f_alpha_divergence_coef": [0.3, 1.5],
    "f_divergence_type": ["forward_kl", "js_divergence", "alpha_divergence"],
    "gamma": [0.15],
    "implicit_reference": ["policy", "reference", "inverse_reference"],
    "k": [2.0],
    "keep": [0.5],
    "label_smoothing": [0.3],
    "lam": [0.1],
    "length_normalized": [True, False],
    "loss_type": ["hinge", "ipo", "tpo-l"],
    "m": [0.01],
    "mode": ["amplify", "regularize"],
    "momentum": [0.2],
    "nll_weight": [0.2],
    "normalize": [False],
    "reward_shift": [False],
    "rpo_alpha": [0.5],
    "scale_by_beta": [False],
    "space": ["policy"],
    "stop_gradient": [False],
    "tau": [3.0],
    "token_mean": [True],
    "tpo_alpha": [0.3, 0.0],
    "tpo_l_gamma": [0.9],
    "undesirable_weight": [0.3],
    "use_weighting": [True],
}


# Where a default is so strong on these pairs that it puts another option out of play.
WEAKER = {"betadpo": {"m": 0.02}, "adaaotunpaired": {"clip": 1.3}}
# What an option is of.
WITH = {
    "f_alpha_divergence_coef": {"f_divergence_type": "alpha_divergence"},
    "tpo_l_gamma": {"loss_type": "tpo-l"},
}


def _two_batches(name: str, **options: Any) -> torch.Tensor:
    """Losses and gradients of a second training batch, which depend on the statistics of the first."""
    objective = objectives.build(name, **{**WEAKER.get(name, {}), **options})
    for samples in (ORDINARY[:2], ORDINARY):
        values = columns(samples)
        leaves = [values["chosen_logps"], values["rejected_logps"]]
        if isinstance(objective, Objective):
            losses = objective(Pairs(**values)).losses
            continue
        logps = torch.cat([values["chosen_logps"], values["rejected_logps"]])
        ref = torch.cat([values["ref_chosen_logps"], values["ref_rejected_logps"]])
        half = torch.arange(len(logps)) < len(samples)
        losses = objective(Examples(logps, half, ref, torch.tensor(MISMATCHED))).losses
    slopes = torch.autograd.grad(losses.sum(), leaves, materialize_grads=True)
    return torch.cat([losses.detach(), *slopes])


@pytest.mark.parametrize("name", objectives.names())
def test_every_option_changes_the_loss(name):
    """No option is accepted without an effect."""
    assert torch.equal(_two_batches(name), _two_batches(name))
    for option in objectives.options(name):
        beside = WITH.get(option, {})
        default = _two_batches(name, **beside)
        others = [_two_batches(name, **beside, **{option: value}) for value in SECOND[option]]
        changed = [not torch.allclose(x, default, rtol=1e-6, atol=0) for x in others]
        # Of True and False, one is the default.
        assert sum(changed) == len(changed) - (option == "length_normalized"), option


def test_wpo_without_alignment_is_another_weight():
    pairs = Pairs(**columns(ORDINARY))
    aligned, plain = (WPO(DPO(), alignment)(pairs).losses for alignment in (True, False))
    assert not torch.allclose(aligned, plain)


OPTIONAL = {
    "ref_chosen_logps": "needs_reference",
    "ref_rejected_logps": "needs_reference",
    "reward_margins": "needs_reward_margins",
    "chosen_alignments": "needs_alignments",
    "rejected_alignments": "needs_alignments",
    "chosen_kls": "needs_kls",
    "rejected_kls": "needs_kls",
    "chosen_lengths": None,
    "rejected_lengths": None,
}


@pytest.mark.parametrize("name", PAIRED)
def test_what_is_needed_is_named_and_the_rest_is_left_alone(name):
    objective = PAIRED[name].make()
    full = columns(ORDINARY)
    expected = objective(Pairs(**full)).losses
    for argument, flag in OPTIONAL.items():
        pairs = Pairs(**{**full, argument: None})
        try:
            losses = objective(pairs).losses
        except ValueError as error:
            assert argument in str(error)
            needed = True
        else:
            assert torch.equal(losses, expected), argument
            needed = False
        assert flag is None or needed == getattr(objective, flag), argument


def test_lengths_are_needed_by_what_divides_or_counts():
    needing = set()
    for case in PAIRED.values():
        if case.variant not in ("plain", "adaptive"):
            continue
        try:
            case.make()(Pairs(**{**columns(ORDINARY), "rejected_lengths": None}))
        except ValueError:
            needing.add(case.id)
    plain = {"lndpo", "rdpo", "cpo", "orpo", "simpo", "sft", "alphadpo", "omnidpo"}
    assert needing == {f"{n}: plain" for n in plain} | {f"{n}: adaptive" for n in ADAPTABLE}


NOT_NUMBERS = [math.nan, math.inf, -math.inf, True, "0.1", None, [0.1]]
# Kind of option -> what it says of itself, and values that it refuses.
KINDS = {
    "positive": ("must be a finite number > 0", [0, 0.0, -1.0, *NOT_NUMBERS]),
    "not negative": ("must be a finite number >= 0", [-1e-9, *NOT_NUMBERS]),
    "number": ("must be a finite number", NOT_NUMBERS),
    "below 1/2": ("must be in [0, 0.5)", [-0.1, 0.5, 1.0, *NOT_NUMBERS]),
    "between": ("must be in (0, 0.5)", [-0.1, 0, 1e-13, 0.5, 1.0, *NOT_NUMBERS]),
    "of tpo-l": ("is of loss_type='tpo-l'", [0.5, 1, "x", math.nan]),
    "of another": ("is of f_divergence_type='alpha_divergence'", [0.5, 1, "x", math.nan]),
    "below 1": ("must be in [0, 1)", [-0.1, 1, 2.0, *NOT_NUMBERS]),
    "below 1 or None": ("must be None or in [0, 1)", [-0.1, 1.0, math.nan, True, "0.1"]),
    "above 1": ("must be a finite number > 1", [1, 0.5, -3.0, *NOT_NUMBERS]),
    "share": ("must be in (0, 1]", [0, -0.5, 1.1, *NOT_NUMBERS]),
    "closed share": ("must be in [0, 1]", [-0.1, 1.1, *NOT_NUMBERS]),
    "switch": ("must be True or False", [1, 0, None, "yes"]),
    "choice": ("must be one of", ["other", None, 1, ["full"]]),
    "adaptive": ("must be an Adaptive or None", [2.0, True, {"clip": 2.0}, "ratio"]),
    "space": ('must be "ratio" or "policy"', ["log", None, 1]),
    "exponent": ('must be "length", a number, or a pair', ["x", None, True, (1.0,), [1, "2"]]),
    "clip": ("must be a finite number > 0", [0, -1.0, math.nan, math.inf, True, "2"]),
    "k": ("must be", [0, -1, 1e20, *NOT_NUMBERS]),
}
# Those whose score TRL takes an f-divergence for.
DIVERGING = (DPO, LNDPO, RobustDPO, Hinge, IPO, EXO, DiscoPOP)
REFUSING = [
    *((cls, "beta", "positive") for cls in REGISTRY.values() if cls not in (IPO, SFT)),
    *((cls, "adaptive", "adaptive") for cls, _ in ADAPTABLE.values()),
    *((cls, "f_divergence_type", "choice") for cls in DIVERGING),
    *((cls, "f_alpha_divergence_coef", "of another") for cls in DIVERGING),
    (IPO, "tau", "positive"),
    (IPO, "length_normalized", "switch"),
    (DPO, "label_smoothing", "below 1/2"),
    (RobustDPO, "label_smoothing", "below 1/2"),
    (EXO, "label_smoothing", "between"),
    (CPO, "label_smoothing", "below 1/2"),
    (SimPO, "label_smoothing", "below 1/2"),
    (DiscoPOP, "tau", "positive"),
    (SFT, "token_mean", "switch"),
    (TPO, "loss_type", "choice"),
    (TPO, "label_smoothing", "below 1/2"),
    (TPO, "tpo_alpha", "not negative"),
    (TPO, "tpo_l_gamma", "of tpo-l"),
    (TPO, "token_mean", "switch"),
    (OmniDPO, "eta", "not negative"),
    (OmniDPO, "tau", "number"),
    (OmniDPO, "gamma", "not negative"),
    (OmniDPO, "nll_weight", "not negative"),
    (RDPO, "alpha", "number"),
    (CPO, "nll_weight", "not negative"),
    (ORPO, "nll_weight", "not negative"),
    (SimPO, "gamma", "number"),
    (AlphaDPO, "gamma", "number"),
    (AlphaDPO, "alpha", "not negative"),
    (AlphaDPO, "length_normalized", "switch"),
    (AlphaDPO, "implicit_reference", "choice"),
    (AlphaDPO, "momentum", "below 1"),
    (AlphaDPO, "scale_by_beta", "switch"),
    (AlphaDPO, "normalize", "switch"),
    (AlphaDPO, "stop_gradient", "switch"),
    (MADPO, "tau", "positive"),
    (MADPO, "c_max", "above 1"),
    (MADPO, "c_min", "below 1 or None"),
    (MADPO, "lam", "positive"),
    (MADPO, "mode", "choice"),
    (BCO, "reward_shift", "switch"),
    (BCO, "momentum", "closed share"),
    (AOT, "label_smoothing", "below 1/2"),
    (AOTUnpaired, "label_smoothing", "below 1/2"),
    (BetaDPO, "m", "not negative"),
    (BetaDPO, "keep", "share"),
    (BetaDPO, "momentum", "below 1"),
    (BetaDPO, "beta_min", "positive"),
    (TDPO2, "alpha", "not negative"),
    (KTO, "desirable_weight", "not negative"),
    (KTO, "undesirable_weight", "not negative"),
    (Adaptive, "space", "space"),
    (Adaptive, "exponent", "exponent"),
    (Adaptive, "clip", "clip"),
    (Adaptive, "k", "k"),
]


@pytest.mark.parametrize(
    ("cls", "option", "kind"), REFUSING, ids=lambda x: getattr(x, "__name__", x)
)
def test_bad_hyperparameters(cls, option, kind):
    text, values = KINDS[kind]
    for value in values:
        with pytest.raises((TypeError, ValueError), match=f"^{option} {re.escape(text)}"):
            cls(**{option: value})


def test_no_hyperparameter_is_unchecked():
    checked = {(cls, option) for cls, option, _ in REFUSING}
    for name, cls in REGISTRY.items():
        own = set(objectives.options(name)) - {"use_weighting", "rpo_alpha"}
        assert {option for c, option in checked if c is cls} == own


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KTO(desirable_weight=0, undesirable_weight=0), "both 0"),
        (
            lambda: DPO(f_divergence_type="alpha_divergence", f_alpha_divergence_coef="0.5"),
            "f_alpha_divergence_coef must be a finite number",
        ),
        (lambda: OmniDPO()(Pairs(*torch.zeros(6, 2))), "OmniDPO needs reward_margins"),
        (lambda: SFT()(Pairs(*torch.zeros(2, 2))), "SFT's NLL term needs chosen_lengths"),
        (lambda: WithNLL(DPO(), 0), "rpo_alpha must be a finite number > 0"),
        (lambda: WithNLL(KTO()), "objective must be a pairwise objective"),
        (lambda: WPO("dpo"), "objective must be a pairwise objective"),
        (lambda: WPO(AOT()), r"use_weighting \(WPO\) weighs pairs.*leave it out"),
        (lambda: WPO(WithNLL(AOTUnpaired())), r"use_weighting \(WPO\) weighs pairs"),
        (
            lambda: objectives.build("aot", use_weighting=True),
            "'aot' has no option 'use_weighting'",
        ),
        (lambda: WPO(DPO(), alignment=1), "alignment must be True or False"),
        (lambda: objectives.build("dop"), "unknown objective 'dop'.*mean 'dpo'.*adadpo"),
        (lambda: objectives.build("ada-madpo"), "unknown objective 'ada-madpo'.*'.*known: dpo"),
        (lambda: objectives.build("adadpo", gamma=1), "'gamma'.*clip"),
        (lambda: objectives.build("dpo", clip=2.0), "'clip'"),
        (lambda: objectives.build("simpo", gama=2.0), "'gama'.*mean 'gamma'"),
        (lambda: objectives.build("adadpo", adaptive=Adaptive()), "'adaptive'"),
        (lambda: objectives.build("adasimpo", space="ratio"), "'space'"),
        (lambda: objectives.build("kto", use_weighting=True), "'use_weighting'"),
        (lambda: objectives.build("dpo", use_weighting=1), "use_weighting must be True or False"),
        (lambda: objectives.build("dpo", rpo_alpha=-1), "rpo_alpha"),
        (lambda: Pairs(torch.zeros(2), torch.zeros(3)), "rejected_logps"),
        (lambda: Pairs(torch.zeros(2), None), "rejected_logps"),
        (lambda: Pairs(torch.zeros(2, 1), torch.zeros(2, 1)), "chosen_logps"),
        (lambda: Pairs(*torch.zeros(2, 2), reward_margins=torch.zeros(())), "reward_margins"),
        (lambda: DPO()(Pairs(torch.zeros(2), torch.zeros(2))), "DPO needs ref_chosen_logps"),
        (lambda: DPO(adaptive=Adaptive())(Pairs(*torch.zeros(4, 2))), "chosen_lengths"),
        (lambda: MADPO()(Pairs(*torch.zeros(4, 2))), "MADPO needs reward_margins"),
        (lambda: TDPO1()(Pairs(*torch.zeros(4, 2))), "TDPO1 needs chosen_kls"),
        (lambda: TDPO2()(Pairs(*torch.zeros(4, 2))), "TDPO2 needs chosen_kls"),
        (lambda: WPO(DPO())(Pairs(*torch.zeros(4, 2))), "WPO needs chosen_alignments"),
        (lambda: Examples(*torch.zeros(3, 2), torch.zeros(1)), "desirable must be a bool"),
        (
            lambda: Examples(torch.zeros(2), torch.ones(2).bool(), torch.zeros(2), None),
            "mismatched_log_ratios",
        ),
    ],
)
def test_errors_name_the_argument(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_an_unknown_name_lists_all():
    with pytest.raises(ValueError) as error:
        objectives.build("nothing of the kind")
    assert all(name in str(error.value) for name in objectives.names())
    assert "did you mean" not in str(error.value)


def test_losses_by_their_names_elsewhere():
    """TRL's names build; other names say what is here instead, and none takes a name's place."""
    assert repr(objectives.build("sigmoid", beta=0.2)) == repr(objectives.DPO(beta=0.2))
    for name, cls in {
        "sigmoid": DPO, "sigmoid_norm": LNDPO, "hinge": Hinge, "ipo": IPO, "robust": RobustDPO,
        "exo_pair": EXO, "nca_pair": NCA, "sppo_hard": SPPO, "apo_zero": APOZero,
        "apo_down": APODown, "discopop": DiscoPOP, "sft": SFT,
    }.items():  # fmt: skip
        assert type(objectives.build(name)) is cls
        if cls is not SFT:
            assert objectives.build(f"ada_{name}").adaptive == Adaptive()
            assert repr(objectives.build(f"ada_{name}")) == repr(cls(adaptive=Adaptive()))
    assert not registry.ELSEWHERE.keys() & {*objectives.names(), *registry.SAME}
    for name, said in registry.ELSEWHERE.items():
        assert all(quoted in objectives.names() for quoted in re.findall("'(.*?)'", said)), name
        with pytest.raises(ValueError, match=f"unknown objective '{name}': .*; known: dpo, "):
            objectives.build(name)
    for name, option, ours in (
        ("ipo", "beta", "tau"),
        ("simpo", "simpo_gamma", "gamma"),
        ("discopop", "discopop_tau", "tau"),
    ):
        with pytest.raises(TypeError, match=rf"no option '{option}' \(here it is '{ours}'\)"):
            objectives.build(name, **{option: 0.5})
    for theirs, ours in registry._OPTIONS_ELSEWHERE.items():
        known = [name for name in objectives.names() if ours in objectives.options(name)]
        assert known, theirs
    with pytest.raises(ValueError) as error:
        objectives.build("sigmoids")
    assert "did you mean 'sigmoid'" in str(error.value)


def test_objectives_without_a_reference_take_any_space():
    """A caller may pass one Adaptive to all: objectives without a reference use policy space."""
    for cls in (CPO, ORPO, SimPO):
        for adaptive in ADAPTIVES.values():
            made = cls(adaptive=adaptive)
            assert made.adaptive == replace(adaptive, space="policy")
            assert not made.needs_reference


class _Minimal(Contrastive):
    """A new objective without a reference needs this class and a line in the registry."""

    score = "log_prob"

    def __init__(self, beta: float = 0.3, adaptive: Adaptive | None = None) -> None:
        super().__init__()
        self.set_options(beta=beta, adaptive=adaptive)


class _MinimalRatio(_Minimal):
    score = "log_ratio"


def test_a_new_objective_is_a_class_and_a_line(monkeypatch):
    """`space` is an option of an adaptive form only if it changes the loss."""
    monkeypatch.setitem(REGISTRY, "minimal", _Minimal)
    monkeypatch.setitem(REGISTRY, "minimalratio", _MinimalRatio)
    shared = ["beta", "exponent", "clip", "k", "use_weighting", "rpo_alpha"]
    assert objectives.options("adaminimal") == shared
    assert objectives.options("adaminimalratio") == [shared[0], "space", *shared[1:]]
    with pytest.raises(TypeError, match="no option 'space'"):
        objectives.build("adaminimal", space="ratio")
    pairs = random_pairs()
    without = replace(pairs, ref_chosen_logps=None, ref_rejected_logps=None)
    for given in (Adaptive("ratio"), Adaptive("policy")):
        made = _Minimal(adaptive=given)
        assert made.adaptive == Adaptive("policy") and not made.needs_reference
        assert torch.equal(made(without).losses, objectives.build("adaminimal")(pairs).losses)
    ratio, policy = (
        objectives.build("adaminimalratio", space=space)(pairs).losses
        for space in ("ratio", "policy")
    )
    assert not torch.allclose(ratio, policy)


def test_the_committed_errors_are_of_this_table():
    """bench/results/objectives-cpu.json: a row a case, each within its bounds."""
    path = Path(__file__).parent.parent.parent / "bench/results/objectives-cpu.json"
    report = json.loads(path.read_text())
    rows = {f"{row['objective']}: {row['variant']}": row for row in report["rows"]}
    assert rows.keys() == CASES.keys(), "out of date: run python bench/objectives.py"
    assert report["bounds"] == {str(key).removeprefix("torch."): x for key, x in BOUNDS.items()}
    for row in rows.values():
        for way in ("float64", "float32", "kernel"):
            bound = BOUNDS[torch.float64 if way == "float64" else torch.float32]
            assert row[way] is None or all(error <= bound for error in row[way].values())
        assert (row["kernel"] is None) == (row["launches"] is None) and row["launches"] in (None, 1)
    of_a_pair = {*ADAPTABLE} - {"bco", "aot", "aotunpaired"}
    assert {row["objective"] for row in rows.values() if row["kernel"]} >= of_a_pair
    for row in report["appendix_a6"]:
        assert row["balance"] == pytest.approx(row["expected"], rel=1e-12)
    assert report["listing_1"] < 1e-12


def test_a_case_is_not_shared():
    """Tests move statistics; a row must make its objective anew."""
    case: Case = CASES["alphadpo: plain"]
    assert case.make() is not case.make()


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [
        (lambda: IPO(tau=0.1), "tau", 0.3),
        (lambda: IPO(), "length_normalized", True),
        (lambda: RDPO(), "alpha", 0.5),
        (lambda: SimPO(), "gamma", 2.0),
        (lambda: AlphaDPO().eval(), "gamma", 2.0),
        (lambda: DPO(), "beta", 0.7),
        (lambda: MADPO(), "tau", 1.0),
        (lambda: DiscoPOP(), "tau", 1.0),
        (lambda: SPPO(), "beta", 1.0),
        (lambda: OmniDPO(), "gamma", 1.0),
        (lambda: EXO(), "f_divergence_type", "js_divergence"),
    ],
)
def test_a_hyperparameter_that_is_changed_later_counts(make, name, value):
    """As by a user's schedule: the loss, the kernel's options and the repr change with it."""
    changed, built = make(), make()
    type(built).__init__(built, **{name: value})
    built.train(changed.training)
    setattr(changed, name, value)
    generator = torch.Generator().manual_seed(0)
    values = -10 * torch.rand(4, 5, generator=generator)
    pairs = Pairs(*values, torch.arange(1, 6), torch.full((5,), 3), torch.linspace(-3, 3, 5))
    losses = changed(pairs).losses
    assert torch.equal(losses, built(pairs).losses)
    assert not torch.equal(losses, make()(pairs).losses)
    assert repr(changed) == repr(built)


def test_integers_are_numbers_only_where_they_count():
    floats = torch.full((2,), -3.0)
    for name in ("chosen_logps", "ref_chosen_logps", "chosen_kls"):
        values = {"chosen_logps": floats, "rejected_logps": floats}
        with pytest.raises(TypeError, match=f"{name} must be a floating-point tensor"):
            Pairs(**{**values, name: floats.long()})
    with pytest.raises(TypeError, match="reward_margins must be"):
        Pairs(floats, floats, reward_margins=floats > 0)
    short = torch.tensor([3, 9], dtype=torch.uint8)
    long = torch.tensor([9, 3], dtype=torch.uint8)
    margins = torch.tensor([2, -1])
    small = Pairs(floats, floats, floats, floats, short, long, margins)
    plain = Pairs(floats, floats, floats, floats, short.float(), long.float(), margins.float())
    for objective in (RDPO(alpha=0.5), MADPO()):
        assert torch.equal(objective(small).losses, objective(plain).losses)


@pytest.mark.parametrize("wrap", [WPO, WithNLL])
def test_what_raises_moves_no_statistics(wrap):
    objective = wrap(AlphaDPO())
    floats = torch.full((2,), -3.0)
    lengths = (None, None) if wrap is WithNLL else (torch.ones(2), torch.ones(2))
    with pytest.raises(ValueError, match="needs"):
        objective(Pairs(floats, floats, floats, floats, *lengths))
    assert objective.objective.statistics.batches == 0
