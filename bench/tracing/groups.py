"""Heads and sequences over several ranks, what `torch.compile` runs, and GPUs that lack a product.

Collectives are recorded and not made: a rank of a fake process group goes on with its own numbers.
Ranks agree upon a call by objects of the host, which is left out; the checksum that they exchange is
read from the device, and counts.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

import prefkern
from prefkern.objectives import build
from prefkern.ops import compiled, wide_products
from prefkern.ops.agreement import Party
from tracing import cases
from tracing.cases import CAPPED, SELECT, B, Case, H, T, V, empty, labels_of

CHECKSUM = "prefkern/ops/agreement.py:checksum (_local_scalar_dense)"


@contextlib.contextmanager
def ranks() -> Iterator[None]:
    """Two ranks, of which this is the first."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with mock.patch.object(Party, "compare", lambda *_: None):
            yield
    finally:
        dist.destroy_process_group()


def _shard() -> prefkern.VocabShard:
    assert dist.group.WORLD is not None
    return prefkern.VocabShard(dist.group.WORLD, 0, 2 * V)


def _sharded_loss(objective: Any, reference: str | None, **given: Any) -> None:
    cases.loss(objective, reference, vocab=_shard(), **given)


def _parted_loss(objective: Any) -> None:
    options = {"sequence_group": dist.group.WORLD}
    cases.loss(objective, "sums", packed=True, options=options)


def group_cases() -> Iterator[Case]:
    n = B * T
    for name, options in (
        ("log-probs alone", {"hidden": False}),
        ("frozen head", {}),
        ("trained head, 32 MiB", {"head": True, "workspace_mb": 32}),
        ("trained, bias, softcap", {"head": True, "bias": True, **CAPPED}),
        ("LoRA on the head", {"rank": 16}),
    ):
        yield Case(
            "head over two ranks",
            name,
            lambda options=options: cases.operator(vocab=_shard(), **options),
            scored=n,
            vocab_size=2 * V,
            waits={SELECT: 1, CHECKSUM: 1},
            backward=options.get("hidden", True),
            context=ranks,
            collectives=2 + options.get("hidden", True),
            sums_bias="bias" in options,
        )
    for name, reference, given in (
        ("adadpo", "sums", {}),
        ("adadpo", "the policy's head", {"head": True}),
        ("tdpo2", "its own head", {"head": True}),
    ):
        yield Case(
            "head over two ranks",
            f"{name}, {reference}{', trained' if given else ''}",
            lambda name=name, reference=reference, given=given: _sharded_loss(
                build(name), reference, **given
            ),
            scored=n,
            vocab_size=2 * V,
            waits={SELECT: 1, CHECKSUM: 1},
            context=ranks,
            pair_losses=int(name == "adadpo"),
            collectives=3,
        )
    for name in ("adadpo", "alphadpo"):
        make = functools.cache(functools.partial(build, name))
        yield Case(
            "sequence over two ranks",
            name,
            lambda make=make: _parted_loss(make()),
            scored=n,
            total=2 * n,
            # Of the reference's sums.
            waits={SELECT: 1, CHECKSUM: 1},
            context=ranks,
            # Statistics follow the batch to its device.
            warm=name == "alphadpo",
            collectives=1 if name == "adadpo" else 3,
        )


# Under torch.compile


def _arguments(options: compiled.Options, trains_head: bool, with_reference: bool) -> list[Any]:
    n, dtype = B * T, torch.bfloat16
    reference: list[Any] = [None, None, None]
    if with_reference:
        reference = [empty(n, 512, dtype=dtype), empty(V, 512, dtype=dtype), None]
    bias = empty(V, dtype=dtype) if options.of_bias else None
    head = [empty(n, H, dtype=dtype), empty(V, H, dtype=dtype), bias, None, None]
    return [*head, *reference, labels_of(n)]


def compiled_operators(trains_head: bool, with_reference: bool, with_stats: bool) -> None:
    """Both operators that a compiled region runs, and what it believes that they return."""
    options = compiled.Options(
        -100, 1.0, None, 1.0, 256.0, "triton", torch.bfloat16, torch.bfloat16,
        True, trains_head, trains_head, False, False,
    )  # fmt: skip
    inputs = _arguments(options, trains_head, with_reference)
    values = [*vars(options).values()]
    forward = [*inputs, None, with_stats, *values]
    found = compiled._logprobs(*forward)
    _same(found, compiled._forward_op(*forward))
    needs = [True, trains_head, trains_head, False, False]
    dkl = empty(B * T) if with_reference else None
    arguments = [empty(B * T), dkl, *inputs, *found[compiled._VALUES :], *needs, *values]
    _same(compiled._logprobs_backward(*arguments), compiled._backward_op(*arguments))


def _same(found: Any, believed: Any) -> None:
    """Raise unless the tensors have the sizes, dtypes, devices and strides that were believed."""
    for number, (x, y) in enumerate(zip(found, believed, strict=True)):
        mine, theirs = (
            (list(z.shape), z.dtype, z.device, list(z.stride()) if z.numel() else [])
            for z in (x, y)
        )
        if mine != theirs:
            raise AssertionError(f"output {number} is {mine}, and believed to be {theirs}")


def compiled_cases() -> Iterator[Case]:
    for trains_head in (False, True):
        for with_reference in (False, True):
            name = f"{'trained' if trains_head else 'frozen'} head" + (
                ", divergence" if with_reference else ", statistics"
            )
            yield Case(
                "torch.compile",
                name,
                functools.partial(
                    compiled_operators, trains_head, with_reference, not with_reference
                ),
                scored=B * T,
                # Forward and backward are operators of their own, and each finds the scored tokens.
                waits={SELECT: 2},
                plans="last",
                sums_bias=trains_head,
            )


# Devices that lack a product


@contextlib.contextmanager
def without_wide_products() -> Iterator[None]:
    """A GPU whose library does not make float32 of half-precision operands, as older ROCm's."""
    with mock.patch.object(wide_products, "refusal", lambda *_: "refused"):
        yield


def lacking_cases() -> Iterator[Case]:
    n = B * T
    for dtype_name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        for name, options in (
            ("log-probs alone", {"hidden": False}),
            ("frozen head", {}),
            ("trained head, bias, 64 MiB", {"head": True, "bias": True, "workspace_mb": 64}),
            ("LoRA on the head", {"rank": 16}),
        ):
            yield Case(
                "no products with a float32 result",
                f"{name}, {dtype_name}",
                lambda dtype=dtype, options=options: cases.operator(dtype, **options),
                scored=n,
                backward=options.get("hidden", True),
                context=without_wide_products,
            )
    yield Case(
        "no products with a float32 result",
        "divergence, trained head",
        lambda: cases.divergence(torch.bfloat16, head=True),
        scored=n,
        context=without_wide_products,
    )


def all_cases() -> list[Case]:
    return [*group_cases(), *compiled_cases(), *lacking_cases()]
