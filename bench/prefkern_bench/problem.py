"""Inputs of the suites "operator" and "loss", and their true results in float64.

The truth never holds `[N, V]`: it computes logits in tiles, with the vocabulary as the outer loop.
It has the log-probs of all scored tokens. It has as much of the gradients as `TRUTH_OPERATIONS`
allows: dH for a sample of tokens, and dW for a sample of vocabulary entries, each summed over all
tokens. Each sampled row is exact. An error is then that of the sample, and a note in the row says
so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from prefkern_bench.shapes import Shape

IGNORE_INDEX = -100
BETA = 0.1
TOKEN_TILE, VOCAB_TILE = 4096, 8192  # a tile of float64 logits: 256 MiB
TRUTH_OPERATIONS = {"cuda": 10**13}  # for each gradient's sample; on other devices:
TRUTH_OPERATIONS_ELSEWHERE = 2 * 10**11


class Problem(NamedTuple):
    """The inputs of one step; `hidden` and, for a trainable head, `weight` require gradients.

    The reference is given as hidden states and a head, or as precomputed sums, or as both; a
    provider takes what it can.
    """

    hidden: Tensor  # (2B, T, H), chosen first
    weight: Tensor  # (V, H)
    labels: Tensor  # (2B, T)
    softcap: float | None = None
    ref_hidden: Tensor | None = None  # (2B, T, H)
    ref_weight: Tensor | None = None  # (V, H)
    ref_sums: Tensor | None = None  # (2B,)


@dataclass(frozen=True)
class Truth:
    """Float64 log-probs of the scored tokens; gradients of sampled tokens and entries."""

    logps: Tensor  # (N,)
    sums: Tensor  # (2B,)
    tokens: Tensor  # (n,), indices among the N tokens
    dhidden: Tensor  # (n, H)
    entries: Tensor  # (m,), indices among the V vocabulary entries
    dweight: Tensor  # (m, H)
    note: str | None  # the size of the samples; None: everything


def make_problem(shape: Shape, dtype: torch.dtype, device: torch.device, padded: bool) -> Problem:
    """Random hidden states and head; every second scored token predicts its label with confidence.

    With `padded`, a quarter of each row is prompt before the scored tokens, and a quarter is
    padding after them. The reference is then the policy plus a little noise.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    rows, V, H = 2 * shape.pairs, shape.vocab_size, shape.hidden_size
    before = shape.length // 2 if padded else 0
    length = 2 * shape.length if padded else shape.length
    weight = normal(V, H) * shape.spread / H**0.5
    labels = torch.randint(V, (rows, length), generator=generator, device=device)
    hidden = normal(rows, length, H)
    # h . W_y grows by the step times |W_y|^2 = spread^2, so that it exceeds the logsumexp, which is
    # ln V + spread^2 / 2.
    step = (math.log(V) + 3) / shape.spread**2 + 0.5
    hidden[:, ::2] += step * weight[labels[:, ::2]]
    labels[:, :before] = IGNORE_INDEX
    labels[:, before + shape.length :] = IGNORE_INDEX
    weight = weight.to(dtype)
    if not padded:
        return Problem(hidden.to(dtype), weight, labels, shape.softcap)
    ref_hidden = (hidden + 0.05 * normal(*hidden.shape)).to(dtype)
    return Problem(hidden.to(dtype), weight, labels, shape.softcap, ref_hidden, weight)


def dpo_loss(sums: Tensor, ref_sums: Tensor) -> Tensor:  # (2B,), (2B,) -> ()
    chosen, rejected = (sums - ref_sums).chunk(2)
    return -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()


def fixed_grads(problem: Problem) -> Tensor:  # (N,) float32
    """Suite "operator": the gradient of each scored token's log-prob, one number per sequence."""
    rows, length = problem.labels.shape
    device = problem.labels.device
    generator = torch.Generator(device).manual_seed(1)
    return torch.randn(rows, generator=generator, device=device).repeat_interleave(length)


def dpo_grads(problem: Problem) -> Callable[[Tensor], Tensor]:
    """Suite "loss": a function from the scored tokens' log-probs to their gradients."""
    rows = problem.labels.shape[0]
    assert problem.ref_hidden is not None and problem.ref_weight is not None
    scored = problem.labels != IGNORE_INDEX
    labels = problem.labels[scored]
    lse, label_logits = _fold(
        problem.ref_hidden[scored], problem.ref_weight, labels, problem.softcap
    )
    ref_sums = (label_logits - lse).view(rows, -1).sum(-1)

    def grads(logps: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = logps.detach().requires_grad_()
            loss = dpo_loss(leaf.view(rows, -1).sum(-1), ref_sums)
            return torch.autograd.grad(loss, leaf)[0]

    return grads


@torch.no_grad()
def truth_of(
    problem: Problem, grads: Callable[[Tensor], Tensor], operations: float | None = None
) -> Truth:
    """Log-probs, dH and dW in float64, from the same rounded inputs.

    Args:
        grads: maps the (N,) log-probs to the gradient of the loss with respect to them.
        operations: bound on the operations of each gradient's sample; None: chosen for the device.
    """
    scored = problem.labels != IGNORE_INDEX
    hidden, labels, weight = problem.hidden.detach()[scored], problem.labels[scored], problem.weight
    (N, H), V, device = hidden.shape, weight.shape[0], hidden.device
    lse, label_logits = _fold(hidden, weight, labels, problem.softcap)
    logps = label_logits - lse
    g = grads(logps).double()

    budget = operations
    if budget is None:
        budget = TRUTH_OPERATIONS.get(device.type, TRUTH_OPERATIONS_ELSEWHERE)
    tokens = _sample(N, max(32, int(budget / (4 * H * V))), device)
    entries = _sample(V, max(32, int(budget / (4 * H * N))), device, first=labels.unique())
    dhidden = torch.zeros(len(tokens), H, dtype=torch.float64, device=device)
    for rows, columns, dz in _logit_grads(problem, hidden, labels, lse, g, tokens, None):
        dhidden[rows] += dz @ weight[columns].double()
    dweight = torch.zeros(len(entries), H, dtype=torch.float64, device=device)
    for rows, columns, dz in _logit_grads(problem, hidden, labels, lse, g, None, entries):
        dweight[columns] += dz.T @ hidden[rows].double()

    parts = []
    if len(tokens) < N:
        parts.append(f"dH error on {len(tokens):,} of {N:,} tokens")
    if len(entries) < V:
        parts.append(f"dW error on {len(entries):,} of {V:,} vocabulary entries")
    sums = logps.view(problem.labels.shape[0], -1).sum(-1)
    return Truth(logps, sums, tokens, dhidden, entries, dweight, "; ".join(parts) or None)


@torch.no_grad()
def token_logps(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (N,)
    softcap: float | None = None,
) -> Tensor:  # (N,)
    """Float64 log-probs of labels, in tiles."""
    lse, label_logits = _fold(hidden, weight, labels, softcap)
    return label_logits - lse


@torch.no_grad()
def _fold(
    hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """The logsumexp of each token's logits, (N,), and the logit of its label, (N,)."""
    lse = torch.full(labels.shape, -math.inf, dtype=torch.float64, device=hidden.device)
    label_logits = torch.zeros_like(lse)
    for start in range(0, weight.shape[0], VOCAB_TILE):
        tile_weight = weight[start : start + VOCAB_TILE].double()
        for rows in _slices(len(labels), TOKEN_TILE):
            z = hidden[rows].double() @ tile_weight.T
            if softcap is not None:
                z = softcap * torch.tanh(z / softcap)
            lse[rows] = torch.logaddexp(lse[rows], z.logsumexp(-1))
            local = labels[rows] - start
            here = (local >= 0) & (local < len(tile_weight))
            found = z.gather(-1, local.clamp(0, len(tile_weight) - 1).unsqueeze(-1)).squeeze(-1)
            label_logits[rows] = torch.where(here, found, label_logits[rows])
    return lse, label_logits


def _logit_grads(
    problem: Problem,
    hidden: Tensor,  # (N, H)
    labels: Tensor,  # (N,)
    lse: Tensor,  # (N,)
    g: Tensor,  # (N,)
    tokens: Tensor | None,
    entries: Tensor | None,
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Tiles of the gradient with respect to `h . W`: rows, columns and the tile itself.

    Rows and columns are positions in `tokens` and `entries`; None means all of them.
    """
    if tokens is not None:
        hidden, labels, lse, g = hidden[tokens], labels[tokens], lse[tokens], g[tokens]
    if entries is None:
        entries = torch.arange(len(problem.weight), device=hidden.device)
    for columns in _slices(len(entries), VOCAB_TILE):
        index = entries[columns]
        tile_weight = problem.weight[index].double()
        for rows in _slices(len(labels), TOKEN_TILE):
            z = hidden[rows].double() @ tile_weight.T
            derivative = 1.0
            if problem.softcap is not None:
                t = torch.tanh(z / problem.softcap)
                z, derivative = problem.softcap * t, 1 - t.square()
            # d logp_y / d z_v = [v = y] - p_v, and d z / d u = 1 - tanh(u / c)^2.
            is_label = labels[rows].unsqueeze(-1) == index
            dz = is_label.double() - (z - lse[rows].unsqueeze(-1)).exp()
            yield rows, columns, dz * derivative * g[rows].unsqueeze(-1)


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _sample(
    count: int, most: int, device: torch.device, first: Tensor | None = None
) -> Tensor:  # (min(count, most),)
    """Indices below `count`: all of them, or a sample, of which up to half comes from `first`."""
    if most >= count:
        return torch.arange(count, device=device)
    generator = torch.Generator().manual_seed(2)
    order = torch.randperm(count, generator=generator).to(device)
    if first is not None:
        order = torch.cat([first[: most // 2], order[~torch.isin(order, first)]])
    return order[:most]
