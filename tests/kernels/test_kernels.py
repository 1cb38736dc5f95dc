"""Each Triton kernel against its twin in torch, and that it ran.

The interpreter does not notice out-of-bounds accesses. So every buffer that a kernel writes is cut
out of a larger one, and the rest of that one must not change.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from prefkern import Pairs
from prefkern.objectives import DPO, Adaptive
from prefkern.ops import fold_state, torch_tiles
from support.windows import GUARD, assert_guard_kept, guarded

kernels = pytest.importorskip("prefkern_kernels")

TRANSFORMS = [
    {"logit_scale": 1.0, "softcap": None, "temperature": 1.0},
    {"logit_scale": 1.7, "softcap": 8.0, "temperature": 0.6},
]


def ran(name: str, before: int) -> bool:
    return kernels.launches[name] == before + 1


def fresh_state(n: int, device: str, started: bool) -> fold_state.FoldState:
    """A state with arbitrary numbers, or one that a fold may continue from."""
    state = fold_state.FoldState.empty(n, torch.device(device), with_stats=True)
    vectors = {name: value for name, value in vars(state).items() if value is not None}
    for value in vectors.values():
        value.fill_(GUARD)
    if started:
        generator = torch.Generator().manual_seed(5)
        for name, value in vectors.items():
            value.copy_(torch.rand(value.shape, generator=generator) + (name == "total"))
    return state


@pytest.mark.parametrize("out_dtype", [None, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize(("n", "v", "start"), [(5, 127, 100), (3, 1, 6), (4, 300, 0)])
def test_fold(n, v, start, started, transform, out_dtype, device):
    torch.manual_seed(1)
    whole, tile = guarded(n, v, torch.float32, device)
    tile.copy_(torch.randn(n, v) * 6)
    labels = torch.randint(start, start + v, (n,), device=device)
    labels[0] = start + v + 3  # in another tile
    labels[-1] = max(start - 1, 0)
    bias = torch.randn(v, device=device).to(torch.bfloat16)
    states, rescales, weights = [], [], []
    for ops in (kernels, torch_tiles):
        state, rescale = fresh_state(n, device, started), torch.empty(n, device=device)
        out_whole, out = guarded(n, v, out_dtype or torch.float32, device)
        before = kernels.launches["fold"]
        ops.fold(
            tile if ops is kernels else tile.clone(),
            labels,
            bias,
            state.maximum,
            state.total,
            state.label_logit,
            state.label_slope,
            rescale if out_dtype else None,
            out if out_dtype else None,
            state.shifted,
            state.logit_sum,
            state.before,
            state.squares,
            start=start,
            first=not started,
            **transform,
        )
        assert ops is torch_tiles or ran("fold", before)
        assert_guard_kept(out_whole, n, v)
        states.append(state)
        rescales.append(rescale)
        weights.append(out)
    assert_guard_kept(whole, n, v)
    for name, value in vars(states[0]).items():
        if value is None:
            continue  # a reference's
        if name == "label_slope" and started and transform["softcap"] is None:
            continue  # always 1 then, but not in this made-up state
        # An absolute error of a float32 logit of 20; the slope near 0 is a difference in torch.
        torch.testing.assert_close(
            value, getattr(states[1], name), rtol=2e-5, atol=3e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    if out_dtype:
        torch.testing.assert_close(rescales[0], rescales[1], rtol=1e-5, atol=0)
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[out_dtype]
        torch.testing.assert_close(weights[0], weights[1], rtol=tolerance, atol=1e-6)
        inside = (labels >= start) & (labels < start + v)
        rows = torch.arange(n, device=device)[inside]
        assert inside.any() and (weights[0][rows, labels[inside] - start] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_to_the_nearest_even(dtype, device):
    """Every value of a row that is written rounded is rounded as torch does, not truncated."""
    tile = torch.randn(4, 513, device=device)
    out = torch.empty(4, 513, dtype=dtype, device=device)
    exact = torch.empty(4, 513, device=device)
    arguments = (
        torch.full((4,), -1, device=device),
        None,
        torch.zeros(4, device=device),
        torch.ones(4, device=device),
        torch.zeros(4, device=device),
    )
    options = {"start": 0, "logit_scale": 1.0, "softcap": None, "temperature": 1.0}
    kernels.remake_weights(tile, *arguments, exact, **options)
    kernels.remake_weights(tile, *arguments, out, **options)
    assert torch.equal(out, exact.to(dtype))


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("n", "v", "start"), [(5, 127, 100), (3, 1, 6), (4, 300, 0)])
def test_remake_weights(n, v, start, transform, out_dtype, device):
    torch.manual_seed(1)
    tile = torch.randn(n, v, device=device) * 6
    labels = torch.randint(start, start + v, (n,), device=device)
    labels[0] = start + v + 3
    # A label far above the unit, whose exponential would be inf.
    tile[1, labels[1] - start] = 300.0
    bias = torch.randn(v, device=device)
    unit = torch.full((n,), 20.0, device=device)
    factor = torch.randn(n, device=device)
    label_gradient = -torch.rand(n, device=device)
    results = []
    for ops in (kernels, torch_tiles):
        whole, out = guarded(n, v, out_dtype, device)
        before = kernels.launches["remake_weights"]
        ops.remake_weights(
            tile.clone(), labels, bias, unit, factor, label_gradient, out, start=start, **transform
        )
        assert ops is torch_tiles or ran("remake_weights", before)
        assert_guard_kept(whole, n, v)
        results.append(out)
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[out_dtype]
    torch.testing.assert_close(*results, rtol=tolerance, atol=1e-6)
    at_labels = results[0][range(1, n), labels[1:] - start]
    assert torch.equal(at_labels, label_gradient[1:].to(out_dtype))

    in_place = tile.clone()
    kernels.remake_weights(
        in_place, labels, bias, unit, factor, label_gradient, in_place, start=start, **transform
    )
    torch.testing.assert_close(in_place, results[1].float(), rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("V", "vocab_tile"), [(200, 64), (200, 200), (129, 128), (1, 16)])
def test_settle(V, vocab_tile, dtype, device):
    torch.manual_seed(2)
    n, tiles = 6, -(-V // vocab_tile)
    values = torch.rand(n, V, device=device).to(dtype)
    maxima = torch.randint(0, 3, (tiles, n), device=device).float()
    unit = maxima[-1] + (torch.arange(n, device=device) == 2) * 7.0
    label_value = -torch.rand(n, device=device) * 9
    labels = torch.randint(V, (n,), device=device)
    labels[0], labels[1] = 0, V - 1
    results = []
    for ops in (kernels, torch_tiles):
        whole, kept = guarded(n, V, dtype, device)
        kept.copy_(values)
        before = kernels.launches["settle"]
        ops.settle(kept, maxima, unit, label_value, labels, vocab_tile)
        assert ops is torch_tiles or ran("settle", before)
        assert_guard_kept(whole, n, V)
        results.append(kept)
    entries = torch.arange(V, device=device)
    expected = values.double() * (maxima.double() - unit)[entries // vocab_tile].t().exp()
    expected[range(n), labels] = label_value.double()
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]
    for kept in results:
        torch.testing.assert_close(kept.double(), expected, rtol=tolerance, atol=1e-7)


@pytest.mark.parametrize("operand_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 8.0])
@pytest.mark.parametrize(("H", "transposed"), [(1, False), (130, False), (130, True)])
def test_finish(H, transposed, softcap, operand_dtype, device):
    """Against the formulas in float64, from confident tokens to a label of no probability."""
    torch.manual_seed(3)
    maximum = torch.tensor([1.0, -20.0, 5.0, 90.0, -math.inf, 3.0, 0.0], device=device)
    total = torch.tensor([1.0, 1.5, 3.0, 7e4, 0.0, 2e5, 1.0], device=device)
    label_logit = torch.tensor([1.0, 20.0, 4.0, -90.0, 2.0, 3.5, 80.0], device=device)
    n, V, factor = len(total), 40, -1.7
    slope = torch.rand(n, device=device) if softcap else torch.ones(n, device=device)
    labels = torch.randint(V, (n,), device=device)
    weight = (
        torch.randn(H, V, device=device).t() if transposed else torch.randn(V, H, device=device)
    )
    sums = torch.randn(n, H, device=device) * total.unsqueeze(1)
    results = []
    for ops in (kernels, torch_tiles):
        whole, derivative = guarded(n, H, torch.float32, device)
        derivative.copy_(sums)
        logps, unit, share, label_value = torch.full((4, n), GUARD, device=device)
        before = kernels.launches["finish"]
        ops.finish(
            maximum, total, label_logit, slope, labels, logps, unit, share, label_value,
            derivative, weight,
            factor=factor, compute_dtype=torch.bfloat16, operand_dtype=operand_dtype,
        )  # fmt: skip
        assert ops is torch_tiles or ran("finish", before)
        assert_guard_kept(whole, n, H)
        results.append((logps, unit, share, label_value, derivative))
    m, others, y = maximum.double(), total.double(), label_logit.double()
    m = torch.where(others > 0, m, y - 1e3)
    whole_sum = torch.logaddexp(m + others.log(), y)
    miss = others * (m - whole_sum).exp()
    rows = weight[labels].to(torch.bfloat16).double()
    expected = factor * slope.double().unsqueeze(1) * miss.unsqueeze(1) * rows
    expected -= factor * (m - whole_sum).exp().unsqueeze(1) * sums.double()
    for logps, unit, share, label_value, derivative in results:
        # y - whole_sum cancels in float64 as well where the token is confident.
        true = -torch.log1p(others * (m - y).exp())
        torch.testing.assert_close(logps.double(), true, rtol=2e-6, atol=0)
        torch.testing.assert_close(derivative.double(), expected, rtol=1e-5, atol=1e-6)
        # -share u_y = (1 - p_y) t_y, and share turns exp(z - unit) into a probability.
        own = -(share * label_value).double()
        torch.testing.assert_close(own, miss * slope.double(), rtol=3e-5, atol=0)
        back = share.double() * (m - unit.double()).exp()
        torch.testing.assert_close(back, (m - whole_sum).exp(), rtol=3e-5, atol=1e-38)
        assert label_value.to(operand_dtype).isfinite().all()
        assert torch.equal(unit[:3], maximum[:3])


def test_rescale_rows(device):
    whole, rows = guarded(6, 200, torch.float32, device)
    rows.copy_(torch.randn(6, 200))
    expected = rows.clone()
    factor = torch.tensor([1.0, 0.5, 1.0, 0.0, 1e-3, 1.0], device=device)
    before = kernels.launches["rescale_rows"]
    kernels.rescale_rows(rows, factor)
    assert ran("rescale_rows", before)
    torch_tiles.rescale_rows(expected, factor)
    assert torch.equal(rows, expected)
    assert_guard_kept(whole, 6, 200)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gathered", [False, True])
def test_scatter_scaled(gathered, dtype, device):
    values, scale = torch.randn(4, 300, device=device), torch.randn(4, device=device)
    rows = torch.tensor([5, 0, 3, 1], device=device) if gathered else None
    results = []
    for ops in (kernels, torch_tiles):
        whole, out = guarded(6, 300, dtype, device)
        before = kernels.launches["scatter_scaled"]
        ops.scatter_scaled(values, scale, rows, out)
        assert ops is torch_tiles or ran("scatter_scaled", before)
        assert_guard_kept(whole, 6, 300)
        results.append(out)
    expected = torch.full((6, 300), GUARD, device=device).to(dtype)
    places = rows if gathered else torch.arange(4, device=device)
    expected[places] = (values * scale.unsqueeze(1)).to(dtype)
    assert torch.equal(results[0], expected) and torch.equal(results[1], expected)


@pytest.mark.parametrize("x", [0.0, 1e-6, 0.01, 0.25, 0.3499, 0.3501, 1.0, 5.0, 9.0, 30.0, 1e4])
def test_softcap_near_0_and_saturated(x, device):
    """tanh from exp alone: the label's logit and slope have relative accuracy at every size."""
    state = fresh_state(2, device, started=False)
    tile = torch.tensor([[x, 0.0], [-x, 0.0]], device=device)
    kernels.fold(
        tile,
        torch.zeros(2, dtype=torch.int64, device=device),
        None,
        state.maximum,
        state.total,
        state.label_logit,
        state.label_slope,
        None,
        None,
        start=0,
        first=True,
        logit_scale=1.0,
        softcap=1.0,
        temperature=1.0,
    )
    value = torch.tensor([x, -x], dtype=torch.float64)
    torch.testing.assert_close(state.label_logit.cpu().double(), value.tanh(), rtol=3e-7, atol=0)
    slope = 1 / value.clamp(-300, 300).cosh() ** 2
    torch.testing.assert_close(state.label_slope.cpu().double(), slope, rtol=3e-6, atol=1e-38)


OBJECTIVES = {
    "dpo": DPO(0.1),
    "adadpo": DPO(0.1, adaptive=Adaptive()),
    "smoothed adadpo": DPO(0.7, label_smoothing=0.3, adaptive=Adaptive(clip=1.5, k=2.0)),
    "policy": DPO(0.1, adaptive=Adaptive("policy", "length", None)),
    "exponents": DPO(0.1, adaptive=Adaptive("ratio", (0.3, 0.1), 4.0)),
    "base": DPO(0.1, adaptive=Adaptive("ratio", 1.0, None)),
}


def run_pair_kernel(objective, logps, lengths, ref):
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    before = kernels.launches["pair_loss"]
    out = kernels.pair_loss(logps, offsets, ref, **objective.pair_kernel_options())
    assert ran("pair_loss", before)
    return out


@pytest.mark.parametrize("name", OBJECTIVES)
def test_pair_loss_is_the_objective(name, device):
    """Value and gradient, in float32, against the torch class in float64."""
    objective = OBJECTIVES[name]
    B = 9
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(0, 40, (2 * B,), generator=generator)
    lengths[2] = 3000  # more than a block
    lengths[B] = 0  # an empty response
    lengths = lengths.to(device)
    logps = -torch.rand(int(lengths.sum()), generator=generator).to(device)
    parts = logps.double().split(lengths.tolist())
    sums = torch.stack([part.sum() for part in parts])
    ref = (sums + 6 * torch.randn(2 * B, generator=generator).to(device)).float()

    out = run_pair_kernel(objective, logps, lengths, ref)
    leaf = sums.requires_grad_()
    expected = objective(Pairs(*leaf.chunk(2), *ref.double().chunk(2), *lengths.chunk(2)))
    expected.losses.sum().backward()
    assert torch.equal(out.lengths, lengths)
    torch.testing.assert_close(out.sums.double(), sums.detach(), rtol=1e-7, atol=0)
    rewards = torch.cat([expected.chosen_rewards, expected.rejected_rewards])
    for mine, true in (
        (out.losses, expected.losses.detach()),
        (out.beta_chosen, expected.beta_chosen),
        (out.beta_rejected, expected.beta_rejected),
        (out.rewards, rewards),
        (out.coefficients, leaf.grad),
    ):
        # A float32 sum of 1500 nats is uncertain by 1e-4, and the base form exponentiates it.
        torch.testing.assert_close(mine.double(), true, rtol=5e-4, atol=5e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_pair_loss_at_extremes(name, device):
    """Margins from nothing to saturation, on one-token responses whose sums are exact."""
    objective = OBJECTIVES[name]
    sizes = [0.0, -1e-4, -1.0, -30.0, -1e4]
    chosen, rejected = torch.tensor(list(itertools.product(sizes, sizes))).unbind(1)
    logps = torch.cat([chosen, rejected]).to(device)
    ref = torch.zeros_like(logps)
    lengths = torch.ones(len(logps), dtype=torch.int64, device=device)
    out = run_pair_kernel(objective, logps, lengths, ref)
    leaf = logps.clone().requires_grad_()
    expected = objective(Pairs(*leaf.chunk(2), *ref.chunk(2), *lengths.chunk(2)))
    expected.losses.sum().backward()
    *values, whole, whole_coefficients = out
    assert whole is None and whole_coefficients is None
    for value in values:
        assert value.isfinite().all()
    torch.testing.assert_close(out.losses, expected.losses.detach(), rtol=3e-5, atol=1e-30)
    torch.testing.assert_close(out.beta_chosen, expected.beta_chosen, rtol=3e-5, atol=0)
    torch.testing.assert_close(out.coefficients, leaf.grad, rtol=3e-5, atol=1e-30)


def test_pair_loss_gradient_by_finite_differences(device):
    """With constant coefficients, d losses / d sums is what one launch returned."""
    objective = OBJECTIVES["adadpo"]
    logps = torch.tensor([-3.0, -5.0, -2.5, -9.0], device=device)
    ref = torch.tensor([-4.0, -4.0, -4.0, -4.0], device=device)
    out = run_pair_kernel(objective, logps, torch.ones(4, dtype=torch.int64, device=device), ref)
    delta = (out.rewards[:2] - out.rewards[2:]).double()
    for side, beta, sign in (
        (slice(0, 2), out.beta_chosen, 1),
        (slice(2, 4), out.beta_rejected, -1),
    ):
        step = 1e-5
        up, down = (
            torch.nn.functional.softplus(-(delta + sign * beta.double() * move))
            for move in (step, -step)
        )
        torch.testing.assert_close(
            out.coefficients[side].double(), (up - down) / (2 * step), rtol=1e-4, atol=0
        )


def test_launchers_refuse_strided_rows(device):
    tile = torch.randn(8, 4, device=device).t()
    with pytest.raises(ValueError, match="unit stride"):
        kernels.rescale_rows(tile, torch.ones(4, device=device))


def test_launchers_refuse_strided_vectors(device):
    with pytest.raises(ValueError, match="factor must be contiguous"):
        kernels.rescale_rows(
            torch.randn(4, 8, device=device), torch.ones(1, device=device).expand(4)
        )


def test_loss_is_one_launch_after_the_log_probs(device):
    """FusedPreferenceLoss on the triton backend: folds, then one pair kernel, and in backward
    nothing that computes a loss."""
    import prefkern

    hidden = torch.randn(4, 6, 8, device=device, requires_grad=True)
    weight = torch.randn(50, 8, device=device)
    labels = torch.randint(50, (4, 6), device=device)
    kernels.launches.clear()
    out = prefkern.FusedPreferenceLoss(OBJECTIVES["adadpo"], backend="triton")(
        hidden, weight, labels, ref_logps=torch.zeros(4, device=device)
    )
    out.loss.backward()
    assert dict(kernels.launches) == {"fold": 1, "finish": 1, "pair_loss": 1, "scatter_scaled": 1}
    assert math.isfinite(out.loss.item()) and hidden.grad.abs().max() > 0
