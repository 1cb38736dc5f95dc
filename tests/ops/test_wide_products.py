"""Products of half-precision operands with a float32 result are tried, not looked up by version."""

from __future__ import annotations

import pytest
import torch

from prefkern.cli import env
from prefkern.ops import cpu, operands, plan, wide_products

HALVES = wide_products.HALVES


@pytest.fixture(autouse=True)
def _fresh():
    wide_products.refusal.cache_clear()
    yield
    wide_products.refusal.cache_clear()


@pytest.fixture
def library(monkeypatch):
    """Put products with `out_dtype` into the CPU's library; returns what was asked of it."""
    asked = []

    def put(rounds_to=None, error=None, of_addmm=True):
        def product(a, b):
            assert a.dtype == b.dtype
            if error is not None:
                raise error
            made = a.float() @ b.float()
            return made if rounds_to is None else made.to(rounds_to).float()

        def mm(a, b, *, out_dtype, out):
            asked.append(("mm", a.dtype, out_dtype))
            return out.copy_(product(a, b))

        def addmm(x, a, b, *, out_dtype, out):
            asked.append(("addmm", a.dtype, out_dtype))
            if not of_addmm:
                raise NotImplementedError("Could not run 'aten::addmm.dtype_out'\nthe backends are")
            return out.copy_(x + product(a, b))

        monkeypatch.setattr(torch, "mm", mm)
        monkeypatch.setattr(torch, "addmm", addmm)
        return asked

    return put


@pytest.mark.parametrize("dtype", HALVES)
def test_a_library_that_has_them(dtype, library):
    asked = library()
    assert wide_products.refusal("cpu", dtype) is None
    assert wide_products.refusal("cpu", dtype) is None
    # Once for a dtype, both kinds of products.
    assert asked == [(name, dtype, torch.float32) for name in ("mm", "addmm")]


@pytest.mark.parametrize("dtype", HALVES)
def test_a_library_that_rounds(dtype, library):
    library(rounds_to=dtype)
    assert wide_products.refusal("cpu", dtype) == "the result is rounded: 4096 for 4097"


@pytest.mark.parametrize(
    "error",
    [
        # What torch says on ROCm before 2.10, and of a backend without the operator.
        RuntimeError(
            "gemm input type at::BFloat16 and output type float is not supported for ROCm"
        ),
        NotImplementedError("Could not run 'aten::mm.dtype_out' with arguments from 'MPS'"),
        TypeError("mm() got an unexpected keyword argument 'out_dtype'"),
    ],
)
def test_a_library_that_refuses(error, library):
    library(error=error)
    said = wide_products.refusal("cpu", torch.bfloat16)
    assert said == f"{type(error).__name__}: {error}"


def test_a_library_that_refuses_half_of_it(library):
    library(of_addmm=False)
    said = wide_products.refusal("cpu", torch.bfloat16)
    assert said == "NotImplementedError: Could not run 'aten::addmm.dtype_out'"


def test_memory_that_ran_out_is_no_answer(library):
    library(error=torch.OutOfMemoryError("out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        wide_products.refusal("cpu", torch.bfloat16)
    library()
    assert wide_products.refusal("cpu", torch.bfloat16) is None


def test_neither_autocast_nor_modes_reach_the_trial(library):
    library()
    with torch.autocast("cpu", dtype=torch.float16), torch.device("meta"):
        assert wide_products.refusal("cpu", torch.bfloat16) is None


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
@pytest.mark.parametrize("found", [None, "refused"])
def test_a_device_that_is_here_is_tried(kind, found, monkeypatch):
    tried = []
    monkeypatch.setattr(wide_products, "can_try", lambda _: True)
    monkeypatch.setattr(wide_products, "refusal", lambda *given: tried.append(given) or found)
    made = operands.operands_for(torch.bfloat16, kind)
    assert made.upcasts == (found is not None) and not made.rounds
    assert tried == [(kind, torch.bfloat16)]
    # Products of float32 need no trial.
    assert not operands.operands_for(torch.float32, kind).upcasts and len(tried) == 1
    # A CPU has a way of its own.
    for of_cpu in (True, False):
        monkeypatch.setattr(cpu, "has_wide_product", lambda has=of_cpu: has)
        assert wide_products.has_wide_product("cpu", torch.bfloat16) == of_cpu
        assert not wide_products.has_wide_product("cpu", torch.float16)
    assert len(tried) == 1


@pytest.mark.parametrize(("kind", "hip", "has"), [
    ("cuda", None, True), ("cuda", "7.0", False), ("xpu", None, False), ("mps", None, False),
    ("nothing", None, False),
])  # fmt: skip
def test_a_device_that_is_not_here(kind, hip, has, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert not wide_products.can_try(kind)
    assert wide_products.has_wide_product(kind, torch.bfloat16) == has


def test_a_graph_that_is_captured_is_not_disturbed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not wide_products.can_try("cuda")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert wide_products.can_try("cuda")


def test_compile_takes_the_answer_for_a_constant(monkeypatch):
    monkeypatch.setattr(wide_products, "can_try", lambda kind: kind == "cuda")
    tried = []
    monkeypatch.setattr(wide_products, "refusal", lambda *given: tried.append(given))

    def function(x):
        return x + operands.operands_for(torch.bfloat16, "cuda").upcasts

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)).item() == 0
    compiled(torch.zeros(1))
    assert tried == [("cuda", torch.bfloat16)]


def test_without_them_tiles_are_planned_for_float32(monkeypatch):
    def planned() -> plan.Plan:
        import prefkern

        return prefkern.plan_for(256, 64, 8192, device="xpu", workspace_mb=4)

    monkeypatch.setattr(wide_products, "can_try", lambda _: True)
    monkeypatch.setattr(wide_products, "refusal", lambda *_: None)
    wide = planned()
    monkeypatch.setattr(wide_products, "refusal", lambda *_: "refused")
    raised = planned()
    # A float32 tile is the second product's operand itself, and so may be larger.
    assert raised.forward_tiles.vocab_tile > wide.forward_tiles.vocab_tile


def test_env_says_what_was_found(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not [value for name, value in env.facts() if name.startswith("products on")]
    answers = {torch.bfloat16: None, torch.float16: "RuntimeError: not supported for ROCm"}
    monkeypatch.setattr(wide_products, "can_try", lambda kind: kind == "xpu")
    monkeypatch.setattr(wide_products, "refusal", lambda kind, dtype: answers[dtype])
    assert dict(env.facts())["products on xpu"] == (
        "float32 from bfloat16; float16 is raised to float32 first "
        "(RuntimeError: not supported for ROCm)"
    )
