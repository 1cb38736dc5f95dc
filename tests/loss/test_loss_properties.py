"""The loss and the divergence on drawn problems, within derived bounds of float64.

Each part of the loss has its own bound. Sequence sums are compared with the sums of their tokens.
The objective is compared with itself in float64, on the sums that the loss computed. Gradients are
compared with those of the sums, times the gradients that the loss reports for them.
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
from prefkern.objectives import Objective, Pairs
from support.drawn import LAYOUTS, Problem, assert_within, flat, gradient_bounds, laid_out, problems
from support.error_bounds import LEAST
from support.machine import BACKENDS
from support.objective_cases import CASES

# Of all objectives but those with a term of the divergence, which is another operator's.
PAIRED = [
    name
    for name, case in CASES.items()
    # The batches are of pairs: those with a third response are in test_gold.py.
    if isinstance(objective := case.make(), Objective)
    and not (objective.needs_kls or objective.needs_gold)
]
# What float32 may make of an objective's formula on given sums; `test_objectives` has it tighter.
FORMULA = 1e-5


@st.composite
def batches(draw, backend: str) -> tuple[Problem, dict[str, Any]]:
    """Pairs, and a reference: through the same head or another, or sums computed earlier."""
    largest = {"torch": (120, 64, 1500), "triton": (12, 16, 150)}[backend]
    problem = draw(problems(backend, largest=largest))
    # Rows in pairs: each row again, in another order of tokens and with a mask of its own.
    torch.manual_seed(draw(st.integers(0, 2**31)))
    order = torch.randperm(problem.labels.shape[1])
    double = {
        name: laid_out(
            torch.cat([x.detach(), x.detach()[:, order]]), draw(st.sampled_from(LAYOUTS[:4]))
        ).requires_grad_(name in problem.trains)
        for name, x in problem.tensors.items()
        if "hidden" in name
    }
    problem.tensors = {**problem.tensors, **double}
    labels = torch.cat([problem.labels, problem.labels[:, order]])
    labels[torch.rand(labels.shape) < 0.2] = problem.options["ignore_index"]
    problem.labels = labels
    x = problem.tensors["hidden"].detach()
    width = problem.tensors["weight"].shape[1]
    kind = draw(st.sampled_from(["shared head", "own head", "sums"]))
    extra: dict[str, Any] = {"reward_margins": torch.randn(len(labels) // 2) * 5}
    if kind == "sums":
        extra["ref_logps"] = -3.0 * labels.ne(problem.options["ignore_index"]).sum(1)
    elif kind == "shared head" and "lora_hidden" not in problem.tensors:
        extra["ref_hidden"] = x + 0.1 * torch.randn_like(x)
        extra["ref_weight"] = problem.tensors["weight"].detach()
        if "bias" in problem.tensors:
            extra["ref_bias"] = problem.tensors["bias"].detach()
    else:
        other = draw(st.integers(1, width + 3))
        extra["ref_hidden"] = torch.randn(*labels.shape, other, dtype=x.dtype)
        extra["ref_weight"] = torch.randn(len(problem.tensors["weight"]), other, dtype=x.dtype)
    return problem, extra


def packed(problem: Problem, extra: dict[str, Any]) -> tuple[dict, Tensor, dict]:
    """The same sequences end to end, without some of what is not scored at their ends."""
    scored = problem.scored
    lengths = [int(row.nonzero().max()) + 1 if row.any() else 0 for row in scored]
    # One more that is not scored, where there is one.
    lengths = [min(n + 1, scored.shape[1]) for n in lengths]
    kept = torch.cat([torch.arange(n) + i * scored.shape[1] for i, n in enumerate(lengths)])

    def of_tokens(name: str, x: Tensor) -> Tensor:
        return flat(x.detach())[kept] if "hidden" in name else x.detach()

    tensors = {
        name: of_tokens(name, x).requires_grad_(name in problem.trains)
        for name, x in problem.tensors.items()
    }
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    extra = {name: of_tokens(name, x) for name, x in extra.items()} | {"cu_seqlens": bounds}
    return tensors, problem.labels.reshape(-1)[kept], extra


@pytest.mark.long(backend="triton")
@pytest.mark.parametrize("backend", BACKENDS)
@given(st.data())
def test_loss_and_gradients_are_float64s(backend, data):
    problem, extra = data.draw(batches(backend))
    case = CASES[data.draw(st.sampled_from(PAIRED))]
    ignore_index = problem.options["ignore_index"]
    loss_fn = prefkern.FusedPreferenceLoss(case.make(), ignore_index, problem.workspace_mb, backend)
    out = loss_fn(labels=problem.labels, **problem.tensors, **extra, **problem.transform())
    assert out.plan.backend == backend

    # The sums, of which each token's log-prob is off by its bound.
    bounds, scored = problem.bounds(), problem.scored
    doubled = problem.doubled()
    truth = reference.linear_logprobs(labels=problem.labels, **doubled, **problem.options)
    assert isinstance(truth, Tensor)
    per_token = torch.zeros(scored.shape, dtype=torch.float64)
    per_token[scored] = bounds.logps
    sums = torch.cat([out.chosen_logps, out.rejected_logps])
    limit = per_token.sum(1) + 2.0**-23 * truth.detach().sum(1).abs() + LEAST
    assert_within(sums.detach(), truth.detach().sum(1), limit, "sums")
    if "ref_hidden" in extra:
        ref = {name.removeprefix("ref_"): extra[name] for name in extra if name != "reward_margins"}
        ref_problem = Problem(
            ref, problem.labels, problem.options, 1, backend, (), problem.grad
        )  # fmt: skip
        ref_bounds = torch.zeros_like(per_token)
        ref_bounds[scored] = ref_problem.bounds().logps
        true = reference.linear_logprobs(
            labels=problem.labels, **ref_problem.doubled(), **problem.options
        )
        assert isinstance(true, Tensor)
        if out.ref_chosen_logps is not None:
            mine = torch.cat([out.ref_chosen_logps, out.ref_rejected_logps])
            limit = ref_bounds.sum(1) + 2.0**-23 * true.sum(1).abs() + LEAST
            assert_within(mine, true.sum(1), limit, "reference sums")

    # The objective, on the sums that were found.
    def float64(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().double()

    leaves = [float64(out.chosen_logps), float64(out.rejected_logps)]
    chosen, rejected = (x.requires_grad_() for x in leaves if x is not None)
    objective = case.make()
    alignments = [None, None]
    if objective.needs_alignments:
        logits = reference.logits(
            doubled["hidden"].detach(), doubled["weight"].detach(),
            doubled["bias"].detach() if "bias" in doubled else None,
            **{k: v.detach() for k, v in doubled.items() if "lora" in k}, **problem.transform(),
        )  # fmt: skip
        collision = (2 * logits.log_softmax(-1)).logsumexp(-1)
        mean = torch.where(scored, truth.detach() - collision, 0.0).sum(1)
        alignments = list((mean / scored.sum(1).clamp(min=1)).chunk(2))
    lengths = scored.sum(1).chunk(2)
    pairs = Pairs(
        chosen, rejected, float64(out.ref_chosen_logps), float64(out.ref_rejected_logps),
        *lengths, extra["reward_margins"].double(), *alignments,
    )  # fmt: skip
    expected = objective(pairs)
    pushes = torch.autograd.grad(expected.losses.sum(), (chosen, rejected), materialize_grads=True)
    # Formulas difference sums, of which float32 has seven digits.
    largest = 1 + max(
        float(x.detach().abs().max()) for x in (*leaves, pairs.ref_chosen_logps, pairs.ref_rejected_logps)
        if x is not None
    )  # fmt: skip
    rtol = FORMULA * largest
    for name, mine, true in (
        ("losses", out.losses, expected.losses),
        ("beta_chosen", out.beta_chosen, expected.beta_chosen),
        ("chosen_gradients", out.chosen_gradients, pushes[0]),
        ("rejected_gradients", out.rejected_gradients, pushes[1]),
    ):
        error = (mine.detach().double() - true.detach()).abs()
        assert (error <= rtol * (true.detach().abs() + 1e-3)).all(), (name, case.id, error.max())

    # The gradients of the sums, so pushed.
    if not problem.trains:
        assert not out.loss.requires_grad
        return
    mine = torch.autograd.grad(out.loss, [problem.tensors[k] for k in problem.trains])
    push = torch.cat([out.chosen_gradients, out.rejected_gradients]).double() / len(out.losses)
    problem.grad = push.unsqueeze(1).expand(scored.shape)
    leaves = [doubled[name] for name in problem.trains]
    true = torch.autograd.grad((truth * problem.grad).sum(), leaves)
    limits = gradient_bounds(problem, bounds, problem.grad)
    for name, ours, theirs in zip(problem.trains, mine, true, strict=True):
        if "hidden" in name:
            ours, theirs = (flat(x)[scored.reshape(-1)] for x in (ours, theirs))
        # The coefficient itself is rounded on its way.
        limit = limits[name] + 2.0**-22 * theirs.abs()
        assert_within(ours, theirs, limit, name)


@pytest.mark.long(backend="triton")
@pytest.mark.parametrize("backend", BACKENDS)
@given(st.data())
def test_packed_is_padded_to_the_bit(backend, data):
    """The same tokens are scored in the same order, so results are bitwise equal."""
    problem, extra = data.draw(batches(backend))
    assume(not problem.scored.all())
    case = CASES[data.draw(st.sampled_from(PAIRED))]

    def loss_and_gradients(tensors, labels, extra):
        made = prefkern.FusedPreferenceLoss(
            case.make(), problem.options["ignore_index"], problem.workspace_mb, backend
        )
        out = made(labels=labels, **tensors, **extra, **problem.transform())
        if not problem.trains:
            return out, ()
        return out, torch.autograd.grad(out.loss, [tensors[k] for k in problem.trains])

    contiguous = {
        k: x.detach().contiguous().requires_grad_(x.requires_grad)
        for k, x in problem.tensors.items()
    }
    expected, true = loss_and_gradients(contiguous, problem.labels, extra)
    tensors, labels, packed_extra = packed(problem, extra)
    # With nothing left out rows are not gathered, and a product may read them otherwise.
    assume((labels == problem.options["ignore_index"]).any())
    tensors = {
        k: x.detach().contiguous().requires_grad_(x.requires_grad) for k, x in tensors.items()
    }
    out, mine = loss_and_gradients(tensors, labels, packed_extra)
    for name in ("losses", "chosen_logps", "rejected_logps", "ref_chosen_logps", "beta_chosen"):
        a, b = getattr(out, name), getattr(expected, name)
        assert (a is None and b is None) or torch.equal(a, b), name
    for name, a, b in zip(problem.trains, mine, true, strict=True):
        if "hidden" in name:
            a = a[labels != problem.options["ignore_index"]]
            b = flat(b)[problem.scored.reshape(-1)]
        assert torch.equal(a, b), name


@pytest.mark.long(backend="triton")
@pytest.mark.parametrize("backend", BACKENDS)
@given(st.data())
def test_divergence_is_float64s(backend, data):
    """`linear_kl`: both log-probs, the divergence, and the gradients of a sum of these."""
    largest = {"torch": (300, 64, 1500), "triton": (12, 16, 150)}[backend]
    problem = data.draw(problems(backend, largest=largest))
    for name in ("lora_hidden", "lora_weight"):
        problem.tensors.pop(name, None)
    problem.trains = tuple(k for k in problem.trains if k in problem.tensors)
    hidden, weight = problem.tensors["hidden"].detach(), problem.tensors["weight"].detach()
    other = data.draw(st.sampled_from([None, 0.01, 1, 7]))
    if isinstance(other, int):
        ref = {
            "hidden": torch.randn(*problem.labels.shape, other),
            "weight": torch.randn(len(weight), other),
        }
    else:
        near = torch.randn_like(hidden) * (other or 0.0)
        ref = {"hidden": hidden + near, "weight": weight}
        if "bias" in problem.tensors:
            ref["bias"] = problem.tensors["bias"].detach()
    ref_problem = Problem(ref, problem.labels, problem.options, 1, backend, (), problem.grad)
    reference_arguments = {f"ref_{name}": x for name, x in ref.items()}
    out = prefkern.linear_kl(
        labels=problem.labels, **problem.tensors, **reference_arguments, **problem.options,
        workspace_mb=problem.workspace_mb, backend=backend,
    )  # fmt: skip
    doubled = problem.doubled()
    truth = reference.linear_kl(
        labels=problem.labels, **doubled, **problem.options,
        **{name: x.double() for name, x in reference_arguments.items()},
    )  # fmt: skip
    scored = problem.scored
    bounds, ref_bounds = problem.bounds(), ref_problem.bounds()
    assert (out.kl >= 0).all() and (out.kl[~scored] == 0).all() and (out.logps <= 0).all()
    assert_within(out.logps.detach()[scored], truth.logps.detach()[scored], bounds.logps, "logps")
    assert_within(out.ref_logps[scored], truth.ref_logps[scored], ref_bounds.logps, "ref_logps")

    def logits(x: dict[str, Tensor]) -> Tensor:
        x = {
            k: flat(v.detach().double()) if k == "hidden" else v.detach().double()
            for k, v in x.items()
        }
        return reference.logits(**x, **problem.transform())[scored.reshape(-1)]

    z, x = logits(problem.tensors), logits(ref)
    p, r = z.softmax(1), x.softmax(1)
    kl = truth.kl.detach()[scored]
    # d kl / d z_v = p_v - r_v,  d kl / d x_v = r_v (log r_v - log p_v - kl)
    gap = x.log_softmax(1) - z.log_softmax(1)
    limit = bounds.logit * (p - r).abs().sum(1)
    limit += ref_bounds.logit * (r * (gap - kl.unsqueeze(1)).abs()).sum(1)
    # What is added up: sum_v r_v (x_v - z_v), the maxima, and the logarithms of sums, which are
    # small where both are confident of the label.
    labels = problem.labels[scored].unsqueeze(1)
    label_p, label_r = p.gather(1, labels)[:, 0], r.gather(1, labels)[:, 0]
    confident = (label_p == p.amax(1)) & (label_r == r.amax(1))
    logarithms = -(p.amax(1).log() + r.amax(1).log())
    sizes = (r * (x - z).abs()).sum(1) + (x.amax(1) - z.amax(1)).abs() + logarithms
    sizes += torch.where(confident, 2 - label_p - label_r, 2.0) + kl
    many = math.sqrt(p.shape[1]) / 4 + 4
    limit += many * bounds.unit * sizes + 4 * bounds.floor + LEAST
    assert_within(out.kl.detach()[scored], kl, limit, "kl")
    if other is None:
        assert (out.kl == 0).all()
    if not problem.trains:
        return
    push = torch.randn(problem.labels.shape)
    leaves = [problem.tensors[k] for k in problem.trains]
    mine = torch.autograd.grad((out.logps * problem.grad + out.kl * push).sum(), leaves)
    true = torch.autograd.grad(
        (truth.logps * problem.grad + truth.kl * push).sum(), [doubled[k] for k in problem.trains]
    )
    # Of the divergence: shares p_v and r_v, each off by what its own logits are.
    tokens = math.sqrt(len(kl)) / 4 * bounds.unit
    off = (bounds.relative + tokens).unsqueeze(1) * p + (ref_bounds.relative + tokens).unsqueeze(
        1
    ) * r
    kl_bounds = replace(bounds, shares=off, relative=torch.ones_like(kl))
    limits = gradient_bounds(problem, bounds, problem.grad)
    more = gradient_bounds(problem, kl_bounds, push)
    for name, ours, theirs in zip(problem.trains, mine, true, strict=True):
        if "hidden" in name:
            ours, theirs = (flat(g)[scored.reshape(-1)] for g in (ours, theirs))
        assert_within(ours, theirs, limits[name] + more[name], name)
