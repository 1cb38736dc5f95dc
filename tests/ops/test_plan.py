"""What a call costs: counted products and bytes against those of the plan."""

from __future__ import annotations

import itertools

import pytest
import torch

import prefkern
from prefkern.ops import call, plan, workspace
from prefkern.ops.operands import Operands
from prefkern_bench.measure import Meter

N, H, V = 512, 64, 8192
NHV = N * H * V
MIB = 2**20


def problem(
    case: str, dtype: torch.dtype, device: str, shape: tuple[int, int, int] = (N, H, V)
) -> tuple[torch.Tensor, ...]:
    """hidden, weight and labels; `case` says what is trained."""
    n, h, v = shape
    hidden = torch.randn(n, h, device=device, dtype=dtype)
    weight = torch.randn(v, h, device=device, dtype=dtype)
    hidden.requires_grad_(case in ("frozen", "trained"))
    weight.requires_grad_(case in ("head only", "trained"))
    return hidden, weight, torch.randint(v, (n,), device=device)


# The probabilities of all tokens in float32 are 16 MiB.
@pytest.mark.parametrize(
    ("case", "workspace_mb", "operations"),
    [
        ("forward", 0.5, 2),
        ("forward", 64, 2),
        ("frozen", 0.5, 4),
        ("frozen", 64, 4),
        ("trained", 0.5, 8),
        ("trained", 64, 6),
        ("head only", 0.5, 6),
        ("head only", 64, 4),
    ],
)
def test_operations_in_nhv(case, workspace_mb, operations, device):
    hidden, weight, labels = problem(case, torch.float32, device)
    with Meter() as meter:
        logps = prefkern.linear_logprobs(
            hidden, weight, labels, workspace_mb=workspace_mb, backend="torch"
        )
        if case != "forward":
            logps.sum().backward()
    made = prefkern.last_plan()
    assert made is not None
    # The Meter counts what the products' shapes say; the plan says what it meant to do.
    assert meter.operations / NHV == pytest.approx(operations, abs=1e-9)
    assert made.operations == meter.operations
    assert made.operations_nhv == operations


def test_a_workspace_between_keeps_some_tokens(device):
    """Each kept token saves 2HV operations, so the cost falls in steps."""
    costs = []
    for workspace_mb in (1, 12, 14, 16, 18):
        hidden, weight, labels = problem("trained", torch.float32, device)
        with Meter() as meter:
            out = prefkern.linear_logprobs(hidden, weight, labels, workspace_mb=workspace_mb)
            out.sum().backward()
        made = prefkern.last_plan()
        assert meter.operations == made.operations
        assert made.operations == (8 * N - 2 * made.kept_tokens) * H * V
        assert made.structure == ("one_pass" if made.kept_tokens == N else "two_pass")
        costs.append(meter.operations / NHV)
    assert costs == sorted(costs, reverse=True)
    assert costs[0] == 8 and costs[-1] == 6 and len({*costs}) == 5


def test_tokens_that_are_not_scored_cost_nothing(device):
    hidden, weight, labels = problem("frozen", torch.float32, device)
    labels[: N // 2] = -100
    with Meter() as meter:
        prefkern.linear_logprobs(hidden, weight, labels, backend="torch").sum().backward()
    assert meter.operations / NHV == pytest.approx(2.0, abs=1e-9)


def peak_beyond_outputs(case, dtype, device, shape, workspace_mb, **options) -> int:
    """Bytes at the peak beyond inputs, outputs and one float32 `[N, H]`."""
    hidden, weight, labels = problem(case, dtype, device, shape)
    labels[::3] = -100
    scored = int((labels != -100).sum())
    with Meter() as meter:
        out = prefkern.linear_logprobs(
            hidden, weight, labels, workspace_mb=workspace_mb, backend="torch", **options
        )
        if case != "forward":
            (out.logps if options.get("return_stats") else out).sum().backward()
    # D or dH in float32, and some numbers a token.
    allowed = 4 * scored * shape[1] + 200 * shape[0]
    allowed += sum(x.grad.nbytes for x in (hidden, weight) if x.grad is not None)
    return meter.peak_bytes - allowed


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("case", ["frozen", "trained"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("workspace_mb", [1, 4, 10])
def test_temporary_memory_stays_within_the_workspace(
    workspace_mb, dtype, case, stats, softcap, device
):
    options = {"return_stats": stats, "softcap": softcap}
    used = peak_beyond_outputs(case, dtype, device, (N, H, V), workspace_mb, **options)
    assert used <= 1.05 * workspace_mb * MIB


# Few tokens or many, a small or a large vocabulary, wide or narrow: (tokens, hidden, vocabulary).
SHAPES = [(1, 8192, 512), (24, 16384, 300), (60_000, 8, 40), (300, 16, 262_144), (2000, 640, 5000)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", ["forward", "frozen", "trained"])
@pytest.mark.long(shape=SHAPES[4], case="trained")
def test_8_mb_are_enough_for_any_shape(case, shape, device):
    used = peak_beyond_outputs(case, torch.bfloat16, device, shape, 8)
    assert used <= 1.05 * 8 * MIB


@pytest.mark.parametrize("case", ["forward", "frozen", "trained"])
def test_the_copies_that_autocast_makes_count(case, device):
    """float32 weights and states are rounded, and raised again on a CPU: three of each at once."""
    hidden, weight, labels = problem(case, torch.float32, device, (152, 1024, 12000))
    labels[::3] = -100
    with Meter() as meter, torch.autocast(device, torch.bfloat16):
        out = prefkern.linear_logprobs(hidden, weight, labels, workspace_mb=32, backend="torch")
        if case != "forward":
            out.sum().backward()
    allowed = 4 * 101 * 1024 + 200 * 152
    allowed += sum(x.grad.nbytes for x in (hidden, weight) if x.grad is not None)
    assert meter.peak_bytes - allowed <= 1.05 * 32 * MIB


COMMON = {
    "tokens": 16384,
    "vocab_size": 128256,
    "head": plan.HeadSize(4096, torch.bfloat16, False, torch.bfloat16, torch.bfloat16),
    "backend": "triton",
}


def test_the_plan_uses_the_workspace():
    """Not more than the bound, and not so little that the products become too narrow."""
    for workspace_mb, trained in itertools.product((8, 64, 512, 4096, 8192), (False, True)):
        made = plan.make_plan(
            **COMMON, gradients=plan.Gradients(True, trained, False), workspace_mb=workspace_mb
        )
        assert 0.5 * workspace_mb * MIB < made.workspace_bytes <= workspace_mb * MIB or (
            made.forward_tiles.token_tile == 16384
        )
        expected = 4 if not trained else 8 - 2 * made.kept_tokens / made.tokens
        assert made.operations_nhv == expected
    # At the last, everything is kept, and the tiles beside it are of a size worth having.
    assert made.kept_tokens == 16384 and made.structure == "one_pass"
    assert made.forward_tiles.token_tile >= 1024 and made.forward_tiles.vocab_tile >= 8192


def test_a_fold_reads_its_rows_once():
    """Tiles of many tokens are no wider than a row that the fold's kernel holds.

    The bound is the Triton backend's. For a divergence rows are read twice at any width: tiles are
    as wide as the workspace allows.
    """
    head = plan.HeadSize(1024, torch.bfloat16, False, torch.bfloat16, torch.bfloat16)
    given = {**COMMON, "head": head, "gradients": plan.Gradients(True, False, False)}

    def tile(**options) -> int:
        return plan.make_plan(**{**given, "workspace_mb": 640, **options}).forward_tiles.vocab_tile

    assert tile() == plan.FOLD_ENTRIES == tile(workspace_mb=4096)
    assert tile(gradients=plan.Gradients(False, False, False)) == plan.FOLD_ENTRIES
    assert tile(has_softcap=True) == plan.FOLD_ENTRIES
    wider = {"torch": {"backend": "torch"}}
    wider["divergence"] = {"reference": head, "with_divergence": True}
    for name, options in wider.items():
        assert tile(**options) > plan.FOLD_ENTRIES, name


def test_a_gpu_has_no_float32_copy_of_a_heads_gradient():
    """However much a workspace allows, a tile of dW is a part of the vocabulary."""
    given = {**COMMON, "gradients": plan.Gradients(True, True, False), "workspace_mb": 60_000}
    made = plan.make_plan(**given)
    assert made.structure == "one_pass" and made.backward_tiles is not None
    assert made.backward_tiles.vocab_tile == 32_768 < made.vocab_size
    of_torch = plan.make_plan(**{**given, "backend": "torch"}).backward_tiles
    assert of_torch is not None and of_torch.vocab_tile == made.vocab_size


def test_the_default_has_room_for_what_a_trained_head_keeps(monkeypatch):
    """On a GPU of 141 GB that is 1/128 of its memory, and 1/24 if the head or its adapter is trained."""
    properties = type("Properties", (), {"total_memory": 141 * 10**9})()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    size = {"device": "cuda", "backend": "triton"}

    def most(**options) -> float:
        made = prefkern.plan_for(10**6, 4096, 128256, **size, **options)
        return made.workspace_bytes / 141e9

    monkeypatch.setattr(
        "prefkern.ops.logprobs.operands_for", lambda *_: Operands(torch.bfloat16, False)
    )
    monkeypatch.setattr(call, "resolve_backend", lambda backend, *_, **__: backend)
    assert 1 / 300 < most() <= 1 / 128
    assert 1 / 26 < most(trains_head=True) <= 1 / 24
    assert 1 / 26 < most(lora_rank=8) <= 1 / 24
    # At 16,384 tokens it holds all probabilities, and a call takes no more than these and its tiles.
    made = prefkern.plan_for(16384, 4096, 128256, **size, trains_head=True)
    assert made.structure == "one_pass" and made.operations_nhv == 6
    assert made.workspace_bytes < made.kept_bytes + 1300 * MIB
    for total, share, expected in (
        (8e9, False, 256),
        (8e9, True, 8e9 / 24 / MIB),
        (1e9, True, 256),
    ):
        assert workspace.workspace_of_gpu(total, share) == pytest.approx(expected)
    assert workspace.default_workspace_mb(torch.device("cpu"), trains_head=True) == 64


def test_a_small_batch_is_one_tile():
    for gradients in (plan.Gradients(True, False, False), plan.Gradients(True, True, False)):
        made = plan.make_plan(**{**COMMON, "tokens": 256}, gradients=gradients, workspace_mb=1024)
        assert (made.forward_tiles.token_tile, made.forward_tiles.vocab_tile) == (256, 128256)


@pytest.mark.parametrize("tokens", [0, 1, 5, 17, 1000])
@pytest.mark.parametrize("vocab_size", [1, 127, 128, 129, 5000])
@pytest.mark.parametrize("budget", [1, 10_000, 10_000_000])
def test_tiles_exist_for_any_shape(tokens, vocab_size, budget):
    tiles = plan.choose_tiles(tokens, vocab_size, budget, logit=4, token=100, entry=100)
    assert 1 <= tiles.token_tile <= max(tokens, 1)
    assert 1 <= tiles.vocab_tile <= vocab_size
    smallest = tiles.token_tile <= 16 and tiles.vocab_tile <= 128
    assert tiles.bytes <= budget or smallest


def test_last_plan_is_per_thread(device):
    import threading

    seen = []
    prefkern.linear_logprobs(*problem("frozen", torch.float32, device))
    thread = threading.Thread(target=lambda: seen.append(prefkern.last_plan()))
    thread.start()
    thread.join()
    assert seen == [None] and prefkern.last_plan() is not None


def test_plan_for_is_the_plan_that_runs(device):
    hidden, weight, labels = problem("trained", torch.bfloat16, device)
    prefkern.linear_logprobs(hidden, weight, labels, workspace_mb=3, softcap=5.0)
    made = prefkern.plan_for(
        N, H, V, dtype=torch.bfloat16, device=device, trains_head=True, softcap=True,
        workspace_mb=3,
    )  # fmt: skip
    assert made == prefkern.last_plan()


def test_plan_for_a_gpu_that_is_not_here():
    """Any machine can compute the cost of a call: here of a trained Llama-3-8B head on a GPU."""
    made = prefkern.plan_for(
        16384, 4096, 128256, device="cuda", trains_head=True, workspace_mb=6000
    )
    assert made.backend == "triton" and made.structure == "one_pass"
    assert made.operations_nhv == 6
    assert made.kept_bytes == 16384 * 128256 * 2
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="workspace_mb must be given"):
            prefkern.plan_for(16384, 4096, 128256, device="cuda")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 8, 8), "tokens must be"),
        ((8, 0, 8), "hidden_size must be"),
        ((8, 8, 2.5), "vocab_size must be"),
    ],
)
def test_plan_for_refuses_no_shape(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        prefkern.plan_for(*arguments)


def temporary_bytes(score, case: str, shape: tuple[int, int, int]) -> int:
    """Peak beyond the inputs and the gradients that a call returns."""
    hidden, weight, labels = problem(case, torch.bfloat16, "cpu", shape)
    with Meter() as meter:
        logps = score(hidden, weight, labels)
        if case != "forward":
            logps.sum().backward()
    grads = [x.grad for x in (hidden, weight) if x.grad is not None]
    return meter.peak_bytes - sum(grad.nbytes for grad in grads)


def in_memory(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logps = (hidden @ weight.T).float().log_softmax(-1)
    return logps.gather(-1, labels[:, None]).squeeze(-1)


@pytest.mark.parametrize("shape", [(512, 64, 49152), (2048, 128, 8192)], ids=str)
@pytest.mark.parametrize("case", ["forward", "frozen", "trained"])
def test_by_default_a_cpu_takes_a_quarter_of_the_memory_of_logits(case, shape):
    ours = temporary_bytes(prefkern.linear_logprobs, case, shape)
    eager = temporary_bytes(in_memory, case, shape)
    assert ours <= eager / 4


@pytest.mark.parametrize(("case", "tokens"), [("frozen", 4096), ("trained", 4096)])
def test_a_large_call_on_a_cpu_has_64_mib(case, tokens):
    size = {"dtype": torch.float32, "device": "cpu", "trains_head": case == "trained"}
    made = prefkern.plan_for(tokens, 64, 32768, **size)
    assert 0.75 * 64 * MIB <= made.workspace_bytes <= 64 * MIB


def test_a_default_that_shrinks_keeps_all_probabilities_of_a_small_batch():
    for tokens in (1, 64, 512):
        for dtype in (torch.bfloat16, torch.float32):
            made = prefkern.plan_for(tokens, 64, 16384, dtype=dtype, device="cpu", trains_head=True)
            assert made.kept_tokens == tokens
