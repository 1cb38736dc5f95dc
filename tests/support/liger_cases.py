"""Liger's losses as cases: prefkern's objective for each, its textbook, and how Liger spells it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import prefkern
from prefkern import objectives

HAS_LIGER = importlib.util.find_spec("liger_kernel") is not None
SHAPES = [(3, 47, 31, 123), (2, 2, 8, 8), (4, 12, 64, 300), (1, 1, 3, 5)]
# Of bf16, Liger's own tolerance for its gradients is half of them; this is of float64 on the same
# rounded inputs.
EXACT = {torch.float32: 2e-5, torch.bfloat16: 8e-3}
LIGERS = {torch.float32: (1e-5, 5e-4), torch.bfloat16: (5e-2, 5e-1)}


@dataclass
class Batch:
    """2B rows, chosen ones first, their head and a reference's."""

    hidden: Tensor  # (2B, T, H)
    weight: Tensor  # (V, H)
    labels: Tensor  # (2B, T)
    bias: Tensor | None  # (V,)
    ref_hidden: Tensor
    ref_weight: Tensor
    ref_bias: Tensor | None
    ignore_index: int = -100
    beta: float = 0.1
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def inputs(self) -> dict[str, Tensor | None]:
        return {"hidden": self.hidden, "weight": self.weight, "bias": self.bias}

    def leaves(self) -> Batch:
        """A copy whose hidden states, head and bias are to be differentiated."""
        copies = {
            name: None if x is None else x.detach().clone().requires_grad_()
            for name, x in self.inputs.items()
        }
        return replace(self, **copies)

    def double(self) -> Batch:
        values = vars(self).items()
        is_float = {n: isinstance(x, Tensor) and x.is_floating_point() for n, x in values}
        return replace(
            self, **{name: vars(self)[name].double() for name in is_float if is_float[name]}
        )


def batch(shape, dtype=torch.float32, bias=False, ref_bias=False, ignore_index=-100, **options):
    """Random numbers as Liger's tests draw them, logits far apart included."""
    pairs, length, hidden_size, vocab_size = shape
    draw = torch.Generator().manual_seed(7)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=draw).to(dtype)

    rows = (2 * pairs, length, hidden_size)
    labels = torch.randint(vocab_size, rows[:2], generator=draw)
    if 0 <= ignore_index < vocab_size:
        # No row loses tokens by chance.
        labels[labels == ignore_index] = (ignore_index + 1) % vocab_size
    if length > 2:
        # As many of each chosen row, and other numbers of the rejected ones.
        for row in range(2 * pairs):
            count = length // 3 if row < pairs else 1 + row % (length // 2)
            labels[row, torch.randperm(length, generator=draw)[:count]] = ignore_index
    return Batch(
        hidden=normal(*rows),
        weight=normal(vocab_size, hidden_size),
        labels=labels,
        bias=normal(vocab_size) if bias else None,
        ref_hidden=normal(*rows),
        ref_weight=normal(vocab_size, hidden_size),
        ref_bias=normal(vocab_size) if ref_bias else None,
        ignore_index=ignore_index,
        **options,
    )


def sums(hidden, weight, bias, labels, ignore_index) -> tuple[Tensor, Tensor]:  # (S,) each
    """Each row's summed log-prob and number of tokens, of logits in memory."""
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    scored = labels != ignore_index
    targets = labels.where(scored, 0).unsqueeze(-1)
    logps = logits.log_softmax(-1).gather(-1, targets).squeeze(-1)
    return logps.where(scored, 0.0).sum(1), scored.sum(1)


@dataclass(frozen=True)
class Case:
    """A loss of Liger's: prefkern's objective for it, its textbook, and how Liger spells it."""

    objective: Callable[[float], Any]
    textbook: Callable[..., Tensor]  # of (beta, L_w, L_l, R_w, R_l, n_w, n_l): of each pair
    liger: str
    options: dict[str, Any] = field(default_factory=dict)
    has_reference: bool = False
    betas: tuple[float, float] = (0.1, 0.2)


def _dpo(beta, chosen, rejected, ref_chosen, ref_rejected, *_):
    return -F.logsigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected)))


def _with_nll(weight, loss, beta, chosen, rejected, ref_chosen, ref_rejected, n, m):
    return loss(beta, chosen, rejected, ref_chosen, ref_rejected, n, m) - weight * chosen / n


def _hinge(beta, chosen, rejected, ref_chosen, ref_rejected, *_):
    return (1 - beta * ((chosen - ref_chosen) - (rejected - ref_rejected))).clamp(min=0)


def _robust(smoothing, beta, chosen, rejected, ref_chosen, ref_rejected, *_):
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    clean, flipped = -F.logsigmoid(margin), -F.logsigmoid(-margin)
    return ((1 - smoothing) * clean - smoothing * flipped) / (1 - 2 * smoothing)


def _cpo(beta, chosen, rejected, *_):
    return -F.logsigmoid(beta * (chosen - rejected))


def _simpo(gamma, beta, chosen, rejected, ref_chosen, ref_rejected, n, m):
    return -F.logsigmoid(beta * (chosen / n - rejected / m) - gamma)


def _orpo(beta, chosen, rejected, ref_chosen, ref_rejected, n, m):
    def log_odds(logp):
        return logp - torch.log1p(-logp.exp())

    ratio = log_odds(chosen / n) - log_odds(rejected / m)
    return -beta * F.logsigmoid(ratio)


CASES = {
    "dpo": Case(objectives.DPO, _dpo, "DPO", {}, True),
    "dpo with nll": Case(
        lambda beta: objectives.WithNLL(objectives.DPO(beta), 1.0),
        partial(_with_nll, 1.0, _dpo),
        "DPO",
        {"compute_nll_loss": True},
        True,
    ),
    "dpo with half an nll": Case(
        lambda beta: objectives.WithNLL(objectives.DPO(beta), 0.5),
        partial(_with_nll, 0.5, _dpo),
        "DPO",
        {"compute_nll_loss": True, "alpha": 0.5},
        True,
    ),
    "hinge": Case(objectives.Hinge, _hinge, "DPO", {"loss_type": "hinge"}, True),
    "robust": Case(
        lambda beta: objectives.RobustDPO(beta, label_smoothing=0.2),
        partial(_robust, 0.2),
        "DPO",
        {"loss_type": "robust", "label_smoothing": 0.2},
        True,
    ),
    "cpo": Case(objectives.CPO, partial(_with_nll, 1.0, _cpo), "CPO"),
    "cpo, alpha": Case(
        lambda beta: objectives.CPO(beta, nll_weight=0.85),
        partial(_with_nll, 0.85, _cpo),
        "CPO",
        {"alpha": 0.85},
    ),
    "cpo without nll": Case(
        lambda beta: objectives.CPO(beta, nll_weight=0.0),
        _cpo,
        "CPO",
        {"compute_nll_loss": False},
    ),
    "simpo": Case(
        lambda beta: objectives.SimPO(beta, gamma=0.5),
        partial(_simpo, 0.5),
        "SimPO",
        {"compute_nll_loss": False},
    ),
    "simpo, gamma": Case(
        lambda beta: objectives.WithNLL(objectives.SimPO(beta, gamma=0.85), 1.0),
        partial(_with_nll, 1.0, partial(_simpo, 0.85)),
        "SimPO",
        {"gamma": 0.85},
        betas=(0.1, 2.0),
    ),
    # Where beta stands does not matter at 1.
    "orpo": Case(objectives.ORPO, partial(_with_nll, 1.0, _orpo), "ORPO", betas=(1.0, 1.0)),
    "orpo without nll": Case(
        lambda beta: objectives.ORPO(beta, nll_weight=0.0),
        _orpo,
        "ORPO",
        {"compute_nll_loss": False},
        betas=(1.0, 1.0),
    ),
}


def reference_of(case: Case, data: Batch) -> dict[str, Tensor | None]:
    names = ("ref_hidden", "ref_weight", "ref_bias")
    return {name: getattr(data, name) for name in names} if case.has_reference else {}


def run(case: Case, data: Batch, workspace_mb=None, scale=1.0):
    """prefkern's output; gradients are left on `data`."""
    loss_fn = prefkern.FusedPreferenceLoss(
        case.objective(data.beta), data.ignore_index, workspace_mb, "torch"
    )
    out = loss_fn(data.hidden, data.weight, data.labels, data.bias, **reference_of(case, data))
    if out.loss.requires_grad:
        (scale * out.loss).backward()
    assert out.plan is not None and out.plan.backend == "torch"
    return out


def textbook(case: Case, data: Batch, scale=1.0) -> tuple[Tensor, Tensor]:
    """The mean over pairs, and the summed log-probs, in the batch's dtype."""
    logps, lengths = sums(data.hidden, data.weight, data.bias, data.labels, data.ignore_index)
    ref = torch.zeros_like(logps)
    if case.has_reference:
        ref_head = (data.ref_hidden, data.ref_weight, data.ref_bias)
        ref, _ = sums(*ref_head, data.labels, data.ignore_index)
    halves = [half for x in (logps, ref, lengths) for half in x.chunk(2)]
    loss = case.textbook(data.beta, *halves).mean()
    if loss.requires_grad:
        (scale * loss).backward()
    return loss.detach(), logps.detach()


def liger(case: Case, data: Batch, scale=1.0, **options) -> tuple[Tensor, list[Tensor]]:
    """Liger's loss and what it returns beside it; gradients are left on `data`."""
    losses = pytest.importorskip("liger_kernel.chunked_loss")
    kind = getattr(losses, f"LigerFusedLinear{case.liger}Loss")
    loss_fn = kind(
        ignore_index=data.ignore_index,
        beta=data.beta,
        compiled=False,
        **{**case.options, **options},
    )
    loss, aux = loss_fn(
        data.weight, data.hidden, data.labels, data.bias, *reference_of(case, data).values()
    )
    (scale * loss).backward()
    return loss.detach(), aux


def assert_gradients(actual: Batch, expected: Batch, bound: float) -> None:
    """Relative to each gradient's norm."""
    for name, x in actual.inputs.items():
        true = expected.inputs[name]
        if x is None or true is None:
            continue
        assert x.grad is not None and true.grad is not None and x.grad.dtype == x.dtype
        difference = (x.grad.double() - true.grad.double()).norm()
        assert difference <= bound * true.grad.double().norm() + 1e-9, name
