"""The trace of the CUDA path: its rules, its promises, and its record. The trace itself needs a CUDA build.

`make trace-cuda` makes the record; here its checks are held to what they must refuse, and what a
plan promises to launches that are made, in the interpreter.
"""

from __future__ import annotations

import inspect
import json
from collections import Counter
from unittest import mock

import pytest
import torch

import prefkern
import trace_cuda
from prefkern.objectives import names
from prefkern.ops import plan as plans

pytest.importorskip("triton")
from tracing import expected, rules

kernels = pytest.importorskip("prefkern_kernels")
RECORD = json.loads(trace_cuda.RESULT.read_text())
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def matrix(rows: int, columns: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(rows, columns, dtype=dtype, device="meta")


def test_the_page_is_of_its_record() -> None:
    assert trace_cuda.page(RECORD) == trace_cuda.PAGE.read_text()
    assert trace_cuda.misses(RECORD) == []
    assert len(RECORD["faults"]) >= 20 and RECORD["versions"]["torch"].partition("+cu")[2]
    # Another version of torch did the same.
    assert RECORD["checked"]
    for row in RECORD["checked"].values():
        assert not row["misses"] and not row["differences"]
        assert (row["calls"], row["faults"]) == (len(RECORD["cases"]), len(RECORD["faults"]))


def test_the_record_covers_every_kind_of_call() -> None:
    groups = {row["group"] for row in RECORD["cases"]}
    assert {f"loss, {name}" for name in names()} <= groups
    assert {f"operator, {name}" for name in ("bf16", "fp16", "float32")} <= groups
    others = {"models", "torch.compile", "head over two ranks", "sequence over two ranks"}
    assert others | {"no products with a float32 result"} <= groups
    seen = sum((Counter(row["launches"]) for row in RECORD["cases"]), Counter())
    launchers = {*kernels.__all__} - {"INTERPRET", "PairLossOutput", "launches", "product_fold_row"}
    launchers -= {"product_fold_bytes", "tune_product_fold"}
    assert launchers <= {*seen}


def test_what_does_not_hold_is_a_miss() -> None:
    result = json.loads(json.dumps(RECORD))
    result["cases"][0]["findings"] = ["a kernel was given a tensor of the CPU"]
    result["faults"][3]["named"] = None
    row, fault = result["cases"][0], result["faults"][3]
    assert trace_cuda.differences(result, RECORD) == []
    row["launches"]["fold"] += 1
    del result["cases"][1]
    was, gone = RECORD["cases"][0]["launches"], RECORD["cases"][1]
    assert sorted(trace_cuda.differences(result, RECORD)) == sorted(
        [
            f"{row['group']}: {row['case']}: launches {row['launches']}, recorded {was}",
            f"{gone['group']}: {gone['case']}: in one of them alone",
        ]
    )
    assert trace_cuda.misses(result) == [
        f"{row['group']}: {row['case']}: a kernel was given a tensor of the CPU",
        f"not named: {fault['fault']}",
    ]
    page = trace_cuda.page(result)
    assert "**a kernel was given a tensor of the CPU**" in page and "**nothing**" in page


@pytest.mark.parametrize(
    ("name", "arguments", "faults"),
    [
        ("mm", {"self": matrix(4, 8), "mat2": matrix(8, 2)}, []),
        ("mm", {"self": matrix(4, 8), "mat2": matrix(8, 2), "out_dtype": F32}, []),
        ("mm", {"self": matrix(4, 8), "mat2": matrix(2, 8).t(), "out_dtype": F32,
                "out": matrix(4, 2, F32)}, []),
        ("mm", {"self": matrix(4, 8), "mat2": matrix(8, 2), "out": matrix(4, 2, F32)},
         ["a result of float32 where bfloat16 is made"]),
        ("mm", {"self": matrix(4, 8), "mat2": matrix(8, 2, F16)},
         ["operands of bfloat16 and float16"]),
        ("mm", {"self": matrix(4, 8, F32), "mat2": matrix(8, 2, F32), "out_dtype": BF16},
         ["bfloat16 out_dtype of float32 operands"]),
        ("mm", {"self": matrix(4, 8, torch.int8), "mat2": matrix(8, 2, torch.int8)},
         ["no product of int8 operands"]),
        ("mm", {"self": matrix(4, 8), "mat2": matrix(9, 2)}, ["sizes [4, 8] and [9, 2]"]),
        ("mm", {"self": matrix(4, 16)[:, ::2], "mat2": matrix(8, 2)},
         ["a copy of the operand [4, 8] with strides [16, 2]"]),
        ("addmm", {"self": matrix(4, 2, F32), "mat1": matrix(4, 8), "mat2": matrix(8, 2),
                   "out_dtype": F32, "out": matrix(4, 2, F32)}, []),
        ("addmm", {"self": matrix(4, 2, F16), "mat1": matrix(4, 8), "mat2": matrix(8, 2),
                   "out_dtype": F32}, ["a summand of float16 to a product of float32"]),
        ("addmm_", {"self": matrix(4, 4, F32)[:, ::2], "mat1": matrix(4, 8, F32),
                    "mat2": matrix(8, 2, F32)},
         ["a copy of the result [4, 2] with strides [4, 2]"]),
        ("addmv_", {"self": matrix(1, 4, F32)[0], "mat": matrix(4, 8, F32),
                    "vec": matrix(1, 8, F32)[0]}, []),
    ],
)  # fmt: skip
def test_products_that_cuda_takes(name, arguments, faults) -> None:
    assert rules.product_faults(name, arguments) == faults


def test_launches_that_are_refused() -> None:
    def kernel(x_ptr, factor, BLOCK):
        pass

    parameters = [*inspect.signature(kernel).parameters.values()]
    device = torch.device("cuda:1")
    given = {"x_ptr": matrix(2, 2), "factor": 1.0, "BLOCK": 8}

    def faults(grid=(1,), current=1, **changed):
        return rules.launch_faults(parameters, grid, {**given, **changed}, device, current)

    on_meta = ["x_ptr is on meta"]
    assert faults() == on_meta
    assert faults(x_ptr=None) == []
    assert faults(x_ptr=None, current=0) == ["it goes to cuda:0, its tensors are on cuda:1"]
    for grid in ((0,), (2**31,), (1, 65536)):
        assert faults(grid, x_ptr=None) == [f"a grid of {grid}"]
    assert faults(x_ptr=None, factor=1e39) == ["factor=1e+39 is beyond float32"]
    del given["BLOCK"]
    assert faults(x_ptr=None) == ["BLOCK is not given"]


@pytest.mark.parametrize("task", ["forward", "frozen", "trained", "lora", "kl", "kl trained"])
@pytest.mark.parametrize("workspace_mb", [0.05, 4])
def test_a_plan_s_promise_is_kept(task, workspace_mb, device) -> None:
    """By the launchers' own counts, in the interpreter or on a GPU."""
    n, h, v = 40, 16, 700
    needs = task != "forward", "trained" in task
    hidden = torch.randn(n, h, device=device, requires_grad=needs[0])
    weight = torch.randn(v, h, device=device, requires_grad=needs[1])
    labels = torch.randint(v, (n,), device=device)
    options = {"backend": "triton", "workspace_mb": workspace_mb}
    if task == "lora":
        options["lora_hidden"] = torch.randn(n, 4, device=device, requires_grad=True)
        options["lora_weight"] = torch.randn(v, 4, device=device, requires_grad=True)
    made, real = [], plans.make_plan
    with mock.patch.object(
        plans, "make_plan", lambda **given: made.append(real(**given)) or made[-1]
    ):
        kernels.launches.clear()
        if "kl" in task:
            reference = torch.randn(n, 8, device=device), torch.randn(v, 8, device=device)
            out = prefkern.linear_kl(hidden, weight, labels, *reference, **options).kl
        else:
            out = prefkern.linear_logprobs(hidden, weight, labels, **options)
        if needs[0]:
            out.sum().backward()
    (plan,) = made
    promised = expected.of_plan(plan, needs[0])
    seen = {f"_{name}_kernel": count for name, count in kernels.launches.items() if count}
    assert seen == dict(promised.launches)
    assert (workspace_mb == 4) == (promised.launches["_fold_kernel"] == 1)
    # A launch or a product more is a difference.
    more = expected.Promise(Counter(seen), promised.products + 1, promised.operations)
    assert expected.differences(promised, more) == [
        f"{promised.products + 1} products, the plan promises {promised.products}"
    ]
    more.launches["_fold_kernel"] += 1
    assert "launches of _fold_kernel" in expected.differences(promised, more)[0]
