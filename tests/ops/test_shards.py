"""A head over several ranks against one process with the whole head; and a group of one rank.

Real processes: one launch of two ranks runs all cases, and, in the long layer, one of four.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import prefkern
from prefkern.ops import sequences
from prefkern.ops.agreement import checksum
from prefkern_bench.measure import Meter
from support.machine import DEVICE
from support.ranks import group_of_one
from support.vocab_errors import assert_as_accurate, assert_exact, joined
from support.vocab_ranks import (
    CASES,
    REFERENCE,
    ROUNDED,
    TRAINED,
    TRITON,
    Seen,
    V,
    cast,
    drawn,
    entries_of,
    launch,
    outcome,
)

OPERATOR = {name: case for name, case in CASES.items() if case.call in ("logprobs", "kl")}
# What two ranks say to one another, and what any number does.
OTHERS = {
    2: ["retained", "dtensors", "placements", "disagreements"],
    4: ["dtensors", "placements", "two groups"],
}


def test_a_checksum_sees_every_bit():
    """Of one number, and of all: a sign is a float64's highest bit."""
    numbers = torch.tensor([1.5, -2.0, 0.0, 700.25], dtype=torch.float64).view(torch.int64)
    flipped = [numbers ^ (1 << bit if bit < 63 else -(1 << 63)) for bit in range(64)]
    for place in range(4):
        flipped += [torch.where(torch.arange(4) == place, each, numbers) for each in flipped[:64]]
    assert len({checksum(each) for each in [numbers, *flipped]}) == 1 + 5 * 64
    assert checksum(numbers.flip(0)) != checksum(numbers)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Any:
    """What each of so many ranks saw, by case; they start at the first use."""
    seen: dict[int, list[dict[str, Any]]] = {}

    def of(count: int) -> list[dict[str, Any]]:
        if count not in seen:
            names = [*OPERATOR, *ROUNDED, *TRITON, *OTHERS[count]]
            seen[count] = launch(tmp_path_factory.mktemp(f"ranks{count}"), count, names)
        return seen[count]

    return of


def parts_of(ranks: Any, count: int, name: str) -> list[Seen]:
    return [each[name] for each in ranks(count)]


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", OPERATOR)
@pytest.mark.long(count=4)
def test_exact_in_float64(count, name, ranks):
    case, parts = OPERATOR[name], parts_of(ranks, count, name)
    assert_exact(parts, case)
    for rank, part in enumerate(parts):
        start, stop = entries_of(case.cut, rank, count)
        assert part.plan.vocab_size == stop - start
        if case.structure is not None and stop - start > 1:
            assert part.plan.structure == case.structure
    if name == "kl, equal models":
        assert (parts[0].values["kl"] == 0).all()


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", [*ROUNDED, *TRITON])
@pytest.mark.long(count=4)
def test_as_accurate_as_one_process(count, name, ranks):
    parts = parts_of(ranks, count, name)
    assert_as_accurate(parts, (ROUNDED | TRITON)[name])
    assert name not in TRITON or all(part.plan.backend == "triton" for part in parts)


@pytest.mark.parametrize("name", OPERATOR)
def test_collectives(name, ranks):
    """One agreement; two all-reduces of vectors in forward; one of the states' gradient."""
    case = OPERATOR[name]
    tokens = int((drawn(case)["labels"] >= 0).sum())
    vector, given = 8 * tokens, [("objects", 0)]
    has_stats, is_kl = case.options.get("return_stats", False), case.call == "kl"
    largest = 1 + has_stats + is_kl
    # Sum and label logit; those of the reference and its cross term; a slope; three moments.
    sums = 2 + 3 * is_kl + ("softcap" in case.options) + 3 * has_stats
    width = 24 if any("lora" in each for each in case.trains) else 16
    if tokens:
        given += [("MAX", largest * vector), ("SUM", sums * vector)]
    if tokens and "hidden" in case.trains:
        given.append(("SUM", width * vector))
    for part in parts_of(ranks, 2, name):
        assert part.calls == given


def test_a_second_backward(ranks):
    case = CASES["lora, trained, kept"]
    whole = outcome(case)
    seen = [each["retained"]["gradients"] for each in ranks(2)]
    for first, second in seen:
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    parts = [Seen({}, dict(zip(case.trains, first, strict=True))) for first, _ in seen]
    for name in case.trains:
        torch.testing.assert_close(
            joined(parts, name), whole.gradients[name], rtol=1e-9, atol=1e-11
        )


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", ["83 entries", "5 entries", "whole"])
@pytest.mark.long(count=4)
def test_a_dtensor_is_a_shard(count, name, ranks):
    """Its gradient is such a DTensor again. Five entries leave four ranks an empty shard."""
    entries = 5 if name == "5 entries" else V
    tensors = drawn(CASES["lora, trained, kept"])
    labels = tensors["labels"]
    labels = labels.where(labels < 0, labels % entries)
    parts = ("weight", "bias", "lora_weight")
    leaves = {part: tensors[part][:entries] for part in parts}
    leaves |= {part: tensors[part] for part in ("hidden", "lora_hidden")}
    leaves = {part: x.clone().requires_grad_() for part, x in leaves.items()}
    logps = prefkern.linear_logprobs(labels=labels, **leaves)
    logps.backward(tensors["grad"][0])
    for each in ranks(count):
        found = each["dtensors"][name]
        torch.testing.assert_close(found["logps"], logps.detach(), rtol=1e-12, atol=1e-12)
        placement = "(Replicate(),)" if name == "whole" else "(Shard(dim=0),)"
        assert found["placed"] == dict.fromkeys(parts, placement) | {"hidden": "(Replicate(),)"}
        for part, leaf in leaves.items():
            torch.testing.assert_close(
                found["gradients"][part], leaf.grad, rtol=1e-11, atol=1e-12, msg=part
            )


@pytest.mark.long
def test_two_groups_of_two(ranks):
    """Each with tokens of its own, as with data parallelism beside."""
    whole = outcome(CASES["frozen"])
    for rank, each in enumerate(ranks(4)):
        found = each["two groups"]
        assert found["rolled"] == rank // 2
        for mine, true in (
            (found["values"], whole.values["logps"]), (found["gradient"], whole.gradients["hidden"])
        ):  # fmt: skip
            torch.testing.assert_close(mine, true.roll(rank // 2, 0), rtol=1e-11, atol=1e-12)


# The words of rank 0 and of rank 1.
SAME = "must be the same on all ranks of vocab's group"
DISAGREE = {
    "labels out of range on one rank": (
        "RuntimeError: rank 1 of vocab's group refused this call: ValueError: labels must be in",
        "ValueError: labels must be in [0, 83)",
    ),
    "other labels": (f"ValueError: labels {SAME}",) * 2,
    "another shape": (
        "ValueError: labels must have the shape of hidden",
        "RuntimeError: rank 0 of vocab's group refused this call: ValueError: labels must have",
    ),
    "other calls": (f"ValueError: return_stats {SAME}",) * 2,
    "other options": (f"ValueError: temperature {SAME}",) * 2,
    "a gradient on one rank": (f"ValueError: hidden {SAME}",) * 2,
    "other sizes": (f"ValueError: size {SAME}",) * 2,
    "a gap": ("ValueError: vocab: the ranks' start and rows of weight must have each entry",) * 2,
    "an overlap": ("rank 0 [0, 53), rank 1 [50, 83)",) * 2,
    "too many rows": (
        "RuntimeError: rank 1 of vocab's group refused this call: ValueError: weight has 83 rows",
        "ValueError: weight has 83 rows, and vocab has 33 entries from its start, 50, to its size",
    ),
    "a state in parts on one rank": (
        "RuntimeError: rank 1 of vocab's group refused this call: TypeError: hidden must be a tensor",
        "TypeError: hidden must be a tensor, or a DTensor with placement Replicate",
    ),
    "a DTensor and vocab on one rank": (
        "RuntimeError: rank 1 of vocab's group refused this call: ValueError: vocab was given, and",
        "ValueError: vocab was given, and weight is a DTensor",
    ),
    "columns on one rank": (
        "RuntimeError: rank 1 of vocab's group refused this call: TypeError: weight must be a tensor",
        "TypeError: weight must be a tensor, or a DTensor with placement Replicate, or with",
    ),
    **dict.fromkeys(
        ("a bias everywhere on one rank", "a bias of a kl"),
        (
            "RuntimeError: rank 1 of vocab's group refused this call: TypeError: bias must be placed",
            "TypeError: bias must be placed as weight is, (Shard(dim=0),)",
        ),
    ),
}


def test_ranks_that_disagree_all_raise(ranks):
    """And none waits: a right call after each error has its answer on both ranks."""
    first, second = (each["disagreements"] for each in ranks(2))
    assert first.keys() == second.keys() == DISAGREE.keys()
    for name, (of_first, of_second) in DISAGREE.items():
        assert of_first in first[name] and of_second in second[name], (name, first, second)


PLACED = {
    "columns": "TypeError: weight must be a tensor, or a DTensor with placement Replicate, or with "
    "Shard(0) on a mesh of one dimension, got a DTensor with (Shard(dim=1),)",
    "two dimensions": "on a mesh of 2 dimensions",
    "twice": "ValueError: vocab was given, and weight is a DTensor",
    "tokens": "TypeError: hidden must be a tensor, or a DTensor with placement Replicate",
    "bias": "TypeError: bias must be placed as weight is, (Shard(dim=0),)",
    "a plain weight's bias": "TypeError: bias must be a tensor, or a DTensor with placement",
    "a reference alone": "ValueError: ref_weight is a DTensor with placement Shard(0), and weight",
    "a whole reference": "ref_weight has 83",
}


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.long(count=4)
def test_other_placements_are_refused(count, ranks):
    for each in ranks(count):
        assert each["placements"].keys() == PLACED.keys()
        for name, words in PLACED.items():
            assert words in each["placements"][name], name


@pytest.fixture
def shard():
    with group_of_one() as group:
        yield lambda size: prefkern.VocabShard(group, 0, size)


@pytest.mark.parametrize("is_trained", [False, True])
def test_a_group_of_one_has_the_whole(is_trained, shard, backend):
    tensors = cast(drawn(CASES["kl, trained, kept"]), torch.float32)
    names = TRAINED if is_trained else ("hidden",)
    found = []
    for options in ({}, {"vocab": shard(V)}):
        given = {name: tensors[name] for name in (*TRAINED, *REFERENCE, "labels")}
        leaves = [given[name].clone().requires_grad_() for name in names]
        given |= dict(zip(names, leaves, strict=True))
        out = prefkern.linear_kl(**given, backend=backend, **options)
        grads = torch.autograd.grad((out.logps + 2 * out.kl).sum(), leaves)
        found.append((*out, *grads))
    for mine, plain in zip(*found, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-6, atol=1e-7)


KINDS = {
    "frozen": (False, {}),
    "kept": (True, {"workspace_mb": 48.0}),
    "recomputed": (True, {}),
    "statistics": (False, {"return_stats": True}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_memory_stays_in_the_workspace(kind, shard):
    """With all tokens' states, and all kept ones' maxima, which wait for the other ranks."""
    is_trained, options = KINDS[kind]
    options = {"workspace_mb": 8.0, "vocab": shard(9000), "backend": "torch"} | options
    hidden, weight = torch.randn(2000, 64, device=DEVICE), torch.randn(9000, 64, device=DEVICE)
    labels = torch.randint(9000, (2000,), device=DEVICE)
    leaves = [hidden.requires_grad_(), weight.requires_grad_(is_trained)]
    with Meter() as meter:
        out = prefkern.linear_logprobs(hidden, weight, labels, **options)
        plan = prefkern.last_plan()
        logps = out if isinstance(out, Tensor) else out.logps
        in_forward = meter.peak_bytes
        logps.sum().backward()
    assert plan is not None and plan.shard_bytes > 0
    assert plan.workspace_bytes <= options["workspace_mb"] * 2**20
    assert (plan.kept_tokens > 0) == (kind == "kept")
    # Results and what is kept for backward; in backward the gradients, and their float32 sum.
    kept = 4 * 2000 * (64 + 12)
    assert in_forward <= options["workspace_mb"] * 2**20 + kept
    gradients = sum(4 * x.numel() for x in leaves if x.requires_grad) + 4 * 2000 * 64
    assert meter.peak_bytes <= options["workspace_mb"] * 2**20 + kept + gradients


def test_graphs_are_refused(shard, monkeypatch):
    tensors = cast(drawn(CASES["frozen"]), torch.float32)
    given = [tensors[name] for name in ("hidden", "weight", "labels")]

    def call() -> Any:
        return prefkern.linear_logprobs(*given, vocab=shard(V))

    message = "runs outside of torch.compile and CUDA graphs"
    with monkeypatch.context() as patch, pytest.raises(NotImplementedError, match=message):
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        call()
    with monkeypatch.context() as patch, pytest.raises(NotImplementedError, match=message):
        patch.setattr(sequences, "is_capturing", lambda x: True)
        call()
