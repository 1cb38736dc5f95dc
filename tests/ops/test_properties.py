"""The operator on drawn problems (`drawn`), within derived bounds (`error_bounds`).

Each value and each gradient is compared with float64 on the same rounded inputs, element by
element. Invariances are tested too: bitwise if both ways add the same numbers in the same order,
else within twice the bounds, since both ways are within one bound of the truth.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import prefkern
from prefkern import reference
from support.drawn import HALVES, Problem, assert_within, flat, gradient_bounds, problems, run
from support.error_bounds import TokenBounds
from support.machine import BACKENDS


def assert_gradients(
    problem: Problem, mine: dict[str, Tensor], true: dict[str, Tensor], bounds: dict[str, Tensor]
) -> None:
    scored = problem.scored.reshape(-1)
    for name, bound in bounds.items():
        ours, truth = mine[name], true[name]
        assert ours.shape == truth.shape and ours.dtype == problem.tensors[name].dtype
        if name in ("hidden", "lora_hidden"):
            ours, truth = flat(ours), flat(truth)
            assert (ours[~scored] == 0).all()
            ours, truth = ours[scored], truth[scored]
        assert_within(ours, truth, bound, name)


@pytest.mark.parametrize("backend", BACKENDS)
@given(st.data())
def test_values_and_gradients_are_float64s(backend, data):
    problem = data.draw(problems(backend))
    with_stats = data.draw(st.booleans())
    out, gradients = run(problem, return_stats=with_stats)
    plan = prefkern.last_plan()
    doubled, scored = problem.doubled(), problem.scored
    assert plan is not None and plan.backend == backend and plan.tokens == scored.sum()
    truth = reference.linear_logprobs(
        labels=problem.labels, **doubled, **problem.options, return_stats=True
    )
    assert isinstance(truth, prefkern.TokenStats)
    bounds = problem.bounds()
    logps = (out.logps if with_stats else out).detach()
    assert (logps <= 0).all() and (logps[~scored] == 0).all()
    assert_within(logps[scored], truth.logps.detach()[scored], bounds.logps, "logps")
    if with_stats:
        many = (math.sqrt(plan.vocab_size) / 4 + 4) * bounds.unit
        # d entropy / d z_v = -p_v (log p_v + entropy)
        entropy = truth.entropy[scored]
        bound = 4 * bounds.logit * entropy + many * (1 + entropy)
        assert_within(out.entropy[scored], entropy, bound, "entropy")
        bound = bounds.logit * (1 + many / bounds.unit / 4)
        assert_within(out.mean_logit[scored], truth.mean_logit[scored], bound, "mean_logit")
    if not problem.trains:
        return
    leaves = [doubled[name] for name in problem.trains]
    true = torch.autograd.grad((truth.logps * problem.grad).sum(), leaves)
    true = dict(zip(problem.trains, true, strict=True))
    assert_gradients(problem, gradients, true, gradient_bounds(problem, bounds, problem.grad))


@given(st.data())
def test_float64_is_the_oracles_to_its_own_digits(data):
    """On the torch backend; the other one does not compute in float64."""
    problem = data.draw(problems("torch", dtypes=(torch.float64,)))
    logps, gradients = run(problem)
    doubled, scored = problem.doubled(), problem.scored
    truth = reference.linear_logprobs(labels=problem.labels, **doubled, **problem.options)
    assert isinstance(truth, Tensor) and logps.dtype == torch.float64
    # Both are off by these bounds, the oracle's log_softmax by u / (1 - p_y) more: `floor`.
    bounds = problem.bounds(unit=2.0**-53)
    assert_within(logps.detach()[scored], truth.detach()[scored], 2 * bounds.logps, "logps")
    if not problem.trains:
        return
    leaves = [doubled[name] for name in problem.trains]
    true = torch.autograd.grad((truth * problem.grad).sum(), leaves)
    true = dict(zip(problem.trains, true, strict=True))
    doubled_bounds = {
        name: 2 * bound for name, bound in gradient_bounds(problem, bounds, problem.grad).items()
    }
    assert_gradients(problem, gradients, true, doubled_bounds)


def assert_same(problem: Problem, bounds: TokenBounds, before: Any, after: Any) -> None:
    """Assert that two ways to one result agree; each is within the bounds of the truth."""
    scored = problem.scored
    assert_within(after[0][scored], before[0][scored].double(), 2 * bounds.logps, "logps")
    limits = gradient_bounds(problem, bounds, problem.grad)
    true = {name: gradient.double() for name, gradient in before[1].items()}
    # Each was rounded to its dtype.
    rounding = torch.finfo(problem.tensors["hidden"].dtype).eps
    limits = {
        name: 2 * bound + rounding * _scored_part(problem, name, true[name]).abs()
        for name, bound in limits.items()
    }
    assert_gradients(problem, after[1], true, limits)


def _scored_part(problem: Problem, name: str, gradient: Tensor) -> Tensor:
    if name in ("hidden", "lora_hidden"):
        return flat(gradient)[problem.scored.reshape(-1)]
    return gradient


def detached(result: tuple[Tensor, dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    return result[0].detach(), result[1]


@pytest.mark.long(backend="triton")
@pytest.mark.parametrize("backend", BACKENDS)
@given(st.data())
def test_order_tile_and_shift_do_not_show(backend, data):
    """Tokens permuted, the workspace changed, a constant added to all logits, the batch in two."""
    problem = data.draw(problems(backend, layouts=("contiguous",)))
    bounds = problem.bounds()
    rows, length = problem.labels.shape
    before = detached(run(problem))
    change = data.draw(st.sampled_from(["order", "tiles", "shift", "parts"]))

    def of_tokens(change: Any) -> dict[str, Tensor]:
        """The states' tensors changed, as leaves."""
        return {
            name: change(x.detach()).requires_grad_(name in problem.trains)
            if "hidden" in name
            else x
            for name, x in problem.tensors.items()
        }

    if change == "tiles":
        workspace_mb = problem.workspace_mb * 2.0 ** data.draw(st.integers(-6, 6))
        assert_same(problem, bounds, before, detached(run(problem, workspace_mb=workspace_mb)))
    if change == "order":
        order = torch.randperm(length)
        logps, gradients = run(
            problem,
            tensors=of_tokens(lambda x: x[:, order]),
            labels=problem.labels[:, order],
            grad=problem.grad[:, order],
        )
        back = order.argsort()
        gradients = {k: g[:, back] if "hidden" in k else g for k, g in gradients.items()}
        assert_same(problem, bounds, before, (logps.detach()[:, back], gradients))
    if change == "shift":
        # A larger logit is rounded more; of capped ones it is no invariant.
        assume("bias" in problem.tensors and problem.options["softcap"] is None)
        # Of which every dtype holds the sums.
        bias = (problem.tensors["bias"].detach() * 2).round().clamp(-20, 20) / 2
        shifted = bias + data.draw(st.sampled_from([-64.0, -4.0, 0.5, 64.0]))
        before, after = (
            {**problem.tensors, "bias": x.requires_grad_("bias" in problem.trains)}
            for x in (bias, shifted)
        )
        bounds = max((problem.bounds(x) for x in (before, after)), key=lambda x: x.logit.sum())
        before, after = (detached(run(problem, tensors=x)) for x in (before, after))
        assert_same(problem, bounds, before, after)
    if change == "parts":
        assume(rows > 1 and problem.tensors["hidden"].dtype == torch.float32)
        one, rest = (
            detached(
                run(
                    problem,
                    tensors=of_tokens(lambda x, part=part: x[part]),
                    labels=problem.labels[part],
                    grad=problem.grad[part],
                )
            )
            for part in (slice(0, 1), slice(1, rows))
        )
        gradients = {
            name: torch.cat([g, rest[1][name]]) if "hidden" in name else g + rest[1][name]
            for name, g in one[1].items()
        }
        assert_same(problem, bounds, before, (torch.cat([one[0], rest[0]]), gradients))


@pytest.mark.long(backend="triton")
@pytest.mark.parametrize("backend", BACKENDS)
@given(st.data())
def test_tokens_that_are_not_scored_change_no_bit(backend, data):
    """Padding with any content changes nothing: the scored rows are in the same tiles."""
    problem = data.draw(problems(backend, layouts=("contiguous",)))
    # With nothing to leave out rows are not gathered, and a product may read them in another order.
    assume(not problem.scored.all())
    logps, gradients = detached(run(problem))
    extra = data.draw(st.integers(1, 40))

    def padded(x: Tensor, value: float) -> Tensor:
        pad = x.new_full((x.shape[0], extra, *x.shape[2:]), value)
        return torch.cat([x, pad], 1)

    tensors = {
        name: padded(x.detach(), math.nan).requires_grad_(name in problem.trains)
        if "hidden" in name
        else x
        for name, x in problem.tensors.items()
    }
    out, found = run(
        problem,
        tensors=tensors,
        labels=padded(problem.labels, problem.options["ignore_index"]),
        grad=padded(problem.grad, 1.0),
    )
    length = logps.shape[1]
    assert torch.equal(out[:, :length], logps) and (out[:, length:] == 0).all()
    for name, gradient in found.items():
        if "hidden" in name:
            assert (gradient[:, length:] == 0).all()
            gradient = gradient[:, :length]
        assert torch.equal(gradient, gradients[name]), name


@pytest.mark.long(backend="triton")
@pytest.mark.parametrize("backend", BACKENDS)
@given(st.data())
def test_probabilities_sum_to_1(backend, data):
    """Every entry scored for one hidden state; for every gradient sum_v p_v d logp_v / dx = 0."""
    largest = {"torch": (1, 100, 500), "triton": (1, 40, 33)}[backend]
    problem = data.draw(problems(backend, layouts=("contiguous",), largest=largest))
    V = problem.tensors["weight"].shape[0]
    tensors = {
        name: flat(x.detach())[:1].repeat(V, 1) if "hidden" in name else x.detach()
        for name, x in problem.tensors.items()
    }
    tensors = {k: x.requires_grad_(k in problem.trains) for k, x in tensors.items()}
    problem.tensors, problem.labels = tensors, torch.arange(V)
    problem.options["ignore_index"] = -100
    problem.workspace_mb = 4 * V * V / 2**20 * 2.0 ** data.draw(st.integers(-4, 1))
    with torch.no_grad():
        logps = prefkern.linear_logprobs(
            labels=problem.labels, **tensors, **problem.options, backend=backend,
            workspace_mb=problem.workspace_mb,
        )  # fmt: skip
    bounds = problem.bounds()
    p = logps.double().exp()
    assert (logps <= 0).all()
    assert abs(p.sum().item() - 1) <= (p * bounds.logps).sum().item() * 1.01 + 1e-15
    problem.grad = p.float()
    _, gradients = run(problem)
    # p itself is off, by what that changes of p_v d logp_v.
    off = bounds.logps + 2.0**-24
    limits = gradient_bounds(problem, bounds, problem.grad)
    moved = gradient_bounds(problem, replace(bounds, relative=off), problem.grad)
    for name in problem.trains:
        total, limit = gradients[name].double(), limits[name] + moved[name]
        if "hidden" in name:
            total, limit = total.sum(0), limit.sum(0)
        if gradients[name].dtype in HALVES:
            # Each of what is summed here was rounded, float16's down to 2^-25.
            rounding = torch.finfo(gradients[name].dtype).eps * gradients[name].double().abs()
            limit = limit + (rounding.sum(0) if "hidden" in name else rounding) + V * 2.0**-25
        assert_within(total, torch.zeros_like(total), limit, name)
