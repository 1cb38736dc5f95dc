"""torch.compile, the operators it sees, and what a CUDA graph may record."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Callable

import pytest
import torch
import torch._dynamo.testing
import torch._inductor.config
from torch.utils._python_dispatch import TorchDispatchMode

import prefkern
from prefkern import Pairs, objectives, reference
from prefkern.loss import diagnostics
from prefkern.objectives import DPO, KTO, TDPO2, WPO
from prefkern.ops import compiled, sequences
from support.logprobs import relative

B, T, H, V = 3, 10, 16, 300
TRANSFORM = {"logit_scale": 0.9, "softcap": 12.0, "temperature": 1.1}


@pytest.fixture(autouse=True)
def fresh():
    """Clear compiled code, also of earlier runs: caches do not notice new code of operators."""
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield


class Model(torch.nn.Module):
    """A body, a head, and a loss in place of the logits."""

    def __init__(self, objective, trains_head: bool, **options) -> None:
        super().__init__()
        self.body = torch.nn.Linear(H, H)
        self.head = torch.nn.Linear(H, V).requires_grad_(trains_head)
        self.loss = prefkern.FusedPreferenceLoss(objective, **options)

    def states(self, x: torch.Tensor) -> torch.Tensor:
        return 4 * torch.tanh(self.body(x))

    def forward(self, x: torch.Tensor, labels: torch.Tensor, **keywords):
        return self.loss(
            self.states(x), self.head.weight, labels, self.head.bias, **TRANSFORM, **keywords
        )


def batch(device: str, length: int = T, responses: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    rows = responses * B
    labels = torch.randint(V, (rows, length), device=device)
    labels[:, :3] = -100
    labels[2] = -100
    return torch.randn(rows, length, H, device=device), labels


def counted(function: Callable, backend: str = "aot_eager"):
    """The function compiled whole, and a counter of compilations."""
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, dynamic=True, backend=counter), counter


@pytest.mark.parametrize("trains_head", [False, True])
@pytest.mark.parametrize("workspace_mb", [0.005, 64])
@pytest.mark.long(workspace_mb=64, trains_head=False)
@pytest.mark.long(workspace_mb=0.005, trains_head=True)
def test_operator(workspace_mb, trains_head, device):
    """One graph, compiled once for all N; values and gradients against float64."""
    weight = torch.randn(V, H, device=device, requires_grad=trains_head)
    bias = torch.randn(V, device=device, requires_grad=trains_head)

    def logprobs(hidden, labels):
        return prefkern.linear_logprobs(
            torch.sin(hidden), weight, labels, bias, workspace_mb=workspace_mb, **TRANSFORM
        )

    function, counter = counted(logprobs)
    frames = []
    for length in (T, 17, 25):
        hidden, labels = batch(device, length)
        hidden.requires_grad_()
        out = function(hidden, labels)
        frames.append(counter.frame_count)
        leaves = [hidden, *([weight, bias] if trains_head else [])]
        grad = torch.randn_like(out)
        gradients = torch.autograd.grad(out, leaves, grad)
        made = prefkern.last_plan()
        assert (made.tokens, made.trains_head) == (5 * (length - 3), trains_head)
        if trains_head:
            # 12,480 bytes of probabilities a token do not fit beside tiles in 0.005 MiB.
            assert made.structure == ("two_pass" if workspace_mb < 1 else "one_pass")
        doubles = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
        truth = reference.linear_logprobs(
            torch.sin(doubles[0]), doubles[1], labels, doubles[2], **TRANSFORM
        )
        wanted = torch.autograd.grad(truth, doubles[: len(leaves)], grad.double())
        torch.testing.assert_close(out.double(), truth, rtol=1e-6, atol=1e-5)
        for mine, true in zip(gradients, wanted, strict=True):
            assert relative(mine, true) < 1e-5
    # No compilation after the first call, whatever the length.
    assert frames == frames[:1] * 3


def test_statistics(device):
    weight = torch.randn(V, H, device=device)
    hidden, labels = batch(device)

    def statistics(hidden, labels):
        return prefkern.linear_logprobs(hidden, weight, labels, return_stats=True)

    ours = counted(statistics)[0](hidden, labels)
    for mine, eager in zip(ours, statistics(hidden, labels), strict=True):
        assert mine.dtype == eager.dtype and torch.equal(mine, eager)


# Compiling takes its time: of each way through the loss one, and the others with --long.
WAYS = ("adadpo", "alphadpo")
OBJECTIVES = [
    pytest.param(name, marks=() if name in WAYS else pytest.mark.long)
    for name in objectives.names()
    if name not in ("kto", "tdpo1", "tdpo2")
]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_of_every_objective(name, device):
    model = Model(objectives.build(name), trains_head=True).to(device)
    twin = objectives.build(name).to(device)
    if name == "betadpo":
        # Its draws are the generator's: compared are values, so there must be none.
        model.loss.objective.eval(), twin.eval()
    function, counter = counted(model)
    frames = []
    for length in (T, 13, 21):
        x, labels = batch(device, length, twin.responses)
        keywords = {
            "ref_logps": torch.randn(2 * B, device=device) - 5 * (length - 3),
            "reward_margins": torch.randn(B, device=device),
        }
        out = function(x, labels, **keywords)
        frames.append(counter.frame_count)
        parameters = list(model.parameters())
        gradients = torch.autograd.grad(out.loss, parameters)
        truth = reference.preference_loss(
            twin, model.states(x), model.head.weight, labels, model.head.bias,
            **TRANSFORM, **keywords,
        )  # fmt: skip
        wanted = torch.autograd.grad(truth.loss, parameters)
        torch.testing.assert_close(out.losses, truth.losses, rtol=1e-4, atol=1e-4)
        for field in ("chosen_lengths", "rejected_lengths"):
            assert torch.equal(getattr(out, field), getattr(truth, field))
        for mine, true in zip(gradients, wanted, strict=True):
            assert relative(mine, true.double()) < 2e-4
    # No compilation after the first call, whatever the length.
    assert frames == frames[:1] * 3


@pytest.mark.parametrize("trains_head", [False, True])
def test_divergence_and_adapter(trains_head, device):
    """TDPO with LoRA on the head: one graph, compiled once, values and gradients of the oracle."""
    model = Model(WPO(TDPO2(0.1, 0.7)), trains_head).to(device)
    adapter = torch.nn.Linear(H, 3, bias=False).to(device)
    lora_weight = torch.randn(V, 3, device=device, requires_grad=True)
    ref_weight, ref_bias = torch.randn(V, 5, device=device), torch.randn(V, device=device)

    def loss(x, labels, ref_hidden):
        adapted = {"lora_hidden": adapter(x), "lora_weight": lora_weight}
        ref = {"ref_hidden": ref_hidden, "ref_weight": ref_weight, "ref_bias": ref_bias}
        return model(x, labels, **adapted, **ref)

    function, counter = counted(loss)
    frames = []
    for length in (T, 13, 21):
        x, labels = batch(device, length)
        ref_hidden = torch.randn(2 * B, length, 5, device=device)
        out = function(x, labels, ref_hidden)
        frames.append(counter.frame_count)
        leaves = [*(p for p in model.parameters() if p.requires_grad), adapter.weight, lora_weight]
        gradients = torch.autograd.grad(out.loss, leaves)
        made = prefkern.last_plan()
        assert made.has_divergence and made.rank == 3
        truth = reference.preference_loss(
            WPO(TDPO2(0.1, 0.7)), torch.cat([model.states(x), adapter(x)], -1),
            torch.cat([model.head.weight, lora_weight], -1), labels, model.head.bias,
            ref_hidden=ref_hidden, ref_weight=ref_weight, ref_bias=ref_bias, **TRANSFORM,
        )  # fmt: skip
        wanted = torch.autograd.grad(truth.loss, leaves)
        torch.testing.assert_close(out.losses, truth.losses, rtol=1e-4, atol=1e-4)
        for mine, true in zip(gradients, wanted, strict=True):
            assert relative(mine, true.double()) < 2e-4
    assert frames == frames[:1] * 3


@pytest.mark.parametrize("names", [("logps", "ref_logps", "kl"), ("kl",), ("logps",)])
def test_linear_kl(names, device):
    """The operator itself, and a gradient of its last output alone, beside others or by itself."""
    weight, ref_weight = torch.randn(V, H, device=device), torch.randn(V, H, device=device)
    hidden, labels = batch(device)

    def outputs(hidden):
        out = prefkern.linear_kl(hidden, weight, labels, hidden.detach() + 0.1, ref_weight)
        return [getattr(out, name) for name in names]

    found = []
    for function in (outputs, counted(outputs)[0]):
        leaf = hidden.clone().requires_grad_()
        out = function(leaf)
        found.append((*out, *torch.autograd.grad(out[-1].sum(), leaf)))
    for ours, eager in zip(*found, strict=True):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("trains_head", [False, True])
@pytest.mark.long(packed=False)
@pytest.mark.long(trains_head=False)
def test_reference_and_packing(trains_head, packed, device):
    """The reference through its own head, alignments of WPO, and a packed batch."""
    model = Model(WPO(DPO(0.1)), trains_head).to(device)
    x, labels = batch(device)
    ref = {
        "ref_hidden": torch.randn(2 * B, T, H, device=device),
        "ref_weight": torch.randn(V, H, device=device),
        "ref_bias": torch.randn(V, device=device),
    }
    if packed:
        x, labels = x.flatten(0, 1), labels.flatten()
        ref["ref_hidden"] = ref["ref_hidden"].flatten(0, 1)
        ref["cu_seqlens"] = torch.arange(2 * B + 1, dtype=torch.int32, device=device) * T
    function, _ = counted(model)
    out, eager = (
        function(x, labels, **ref, return_stats=True),
        model(x, labels, **ref, return_stats=True),
    )
    assert eager.plan is not None
    torch.testing.assert_close(out.losses, eager.losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.ref_chosen_logps, eager.ref_chosen_logps)
    assert torch.equal(out.token_stats.is_top1, eager.token_stats.is_top1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for mine, true in zip(
        torch.autograd.grad(out.loss, parameters),
        torch.autograd.grad(eager.loss, parameters),
        strict=True,
    ):
        torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-7)


def test_kto(device):
    model = Model(KTO(0.1), trains_head=False).to(device)
    x, labels = batch(device)
    keywords = {
        "ref_logps": torch.randn(2 * B, device=device) - 30,
        "desirable": torch.tensor([True, False] * B, device=device),
        "mismatched_log_ratios": torch.randn(4, device=device),
    }
    out, eager = counted(model)[0](x, labels, **keywords), model(x, labels, **keywords)
    torch.testing.assert_close(out.losses, eager.losses)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++ on a CPU")
@pytest.mark.long
def test_layouts_under_inductor(device):
    """The gradient has the strides that the compiler expects, for any strides of hidden."""
    x = torch.randn(2 * T, H, device=device, requires_grad=True)
    weight = torch.randn(V, H, device=device)
    labels = torch.randint(V, (2 * T,), device=device)

    def logprobs(x):
        return prefkern.linear_logprobs((x.t().contiguous() * 2).t(), weight, labels)

    (mine,) = torch.autograd.grad(torch.compile(logprobs, fullgraph=True)(x).sum(), x)
    (true,) = torch.autograd.grad(logprobs(x).sum(), x)
    torch.testing.assert_close(mine, true)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++ on a CPU")
@pytest.mark.long
def test_the_compiler_that_users_have(device):
    """inductor itself, once: the whole step in one graph."""
    model = Model(DPO(0.1), trains_head=True).to(device)
    x, labels = batch(device)
    ref_logps = torch.randn(2 * B, device=device)
    function = torch.compile(model, fullgraph=True)
    out, eager = function(x, labels, ref_logps=ref_logps), model(x, labels, ref_logps=ref_logps)
    torch.testing.assert_close(out.loss, eager.loss)
    parameters = list(model.parameters())
    for mine, true in zip(
        torch.autograd.grad(out.loss, parameters),
        torch.autograd.grad(eager.loss, parameters),
        strict=True,
    ):
        torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("spoiled", ["ruled out", "NaN", "reference"])
@pytest.mark.long(spoiled=["NaN", "reference"])
@pytest.mark.long(packed=True)
def test_what_is_not_finite_stays_in_its_pair(spoiled, packed, device):
    """As without the compiler, the other pairs' losses and gradients do not change."""
    model = Model(DPO(0.1), trains_head=False).to(device)
    x, labels = batch(device)
    labels[labels == 7] = 8
    ref_hidden = torch.randn(2 * B, T, H, device=device)
    pair = 0
    if spoiled == "ruled out":
        model.head.bias.data[7] = -math.inf
        labels[pair + B, 5] = 7
    else:
        (x if spoiled == "NaN" else ref_hidden)[pair, 4, 0] = math.nan
    keywords = {"ref_weight": torch.randn(V, H, device=device)}
    if packed:
        x, ref_hidden, labels = (value.flatten(0, 1) for value in (x, ref_hidden, labels))
        keywords["cu_seqlens"] = torch.arange(0, 2 * B * T + 1, T, device=device)

    def losses(x):
        return model.loss(
            4 * torch.tanh(model.body(x)), model.head.weight, labels, model.head.bias,
            ref_hidden=ref_hidden, **keywords,
        ).losses  # fmt: skip

    found = []
    for function in (losses, counted(losses)[0]):
        leaf = x.clone().requires_grad_()
        values = function(leaf)
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
        found.append((values.detach(), gradient.view(2 * B, T, H)))
    (eager, true), (ours, mine) = found
    torch.testing.assert_close(ours, eager, equal_nan=True)
    others = [row for row in range(2 * B) if row % B != pair]
    assert ours[1:].isfinite().all() and mine[others].isfinite().all()
    torch.testing.assert_close(mine[others], true[others], rtol=1e-4, atol=1e-6)
    if spoiled == "ruled out":  # a loss of 0, since the rejected response is impossible
        assert ours[pair] == 0 and mine.isfinite().all()


def test_errors(device):
    model = Model(DPO(0.1), trains_head=False).to(device)
    x, labels = batch(device)
    ref_logps = torch.zeros(2 * B, device=device)
    function, _ = counted(model)
    out = function(x, labels, ref_logps=ref_logps)
    with pytest.raises(ValueError, match="comes from a compiled call"):
        diagnostics.gradient_balance(out)
    labels[0, 5] = V
    with pytest.raises(ValueError, match="labels must be in"):
        function(x, labels, ref_logps=ref_logps)
    flat, scored = x.flatten(0, 1), labels.clamp(max=V - 1).flatten()
    for wrong in ([0, 20, 10, 30, 40, 50, 60], [0, 10, 20, 30, 40, 50, 55]):
        cu_seqlens = torch.tensor(wrong, dtype=torch.int32, device=device)
        for ref in (
            {"ref_logps": ref_logps},
            {"ref_hidden": flat, "ref_weight": torch.randn(V, H, device=device)},
        ):
            with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to"):
                function(flat, scored, cu_seqlens=cu_seqlens, **ref)


@pytest.mark.parametrize("extra", ["none", "bias", "adapter", "divergence", "all"])
@pytest.mark.parametrize("trains_head", [False, True])
@pytest.mark.long(trains_head=False, extra=["bias", "divergence", "adapter"])
@pytest.mark.long(trains_head=True, extra=["none", "bias"])
def test_opcheck(trains_head, extra, device):
    hidden, labels = (value.flatten(0, 1) for value in batch(device))
    hidden.requires_grad_()
    M = len(labels)
    shapes = {
        "weight": (V, H), "bias": (V,), "lora_hidden": (M, 3), "lora_weight": (V, 3),
        "ref_hidden": (M, 5), "ref_weight": (V, 5), "ref_bias": (V,),
    }  # fmt: skip
    wanted = {
        "none": [], "bias": ["bias"], "adapter": ["lora_hidden", "lora_weight"],
        "divergence": ["ref_hidden", "ref_weight"], "all": [*shapes],
    }[extra]  # fmt: skip
    tensors = {
        name: torch.randn(shape, device=device) if name in ("weight", *wanted) else None
        for name, shape in shapes.items()
    }
    trained = ("weight", "bias") if trains_head else ()
    for name in (*trained, "lora_hidden", "lora_weight"):
        if tensors[name] is not None:
            tensors[name].requires_grad_()
    leaves = (hidden, *(tensors[name] for name in [*shapes][:4]))
    needs = tuple(x is not None and x.requires_grad for x in leaves)
    dtypes = (torch.float32, torch.float32)
    options = vars(compiled.Options(-100, 1.0, 8.0, 1.0, 64.0, "torch", *dtypes, *needs)).values()
    bounds = torch.tensor([0, 20, M], device=device)
    arguments = (hidden, *tensors.values(), labels, bounds, True, *options)
    torch.library.opcheck(compiled._forward_op, arguments)
    constant = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in arguments)
    outputs = compiled._forward_op(*constant)
    dlogps, dkl = torch.randn(2, M, device=device)
    grads = (dlogps, dkl if "ref_hidden" in wanted else None)
    torch.library.opcheck(
        compiled._backward_op, (*grads, *constant[:9], *outputs[7:], *needs, *options)
    )


def test_gradients_have_the_strides_that_the_compiler_was_told(device):
    """Of states that lie column by column, an adapter's too: row by row, as backward makes them."""
    M = 2 * T
    hidden, lora_hidden = torch.randn(H, M, device=device).t(), torch.randn(3, M, device=device).t()
    leaves = [x.requires_grad_() for x in (hidden, lora_hidden)]
    weight, lora_weight = torch.randn(V, H, device=device), torch.randn(V, 3, device=device)
    labels = torch.randint(V, (M,), device=device)

    def logprobs(hidden, lora_hidden):
        return prefkern.linear_logprobs(
            hidden, weight, labels, lora_hidden=lora_hidden, lora_weight=lora_weight
        )

    function = torch.compile(logprobs, fullgraph=True, backend="aot_eager_decomp_partition")
    mine = torch.autograd.grad(function(*leaves).sum(), leaves)
    for a, b in zip(mine, torch.autograd.grad(logprobs(*leaves).sum(), leaves), strict=True):
        torch.testing.assert_close(a, b)
    arguments = [torch.randn(M, device=device), None, hidden.detach(), weight, None]
    arguments += [lora_hidden.detach(), lora_weight, None, None, None, labels]
    needs = (True, False, False, True, False)
    dtypes = (torch.float32, torch.float32)
    options = vars(compiled.Options(-100, 1.0, None, 1.0, 64.0, "torch", *dtypes, *needs)).values()
    outputs = compiled._forward_op(*arguments[2:10], labels, None, False, *options)
    arguments += [*outputs[7:], *needs, *options]
    torch.library.opcheck(compiled._backward_op, tuple(arguments))


def test_tiles_have_what_the_room_for_kept_rows_leaves(device):
    """Room is made for all tokens, of which few are scored: plan and room stay within the bound."""
    M, V, workspace_mb = 1500, 8192, 64
    hidden = torch.randn(M, H, device=device, requires_grad=True)
    weight = torch.randn(V, H, device=device, requires_grad=True)
    labels = torch.randint(V, (M,), device=device)
    labels[::2] = -100

    def logprobs(hidden):
        return prefkern.linear_logprobs(
            hidden, weight, labels, workspace_mb=workspace_mb, softcap=12.0
        )

    counted(logprobs)[0](hidden)
    made = prefkern.last_plan()
    # Three quarters of the workspace hold all tokens in float32.
    room = M * V * 4
    assert room <= 0.75 * workspace_mb * 2**20
    assert made.tokens == made.kept_tokens == M // 2
    tiles = made.workspace_bytes - made.kept_bytes
    assert room + tiles <= workspace_mb * 2**20 and made.workspace_bytes < room


class NoSynchronisation(TorchDispatchMode):
    """Fails if a value of the device is waited for, which a recorded graph must not do."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("trains_head", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_what_a_graph_records_needs_no_synchronisation(
    packed, trains_head, is_compiled, device, monkeypatch
):
    """With a pretended capture on a CPU all tokens are computed, and the result is the same.

    Padding holds NaN, as attention may leave it there; it reaches neither values nor gradients.
    """
    model = Model(DPO(0.1), trains_head).to(device)
    _, labels = batch(device)
    states = torch.randn(2 * B, T, H, device=device)
    states[labels == -100] = float("nan")
    keywords = {"ref_logps": torch.randn(2 * B, device=device) - 30}
    if packed:
        states, labels = states.flatten(0, 1), labels.flatten()
        lengths = torch.tensor([0, 9, 13, 30, 31, 50, 60], dtype=torch.int32, device=device)
        keywords["cu_seqlens"] = lengths
    states.requires_grad_()

    def loss(states, labels):
        return model.loss(
            states, model.head.weight, labels, model.head.bias, return_stats=True, **keywords
        )

    eager = loss(states, labels)
    assert eager.plan.tokens == 35
    leaves = [states, *(p for p in model.head.parameters() if p.requires_grad)]
    wanted = torch.autograd.grad(eager.loss, leaves)
    assert all(g.isfinite().all() for g in wanted)
    monkeypatch.setattr(sequences, "is_capturing", lambda _: True)
    recorded = torch.compile(loss, fullgraph=True, backend="aot_eager") if is_compiled else loss
    recorded(states, labels)
    # A compiled function does not run under such a mode.
    with contextlib.nullcontext() if is_compiled else NoSynchronisation():
        out = recorded(states, labels)
        gradients = torch.autograd.grad(out.loss, leaves)
    assert prefkern.last_plan().tokens == 60
    torch.testing.assert_close(out.losses, eager.losses)
    assert torch.equal(out.chosen_lengths, eager.chosen_lengths)
    for mine, true in zip(out.token_stats, eager.token_stats, strict=True):
        assert mine.dtype == true.dtype
        torch.testing.assert_close(mine, true, rtol=1e-5, atol=1e-6)
    for mine, true in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-7)
    bad = labels.clone()
    bad.view(-1)[8] = V
    with pytest.raises(RuntimeError, match="labels must be in the vocabulary"):
        recorded(states, bad)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_graph_records_a_divergence(is_compiled, device, monkeypatch):
    """All tokens are computed; those that only fill the shape have neither value nor gradient."""
    _, labels = batch(device)
    hidden, ref_hidden = torch.randn(2, 2 * B, T, H, device=device)
    hidden[labels == -100] = ref_hidden[labels == -100] = math.nan
    weight = torch.randn(V, H, device=device, requires_grad=True)
    ref_weight, ref_bias = torch.randn(V, H, device=device), torch.randn(V, device=device)
    leaves, push = [hidden.requires_grad_(), weight], torch.randn(2 * B, T, device=device)

    def kl(hidden):
        # The bias sets the models apart at a token that is cleared.
        return prefkern.linear_kl(hidden, weight, labels, ref_hidden, ref_weight, ref_bias=ref_bias)

    eager = kl(hidden)
    wanted = torch.autograd.grad((push * eager.kl).sum(), leaves)
    monkeypatch.setattr(sequences, "is_capturing", lambda _: True)
    recorded = counted(kl)[0] if is_compiled else kl
    recorded(hidden)
    with contextlib.nullcontext() if is_compiled else NoSynchronisation():
        out = recorded(hidden)
        gradients = torch.autograd.grad((push * out.kl).sum(), leaves)
    assert prefkern.last_plan().tokens == 60
    for mine, true in zip((*out, *gradients), (*eager, *wanted), strict=True):
        assert true.isfinite().all()
        torch.testing.assert_close(mine, true, rtol=1e-4, atol=1e-5)
    assert all((value[labels == -100] == 0).all() for value in out)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("trains_head", [False, True])
def test_cuda_graph(trains_head, device):
    """The loss of a packed batch, forward and backward, recorded once and replayed on new input."""
    torch.manual_seed(0)
    model = Model(DPO(0.1), trains_head).to(device)
    x, labels = (value.flatten(0, 1) for value in batch(device))
    bounds = torch.arange(2 * B + 1, dtype=torch.int32, device=device) * T
    keywords = {"ref_logps": torch.randn(2 * B, device=device) - 30, "cu_seqlens": bounds}
    parameters = [p for p in model.parameters() if p.requires_grad]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            torch.autograd.grad(model(x, labels, **keywords).loss, parameters)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = model(x, labels, **keywords)
        gradients = torch.autograd.grad(out.loss, parameters)
    for _ in range(2):
        fresh_x, fresh_labels = (value.flatten(0, 1) for value in batch(device))
        x.copy_(fresh_x)
        labels.copy_(fresh_labels)
        graph.replay()
        eager = model(x, labels, **keywords)
        torch.testing.assert_close(out.losses, eager.losses, rtol=1e-4, atol=1e-4)
        for mine, true in zip(gradients, torch.autograd.grad(eager.loss, parameters), strict=True):
            torch.testing.assert_close(mine, true, rtol=1e-3, atol=1e-6)


def test_pairs_are_traced(device):
    """An objective alone, on given log-probs."""
    objective = objectives.build("adadpo", beta=0.1)

    def losses(sums, ref, lengths):
        return objective(Pairs.of_sequences(sums, ref, lengths)).losses

    sums, ref = torch.randn(2, 2 * B, device=device) - 20
    lengths = torch.arange(1, 2 * B + 1, device=device)
    function, _ = counted(losses)
    torch.testing.assert_close(function(sums, ref, lengths), losses(sums, ref, lengths))
