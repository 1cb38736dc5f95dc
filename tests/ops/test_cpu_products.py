"""Products of bfloat16 operands with a float32 result, on a processor that has units for them.

Elsewhere the same calls raise their operands, and only the numbers are held.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import gc
import os
import threading
import time
import warnings

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import prefkern
from prefkern import reference
from prefkern.ops import cpu
from support.logprobs import relative

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def on_a_cpu(device):
    if device != "cpu":
        pytest.skip("the products of a CPU")


@pytest.fixture
def threads():
    """Set the number of torch's threads; it is put back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=["OpenMP", "own"])
def way(request, monkeypatch):
    """Whose threads multiply: those of torch's other operators, or threads of our own."""
    monkeypatch.setattr(cpu, "_of_openmp", {})
    monkeypatch.setattr(cpu, "_local", threading.local())
    if request.param == "own":
        monkeypatch.setattr(cpu, "_parallel", lambda: None)
    elif cpu._parallel() is None:
        pytest.skip("torch was built with other threads")
    return request.param


@pytest.fixture
def blocks(monkeypatch):
    """The threads that multiplied blocks, in order; the test ends here where the units are not."""
    found = cpu._brgemm()
    if found is None:
        pytest.skip("this processor has no bfloat16 units, or torch no product of blocks")
    ran, multiply = [], found[0]

    def counted(*given):
        ran.append(threading.get_ident())
        # So that one thread does not take all of it before the others begin.
        time.sleep(0.001)
        multiply(*given)

    monkeypatch.setattr(cpu, "_brgemm", lambda: (counted, found[1]))
    return ran


def room(n: int, v: int, by_entry: bool = False) -> Tensor:
    return torch.full((v, n), torch.nan).t() if by_entry else torch.full((n, v), torch.nan)


def error(a: Tensor, b: Tensor, out: Tensor) -> float:
    """The largest error, relative to the sum of the terms' sizes."""
    a, b = a.double(), b.double().t()
    return ((out - a @ b).abs() / (a.abs() @ b.abs() + 1e-30)).max().item()


@pytest.mark.parametrize("by_entry", [False, True])
@pytest.mark.parametrize(
    ("n", "v", "width"),
    [(1, 1, 2), (1, 300, 64), (300, 1, 64), (7, 513, 34), (257, 129, 576), (64, 70, 4096)],
)
def test_the_result_is_float32s(blocks, n, v, width, by_entry):
    a, b, out = torch.randn(n, width).to(BF16), torch.randn(v, width).to(BF16), room(n, v, by_entry)
    cpu.wide_product(a, b, out)
    assert blocks and error(a, b, out) < 1e-6
    # A rounded result is not.
    assert n * v < 100 or error(a, b, (a @ b.t()).float()) > 1e-5


@pytest.mark.parametrize("by_entry", [False, True])
@pytest.mark.parametrize(
    "cut",
    [
        lambda x: x[:, 1:],  # an odd width
        lambda x: x[:, 3:9],  # rows that begin between two pairs
        lambda x: x.t()[::3].t(),  # columns with gaps
        lambda x: x.flip(0)[::2],
        lambda x: x[:1].expand(x.shape),
        lambda x: x[:0],
        lambda x: x[:, :0],
        lambda x: x.reshape(-1)[:61].view(1, 61)[:, :60],
    ],
    ids=["odd", "unaligned", "gaps", "every second", "expanded", "none", "no width", "odd rows"],
)
@pytest.mark.parametrize("which", ["a", "b"])
def test_operands_may_lie_in_memory_as_they_like(cut, which, by_entry):
    own, other = cut(torch.randn(90, 60).to(BF16)), torch.randn(70, 60).to(BF16)
    other = other[:, : own.shape[1]].contiguous()
    a, b = (own, other) if which == "a" else (other, own)
    out = room(len(a), len(b), by_entry)
    cpu.wide_product(a, b, out)
    assert out.numel() == 0 or error(a, b, out) < 1e-6


def test_what_is_outside_a_tile_is_not_written(blocks):
    around = torch.full((40, 50), 7.0)
    a, b = torch.randn(20, 16).to(BF16), torch.randn(30, 16).to(BF16)
    for view in (around[10:30, 10:40], around.t()[10:40, 10:30].t()):
        cpu.wide_product(a, b, view)
        assert error(a, b, view) < 1e-6
        view.fill_(7.0)
        assert (around == 7.0).all()


@pytest.mark.parametrize("by_entry", [False, True])
@pytest.mark.parametrize("shape", [(700, 1500), (40, 2000), (1500, 40)])
def test_threads_share_the_work_and_change_no_bit(blocks, threads, shape, by_entry, way):
    n, v = shape
    a, b = torch.randn(n, 64).to(BF16), torch.randn(v, 64).to(BF16)
    results, used = [], []
    for count in (1, 2, 3, 16):
        threads(count)
        blocks.clear()
        results.append(room(n, v, by_entry))
        cpu.wide_product(a, b, results[-1])
        used.append(len(set(blocks)))
        assert torch.equal(results[-1], results[0])
    assert used[0] == 1 and used[2] > 1
    assert max(used) <= 16


def test_numbers_that_are_not_finite_stay_in_their_row(blocks):
    a, b, out = torch.ones(5, 8).to(BF16), torch.ones(6, 8).to(BF16), room(5, 6)
    a[1, 3], a[2, 3], b[4, 0] = torch.inf, torch.nan, -torch.inf
    cpu.wide_product(a, b, out)
    expected = a.float() @ b.float().t()
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


def test_torchs_own_switch_is_heeded(blocks):
    a, b, out = torch.randn(9, 16).to(BF16), torch.randn(8, 16).to(BF16), room(9, 8)
    with torch.backends.mkldnn.flags(enabled=False):
        cpu.wide_product(a, b, out)
    assert not blocks and error(a, b, out) < 1e-6


def test_torchs_own_switch_may_be_used_meanwhile(blocks):
    """Torch ends the process where a block is asked for with the switch off."""
    a, b, out = torch.randn(9, 16).to(BF16), torch.randn(800, 16).to(BF16), room(9, 800)
    counted, release = cpu._brgemm()

    def multiply(*given):
        assert torch.backends.mkldnn.enabled
        counted(*given)
        torch._C._set_mkldnn_enabled(False)

    with torch.backends.mkldnn.flags(enabled=True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_brgemm", lambda: (multiply, release))
        cpu.wide_product(a, b, out)
    assert len(blocks) == 1 and error(a, b, out) < 1e-6


@pytest.mark.parametrize("which", ["a", "b", "out"])
def test_rows_that_lie_far_apart_are_not_read_by_compiled_code(blocks, which, monkeypatch):
    """It ends the process where a block of them is longer than 2 GiB, or reads elsewhere."""
    monkeypatch.setattr(cpu, "_MOST_OF_A_BLOCK", 256 * 2 * 1000)
    far, near = torch.randn(300, 1000).to(BF16)[:, :64], torch.randn(300, 64).to(BF16)
    a, b = (near, far) if which == "b" else (far, near)
    out = torch.empty(300, 1000)[:, :300] if which == "out" else torch.empty(300, 300)
    counted, release = cpu._brgemm()

    def multiply(m, k, width, from_row, *others):
        assert from_row == width
        counted(m, k, width, from_row, *others)

    monkeypatch.setattr(cpu, "_brgemm", lambda: (multiply, release))
    cpu.wide_product(a, b, out)
    assert error(a, b, out) < 1e-6
    assert bool(blocks) == (which != "out")


@pytest.mark.parametrize("count", [1, 3])
def test_no_thread_keeps_more_and_more_compiled_shapes(blocks, threads, count, monkeypatch, way):
    """A run whose batches differ in length would else take more memory at each step."""
    monkeypatch.setattr(cpu, "_SHAPES_OF_A_THREAD", 6)
    threads(count)
    counted, release = cpu._brgemm()
    shapes = {}

    def multiply(*given):
        # Ends with its thread.
        mine = cpu._shapes_of_this_thread()
        shapes[id(mine)] = mine
        counted(*given)

    monkeypatch.setattr(cpu, "_brgemm", lambda: (multiply, release))
    a, b = torch.randn(20, 16).to(BF16), torch.randn(600, 16).to(BF16)
    for n in range(600, 640):
        out = torch.empty(20, n)[:, :600]
        cpu.wide_product(a, b, out)
        assert error(a, b, out) < 1e-6
    # Two shapes a product: whole blocks, and the last one.
    assert max(map(len, shapes.values())) <= 6 + 2
    assert len(set.union(*shapes.values())) == 80
    gc.collect()
    assert sum(each.name.startswith("prefkern") for each in threading.enumerate()) <= 2 * count


def test_a_run_of_batches_that_differ_in_length_compiles_little(blocks, wide, threads, monkeypatch):
    monkeypatch.setattr(cpu, "_local", threading.local())
    threads(1)
    weight = torch.randn(9000, 16).to(BF16)
    for n in range(400, 900, 13):
        hidden, labels = torch.randn(n, 16).to(BF16), torch.zeros(n).long()
        prefkern.linear_logprobs(hidden, weight, labels, workspace_mb=64, backend="torch")
    # Blocks of 256, 64 and 16 tokens, by 256 entries or what is left, in tiles of a few widths. One
    # for each number of tokens would be more than twice as many.
    assert 3 <= len(cpu._shapes_of_this_thread()) <= 36


def test_without_another_thread_this_one_does_it_all(blocks, threads, monkeypatch):
    """No more threads are allowed, or the interpreter ends."""
    threads(4)
    closed = concurrent.futures.ThreadPoolExecutor(1)
    closed.shutdown()
    monkeypatch.setattr(cpu, "_parallel", lambda: None)
    monkeypatch.setattr(cpu._workers, "of", lambda count: closed)
    a, b, out = torch.randn(20, 16).to(BF16), torch.randn(1000, 16).to(BF16), room(20, 1000)
    cpu.wide_product(a, b, out)
    assert error(a, b, out) < 1e-6 and set(blocks) == {threading.get_ident()}


def test_gradients_and_inference_tensors(blocks):
    with torch.inference_mode():
        a, b, out = torch.randn(9, 16).to(BF16), torch.randn(8, 16).to(BF16), room(9, 8)
        cpu.wide_product(a, b, out)
        assert error(a, b, out) < 1e-6
    weight = torch.nn.Parameter(torch.randn(300, 16).to(BF16))
    other = room(9, 300)
    with torch.no_grad():
        cpu.wide_product(torch.randn(9, 16).to(BF16), weight, other)
    assert not other.requires_grad and other.isfinite().all()


def test_fake_tensors_have_no_memory_to_read(blocks):
    with FakeTensorMode():
        cpu.wide_product(torch.empty(9, 16, dtype=BF16), torch.empty(8, 16, dtype=BF16), room(9, 8))
    assert not blocks


def test_an_error_on_another_thread_is_raised_when_all_have_ended(threads, monkeypatch, way):
    threads(4)
    begun, ended = threading.Semaphore(0), threading.Semaphore(0)

    def multiply(*given):
        if threading.current_thread() is threading.main_thread():
            # Each other thread has its part by then.
            assert all(begun.acquire(timeout=20) for _ in range(3))
            raise RuntimeError("of the first part")
        begun.release()
        threading.Event().wait(0.2)
        ended.release()

    monkeypatch.setattr(cpu, "_brgemm", lambda: (multiply, lambda _: None))
    with pytest.raises(RuntimeError, match="of the first part"):
        cpu.wide_product(torch.ones(8, 4).to(BF16), torch.ones(1024, 4).to(BF16), room(8, 1024))
    # One block on each other thread.
    assert all(ended.acquire(blocking=False) for _ in range(3))


def test_units_are_released_after_an_error(monkeypatch):
    released = []

    def multiply(*given):
        raise RuntimeError("no")

    monkeypatch.setattr(cpu, "_brgemm", lambda: (multiply, released.append))
    with pytest.raises(RuntimeError, match="no"):
        cpu.wide_product(torch.ones(8, 4).to(BF16), torch.ones(8, 4).to(BF16), room(8, 8))
    assert released == [True]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked")
def test_a_forked_process_has_threads_of_its_own(blocks, threads):
    threads(3)
    # So small that torch's own threads, which a fork loses, are not used.
    a, b, out = torch.randn(8, 32).to(BF16), torch.randn(700, 32).to(BF16), room(8, 700)
    cpu.wide_product(a, b, out)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
        if child == 0:
            again = room(8, 700)
            cpu.wide_product(a, b, again)
            os._exit(0 if torch.equal(again, out) else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_a_compiled_call_takes_what_the_processor_has_for_a_constant():
    """Nothing of the question is traced, here or where there are no units."""
    hidden, weight, labels, _ = rising(20, 32, 500)
    expected = prefkern.linear_logprobs(hidden, weight, labels)
    torch.compiler.reset()
    compiled = torch.compile(prefkern.linear_logprobs, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(hidden, weight, labels), expected, rtol=0, atol=2e-6)


def test_the_trial_does_not_depend_on_the_first_call(blocks):
    with torch.device("meta"), torch.autocast("cpu", BF16), FakeTensorMode():
        assert cpu.has_wide_product.__wrapped__()
    assert blocks


@pytest.mark.parametrize("fault", ["rounds", "does nothing", "swaps"])
def test_a_library_that_multiplies_otherwise_is_not_used(fault, monkeypatch):
    def multiply(m, k, width, from_a, from_b, to, _, a, b, out, __):
        """One row of `out` after the other, with a fault."""
        rows = (ctypes.c_uint16 * (from_a * m)).from_address(a)
        pairs = (ctypes.c_uint16 * (from_b * width)).from_address(b)
        a = torch.frombuffer(rows, dtype=BF16).view(m, from_a)[:, :width]
        # (width / 2, k, 2), as (k, width).
        b = torch.frombuffer(pairs, dtype=BF16).view(width // 2, from_b, 2)
        b = b.transpose(0, 1)[:k].reshape(k, width)
        if fault == "swaps":
            b = b.flip(1)
        result = a.float() @ b.float().t()
        if fault == "rounds":
            result = result.to(BF16).float()
        if fault == "does nothing":
            return
        for i in range(m):
            row = (ctypes.c_float * k).from_address(out + 4 * i * to)
            torch.frombuffer(row, dtype=torch.float32).copy_(result[i])

    monkeypatch.setattr(cpu, "_brgemm", lambda: (multiply, lambda _: None))
    assert not cpu.has_wide_product.__wrapped__()
    fault = None
    assert cpu.has_wide_product.__wrapped__()


@pytest.mark.parametrize("missing", ["library", "name", "AVX512-BF16"])
def test_a_torch_without_it(missing, monkeypatch):
    class Library(dict):
        def __getitem__(self, name):
            raise AttributeError(name)

    def load(path):
        if missing == "library":
            raise OSError(path)
        return Library() if missing == "name" else loaded(path)

    loaded = ctypes.CDLL
    monkeypatch.setattr(cpu, "_has_units", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: missing != "AVX512-BF16")
    monkeypatch.setattr(ctypes, "CDLL", load)
    assert cpu._brgemm.__wrapped__() is None


@pytest.fixture
def wide(monkeypatch):
    monkeypatch.setattr(cpu, "has_bfloat16_units", lambda: True)
    monkeypatch.setattr(cpu, "has_wide_product", lambda: True)


def rising(N: int, H: int, V: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits that rise along the vocabulary, so that each tile raises each token's maximum."""
    hidden, weight = torch.randn(N, H) / 4, torch.randn(V, H)
    hidden[:, 0], weight[:, 0] = 1.0, torch.linspace(-3, 3, V)
    return hidden.to(BF16), weight.to(BF16), torch.randint(V, (N,)), torch.randn(N)


@pytest.mark.parametrize("N", [32, 400])  # by entry, by token
@pytest.mark.parametrize("workspace_mb", [64, 6, 1.5])
@pytest.mark.parametrize("bias", [False, True])
def test_kept_tiles_have_factors_of_their_own(wide, N, workspace_mb, bias):
    """Also where a tile of backward begins within a tile of forward; and twice alike."""
    case = rising(N, 64, 7000)
    offset = torch.randn(7000).to(BF16) if bias else None

    def run(function, dtype, times=1, **options):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in case[:2]]
        leaves += [] if offset is None else [offset.to(dtype, copy=True).requires_grad_()]
        logps = function(leaves[0], leaves[1], case[2], *leaves[2:], **options)
        loss = (logps * case[3].to(logps.dtype)).sum()
        return [torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(times)]

    (truth,) = run(reference.linear_logprobs, torch.float64)
    options = {"workspace_mb": workspace_mb, "backend": "torch"}
    ours, again = run(prefkern.linear_logprobs, BF16, 2, **options)
    made = prefkern.last_plan()
    assert made.kept_tokens == N or workspace_mb == 1.5
    for mine, second, true in zip(ours, again, truth, strict=True):
        assert torch.equal(mine, second)
        assert relative(mine, true) < 1.35 * relative(true.to(BF16), true)


@pytest.mark.parametrize("N", [383, 384])
def test_both_orders_of_a_tile_give_the_same_numbers(wide, N, monkeypatch):
    case = rising(N, 32, 3000)

    def run():
        leaves = [x.clone().requires_grad_() for x in case[:2]]
        logps = prefkern.linear_logprobs(*leaves, case[2], backend="torch")
        (logps * case[3]).sum().backward()
        return logps.detach(), *(x.grad for x in leaves)

    here = run()
    monkeypatch.setattr("prefkern.ops.operands.TOKENS_BY_TOKEN", 0 if N < 384 else 1000)
    there = run()
    torch.testing.assert_close(there[0], here[0], rtol=0, atol=2e-6)
    for mine, other in zip(here[1:], there[1:], strict=True):
        # One may round up where the other rounds down.
        assert relative(mine, other.double()) < 1e-3
