"""Objectives against the papers: AdaDPO's Listing 1, its numbers, its special cases, and TRL's DPO."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from listing import listing_1

from prefkern import Pairs, objectives
from prefkern.objectives import DPO, Adaptive


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
    )


def gradients(loss: torch.Tensor, pairs: Pairs) -> torch.Tensor:
    return torch.stack(torch.autograd.grad(loss, [pairs.chosen_logps, pairs.rejected_logps]))


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


def test_adadpo_by_name_is_adadpo_by_class():
    by_name = objectives.build("adadpo", beta=0.1)
    assert isinstance(by_name, DPO) and by_name.adaptive == Adaptive(clip=2.0)
    assert objectives.build("dpo", beta=0.3).adaptive is None
    custom = objectives.build("adadpo", beta=0.1, clip=None, exponent=[0.5, 1.0], space="policy")
    assert custom.adaptive == Adaptive("policy", (0.5, 1.0), None)


def test_no_gradient_flows_through_the_coefficient():
    """The loss as a function of the log-probs alone, coefficients held: finite differences."""
    pairs = random_pairs(B=4, spread=2.0)
    objective = objectives.build("adadpo", beta=0.3)
    result = objective(pairs)
    assert not result.beta_chosen.requires_grad
    analytic = gradients(result.losses.sum(), pairs)
    step = 1e-6
    for side, sign in ((0, 1), (1, -1)):
        beta = (result.beta_chosen, result.beta_rejected)[side]
        values = []
        for move in (step, -step):
            delta = result.chosen_rewards - result.rejected_rewards + sign * beta * move
            values.append(-F.logsigmoid(delta))
        torch.testing.assert_close((values[0] - values[1]) / (2 * step), analytic[side])


@pytest.mark.parametrize("space", ["ratio", "policy"])
def test_exponent_0_is_plain(space):
    pairs = random_pairs()
    plain = DPO(0.2)(pairs)
    adaptive = DPO(0.2, adaptive=Adaptive(space=space, exponent=0, clip=None))(pairs)
    assert torch.equal(plain.losses, adaptive.losses)
    assert torch.equal(plain.beta_chosen, adaptive.beta_chosen)


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


@pytest.mark.parametrize(
    "adaptive",
    [
        None,
        Adaptive(),
        Adaptive(clip=None),
        Adaptive(exponent=1, clip=None),
        Adaptive(space="policy", exponent=(1.0, 0.5), clip=None),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extremes_stay_finite(adaptive, dtype):
    """Margins of 1e4, equal responses, empty responses: no NaN, no infinity."""
    sizes = [0.0, 1.0, -1.0, 1e4, -1e4]
    chosen, rejected = torch.tensor(list(itertools.product(sizes, sizes))).to(dtype).unbind(1)
    zeros = torch.zeros_like(chosen)
    for lengths in (torch.zeros(25, dtype=torch.int64), torch.full((25,), 7)):
        leaves = [x.clone().requires_grad_() for x in (chosen, rejected)]
        result = DPO(0.1, adaptive=adaptive)(Pairs(*leaves, zeros, zeros, lengths, lengths))
        assert result.losses.dtype == torch.float32
        result.losses.sum().backward()
        for value in (*result, *(leaf.grad.float() for leaf in leaves)):
            # A float16 leaf cannot hold a gradient beyond 65504; what reached it was finite.
            if value.dtype == torch.float32 and dtype != torch.float16:
                assert value.isfinite().all()
            assert not value.isnan().any()


def test_label_smoothing_is_cdpo():
    pairs = random_pairs(spread=3.0)
    delta = 0.3 * (
        (pairs.chosen_logps - pairs.ref_chosen_logps)
        - (pairs.rejected_logps - pairs.ref_rejected_logps)
    )
    expected = -0.9 * F.logsigmoid(delta) - 0.1 * F.logsigmoid(-delta)
    torch.testing.assert_close(DPO(0.3, label_smoothing=0.1)(pairs).losses, expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DPO(beta=0), "beta"),
        (lambda: DPO(beta=math.nan), "beta"),
        (lambda: DPO(beta="0.1"), "beta"),
        (lambda: DPO(label_smoothing=0.5), "label_smoothing"),
        (lambda: DPO(adaptive=2.0), "adaptive"),
        (lambda: Adaptive(space="log"), "space"),
        (lambda: Adaptive(exponent="lengths"), "exponent"),
        (lambda: Adaptive(exponent=(1.0,)), "exponent"),
        (lambda: Adaptive(clip=0), "clip"),
        (lambda: Adaptive(clip=math.inf), "clip"),
        (lambda: Adaptive(k=-1), "k must"),
        (lambda: Adaptive(k=1e20), "k must"),
        (lambda: objectives.build("dop"), "adadpo"),
        (lambda: objectives.build("adadpo", gamma=1), "'gamma'.*clip"),
        (lambda: objectives.build("dpo", clip=2.0), "'clip'"),
        (lambda: objectives.build("adadpo", adaptive=Adaptive()), "'adaptive'"),
        (lambda: Pairs(torch.zeros(2), torch.zeros(3)), "rejected_logps"),
        (lambda: Pairs(torch.zeros(2), None), "rejected_logps"),
        (lambda: Pairs(torch.zeros(2, 1), torch.zeros(2, 1)), "chosen_logps"),
        (lambda: DPO()(Pairs(torch.zeros(2), torch.zeros(2))), "ref_chosen_logps"),
        (
            lambda: DPO(adaptive=Adaptive())(Pairs(*torch.zeros(4, 2))),
            "chosen_lengths",
        ),
    ],
)
def test_errors_name_the_argument(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()
