"""Out of memory, injected at every allocation of a small call: a right result or an error, nothing between.

`Allocator` replaces the device's: it refuses the chosen ones of a call's fresh tensors, with the
exception of a CPU or of a GPU. Results are compared with float64; tensors that must not change,
bitwise.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import threading
import warnings
import weakref
from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import prefkern
from prefkern import objectives, reference
from prefkern.ops import memory, sequences, workspace
from support import tiny
from support.logprobs import relative
from support.machine import BACKENDS, DEVICE
from support.ranks import group_of_one, run_on_two_ranks

B, T, H, V = 2, 9, 8, 300
# A few tiles of tokens and entries, which can be halved.
WORKSPACE_MB = 0.06
REFUSALS = {
    "gpu": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB. GPU 0"),
    # Torch's own message; `test_a_cpu_refuses_in_these_words` checks it.
    "cpu": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 1073741824 bytes. Error code 12 (Cannot allocate memory)"
    ),
}


class Allocator(TorchDispatchMode):
    """Refuses a fresh tensor if `refuses(its number, its bytes)`; records those that it gave."""

    def __init__(
        self, refuses: Callable[[int, int], bool] = lambda k, size: False, device: str = "gpu"
    ) -> None:
        super().__init__()
        self.refuses, self.refusal = refuses, REFUSALS[device]
        self.count = self.refused = 0
        self.given: list[weakref.ref] = []
        self.alive_at_retry: list[tuple[int, ...]] | None = None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.refused and self.alive_at_retry is None:
            alive = [tensor() for tensor in self.given]
            self.alive_at_retry = [tuple(x.shape) for x in alive if x is not None]
        out = function(*args, **kwargs)
        old = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if is_tensor(x)}
        for x in tree_leaves(out):
            if is_tensor(x) and x.untyped_storage().data_ptr() not in old and x.numel():
                self.count += 1
                if self.refuses(self.count, x.untyped_storage().nbytes()):
                    self.refused += 1
                    raise self.refusal()
                self.given.append(weakref.ref(x))
        return out


def is_tensor(x: object) -> bool:
    return isinstance(x, torch.Tensor)


class Call:
    """A differentiable call: its leaves, the trained ones, and the truth in float64."""

    def __init__(self, fused: Callable, oracle: Callable, trains: tuple[str, ...], **tensors):
        self.fused, self.oracle, self.trains, self.tensors = fused, oracle, trains, tensors

    def leaves(self, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        made = {
            name: x.to(DEVICE, dtype if x.is_floating_point() else x.dtype, copy=True)
            for name, x in self.tensors.items()
        }
        for name in self.trains:
            made[name].requires_grad_()
        return made

    def expected(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        leaves = self.leaves(torch.float64)
        loss = self.oracle(**leaves)
        if self.trains:
            loss.backward()
        return loss.detach(), {name: leaves[name].grad for name in self.trains}


def tensors(**more: torch.Tensor) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    labels = torch.randint(V, (2 * B, T))
    labels[:, 0] = -100
    labels[1, 4:] = -100
    return {
        "hidden": torch.randn(2 * B, T, H),
        "weight": torch.randn(V, H),
        "bias": torch.randn(V),
        "labels": labels,
        **more,
    }


def weighed(call: Callable, **options) -> Callable:
    """A scalar of per-token numbers in which every token has a different weight."""

    def loss(**leaves: torch.Tensor) -> torch.Tensor:
        out = call(**leaves, **options)
        values = [out.logps, out.kl] if isinstance(out, prefkern.TokenKL) else [out]
        scale = torch.linspace(-1, 2, values[0].numel()).to(values[0])
        return sum((x.flatten() * scale).sum() for x in values)

    return loss


def of_loss(objective, **options) -> tuple[Callable, Callable]:
    def fused(**leaves: torch.Tensor) -> torch.Tensor:
        loss_fn = prefkern.FusedPreferenceLoss(copy.deepcopy(objective), **options)
        return loss_fn(**leaves).loss

    def oracle(**leaves: torch.Tensor) -> torch.Tensor:
        return reference.preference_loss(copy.deepcopy(objective), **leaves).loss

    return fused, oracle


def call(name: str, backend: str = "torch", workspace_mb: float | None = WORKSPACE_MB) -> Call:
    options = {"workspace_mb": workspace_mb, "backend": backend}
    head = ("hidden", "weight", "bias")
    logprobs = (
        weighed(prefkern.linear_logprobs, **options),
        weighed(reference.linear_logprobs),
    )
    kl = (weighed(prefkern.linear_kl, **options), weighed(reference.linear_kl))
    ref = {"ref_hidden": torch.randn(2 * B, T, 6), "ref_weight": torch.randn(V, 6)}
    lora = {"lora_hidden": torch.randn(2 * B, T, 3), "lora_weight": torch.randn(V, 3)}
    if name == "scores":
        return Call(*logprobs, (), **tensors())
    if name == "frozen head":
        return Call(*logprobs, ("hidden",), **tensors())
    if name == "trained head":
        return Call(*logprobs, head, **tensors())
    if name == "adapter":
        return Call(*logprobs, ("hidden", *lora), **tensors(**lora))
    if name == "kl":
        return Call(*kl, ("hidden",), **tensors(**ref))
    if name == "kl, trained head":
        return Call(*kl, head, **tensors(**ref))
    if name == "loss":
        return Call(*of_loss(objectives.DPO(0.3), **options), head, **tensors(**ref))
    assert name == "tdpo"
    return Call(*of_loss(objectives.TDPO2(0.3, 0.5), **options), head, **tensors(**ref))


def assert_right(name: str, loss, leaves, expected) -> None:
    value, gradients = expected
    torch.testing.assert_close(loss.detach().double(), value, rtol=1e-5, atol=1e-5)
    for leaf, true in gradients.items():
        assert relative(leaves[leaf].grad, true) < 1e-5, (name, leaf)


def attempt(
    made: Call, allocator: Allocator, grads: dict[str, torch.Tensor] | None = None
) -> tuple[torch.Tensor | None, dict[str, torch.Tensor], RuntimeError | None]:
    """Loss and leaves, with gradients added to existing ones; or the error."""
    leaves = made.leaves()
    for name, grad in (grads or {}).items():
        leaves[name].grad = grad.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            with allocator:
                loss = made.fused(**leaves)
                if made.trains:
                    loss.backward()
        except RuntimeError as error:
            return None, leaves, error
    return loss.detach(), leaves, None


# Workspaces of which a pass has a tile or a few, and smaller ones are to be had.
EVERY = {
    "scores": 0.06,
    "frozen head": 0.06,
    "trained head": 0.06,
    "adapter": 0.1,
    "kl": 0.1,
    "kl, trained head": 0.1,
    "loss": 0.06,
    "tdpo": 0.1,
}


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("name", EVERY)
def test_at_every_allocation(name, lasting, request):
    """The k-th fresh tensor is refused, alone or with all later ones.

    The result is right, or an error that changes nothing.

    Some k, spread over all; with --long each.
    """
    made = call(name, workspace_mb=EVERY[name])
    expected = made.expected()
    counted = Allocator()
    loss, leaves, error = attempt(made, counted)
    assert error is None
    assert_right(name, loss, leaves, expected)
    # Gradients of an earlier call, of the size of this one's.
    marks = {leaf: grad.float().roll(1, -1) for leaf, grad in expected[1].items()}
    stride = 1 if request.config.getoption("--long") else 13 if lasting else 7
    tried = range(1 + torch.randint(stride, ()).item(), counted.count + 1, stride)
    retried = 0
    for k in tried:
        device = "gpu" if k % 2 else "cpu"
        allocator = Allocator(lambda n, size, k=k: n >= k if lasting else n == k, device)
        loss, leaves, error = attempt(made, allocator, marks)
        assert allocator.refused
        if error is not None:
            assert memory.is_out_of_memory(error)
            for leaf, mark in marks.items():
                assert torch.equal(leaves[leaf].grad, mark), (k, leaf)
            continue
        retried += 1
        with torch.no_grad():
            for leaf, mark in marks.items():
                leaves[leaf].grad -= mark
        assert_right(f"{name} at {k}", loss, leaves, expected)
    # Outside the passes, and after the second refusal, there is nothing to halve.
    assert retried == 0 if lasting else retried > len(tried) / 2


def step(function: Callable, leaves: dict[str, torch.Tensor]) -> torch.Tensor:
    loss = function(**leaves)
    loss.backward()
    return loss


def refused_once(size: int, device: str = "gpu") -> Allocator:
    """An allocator that refuses the first request for so many bytes."""
    allocator = Allocator(device=device)
    allocator.refuses = lambda k, nbytes: nbytes >= size and not allocator.refused
    return allocator


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("device", REFUSALS)
@pytest.mark.long(backend="triton")
def test_a_tile_of_forward_is_halved(device, backend):
    """The warning says what was tried and what comes next; the plan that ran is recorded."""
    made = call("loss", backend)
    leaves = made.leaves()
    loss_fn = prefkern.FusedPreferenceLoss(
        objectives.DPO(0.3), workspace_mb=WORKSPACE_MB, backend=backend
    )
    first = loss_fn(**leaves).plan
    assert (first.structure, first.kept_bytes) == ("one_pass", 34560)
    with (
        pytest.warns(RuntimeWarning, match="out of memory in the forward pass") as caught,
        refused_once(first.kept_bytes, device) as allocator,
    ):
        out = loss_fn(**leaves)
    # An older triton's interpreter warns of numpy's ways.
    (warning,) = [each for each in caught if each.category is RuntimeWarning]
    out.loss.backward()
    assert f"workspace_mb={WORKSPACE_MB} (one_pass, 0.0397 MiB" in str(warning.message)
    assert "trying once more with workspace_mb=0.01983 (two_pass" in str(warning.message)
    assert allocator.refused == 1
    assert out.plan == prefkern.last_plan() != first
    assert 0 < out.plan.workspace_bytes <= (first.kept_bytes + first.forward_tiles.bytes) / 2
    assert_right("loss", out.loss, leaves, made.expected())


def test_after_a_larger_default_there_is_the_default_of_other_calls(monkeypatch):
    """On a GPU a trained head has more by default; half of it may still be too much."""

    def default(device, trains_head=False):
        return WORKSPACE_MB if trains_head else WORKSPACE_MB / 8

    monkeypatch.setattr(workspace, "default_workspace_mb", default)
    made = call("trained head", workspace_mb=None)
    _, _, error = attempt(made, Allocator())
    assert error is None
    first = prefkern.last_plan()
    loss, leaves, error = attempt(made, refused_once(first.kept_bytes))
    assert error is None
    assert 0 < prefkern.last_plan().workspace_bytes <= WORKSPACE_MB / 8 * memory.MIB
    assert prefkern.last_plan().workspace_bytes < first.workspace_bytes / 2
    assert_right("trained head", loss, leaves, made.expected())


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_gives_back_what_forward_kept(backend):
    """Probabilities are freed and computed again in half the memory, in a second backward too."""
    made = call("trained head", backend)
    leaves = made.leaves()
    loss = made.fused(**leaves)
    first = prefkern.last_plan()
    assert first.structure == "one_pass"
    kept = find_kept(loss.grad_fn, first)
    # Of the tile of dW, which comes after hidden's gradient is done.
    with (
        pytest.warns(RuntimeWarning, match="out of memory in the backward pass"),
        refused_once(4 * first.backward_tiles.vocab_tile * H) as allocator,
    ):
        loss.backward(retain_graph=True)
    assert allocator.refused == 1
    assert kept.untyped_storage().nbytes() == 0
    second = prefkern.last_plan()
    assert (second.structure, second.kept_tokens) == ("two_pass", 0)
    assert second.forward_tiles == first.forward_tiles
    assert second.backward_tiles.bytes <= (first.kept_bytes + first.backward_tiles.bytes) / 2
    expected = made.expected()
    assert_right("first", loss, leaves, expected)
    once = {name: leaves[name].grad.clone() for name in made.trains}
    for name in made.trains:
        leaves[name].grad = None
    loss.backward()
    assert all(torch.equal(leaves[name].grad, grad) for name, grad in once.items())


def find_kept(node, made: prefkern.Plan) -> torch.Tensor:
    """The kept probabilities, in the graph above a loss."""
    nodes = [node]
    for each in nodes:
        nodes += [above for above, _ in each.next_functions if above is not None]
        for x in getattr(each, "saved_tensors", ()):
            if is_tensor(x) and x.ndim == 2 and x.shape[0] == made.kept_tokens and x.shape[1] > V:
                return x
    raise AssertionError("no node has kept anything")


def test_a_hook_keeps_its_own_memory():
    """Tensors of saved-tensor hooks may share memory with others, so they are not freed."""
    pool = []

    def pack(x: torch.Tensor) -> int:
        pool.append(torch.stack([x, x]))
        return len(pool) - 1

    made = call("trained head")
    leaves = made.leaves()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda i: pool[i][0]):
        loss = made.fused(**leaves)
    first = prefkern.last_plan()
    with (
        pytest.warns(RuntimeWarning, match="in the backward pass"),
        refused_once(4 * first.backward_tiles.vocab_tile * H),
    ):
        loss.backward()
    assert_right("hooks", loss, leaves, made.expected())
    assert all(x.untyped_storage().nbytes() == x.numel() * x.element_size() for x in pool)


@pytest.mark.parametrize("name", ["trained head", "kl, trained head", "adapter"])
def test_nothing_of_the_failed_attempt_is_alive_at_the_second(name):
    """Its tensors hang on its exception's frames, and would take the second one's memory."""
    made = call(name, workspace_mb=EVERY[name])
    counted = Allocator()
    attempt(made, counted)
    gc.disable()
    try:
        for k in range(counted.count // 4, counted.count, counted.count // 12):
            allocator = Allocator(lambda n, size, k=k: n == k)
            _, _, error = attempt(made, allocator)
            if error is None:
                large = [s for s in allocator.alive_at_retry if math.prod(s) > 27 * 16]
                # Kept probabilities are freed as a second attempt at backward begins.
                assert all(shape == (27, 320) for shape in large), (k, large)
    finally:
        gc.enable()


def test_the_second_refusal_says_what_would_fit():
    """The error names the smallest workspace; a call with it succeeds where a larger one fails."""
    made = call("trained head")
    leaves = made.leaves()
    made.fused(**leaves)
    cap = 4 * 27 * 64
    with (
        pytest.warns(RuntimeWarning),
        pytest.raises(torch.OutOfMemoryError) as raised,
        Allocator(lambda k, size: size > cap),
    ):
        made.fused(**leaves)
    message = str(raised.value)
    for part in (
        "out of memory in the forward pass of 27 scored tokens (H = 8, V = 300). Tried: ",
        f"workspace_mb={WORKSPACE_MB} (one_pass, ",
        ", then workspace_mb=0.0198",
        "CUDA out of memory. Tried to allocate 1.00 GiB.",
    ):
        assert part in message
    # Nothing of the attempts hangs on what is raised.
    assert raised.value.__context__ is None and raised.value.__cause__ is None
    least = float(message.split("pass workspace_mb=")[1].split(". ")[0])
    plans = [call_plan(mb) for mb in (least, least / 2, least / 4)]
    assert plans[0].workspace_bytes == min(each.workspace_bytes for each in plans)
    smaller = call("trained head", workspace_mb=least)
    loss, leaves, error = attempt(smaller, Allocator(lambda k, size: size > 4 * V * H))
    assert error is None
    assert prefkern.last_plan().workspace_bytes == plans[0].workspace_bytes
    assert_right("least", loss, leaves, made.expected())


def call_plan(workspace_mb: float) -> prefkern.Plan:
    made = call("trained head", workspace_mb=workspace_mb)
    made.fused(**made.leaves())
    return prefkern.last_plan()


def test_where_no_plan_is_smaller():
    made = call("frozen head", workspace_mb=1e-3)
    message = str(attempt(made, refused_once(512))[2])
    assert "No workspace_mb makes it smaller: score fewer tokens in a call." in message
    assert ", then " not in message


def test_other_errors_pass(monkeypatch):
    made = call("frozen head")
    with (
        warnings.catch_warnings(),
        pytest.raises(RuntimeError, match="^something else$"),
        Allocator(lambda k, size: k == 20) as allocator,
    ):
        warnings.simplefilter("error")
        allocator.refusal = lambda: RuntimeError("something else")
        made.fused(**made.leaves())


def test_a_cpu_refuses_in_these_words():
    """Only its message tells torch's exception for a CPU from others."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**58, dtype=torch.uint8)
    assert memory.is_out_of_memory(raised.value)
    assert not memory.is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_search_for_a_batch_size_knows_the_error():
    """accelerate's search (`auto_find_batch_size`) reads the error's message."""
    should_reduce = pytest.importorskip("accelerate.utils.memory").should_reduce_batch_size
    for device in REFUSALS:
        _, _, error = attempt(call("frozen head"), Allocator(lambda k, size: size > 512, device))
        assert "Tried: workspace_mb" in str(error)
        assert should_reduce(error)


def test_the_plan_is_recorded_for_the_thread_of_forward():
    """Autograd runs a GPU's backward in a thread of its own."""
    made = call("trained head")
    leaves = made.leaves()
    loss = made.fused(**leaves)
    first = prefkern.last_plan()

    def backward() -> None:
        with refused_once(4 * first.backward_tiles.vocab_tile * H):
            loss.backward()

    with pytest.warns(RuntimeWarning, match="in the backward pass"):
        in_thread(backward)
    assert prefkern.last_plan().kept_tokens == 0
    assert_right("thread", loss, leaves, made.expected())


def in_thread(function: Callable[[], None]) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def test_a_graph_that_is_captured_is_not_begun_again(monkeypatch):
    """It would replay the failed attempt as well."""
    monkeypatch.setattr(sequences, "is_capturing", lambda x: True)
    made = call("frozen head")
    _, _, error = attempt(made, refused_once(4 * 16 * 128))
    assert "Tried: workspace_mb" in str(error) and ", then " not in str(error)


def test_ranks_of_one_head_do_not_begin_again():
    """The others would wait for what this one sends."""
    made = call("frozen head")
    with group_of_one() as group:
        options = {"vocab": prefkern.VocabShard(group, 0, V), "workspace_mb": WORKSPACE_MB}
        sharded = Call(
            weighed(prefkern.linear_logprobs, backend="torch", **options),
            made.oracle, made.trains, **made.tensors,
        )  # fmt: skip
        loss, leaves, error = attempt(sharded, Allocator())
        assert error is None
        assert_right("a group of one", loss, leaves, made.expected())
        _, _, error = attempt(sharded, refused_once(4 * 16 * 128))
    assert "Tried: workspace_mb" in str(error) and ", then " not in str(error)


def refuse_attempts(monkeypatch, numbers: set[int]) -> list[prefkern.Plan]:
    """Refuse the first allocation of these attempts, counted from 1; returns all plans."""
    unpatched, plans = memory._run, []

    def run(function, plan):
        plans.append(plan)
        with refused_once(0) if len(plans) in numbers else contextlib.nullcontext():
            return unpatched(function, plan)

    monkeypatch.setattr(memory, "_run", run)
    return plans


def test_a_training_run_goes_on(tmp_path, monkeypatch):
    """After a refusal in the reference's pass, in the policy's and in backward."""
    pytest.importorskip("accelerate")
    from support.training import assert_same_weights, trainer, weights

    def run(attempts: set[int]) -> tuple[dict[str, torch.Tensor], list[prefkern.Plan]]:
        with monkeypatch.context() as patch:
            plans = refuse_attempts(patch, attempts)
            made = trainer(
                tmp_path, 8, optim="sgd", learning_rate=0.1, ref_model=tiny.model(seed=1)
            )
            made.train()
        return weights(made.model), plans

    undisturbed, plans = run(set())
    # Of each of two steps: policy and reference, and backward.
    assert len(plans) == 6
    with pytest.warns(RuntimeWarning, match="trying once more with workspace_mb"):
        retried, plans = run({1, 3, 5, 8})
    assert len(plans) == 10
    assert_same_weights(retried, undisturbed, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_compiled(phase, monkeypatch):
    """Under torch.compile the operator halves the memory beside its kept probabilities."""
    made = call("trained head", workspace_mb=64)
    expected = made.expected()
    torch._dynamo.reset()
    compiled = torch.compile(made.fused, backend="aot_eager")
    leaves = made.leaves()
    step(compiled, leaves)
    first = prefkern.last_plan()
    assert first.structure == "one_pass"
    leaves = made.leaves()
    calls = refuse_attempts(monkeypatch, {1 if phase == "forward" else 2})
    with pytest.warns(RuntimeWarning, match=phase):
        loss = step(compiled, leaves)
    assert len(calls) == 3
    assert prefkern.last_plan().kept_tokens == first.kept_tokens
    assert_right("compiled", loss, leaves, expected)


@pytest.mark.long
def test_a_rank_retries_alone(tmp_path):
    """A pass waits for no other rank: after a refusal on one rank, both end with equal results."""
    outputs = run_on_two_ranks(__file__, str(tmp_path))
    assert [output.strip().splitlines()[-1] for output in outputs] == ["retried 0", "retried 1"]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    made = call("trained head")
    for name, gradient in made.expected()[1].items():
        if name != "hidden":
            assert torch.equal(first[name], second[name])
            assert relative(first[name], gradient) < 1e-5


class _Head(torch.nn.Module):
    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, made: Call) -> None:
        super().__init__()
        self.weight, self.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
        self.made = made

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.made.fused(hidden=hidden, weight=self.weight, bias=self.bias, labels=labels)


def _as_rank(folder: str) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    made = call("trained head")
    leaves = made.leaves()
    head = _Head(leaves["weight"].detach(), leaves["bias"].detach(), made)
    model = torch.nn.parallel.DistributedDataParallel(head)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # The second rank's first large tensor in forward, and its first in backward.
        with refused_once(4096) if rank else Allocator():
            loss = model(leaves["hidden"], leaves["labels"])
        loss.backward()
    retries = sum("trying once more" in str(warning.message) for warning in caught)
    torch.save({"weight": head.weight.grad, "bias": head.bias.grad}, f"{folder}/{rank}.pt")
    print("retried", retries)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    import sys

    _as_rank(sys.argv[1])
