"""The suites "operator" and "loss": log-probs alone, and a DPO step on them.

"operator" computes the log-probs of N tokens from hidden states and a head; all tokens are scored.
Task "forward" has no gradients. Task "frozen" has forward and backward to dH, task "trainable" to
dH and dW. The incoming gradient is one random number for each sequence.

"loss" is a DPO step with its reference, which has its own head. Half of each row is prompt and
padding. Task "frozen" goes to dH, task "trainable" to dH and dW.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefkern_bench.group import Group, Settings
from prefkern_bench.problem import (
    IGNORE_INDEX,
    Problem,
    Truth,
    dpo_grads,
    fixed_grads,
    make_problem,
    truth_of,
)
from prefkern_bench.providers import Provider
from prefkern_bench.report import Row
from prefkern_bench.shapes import Shape
from prefkern_bench.timing import Step

# The fewest operations, in NHV: one product; with that of dH; with that of dW.
FEWEST = {"forward": 2, "frozen": 4, "trainable": 6}
PRODUCT_ROWS = 4096  # rows of the plain product at a time, so that its result is at most this by V


class Result(NamedTuple):
    """The results of a step."""

    sums: Tensor  # (2B,)
    logps: Tensor | None  # (N,)
    dhidden: Tensor | None  # (N, H)
    dweight: Tensor | None  # (V, H)


def operator_groups(shape: Shape, settings: Settings) -> Iterator[Group]:
    """A group for each task of suite "operator"."""
    problem = make_problem(shape, settings.dtype, settings.device, padded=False)
    grads = fixed_grads(problem)
    truth = truth_of(problem, lambda logps: grads)

    def run(provider: Provider, task: str) -> Result:
        if task == "forward":
            with torch.no_grad():
                return Result(*provider.score(problem), None, None)
        leaves = _leaves(problem, task)
        sums, logps = provider.score(leaves)
        assert logps is not None
        logps.backward(grads.to(logps.dtype))
        assert leaves.hidden.grad is not None
        dhidden = leaves.hidden.grad.flatten(0, 1)
        return Result(sums.detach(), logps.detach(), dhidden, leaves.weight.grad)

    for task, fewest in FEWEST.items():
        if task in settings.tasks:
            yield _group("operator", shape, task, problem, truth, run, fewest)


def loss_groups(shape: Shape, settings: Settings) -> Iterator[Group]:
    """A group for each task of suite "loss"."""
    problem = make_problem(shape, settings.dtype, settings.device, padded=True)
    truth = truth_of(problem, dpo_grads(problem))
    scored = problem.labels != IGNORE_INDEX

    def run(provider: Provider, task: str) -> Result:
        leaves = _leaves(problem, task)
        loss, sums = provider.loss(leaves)
        loss.backward()
        assert leaves.hidden.grad is not None
        return Result(sums.detach(), None, leaves.hidden.grad[scored], leaves.weight.grad)

    for task in ("frozen", "trainable"):
        if task in settings.tasks:
            # Plus the reference's product.
            yield _group("loss", shape, task, problem, truth, run, FEWEST[task] + 2)


def _leaves(problem: Problem, task: str) -> Problem:
    """The problem with new leaf tensors, which collect the gradients of the task."""
    return problem._replace(
        hidden=problem.hidden.detach().requires_grad_(),
        weight=problem.weight.detach().requires_grad_(task == "trainable"),
    )


def _group(
    suite: str, shape: Shape, task: str, problem: Problem, truth: Truth, run: Any, fewest: int
) -> Group:
    def errors(row: Row, result: Result) -> None:
        record_errors(row, result, truth)

    return Group(
        blank=lambda provider: Row(suite, shape.name, task, provider, shape.tokens),
        run=lambda provider: run(provider, task),
        errors=errors,
        nhv=shape.nhv,
        fewest=fewest,
        plain_product=plain_product(problem),
    )


def plain_product(problem: Problem) -> Step:
    """The scored tokens' hidden states times the head, in their own dtype, some rows at a time."""
    hidden = problem.hidden[problem.labels != IGNORE_INDEX]  # (N, H)

    def step() -> None:
        buffer = hidden.new_empty(min(len(hidden), PRODUCT_ROWS), problem.weight.shape[0])
        for rows in hidden.split(PRODUCT_ROWS):
            torch.mm(rows, problem.weight.T, out=buffer[: len(rows)])

    return step


def record_errors(row: Row, result: Result, truth: Truth) -> None:
    row.sum_logp_error, row.sum_logp_mean_error = _worst_and_mean(result.sums, truth.sums)
    if result.logps is not None:
        errors = _worst_and_mean(result.logps, truth.logps)
        row.token_logp_error, row.token_logp_mean_error = errors
    if result.dhidden is not None:
        row.dhidden_error = _relative(result.dhidden[truth.tokens], truth.dhidden)
    if result.dweight is not None:
        row.dweight_error = _relative(result.dweight[truth.entries], truth.dweight)
    if result.dhidden is not None:
        row.add_note(truth.note)


def _worst_and_mean(value: Tensor, truth: Tensor) -> tuple[float, float]:
    error = (value.double() - truth).abs()
    return error.max().item(), error.mean().item()


def _relative(value: Tensor, truth: Tensor) -> float:
    return ((value.double() - truth).norm() / truth.norm()).item()
