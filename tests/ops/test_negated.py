"""Tensors whose memory holds their negative (`z.conj().imag`), as every argument of a kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import prefkern
from prefkern.objectives import build

B, T, H, V, R = 1, 2, 8, 20, 2


def negated(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, over memory that holds -x."""
    made = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert made.is_neg() and torch.equal(made, x)
    return made


def arguments(device: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    shapes = {
        "hidden": (2 * B, T, H),
        "weight": (V, H),
        "bias": (V,),
        "lora_hidden": (2 * B, T, R),
        "lora_weight": (V, R),
        "ref_hidden": (2 * B, T, H),
        "ref_weight": (V, H),
        "ref_bias": (V,),
        "ref_logps": (2 * B,),
        "reward_margins": (B,),
    }
    made = {name: torch.randn(shape).to(device) for name, shape in shapes.items()}
    return {**made, "labels": torch.randint(V, (2 * B, T)).to(device)}


def numbers(
    function: Any,
    given: dict[str, torch.Tensor],
    names: tuple[str, ...],
    changed: str,
    trains: bool,
) -> list[torch.Tensor]:
    """Values and gradients, with a negated argument or a negated gradient from the loss."""
    trained = ("hidden", "bias", "lora_hidden", "lora_weight", "weight" if trains else "")
    case = {name: given[name].clone() for name in (*names, "labels")}
    leaves = [x.requires_grad_() for name, x in case.items() if name in trained]
    if changed in case:
        case[changed] = negated(case[changed])
    values = function(**case)
    grads = [torch.linspace(0.5, 1.5, x.numel()).view(x.shape).to(x) for x in values]
    if changed == "grad_outputs":
        grads = [negated(x) for x in grads]
    found = torch.autograd.grad(values, leaves, grads)
    return [x.detach() for x in (*values, *found)]


HEAD = ("hidden", "weight", "bias")
ADAPTED = (*HEAD, "lora_hidden", "lora_weight")
HEADS = ("hidden", "weight", "bias", "ref_hidden", "ref_weight", "ref_bias")
SUMS = ("hidden", "weight", "ref_logps", "reward_margins")
CASES = [
    *(("linear_logprobs", HEAD, name) for name in (*HEAD, "grad_outputs")),
    *(("linear_logprobs", ADAPTED, name) for name in ADAPTED[3:]),
    *(("linear_kl", HEADS, name) for name in (*HEADS, "grad_outputs")),
    *(("loss", SUMS, name) for name in (*SUMS[2:], "grad_outputs")),
]


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize(("call", "names", "changed"), CASES)
@pytest.mark.long(backend="triton", trains=False)
def test_is_what_it_says(call, names, changed, trains, backend, device):
    """Bit for bit."""
    loss_fn = prefkern.FusedPreferenceLoss(build("madpo"), backend=backend)
    functions = {
        "linear_logprobs": lambda **case: [prefkern.linear_logprobs(**case, backend=backend)],
        "linear_kl": lambda **case: [*prefkern.linear_kl(**case, backend=backend)[::2]],
        "loss": lambda **case: [loss_fn(**case).losses],
    }
    given = arguments(device)
    plain = numbers(functions[call], given, names, "", trains)
    plan = prefkern.last_plan()
    found = numbers(functions[call], given, names, changed, trains)
    assert plan is not None and plan.backend == backend
    for mine, expected in zip(found, plain, strict=True):
        assert torch.equal(mine, expected)


def test_a_reference_of_the_same_memory_negated_is_another_head(backend, device):
    """-W over the memory of W is not W, although address, shape, strides and dtype are the same."""
    case = {name: arguments(device)[name] for name in ("hidden", "weight", "labels", "ref_hidden")}
    pair = torch.view_as_complex(torch.stack([case["weight"], case["weight"]], -1))
    case["weight"], other = pair.imag, pair.conj().imag
    assert other.data_ptr() == case["weight"].data_ptr() and other.is_neg()
    loss_fn = prefkern.FusedPreferenceLoss(build("dpo"), backend=backend)
    found = loss_fn(**case, ref_weight=other)
    expected = loss_fn(**case, ref_weight=-case["weight"])
    assert torch.equal(found.losses, expected.losses)
