"""Two runs on one input are equal bit for bit, whatever ran between them.

Between them run other shapes, structures, dtypes, backends and threads' worth of leftovers: what a
call finds in memory, in the caches of tiles and kernels, or in `last_plan` must not reach its numbers.
The passes over tiles are run in every structure that a plan can name, asserted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import BACKENDS
from objective_cases import CASES
from torch import Tensor

import prefkern
from prefkern import api
from prefkern.objectives import Objective

N, H, V = 40, 24, 300
SMALL, MIDDLE, LARGE = 0.02, 0.06, 8.0
# name: (which train, workspace, structure, whether some, all or no tokens are kept)
STRUCTURES = {
    "forward": ((), SMALL, "forward", "none"),
    "frozen, one tile": (("hidden",), LARGE, "one_pass", "none"),
    "frozen, tiles": (("hidden",), SMALL, "one_pass", "none"),
    "recomputed": (("hidden", "weight", "bias"), SMALL, "two_pass", "none"),
    "some kept": (("hidden", "weight", "bias"), MIDDLE, "two_pass", "some"),
    "kept": (("hidden", "weight", "bias"), LARGE, "one_pass", "all"),
    "head alone": (("weight",), SMALL, "two_pass", "none"),
}
TRANSFORM = {"softcap": 8.0, "logit_scale": 1.2, "temperature": 0.9}


def tensors(trains: tuple[str, ...] = (), dtype=torch.float32, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    made = {"hidden": torch.randn(N, H), "weight": torch.randn(V, H), "bias": torch.randn(V)}
    return {k: x.to(dtype).requires_grad_(k in trains) for k, x in made.items()}


def labels() -> Tensor:
    made = torch.randint(V, (N,), generator=torch.Generator().manual_seed(5))
    made[::7] = -100
    return made


def operator(name: str, dtype: torch.dtype, backend: str, device: str) -> list[Tensor]:
    trains, workspace_mb, structure, kept = STRUCTURES[name]
    given = {
        k: x.detach().to(device).requires_grad_(k in trains)
        for k, x in tensors(trains, dtype).items()
    }
    stats = prefkern.linear_logprobs(
        labels=labels().to(device), **given, **TRANSFORM, backend=backend,
        workspace_mb=workspace_mb, return_stats=name != "some kept",
    )  # fmt: skip
    plan = prefkern.last_plan()
    assert plan is not None and (plan.structure, plan.backend) == (structure, backend)
    of = {0: "none", plan.tokens: "all"}.get(plan.kept_tokens, "some")
    assert of == kept, (plan.kept_tokens, plan.tokens)
    out = [stats] if isinstance(stats, Tensor) else list(stats)
    if not trains:
        return out
    grad = torch.linspace(-1, 2, N, device=device)
    return out + list(torch.autograd.grad((out[0] * grad).sum(), [given[k] for k in trains]))


def divergence(
    trains: tuple[str, ...], dtype: torch.dtype, backend: str, device: str
) -> list[Tensor]:
    given = {
        k: x.detach().to(device).requires_grad_(k in trains)
        for k, x in tensors(trains, dtype).items()
    }
    other = {f"ref_{k}": x.to(device) for k, x in tensors((), dtype, seed=1).items()}
    out = prefkern.linear_kl(
        labels=labels().to(device), **given, **other, **TRANSFORM, backend=backend,
        workspace_mb=SMALL,
    )  # fmt: skip
    if not trains:
        return list(out)
    grads = torch.autograd.grad((out.logps + 2 * out.kl).sum(), [given[k] for k in trains])
    return [*out, *grads]


def loss(name: str, backend: str, device: str) -> list[Tensor]:
    """A loss, the pair kernel's where the objective has one, and what it makes of its batch."""
    objective = CASES[name].make()
    assert isinstance(objective, Objective)
    given = {k: x.detach().to(device).requires_grad_() for k, x in tensors().items()}
    other = {f"ref_{k}": x.to(device) for k, x in tensors(seed=1).items()}
    for made in (given, other):
        for k in made:
            if "hidden" in k:
                made[k] = made[k].detach().view(4, N // 4, H).requires_grad_("ref" not in k)
    out = prefkern.FusedPreferenceLoss(objective.to(device), workspace_mb=SMALL, backend=backend)(
        labels=labels().view(4, N // 4).to(device),
        reward_margins=torch.tensor([3.0, -8.0], device=device),
        **given,
        **other,
    )
    found = [x.detach() for x in vars(out).values() if isinstance(x, Tensor)]
    return found + list(torch.autograd.grad(out.loss, list(given.values())))


RUNS: dict[str, Callable[[str, str], list[Tensor]]] = {}
for _name in STRUCTURES:
    for _dtype in (torch.float32, torch.bfloat16):
        RUNS[f"{_name}, {_dtype}"] = lambda backend, device, name=_name, dtype=_dtype: operator(
            name, dtype, backend, device
        )
for _trains in ((), ("hidden",), ("hidden", "weight", "bias")):
    RUNS[f"divergence, {', '.join(_trains) or 'forward'}"] = (
        lambda backend, device, trains=_trains: divergence(trains, torch.float32, backend, device)
    )
for _name in (
    "dpo: adaptive",
    "orpo: adaptive",
    "alphadpo: plain",
    "madpo: plain",
    "wpo: dpo",
    "tdpo2: plain",
):
    RUNS[f"loss, {_name}"] = lambda backend, device, name=_name: loss(name, backend, device)


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_are_equal_whatever_ran_between(backend, device):
    """All of them once, in this order; then again, each after others and in reverse."""
    first = {name: run(backend, device) for name, run in RUNS.items()}
    for name in reversed(RUNS):
        again = RUNS[name](backend, device)
        assert same(first[name], again), name
        assert all(x.isfinite().all() for x in again), name


@pytest.mark.parametrize("structure", STRUCTURES)
def test_what_is_left_in_memory_is_not_read(structure, device):
    """Fresh memory that holds other numbers: tests fill it with NaN, users' holds the last step."""
    expected = operator(structure, torch.float32, "torch", device)
    torch.use_deterministic_algorithms(False)
    # What the allocator hands out next is likely to be this.
    for size in (V * H, N * V, N * H, N, V):
        for _ in range(4):
            torch.full((size,), 1e30, device=device)
    assert same(expected, operator(structure, torch.float32, "torch", device))


def test_a_backward_does_not_depend_on_what_ran_after_its_forward(backend, device):
    """Forwards interleaved, backwards in another order: nothing saved is shared or overwritten."""

    def forward(seed: int) -> tuple[Tensor, list[Tensor]]:
        given = {
            k: x.detach().to(device).requires_grad_()
            for k, x in tensors(("hidden", "weight", "bias"), seed=seed).items()
        }
        logps = prefkern.linear_logprobs(
            labels=labels().to(device), **given, backend=backend, workspace_mb=MIDDLE
        )
        return (logps * (seed + 1)).sum(), list(given.values())

    alone = [torch.autograd.grad(*forward(seed)) for seed in range(3)]
    together = [forward(seed) for seed in range(3)]
    for seed in (1, 0, 2):
        assert same(list(alone[seed]), list(torch.autograd.grad(*together[seed]))), seed


@pytest.mark.parametrize("name", ["alphadpo: plain", "betadpo: plain"])
def test_statistics_are_the_only_memory(name, device):
    """An objective that has seen other batches differs; its copy, from the same state, does not."""
    objective = CASES[name].make().train()
    data = {k: x.to(device) for k, x in tensors().items()}
    arguments: dict[str, Any] = {
        **data, "hidden": data["hidden"].view(4, -1, H), "labels": labels().view(4, -1).to(device),
        "ref_logps": torch.linspace(-50.0, -40.0, 4, device=device),
    }  # fmt: skip
    copied = copy.deepcopy(objective)
    first = prefkern.FusedPreferenceLoss(objective.to(device))(**arguments).losses
    second = prefkern.FusedPreferenceLoss(copied.to(device))(**arguments).losses
    assert torch.equal(first, second)
    assert not torch.equal(first, prefkern.FusedPreferenceLoss(objective)(**arguments).losses)


def test_the_backend_s_modules_hold_no_tensors(device):
    """No pool, no cache of numbers: what a module keeps between calls is plans and functions."""
    for run in list(RUNS.values())[:3]:
        run(BACKENDS[-1], device)
    for backend in BACKENDS:
        held = [k for k, x in vars(api.tile_operations(backend)).items() if isinstance(x, Tensor)]
        assert not held
