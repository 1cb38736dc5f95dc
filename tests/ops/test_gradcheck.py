"""Gradients against finite differences in float64: the operators, every objective, the trainer's loss.

The torch backend computes float64 inputs in float64, by the same passes over tiles. So central
differences give nine digits of every gradient, without an oracle.

A coefficient under a stop-gradient changes with the inputs, but autograd does not differentiate it;
a difference quotient would. So for the quotient the coefficients, margins and weights that an
objective computes without gradient are computed once and kept. The tests assert that the gradient
is the same with and without this, and that it matters for the quotient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor

import prefkern
from prefkern import objectives
from prefkern.objectives import BetaDPO, Objective, UnpairedObjective
from support import tiny
from support.objective_cases import CASES

B, T, H, V = 2, 3, 3, 7
# Workspaces of many tiles and of one.
TILES = {"tiles": 0.004, "one tile": 8.0}
TRANSFORM = {"logit_scale": 1.2, "softcap": 4.0, "temperature": 0.8}


def leaves(N: int, vocab: int, width: int, rank: int = 0) -> dict[str, Tensor]:
    shapes = {"hidden": (N, width), "weight": (vocab, width), "bias": (vocab,)}
    if rank:
        shapes |= {"lora_hidden": (N, rank), "lora_weight": (vocab, rank)}
    return {
        name: torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for name, shape in shapes.items()
    }


def check(function: Callable[..., Any], inputs: list[Tensor]) -> None:
    """Central differences at 1e-5: off by 1e-10 of third derivatives, and by 1e-11 of rounding.

    In random directions over all elements (`fast_mode`), in which a wrong element shows.
    """
    assert torch.autograd.gradcheck(
        function, inputs, eps=1e-5, atol=1e-8, rtol=1e-6, fast_mode=True
    )


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("trains_head", [False, True])
@pytest.mark.parametrize("rank", [0, 2])
def test_log_probs(rank, trains_head, tiles):
    """In each structure: a frozen head, a trained one kept, and one recomputed."""
    given = leaves(20, 150, 2, rank)
    labels = torch.randint(150, (20,))
    labels[3] = -100
    if not trains_head:
        given["weight"].requires_grad_(False)
        given["bias"].requires_grad_(False)
        if rank:
            given["lora_weight"].requires_grad_(False)

    def logps(*values: Tensor) -> Tensor:
        arguments = dict(zip(given, values, strict=True))
        return prefkern.linear_logprobs(
            labels=labels, **arguments, **TRANSFORM, backend="torch", workspace_mb=TILES[tiles]
        )

    check(logps, list(given.values()))
    plan = prefkern.last_plan()
    assert plan is not None and plan.trains_head == trains_head and plan.backend == "torch"
    recomputes = trains_head and tiles == "tiles"
    assert plan.structure == ("two_pass" if recomputes else "one_pass")


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("trains_head", [False, True])
def test_divergence(trains_head, tiles):
    given = leaves(20, 150, 2)
    for name in ("weight", "bias"):
        given[name].requires_grad_(trains_head)
    other = {f"ref_{name}": x.detach() for name, x in leaves(20, 150, 3).items()}
    labels = torch.randint(150, (20,))

    def values(*values: Tensor) -> tuple[Tensor, Tensor]:
        arguments = dict(zip(given, values, strict=True))
        out = prefkern.linear_kl(
            labels=labels, **arguments, **other, **TRANSFORM, backend="torch",
            workspace_mb=TILES[tiles],
        )  # fmt: skip
        return out.logps, out.kl

    check(values, list(given.values()))


# What objectives compute without gradient, by the names of their methods.
CONSTANTS = ("coefficients", "margin", "weight", "reference_point")


def held(objective: Objective | UnpairedObjective) -> Objective | UnpairedObjective:
    """The objective; its constants keep their first values."""

    def keeping(function: Callable[..., Any]) -> Callable[..., Any]:
        kept: list[Any] = []

        def kept_from_first(*arguments: Any) -> Any:
            if not kept:
                value = function(*arguments)
                # Omni-DPO's weight and alpha-DPO's ablation have a gradient: no constants.
                if isinstance(value, Tensor) and value.requires_grad:
                    return value
                kept.append(value)
            return kept[0]

        return kept_from_first

    for module in objective.modules():
        for name in CONSTANTS:
            if hasattr(module, name):
                setattr(module, name, keeping(getattr(module, name)))
        if isinstance(module, BetaDPO):
            module._batch = keeping(module._batch)
        if isinstance(module, objectives.TDPO2):
            chosen: list[Tensor] = []

            def divergence(chosen_kls, rejected_kls, kept=chosen, of=module.divergence):
                kept.append(chosen_kls.detach())
                return of(kept[0], rejected_kls)

            module.divergence = divergence
    return objective


class Batch:
    """Two pairs (or four responses) of a model near its reference, in float64."""

    def __init__(self, responses: int = 2) -> None:
        torch.manual_seed(1)
        shape = (responses * B, T, H)
        self.given = {
            "hidden": torch.randn(shape, dtype=torch.float64, requires_grad=True),
            "weight": torch.randn(V, H, dtype=torch.float64, requires_grad=True),
            "bias": torch.randn(V, dtype=torch.float64, requires_grad=True),
        }
        self.labels = torch.randint(V, shape[:2])
        self.labels[0, 0] = self.labels[3, 2] = -100
        self.ref = {
            f"ref_{name}": x.detach() + 0.3 * torch.randn_like(x) for name, x in self.given.items()
        }

    def losses(self, objective: Objective | UnpairedObjective) -> Callable[..., Tensor]:
        loss_fn = prefkern.FusedPreferenceLoss(objective, workspace_mb=1, backend="torch")
        extra: dict[str, Any] = {"reward_margins": torch.tensor([1.5, -6.0], dtype=torch.float64)}
        if isinstance(objective, UnpairedObjective):
            extra = {
                "desirable": torch.tensor([True, True, False, False]),
                "mismatched_log_ratios": torch.tensor([0.5, 1.0], dtype=torch.float64),
            }

        def function(*values: Tensor) -> Tensor:
            arguments = dict(zip(self.given, values, strict=True))
            out = loss_fn(labels=self.labels, **arguments, **self.ref, **extra, **TRANSFORM)
            assert out.losses.dtype == torch.float64 and out.plan.backend == "torch"
            return out.losses

        return function

    def gradients(self, function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        values = list(self.given.values())
        return torch.autograd.grad(function(*values).sum(), values)


@pytest.mark.parametrize("name", CASES)
def test_every_objective(name):
    """Gradients of hidden states, weight and bias through the losses of both pairs."""
    batch = Batch(max(CASES[name].make().responses, 2))
    frozen = batch.losses(held(CASES[name].make()))
    values = list(batch.given.values())
    # Here the constants are taken.
    mine = batch.gradients(frozen)
    check(frozen, values)
    plain = batch.gradients(batch.losses(CASES[name].make()))
    for a, b in zip(mine, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def test_every_registered_objective_is_checked():
    checked = {case.objective for case in CASES.values()}
    assert checked >= set(objectives.REGISTRY)


# Constants that depend on the log-probs: with them the quotient is another number.
@pytest.mark.parametrize(
    "name",
    [
        "dpo: no clip",
        "simpo: policy space",
        "alphadpo: plain",
        "betadpo: plain",
        "tdpo2: plain",
        "wpo unaligned: dpo",
        "wpo: dpo",
    ],
)
def test_a_stop_gradient_stops_one(name):
    batch = Batch()
    values = list(batch.given.values())
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        check(batch.losses(CASES[name].make()), values)


def test_a_clipped_coefficient_needs_no_stop():
    """Far above the clip the coefficient is constant, and the plain quotient agrees."""
    batch = Batch()
    objective = objectives.build("adadpo", beta=0.1, clip=1e-6)
    check(batch.losses(objective), list(batch.given.values()))


# A clip far below the ratio makes AdaDPO's coefficient a constant; the trainer has the rest to do.
RUNS = {
    "adadpo": {"objective": "adadpo", "objective_options": {"clip": 1e-3}},
    "ipo, rpo_alpha": {"objective": "ipo", "rpo_alpha": 0.5},
    "orpo": {"objective": "orpo"},
    "simpo": {"objective": "simpo"},
    "tdpo1": {"objective": "tdpo1", "beta": 0.5},
    "kto": {"objective": "kto", "beta": 0.5},
}


@pytest.mark.parametrize("name", RUNS)
def test_the_trainer_s_loss(name, tmp_path):
    """A model in float64: d loss / d step along a direction in all of its parameters."""
    pytest.importorskip("accelerate")
    made, other = (tiny.model("GPT2", seed).double() for seed in (1, 0))
    options = RUNS[name]
    config = prefkern.PreferenceConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to="none",
        per_device_train_batch_size=4,
        gradient_checkpointing=False,
        **options,
    )
    rows = tiny.pairs(4)
    if name == "kto":
        rows = [
            {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            for row, side in zip(rows, ["chosen", "rejected"] * 2, strict=True)
        ]
    needs_reference = name not in ("orpo", "simpo")
    run = prefkern.PreferenceTrainer(
        made,
        config,
        datasets.Dataset.from_list(rows),
        processing_class=tiny.tokenizer(),
        ref_model=other if needs_reference else None,
    )
    # KTO's reference point is the policy's doing, and a constant to autograd.
    held(run.loss_fn.objective)
    batch = next(iter(run.get_train_dataloader()))
    parameters = list(made.parameters())

    def loss() -> Tensor:
        value = run.compute_loss(made, batch)
        assert value.dtype == torch.float64
        return value

    gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
    plan = prefkern.last_plan()
    assert plan is not None and plan.trains_head
    directions = [torch.randn_like(p) for p in parameters]
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True) if g is not None)
    assert abs(slope) > 1e-3
    step, values = 1e-6, []
    for sign in (1, -2):
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p += sign * step * d
            values.append(loss())
    quotient = (values[0] - values[1]) / (2 * step)
    torch.testing.assert_close(slope, quotient, rtol=1e-6, atol=1e-8)
