"""Sequences over several ranks, against one process with whole sequences and logits in memory.

Real processes: one launch of two ranks runs all cases, and, in the long layer, one of four.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import prefkern
from prefkern import objectives, reference
from prefkern.ops import sequences
from support.logprobs import relative
from support.ranks import group_of_one
from support.sequence_ranks import (
    AVERAGED,
    CASES,
    EVERY,
    KINDS,
    OBJECTIVES,
    ROUNDED,
    STATES,
    TRITON,
    WITH_VOCAB,
    Case,
    Model,
    S,
    arguments,
    drawn,
    launch,
    seen,
    tokens_of,
    truth,
)
from support.vocab_errors import assert_bitwise

OTHERS = {
    2: ["disagreements", "not finite", "counted once"],
    4: ["with vocab", "averaged", "disagreements with vocab"],
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Any:
    """What each of so many ranks saw, by case; they start at the first use."""
    found: dict[int, list[dict[str, Any]]] = {}

    def of(count: int) -> list[dict[str, Any]]:
        if count not in found:
            names = [*CASES, *OTHERS[count]]
            found[count] = launch(tmp_path_factory.mktemp(f"ranks{count}"), count, names)
        return found[count]

    return of


def whole(parts: list[dict[str, Any]], case: Case, name: str, of: str = "gradients") -> Tensor:
    """A gradient, or a statistic of tokens, of all ranks: tokens in their places; weights' sums."""
    values = [part[of][name] for part in parts]
    if of == "gradients" and name not in STATES:
        return torch.stack([x.double() for x in values]).sum(0)
    at = 0 if case.packed else 1
    count = sum(x.shape[at] for x in values)
    mine = [tokens_of(case.split, count, rank, len(parts)) for rank in range(len(parts))]
    order = torch.cat([each.sort().values if case.packed else each for each in mine])
    return torch.cat(values, at).index_select(at, order.argsort().to(values[0].device))


def assert_exact(parts: list[dict[str, Any]], case: Case, true: dict[str, Any]) -> None:
    """Values and gradients are those of one process, to float64's rounding; equal on all ranks."""
    same = {"rtol": 1e-12, "atol": 1e-12}
    for name, value in true["values"].items():
        assert_bitwise([part["values"][name] for part in parts])
        torch.testing.assert_close(parts[0]["values"][name], value, **same, msg=name)
    for name, value in true["state"].items():
        assert_bitwise([part["state"][name] for part in parts])
        torch.testing.assert_close(parts[0]["state"][name], value, **same, msg=name)
    for name, value in true["stats"].items():
        torch.testing.assert_close(whole(parts, case, name, "stats"), value.detach(), **same)
    assert true["gradients"].keys() == parts[0]["gradients"].keys()
    for name, gradient in true["gradients"].items():
        mine = whole(parts, case, name)
        # A gradient that cancels is not known better than its terms.
        assert (mine - gradient).norm() <= 1e-12 * gradient.norm() + 1e-15, name


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", [*OBJECTIVES, *KINDS])
@pytest.mark.long(count=4)
def test_exact_in_float64(count, name, ranks):
    case = CASES[name]
    found = [each[name] for each in ranks(count)]
    assert len(found[0]) == case.calls
    for parts, true in zip(zip(*found, strict=True), truth(case), strict=True):
        assert_exact(list(parts), case, true)
        if case.trains:
            assert any(gradient.norm() > 0 for gradient in true["gradients"].values())


@pytest.mark.parametrize("name", [*KINDS, "dpo", "simpo, packed"])
def test_one_all_reduce_of_float64(name, ranks):
    case = CASES[name]
    for each in ranks(2):
        calls = each[name][0]["calls"]
        # Log-probs and lengths; a reference that is computed; TDPO's divergences.
        rows = 2 + ("ref_hidden" in case.given) + name.startswith("tdpo")
        assert calls == [("objects", 0), ("SUM", 8 * rows * S)]


# Of values, and of gradients.
BOUNDS = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (2e-3, 1e-2)}


@pytest.mark.parametrize("name", [*ROUNDED, *TRITON])
def test_as_accurate_as_one_process(name, ranks):
    """In a dtype that rounds the errors are those of one process, or a little more or less."""
    case = CASES[name]
    found = [each[name] for each in ranks(2)]
    loss_fn = prefkern.FusedPreferenceLoss(case.make(), **case.settings)
    of_values, of_gradients = BOUNDS[case.dtype]
    for call, true in enumerate(truth(case)):
        parts = [each[call] for each in found]
        given, leaves = arguments(case, drawn(case, call))
        one = seen(loss_fn(**given), leaves, loss_fn.objective)
        for value in true["values"]:
            mine = [part["values"][value] for part in parts]
            assert_bitwise(mine)
            error, of_one = (
                relative(x, true["values"][value].double()) for x in (mine[0], one["values"][value])
            )
            assert error <= min(1.5 * of_one + 1e-6, of_values), (value, error, of_one)
        for leaf, gradient in true["gradients"].items():
            assert parts[0]["gradients"][leaf].dtype == case.dtype
            error, of_one = (
                relative(x, gradient) for x in (whole(parts, case, leaf), one["gradients"][leaf])
            )
            assert error <= min(1.5 * of_one + 1e-6, of_gradients), (leaf, error, of_one)


@pytest.mark.long
@pytest.mark.parametrize("name", WITH_VOCAB)
def test_with_a_head_over_other_ranks(name, ranks):
    """Sequences over the columns of four ranks, the head over their rows."""
    case = WITH_VOCAB[name]
    (true,) = truth(case)
    four = [each["with vocab"][name] for each in ranks(4)]
    parts = []
    for left, right in (four[:2], four[2:]):
        for leaf in STATES:
            if leaf in left["gradients"]:
                assert_bitwise([left["gradients"][leaf], right["gradients"][leaf]])
        joined = {
            leaf: x if leaf in STATES else torch.cat([x, right["gradients"][leaf]])
            for leaf, x in left["gradients"].items()
        }
        parts.append(left | {"gradients": joined})
        assert_bitwise([left["values"]["losses"], right["values"]["losses"]])
    assert_exact(parts, case, true)


@pytest.mark.long
@pytest.mark.parametrize("name", AVERAGED)
def test_with_data_parallelism(name, ranks):
    """DDP's mean over four ranks, times the ranks of a group: one process on both batches."""
    case = AVERAGED[name]
    found = [each["averaged"][name] for each in ranks(4)]
    batches = [drawn(case, batch) for batch in range(2)]

    def both(each: str) -> Tensor:
        # Chosen ones of both batches, then rejected ones; of single responses the order is free.
        halves = [batch[each].chunk(2) for batch in batches]
        return torch.cat([half[side] for side in range(2) for half in halves])

    torch.manual_seed(0)
    model = Model()
    given = {each: both(each) for each in ("labels", *case.given)}
    out = reference.preference_loss(case.make(), model(both("hidden")), model.head.weight, **given)
    out.loss.backward()
    if name == "kto":
        losses = torch.cat([out.losses.view(2, 2, -1)[:, batch].flatten() for batch in range(2)])
    else:
        losses = out.losses
    for pair in (found[:2], found[2:]):
        assert_bitwise([each["losses"] for each in pair])
    mine = torch.cat([found[0]["losses"], found[2]["losses"]])
    torch.testing.assert_close(mine, losses, rtol=1e-12, atol=1e-12)
    for leaf, parameter in model.named_parameters():
        assert_bitwise([each["gradients"][leaf] for each in found])
        error = (found[0]["gradients"][leaf] - parameter.grad).norm()
        assert error <= 1e-12 * parameter.grad.norm(), leaf


# The message, on both ranks; or what rank 0 says and what rank 1 does.
SAME = "must be the same on all ranks of sequence_group, which hold parts of the same sequences: "
REFUSED = "RuntimeError: rank 1 of sequence_group refused this call: "
DISAGREE = {
    "other numbers of sequences": f"ValueError: the number of sequences {SAME}rank 0 has 6, rank 1",
    "other objectives": f"ValueError: objective {SAME}rank 0 has DPO(",
    "other options of an objective": f"ValueError: objective {SAME}rank 0 has DPO(beta=0.1",
    "training": f"ValueError: training {SAME}rank 0 has True, rank 1 has False",
    "other reference sums": f"ValueError: ref_logps {SAME}rank 0 has 6 with checksum",
    "other options": f"ValueError: temperature {SAME}rank 0 has 1.0, rank 1 has 2.0",
    "other dtypes": f"ValueError: hidden {SAME}rank 0 has size 16 in torch.float64, rank 1",
    "ignore_index": f"ValueError: ignore_index {SAME}rank 0 has -100, rank 1 has -101",
    "labels out of range on one rank": (
        f"{REFUSED}ValueError: labels must be in [0, 83)", "ValueError: labels must be in [0, 83)"
    ),
    "a wrong argument on one rank": (
        f"{REFUSED}ValueError: softcap must be > 0", "ValueError: softcap must be > 0"
    ),
    "a reference on one rank": f"ValueError: ref_logps {SAME}rank 0 has 6",
    "other entries": f"ValueError: weight {SAME}rank 0 has 83 vocabulary entries, rank 1 has 84",
    "a sign of a margin": f"ValueError: reward_margins {SAME}rank 0 has 3 with checksum",
    "what no part is on one rank": (
        f"{REFUSED}TypeError: vocab must be", "TypeError: vocab must be a prefkern.VocabShard"
    ),
    "one group twice": "ValueError: sequence_group and vocab's group share the ranks 0, 1: ranks of",
}  # fmt: skip


def test_ranks_that_disagree_all_raise(ranks):
    found = [each["disagreements"] for each in ranks(2)]
    assert found[0].keys() == found[1].keys() == DISAGREE.keys()
    for name, expected in DISAGREE.items():
        expected = (expected, expected) if isinstance(expected, str) else expected
        for each, start in zip(found, expected, strict=True):
            assert each[name].startswith(start), (name, each[name])


@pytest.mark.long
def test_ranks_of_two_groups_all_raise(ranks):
    found = [each["disagreements with vocab"] for each in ranks(4)]
    assert len(found[0]) == 4
    for name in found[0]:
        assert "nothing" not in [each[name] for each in found], name
    assert [each["a wrong argument on one rank"].count("refused") for each in found] == [2, 1, 1, 0]
    assert all("softcap must be > 0" in each["a wrong argument on one rank"] for each in found)
    *others, last = (each["a row of one rank's part"] for each in found)
    assert "weight: 1 of 33 vocabulary entries, the first is 53" in last
    for each in others:
        assert "another rank of sequence_group or vocab's group names what is not finite" in each


def test_a_token_that_is_not_finite(ranks):
    first, second = (each["not finite"]["a token"] for each in ranks(2))
    assert first.startswith("FloatingPointError: the loss is nan;")
    assert "Every input of this rank is finite: another rank of sequence_group names" in first
    assert "hidden: 1 of" in second and "token 15 of sequence 0" in second
    # Its tokens are counted from the rank's own first one.
    assert "These are not finite in this rank's part:" in second


def test_items_that_ranks_share_count_once(ranks):
    """In statistics, and in draws; a mean over ranks of equal groups would not show it."""
    items = torch.tensor([1.0, 2.0, 4.0])
    for rank, each in enumerate(found["counted once"] for found in ranks(2)):
        for group in ("sequence", "vocab"):
            assert all(torch.equal(x, items) for x in each[group])
        total, everyone, mine = each["neither"]
        assert torch.equal(total, 2 * items) and torch.equal(mine, items + rank)
        assert torch.equal(everyone, torch.cat([items, items + 1]))


@pytest.fixture
def group() -> Any:
    with group_of_one() as group:
        yield group


@pytest.mark.parametrize("name", ["dpo", "betadpo, drawn", "tdpo2"])
def test_a_group_of_one_rank(name, group):
    """The same code as on several ranks."""
    case = OBJECTIVES[name]
    loss_fn = prefkern.FusedPreferenceLoss(case.make(), sequence_group=group)
    given, leaves = arguments(case, drawn(case))
    mine = seen(loss_fn(**given), leaves, loss_fn.objective)
    true = truth(case)[0]
    torch.testing.assert_close(mine["values"]["losses"], true["values"]["losses"])
    for leaf, gradient in true["gradients"].items():
        torch.testing.assert_close(mine["gradients"][leaf], gradient)


def test_inference_mode_and_kept_graphs(group):
    case = KINDS["even"]
    loss_fn = prefkern.FusedPreferenceLoss(EVERY["simpo"](), sequence_group=group)
    given, leaves = arguments(case, drawn(case))
    del given["ref_logps"]
    out = loss_fn(**given)
    first, second = (
        torch.autograd.grad(out.losses.sum(), [*leaves.values()], retain_graph=True)
        for _ in range(2)
    )
    assert_bitwise([first[0], second[0]])
    # A term of one's own on the sums, which are of all ranks.
    (own,) = torch.autograd.grad(out.chosen_logps.sum(), leaves["hidden"])
    assert own[: S // 2].abs().sum() > 0 and own[S // 2 :].abs().sum() == 0
    with torch.inference_mode():
        assert torch.equal(loss_fn(**given).losses, out.losses)


def test_graphs_are_refused(group, monkeypatch):
    loss_fn = prefkern.FusedPreferenceLoss(objectives.DPO(), sequence_group=group)
    given, _ = arguments(KINDS["even"], drawn(KINDS["even"]))
    message = "sequence_group runs outside of torch.compile and CUDA graphs"
    with monkeypatch.context() as patch, pytest.raises(NotImplementedError, match=message):
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        loss_fn(**given)
    with monkeypatch.context() as patch, pytest.raises(NotImplementedError, match=message):
        patch.setattr(sequences, "is_capturing", lambda x: True)
        loss_fn(**given)


def test_a_group_must_be_one():
    with pytest.raises(TypeError, match="sequence_group must be None or a torch.distributed"):
        prefkern.FusedPreferenceLoss(objectives.DPO(), sequence_group=object())  # type: ignore[arg-type]
