"""Results can be differentiated once: every way to a second derivative raises.

Autograd runs only the nodes between a result and the inputs that it is asked for. So the tests ask
for what a gradient penalty would ask for: a weight before the hidden states, the hidden states, the
head, and a factor of the log-probs.
"""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

import prefkern
from prefkern import objectives

B, T, E, H, V = 2, 3, 6, 8, 67


def logprobs(hidden, weight, labels, **options):
    return prefkern.linear_logprobs(hidden, weight, labels, **options)


def kl(hidden, weight, labels, **options):
    ref = (torch.zeros_like(hidden), weight.detach())
    return prefkern.linear_kl(hidden, weight, labels, *ref, **options).kl


def loss(hidden, weight, labels, *, backend, name="dpo"):
    loss_fn = prefkern.FusedPreferenceLoss(objectives.build(name), backend=backend)
    sums = torch.zeros(2 * B, device=hidden.device)
    return loss_fn(hidden, weight, labels, ref_logps=sums).losses


WAYS = {"log-probs": logprobs, "kl": kl, "loss": loss}


@pytest.fixture(params=[False, True], ids=["frozen", "trained"])
def given(request, device):
    return {
        "inputs": torch.randn(2 * B, T, E, device=device),
        "before": torch.randn(E, H, device=device).requires_grad_(),
        "weight": torch.randn(V, H, device=device).requires_grad_(request.param),
        "labels": torch.randint(V, (2 * B, T), device=device),
        "factor": torch.ones((), device=device, requires_grad=True),
    }


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("asked", ["before", "weight", "factor"])
@pytest.mark.long(backend="triton")
def test_a_gradient_cannot_be_differentiated(way, asked, given, backend):
    if not given[asked].requires_grad:
        given[asked].requires_grad_()
    hidden = torch.tanh(given["inputs"] @ given["before"])
    values = WAYS[way](hidden, given["weight"], given["labels"], backend=backend)
    total = (values * given["factor"]).sum()
    (gradient,) = torch.autograd.grad(total, given["before"], create_graph=True)
    penalty = gradient.square().sum()
    for options in ({}, {"allow_unused": True}, {"materialize_grads": True}):
        with pytest.raises(RuntimeError, match="differentiated once"):
            torch.autograd.grad(penalty, given[asked], retain_graph=True, **options)
    with pytest.raises(RuntimeError, match="differentiated once"):
        penalty.backward(inputs=[given[asked]])


@pytest.mark.parametrize("way", WAYS)
def test_nor_by_way_of_a_hessian(way, given, backend, device):
    hidden = torch.randn(2 * B, T, H, device=device)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.functional.hessian(
            lambda x: WAYS[way](x, given["weight"], given["labels"], backend=backend).sum(), hidden
        )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("argument", ["hidden", "weight"])
def test_nor_a_value_in_forward_mode(way, argument, given, backend, device):
    values = {
        "hidden": torch.randn(2 * B, T, H, device=device),
        "weight": given["weight"].detach(),
    }
    with forward_ad.dual_level():
        values[argument] = forward_ad.make_dual(values[argument], values[argument])
        with pytest.raises(NotImplementedError, match=f"{argument} has a tangent"):
            WAYS[way](**values, labels=given["labels"], backend=backend)


@pytest.mark.parametrize("argument", ["lora_hidden", "lora_weight"])
@pytest.mark.parametrize("operator", [prefkern.linear_logprobs, prefkern.linear_kl])
def test_nor_does_an_adapter_lose_its_tangent(operator, argument, device):
    hidden, weight = torch.randn(5, H, device=device), torch.randn(V, H, device=device)
    adapter = {"lora_hidden": torch.randn(5, 2), "lora_weight": torch.randn(V, 2)}
    adapter = {name: value.to(device) for name, value in adapter.items()}
    ref = () if operator is prefkern.linear_logprobs else (hidden, weight)
    message = f"{argument} has a tangent"
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=message):
        adapter[argument] = forward_ad.make_dual(adapter[argument], adapter[argument])
        operator(hidden, weight, torch.zeros(5, device=device).long(), *ref, **adapter)


@pytest.mark.parametrize("operator", [prefkern.linear_logprobs, prefkern.linear_kl])
def test_nor_does_a_bias_lose_its_tangent(operator, backend, device):
    hidden, weight = torch.randn(5, H, device=device), torch.randn(V, H, device=device)
    labels, bias = torch.zeros(5, device=device).long(), torch.zeros(V, device=device)
    ref = () if operator is prefkern.linear_logprobs else (hidden, weight)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="bias has a tangent"):
        operator(
            hidden, weight, labels, *ref, bias=forward_ad.make_dual(bias, bias), backend=backend
        )


@pytest.mark.parametrize("frozen", [True, False])
def test_hidden_states_are_not_held_for_that(frozen, backend, device):
    """With a frozen head their memory is free again after the log-probs are computed."""
    states = torch.randn(5, H, device=device, requires_grad=True)
    weight = torch.randn(V, H, device=device, requires_grad=not frozen)
    hidden = states * 2
    held = hidden.untyped_storage()._weak_ref()
    labels = torch.zeros(5, device=device).long()
    logps = prefkern.linear_logprobs(hidden, weight, labels, backend=backend)
    del hidden
    assert torch.UntypedStorage._expired(held) == frozen
    torch.UntypedStorage._free_weak_ref(held)
    logps.sum().backward()
    assert states.grad is not None


@pytest.mark.parametrize("name", ["dpo", "adadpo", "alphadpo", "tdpo2"])
def test_a_loss_is_a_function_of_its_log_probs(name, backend, device):
    """Autograd gives `d loss / d chosen_logps`, and it equals the output's gradient."""
    loss_fn = prefkern.FusedPreferenceLoss(objectives.build(name), backend=backend)
    weight = torch.randn(V, H, device=device)
    hidden = torch.randn(2 * B, T, H, device=device, requires_grad=True)
    labels = torch.randint(V, (2 * B, T), device=device)
    ref = {"ref_hidden": torch.randn(2 * B, T, H, device=device), "ref_weight": weight}
    out = loss_fn(hidden, weight, labels, **ref)
    chosen, rejected = torch.autograd.grad(
        out.losses.sum(), (out.chosen_logps, out.rejected_logps), retain_graph=True
    )
    torch.testing.assert_close(chosen, out.chosen_gradients)
    torch.testing.assert_close(rejected, out.rejected_gradients)
    # And a loss of the caller's own may have log-probs in it beside.
    both = out.loss + 0.1 * out.chosen_logps.sum()
    (mine,) = torch.autograd.grad(both, hidden, retain_graph=True)
    (first,) = torch.autograd.grad(out.loss, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(out.chosen_logps.sum(), hidden)
    torch.testing.assert_close(mine, first + 0.1 * second)
