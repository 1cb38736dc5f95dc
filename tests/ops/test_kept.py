"""The head's gradient from probabilities that forward kept: all tokens', some tokens', none.

On a CPU, half-precision operands are raised to float32 before a product. A GPU multiplies
half-precision operands with a float32 result. The fixture `wide` makes the CPU do as a GPU does, so
that probabilities are kept in half precision.
"""

from __future__ import annotations

import pytest
import torch

import prefkern
from prefkern import reference
from prefkern.ops import plan
from support.logprobs import TRANSFORM, relative, run
from support.wide_products import products_as_on_a_gpu

N, H, V = 22, 16, 300


@pytest.fixture
def wide(monkeypatch, device):
    """Half-precision operands reach the products without being raised."""
    products_as_on_a_gpu(monkeypatch, device)


@pytest.fixture
def keep(monkeypatch):
    """Fix how many tokens are kept, and tile sizes that divide neither N nor V."""

    def fix(kept: int, entries: int = 128) -> None:
        tiles = plan.Tiles(8, entries, 0, 0.0), plan.Tiles(11, entries - 14, 0, 0.0)
        monkeypatch.setattr(plan, "_cheapest", lambda *_: (kept, *tiles))

    return fix


def make(spread: float = 5.0, rising: float = 0.0) -> dict[str, torch.Tensor]:
    """Labels in every tile, half of them the likeliest; `rising` makes later entries likelier."""
    hidden = torch.randn(2, N // 2, H) * spread / H**0.5
    weight, bias = torch.randn(V, H), torch.randn(V) + rising * torch.arange(V)
    labels = torch.randint(V, (2, N // 2))
    labels[0] = (hidden[0] @ weight.T + bias).argmax(-1)
    labels[1, 3] = -100
    return {"hidden": hidden, "weight": weight, "bias": bias, "labels": labels}


@pytest.mark.parametrize("heads", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("rising", [0.0, 0.3])
@pytest.mark.parametrize("transform", [{}, TRANSFORM])
@pytest.mark.parametrize("kept", [0, 10, 21])
@pytest.mark.long(backend="triton", heads=(True, False))
@pytest.mark.long(backend="triton", kept=10)
@pytest.mark.long(backend="triton", kept=0)
@pytest.mark.long(backend="triton", rising=0.0)
def test_float32_against_float64(kept, transform, rising, heads, backend, device, keep):
    keep(kept)
    case = make(rising=rising)
    grad = torch.randn(case["labels"].shape)
    options = {"trains": heads, "grad": grad, **transform}
    ours = run(prefkern.linear_logprobs, case, torch.float32, device, backend=backend, **options)
    made = prefkern.last_plan()
    assert (made.kept_tokens, made.tokens) == (kept, 21)
    truth = run(reference.linear_logprobs, case, torch.float64, device, **options)
    # Logits of 90 are uncertain by 1e-5, and so is the logarithm of what they say.
    size = 1 + abs(rising) * V
    torch.testing.assert_close(ours[0].double(), truth[0], rtol=1e-6, atol=1e-6 * size)
    for mine, true in zip(ours[1:], truth[1:], strict=True):
        assert (mine is None) == (true is None)
        if true is not None:
            assert relative(mine, true) < 5e-6 * size


@pytest.mark.parametrize("head_only", [False, True])
def test_hidden_may_be_frozen(head_only, backend, device, keep):
    keep(21)
    case = {name: value.to(device) for name, value in make().items()}
    case["hidden"].requires_grad_(not head_only)
    case["weight"].requires_grad_()
    prefkern.linear_logprobs(**case, backend=backend).sum().backward()
    weight = case["weight"].detach().double().requires_grad_()
    truth = {**{k: v.detach() for k, v in case.items()}, "weight": weight}
    truth = {k: v.double() if v.is_floating_point() else v for k, v in truth.items()}
    reference.linear_logprobs(**{**truth, "weight": weight}).sum().backward()
    assert relative(case["weight"].grad, weight.grad) < 1e-5
    assert (case["hidden"].grad is None) == head_only


@pytest.mark.parametrize("kept", [0, 10, 21])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transform", [{}, TRANSFORM])
@pytest.mark.long(backend="triton")
def test_half_precision_is_no_worse_than_eager(transform, dtype, kept, backend, device, keep, wide):
    """Every gradient against float64 on the rounded inputs, beside eager in the same dtype."""
    keep(kept)
    case = make(8.0)
    case = {k: v.to(dtype).float() if v.is_floating_point() else v for k, v in case.items()}
    grad = torch.randn(case["labels"].shape)
    options = {"grad": grad, **transform}
    ours = run(prefkern.linear_logprobs, case, dtype, device, backend=backend, **options)
    eager = run(reference.linear_logprobs, case, dtype, device, **options)
    truth = run(reference.linear_logprobs, case, torch.float64, device, **options)
    assert (ours[0].double() - truth[0]).abs().max() < 1e-4
    for name, mine, theirs, true in zip(
        ("hidden", "weight", "bias"), ours[1:], eager[1:], truth[1:], strict=True
    ):
        # u and the scaled rows are rounded once each, and the result once more.
        least = 3 * torch.finfo(dtype).eps
        assert relative(mine, true) < max(relative(theirs, true), least), name


@pytest.mark.parametrize("kept", [0, 2])
def test_sums_beyond_float16(kept, backend, device, keep, wide):
    """Equal logits over 70,000 entries: the sum over the other entries overflows float16."""
    keep(kept, entries=40_000)
    entries = 70_000
    hidden = torch.randn(2, 8, device=device, dtype=torch.float16).requires_grad_()
    weight = torch.ones(entries, 8, device=device, dtype=torch.float16).requires_grad_()
    labels = torch.tensor([3, entries - 1], device=device)
    prefkern.linear_logprobs(hidden, weight, labels, backend=backend).sum().backward()
    expected = -torch.ones(entries, 2, device=device, dtype=torch.float64) / entries
    expected[labels, [0, 1]] += 1
    expected = expected @ hidden.detach().double()
    assert weight.grad.isfinite().all()
    torch.testing.assert_close(weight.grad[labels].double(), expected[labels], rtol=2e-3, atol=0)
    # The others' share is below what float16 holds to more than some bits.
    torch.testing.assert_close(weight.grad.double(), expected, rtol=2e-3, atol=6e-8)


def test_tiny_gradients_in_float16(backend, device, keep, wide):
    """r is scaled to about 1 before it scales hidden in float16, at any scale of the loss."""
    keep(21)
    case = {name: value.to(device) for name, value in make().items()}
    for name in ("hidden", "weight", "bias"):
        case[name] = case[name].half()
    # Large states, so that a gradient that is tiny as a factor is a number of float16 in dW.
    case["hidden"] *= 2000
    case["weight"] = (case["weight"] / 2000).requires_grad_()
    logps = prefkern.linear_logprobs(**case, backend=backend)
    assert prefkern.last_plan().kept_tokens == 21
    (one,) = torch.autograd.grad(logps.sum(), case["weight"], retain_graph=True)
    (tiny,) = torch.autograd.grad(logps.sum() * 1e-7, case["weight"])
    expected = one.double() * 1e-7
    seen = expected.abs() > 1e-5
    assert seen.any()
    torch.testing.assert_close(tiny.double()[seen], expected[seen], rtol=0.01, atol=0)


def test_nothing_kept_is_overwritten(backend, device, keep):
    """Two backward calls on one graph, and another gradient between them."""
    keep(10)
    case = {name: value.to(device) for name, value in make().items()}
    leaves = [case[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    logps = prefkern.linear_logprobs(**case, backend=backend)
    first = torch.autograd.grad(logps.sum(), leaves, retain_graph=True)
    torch.autograd.grad((logps**2).sum(), leaves, retain_graph=True)
    again = torch.autograd.grad(logps.sum(), leaves)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


def test_what_is_kept_goes_with_the_graph(device, keep):
    from prefkern_bench.measure import Meter

    keep(21)
    case = {name: value.to(device) for name, value in make().items()}
    case["weight"].requires_grad_()
    with Meter() as meter:
        logps = prefkern.linear_logprobs(**case, backend="torch")
        assert meter.live_bytes > 21 * V * 4
        logps.sum().backward()
        del logps
        assert meter.live_bytes <= case["weight"].grad.nbytes + 4096
