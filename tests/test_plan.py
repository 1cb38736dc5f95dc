"""What a call costs: counted products, counted bytes, and the plan that promised them."""

from __future__ import annotations

import pytest
import torch

import prefkern
from prefkern import plan
from prefkern.measure import Meter

N, H, V = 512, 64, 8192
NHV = N * H * V


def problem(trained: bool, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    hidden = torch.randn(N, H, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, H, device=device, dtype=dtype, requires_grad=trained)
    return hidden, weight, torch.randint(V, (N,), device=device)


@pytest.mark.parametrize("workspace_mb", [0.5, 4, 64])
@pytest.mark.parametrize(
    ("case", "operations"), [("forward", 2), ("frozen", 4), ("trained", 8), ("head only", 6)]
)
def test_operations_in_nhv(case, operations, workspace_mb, device):
    hidden, weight, labels = problem(case in ("trained", "head only"), torch.float32, device)
    if case in ("forward", "head only"):
        hidden = hidden.detach()
    with Meter() as meter:
        logps = prefkern.linear_logprobs(
            hidden, weight, labels, workspace_mb=workspace_mb, backend="torch"
        )
        if case != "forward":
            logps.sum().backward()
    made = prefkern.last_plan()
    assert made is not None
    # The Meter counts what the products' shapes say; the plan says what it meant to do.
    assert meter.operations / NHV == pytest.approx(operations, abs=1e-9)
    assert made.operations == meter.operations


def test_tokens_that_are_not_scored_cost_nothing(device):
    hidden, weight, labels = problem(False, torch.float32, device)
    labels[: N // 2] = -100
    with Meter() as meter:
        prefkern.linear_logprobs(hidden, weight, labels, backend="torch").sum().backward()
    assert meter.operations / NHV == pytest.approx(2.0, abs=1e-9)


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("workspace_mb", [1, 4])
def test_temporary_memory_stays_within_the_workspace(
    workspace_mb, dtype, trained, stats, softcap, device
):
    hidden, weight, labels = problem(trained, dtype, device)
    labels[::3] = -100
    scored = int((labels != -100).sum())
    with Meter() as meter:
        out = prefkern.linear_logprobs(
            hidden, weight, labels, workspace_mb=workspace_mb, backend="torch",
            return_stats=stats, softcap=softcap,
        )  # fmt: skip
        logps = out.logps if stats else out
        logps.sum().backward()
    # Beyond the workspace: the gradients, D or dH in float32, and some numbers a token.
    allowed = hidden.grad.nbytes + 4 * scored * H + 200 * N
    allowed += weight.grad.nbytes if trained else 0
    assert meter.peak_bytes <= 1.05 * (workspace_mb * 2**20) + allowed
    # The logits in float32 alone would be this, so that the bound means something.
    assert 1.05 * (workspace_mb * 2**20) + allowed < N * V * 4


def test_the_plan_uses_the_workspace():
    """Neither more than the bound nor so little that the products become slivers."""
    common = {
        "tokens": 16384,
        "hidden_size": 4096,
        "vocab_size": 128256,
        "compute_dtype": torch.bfloat16,
        "upcasts": False,
        "backend": "triton",
        "weight_needs_grad": False,
        "has_softcap": False,
        "with_stats": False,
        "copies_weight": False,
        "hidden_needs_grad": True,
        "head_needs_grad": False,
    }
    for workspace_mb in (8, 64, 512, 4096):
        made = plan.make_plan(**common, workspace_mb=workspace_mb)
        assert made.structure == "one_pass"
        assert 0.5 * workspace_mb * 2**20 < made.workspace_bytes <= workspace_mb * 2**20
        assert made.operations == 4 * 16384 * 4096 * 128256


@pytest.mark.parametrize("tokens", [0, 1, 5, 17, 1000])
@pytest.mark.parametrize("vocab_size", [1, 127, 128, 129, 5000])
@pytest.mark.parametrize("budget", [1, 10_000, 10_000_000])
def test_tiles_exist_for_any_shape(tokens, vocab_size, budget):
    tiles = plan.choose_tiles(tokens, vocab_size, budget, logit=4, token=100, word=100)
    assert 1 <= tiles.token_tile <= max(tokens, 1)
    assert 1 <= tiles.vocab_tile <= vocab_size
    smallest = tiles.token_tile <= 16 and tiles.vocab_tile <= 128
    assert tiles.bytes <= budget or smallest


def test_last_plan_is_per_thread(device):
    import threading

    seen = []
    prefkern.linear_logprobs(*problem(False, torch.float32, device))
    thread = threading.Thread(target=lambda: seen.append(prefkern.last_plan()))
    thread.start()
    thread.join()
    assert seen == [None] and prefkern.last_plan() is not None
