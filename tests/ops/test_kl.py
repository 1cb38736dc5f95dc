"""Log-probs and divergence from a reference, against the float64 oracle, on both backends."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import prefkern
from prefkern import reference
from prefkern.ops import call, fold_state, operands, plan, sequences, torch_tiles
from prefkern.ops.kl import linear_kl
from prefkern_bench.measure import Meter
from support.logprobs import CASES, HEADS, SMALL, TRANSFORM, relative
from support.wide_products import products_as_on_a_gpu
from support.windows import assert_guard_kept, guarded

POLICY = ("hidden", "weight", "bias")
REFERENCE = ("ref_hidden", "ref_weight", "ref_bias")
# d loss / d logp and d loss / d kl.
LOSSES = {"kl": (0.0, 1.0), "both": (1.0, -2.0)}


def make(
    V: int, spread: float, N: int = 21, H: int = 16, H_ref: int = 12, distance: float = 1.0
) -> dict[str, torch.Tensor]:
    """Two heads of two widths; with `distance` below 1, the reference is the policy, moved."""
    hidden = torch.randn(3, N // 3, H) * spread / H**0.5
    ref_hidden = torch.randn(3, N // 3, H_ref) * spread / H_ref**0.5
    weight, ref_weight = torch.randn(V, H), torch.randn(V, H_ref)
    bias, ref_bias = torch.randn(V), torch.randn(V)
    if distance < 1:
        ref_hidden = hidden + distance * spread / H**0.5 * torch.randn_like(hidden)
        ref_weight, ref_bias = weight.clone(), bias.clone()
    labels = torch.randint(V, (3, N // 3))
    labels[0, :3] = -100
    # The policy, and then the reference, is confident of a third of the labels.
    labels[1] = (hidden[1] @ weight.T).argmax(-1)
    labels[2] = (ref_hidden[2] @ ref_weight.T).argmax(-1)
    values = (hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
    return {**dict(zip((*POLICY, *REFERENCE), values, strict=True)), "labels": labels}


def run(function, case, dtype, device, *, trains=(True, True), has_bias=True, loss, **options):
    """Values, and the gradients of the policy's hidden, weight and bias (None: it has none).

    `loss` weighs the log-probs and the divergences, each times a fixed number of its token's.
    """
    leaves = {
        name: case[name].to(device=device, dtype=dtype, copy=True) for name in (*POLICY, *REFERENCE)
    }
    for name, needs in zip(POLICY, (True, *trains), strict=True):
        leaves[name].requires_grad_(needs)
    if not has_bias:
        leaves["bias"] = leaves["ref_bias"] = None
    out = function(labels=case["labels"].to(device), **leaves, **options)
    token = torch.arange(case["labels"].numel(), dtype=out.kl.dtype, device=device)
    token = token.view(case["labels"].shape).cos()
    (token * (loss[0] * out.logps + loss[1] * out.kl)).sum().backward()
    gradients = (leaves[name].grad if leaves[name] is not None else None for name in POLICY)
    return *(value.detach() for value in out), *gradients


def test_the_oracle_is_torch_kl_div():
    case = {
        name: value.double() if value.is_floating_point() else value
        for name, value in make(11, 3.0, N=6, H=4, H_ref=3).items()
    }
    out = reference.linear_kl(**case, **TRANSFORM)
    log_p, log_r = (
        reference.logits(*(case[name] for name in names), **TRANSFORM).log_softmax(-1)
        for names in (POLICY, REFERENCE)
    )
    expected = torch.nn.functional.kl_div(log_p, log_r, reduction="none", log_target=True).sum(-1)
    expected[case["labels"] < 0] = 0
    torch.testing.assert_close(out.kl, expected, rtol=1e-12, atol=1e-14)
    policy = reference.linear_logprobs(
        case["hidden"], case["weight"], case["labels"], case["bias"], **TRANSFORM
    )
    ref = reference.linear_logprobs(
        case["ref_hidden"], case["ref_weight"], case["labels"], case["ref_bias"], **TRANSFORM
    )
    assert torch.equal(out.logps, policy) and torch.equal(out.ref_logps, ref)
    leaves = [case[name].requires_grad_() for name in POLICY]
    rest = [case[name] for name in REFERENCE]

    def values(hidden, weight, bias):
        ref_hidden, ref_weight, ref_bias = rest
        out = reference.linear_kl(
            hidden, weight, case["labels"], ref_hidden, ref_weight, bias, ref_bias, **TRANSFORM
        )
        return out.logps, out.kl

    assert torch.autograd.gradcheck(values, leaves)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.long(backend="triton", name=["temperature", "scale", "softcap"])
@pytest.mark.long(backend="triton", head="bias only")
@pytest.mark.long(backend="triton", loss="both")
@pytest.mark.long(backend="triton", name=["one entry", "two entries", "127 entries"])
def test_float32_against_float64(name, head, loss, backend, device):
    V, spread, options, has_bias = CASES[name]
    case = make(V, spread)
    keywords = dict(trains=HEADS[head], has_bias=has_bias, loss=LOSSES[loss], **options)
    ours = run(
        linear_kl, case, torch.float32, device, backend=backend, workspace_mb=SMALL, **keywords
    )
    plan = prefkern.last_plan()
    assert plan is not None and plan.backend == backend and plan.ref_hidden_size == 12
    trains = HEADS[head][0] or (HEADS[head][1] and has_bias)
    assert plan.structure == ("two_pass" if trains else "one_pass")
    truth = run(reference.linear_kl, case, torch.float64, device, **keywords)
    # The error of a float32 logit is of the order of 1e-7 times its size.
    size = max(spread, 5)
    for mine, true in zip(ours[:3], truth[:3], strict=True):
        assert mine.dtype == torch.float32 and (mine[0, :3] == 0).all()
        torch.testing.assert_close(mine.double(), true, rtol=1e-6, atol=2e-7 * size)
    assert (ours[2] >= 0).all() and (ours[3][0, :3] == 0).all()
    for mine, true in zip(ours[3:], truth[3:], strict=True):
        assert (mine is None) == (true is None)
        if true is not None:
            # One entry has no gradient at all: then every element is 0 in both.
            assert relative(mine, true) <= (0 if V == 1 else 1e-6 * size)


@pytest.mark.parametrize("head", ["frozen", "trained"])
@pytest.mark.parametrize("V", [129, 300])
@pytest.mark.long(backend="triton", head="frozen")
@pytest.mark.long(backend="triton", V=129)
def test_tiles_both_ways(V, head, backend, device):
    """The smallest tiles against one tile of everything."""
    case = make(V, 5.0)
    results = []
    for workspace_mb in (1e-6, 64):
        results.append(
            run(
                linear_kl, case, torch.float32, device, backend=backend, loss=LOSSES["both"],
                workspace_mb=workspace_mb, trains=HEADS[head],
            )
        )  # fmt: skip
        plan = prefkern.last_plan()
        tiles = plan.backward_tiles or plan.forward_tiles
        sizes = plan.forward_tiles.token_tile, tiles.token_tile, tiles.vocab_tile
        assert sizes == ((16, 16, 128) if workspace_mb < 1 else (18, 18, V))
    for few, many in zip(*results, strict=True):
        if few is not None:
            assert relative(few, many.double()) < 2e-6


@pytest.mark.parametrize("distance", [1e-3, 1e-2, 0.1])
@pytest.mark.long(backend="triton", distance=[1e-2, 0.1])
def test_near_the_reference(distance, backend, device):
    """The divergence is of second order in the models' distance; its error must be as small."""
    case = make(1000, 5.0, distance=distance)
    keywords = {"loss": LOSSES["kl"], "trains": HEADS["frozen"]}
    ours = run(
        linear_kl, case, torch.float32, device, backend=backend, workspace_mb=0.1, **keywords
    )
    truth = run(reference.linear_kl, case, torch.float64, device, **keywords)
    assert (ours[2].double() - truth[2]).abs().max() < 2e-6
    # A float32 logit's own error, 1e-7 of it, beside the distance.
    assert relative(ours[3], truth[3]) < 5e-6 / distance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("V", "options"), [(127, {}), (129, TRANSFORM), (1000, {"softcap": 9.0})])
@pytest.mark.long(backend="triton", dtype=torch.bfloat16)
@pytest.mark.long(backend="triton", V=[127, 1000])
def test_equal_models_have_no_divergence(V, options, head, dtype, backend, device):
    """Exactly 0, and its gradient too: policy and reference run through the same operations."""
    case = make(V, 8.0, distance=0.0)
    ours = run(
        linear_kl, case, dtype, device, backend=backend, workspace_mb=0.1, loss=LOSSES["kl"],
        trains=HEADS[head], **options,
    )  # fmt: skip
    assert torch.equal(ours[0], ours[1])
    for zero in (ours[2], *ours[3:]):
        assert zero is None or torch.equal(zero, torch.zeros_like(zero))


def test_all_logits_far_below_zero(backend, device):
    """If the tail past V were read as 0, it would outweigh every real logit."""
    case = make(127, 1.0)
    case["bias"] -= 500
    case["ref_bias"] -= 300
    ours = run(
        linear_kl, case, torch.float32, device, backend=backend, workspace_mb=SMALL,
        loss=LOSSES["both"],
    )  # fmt: skip
    truth = run(reference.linear_kl, case, torch.float64, device, loss=LOSSES["both"])
    for mine, true in zip(ours[:3], truth[:3], strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=0, atol=3e-4)
    for mine, true in zip(ours[3:], truth[3:], strict=True):
        assert relative(mine, true) < 3e-4


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_entries_that_neither_model_can_produce(head, backend, device):
    """A vocabulary padded with biases of -inf is the vocabulary without them."""
    case = make(129, 3.0)
    case["labels"] %= 120
    options = {"trains": HEADS[head], "loss": LOSSES["both"]}
    padded = dict(case)
    for name in ("bias", "ref_bias"):
        padded[name] = case[name].clone()
        padded[name][120:] = -math.inf
    cut = {name: value[:120] if value.shape[0] == 129 else value for name, value in padded.items()}
    ours = run(
        linear_kl, padded, torch.float32, device, backend=backend, workspace_mb=SMALL, **options
    )
    truth = run(reference.linear_kl, cut, torch.float64, device, **options)
    for mine, true in zip(ours[:4], truth[:4], strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-4, atol=1e-4)
    assert all(value.isfinite().all() for value in ours if value is not None)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("who", ["policy", "reference", "both"])
@pytest.mark.parametrize("head", ["frozen", "trained"])
@pytest.mark.long(backend="triton", who=["policy", "reference"])
def test_a_label_that_is_ruled_out(head, who, backend, device):
    """The divergence does not depend on the label, which one model may rule out."""
    case = make(129, 3.0)
    case["labels"][case["labels"] >= 0] = 5
    if who != "reference":
        case["bias"][5] = -math.inf
    if who != "policy":
        case["ref_bias"][5] = -math.inf
    options = {"trains": HEADS[head], "loss": (0.0, 1.0)}
    ours = run(
        linear_kl, case, torch.float32, device, backend=backend, workspace_mb=SMALL, **options
    )
    other = {**case, "labels": torch.where(case["labels"] >= 0, 6, case["labels"])}
    truth = run(reference.linear_kl, other, torch.float64, device, **options)
    scored = case["labels"].to(device) >= 0
    if who == "policy":  # what the reference may say, and the policy cannot
        assert (ours[2][scored] == math.inf).all() and (truth[2][scored] == math.inf).all()
        return
    # The divergence and its gradients.
    for mine, true in zip(ours[2:], truth[2:], strict=True):
        if mine is not None:
            torch.testing.assert_close(mine.double(), true, rtol=1e-4, atol=1e-4)


# The entry that each model is confident of (None: of none), and the label.
CONFIDENCE = {
    "both, of the label": (7, 7, 7),
    "both, of another entry": (9, 9, 7),
    "policy": (7, None, 7),
    "reference": (None, 7, 7),
    "of two entries": (7, 130, 7),
}


@pytest.mark.parametrize("height", [12.0, 50.0])
@pytest.mark.parametrize("name", CONFIDENCE)
@pytest.mark.parametrize("head", ["frozen", "trained"])
def test_confident_tokens(head, name, height, backend, device):
    """One logit far above the rest: values to float32 accuracy, and no NaN."""
    policy_entry, ref_entry, label = CONFIDENCE[name]
    case = make(200, 1.0, N=3)
    case["labels"] = torch.full((3, 1), label)
    for bias, entry in ((case["bias"], policy_entry), (case["ref_bias"], ref_entry)):
        if entry is not None:
            bias[entry] += height
    keywords = {"trains": HEADS[head], "loss": LOSSES["both"]}
    ours = run(
        linear_kl, case, torch.float32, device, backend=backend, workspace_mb=SMALL, **keywords
    )
    truth = run(reference.linear_kl, case, torch.float64, device, **keywords)
    for mine, true in zip(ours[:3], truth[:3], strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=3e-6, atol=1e-5)
    for mine, true in zip(ours[3:], truth[3:], strict=True):
        # Where float64's own 1 - p cancels it is no oracle: every element is then below 1e-15.
        assert true is None or (mine.double() - true).norm() <= 2e-5 * true.norm() + 1e-13


def test_divergence_of_confident_models_keeps_its_relative_precision(backend, device):
    """If both models are almost certain of the label, kl is as small as the rest."""
    hidden, ref_hidden = (
        torch.tensor([[12.0], [20.0], [30.0]]),
        torch.tensor([[11.0], [22.0], [29]]),
    )
    weight = torch.linspace(-0.1, 0.0, 127).unsqueeze(1)
    weight[7] = 1.0
    labels = torch.full((3,), 7)
    leaf = hidden.to(device, copy=True).requires_grad_()
    out = linear_kl(
        leaf, weight.to(device), labels.to(device), ref_hidden.to(device), weight.to(device),
        backend=backend,
    )  # fmt: skip
    out.kl.sum().backward()
    # kl = sum_{v != y} r_v (d_v - d_y) + log r_y - log p_y,  d = x - z
    away = torch.cat([weight[:7], weight[8:]]).double().T - weight[7].double()
    others, ref_others = (h.double() * away for h in (hidden, ref_hidden))
    log_p, log_r = (-x.exp().sum(1).log1p() for x in (others, ref_others))
    r = (ref_others + log_r.unsqueeze(1)).exp()
    p = (others + log_p.unsqueeze(1)).exp()
    truth = (r * (ref_others - others)).sum(1) + log_r - log_p
    torch.testing.assert_close(out.kl.cpu().double(), truth, rtol=1e-4, atol=0)
    # d kl / dh = sum_v (p_v - r_v) W_v, in which the label's p_y - r_y is minus the others' sum.
    slope = ((p - r) * away).sum(1, keepdim=True)
    torch.testing.assert_close(leaf.grad.cpu().double(), slope, rtol=1e-4, atol=0)


@pytest.mark.parametrize("head", ["frozen", "trained"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("distance", [0.1, 1.0])
@pytest.mark.long(backend="triton")
def test_half_precision_is_no_worse_than_eager(distance, dtype, head, backend, device):
    """Three ways: float64 on the rounded inputs, eager in the same dtype, and ours."""
    case = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in make(1000, 6.0, N=30, H=64, H_ref=48, distance=distance).items()
    }
    for loss in LOSSES.values():
        keywords = {"trains": HEADS[head], "loss": loss}
        ours = run(linear_kl, case, dtype, device, backend=backend, workspace_mb=0.2, **keywords)
        eager = run(reference.linear_kl, case, dtype, device, **keywords)
        truth = run(reference.linear_kl, case, torch.float64, device, **keywords)
        for mine, theirs, true in zip(ours[:3], eager[:3], truth[:3], strict=True):
            assert (mine.double() - true).abs().max() < 5e-5
            assert (theirs.double() - true).abs().max() > 2e-4, "the case is too easy"
        for mine, theirs, true in zip(ours[3:], eager[3:], truth[3:], strict=True):
            if true is not None:
                assert mine.dtype == dtype
                assert relative(mine, true) <= 1.02 * relative(theirs, true)


def test_gradients_by_finite_differences(backend, device):
    """Without an oracle: central differences of the operator's own values."""
    case = make(40, 3.0, N=6, H=8)
    _, _, _, *gradients = run(
        linear_kl, case, torch.float32, device, backend=backend, loss=LOSSES["both"], **TRANSFORM
    )
    step = 1e-2
    for name, gradient in zip(POLICY, gradients, strict=True):
        direction = torch.randn(case[name].shape)
        values = []
        for sign in (1, -1):
            moved = {**case, name: case[name] + sign * step * direction}
            logps, _, kl_, *_ = run(
                linear_kl, moved, torch.float32, device, backend=backend, loss=LOSSES["both"],
                **TRANSFORM,
            )  # fmt: skip
            token = torch.arange(6.0).view(3, 2).cos()
            values.append((token * (logps - 2 * kl_).cpu()).double().sum())
        slope = (values[0] - values[1]) / (2 * step)
        expected = (gradient.cpu().double() * direction).sum()
        torch.testing.assert_close(slope, expected, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("head", ["frozen", "trained"])
@pytest.mark.long(backend="triton")
def test_two_runs_and_all_structures_agree_bit_for_bit(head, backend, device):
    case = make(300, 5.0)
    keywords = {"backend": backend, "workspace_mb": 0.02}
    first, second = (
        run(linear_kl, case, torch.float32, device, trains=HEADS[head], loss=LOSSES["both"],
            **keywords)
        for _ in range(2)
    )  # fmt: skip
    for a, b in zip(first, second, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    arguments = {name: value.to(device) for name, value in case.items()}
    arguments["hidden"].requires_grad_()
    with torch.no_grad():
        alone = linear_kl(**arguments, **keywords)
    plan = prefkern.last_plan()
    assert plan is not None and plan.structure == "forward"
    assert all(torch.equal(a, b) for a, b in zip(alone, first[:3], strict=True))


@pytest.mark.parametrize("trained", [False, True])
def test_backward_twice_accumulates_and_differentiating_it_raises(trained, backend, device):
    case = {name: value.to(device) for name, value in make(129, 5.0).items()}
    leaves = [case["hidden"].requires_grad_(), case["weight"].requires_grad_(trained)]
    out = linear_kl(**case, backend=backend)
    loss = out.logps.sum() + out.kl.sum()
    loss.backward(retain_graph=True)
    once = [None if leaf.grad is None else leaf.grad.clone() for leaf in leaves]
    loss.backward()
    for leaf, value in zip(leaves, once, strict=True):
        assert (value is None) == (leaf.grad is None)
        if value is not None:
            torch.testing.assert_close(leaf.grad, 2 * value, rtol=1e-6, atol=1e-6)

    out = linear_kl(**case, backend=backend)
    (gradient,) = torch.autograd.grad(out.kl.sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        gradient.sum().backward()


@pytest.mark.parametrize("head", ["frozen", "trained"])
@pytest.mark.parametrize("name", ["logps", "kl"])
@pytest.mark.long(backend="triton")
def test_the_gradient_of_one_output_alone(name, head, backend, device):
    """The other output has no gradient at all, and adds nothing."""
    case = make(129, 3.0)
    arguments = {name: value.to(device, copy=True) for name, value in case.items()}
    trains = (True, *HEADS[head])
    leaves = [arguments[n].requires_grad_() for n, is_ in zip(POLICY, trains, strict=True) if is_]
    out = linear_kl(**arguments, backend=backend, workspace_mb=SMALL)
    token = torch.arange(21.0, device=device).view(3, 7).cos()
    gradients = torch.autograd.grad((token * getattr(out, name)).sum(), leaves)
    loss = (float(name == "logps"), float(name == "kl"))
    truth = run(reference.linear_kl, case, torch.float64, device, trains=HEADS[head], loss=loss)
    for mine, true in zip(gradients, truth[3:], strict=False):
        assert relative(mine, true) < 5e-6


@pytest.mark.parametrize("trained", [False, True])
def test_nothing_of_the_reference_has_a_gradient(trained, backend, device):
    """Even if its tensors require one, or if both models share a tied head."""
    case = {name: value.to(device) for name, value in make(129, 5.0, distance=0.1).items()}
    case["ref_weight"] = case["weight"].requires_grad_(trained)
    for name in ("hidden", "ref_hidden", "ref_bias"):
        case[name].requires_grad_()
    out = linear_kl(**case, backend=backend)
    assert out.logps.requires_grad and out.kl.requires_grad and not out.ref_logps.requires_grad
    out.kl.sum().backward()
    assert case["ref_hidden"].grad is None and case["ref_bias"].grad is None
    with torch.no_grad():
        assert not linear_kl(**case, backend=backend).kl.requires_grad
    if trained:
        leaf = case["weight"].detach().double().requires_grad_()
        doubles = {n: v.detach().double() if v.is_floating_point() else v for n, v in case.items()}
        doubles["weight"], doubles["ref_weight"] = leaf, leaf.detach()
        reference.linear_kl(**doubles).kl.sum().backward()
        assert relative(case["weight"].grad, leaf.grad) < 5e-5


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.long(backend="triton")
def test_autocast(trained, backend, device):
    """float32 parameters under bf16 autocast: products of bf16 operands, float32 gradients.

    The reference's parameters are bf16 already, which autocast allows side by side.
    """
    case = make(300, 5.0)
    arguments = {name: value.to(device, copy=True) for name, value in case.items()}
    for name in REFERENCE:
        arguments[name] = arguments[name].bfloat16()
    arguments["hidden"].requires_grad_()
    arguments["weight"].requires_grad_(trained)
    del arguments["bias"], arguments["ref_bias"]
    with torch.autocast(device, torch.bfloat16):
        out = linear_kl(**arguments, backend=backend, workspace_mb=0.02)
        with torch.no_grad():
            alone = linear_kl(**arguments, backend=backend, workspace_mb=0.02)
    assert all(torch.equal(a, b) for a, b in zip(alone, out, strict=True))
    token = torch.arange(21.0, device=device).view(3, 7).cos()
    (token * (out.logps - 2 * out.kl)).sum().backward()
    rounded = {
        name: value.bfloat16() if value.is_floating_point() else value
        for name, value in case.items()
    }
    truth = run(
        reference.linear_kl, rounded, torch.float64, device, has_bias=False, loss=LOSSES["both"]
    )
    for mine, true in zip(out, truth[:3], strict=True):
        assert mine.dtype == torch.float32
        assert (mine.detach().double() - true).abs().max() < 1e-4
    # The gradients are float32, not rounded to bf16, though made of bf16 operands.
    for name, true in zip(
        ("hidden", "weight") if trained else ("hidden",), truth[3:], strict=False
    ):
        gradient = arguments[name].grad
        assert gradient.dtype == torch.float32
        is_raised = operands.operands_for(torch.bfloat16, device).of_gradients == torch.float32
        assert relative(gradient, true) < (1e-5 if is_raised else 4e-3)


def test_models_of_two_dtypes(backend, device):
    """A bf16 policy beside a float32 reference, each multiplied in its own."""
    case = {name: value.to(device) for name, value in make(129, 5.0).items()}
    mixed = {n: v.bfloat16() if n in POLICY else v for n, v in case.items()}
    out = linear_kl(**mixed, backend=backend, workspace_mb=SMALL)
    doubles = {n: v.double() if v.is_floating_point() else v for n, v in mixed.items()}
    for mine, true in zip(out, reference.linear_kl(**doubles), strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-6, atol=5e-6)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.long(backend="triton")
def test_views_and_shapes(trained, backend, device):
    """Strided hidden states, labels, heads and biases: right, with right gradients."""
    case = make(129, 5.0)
    views = {
        "hidden": case["hidden"].transpose(0, 1).contiguous().transpose(0, 1),
        "ref_hidden": case["ref_hidden"].transpose(0, 1).contiguous().transpose(0, 1),
        "weight": torch.cat([case["weight"], case["weight"]], 1)[:, :16],
        "ref_weight": torch.cat([case["ref_weight"], case["ref_weight"]], 1)[:, :12],
        "bias": case["bias"].repeat_interleave(2)[::2],
        "ref_bias": torch.tensor([0.7]).expand(129),
        "labels": case["labels"].T.contiguous().T,
    }
    case["ref_bias"] = torch.full((129,), 0.7)
    assert not any(view.is_contiguous() for view in views.values())
    leaves = {name: views[name].detach().requires_grad_(trained) for name in POLICY}
    leaves["hidden"].requires_grad_()
    on_device = {name: leaves.get(name, view).to(device) for name, view in views.items()}
    out = linear_kl(**on_device, backend=backend, workspace_mb=SMALL)
    token = torch.arange(21.0, device=device).view(3, 7).cos()
    (token * (out.logps - 2 * out.kl)).sum().backward()
    truth = run(reference.linear_kl, case, torch.float64, "cpu", loss=LOSSES["both"])
    for mine, true in zip(out, truth[:3], strict=True):
        torch.testing.assert_close(mine.detach().cpu().double(), true, rtol=1e-6, atol=2e-6)
    for leaf, true in zip(leaves.values(), truth[3:], strict=True):
        assert leaf.grad is None or relative(leaf.grad, true) < 1e-5

    flat = {
        name: on_device[name].detach().flatten(0, 1) for name in ("hidden", "ref_hidden", "labels")
    }
    with torch.no_grad():
        again = linear_kl(**{**on_device, **flat}, backend=backend, workspace_mb=SMALL)
    assert again.kl.shape == (21,) and torch.equal(again.kl.view(3, 7), out.kl)


@pytest.mark.parametrize("trained", [False, True])
def test_no_token_scored(trained, backend, device):
    """A differentiable zero."""
    case = {name: value.to(device) for name, value in make(50, 5.0).items()}
    case["hidden"].requires_grad_()
    case["weight"].requires_grad_(trained)
    case["labels"].fill_(-1)
    out = linear_kl(**case, ignore_index=-1, backend=backend)
    assert all(torch.equal(value, torch.zeros_like(value)) for value in out)
    (out.logps.sum() + out.kl.sum()).backward()
    assert torch.equal(case["hidden"].grad, torch.zeros_like(case["hidden"]))
    if trained:
        assert torch.equal(case["weight"].grad, torch.zeros_like(case["weight"]))


def test_tokens_not_scored_are_never_read(backend, device):
    """NaN in a masked token's hidden states reaches neither value nor gradient."""
    case = {name: value.to(device) for name, value in make(129, 5.0).items()}
    case["hidden"][0, :3] = math.nan
    case["ref_hidden"][0, :3] = math.nan
    case["hidden"].requires_grad_()
    case["weight"].requires_grad_()
    out = linear_kl(**case, backend=backend)
    out.kl.sum().backward()
    for value in (*out, case["hidden"].grad, case["weight"].grad):
        assert value.isfinite().all()
    assert torch.equal(case["hidden"].grad[0, :3], torch.zeros_like(case["hidden"][0, :3]))


def test_run_gives_scored_tokens_and_the_plan(backend, device):
    """The call that the loss makes: checked arguments in, (N,) values out."""
    case = {name: value.to(device) for name, value in make(129, 5.0).items()}
    labels = case.pop("labels")
    scored = sequences.select(labels.reshape(-1), -100, 129)
    arguments = [case[name] for name in (*POLICY, *REFERENCE)]
    policy, ref = operands.Head.of(*arguments[:3]), operands.Head.of(*arguments[3:])
    given = (scored, operands.Transform(), SMALL, backend)
    result, made = call.run(policy, *given, reference=ref, with_divergence=True)
    assert made is prefkern.last_plan() and made.tokens == 18
    whole = linear_kl(**case, labels=labels, backend=backend, workspace_mb=SMALL)
    parts = (result.logps, result.ref_logps, result.kl)
    for part, all_tokens in zip(parts, whole, strict=True):
        assert torch.equal(part, all_tokens[labels != -100])
    alone, _ = call.run(policy, *given)
    torch.testing.assert_close(result.logps, alone.logps, rtol=1e-6, atol=2e-6)


N, H, H_REF, V = 512, 64, 32, 8192


def problem(trained: bool, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    return {
        "hidden": random(N, H).requires_grad_(),
        "weight": random(V, H).requires_grad_(trained),
        "labels": torch.randint(V, (N,), device=device),
        "ref_hidden": random(N, H_REF),
        "ref_weight": random(V, H_REF),
    }


@pytest.mark.parametrize("workspace_mb", [0.5, 4, 24, 64])
@pytest.mark.parametrize(
    # Products of the policy's head and of the reference's, 2NHV and 2N H_ref V each, where nothing
    # is kept; a kept token saves one of each.
    ("case", "products", "ref_products"),
    [("forward", 1, 1), ("frozen", 3, 1), ("trained", 4, 2), ("head only", 3, 2)],
)
def test_operations(case, products, ref_products, workspace_mb, device):
    arguments = problem(case in ("trained", "head only"), torch.float32, device)
    if case in ("forward", "head only"):
        arguments["hidden"] = arguments["hidden"].detach()
    with Meter() as meter:
        out = linear_kl(**arguments, workspace_mb=workspace_mb, backend="torch")
        if case != "forward":
            (out.logps.sum() + out.kl.sum()).backward()
    made = prefkern.last_plan()
    assert made is not None
    # 64 MiB hold both models' probabilities of all tokens in float32, 24 MiB those of some.
    trains_head = case in ("trained", "head only")
    kept = {0.5: 0, 4: 0, 24: N // 4, 64: N}[workspace_mb] if trains_head else 0
    assert made.kept_tokens == kept
    # The Meter counts what the products' shapes say; the plan says what it meant to do.
    whole = 2 * N * V * (products * H + ref_products * H_REF)
    assert meter.operations == whole - 2 * kept * V * (H + H_REF)
    assert made.operations == meter.operations


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("workspace_mb", [1, 4])
@pytest.mark.long(softcap=20.0, dtype=torch.bfloat16)
@pytest.mark.long(softcap=None, dtype=torch.float32)
def test_temporary_memory_stays_within_the_workspace(workspace_mb, dtype, trained, softcap, device):
    arguments = problem(trained, dtype, device)
    arguments["labels"][::3] = -100
    scored = int((arguments["labels"] != -100).sum())
    with Meter() as meter:
        out = linear_kl(**arguments, workspace_mb=workspace_mb, backend="torch", softcap=softcap)
        (out.logps.sum() + out.kl.sum()).backward()
    # Beyond the workspace: the gradients, D and K or dH in float32, and some numbers a token.
    allowed = arguments["hidden"].grad.nbytes + (4 if trained else 8) * scored * H + 400 * N
    allowed += arguments["weight"].grad.nbytes if trained else 0
    assert meter.peak_bytes <= 1.05 * (workspace_mb * 2**20) + allowed
    if workspace_mb == 64:
        # Both models' probabilities of all tokens, in float32 on a CPU, are beside one tile.
        assert prefkern.last_plan().kept_tokens == (scored if trained else 0)
    else:
        # The logits in float32 alone would be this, so that the bound means something.
        assert 1.05 * (workspace_mb * 2**20) + allowed < 2 * N * V * 4


KEPT_BOUNDS = {torch.float32: 5e-6, torch.bfloat16: 8e-3, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", KEPT_BOUNDS)
@pytest.mark.parametrize("transform", [{}, TRANSFORM])
@pytest.mark.parametrize("kept", [0, 8, 18])
@pytest.mark.long(backend="triton", dtype=[torch.bfloat16, torch.float16])
@pytest.mark.long(backend="triton", kept=0)
@pytest.mark.long(backend="triton", transform={})
def test_kept_probabilities_of_both_models(kept, transform, dtype, backend, device, monkeypatch):
    """All tokens', some tokens' and none: the gradients of a trained head and of hidden."""
    products_as_on_a_gpu(monkeypatch, device)
    tiles = plan.Tiles(8, 128, 0, 0.0), plan.Tiles(11, 114, 0, 0.0)
    monkeypatch.setattr(plan, "_cheapest", lambda *_: (kept, *tiles))
    # What the dtype holds: compared is the pass, not the rounding of its inputs.
    case = {
        name: value.to(dtype).float() if value.is_floating_point() else value
        for name, value in make(300, 3.0).items()
    }
    keywords = {"trains": HEADS["trained"], "loss": LOSSES["both"], **transform}
    ours = run(linear_kl, case, dtype, device, backend=backend, **keywords)
    made = prefkern.last_plan()
    assert (made.kept_tokens, made.tokens, made.has_divergence) == (kept, 18, True)
    assert made.structure == ("one_pass" if kept == 18 else "two_pass")
    truth = run(reference.linear_kl, case, torch.float64, device, **keywords)
    for mine, true in zip(ours[3:], truth[3:], strict=True):
        assert mine.dtype == dtype and relative(mine, true) < KEPT_BOUNDS[dtype]


ADAPTED = {
    "adapter": ("hidden", "lora_hidden", "lora_weight"),
    "adapter alone": ("lora_hidden", "lora_weight"),
    "A alone": ("lora_hidden",),
    "all": ("hidden", "lora_hidden", "lora_weight", "weight", "bias"),
}


@pytest.mark.parametrize("trained", ADAPTED)
@pytest.mark.parametrize("kept", [0, 24, 57])
@pytest.mark.long(backend="triton", kept=[0, 57])
@pytest.mark.long(backend="triton", trained=["adapter alone", "A alone"])
def test_an_adapter_on_the_head(kept, trained, backend, device, monkeypatch):
    """LoRA on the policy's head beside a reference without it, against float64."""
    tiles = plan.Tiles(11, 256, 0, 0.0), plan.Tiles(16, 300, 0, 0.0)
    monkeypatch.setattr(plan, "_cheapest", lambda *_: (kept, *tiles))
    case = make(700, 3.0, N=60)
    case |= {"lora_hidden": torch.randn(3, 20, 5), "lora_weight": torch.randn(700, 5)}
    names = ADAPTED[trained]
    grads = torch.randn(2, 3, 20)

    def run_with(function, dtype):
        leaves = {
            name: value.to(device, dtype if value.is_floating_point() else value.dtype)
            for name, value in case.items()
        }
        leaves = {n: v.detach().clone().requires_grad_(n in names) for n, v in leaves.items()}
        out = function(**leaves)
        g, k = grads.to(device, dtype)
        (g * out.logps + k * out.kl).sum().backward()
        return [x.detach() for x in out], {name: leaves[name].grad for name in names}

    def ours(**leaves):
        return linear_kl(**leaves, backend=backend, workspace_mb=0.05)

    values, gradients = run_with(ours, torch.float32)
    made = prefkern.last_plan()
    assert (made.rank, made.has_divergence, made.backend) == (5, True, backend)
    # Trained B alone keeps and recomputes as a trained head does.
    assert made.trains_head == ("lora_weight" in names)
    assert (made.kept_tokens, made.tokens) == (kept if made.trains_head else 0, 57)
    truths, wanted = run_with(reference.linear_kl, torch.float64)
    for mine, true in zip(values, truths, strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-6, atol=3e-6)
    for name in names:
        assert relative(gradients[name], wanted[name]) < 5e-6, name


@pytest.mark.parametrize("trained", [False, True])
def test_what_is_saved_is_unpacked_once(trained):
    """Checkpointing without reentry allows no second look, and offloading fetches nothing twice."""
    case = make(129, 5.0)
    hidden, weight = case.pop("hidden").requires_grad_(), case.pop("weight").requires_grad_(trained)
    leaves = [hidden, weight] if trained else [hidden]

    def loss(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = linear_kl(hidden, weight, **case, backend="torch")
        return out.logps.sum() + out.kl.sum()

    expected = torch.autograd.grad(loss(hidden, weight), leaves)
    again = checkpoint(loss, hidden, weight, use_reentrant=False)
    for mine, true in zip(torch.autograd.grad(again, leaves), expected, strict=True):
        assert torch.equal(mine, true)


WRONG = {
    "ref_weight": (lambda case: case["ref_weight"][:-1], ValueError, "ref_weight has 49 vocab"),
    "ref_hidden": (
        lambda case: case["ref_hidden"][:2],
        ValueError,
        "ref_hidden must have hidden's",
    ),
    "ref_bias": (lambda case: case["ref_bias"][:-1], ValueError, "ref_bias must have shape"),
    "weight": (lambda case: case["weight"].double(), TypeError, "weight torch.float64;.*one dtype"),
    "labels": (lambda case: case["labels"] + 50, ValueError, r"labels must be in \[0, 50\)"),
    "temperature": (lambda case: 0.0, ValueError, "temperature must be > 0"),
    "backend": (lambda case: "cuda", ValueError, "backend must be"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_name_the_argument(name, device):
    case = {key: value.to(device) for key, value in make(50, 1.0).items()}
    change, error, message = WRONG[name]
    changed = {**case, name: change(case)}
    if name == "ref_weight":
        del changed["ref_bias"]
    with pytest.raises(error, match=message):
        linear_kl(**changed)
    case["ref_hidden"] = case["ref_hidden"].tolist()
    with pytest.raises(TypeError, match="ref_hidden must be a tensor"):
        linear_kl(**case)


class TestKernels:
    """Each kernel against its twin in torch, on windows of guarded memory, and that it ran."""

    kernels = None

    @pytest.fixture(autouse=True)
    def _kernels(self):
        self.kernels = pytest.importorskip("prefkern_kernels")

    @pytest.mark.parametrize("trained", [False, True])
    def test_launches(self, trained, device):
        case = {name: value.to(device) for name, value in make(300, 5.0).items()}
        case["hidden"].requires_grad_()
        case["weight"].requires_grad_(trained)
        self.kernels.launches.clear()
        out = linear_kl(**case, backend="triton", workspace_mb=SMALL)
        out.kl.sum().backward()
        # 18 tokens are 2 tiles, 300 entries 3; two states of a token tile are finished.
        of_gradients = {"remake_weights": 6} if trained else {"rescale_rows": 8}
        expected = {"fold": 6, "finish": 4, "scatter_scaled": 1, **of_gradients}
        assert dict(self.kernels.launches) == expected

    @pytest.mark.parametrize("with_stats", [False, True])
    @pytest.mark.parametrize("out_dtype", [None, torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("transform", [{}, TRANSFORM])
    @pytest.mark.parametrize("started", [False, True])
    @pytest.mark.parametrize(("n", "v", "start"), [(5, 127, 100), (3, 1, 6), (4, 300, 0)])
    def test_fold_of_pairs(self, n, v, start, started, transform, out_dtype, with_stats, device):
        tiles, labels, biases, guards = pair_of_tiles(n, v, start, device)
        transform = operands.Transform(**transform).keywords()
        states, outs = [], []
        for ops in (self.kernels, torch_tiles):
            state, ref_state = running_states(n, started, with_stats, device)
            rescales = (
                [torch.empty(n, device=device) for _ in range(2)] if out_dtype else (None,) * 2
            )
            pairs = [guarded(n, v, out_dtype, device) for _ in range(2)] if out_dtype else []
            weights = [out for _, out in pairs] if out_dtype else (None,) * 2
            tile, ref_tile = (x if ops is self.kernels else x.clone() for x in tiles)
            before = self.kernels.launches["fold"]
            ops.fold(
                tile, labels, biases[0], *state.sums(), rescales[0], weights[0], *state.moments(),
                ref_tile=ref_tile, ref_bias=biases[1], ref_maximum=ref_state.maximum,
                ref_total=ref_state.total, ref_label_logit=ref_state.label_logit,
                cross=ref_state.cross, ref_rescale=rescales[1], ref_weights=weights[1],
                start=start, first=not started, **transform,
            )  # fmt: skip
            assert ops is torch_tiles or self.kernels.launches["fold"] == before + 1
            for whole, _ in pairs:
                assert_guard_kept(whole, n, v)
            ref = {f"ref_{name}": x for name, x in vars(ref_state).items() if x is not None}
            # The slope is the policy's, and a fold of pairs leaves the reference's alone.
            ref.pop("ref_label_slope")
            states.append({name: x for name, x in vars(state).items() if x is not None} | ref)
            outs.append((*rescales, *weights))
        for whole in guards:
            assert_guard_kept(whole, n, v)
        assert "ref_cross" in states[0] and ("squares" in states[0]) == with_stats
        for name, value in states[0].items():
            if name == "label_slope" and started and transform["softcap"] is None:
                continue  # always 1 then, but not in this made-up state
            torch.testing.assert_close(
                value, states[1][name], rtol=2e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
        if out_dtype:
            tolerance = {torch.float32: 1e-5, torch.bfloat16: 8e-3}[out_dtype]
            for mine, twin in zip(*outs, strict=True):
                torch.testing.assert_close(mine, twin, rtol=tolerance, atol=1e-6)
            inside = (labels >= start) & (labels < start + v)
            rows = torch.arange(n, device=device)[inside]
            for weights in outs[0][2:]:
                assert inside.any() and (weights[rows, labels[inside] - start] == 0).all()

    @pytest.mark.parametrize("is_kept", [False, True])
    @pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("transform", [{}, TRANSFORM])
    @pytest.mark.parametrize(("n", "v", "start"), [(5, 127, 100), (3, 1, 6), (4, 300, 0)])
    def test_remake_weights_of_pairs(self, n, v, start, transform, out_dtype, is_kept, device):
        tiles, labels, biases, _ = pair_of_tiles(n, v, start, device)
        if is_kept:
            tiles, biases = [tile.bfloat16() for tile in tiles], (None, None)
        unit, ref_unit = (torch.full((n,), value, device=device) for value in (20.0, 25.0))
        factor, ref_factor, label = (torch.randn(n, device=device) for _ in range(3))
        options = {
            "ref_bias": biases[1], "ref_unit": ref_unit, "ref_factor": ref_factor,
            "is_kept": is_kept, "start": start, **operands.Transform(**transform).keywords(),
        }  # fmt: skip

        def run(ops, tile, ref_tile, out):
            vectors = (labels, biases[0], unit, factor, label)
            ops.remake_weights(tile, *vectors, out, ref_tile=ref_tile, **options)

        results = []
        for ops in (self.kernels, torch_tiles):
            whole, out = guarded(n, v, out_dtype, device)
            before = self.kernels.launches["remake_weights"]
            run(ops, *(x.clone() for x in tiles), out)
            assert ops is torch_tiles or self.kernels.launches["remake_weights"] == before + 1
            assert_guard_kept(whole, n, v)
            results.append(out)
        tolerance = {torch.float32: 5e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[out_dtype]
        torch.testing.assert_close(*results, rtol=tolerance, atol=1e-6)
        rows = (labels >= start) & (labels < start + v)
        at_labels = results[0][rows, labels[rows] - start]
        assert rows.any() and torch.equal(at_labels, label[rows].to(out_dtype))
        in_place = tiles[0].clone()
        run(self.kernels, in_place, tiles[1], in_place)
        tolerance = max(tolerance, 8e-3 if is_kept else 0)
        torch.testing.assert_close(in_place.float(), results[1].float(), rtol=tolerance, atol=1e-6)

    @pytest.mark.parametrize("width", [300, 2**17])
    def test_scatter_scaled_of_two_terms(self, width, device):
        """The twin walks over as many rows at a time as a MiB holds: two of the wide ones."""
        terms = torch.randn(2, 5, width, device=device)
        scales = torch.randn(2, 5, device=device)
        rows = torch.tensor([6, 0, 3, 2, 1], device=device)
        outs = []
        for ops in (self.kernels, torch_tiles):
            outs.append(torch.zeros(7, width, dtype=torch.bfloat16, device=device))
            ops.scatter_scaled(terms[0], scales[0], rows, outs[-1], terms[1], scales[1])
        exact = torch.zeros(7, width, dtype=torch.float64, device=device)
        exact[rows] = (terms.double() * scales.double().unsqueeze(2)).sum(0)
        for out in outs:
            torch.testing.assert_close(out, exact.bfloat16(), rtol=8e-3, atol=1e-6)

    def test_launchers_refuse_what_they_would_misread(self, device):
        tiles, labels, biases, _ = pair_of_tiles(4, 8, 0, device)
        vectors = [torch.ones(4, device=device) for _ in range(3)]
        out, ones = torch.empty(4, 8, device=device), torch.ones(4, device=device)
        options = {
            "ref_unit": ones, "ref_factor": ones, "start": 0, **operands.Transform().keywords(),
        }  # fmt: skip
        with pytest.raises(ValueError, match="ref_tile must be 2-D with unit stride"):
            strided = tiles[1].T.contiguous().T
            self.kernels.remake_weights(
                tiles[0], labels, biases[0], *vectors, out, ref_tile=strided, **options
            )
        with pytest.raises(ValueError, match="ref_bias must be contiguous"):
            expanded = torch.ones(1, device=device).expand(8)
            self.kernels.remake_weights(
                tiles[0], labels, None, *vectors, out, ref_tile=tiles[1], ref_bias=expanded,
                **options,
            )  # fmt: skip


def pair_of_tiles(n: int, v: int, start: int, device: str):
    """Two guarded tiles, labels in and outside of them, biases of two dtypes, whole buffers."""
    guards, tiles = zip(*(guarded(n, v, torch.float32, device) for _ in range(2)), strict=True)
    for tile in tiles:
        tile.copy_(torch.randn(n, v) * 6)
    labels = torch.randint(start, start + v, (n,), device=device)
    labels[0] = start + v + 3
    biases = torch.randn(v, device=device).bfloat16(), torch.randn(v, device=device)
    return tiles, labels, biases, guards


def running_states(
    n: int, started: bool, with_stats: bool, device: str
) -> tuple[fold_state.FoldState, fold_state.FoldState]:
    """States of policy and reference: arbitrary before a first tile, else valid ones."""
    place = torch.device(device)
    state = fold_state.FoldState.empty(n, place, with_stats)
    ref_state = fold_state.FoldState.empty(n, place, with_cross=True)
    generator = torch.Generator().manual_seed(5)
    for part in (state, ref_state):
        for name, value in vars(part).items():
            if value is not None and started:
                value.copy_(torch.rand(n, generator=generator) + (name == "total"))
    return state, ref_state
