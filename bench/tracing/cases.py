"""The calls that are traced: each public call, each objective, each dtype and layout.

A case runs on fake tensors. `waits` are the reads of the device that its documentation promises, by
the place that makes them; nothing else may wait.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import prefkern
from prefkern.objectives import Mixture, Objective, build, names
from tracing.machine import DEVICE

SELECT = "prefkern/ops/sequences.py:select (tolist)"
REPORT = "prefkern/loss/nonfinite.py:report (_local_scalar_dense)"
# Pairs, tokens of a row, hidden size, vocabulary.
B, T, H, V = 4, 512, 1024, 32000
CAPPED = {"softcap": 30.0, "logit_scale": 0.5, "temperature": 1.5}
# H and V of the shapes of `prefkern bench`, and their scored tokens.
SHAPES = {
    "Llama-3-8B": (16384, 4096, 128256),
    "Qwen3-0.6B": (16384, 1024, 151936),
    "Gemma-3-270M": (16384, 640, 262144),
    "Gemma-2-9B": (8192, 3584, 256000),
    "long context": (32768, 4096, 128256),
}


@dataclass(frozen=True)
class Case:
    """A call, and what it may do.

    Args:
        run: makes the call, backward included, and returns what it gave: plan and output.
        scored: tokens that `sequences.select` is answered.
        waits: places that read the device, and how often.
        backward: whether `run` calls backward.
        warm: whether it runs once before it is watched: statistics follow the first batch.
        pair_losses: launches of the pair kernel.
        product_parts: of `expected.of_plan`.
        sums_bias: as in `expected.of_plan`.
        environment: variables that are set.
        context: around the call.
        collectives: all-reduces over ranks.
        plans: which plans make the promise: "all" that were made, or the "last" of them.
        prepare: runs before, outside of the pretended machine.
        reads: what places other than `select` read.
    """

    group: str
    name: str
    run: Callable[[], Any]
    scored: int
    vocab_size: int = V
    total: int = 0
    waits: dict[str, int] = field(default_factory=lambda: {SELECT: 1})
    backward: bool = True
    warm: bool = False
    pair_losses: int = 0
    product_parts: int = 0
    sums_bias: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    collectives: int = 0
    plans: str = "all"
    prepare: Callable[[], None] = lambda: None

    reads: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def answers(self) -> dict[str, list[Any]]:
        """What places read: `select` a count, the least and largest label, and of packed bounds."""
        facts = [self.scored, 0, self.vocab_size - 1, 1, 0, self.total or self.scored]
        return {"prefkern/ops/sequences.py:select": facts, **self.reads}


def empty(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=DEVICE, requires_grad=grad)


def labels_of(*shape: int) -> Tensor:
    return empty(*shape, dtype=torch.int64)


def backward(*results: Tensor) -> None:
    torch.stack([x.sum() for x in results]).sum().backward()


# The operator


def operator(
    dtype: torch.dtype = torch.bfloat16,
    n: int = B * T,
    h: int = H,
    v: int = V,
    *,
    hidden: bool = True,
    head: bool = False,
    bias: bool = False,
    rank: int = 0,
    weight_dtype: torch.dtype | None = None,
    **options: Any,
) -> None:
    states = empty(n, h, dtype=dtype, grad=hidden)
    weight = empty(v, h, dtype=weight_dtype or dtype, grad=head)
    if rank:
        options["lora_hidden"] = empty(n, rank, dtype=dtype, grad=True)
        options["lora_weight"] = empty(v, rank, dtype=dtype, grad=True)
    of_bias = empty(v, dtype=dtype, grad=head) if bias else None
    out = prefkern.linear_logprobs(states, weight, labels_of(n), of_bias, **options)
    logps = out if isinstance(out, Tensor) else out.logps
    if hidden or head or rank:
        backward(logps)
        _check_gradients(states, weight, of_bias, *options.values())


def _check_gradients(*inputs: Any) -> None:
    for x in inputs:
        if isinstance(x, Tensor) and x.requires_grad:
            assert x.grad is not None and (x.grad.dtype, x.grad.shape) == (x.dtype, x.shape)


def divergence(
    dtype: torch.dtype, *, hidden: bool = True, head: bool = False, **options: Any
) -> None:
    n = B * T
    states, weight = empty(n, H, dtype=dtype, grad=hidden), empty(V, H, dtype=dtype, grad=head)
    ref = empty(n, 512, dtype=dtype), empty(V, 512, dtype=dtype)
    out = prefkern.linear_kl(states, weight, labels_of(n), *ref, **options)
    if hidden or head:
        backward(out.logps, out.kl)
        _check_gradients(states, weight)


def operator_cases() -> Iterator[Case]:
    n = B * T
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}
    for name, dtype in dtypes.items():
        for task, options in (
            ("log-probs alone", {"hidden": False}),
            ("frozen head", {}),
            ("trained head", {"head": True}),
            ("trained head, 32 MiB", {"head": True, "workspace_mb": 32}),
            ("trained head alone", {"hidden": False, "head": True}),
            ("bias, softcap, statistics", {"bias": True, "return_stats": True, **CAPPED}),
            ("trained bias, softcap, 32 MiB", {"head": True, "bias": True, "workspace_mb": 32}),
            ("LoRA on a frozen head", {"rank": 16}),
            ("LoRA on a trained head", {"rank": 16, "head": True}),
            ("torch backend, trained", {"head": True, "backend": "torch"}),
        ):
            trains = options.get("hidden", True) or options.get("head", False)
            yield Case(
                f"operator, {name}",
                task,
                lambda dtype=dtype, options=options: operator(dtype, **options),
                scored=n // 2 if "statistics" in task else n,
                backward=trains,
                sums_bias=task.startswith("trained bias") and dtype != torch.float32,
            )
        for task, options in (
            ("divergence, values alone", {"hidden": False}),
            ("divergence, frozen head", {}),
            ("divergence, trained head", {"head": True, **CAPPED}),
            ("divergence, trained head, 32 MiB", {"head": True, "workspace_mb": 32}),
        ):
            yield Case(
                f"operator, {name}",
                task,
                lambda dtype=dtype, options=options: divergence(dtype, **options),
                scored=n,
                backward=options.get("hidden", True),
            )
    yield Case("operator, bf16", "no token is scored", lambda: operator(head=True), scored=0)
    yield Case("operator, bf16", "one token", lambda: operator(head=True), scored=1)
    yield Case("operator, bf16", "V = 50257", lambda: operator(v=50257, head=True), n, 50257)

    def autocast() -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            operator(torch.float32, head=True)

    yield Case("operator, bf16", "float32 under autocast", autocast, scored=n)
    mixed = {"weight_dtype": torch.float32, "head": True}

    def autocast_mixed() -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            operator(torch.bfloat16, **mixed)

    yield Case("operator, bf16", "a float32 head under autocast", autocast_mixed, scored=n)
    for name, (tokens, h, v) in SHAPES.items():
        capped = CAPPED if name == "Gemma-2-9B" else {}
        for task, options in (
            ("log-probs alone", {"hidden": False}),
            ("frozen head", {}),
            ("trained head", {"head": True}),
        ):
            yield Case(
                f"operator, {name}",
                task,
                lambda size=(tokens, h, v), options={**options, **capped}: operator(
                    torch.bfloat16, *size, **options
                ),
                scored=tokens,
                vocab_size=v,
                backward=options.get("hidden", True),
            )
    yield Case(
        "operator, bf16",
        "product and fold in one kernel",
        lambda: operator(hidden=False),
        scored=n,
        backward=False,
        # 32000 entries are whole tiles of 256.
        product_parts=1,
        environment={"PREFKERN_PRODUCT_FOLD": "1"},
    )
    yield Case(
        "operator, bf16",
        "in a CUDA graph",
        lambda: operator(head=True),
        scored=n,
        waits={},
        context=lambda: mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: True),
    )


# The loss

REFERENCES = ("its own head", "the policy's head", "sums")


def loss(
    objective: Any,
    reference: str | None,
    dtype: torch.dtype = torch.bfloat16,
    *,
    head: bool = False,
    packed: bool = False,
    rank: int = 0,
    trains: bool = True,
    options: dict[str, Any] | None = None,
    **given: Any,
) -> None:
    rows = _rows_of(objective)
    shape = (rows * T,) if packed else (rows, T)
    hidden = empty(*shape, H, dtype=dtype, grad=trains)
    weight = empty(V, H, dtype=dtype, grad=head)
    is_paired = isinstance(objective, Objective)
    if reference == "its own head":
        given |= {
            "ref_hidden": empty(*shape, H, dtype=dtype),
            "ref_weight": empty(V, H, dtype=dtype),
        }
    elif reference == "the policy's head":
        given |= {"ref_hidden": empty(*shape, H, dtype=dtype), "ref_weight": weight}
    elif reference == "sums":
        given |= {"ref_logps": empty(2 * B)}
    if is_paired and objective.needs_reward_margins:
        given |= {"reward_margins": empty(B)}
    if packed:
        given |= {"cu_seqlens": empty(rows + 1, dtype=torch.int32)}
    if rank:
        given |= {
            "lora_hidden": empty(*shape, rank, dtype=dtype, grad=True),
            "lora_weight": empty(V, rank, dtype=dtype, grad=True),
        }
    if not is_paired:
        given |= {
            "desirable": empty(2 * B, dtype=torch.bool),
            "mismatched_log_ratios": empty(2 * B),
        }
    fused = prefkern.FusedPreferenceLoss(objective, **(options or {}))
    out = fused(hidden, weight, labels_of(*shape), **given)
    for x in vars(out).values():
        assert not isinstance(x, Tensor) or x.device == DEVICE, x
    for x in (getattr(out, "metrics", None) or {}).values():
        assert x.device == DEVICE
    if trains or head:
        out.loss.backward()
        _check_gradients(hidden, weight, *given.values())


def _rows_of(objective: Any) -> int:
    return 3 * B if getattr(objective, "needs_gold", False) else 2 * B


def references_of(objective: Any) -> list[str | None]:
    """The ways to give an objective its reference."""
    if isinstance(objective, Objective) and objective.needs_kls:
        return ["its own head", "the policy's head"]
    return [*REFERENCES] if objective.needs_reference else [None]


def loss_case(
    group: str,
    name: str,
    make: Callable[[], Any],
    reference: str | None,
    dtype: torch.dtype = torch.bfloat16,
    waits: dict[str, int] | None = None,
    **given: Any,
) -> Case:
    objective = make()
    terms = None
    by_kernel = (given.get("options") or {}).get("backend") != "torch"
    if isinstance(objective, Objective) and by_kernel:
        terms = objective.pair_kernel_terms()
    promised = {SELECT: 1}
    if reference == "its own head" and not getattr(objective, "needs_kls", False):
        promised = {SELECT: 1}
    # Made where tensors are fake, once: statistics stay from the first call to the next.
    made = functools.cache(make)
    return Case(
        group,
        name,
        lambda: loss(made(), reference, dtype, **given),
        scored=B * T,
        total=_rows_of(objective) * T,
        waits=promised if waits is None else waits,
        backward=given.get("trains", True) or given.get("head", False),
        warm=any(True for _ in objective.buffers()),
        pair_losses=len(terms or ()),
    )


def loss_cases() -> Iterator[Case]:
    for name in names():
        for reference in references_of(build(name)):
            text = f"reference by {reference}" if reference else "no reference"
            yield loss_case(f"loss, {name}", text, lambda name=name: build(name), reference)
    dpo = lambda **options: lambda: build("dpo", **options)
    for name, make, reference, given in (
        ("WPO's weights", dpo(use_weighting=True), "sums", {}),
        ("RPO's NLL term", dpo(rpo_alpha=1.0), "sums", {}),
        ("beta-DPO, half of the pairs", lambda: build("betadpo", keep=0.5), "sums", {}),
        (
            "a mixture of three",
            lambda: Mixture([build("dpo"), build("bco"), build("sft")], [0.8, 0.2, 1.0]),
            "sums",
            {},
        ),
    ):
        yield loss_case("loss, composed", name, make, reference, **given)
    for name, given in (
        ("packed", {"packed": True}),
        ("packed, trained head", {"packed": True, "head": True}),
        ("packed, reference by its own head", {"packed": True, "reference": "its own head"}),
        ("trained head", {"head": True}),
        ("LoRA on the head", {"rank": 16}),
        ("LoRA on the head, packed", {"rank": 16, "packed": True}),
        ("statistics", {"return_stats": True}),
        ("evaluation", {"trains": False}),
        ("fp16", {"dtype": torch.float16, "head": True}),
        ("float32", {"dtype": torch.float32, "head": True}),
        ("softcap", CAPPED),
        ("ld_alpha", {"options": {"ld_alpha": 0.5}}),
        ("ld_alpha, packed", {"options": {"ld_alpha": 0.5}, "packed": True}),
        ("torch backend", {"options": {"backend": "torch"}, "head": True}),
    ):
        reference = given.pop("reference", "sums") if "reference" in given else "sums"
        yield loss_case("loss, layouts", name, lambda: build("adadpo"), reference, **given)
    yield loss_case(
        "loss, layouts",
        "on_nonfinite",
        lambda: build("adadpo"),
        "sums",
        waits={SELECT: 1, REPORT: 1},
        options={"on_nonfinite": "raise"},
    )
    for name in ("tdpo2", "alphadpo"):
        yield loss_case(
            "loss, layouts", f"{name}, packed, trained head", lambda name=name: build(name),
            "its own head", packed=True, head=True,
        )  # fmt: skip
    graph = loss_case(
        "loss, layouts", "in a CUDA graph", lambda: build("adadpo"), "sums", waits={}, packed=True
    )
    yield Case(
        **{
            **vars(graph),
            "scored": 2 * B * T,
            "context": lambda: mock.patch.object(
                torch.cuda, "is_current_stream_capturing", lambda: True
            ),
        }
    )


def all_cases() -> list[Case]:
    return [*operator_cases(), *loss_cases()]


@contextlib.contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    with mock.patch.dict(os.environ, values):
        yield
