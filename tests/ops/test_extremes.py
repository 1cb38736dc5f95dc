"""Where numbers are at their ends: confident tokens, logits of 1e4, subnormals, float16, 32k tokens.

Logits are exact, one column of the head a case, so that the tests measure the fold and not the
rounding of a product. The float64 truth uses differences to the label's logit, which do not cancel
where `log_softmax` would.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch

import prefkern
from prefkern import reference
from prefkern.objectives import (
    DPO,
    IPO,
    TDPO2,
    WPO,
    Adaptive,
    AlphaDPO,
    APODown,
    DiscoPOP,
    Objective,
    OmniDPO,
    SimPO,
    build,
    names,
)
from support.machine import BACKENDS, HAS_GPU, HAS_TRITON

STRUCTURES = {
    "one_pass": (False, 4.0),
    "kept": (True, 4.0),
    "two_pass": (True, 0.003),
}


def logits_as(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden [N, N] and weight [V, N] whose product is these logits [N, V] exactly."""
    return torch.eye(rows.shape[0]), rows.t().contiguous()


def run(hidden, weight, labels, backend, structure, device, **options: Any):
    """Log-probs and gradients of hidden and weight, with a gradient of 1 a token."""
    trains, workspace_mb = STRUCTURES[structure]
    hidden = hidden.to(device, copy=True).requires_grad_()
    weight = weight.to(device, copy=True).requires_grad_(trains)
    logps = prefkern.linear_logprobs(
        hidden, weight, labels.to(device), backend=backend, workspace_mb=workspace_mb, **options
    )
    plan = prefkern.last_plan()
    assert plan is not None and plan.backend == backend
    assert plan.structure == ("two_pass" if structure == "two_pass" else "one_pass")
    assert (plan.kept_tokens > 0) == (structure == "kept")
    logps.sum().backward()
    found = (logps.detach(), hidden.grad, weight.grad)
    return tuple(None if x is None else x.cpu().double() for x in found)


def exact(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor):
    """The truth, without a difference of near-equal numbers; and the size of dW's terms."""
    h, w = hidden.double(), weight.double()
    z = h @ w.t()
    column = labels.unsqueeze(1)
    away = (z - z.gather(1, column)).scatter(1, column, -math.inf)
    # log p_y = -log1p(sum_{v != y} exp(z_v - z_y)),  or -logaddexp(0, lse) where that overflows
    others = away.logsumexp(1)
    logps = torch.where(
        others < 0, -torch.log1p(others.exp()), -torch.logaddexp(others, 0 * others)
    )
    p = (away + logps.unsqueeze(1)).exp()
    # d logp / d z_v = -p_v, of the label sum_{v != y} p_v
    dz = (-p).scatter(1, column, p.sum(1, keepdim=True))
    return logps, dz @ w, dz.t() @ h, dz.abs().t() @ h.abs()


def relative(mine: torch.Tensor, true: torch.Tensor) -> float:
    """The largest error of an element, relative to the largest element of its row."""
    scale = true.abs().amax(1, keepdim=True)
    return ((mine - true).abs() / scale.clamp(min=1e-300)).max().item()


@pytest.mark.parametrize("structure", STRUCTURES)
def test_confident_tokens(structure, backend, device):
    """p = 0.9, 0.99, 0.999, 1 - 1e-7 and beyond: logp, dH and dW to float32's relative accuracy."""
    V = 300
    misses = torch.tensor([0.1, 1e-2, 1e-3, 1e-7, 1e-12, 1e-30], dtype=torch.float64)
    torch.manual_seed(3)
    # The label's logit is 0 and the others share the rest unevenly, over several tiles.
    rest = torch.randn(len(misses), V, dtype=torch.float64)
    labels = torch.tensor([0, 5, 128, 130, 299, 200])
    rest.scatter_(1, labels.unsqueeze(1), -math.inf)
    rows = rest.log_softmax(1) + (misses / (1 - misses)).log().unsqueeze(1)
    rows = rows.scatter(1, labels.unsqueeze(1), 0.0).float()
    hidden, weight = logits_as(rows)
    logps, dhidden, dweight = run(hidden, weight, labels, backend, structure, device)
    true = exact(hidden, weight, labels)
    # The case is what it says: rounded logits move a probability by 4e-6 of itself at most.
    torch.testing.assert_close(-torch.expm1(true[0]), misses, rtol=1e-5, atol=0)
    torch.testing.assert_close(logps, true[0], rtol=2e-6, atol=0)
    assert relative(dhidden, true[1]) < 5e-6
    if dweight is not None:
        # By token, whose columns of dW are its own, from 0.1 down to 1e-30.
        assert relative(dweight.t(), true[2].t()) < 5e-6


FAR = {
    "+-1e4": [-1e4, 1e4],
    "all -1e4": [-1e4, -1e4 + 1],
    "all 1e4": [1e4 - 1, 1e4],
    "equal": [0.0, 0.0],
    "equal and low": [-1e4, -1e4],
    "all negative": [-50.0, -1.0],
}


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", FAR)
def test_far_and_equal_logits(name, structure, backend, device):
    """At the largest, the smallest and a middle logit, results are finite and equal float64's."""
    V = 300
    rows = torch.linspace(*FAR[name], V).expand(3, V).clone()
    labels = torch.tensor([0, V - 1, 150])
    hidden, weight = logits_as(rows)
    logps, dhidden, dweight = run(hidden, weight, labels, backend, structure, device)
    true = exact(hidden, weight, labels)
    # The exponentials of differences that float32 rounds to 1e-3, at 1e4.
    torch.testing.assert_close(logps, true[0], rtol=1e-6, atol=1e-37)
    # W_y - sum_v p_v W_v, of rows of 1e4, is a difference whose terms float32 rounds.
    size = max(rows.abs().max().item(), 1e-30)
    torch.testing.assert_close(dhidden, true[1], rtol=1e-5, atol=5e-7 * size)
    if dweight is not None:
        torch.testing.assert_close(dweight, true[2], rtol=1e-5, atol=1e-37)
    if name.startswith("equal"):
        torch.testing.assert_close(
            logps, torch.full((3,), -math.log(V)).double(), rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("structure", STRUCTURES)
def test_subnormals(structure, backend, device):
    """A head, hidden states and gradients below 2^-126 keep their values or become 0, not NaN."""
    tiny = 1e-41
    torch.manual_seed(0)
    labels = torch.tensor([0, 129, 60, 5])
    for hidden, weight in (
        (torch.randn(4, 8) * tiny, torch.randn(130, 8)),
        (torch.randn(4, 8), torch.randn(130, 8) * tiny),
        (torch.full((4, 8), tiny), torch.full((130, 8), tiny)),
    ):
        bias = torch.full((130,), tiny, device=device)
        arguments = (hidden, weight, labels, backend, structure, device)
        logps, dhidden, dweight = run(*arguments, bias=bias)
        true = exact(hidden, weight, labels)
        torch.testing.assert_close(logps, true[0], rtol=1e-6, atol=0)
        # A gradient that is subnormal itself is right to its last bit or, on a GPU, may be 0.
        unit = 1.2e-38 if HAS_GPU else 3e-45
        atol = max(2e-7 * weight.abs().max().item(), unit)
        torch.testing.assert_close(dhidden, true[1], rtol=1e-4, atol=atol)
        if dweight is not None:
            torch.testing.assert_close(dweight, true[2], rtol=1e-4, atol=1.2e-38)
    # A gradient that is subnormal: a token that is all but certain.
    rows = torch.zeros(6, 130)
    rows[:, 7] = 90.0
    hidden, weight = logits_as(rows)
    labels = torch.full((6,), 7)
    found = run(hidden, weight, labels, backend, structure, device)
    true = exact(hidden, weight, labels)
    for mine, truth in zip(found, true[:3], strict=True):
        if mine is not None:
            torch.testing.assert_close(mine, truth, rtol=2e-2, atol=1.2e-38)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_float16_at_the_end_of_its_range(structure, backend, device):
    """Operands near 65504, products and sums far beyond it: float32 holds the logits."""
    rows = torch.linspace(-60000.0, 60000.0, 300).half().float()
    hidden, weight = logits_as(rows.expand(3, 300).clone())
    hidden = hidden * 512.0
    labels = torch.tensor([299, 298, 0])
    arguments = (hidden.half(), weight.half(), labels, backend, structure, device)
    logps, dhidden, dweight = run(*arguments, logit_scale=1e-6)
    z = (hidden.half().double() @ weight.half().double().t() * 1e-6).requires_grad_()
    true = z.log_softmax(1).gather(1, labels.unsqueeze(1))[:, 0]
    (dz,) = torch.autograd.grad(true.sum(), z)
    torch.testing.assert_close(logps, true.detach(), rtol=1e-6, atol=1e-6)
    dz = dz * 1e-6
    for mine, truth in ((dhidden, dz @ weight.double()), (dweight, dz.t() @ hidden.double())):
        if mine is not None:
            assert mine.isfinite().all()
            # float16's own subnormals end at 6e-8.
            torch.testing.assert_close(mine, truth, rtol=2e-3, atol=6e-8)


def test_a_sum_of_32k_tokens(device):
    """One pair of 32,768 tokens each: a sum's error is the tokens' own, and no more.

    A token's log-prob has an error of at most 2e-7 times the size of its logits. Errors of both
    signs add up like a random walk. A sum is added in float64 and rounded once. So the bound is
    2e-7 sqrt(T) times the spread of 5, plus half a unit in the last place of the sum.
    """
    T, H, V = 32768, 8, 64
    torch.manual_seed(0)
    hidden = torch.randn(2, T, H) * 5 / H**0.5
    weight, labels = torch.randn(V, H), torch.randint(V, (2, T))
    loss_fn = prefkern.FusedPreferenceLoss(build("simpo"), backend="torch")
    leaf = hidden.to(device).requires_grad_()
    out = loss_fn(leaf, weight.to(device), labels.to(device))
    out.loss.backward()
    z = hidden.double() @ weight.double().t()
    per_token = z.log_softmax(-1).gather(-1, labels.unsqueeze(-1))[..., 0]
    sums = torch.cat([out.chosen_logps, out.rejected_logps]).detach().cpu().double()
    error = (sums - per_token.sum(1)).abs()
    assert sums.abs().min() > 1e5
    assert (error <= 2e-7 * 5 * T**0.5 + 2**-24 * sums.abs()).all(), error
    # In float32 throughout, one after another, it is beyond that.
    naive = per_token.float().cumsum(1)[:, -1].double()
    assert (naive - per_token.sum(1)).abs().max() > 0
    # Every token is pushed by the sequence's one coefficient.
    pushed = out.chosen_gradients.item()
    p = z[0, -1].softmax(-1)
    dlast = weight.double()[labels[0, -1]] - p @ weight.double()
    torch.testing.assert_close(
        leaf.grad[0, -1].cpu().double(), pushed * dlast, rtol=1e-4, atol=1e-9
    )


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_vocabulary_of_262144(structure, backend, device):
    """Gemma's vocabulary: a confident token, an unlikely one and the last entry."""
    V, N, H = 262144, 3, 4
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, H), torch.randn(V, H)
    labels = torch.tensor([int((hidden[0] @ weight.t()).argmax()), 7, V - 1])
    trains, _ = STRUCTURES[structure]
    workspace = {"one_pass": 1.0, "kept": 40.0, "two_pass": 1.0}[structure]
    leaf, head = hidden.to(device).requires_grad_(), weight.to(device).requires_grad_(trains)
    logps = prefkern.linear_logprobs(
        leaf, head, labels.to(device), backend=backend, workspace_mb=workspace
    )
    plan = prefkern.last_plan()
    assert (plan.structure == "two_pass") == (structure == "two_pass")
    logps.sum().backward()
    true = exact(hidden, weight, labels)
    torch.testing.assert_close(logps.detach().cpu().double(), true[0], rtol=1e-6, atol=2e-6)
    # Some CPUs' libraries add up so long a product of few rows one term after another.
    eager = hidden.detach().clone().requires_grad_()
    reference.linear_logprobs(eager, weight.detach(), labels).sum().backward()
    bound = max(2e-6, 1.1 * relative(eager.grad.double(), true[1]))
    assert relative(leaf.grad.cpu().double(), true[1]) < bound
    if trains:
        # Down to entries of 1e-10, relative to what is added up for each.
        error = (head.grad.cpu().double() - true[2]).abs()
        assert (error <= 5e-6 * true[3]).all()


WITH_KERNEL = [
    name
    for name in names()
    if isinstance(objective := build(name), Objective) and objective.pair_kernel_options()
]


def of_pairs(name: str) -> Objective:
    """An objective by name; TPO without its gold part, which the kernel does not compute."""
    objective = build(name)
    return build(name, tpo_alpha=0.0) if objective.needs_gold else objective


@pytest.fixture
def as_gpus_compare(monkeypatch) -> None:
    """A GPU's maximum of NaN and a number is the number; the interpreter's is NaN."""
    if HAS_GPU or not HAS_TRITON:
        return
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder

    for name, function in (("create_maxnumf", np.fmax), ("create_minnumf", np.fmin)):
        monkeypatch.setattr(
            InterpreterBuilder,
            name,
            lambda self, a, b, function=function: self.binary_op(a, b, function),
        )


def one_pair(objective, place: str, value: float, device: str, **others: float):
    """(loss, coefficients) of one token a side, by the kernel and by the objective in float64."""
    kernels = pytest.importorskip("prefkern_kernels")
    numbers = {"L_w": -3.0, "L_l": -4.0, "R_w": -3.5, "R_l": -3.6, "h": 0.3, **others, place: value}
    logps, ref, margins = (
        torch.tensor([numbers[key] for key in keys], device=device)
        for keys in (("L_w", "L_l"), ("R_w", "R_l"), ("h",))
    )
    offsets = torch.arange(3, device=device)
    options = objective.pair_kernel_options()
    ours = kernels.pair_loss(
        logps,
        offsets,
        ref if objective.needs_reference else None,
        margins if objective.needs_reward_margins else None,
        **options,
    )
    leaf = logps.double().requires_grad_()
    lengths = torch.ones(2, dtype=torch.int64, device=device)
    pairs = prefkern.Pairs.of_sequences(leaf, ref.double(), lengths, margins.double())
    theirs = objective(pairs)
    theirs.losses.sum().backward()
    return ours, theirs, leaf.grad


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs triton")
@pytest.mark.parametrize("place", ["L_w", "L_l", "R_w", "R_l", "h"])
@pytest.mark.parametrize("name", WITH_KERNEL)
def test_nan_stays_nan_in_the_pair_kernel(name, place, as_gpus_compare, device):
    objective = of_pairs(name).eval().to(device)
    is_used = place[0] == "L" or (objective.needs_reference and place[0] == "R")
    is_used = is_used or (objective.needs_reward_margins and place == "h")
    # Before its first batch alpha-DPO has no spread, and takes no part of the reference. SFT has
    # nothing of rejected responses.
    if not is_used or (name == "alphadpo" and place[0] == "R") or (name, place) == ("sft", "L_l"):
        return
    ours, theirs, _ = one_pair(objective, place, math.nan, device)
    assert theirs.losses.isnan().all() and ours.losses.isnan().all()
    assert torch.equal(ours.beta_chosen.isnan(), theirs.beta_chosen.isnan())


def of_no_weight() -> AlphaDPO:
    """Statistics with a spread; their z-score has a weight of 0."""
    objective = AlphaDPO(alpha=0.0)
    objective.statistics.variance.fill_(4.0)
    return objective


OBJECTIVES = {
    **{name: functools.partial(of_pairs, name) for name in WITH_KERNEL},
    "dpo, smoothed": lambda: DPO(label_smoothing=0.1),
    "adadpo, smoothed": lambda: DPO(label_smoothing=0.1, adaptive=Adaptive()),
    "adadpo, unbounded": lambda: DPO(adaptive=Adaptive("policy", 1.0, None)),
    "adaipo, of means": lambda: IPO(length_normalized=True, adaptive=Adaptive()),
    "dpo, Jensen-Shannon": lambda: DPO(f_divergence_type="js_divergence"),
    "dpo, forward KL": lambda: DPO(f_divergence_type="forward_kl"),
    "adadpo, alpha 1.5": lambda: DPO(
        f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1.5, adaptive=Adaptive()
    ),
    "adaapodown": lambda: APODown(adaptive=Adaptive()),
    "adadiscopop": lambda: DiscoPOP(adaptive=Adaptive()),
    "discopop, beyond 1": lambda: DiscoPOP(tau=2.0),
    "adaomnidpo": lambda: OmniDPO(nll_weight=0.1, adaptive=Adaptive()),
    "simpo, smoothed": lambda: SimPO(label_smoothing=0.1),
    "alphadpo, alpha 0": of_no_weight,
}


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs triton")
@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("place", ["L_w", "L_l"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_label_without_probability_in_the_pair_kernel(name, place, device):
    """If a bias rules a label out, its log-prob is -inf; the loss is the formula's, maybe inf."""
    objective = OBJECTIVES[name]().eval().to(device)
    ours, theirs, gradient = one_pair(objective, place, -math.inf, device)
    torch.testing.assert_close(
        ours.losses.double(), theirs.losses.detach(), equal_nan=True, rtol=1e-5, atol=1e-30
    )
    torch.testing.assert_close(ours.coefficients.double(), gradient, rtol=1e-4, atol=1e-30)
    torch.testing.assert_close(ours.rewards[:1].double(), theirs.chosen_rewards, rtol=1e-5, atol=0)
    assert not ours.losses.isnan().any() and ours.coefficients.isfinite().all()
    # What the losses of ever less probable responses tend to: a number, or without bound.
    far, _, _ = one_pair(objective, place, -1e5, device)
    if ours.losses.abs() < 1e30:
        torch.testing.assert_close(ours.losses, far.losses, rtol=1e-5, atol=1e-30)
    else:
        assert ours.losses.sign() == far.losses.sign() and far.losses.abs() > 20


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_weight_of_0_leaves_out_what_it_weighs(bad):
    """Exactly, although 0 times inf is NaN: alpha-DPO becomes SimPO, and TDPO2 becomes DPO."""
    given = [torch.tensor(x) for x in ([-3.0, -4.0], [-5.0, -9.0], [-1.0, bad], [-2.0, -3.0])]
    pairs = prefkern.Pairs(*given, *[torch.tensor([3, 2])] * 2)
    mine = of_no_weight().eval()(pairs)
    simpo = SimPO(mine.beta_chosen[0].item(), 4.0)(pairs)
    assert torch.equal(mine.losses, simpo.losses)
    given[2] = torch.tensor([-1.0, -2.0])
    kls = {f"{side}_kls": torch.tensor([0.5, -bad]) for side in ("chosen", "rejected")}
    mine = TDPO2(alpha=0.0)(prefkern.Pairs(*given, **kls))
    assert torch.equal(mine.losses, DPO()(prefkern.Pairs(*given)).losses)


def test_a_response_that_the_policy_cannot_give_weighs_nothing():
    """WPO's weight falls faster than the loss grows."""
    chosen = torch.tensor([-math.inf, -3.0, -3000.0], requires_grad=True)
    zeros = torch.zeros(3)
    ones = torch.ones(3)
    losses = WPO(DPO(), alignment=False)(
        prefkern.Pairs(chosen, zeros - 1, zeros, zeros, ones, ones)
    ).losses
    losses.sum().backward()
    assert (losses == 0).tolist() == [True, False, True]
    assert (chosen.grad == 0).tolist() == [True, False, True]


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs triton")
@pytest.mark.parametrize("place", ["R_w", "R_l"])
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_weight_of_0_leaves_it_out_in_the_pair_kernel(bad, place, device):
    ours, theirs, gradient = one_pair(of_no_weight().eval().to(device), place, bad, device)
    torch.testing.assert_close(ours.losses.double(), theirs.losses.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.coefficients.double(), gradient, rtol=1e-5, atol=0)


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs triton")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_largest_coefficient_is_a_number(device):
    """Every hyper-parameter at its end, and a response whose log-ratio is 0."""
    objective = DPO(1e6, adaptive=Adaptive("policy", (0.0, 1.0), None, 1e6)).to(device)
    numbers = {"L_w": -3.5, "R_w": -3.5}
    ours, theirs, gradient = one_pair(objective, "L_l", -99.0, device, **numbers)
    assert ours.beta_chosen.isfinite().all() and ours.beta_chosen > 1e37
    torch.testing.assert_close(ours.beta_chosen.double(), theirs.beta_chosen, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.losses.double(), theirs.losses.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.coefficients.double(), gradient, rtol=1e-5, atol=0)
