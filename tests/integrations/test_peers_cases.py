"""Liger's cases against prefkern: its losses' shapes, dtypes, biases, ignored labels and options.

Each case is compared with logits in memory in float64, and, if Liger is installed, with Liger's own
loss: value, gradients of hidden states, head and bias, log-probs, rewards. All chosen rows have the
same number of tokens, since Liger's NLL is a mean over the tokens of a batch. `test_conventions`
tests where the two differ.
"""

from __future__ import annotations

import pytest
import torch

import prefkern
from prefkern import objectives
from support.liger_cases import (
    CASES,
    EXACT,
    HAS_LIGER,
    LIGERS,
    SHAPES,
    assert_gradients,
    batch,
    liger,
    reference_of,
    run,
    sums,
    textbook,
)

GRID = [*SHAPES[:2], *(pytest.param(shape, marks=pytest.mark.long) for shape in SHAPES[2:])]


@pytest.mark.parametrize("ignore_index", [-100, 42])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", EXACT, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", GRID, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_ligers_grid(name, shape, dtype, bias, ignore_index):
    case = CASES[name]
    beta = case.betas[ignore_index == 42]
    data = batch(shape, dtype, bias, not bias, ignore_index, beta=beta)
    ours, exact = data.leaves(), data.double().leaves()
    out = run(case, ours)
    loss, logps = textbook(case, exact)
    torch.testing.assert_close(out.loss.double(), loss, atol=1e-5, rtol=2e-5)
    mine = torch.cat([out.chosen_logps, out.rejected_logps])
    torch.testing.assert_close(mine.double(), logps, atol=1e-4, rtol=2e-6)
    assert_gradients(ours, exact, EXACT[dtype])
    if not HAS_LIGER:
        return
    atol, rtol = LIGERS[dtype]
    theirs = data.leaves()
    loss, aux = liger(case, theirs)
    torch.testing.assert_close(out.loss, loss.float(), atol=atol, rtol=rtol)
    if dtype == torch.float32:
        assert_gradients(ours, theirs, rtol)
        lengths = torch.cat([out.chosen_lengths, out.rejected_lengths])
        divisor = lengths if case.liger in ("SimPO", "ORPO") else 1
        torch.testing.assert_close(mine / divisor, torch.cat(aux[:2]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_gradients_scale_with_what_comes_from_above(name):
    """Liger's gradients are computed in its forward; a scale must reach all of them."""
    case = CASES[name]
    data = batch(SHAPES[2], bias=True, beta=case.betas[0])
    plain, scaled = data.leaves(), data.leaves()
    run(case, plain)
    run(case, scaled, scale=2.5)
    for mine, x in zip(scaled.inputs.values(), plain.inputs.values(), strict=True):
        torch.testing.assert_close(mine.grad, 2.5 * x.grad, atol=1e-7, rtol=1e-6)
    if HAS_LIGER:
        theirs = data.leaves()
        liger(case, theirs, scale=2.5)
        assert_gradients(scaled, theirs, 5e-4)


@pytest.mark.parametrize("frozen", [["hidden"], ["bias"], ["weight"], ["weight", "bias"]], ids=str)
def test_what_is_frozen_gets_no_gradient_and_costs_none(frozen):
    case = CASES["dpo"]
    data = batch(SHAPES[2], bias=True)
    every, some = data.leaves(), data.leaves()
    for name in frozen:
        getattr(some, name).requires_grad_(False)
    out = run(case, every), run(case, some)
    torch.testing.assert_close(out[0].loss, out[1].loss, atol=0, rtol=1e-6)
    for name, x in some.inputs.items():
        if name in frozen:
            assert x.grad is None
        else:
            torch.testing.assert_close(x.grad, every.inputs[name].grad, atol=1e-7, rtol=1e-5)
    assert out[1].plan.trains_head == (frozen != ["weight", "bias"])


def test_without_gradients_only_the_loss_is_computed():
    data = batch(SHAPES[2])
    with torch.no_grad():
        out = run(CASES["dpo"], data.leaves())
    # Log-probs of the policy and of the reference, 2 NHV each.
    assert out.plan.operations_nhv == 4 and not out.loss.requires_grad
    loss, _ = textbook(CASES["dpo"], data.double())
    torch.testing.assert_close(out.loss.double(), loss, atol=1e-5, rtol=2e-5)


def test_no_gradient_reaches_the_reference():
    data = batch(SHAPES[2], ref_bias=True)
    ours = data.leaves()
    for name in ("ref_hidden", "ref_weight", "ref_bias"):
        getattr(ours, name).requires_grad_()
    run(CASES["dpo"], ours)
    assert all(getattr(ours, f"ref_{name}").grad is None for name in ("hidden", "weight", "bias"))


@pytest.mark.parametrize("name", ["dpo", "cpo", "simpo", "orpo"])
def test_strided_inputs(name):
    """Hidden states [T, 2B, H] seen as [2B, T, H], a head with rows left out, labels of a slice."""
    case = CASES[name]
    data = batch(SHAPES[2], bias=True, beta=case.betas[0])
    plain, strided = data.leaves(), data.leaves()
    views = {
        "hidden": data.hidden.transpose(0, 1).contiguous().transpose(0, 1),
        "weight": data.weight.repeat_interleave(2, 0)[::2],
        "labels": torch.stack([data.labels] * 2, -1)[..., 0],
        "bias": torch.stack([data.bias] * 2, -1)[:, 0],
    }
    assert not any(view.is_contiguous() for view in views.values())
    for argument, view in views.items():
        setattr(strided, argument, view if argument == "labels" else view.requires_grad_())
    torch.testing.assert_close(run(case, strided).loss, run(case, plain).loss, atol=0, rtol=1e-6)
    assert_gradients(strided, plain, 1e-6)


@pytest.mark.parametrize("workspace_mb", [8, 64, 512])
def test_results_do_not_depend_on_the_workspace(workspace_mb):
    """As Liger's results do not depend on its chunk_size."""
    case = CASES["dpo with nll"]
    data = batch(SHAPES[2], bias=True)
    ours, exact = data.leaves(), data.double().leaves()
    out = run(case, ours, workspace_mb)
    torch.testing.assert_close(out.loss.double(), textbook(case, exact)[0], atol=1e-5, rtol=2e-5)
    assert_gradients(ours, exact, 2e-5)


@pytest.mark.parametrize("chunk_size", [1, 2, 4, 16])
def test_ligers_chunks_are_prefkerns_whole(chunk_size):
    data = batch(SHAPES[2])
    ours, theirs = data.leaves(), data.leaves()
    out = run(CASES["dpo"], ours)
    loss, _ = liger(CASES["dpo"], theirs, chunk_size=chunk_size)
    torch.testing.assert_close(out.loss, loss, atol=1e-5, rtol=5e-4)
    assert_gradients(ours, theirs, 5e-4)


@pytest.mark.parametrize("row", [0, -1], ids=["chosen", "rejected"])
@pytest.mark.parametrize("name", ["dpo", "dpo with nll", "hinge", "robust", "cpo", "simpo", "orpo"])
def test_a_response_without_a_token_is_no_nan(name, row):
    """Its log-prob and its share of the gradient are 0, as in Liger's DPO; means are not 0/0."""
    case = CASES[name]
    data = batch(SHAPES[2], bias=True, beta=case.betas[0]).leaves()
    data.labels[row] = data.ignore_index
    out = run(case, data)
    assert (out.chosen_logps[0] if row == 0 else out.rejected_logps[-1]) == 0
    assert out.losses.isfinite().all()
    assert all(x.grad.isfinite().all() for x in data.inputs.values())
    assert not data.hidden.grad[row].any() and data.hidden.grad[1].any()


def test_losses_of_pairs_can_be_reduced_otherwise():
    """reduction="none": a user's own weight on each pair, gradients included."""
    case = CASES["dpo"]
    data = batch(SHAPES[2], bias=True)
    ours, exact = data.leaves(), data.double().leaves()
    weights = torch.tensor([0.0, 1.0, -2.0, 0.5])
    loss_fn = prefkern.FusedPreferenceLoss(objectives.DPO(0.1), backend="torch")
    out = loss_fn(ours.hidden, ours.weight, ours.labels, ours.bias, **reference_of(case, ours))
    (out.losses * weights).sum().backward()
    logps, _ = sums(exact.hidden, exact.weight, exact.bias, exact.labels, -100)
    ref, _ = sums(exact.ref_hidden, exact.ref_weight, exact.ref_bias, exact.labels, -100)
    pairs = [half for x in (logps, ref) for half in x.chunk(2)]
    (case.textbook(0.1, *pairs) * weights.double()).sum().backward()
    assert_gradients(ours, exact, 2e-5)


@pytest.mark.parametrize("ignore_index, beta", [(-100, 0.1), (42, 0.2)])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", EXACT, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", GRID[:3], ids=str)
def test_ligers_kto(shape, dtype, bias, ignore_index, beta):
    """Single responses; Liger takes `kl`, prefkern takes mismatched pairs for it."""
    data = batch(shape, dtype, bias, not bias, ignore_index, beta=beta)
    ours, exact = data.leaves(), data.double().leaves()
    draw = torch.Generator().manual_seed(5)
    desirable = torch.rand(len(data.labels), generator=draw) < 0.5
    kl = torch.tensor([0.7])
    loss_fn = prefkern.FusedPreferenceLoss(objectives.KTO(beta), ignore_index, backend="torch")
    out = loss_fn(
        ours.hidden,
        ours.weight,
        ours.labels,
        ours.bias,
        ours.ref_hidden,
        ours.ref_weight,
        ours.ref_bias,
        desirable=desirable,
        mismatched_log_ratios=kl,
    )
    out.loss.backward()
    logps, _ = sums(exact.hidden, exact.weight, exact.bias, exact.labels, ignore_index)
    ref, _ = sums(exact.ref_hidden, exact.ref_weight, exact.ref_bias, exact.labels, ignore_index)
    sign = torch.where(desirable, 1.0, -1.0).double()
    loss = (1 - torch.sigmoid(beta * sign * (logps - ref - 0.7))).mean()
    loss.backward()
    torch.testing.assert_close(out.loss.double(), loss.detach(), atol=1e-6, rtol=2e-5)
    assert_gradients(ours, exact, 2 * EXACT[dtype])
    if not HAS_LIGER:
        return
    from liger_kernel.chunked_loss import LigerFusedLinearKTOLoss

    theirs = data.leaves()
    options = {"ignore_index": ignore_index, "beta": beta, "compiled": False}
    result, _ = LigerFusedLinearKTOLoss(use_ref_model=True, **options)(
        theirs.hidden,
        theirs.weight,
        theirs.labels,
        theirs.bias,
        desirable,
        theirs.ref_hidden,
        theirs.ref_weight,
        theirs.ref_bias,
        kl,
    )
    result.backward()
    atol, rtol = LIGERS[dtype]
    torch.testing.assert_close(out.loss, result.float(), atol=atol, rtol=rtol)
    if dtype == torch.float32:
        assert_gradients(ours, theirs, rtol)
