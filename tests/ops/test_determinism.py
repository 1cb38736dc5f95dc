"""Two runs on one input are equal bit for bit, with any other runs between them.

Between them run other structures, dtypes, operators and objectives. What these leave in memory or
in the caches of tiles and kernels must not change a result. The passes over tiles run in every
structure that a plan can have; this is asserted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import prefkern
from prefkern.objectives import Objective
from support.objective_cases import CASES

N, H, V = 24, 24, 200  # of the tokens 20 are scored
# Of each backend, for it to have several tiles and no room for probabilities, or room for some.
SMALL = {"torch": 0.015, "triton": 0.015}
MIDDLE = {"torch": 0.035, "triton": 0.03}
LARGE = dict.fromkeys(SMALL, 8.0)
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
        workspace_mb=workspace_mb[backend], return_stats=name != "some kept",
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
        workspace_mb=SMALL[backend],
    )  # fmt: skip
    if not trains:
        return list(out)
    grads = torch.autograd.grad((out.logps + 2 * out.kl).sum(), [given[k] for k in trains])
    return [*out, *grads]


def loss(name: str, backend: str, device: str) -> list[Tensor]:
    """A loss, by the pair kernel if the objective has one, and its outputs for a batch."""
    objective = CASES[name].make()
    assert isinstance(objective, Objective)
    given = {k: x.detach().to(device).requires_grad_() for k, x in tensors().items()}
    other = {f"ref_{k}": x.to(device) for k, x in tensors(seed=1).items()}
    for made in (given, other):
        for k in made:
            if "hidden" in k:
                made[k] = made[k].detach().view(4, N // 4, H).requires_grad_("ref" not in k)
    out = prefkern.FusedPreferenceLoss(
        objective.to(device), workspace_mb=SMALL[backend], backend=backend
    )(
        labels=labels().view(4, N // 4).to(device),
        reward_margins=torch.tensor([3.0, -8.0], device=device),
        **given,
        **other,
    )
    found = [x.detach() for x in vars(out).values() if isinstance(x, Tensor)]
    return found + list(torch.autograd.grad(out.loss, list(given.values())))


RUNS: dict[str, Callable[[str, str], list[Tensor]]] = {
    f"{name}, {dtype}": functools.partial(operator, name, dtype)
    for dtype, names in (
        (torch.float32, list(STRUCTURES)),
        (torch.bfloat16, ["frozen, tiles", "recomputed", "kept"]),
    )
    for name in names
}
for _trains in ((), ("hidden",), ("hidden", "weight", "bias")):
    _name = f"divergence, {', '.join(_trains) or 'forward'}"
    RUNS[_name] = functools.partial(divergence, _trains, torch.float32)
for _name in (
    "dpo: adaptive", "orpo: adaptive", "alphadpo: plain", "madpo: plain", "wpo: dpo", "tdpo2: plain",
):  # fmt: skip
    RUNS[f"loss, {_name}"] = functools.partial(loss, _name)


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


@pytest.mark.long(backend="triton")
def test_two_runs_are_equal_whatever_ran_between(backend, device):
    """All calls once in this order, then again in reverse order."""
    first = {name: run(backend, device) for name, run in RUNS.items()}
    for name in reversed(RUNS):
        again = RUNS[name](backend, device)
        assert same(first[name], again), name
        assert all(x.isfinite().all() for x in again), name


@pytest.mark.parametrize("structure", STRUCTURES)
def test_what_is_left_in_memory_is_not_read(structure, device):
    """Fresh memory may hold other numbers. Tests fill it with NaN; a user's holds the last step."""
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
            labels=labels().to(device), **given, backend=backend, workspace_mb=MIDDLE[backend]
        )
        return (logps * (seed + 1)).sum(), list(given.values())

    alone = [torch.autograd.grad(*forward(seed)) for seed in range(3)]
    together = [forward(seed) for seed in range(3)]
    for seed in (1, 0, 2):
        assert same(list(alone[seed]), list(torch.autograd.grad(*together[seed]))), seed
