"""A CPU with bfloat16 units: what is multiplied how, and the errors that result.

`units` makes any CPU do what one with such units does: torch multiplies bfloat16 tensors on all of
them, though slowly on some.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

import prefkern
from prefkern import reference
from prefkern.ops import cpu, operands, passes, plan, sequences
from support.logprobs import relative
from support.processes import environment

BF16 = torch.bfloat16


@pytest.fixture(params=["wide", "rounded"])
def units(request, monkeypatch, device):
    """bfloat16 units, with products for logits whose result is float32, or without them."""
    if device != "cpu":
        pytest.skip("the products of a CPU")
    wide = request.param == "wide"
    monkeypatch.setattr(cpu, "has_bfloat16_units", lambda: True)
    monkeypatch.setattr(cpu, "has_wide_product", lambda: wide)
    return request.param


def problem(
    N: int = 64, H: int = 32, V: int = 3000, spread: float = 2.0, confident: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """bfloat16 hidden states and weight, labels, and the gradient: one number a sequence."""
    hidden = torch.randn(N, H).to(BF16)
    weight = (torch.randn(V, H) * spread / H**0.5).to(BF16)
    labels = torch.randint(V, (N,))
    if confident:
        labels = (hidden.float() @ weight.float().T).argmax(1)
    grad = torch.randn(8, 1).expand(8, N // 8).reshape(-1).contiguous()
    return hidden, weight, labels, grad


def gradients(function, hidden, weight, labels, grad, dtype=BF16, **options) -> list[Tensor]:
    """Log-probs and the gradients of hidden and weight."""
    leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in (hidden, weight)]
    logps = function(leaves[0], leaves[1], labels, **options)
    (logps * grad.to(logps.dtype)).sum().backward()
    return [logps.detach(), *(x.grad for x in leaves)]


@pytest.mark.parametrize("workspace_mb", [64, 0.3])
@pytest.mark.parametrize("confident", [False, True])
@pytest.mark.parametrize("spread", [0.5, 2.0, 5.0, 10.0, 20.0])
def test_errors_are_at_most_those_of_logits_in_memory(units, spread, confident, workspace_mb):
    case = problem(spread=spread, confident=confident)
    truth = gradients(reference.linear_logprobs, *case, dtype=torch.float64)
    eager = gradients(reference.linear_logprobs, *case)
    ours = gradients(prefkern.linear_logprobs, *case, workspace_mb=workspace_mb, backend="torch")
    made = prefkern.last_plan()
    assert (made.kept_tokens == made.tokens) == (workspace_mb == 64)
    # Sums of logits in float32: as with operands that are raised.
    assert (ours[0] - truth[0]).abs().max() < 1e-5 * max(spread / 5, 1)
    for mine, theirs, true in zip(ours[1:], eager[1:], truth[1:], strict=True):
        once = relative(true.to(BF16), true)
        assert relative(mine, true) < 1.35 * once
        assert relative(mine, true) < 1.02 * relative(theirs, true)


def alike(of_states: float = 0.0, of_weight: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States, or rows of the weight, with a common part; chosen tokens first, then rejected ones.

    Their gradients cancel in the sum, but not in one half of it.
    """
    hidden, weight, labels, _ = problem(N=512, H=64, V=4096, spread=0.5)
    hidden = (hidden + of_states * torch.randn(64)).to(BF16)
    weight = (weight + of_weight * torch.randn(64) / 64**0.5).to(BF16)
    return hidden, weight, labels, torch.ones(512).index_fill(0, torch.arange(256, 512), -1) / 20


@pytest.mark.parametrize("workspace_mb", [64, 2.5, 1, 0.3])
@pytest.mark.parametrize("case", [{"of_states": 10.0}, {"of_weight": 10.0}])
def test_sums_that_cancel_are_no_worse_than_with_logits_in_memory(units, case, workspace_mb):
    case = alike(**case)
    truth = gradients(reference.linear_logprobs, *case, dtype=torch.float64)
    eager = gradients(reference.linear_logprobs, *case)
    ours = gradients(prefkern.linear_logprobs, *case, workspace_mb=workspace_mb, backend="torch")
    made = prefkern.last_plan()
    assert passes.splits_tokens(made) == (workspace_mb < 64)
    compiled = torch.compile(prefkern.linear_logprobs, backend="eager", fullgraph=True)
    traced = gradients(compiled, *case, workspace_mb=workspace_mb, backend="torch")
    assert (ours[0] - truth[0]).abs().max() < 2e-5
    torch.testing.assert_close(traced[0], ours[0], rtol=0, atol=1e-5)
    for result in (ours, traced):
        for mine, theirs, true in zip(result[1:], eager[1:], truth[1:], strict=True):
            assert relative(mine, true) < 1.02 * relative(theirs, true)


@pytest.mark.parametrize("workspace_mb", [64, 0.3])
def test_a_bias_that_fits_the_labels_has_an_exact_gradient(units, workspace_mb):
    """The labels' terms and the probabilities' cancel, and are rounded once, together."""
    V = 2000
    hidden, weight, _, _ = problem(N=512, H=32, V=V, spread=0.2)
    of_entries = torch.arange(1, V + 1).float() ** -1.1
    labels = torch.multinomial(of_entries, 512, replacement=True)
    offset = of_entries.log()

    def gradient(function, dtype, **options):
        bias = offset.to(BF16).to(dtype, copy=True).requires_grad_()
        function(hidden.to(dtype), weight.to(dtype), labels, bias, **options).sum().backward()
        return bias.grad

    truth = gradient(reference.linear_logprobs, torch.float64)
    mine = gradient(prefkern.linear_logprobs, BF16, workspace_mb=workspace_mb, backend="torch")
    assert relative(mine, truth) < 1.1 * relative(truth.to(BF16), truth)


@pytest.mark.parametrize("workspace_mb", [64, 0.3])
@pytest.mark.parametrize("trains_head", [False, True])
def test_a_divergence_between_near_models_has_exact_gradients(units, trains_head, workspace_mb):
    """Its gradient is a small difference of two sums: none of them may be rounded before."""
    hidden, weight, labels, _ = problem(V=1000)
    near = (hidden + 0.02 * torch.randn(hidden.shape)).to(BF16)

    def run(function, dtype, **options):
        h, w, r = (x.to(dtype, copy=True) for x in (hidden, weight, near))
        leaves = [h.requires_grad_(), w.requires_grad_(trains_head)]
        out = function(h, w, labels, ref_hidden=r, ref_weight=w.detach(), **options)
        out.kl.sum().backward()
        return [x.grad for x in leaves if x.requires_grad]

    truth = run(reference.linear_kl, torch.float64)
    ours = run(prefkern.linear_kl, BF16, workspace_mb=workspace_mb, backend="torch")
    for mine, true in zip(ours, truth, strict=True):
        assert relative(mine, true) < 1.05 * relative(true.to(BF16), true)


@pytest.mark.parametrize("count", [1, 2, 3, 8, 55, 512, 1000])
def test_a_run_of_mixed_tokens_is_spread_over_all(count):
    labels = torch.arange(count) % 7
    mixed, places = sequences.Scored(None, labels, None, count).mixed()
    assert torch.equal(mixed.rows.sort().values, torch.arange(count))
    assert torch.equal(mixed.rows[places], torch.arange(count))
    assert torch.equal(mixed.labels, labels[mixed.rows])
    is_first = (mixed.rows < count // 2).double()
    for run in is_first.split(16):
        assert abs(run.mean() - is_first.mean()) * len(run) <= 3


@pytest.mark.parametrize("trained", ["bias", "adapter"])
def test_the_terms_at_the_labels_reach_every_gradient(units, trained):
    hidden, weight, labels, grad = problem(spread=0.5)
    labels[:20], labels[40] = labels[0], -100
    tensors = {"bias": torch.randn(len(weight)).to(BF16)}
    if trained == "adapter":
        tensors = {
            "lora_hidden": torch.randn(len(hidden), 4).to(BF16),
            "lora_weight": torch.randn(len(weight), 4).to(BF16) / 8,
        }

    def run(function, dtype):
        given = {k: x.to(dtype, copy=True).requires_grad_() for k, x in tensors.items()}
        own = {
            k: x.to(dtype, copy=True).requires_grad_()
            for k, x in (("hidden", hidden), ("weight", weight))
        }
        logps = function(own["hidden"], own["weight"], labels, **given)
        (logps * grad.to(logps.dtype)).sum().backward()
        return [x.grad for x in (*own.values(), *given.values())]

    truth = run(reference.linear_logprobs, torch.float64)
    for mine, true in zip(run(prefkern.linear_logprobs, BF16), truth, strict=True):
        assert relative(mine, true) < 1.35 * relative(true.to(BF16), true)


def test_gradients_are_made_by_products_of_bfloat16(units, monkeypatch):
    dtypes, product = [], torch.mm
    monkeypatch.setattr(
        torch, "mm", lambda a, b, **k: dtypes.append((a.dtype, b.dtype)) or product(a, b, **k)
    )
    gradients(prefkern.linear_logprobs, *problem(), backend="torch")
    # Of logits, of hidden's gradient in four parts of the vocabulary, of the weight's.
    of_logits = [] if units == "wide" and cpu._brgemm() else [(torch.float32,) * 2]
    assert dtypes == [*of_logits, *[(BF16,) * 2] * 4, (BF16,) * 2]
    made = prefkern.last_plan()
    assert made.kept_bytes == 2 * made.tokens * plan.kept_row(made.vocab_size)


@pytest.mark.parametrize("tokens", [8, 64, 512])
@pytest.mark.parametrize("trains_head", [False, True])
def test_no_tile_is_a_block_that_the_allocator_maps_afresh(units, trains_head, tokens):
    """Of logits, or of the weights that are raised: glibc maps what is above 32 MiB each time.

    Weights that are not raised take no block, and tiles of logits are for a cache.
    """
    size = {"device": "cpu", "trains_head": trains_head, "workspace_mb": 256}
    made = prefkern.plan_for(tokens, 576, 49152, dtype=BF16, **size)
    raised, most = (0, 2**23) if units == "wide" else (576, 2**25)
    forward = made.forward_tiles
    assert 4 * forward.vocab_tile * max(forward.token_tile, raised) <= most
    if trains_head:
        assert 4 * made.backward_tiles.vocab_tile * max(made.backward_tiles.token_tile, 576) < 2**25
    # Other dtypes have the tiles that they had.
    other = prefkern.plan_for(8, 576, 49152, dtype=torch.float32, device="cpu", workspace_mb=256)
    assert 4 * other.forward_tiles.vocab_tile * 576 > 2**25


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_other_dtypes_are_multiplied_as_everywhere(units, dtype):
    assert operands.operands_for(dtype, "cpu") == operands.Operands(dtype, dtype == torch.float16)


def test_the_reference_s_pass_gives_the_policy_s_numbers(units):
    hidden, weight, labels, grad = problem()
    logps, *_ = gradients(prefkern.linear_logprobs, hidden, weight, labels, grad)
    with torch.no_grad():
        alone = prefkern.linear_logprobs(hidden, weight, labels)
    assert torch.equal(alone, logps)


RUN = """
import torch
import prefkern
from prefkern.ops import cpu

torch.manual_seed(0)
hidden, weight = torch.randn(64, 32).bfloat16(), torch.randn(3000, 32).bfloat16() / 4
hidden.requires_grad_()
weight.requires_grad_()
labels = torch.arange(64) * 37
logps = prefkern.linear_logprobs(hidden, weight, labels)
logps.sum().backward()
print(cpu.has_bfloat16_units())
print(logps.double().sum().item().hex())
for x in (hidden, weight):
    print(x.grad.double().abs().sum().item().hex())
"""


def numbers(**variables: str) -> tuple[bool, list[float]]:
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        env={k: v for k, v in environment().items() if k != cpu.SWITCH} | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    has_units, *values = done.stdout.split()
    return has_units == "True", [float.fromhex(value) for value in values]


@pytest.mark.skipif(sys.platform != "linux", reason="oneDNN's name for x86 processors")
@pytest.mark.parametrize(
    "told",
    [
        {"ONEDNN_MAX_CPU_ISA": "AVX2"},
        # torch has no blocks of bfloat16 operands for it, and ends a process that asks for one.
        {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
        {"DNNL_MAX_CPU_ISA": "avx512_core_vnni"},
    ],
)
def test_without_units_products_are_float32_s(told):
    """A processor that is told to have none, and the switch, give the same numbers."""
    told, switched = numbers(**told), numbers(PREFKERN_CPU_BF16="0")
    assert not told[0] and not switched[0]
    assert told[1] == switched[1]
    _, own = numbers()
    # Log-probs come from float32 sums either way; gradients are rounded to bfloat16.
    assert own[0] == pytest.approx(told[1][0], rel=1e-6)
    assert own[1:] == pytest.approx(told[1][1:], rel=1e-3)


def test_the_switch_is_a_variable_of_the_environment(monkeypatch):
    caches = (cpu._has_units, cpu._brgemm, cpu.has_wide_product)
    for each in caches:
        each.cache_clear()
    monkeypatch.setenv(cpu.SWITCH, "0")
    try:
        assert not cpu.has_bfloat16_units() and not cpu.has_wide_product()
    finally:
        for each in caches:
            each.cache_clear()
