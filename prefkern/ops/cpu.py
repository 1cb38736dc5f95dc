"""What a CPU is fast at: products of bfloat16 operands.

Processors with bfloat16 units (AVX512-BF16, AMX) multiply bfloat16 operands faster than float32
ones. torch uses them through oneDNN in two ways:

- For whole tensors, `torch.mm`. Its result is rounded to bfloat16, which is good enough for
  gradients and not for logits.
- For small blocks, with a float32 result: `at::native::cpublas::brgemm`. Attention on a CPU and the
  code that torch.compile writes call it. Python has no name for it; torch's library exports it, and
  here it is called from there. `wide_product` multiplies whole tensors with it, in blocks, on as many
  threads as torch uses.

`PREFKERN_CPU_BF16=0` switches both off.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import functools
import os
import platform
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SWITCH = "PREFKERN_CPU_BF16"

# The names in torch's library, whose letters are the types of the arguments: six int64, a bool, two
# pointers to bfloat16, one to float, a bool.
_BRGEMM = "_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb"
_RELEASE = "_ZN2at6native7cpublas14brgemm_releaseEb"

# A block of the result: rows of one operand, which are read where they are, by rows of the other
# one, which are packed and stay in a core's cache. Each shape is compiled once, so there are few.
_ROWS = 256
# Of the rows that are left.
_FEW_ROWS = (64, 16)
_PACKED, _LEAST_PACKED = 256, 64
# The widest rows of which so many fit into such a cache.
_WIDTH = 2048
# Compiled blocks reach what they read and write by 32-bit distances.
_MOST_OF_A_BLOCK = 2**31
# torch keeps what it compiled for a shape, up to 0.3 MiB, until the thread ends. So a thread compiles
# about as many as these, and then another one does.
_SHAPES_OF_A_THREAD = 128
# Limits of oneDNN under which it has no blocks of bfloat16 operands: it would end the process.
_WITHOUT_UNITS = ("AVX512_CORE", "AVX512_CORE_VNNI")


def has_bfloat16_units() -> bool:
    """Whether products of bfloat16 tensors are faster than those of float32 ones.

    A processor without such units would emulate them, slower than float32.
    `ONEDNN_MAX_CPU_ISA=AVX2` switches them off, as it does for torch itself.
    """
    return _has_units()


# torch.compile takes the answer for a constant.
has_bfloat16_units._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


@functools.cache
def _has_units() -> bool:
    if os.environ.get(SWITCH) == "0" or not torch.backends.mkldnn.is_available():
        return False
    limits = (os.environ.get(f"{name}_MAX_CPU_ISA", "") for name in ("ONEDNN", "DNNL"))
    if any(limit.upper() in _WITHOUT_UNITS for limit in limits):
        return False
    # torch has no public name for any of these.
    of_cpu: Any = torch.cpu
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    asked = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", bool)
    return any(getattr(of_cpu, name, bool)() for name in names) and bool(asked())


@functools.cache
def has_wide_product() -> bool:
    """Whether such products can have a float32 result here, tried on some numbers."""
    if _brgemm() is None:
        return False
    # A thread of its own has neither a caller's default device nor its dispatch modes.
    with ThreadPoolExecutor(1) as clean:
        return clean.submit(_multiplies).result()


def _multiplies() -> bool:
    """Whether the sums are right, with more bits than bfloat16 has, at blocks of several shapes."""
    n, v, width = _PACKED + 17, _ROWS + 3, 34
    a = (torch.arange(n * width, device="cpu") * 7 % 31 - 15).view(n, width)
    b = (torch.arange(v * width, device="cpu") * 5 % 29 - 14).view(v, width)
    a[:, 0], b[:, 0] = 100, 101
    out = torch.empty((v, n), dtype=torch.float32, device="cpu").t()
    _wide_product(a.bfloat16(), b.bfloat16(), out)
    return torch.equal(out, (a @ b.t()).float())


@functools.cache
def _brgemm() -> tuple[Callable[..., None], Callable[..., None]] | None:
    """torch's product of blocks, and what frees the units after it; None where torch has none."""
    if sys.platform != "linux" or platform.machine() != "x86_64" or not _has_units():
        return None
    # Without AVX512-BF16, AMX's units alone would be asked for, and torch would end the process.
    of_cpu: Any = torch.cpu
    if not getattr(of_cpu, "_is_avx512_bf16_supported", bool)():
        return None
    found = _functions(_BRGEMM, _RELEASE)
    if found is None:
        return None
    multiply, release = found
    sizes, flag, pointer = [ctypes.c_int64] * 6, ctypes.c_bool, ctypes.c_void_p
    multiply.argtypes, multiply.restype = [*sizes, flag, *[pointer] * 3, flag], None
    release.argtypes, release.restype = [flag], None
    return multiply, release


def _functions(*names: str) -> list[Any] | None:
    """Functions of torch's library, or of those that it needs; None where one is missing."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return [library[name] for name in names]
    except (OSError, AttributeError):
        return None


def packed_bytes(width: int) -> int:
    """Bytes that `wide_product` of such rows takes at a time, on all threads."""
    return 2 * width * _packed(width) * torch.get_num_threads()


def wide_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`out = a @ b.T` in float32, not rounded to bfloat16.

    Args:
        a: (n, W) bfloat16.
        b: (v, W) bfloat16.
        out: (n, v) float32, in memory row by row, where b is packed, or column by column, where a is.
    """
    operator(a, b, out)


def _wide_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    if out.numel() == 0:
        return
    if out.stride(1) != 1:
        a, b, out = b, a, out.t()
    a, b, found, width = a.detach(), b.detach(), _brgemm(), a.shape[1]
    # A row must be made of pairs.
    if found is None or width == 0 or width % 2 or _is_far(out):
        _raised_product(a, b, out)
        return
    threads = torch.get_num_threads()
    columns = list(_blocks(slice(0, b.shape[0]), _packed(width)))
    shares = min(len(columns), threads)
    # Where there are more threads than packed blocks, each of these has a part of the rows.
    rows = -(-a.shape[0] // _ROWS)
    parts = min(threads // shares, rows)
    size = -(-rows // parts) * _ROWS
    _run(
        [
            functools.partial(_multiply, found, a, b, out, part, columns[share::shares])
            for share in range(shares)
            for part in _blocks(slice(0, a.shape[0]), size)
        ]
    )


def _is_far(x: Tensor) -> bool:
    """Whether a block of such rows is longer than compiled code reaches."""
    return x.shape[0] > 1 and _ROWS * x.stride(0) * x.itemsize >= _MOST_OF_A_BLOCK


def _raised_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """The same with float32 operands, in blocks, so that these take no more memory."""
    for rows in _blocks(slice(0, a.shape[0]), _LEAST_PACKED):
        raised = a[rows].float()
        for columns in _blocks(slice(0, b.shape[0]), _LEAST_PACKED):
            torch.mm(raised, b[columns].float().t(), out=out[rows, columns])


def _packed(width: int) -> int:
    """The number of rows that are packed at a time."""
    return _PACKED if width <= _WIDTH else _LEAST_PACKED


def _blocks(all_of: slice, size: int) -> Iterator[slice]:
    return (slice(i, min(i + size, all_of.stop)) for i in range(all_of.start, all_of.stop, size))


def _row_blocks(rows: slice) -> Iterator[slice]:
    """Blocks of few sizes, whatever the number of rows: the last one begins within the one before."""
    at = rows.start
    for size in (_ROWS, *_FEW_ROWS):
        while rows.stop - at >= size:
            yield slice(at, at + size)
            at += size
    if at < rows.stop:
        yield slice(max(rows.stop - _FEW_ROWS[-1], rows.start), rows.stop)


def _multiply(
    found: tuple[Callable[..., None], Callable[..., None]],
    a: Tensor,  # (m, W)
    b: Tensor,  # (k, W)
    out: Tensor,  # (m, k)
    rows: slice,
    columns: list[slice],
) -> None:
    """Some rows of some columns of `out`, on this thread."""
    multiply, release = found
    width, compiled = a.shape[1], _shapes_of_this_thread()
    is_read_in_place = a.stride(1) == 1 and a.stride(0) >= width and not _is_far(a)
    # One row may have any stride.
    from_row = a.stride(0) if is_read_in_place and a.shape[0] > 1 else width
    room = torch.empty(width // 2 * _packed(width), dtype=torch.int32, device=b.device)
    from_a, from_room, to = a.data_ptr(), room.data_ptr(), out.data_ptr()
    to_row = out.stride(0)
    try:
        for each in columns:
            k = each.stop - each.start
            # The units take a pair of numbers of each row, side by side.
            room[: width // 2 * k].view(width // 2, k).copy_(_pairs(b[each]).t())
            for part in _row_blocks(rows):
                # torch's own switch, which another thread may use meanwhile.
                if not torch.backends.mkldnn.enabled:
                    _raised_product(a[part], b[each], out[part, each])
                    continue
                source, block = from_a + part.start * from_row * a.itemsize, None
                if not is_read_in_place:
                    block = a[part].clone(memory_format=torch.contiguous_format)
                    source = block.data_ptr()
                m = part.stop - part.start
                sizes = m, k, width, from_row, k, max(to_row, k)
                compiled.add(sizes)
                target = to + (part.start * to_row + each.start) * out.itemsize
                multiply(*sizes, False, source, from_room, target, True)
    finally:
        release(True)


def _pairs(b: Tensor) -> Tensor:  # (k, W) -> (k, W/2) int32
    """Each two numbers of a row as one."""
    numbers = b.contiguous().view(-1)
    if numbers.data_ptr() % 4:
        numbers = numbers.clone()
    return numbers.view(torch.int32).view(b.shape[0], -1)


_local = threading.local()
# OpenMP's threads, by the system's name of each: Python's own state of them lasts for a call.
_of_openmp: dict[int, set[tuple[int, ...]]] = {}


def _shapes_of_this_thread() -> set[tuple[int, ...]]:
    """What was compiled for it."""
    return vars(_local).setdefault("shapes", set())


def _is_full() -> bool:
    return len(_shapes_of_this_thread()) >= _SHAPES_OF_A_THREAD


@functools.cache
def _parallel() -> Callable[..., None] | None:
    """OpenMP's own function that runs one on all threads of torch; None where torch has another."""
    found = _functions("GOMP_parallel")
    if found is None:
        return None
    (parallel,) = found
    parallel.argtypes = [_Body, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel


_Body: Any = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Workers:
    """Threads beside the caller's, started when they are needed; a forked process has its own."""

    def __init__(self) -> None:
        self._begin()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=functools.partial(self._begin, is_forked=True))

    def _begin(self, is_forked: bool = False) -> None:
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._size = 0
        self.is_forked = is_forked

    def of(self, count: int) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None or self._size < count:
                self._pool, self._size = ThreadPoolExecutor(count, "prefkern"), count
            return self._pool

    def leave(self, pool: ThreadPoolExecutor) -> None:
        """Its threads end when they have done what they were given."""
        with self._lock:
            if self._pool is pool:
                self._pool = None


_workers = _Workers()


def _run(jobs: list[Callable[[], None]]) -> None:
    """Do all of them at the same time.

    On the threads of torch's other operators, which wait for work on their cores; a forked process
    has lost them.
    """
    parallel = None if len(jobs) == 1 or _workers.is_forked else _parallel()
    are_full = any(len(each) >= _SHAPES_OF_A_THREAD for each in list(_of_openmp.values()))
    if parallel is None or are_full or _is_full():
        _run_on_workers(jobs)
        return
    waiting, errors, caller = iter(jobs), [], threading.get_native_id()

    @_Body
    def body(_: int) -> None:
        thread = threading.get_native_id()
        if thread != caller:
            vars(_local)["shapes"] = _of_openmp.setdefault(thread, set())
        # However many threads there are, each takes the next one.
        for job in waiting:
            try:
                job()
            except BaseException as error:  # noqa: BLE001
                # Raised again by the caller; out of here it would end the process.
                errors.append(error)

    parallel(body, None, len(jobs), 0)
    if errors:
        raise errors[0]


def _run_on_workers(jobs: list[Callable[[], None]]) -> None:
    """The same on threads of our own, the first one on this thread if it may compile more."""
    first = 0 if _is_full() else 1
    here, others = jobs[:first], []
    pool = _workers.of(len(jobs) - first) if len(jobs) > first else None
    try:
        for job in jobs[first:]:
            assert pool is not None
            try:
                others.append(pool.submit(_then_is_full, job))
            except RuntimeError:
                # No thread can be started, or the interpreter ends. The pool may hold this job all
                # the same, so it must end first.
                _workers.leave(pool)
                pool.shutdown()
                here.append(job)
        for job in here:
            job()
    finally:
        # They write into memory of the caller's.
        concurrent.futures.wait(others)
    are_full = [other.result() for other in others]
    if pool is not None and any(are_full):
        _workers.leave(pool)


def _then_is_full(job: Callable[[], None]) -> bool:
    job()
    return _is_full()


# An operator of torch's library: profilers and counters see it, and fake tensors have no memory.
_library = torch.library.Library("prefkern", "FRAGMENT")
_library.define("wide_product(Tensor a, Tensor b, Tensor(a!) out) -> ()")
_library.impl("wide_product", _wide_product, "CPU")
torch.library.register_fake("prefkern::wide_product", lambda a, b, out: None, lib=_library)
operator: Any = torch.ops.prefkern.wide_product
