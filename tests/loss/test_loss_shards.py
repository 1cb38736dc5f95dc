"""Losses of a head over several ranks, against one process: a launch of two ranks, long of four."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import prefkern
from prefkern import objectives
from support.vocab_errors import assert_exact
from support.vocab_ranks import CASES, drawn, launch

LOSSES = {name: case for name, case in CASES.items() if case.call not in ("logprobs", "kl")}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Any:
    """What each of so many ranks saw, by case; they start at the first use."""
    seen: dict[int, list[dict[str, Any]]] = {}

    def of(count: int) -> list[dict[str, Any]]:
        if count not in seen:
            names = [*LOSSES, "reference dtensors", *(["losses"] if count == 2 else [])]
            seen[count] = launch(tmp_path_factory.mktemp(f"ranks{count}"), count, names)
        return seen[count]

    return of


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.long(count=4)
def test_exact_in_float64(count, name, ranks):
    parts = [each[name] for each in ranks(count)]
    assert_exact(parts, LOSSES[name])
    reads = [call for call in parts[0].calls if call[0] == "MAX"]
    has_own_head = "ref_weight" in LOSSES[name].given and LOSSES[name].call != "tdpo2"
    # The policy's head is read once for both, also by a rank that has no row of it.
    assert len(reads) == 1 + has_own_head


def test_references_as_dtensors(ranks):
    tensors = drawn(CASES["dpo, one head"])
    loss = prefkern.FusedPreferenceLoss(objectives.build("dpo"))
    given = {name: tensors[name] for name in ("hidden", "labels", "ref_hidden", "weight")}
    for each in ranks(2):
        for found, name in zip(each["reference dtensors"], ("weight", "ref_weight"), strict=True):
            whole = loss(**given, ref_weight=tensors[name]).losses
            torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)


# The words of rank 0 and of rank 1.
DISAGREE = {
    "other objectives": ("ValueError: objective must be the same on all ranks of vocab's",) * 2,
    "a wrong argument on one rank": (
        "RuntimeError: rank 1 of vocab's group refused this call: ValueError: softcap must be > 0",
        "ValueError: softcap must be > 0, got -1.0",
    ),
    "a whole reference": (
        "ValueError: ref_weight has 83 rows and weight 50: with vocab both have the rows",
        "RuntimeError: rank 0 of vocab's group refused this call: ValueError: ref_weight has 83",
    ),
    "nonfinite on one rank": (
        "ValueError: on_nonfinite must be the same on all ranks of vocab's group",
    )
    * 2,
    "a row that is not finite": (
        "Every input of this rank is finite: another rank of vocab's group names what is not",
        # The second rank's part begins at entry 50.
        "weight: 1 of 33 vocabulary entries, the first is 53; an earlier optimiser step has",
    ),
    "a DTensor and vocab on one rank": (
        "RuntimeError: rank 1 of vocab's group refused this call: ValueError: vocab was given, and",
        "ValueError: vocab was given, and weight is a DTensor",
    ),
}


def test_ranks_that_disagree_all_raise(ranks):
    first, second = (each["losses"] for each in ranks(2))
    assert first.keys() == second.keys() == DISAGREE.keys()
    for name, (of_first, of_second) in DISAGREE.items():
        assert of_first in first[name] and of_second in second[name], (name, first, second)
