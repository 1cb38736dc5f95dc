"""Labels on both sides of every tile's edge.

A label just beyond the end of a tile is the first entry of the next tile. A comparison that is off
by one takes it for the last entry of this tile, and leaves that out of the sum. Random labels would
hardly ever show this.
"""

from __future__ import annotations

import pytest
import torch

import prefkern
from prefkern import reference
from prefkern.ops import plan
from support.logprobs import relative

H, V, TILE = 4, 70, 24
# The ends of the vocabulary, and the entries around each edge.
EDGES = (0, 1, 22, 23, 24, 25, 46, 47, 48, 49, 68, 69)


def tensors() -> dict[str, torch.Tensor]:
    return {
        "hidden": 2 * torch.randn(len(EDGES), H),
        # Every entry's share is large enough that its loss would show.
        "weight": 0.3 * torch.randn(V, H),
        "bias": 0.3 * torch.randn(V),
        "labels": torch.tensor(EDGES),
        "ref_hidden": 2 * torch.randn(len(EDGES), H),
        "ref_weight": 0.3 * torch.randn(V, H),
    }


def run(functions, name: str, given: dict, dtype, device: str, trained: bool, **options):
    """The results of a call, (N,) each, and the gradients of hidden, weight and bias."""
    leaves = {
        key: x.to(device, dtype if x.is_floating_point() else x.dtype, copy=True)
        for key, x in given.items()
        if name == "linear_kl" or not key.startswith("ref_")
    }
    trains = ("hidden", "weight", "bias") if trained else ("hidden",)
    for key in trains:
        leaves[key].requires_grad_()
    out = getattr(functions, name)(**leaves, **options)
    values = [out.logps, out.kl] if name == "linear_kl" else [out]
    count = torch.arange(1, len(given["labels"]) + 1, device=device)
    sum((value * count).sum() for value in values).backward()
    return [x.detach() for x in values] + [leaves[key].grad for key in trains]


@pytest.fixture
def tiles(monkeypatch) -> plan.Tiles:
    fixed = plan.Tiles(7, TILE, 0, 0.0)
    monkeypatch.setattr(plan, "choose_tiles", lambda *_, **__: fixed)
    return fixed


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("name", ["linear_logprobs", "linear_kl"])
def test_against_float64(name, trained, backend, device, tiles):
    given = tensors()
    ours = run(prefkern, name, given, torch.float32, device, trained, softcap=5.0, backend=backend)
    made = prefkern.last_plan()
    assert made.forward_tiles == tiles and made.backward_tiles == (tiles if trained else None)
    truth = run(reference, name, given, torch.float64, device, trained, softcap=5.0)
    for mine, true in zip(ours, truth, strict=True):
        assert relative(mine, true) < 3e-6
