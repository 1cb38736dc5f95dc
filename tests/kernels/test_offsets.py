"""Offsets beyond 2^31 elements, without the memory: rows far apart in a file that has no blocks.

The views begin 2^31 elements into the file and end 2^32 in, so that an offset that wraps in 32 bits
reads zeros, or writes, in the file's first half, and the numbers are wrong. On a GPU the same views
are of its own memory.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

import prefkern
from prefkern.ops import fold_state, torch_tiles

kernels = pytest.importorskip("prefkern_kernels")

from prefkern_kernels import tiles
from support import launch_cases
from support.launch_cases import CASES
from support.product import ACCURACY, PLAIN, assert_right, truth

WRAP = 2**31
SIZE = 70


@pytest.fixture(autouse=True)
def no_copies_of_storages(monkeypatch):
    """The interpreter copies each argument's storage to itself after a launch: here, 16 GiB."""
    if kernels.INTERPRET:
        from triton.runtime.interpreter import GridExecutor

        monkeypatch.setattr(GridExecutor, "_init_args_hst", lambda self, args, kw: (args, kw))
        monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda self, *args: None)


def far(value: torch.Tensor, folder: Path, row_stride: int | None = None) -> torch.Tensor:
    """A copy whose last row begins more than 2^31 elements after its first."""
    rows = value.shape[0]
    stride = row_stride or -(-WRAP // (rows - 1)) + 64
    assert (rows - 1) * stride > WRAP
    length = WRAP + (rows - 1) * stride + value.shape[1]
    if value.is_cuda:
        free, _ = torch.cuda.mem_get_info()
        if length * value.element_size() > 0.9 * free:
            pytest.skip("needs more of the GPU's memory than is free")
        storage = torch.zeros(length, dtype=value.dtype, device=value.device)
    else:
        file = folder / f"sparse-{len(list(folder.iterdir()))}"
        storage = torch.from_file(str(file), shared=True, size=length, dtype=value.dtype)
    view = storage.as_strided(value.shape, (stride, 1), WRAP)
    return view.copy_(value)


class Far:
    """The functions on tiles; the rows of every matrix argument are far apart."""

    def __init__(self, ops: Any, folder: Path) -> None:
        self._ops, self._folder = ops, folder

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._ops, name)

        def call(*args: Any, **keywords: Any) -> None:
            moved = []
            for arg in args:
                is_matrix = isinstance(arg, torch.Tensor) and arg.ndim == 2
                # A table of maxima is walked as a vector: see below.
                walked = name == "settle" and arg is args[1]
                moved.append(far(arg, self._folder) if is_matrix and not walked else arg)
            moved_keywords = {
                key: far(arg, self._folder)
                if isinstance(arg, torch.Tensor) and arg.ndim == 2
                else arg
                for key, arg in keywords.items()
            }
            function(*moved, **moved_keywords)
            given = (*args, *keywords.values())
            for arg, copy in zip(given, (*moved, *moved_keywords.values()), strict=True):
                if copy is not arg:
                    arg.copy_(copy)

        return call


@pytest.mark.parametrize("ops", ["triton", "torch"])
@pytest.mark.parametrize("name", CASES)
def test_rows_far_apart(name, ops, tmp_path, device):
    """For the kernels and their twins in torch, and every matrix of them."""
    module = kernels if ops == "triton" else torch_tiles
    near = CASES[name](module, SIZE, device)
    distant = CASES[name](Far(module, tmp_path), SIZE, device)
    for key, value in near.items():
        assert torch.equal(value, distant[key]), key


@pytest.mark.parametrize("by_descriptor", [False, True])
@pytest.mark.parametrize("with_rows", [False, True])
@pytest.mark.long(with_rows=False)
@pytest.mark.long(by_descriptor=True)
def test_product_of_rows_far_apart(with_rows, by_descriptor, tmp_path, device):
    config = tiles.ProductConfig(16, 32, 32, 4, 2, by_descriptor=by_descriptor, tiles=2, group=2)
    # Whole tiles: a cut tile counts entries from its own beginning.
    case = launch_cases.product(5, 96, 40, torch.bfloat16, device)
    expected = truth(case["hidden"], case["weight"], None, case["labels"], **PLAIN)
    case["hidden"], case["weight"] = far(case["hidden"], tmp_path), far(case["weight"], tmp_path)
    if with_rows:
        case["rows"] = torch.arange(5, device=device)
    kernels.product_fold(**case, config=config, **PLAIN)
    names = ("maximum", "total", "label_logit", "label_slope")
    state = fold_state.FoldState(*(case[name] for name in names))
    assert_right(state, expected, ACCURACY[torch.bfloat16], None)


def sparse(length: int, folder: Path, device: str, dtype=torch.float32) -> torch.Tensor:
    return far(torch.zeros(2, 1, dtype=dtype, device=device), folder, length)


def test_tables_of_more_than_2_31_numbers(tmp_path, device):
    """Splits' maxima and sums, and tiles' maxima, are rows of as many numbers as there are tokens.

    The kernels are launched as for 2^30 tokens, for the programs of the first of them alone.
    """

    module = importlib.import_module("prefkern_kernels.product_fold")
    claimed, splits, n = 2**30 + 7, 3, 16
    table = far(torch.zeros(splits, n, device=device), tmp_path, claimed)
    sums = far(torch.zeros(splits, n, device=device), tmp_path, claimed)
    case = launch_cases.product(n, 96, 32, torch.float32, device)
    module._product_fold_kernel[(splits,)](
        case["hidden"], 32, case["weight"], 32, None, case["labels"], None, table, sums,
        case["label_logit"], case["label_slope"], claimed, 96, 32, splits, 0, 1.0, 1.0, 1.0,
        HAS_ROWS=False, HAS_BIAS=False, HAS_SOFTCAP=False, EVEN_V=True, EVEN_H=True,
        PRECISION="ieee", BY_DESCRIPTOR=False, FLATTEN=False, SPECIALIZE=False, BLOCK_N=16,
        BLOCK_V=32, BLOCK_H=32, TILES=1, GROUP=1, num_warps=4, num_stages=2,
    )  # fmt: skip
    logits = case["hidden"].double() @ case["weight"].double().t()
    logits.scatter_(1, case["labels"].unsqueeze(1), -torch.inf)
    highest = torch.stack([part.amax(1) for part in logits.split(32, 1)])
    torch.testing.assert_close(table.double(), highest, rtol=0, atol=1e-5)

    module._merge_splits_kernel[(1,)](
        table, sums, case["maximum"], case["total"], claimed, splits, BLOCK_N=16, BLOCK_S=4,
        num_warps=4,
    )  # fmt: skip
    true = (logits - logits.amax(1, keepdim=True)).exp().sum(1)
    torch.testing.assert_close(case["total"].double(), true, rtol=1e-5, atol=0)

    module = importlib.import_module("prefkern_kernels.settle")
    maxima = far(torch.tensor([[0.0], [1.0], [2.0]], device=device), tmp_path, claimed)
    kept = torch.ones(1, 12, device=device)
    one = torch.ones(1, device=device)
    module._settle_kernel[(1, 3)](
        kept, 12, maxima, 2 * one, -one, torch.zeros(1, dtype=torch.int64, device=device),
        claimed, 12, 4, BLOCK_V=128, num_warps=1,
    )  # fmt: skip
    expected = torch.tensor([-2.0, -1, 0], device=device).exp().repeat_interleave(4)
    expected[0] = -1
    torch.testing.assert_close(kept[0], expected)


def test_tokens_beyond_2_31(tmp_path, device):
    """A pair whose log-probs lie past the 2^31st of a batch."""
    values = -torch.rand(2, 1000, device=device)
    logps = far(values, tmp_path)
    begin = logps.stride(0)
    whole = logps.as_strided((begin + 1000,), (1,), WRAP)
    offsets = torch.tensor([begin, begin + 400, begin + 1000], device=device)
    options = prefkern.objectives.build("simpo").pair_kernel_options()
    out = kernels.pair_loss(whole, offsets, None, **options)
    true = torch.stack([values[1, :400].double().sum(), values[1, 400:].double().sum()])
    torch.testing.assert_close(out.sums.double(), true, rtol=1e-7, atol=0)
    # With weights of tokens as well: the second response has 200 beyond the first one's length.
    out = kernels.pair_loss(whole, offsets, None, **options, ld_alpha=0.5)
    torch.testing.assert_close(out.whole.double(), true, rtol=1e-7, atol=0)
    true[1] -= 0.5 * values[1, 800:].double().sum()
    torch.testing.assert_close(out.sums.double(), true, rtol=1e-7, atol=0)


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
@pytest.mark.long(backend="triton", trains=False)
def test_operator(trains, tmp_path, backend, device):
    """Forward and backward; the rows of hidden states and head are far apart."""
    hidden, weight = torch.randn(6, 16, device=device), torch.randn(40, 16, device=device)
    labels = torch.tensor([0, 39, 20, -100, 39, 1], device=device)
    results = []
    for arrange in (torch.clone, lambda value: far(value, tmp_path)):
        leaves = arrange(hidden).requires_grad_(), arrange(weight).requires_grad_(trains)
        logps = prefkern.linear_logprobs(*leaves, labels, backend=backend, workspace_mb=0.02)
        logps.sum().backward()
        results.append([logps.detach(), *(leaf.grad for leaf in leaves)])
    for near, distant in zip(*results, strict=True):
        assert near is None or torch.equal(near, distant)
