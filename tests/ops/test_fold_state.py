"""A fold's state as a value: the states of two parts of the vocabulary make the state of both."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

from prefkern.ops import fold_state, tile_ops, torch_tiles
from prefkern.ops.fold_state import FoldState
from prefkern.ops.operands import Transform

N, V = 7, 40
CAPPED = Transform(0.8, 6.0, 1.3)


def logits(seed: int = 0) -> torch.Tensor:
    return torch.randn(N, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 6


def folded(
    z: torch.Tensor,  # (N, V)
    x: torch.Tensor,  # (N, V), a reference's
    labels: torch.Tensor,
    entries: slice,
    transform: Transform,
) -> tuple[FoldState, FoldState]:
    """The states of policy and reference over some entries, which begin as a state does."""
    device, wide = z.device, z.dtype
    state = FoldState.empty(N, device, with_stats=True, dtype=wide)
    ref_state = FoldState.empty(N, device, dtype=wide, with_cross=True)
    fold_state.clear(*ref_state.sums())
    torch_tiles.fold(
        z[:, entries].clone(), labels, None, *state.sums(), None, None, *state.moments(),
        ref_tile=x[:, entries].clone(), ref_maximum=ref_state.maximum, ref_total=ref_state.total,
        ref_label_logit=ref_state.label_logit, cross=ref_state.cross, start=entries.start,
        first=True, **transform.keywords(),
    )  # fmt: skip
    return state, ref_state


@pytest.mark.parametrize("transform", [Transform(), CAPPED])
@pytest.mark.parametrize("cut", [1, 13, 39])
def test_two_parts_make_the_whole(cut, transform):
    """In either order, to float64's rounding: sums, statistics and the divergence."""
    z, x = logits(), logits(1)
    labels = torch.tensor([0, 12, 13, 39, 5, 20, 38])
    # Labels that lead, and one that is ruled out.
    z[1, 12], z[3, 39], z[4, 5] = 60.0, 60.0, -math.inf
    parts = [folded(z, x, labels, part, transform) for part in (slice(0, cut), slice(cut, V))]
    whole = folded(z, x, labels, slice(0, V), transform)
    (state, ref_state), (other, other_ref) = parts
    for merged, ref_merged in (
        (state.merge(other), ref_state.merge(other_ref)),
        (other.merge(state), other_ref.merge(ref_state)),
    ):
        for mine, true in ((merged, whole[0]), (ref_merged, whole[1])):
            for name, value in vars(true).items():
                if value is None:
                    assert getattr(mine, name) is None
                else:
                    torch.testing.assert_close(
                        getattr(mine, name), value, rtol=1e-12, atol=1e-12,
                        msg=lambda m, n=name: f"{n}: {m}",
                    )  # fmt: skip
        ends, true_ends = (
            (fold_state.finish(a), fold_state.finish(b)) for a, b in ((merged, ref_merged), whole)
        )
        truth = (
            (x if transform.softcap is None else 6 * torch.tanh(0.8 * x / 6) / 1.3),
            (z if transform.softcap is None else 6 * torch.tanh(0.8 * z / 6) / 1.3),
        )
        log_r, log_p = (logit.log_softmax(-1) for logit in truth)
        kl = (log_r.exp() * (log_r - log_p)).nan_to_num(nan=0.0, posinf=math.inf).sum(-1)
        divergence = fold_state.divergence(merged, ref_merged, *ends)
        finite = kl.isfinite()
        assert finite.sum() >= N - 1 and torch.equal(divergence.isfinite(), finite)
        torch.testing.assert_close(divergence[finite], kl[finite], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(ends[0].logps, true_ends[0].logps, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("label", [0, 3])
def test_a_part_of_nothing_but_the_label_or_of_impossible_entries(label):
    """No NaN: one part holds the label alone, the other has logits of -inf only."""
    z = torch.full((1, 4), -math.inf, dtype=torch.float64)
    z[0, label] = 2.0
    labels = torch.tensor([label])
    states = []
    for entries in (slice(0, 1), slice(1, 4)):
        state = FoldState.empty(1, z.device, with_stats=True, dtype=z.dtype)
        torch_tiles.fold(
            z[:, entries].clone(), labels, None, *state.sums(), None, None, *state.moments(),
            start=entries.start, first=True, **Transform().keywords(),
        )  # fmt: skip
        states.append(state)
    merged = states[0].merge(states[1])
    end = fold_state.finish(merged)
    assert end.logps.item() == 0.0 and end.miss.item() == 0.0 and merged.total.item() == 0.0
    assert merged.shifted.item() == 0.0 and merged.squares.item() == 0.0


def test_backends_offer_what_the_protocol_names():
    """Both modules have its functions, with the same arguments, order and defaults."""
    kernels = pytest.importorskip("prefkern_kernels")
    names = tile_ops.TileOps.__annotations__
    assert {"fold", "finish", "settle", "remake_weights", "scatter_scaled"} < set(names)
    for name in names:
        ours, theirs = (
            [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]
            for function in (getattr(kernels, name), getattr(torch_tiles, name))
        )
        assert ours == theirs, name
