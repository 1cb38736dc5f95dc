"""A LoRA adapter on the head: its term is folded tile by tile, and A and B have exact gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import prefkern
from prefkern.objectives import DPO, Adaptive
from support.machine import BACKENDS

H, R = 24, 5
# shape, V, workspace in MiB, scale of the logits, keywords
CASES = {
    "plain": ((3, 11), 131, None, 1.0, {}),
    "many tiles": ((4, 30), 700, 0.12, 1.0, {}),
    "tiles and kept tokens": ((4, 60), 1500, 1.25, 1.0, {}),
    "softcap": ((3, 11), 131, None, 6.0, {"softcap": 4.0}),
    "scale and temperature": ((3, 11), 131, None, 2.0, {"logit_scale": 0.3, "temperature": 1.7}),
    "one token": ((1,), 16, None, 1.0, {}),
}
OF = ("hidden", "weight", "bias", "lora_hidden", "lora_weight")
# Which of these need a gradient.
TRAINED = {
    "adapter": ("hidden", "lora_hidden", "lora_weight"),
    "adapter alone": ("lora_hidden", "lora_weight"),
    "B alone": ("lora_weight",),
    "states": ("hidden", "lora_hidden"),
    "all": OF,
    "head": ("weight", "bias"),
}


def _problem(
    shape: tuple[int, ...], vocab_size: int, scale: float, dtype: torch.dtype, device: str
) -> tuple[dict[str, Tensor], Tensor]:
    draw = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return (torch.randn(*size, generator=draw) * scale).to(device, dtype)

    tensors = {
        "hidden": normal(*shape, H),
        "weight": normal(vocab_size, H),
        "bias": normal(vocab_size),
        "lora_hidden": normal(*shape, R),
        "lora_weight": normal(vocab_size, R),
    }
    labels = torch.randint(vocab_size, shape, generator=draw).to(device)
    if labels.ndim > 1:
        labels[:, :2] = -100
        labels[0] = -100
    return tensors, labels


def _gradients(function, tensors: dict[str, Tensor], labels: Tensor, trained, **keywords):
    """Values, and gradients by name of a sum that weighs every token differently."""
    tensors = {n: t.detach().clone().requires_grad_(n in trained) for n, t in tensors.items()}
    hidden, weight, bias, lora_hidden, lora_weight = tensors.values()
    logps = function(
        hidden, weight, labels, bias, lora_hidden=lora_hidden, lora_weight=lora_weight, **keywords
    )
    weights = torch.linspace(-1, 2, labels.numel(), device=labels.device, dtype=logps.dtype)
    (logps * weights.view(labels.shape)).sum().backward()
    return logps.detach(), {name: tensor.grad for name, tensor in tensors.items()}


def _relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12)).item()


# Which gradients are asked for is no kernel's concern, so kernels run two of these.
COMBINATIONS = [
    (case, trained, backend)
    for case in CASES
    for trained in TRAINED
    for backend in BACKENDS
    if backend == "torch" or trained in ("adapter", "all")
]


@pytest.mark.parametrize(("case", "trained", "backend"), COMBINATIONS)
@pytest.mark.long(backend="triton", trained="adapter")
@pytest.mark.long(
    backend="triton", case=[case for case in CASES if case != "tiles and kept tokens"]
)
def test_values_and_gradients_against_float64(case, trained, backend, device):
    shape, vocab_size, workspace_mb, scale, keywords = CASES[case]
    trained = TRAINED[trained]
    tensors, labels = _problem(shape, vocab_size, scale, torch.float32, device)
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    expected, wanted = _gradients(
        prefkern.reference.linear_logprobs, exact, labels, trained, **keywords
    )
    keywords = {**keywords, "workspace_mb": workspace_mb, "backend": backend}
    actual, gradients = _gradients(prefkern.linear_logprobs, tensors, labels, trained, **keywords)
    plan = prefkern.last_plan()
    assert plan.backend == backend and plan.rank == R
    assert (actual.double() - expected).abs().max() < 2e-5
    for name, gradient in gradients.items():
        if name in trained:
            assert gradient.dtype == tensors[name].dtype
            assert _relative(gradient, wanted[name]) < 5e-6, name
        else:
            assert gradient is None
    if case == "many tiles":
        assert plan.forward_tiles.vocab_tile < vocab_size
        assert plan.forward_tiles.token_tile < plan.tokens
    if case == "tiles and kept tokens" and plan.trains_head:
        assert 0 < plan.kept_tokens < plan.tokens


@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.long(backend="triton", dtype=torch.float16)
@pytest.mark.long(backend="triton", adapter_dtype=torch.bfloat16)
def test_half_precision_is_as_exact_as_its_inputs(dtype, adapter_dtype, backend, device):
    """PEFT keeps adapters in float32 beside a head of half precision; gradients keep their dtypes."""
    tensors, labels = _problem((4, 30), 700, 0.7, dtype, device)
    for name in ("lora_hidden", "lora_weight"):
        # Values that half precision holds: what is compared is the pass, not the rounding.
        tensors[name] = tensors[name].to(adapter_dtype)
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    expected, wanted = _gradients(prefkern.reference.linear_logprobs, exact, labels, OF)
    actual, gradients = _gradients(
        prefkern.linear_logprobs, tensors, labels, OF, backend=backend, workspace_mb=1
    )
    assert (actual.double() - expected).abs().max() < 1e-4
    for name in OF:
        assert gradients[name].dtype == tensors[name].dtype
        assert _relative(gradients[name], wanted[name]) < 6e-3, name


def test_operations_are_the_frozen_heads_and_the_adapters(device):
    """If W is frozen, dW costs nothing of the head's width; if hidden is frozen, nor does D."""
    tensors, labels = _problem((4, 60), 1500, 1.0, torch.float32, device)
    N, V, W = int((labels != -100).sum()), 1500, H + 8
    _gradients(prefkern.linear_logprobs, tensors, labels, TRAINED["adapter"], workspace_mb=64)
    plan = prefkern.last_plan()
    assert plan.structure == "one_pass"
    assert plan.forward_operations == 2 * 2 * N * V * W
    assert plan.backward_operations == 2 * N * V * (W - H)
    _gradients(prefkern.linear_logprobs, tensors, labels, TRAINED["adapter alone"], workspace_mb=64)
    assert prefkern.last_plan().forward_operations == 2 * N * V * (W + W - H)
    _gradients(prefkern.linear_logprobs, tensors, labels, TRAINED["adapter"], workspace_mb=0.25)
    plan = prefkern.last_plan()
    assert plan == prefkern.plan_for(
        N, H, V, dtype=torch.float32, device=device, lora_rank=R, workspace_mb=0.25
    )
    assert plan.structure == "two_pass"
    assert plan.backward_operations == 2 * N * V * (W - H) + 2 * (N - plan.kept_tokens) * V * W


@pytest.mark.parametrize("packed", [False, True])
def test_the_loss_takes_an_adapter(packed, backend, device):
    tensors, labels = _problem((4, 9), 131, 1.0, torch.float32, device)
    labels[0, 3:] = 7
    objective = DPO(0.1, adaptive=Adaptive())
    fused = prefkern.FusedPreferenceLoss(objective, backend=backend)
    options = {"ref_logps": torch.tensor([-30.0, -40.0, -35.0, -20.0], device=device)}
    if packed:
        options["cu_seqlens"] = torch.arange(0, 37, 9, dtype=torch.int32, device=device)
        labels = labels.flatten()
        tensors = {n: t.flatten(0, 1) if "hidden" in n else t for n, t in tensors.items()}

    def run(function, tensors):
        tensors = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        hidden, weight, bias, lora_hidden, lora_weight = tensors.values()
        out = function(
            hidden,
            weight,
            labels,
            bias,
            lora_hidden=lora_hidden,
            lora_weight=lora_weight,
            **options,
        )
        out.loss.backward()
        return out, {name: tensor.grad for name, tensor in tensors.items()}

    exact = {name: tensor.double() for name, tensor in tensors.items()}
    options["ref_logps"] = options["ref_logps"].double()
    expected, wanted = run(
        lambda *a, **k: prefkern.reference.preference_loss(objective, *a, **k), exact
    )
    options["ref_logps"] = options["ref_logps"].float()
    actual, gradients = run(fused, tensors)
    assert actual.plan.rank == R
    torch.testing.assert_close(actual.losses.double(), expected.losses, atol=1e-5, rtol=1e-5)
    for name in OF:
        assert _relative(gradients[name], wanted[name]) < 1e-5, name


def test_a_reference_through_the_same_head_lacks_the_adapter(device):
    """The policy's adapter is not the reference's, although both heads share a weight."""
    tensors, labels = _problem((4, 9), 131, 1.0, torch.float32, device)
    labels[0, 3:] = 7
    loss_fn = prefkern.FusedPreferenceLoss(DPO(0.1))
    out = loss_fn(
        tensors["hidden"], tensors["weight"], labels,
        ref_hidden=tensors["hidden"], ref_weight=tensors["weight"],
        lora_hidden=tensors["lora_hidden"], lora_weight=tensors["lora_weight"],
    )  # fmt: skip
    plain = prefkern.linear_logprobs(tensors["hidden"], tensors["weight"], labels).sum(1)
    torch.testing.assert_close(torch.cat([out.ref_chosen_logps, out.ref_rejected_logps]), plain)
    assert (out.chosen_logps - out.ref_chosen_logps).abs().min() > 0.1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lora_weight": None}, TypeError, "lora_weight must be a tensor"),
        ({"lora_hidden": None}, TypeError, "lora_hidden must be a tensor"),
        ({"lora_weight": torch.zeros(7, R)}, ValueError, r"lora_weight must have shape \[V, R\]"),
        ({"lora_hidden": torch.zeros(3, 11, 2)}, ValueError, r"lora_hidden must have hidden's"),
        ({"lora_weight": torch.zeros(131, R).double()}, TypeError, "lora_weight is float64 and"),
    ],
)
def test_adapters_that_do_not_fit(change, error, message):
    tensors, labels = _problem((3, 11), 131, 1.0, torch.float32, "cpu")
    given = {"lora_hidden": tensors["lora_hidden"], "lora_weight": tensors["lora_weight"], **change}
    with pytest.raises(error, match=message):
        prefkern.linear_logprobs(tensors["hidden"], tensors["weight"], labels, **given)
