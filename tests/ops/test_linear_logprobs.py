"""The operator against the float64 oracle: values, dH, dW and db, on both backends."""

from __future__ import annotations

import math

import pytest
import torch

import prefkern
from prefkern import reference
from prefkern.ops import call, operands, sequences
from support.logprobs import CASES, HEADS, SMALL, TRANSFORM, make, relative, run


@pytest.mark.parametrize("workspace_mb", [SMALL, 4])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.long(backend="triton", head="bias only")
@pytest.mark.long(backend="triton", name=["temperature", "scale", "softcap"])
@pytest.mark.long(backend="triton", name=["one entry", "two entries", "127 entries"], head="frozen")
@pytest.mark.long(
    backend="triton", workspace_mb=4, name=["one entry", "two entries", "127 entries", "saturated"]
)
def test_float32_against_float64(name, head, workspace_mb, backend, device):
    """In many tiles, with nothing kept for the head's gradient; and in one tile, which is kept."""
    V, spread, options, has_bias = CASES[name]
    case = make(V, spread)
    grad = torch.randn(case["labels"].shape)
    keywords = dict(trains=HEADS[head], has_bias=has_bias, grad=grad, **options)
    ours = run(
        prefkern.linear_logprobs,
        case,
        torch.float32,
        device,
        backend=backend,
        workspace_mb=workspace_mb,
        **keywords,
    )
    plan = prefkern.last_plan()
    assert plan is not None and plan.backend == backend
    trains = HEADS[head][0] or (HEADS[head][1] and has_bias)
    assert plan.trains_head == trains
    recomputes = trains and workspace_mb == SMALL
    assert plan.structure == ("two_pass" if recomputes else "one_pass")
    assert plan.kept_tokens == (18 if trains and not recomputes else 0)
    truth = run(reference.linear_logprobs, case, torch.float64, device, **keywords)
    assert ours[0].dtype == torch.float32
    # The error of a float32 logit is of the order of 1e-7 times its size.
    torch.testing.assert_close(ours[0].double(), truth[0], rtol=1e-6, atol=2e-7 * max(spread, 5))
    assert (ours[0][0, :3] == 0).all() and (ours[1][0, :3] == 0).all()
    for mine, true in zip(ours[1:], truth[1:], strict=True):
        assert (mine is None) == (true is None)
        if true is not None:
            # One entry has no gradient at all: then every element is 0 in both.
            bound = 0 if V == 1 else 1e-6 * max(spread, 5)
            assert relative(mine, true) <= bound


@pytest.mark.parametrize("V", [50257, 151936])
def test_vocabularies_that_no_tile_divides(V, backend, device):
    case = make(V, 5.0, N=3, H=8)
    case["labels"] = torch.tensor([[0], [V - 1], [V // 2]])
    grad = torch.randn(3, 1)
    ours = run(
        prefkern.linear_logprobs, case, torch.float32, device, grad=grad, backend=backend,
        workspace_mb=0.3,
    )  # fmt: skip
    plan = prefkern.last_plan()
    assert plan is not None and V % plan.forward_tiles.vocab_tile
    truth = run(reference.linear_logprobs, case, torch.float64, device, grad=grad)
    torch.testing.assert_close(ours[0].double(), truth[0], rtol=0, atol=1e-5)
    # Some CPUs' libraries add up so long a product of few rows one term after another.
    eager = run(reference.linear_logprobs, case, torch.float32, device, grad=grad)
    for mine, true, plain in zip(ours[1:], truth[1:], eager[1:], strict=True):
        assert relative(mine, true) < max(1e-5, 1.1 * relative(plain, true))


def test_all_logits_far_below_zero(backend, device):
    """If the tail past V were read as 0, it would outweigh every real logit."""
    case = make(127, 1.0)
    case["bias"] -= 500
    grad = torch.randn(case["labels"].shape)
    ours = run(
        prefkern.linear_logprobs, case, torch.float32, device, grad=grad, backend=backend,
        workspace_mb=SMALL,
    )  # fmt: skip
    truth = run(reference.linear_logprobs, case, torch.float64, device, grad=grad)
    torch.testing.assert_close(ours[0].double(), truth[0], rtol=0, atol=2e-4)
    assert relative(ours[1], truth[1]) < 2e-4


@pytest.mark.parametrize("head", ["frozen", "trained"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.long(backend="triton")
def test_half_precision_is_no_worse_than_eager(dtype, head, backend, device):
    """Three ways: float64 on the rounded inputs, eager in the same dtype, and ours."""
    case = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in make(1000, 6.0, N=60, H=64).items()
    }
    grad = torch.randn(case["labels"].shape)
    keywords = {"trains": HEADS[head], "grad": grad}
    ours = run(
        prefkern.linear_logprobs, case, dtype, device, backend=backend, workspace_mb=0.2, **keywords
    )
    eager = run(reference.linear_logprobs, case, dtype, device, **keywords)
    truth = run(reference.linear_logprobs, case, torch.float64, device, **keywords)
    assert (ours[0].double() - truth[0]).abs().max() < 1e-3
    assert (eager[0].double() - truth[0]).abs().max() > 1e-3, "the case is too easy"
    for mine, theirs, true in zip(ours[1:], eager[1:], truth[1:], strict=True):
        if true is not None:
            assert mine.dtype == dtype
            assert relative(mine, true) <= 1.02 * relative(theirs, true)


@pytest.mark.parametrize("head", ["frozen", "trained"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.long(backend="triton")
def test_half_precision_gradients_are_rounded_once(dtype, head, backend, device):
    """In many tiles, of which each is added in float32: the error is that of the rounded truth."""
    case = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in make(1000, 6.0, N=60, H=64).items()
    }
    keywords = {"trains": HEADS[head], "grad": torch.randn(case["labels"].shape)}
    ours = run(
        prefkern.linear_logprobs, case, dtype, device, backend=backend, workspace_mb=SMALL,
        **keywords,
    )  # fmt: skip
    made = prefkern.last_plan()
    assert made.forward_tiles.vocab_tile == 128 and made.forward_tiles.token_tile == 16
    truth = run(reference.linear_logprobs, case, torch.float64, device, **keywords)
    for mine, true in zip(ours[1:], truth[1:], strict=True):
        if true is not None:
            # Products of half-precision operands (a GPU's, and a CPU's with bfloat16 units) round
            # these, and a CPU's round each tile's result; elsewhere each tile is raised.
            once = relative(true.to(dtype), true)
            is_raised = operands.operands_for(dtype, device).of_gradients == torch.float32
            assert relative(mine, true) < (1.02 if is_raised else 1.35) * once


@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_a_confident_token_keeps_its_relative_precision(head, backend, device):
    """At p = 1 - 1e-9, 1 - p is 0 in float32: leave the label's column out, do not subtract it."""
    H, V = 4, 50
    case = make(V, 1.0, N=3, H=H)
    case["hidden"] = torch.zeros(3, 1, H)
    case["hidden"][..., 0] = torch.tensor([15.0, 25.0, 40.0]).view(3, 1)
    case["weight"] = torch.randn(V, H) * 0.1
    case["weight"][7, 0] = 1.0
    case["labels"] = torch.full((3, 1), 7)
    keywords = {"trains": HEADS[head], "has_bias": False, "grad": torch.ones(3, 1)}
    ours = run(
        prefkern.linear_logprobs, case, torch.float32, device, backend=backend,
        workspace_mb=SMALL, **keywords,
    )  # fmt: skip
    truth = run(reference.linear_logprobs, case, torch.float64, device, **keywords)
    assert truth[0].abs().max() < 1e-2 and truth[0].abs().min() < 1e-12
    # float64's own 1 - p cancels at the third token, so the truth comes from expm1 and its rest.
    torch.testing.assert_close(ours[0].double()[:2], truth[0][:2], rtol=1e-4, atol=0)
    torch.testing.assert_close(ours[1].double()[:2], truth[1][:2], rtol=1e-4, atol=1e-16)
    assert (ours[0][2] < 0).all() and ours[1][2].abs().max() > 0


def test_gradients_by_finite_differences(backend, device):
    """Without an oracle: central differences of the operator's own values."""
    case = make(40, 3.0, N=6, H=8)
    grad = torch.randn(case["labels"].shape)
    _, *gradients = run(
        prefkern.linear_logprobs, case, torch.float32, device, grad=grad, backend=backend,
        **TRANSFORM,
    )  # fmt: skip
    step = 1e-2
    for name, gradient in zip(("hidden", "weight", "bias"), gradients, strict=True):
        direction = torch.randn(case[name].shape)
        values = []
        for sign in (1, -1):
            moved = {**case, name: case[name] + sign * step * direction}
            logps = prefkern.linear_logprobs(
                moved["hidden"].to(device), moved["weight"].to(device), moved["labels"].to(device),
                moved["bias"].to(device), backend=backend, **TRANSFORM,
            )  # fmt: skip
            values.append((logps.cpu().double() * grad).sum())
        slope = (values[0] - values[1]) / (2 * step)
        expected = (gradient.cpu().double() * direction).sum()
        torch.testing.assert_close(slope, expected, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("softcap", [None, 6.0])
def test_statistics(softcap, backend, device):
    case = make(129, 5.0)
    case["hidden"][2, 0] *= 20  # all but certain: an entropy near 0
    arguments = [case[name].to(device) for name in ("hidden", "weight", "labels", "bias")]
    ours = prefkern.linear_logprobs(
        *arguments, softcap=softcap, return_stats=True, backend=backend, workspace_mb=SMALL
    )
    arguments = [x.double() if x.is_floating_point() else x for x in arguments]
    truth = reference.linear_logprobs(*arguments, softcap=softcap, return_stats=True)
    for name in ("logps", "entropy", "mean_logit"):
        mine, true = getattr(ours, name), getattr(truth, name)
        torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=5e-6, msg=name)
    assert torch.equal(ours.is_top1, truth.is_top1)
    assert 0 < ours.is_top1.sum() < ours.is_top1.numel()


def run_statistics(arguments, backend, device, **transform):
    """`call.run`'s statistics of (N,) scored tokens, the log of the collision probability last."""
    hidden, weight, labels, bias = (x if x is None else x.to(device) for x in arguments)
    scored = sequences.select(labels, -100, weight.shape[0])
    head = operands.Head.of(hidden, weight, bias)
    transform = operands.Transform(**transform)
    result, _ = call.run(head, scored, transform, SMALL, backend, with_stats=True)
    return result.stats


@pytest.mark.parametrize("V", [1, 127, 300])
@pytest.mark.parametrize("transform", [{}, TRANSFORM])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.long(backend="triton", V=[1, 127])
def test_log_collision(with_bias, transform, V, backend, device):
    """log sum_v p_v^2 over several tiles, with labels of the largest logit and others."""
    case = make(V, 5.0)
    hidden, labels = case["hidden"].flatten(0, 1), case["labels"].clamp(min=0).flatten()
    bias = case["bias"] if with_bias else None
    ours = run_statistics((hidden, case["weight"], labels, bias), backend, device, **transform)[3]
    doubles = (hidden.double(), case["weight"].double(), bias if bias is None else bias.double())
    truth = (2 * reference.logits(*doubles, **transform).log_softmax(-1)).logsumexp(-1)
    assert (ours <= 0).all()
    torch.testing.assert_close(ours.cpu().double(), truth, rtol=1e-6, atol=3e-6)


def test_log_collision_of_a_confident_token_keeps_its_relative_precision(backend, device):
    """If the label has all but 1e-9 of the probability, the result is -2e-9 and not 0."""
    hidden = torch.tensor([[10.0], [20.0], [30.0]])
    weight = torch.linspace(-0.1, 0.0, 127).unsqueeze(1)
    weight[7] = 1.0
    labels = torch.full((3,), 7)
    ours = run_statistics((hidden, weight, labels, None), backend, device)[3]
    z = hidden.double() @ weight.double().T
    distances = z - z[:, 7:8]
    others = torch.cat([distances[:, :7], distances[:, 8:]], 1)
    truth = (2 * others).exp().sum(1).log1p() - 2 * others.exp().sum(1).log1p()
    torch.testing.assert_close(ours.cpu().double(), truth, rtol=1e-5, atol=0)


def test_top1_ties_go_to_the_first_entry(backend, device):
    weight = torch.zeros(4, 2, device=device)
    weight[1:3] = 1.0
    hidden = torch.ones(2, 2, device=device)
    labels = torch.tensor([1, 2], device=device)
    stats = prefkern.linear_logprobs(hidden, weight, labels, return_stats=True, backend=backend)
    assert stats.is_top1.tolist() == [True, False]


@pytest.mark.parametrize("head", ["frozen", "trained"])
@pytest.mark.long(backend="triton")
def test_the_structures_agree_bit_for_bit(head, backend, device):
    """A reference pass (forward only) gives the same numbers as the policy's pass."""
    case = make(300, 5.0)
    keywords = {"backend": backend, "workspace_mb": 0.02}
    logps, *_ = run(
        prefkern.linear_logprobs, case, torch.float32, device, trains=HEADS[head],
        grad=torch.ones(case["labels"].shape), **keywords,
    )  # fmt: skip
    with torch.no_grad():
        arguments = [case[name].to(device) for name in ("hidden", "weight", "labels", "bias")]
        alone = prefkern.linear_logprobs(*arguments, **keywords)
    plan = prefkern.last_plan()
    assert plan is not None and plan.structure == "forward"
    assert torch.equal(logps, alone)


@pytest.mark.parametrize("head", ["frozen", "trained"])
@pytest.mark.long(backend="triton")
def test_two_runs_are_bitwise_equal(head, backend, device):
    case = make(300, 5.0)
    grad = torch.randn(case["labels"].shape)
    first, second = (
        run(prefkern.linear_logprobs, case, torch.float32, device, trains=HEADS[head], grad=grad,
            backend=backend, workspace_mb=0.02)
        for _ in range(2)
    )  # fmt: skip
    for a, b in zip(first, second, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("trained", [False, True])
def test_backward_twice_accumulates_and_differentiating_it_raises(trained, backend, device):
    case = make(129, 5.0)
    hidden = case["hidden"].to(device, copy=True).requires_grad_()
    weight = case["weight"].to(device, copy=True).requires_grad_(trained)
    labels = case["labels"].to(device)
    loss = prefkern.linear_logprobs(hidden, weight, labels, backend=backend).sum()
    loss.backward(retain_graph=True)
    once = [hidden.grad.clone(), weight.grad.clone() if trained else None]
    loss.backward()
    torch.testing.assert_close(hidden.grad, 2 * once[0], rtol=1e-6, atol=1e-6)
    if trained:
        torch.testing.assert_close(weight.grad, 2 * once[1], rtol=1e-6, atol=1e-6)

    loss = prefkern.linear_logprobs(hidden, weight, labels, backend=backend).sum()
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        gradient.sum().backward()


@pytest.mark.parametrize("trained", [False, True])
def test_autocast(trained, backend, device):
    """float32 parameters under bf16 autocast: products of bf16 operands, float32 gradients."""
    case = make(300, 5.0)
    grad = torch.randn(case["labels"].shape)
    with torch.autocast(device, torch.bfloat16):
        hidden = case["hidden"].to(device, copy=True).requires_grad_()
        weight = case["weight"].to(device, copy=True).requires_grad_(trained)
        labels = case["labels"].to(device)
        logps = prefkern.linear_logprobs(hidden, weight, labels, backend=backend)
        with torch.no_grad():
            alone = prefkern.linear_logprobs(hidden, weight, labels, backend=backend)
    # A reference pass under autocast gives the policy's numbers: its tiles stay float32, too.
    assert torch.equal(alone, logps)
    logps.backward(grad.to(device))
    assert logps.dtype == torch.float32 and hidden.grad.dtype == torch.float32
    rounded = {
        name: value.bfloat16() if value.is_floating_point() else value
        for name, value in case.items()
    }
    truth = run(
        reference.linear_logprobs, rounded, torch.float64, device, has_bias=False, grad=grad
    )
    assert (logps.double() - truth[0]).abs().max() < 1e-4
    assert (logps.double() - truth[0]).abs().max() > 0
    # The gradients are float32, not rounded to bf16, though made of bf16 operands.
    is_raised = operands.operands_for(torch.bfloat16, device).of_gradients == torch.float32
    assert relative(hidden.grad, truth[1]) < (1e-5 if is_raised else 4e-3)
    if trained:
        assert relative(weight.grad, truth[2]) < (1e-5 if is_raised else 4e-3)


def test_autocast_takes_mixed_dtypes(backend, device):
    """A frozen bf16 head with float32 hidden states, as in LoRA under autocast."""
    case = make(129, 5.0)
    hidden = case["hidden"].to(device, copy=True).requires_grad_()
    weight = case["weight"].to(device).bfloat16()
    labels = case["labels"].to(device)
    with torch.autocast(device, torch.bfloat16):
        prefkern.linear_logprobs(hidden, weight, labels, backend=backend).sum().backward()
    assert hidden.grad.dtype == torch.float32 and hidden.grad.isfinite().all()


def test_views_and_shapes(backend, device):
    """Hidden states need not be contiguous; labels of any shape, none included."""
    case = make(129, 5.0)
    weight = case["weight"].to(device)
    hidden = case["hidden"].to(device)
    labels = case["labels"].to(device)
    expected = prefkern.linear_logprobs(hidden, weight, labels, backend=backend)
    strided = hidden.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    wide = torch.randn(129, 40, device=device)
    wide[:, 3:19] = weight
    for h, w in ((strided, weight), (hidden, wide[:, 3:19])):
        assert torch.equal(prefkern.linear_logprobs(h, w, labels, backend=backend), expected)
    one = prefkern.linear_logprobs(hidden[1, 2], weight, labels[1, 2], backend=backend)
    assert one.shape == () and math.isclose(one.item(), expected[1, 2].item(), rel_tol=1e-5)


@pytest.mark.parametrize("view", ["strided", "expanded"])
def test_labels_and_bias_may_be_views(view, backend, device):
    """A kernel reads memory element by element, but must not read past the end of a view."""
    hidden = torch.randn(6, 8)
    weight = torch.randn(30, 8)
    if view == "strided":
        labels, bias = torch.randint(30, (6, 2))[:, 0], torch.randn(60)[::2]
    else:
        labels, bias = torch.tensor([3]).expand(6), torch.tensor([0.7]).expand(30)
    assert not labels.is_contiguous() and not bias.is_contiguous()
    case = {"hidden": hidden, "weight": weight, "labels": labels, "bias": bias}
    leaves = {name: case[name].detach().requires_grad_() for name in ("hidden", "weight", "bias")}
    logps = prefkern.linear_logprobs(
        leaves["hidden"].to(device),
        leaves["weight"].to(device),
        labels.to(device),
        leaves["bias"].to(device),
        backend=backend,
        workspace_mb=SMALL,
    )
    gradients = torch.autograd.grad(logps.sum(), list(leaves.values()))
    grad = torch.ones(6)
    truth = run(reference.linear_logprobs, case, torch.float64, "cpu", grad=grad)
    torch.testing.assert_close(logps.cpu().double(), truth[0], rtol=1e-6, atol=2e-6)
    for mine, true in zip(gradients, truth[1:], strict=True):
        assert relative(mine, true) < 1e-5


@pytest.mark.parametrize("trained", [False, True])
def test_no_token_scored(trained, backend, device):
    """A differentiable zero."""
    hidden = torch.randn(2, 3, 8, device=device, requires_grad=True)
    weight = torch.randn(50, 8, device=device, requires_grad=trained)
    labels = torch.full((2, 3), -1, device=device)
    logps = prefkern.linear_logprobs(hidden, weight, labels, ignore_index=-1, backend=backend)
    assert torch.equal(logps, torch.zeros_like(logps))
    logps.sum().backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    if trained:
        assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_tokens_not_scored_are_never_read(backend, device):
    """NaN in a masked token's hidden state reaches neither value nor gradient."""
    case = make(129, 5.0)
    hidden = case["hidden"].clone()
    hidden[0, :3] = math.nan
    hidden = hidden.to(device).requires_grad_()
    weight = case["weight"].to(device, copy=True).requires_grad_()
    logps = prefkern.linear_logprobs(hidden, weight, case["labels"].to(device), backend=backend)
    logps.sum().backward()
    assert logps.isfinite().all() and hidden.grad.isfinite().all() and weight.grad.isfinite().all()
    assert torch.equal(hidden.grad[0, :3], torch.zeros_like(hidden.grad[0, :3]))


def test_ignore_index_may_be_a_word(backend, device):
    case = make(129, 5.0)
    hidden, weight = case["hidden"].to(device), case["weight"].to(device)
    labels = case["labels"].clamp(min=0).to(device)
    masked = prefkern.linear_logprobs(hidden, weight, labels, ignore_index=0, backend=backend)
    assert (masked[labels == 0] == 0).all() and (masked[labels != 0] < 0).all()
