"""The meter against known numbers: torch's profiler, and bytes added up by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from prefkern_bench.measure import Meter, cost_of
from support.varlen_kernels import flash_attention_of_shapes

KILOBYTE = 1024
FLOATS = 256  # of 4 bytes: one kilobyte


def profiled_operations(step: Callable[[], object]) -> int:
    """Operations of the products, in-place ones included, from the profiler's operator shapes."""
    factors = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "addmm_": (1, 2)}
    factors |= {"baddbmm": (1, 2), "baddbmm_": (1, 2), "mv": (0, 1), "addmv": (1, 2)}
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as record:
        step()
    operations = 0
    for event in record.events() or []:
        positions = factors.get(event.name.removeprefix("aten::"))
        # One operator may be a wrapper around another of these: count the outer one only.
        parent = event.cpu_parent
        if positions is None or (parent and parent.name.removeprefix("aten::") in factors):
            continue
        left, right = (event.input_shapes[position] for position in positions)
        columns = right[-1] if len(right) > 1 else 1
        operations += 2 * torch.Size(left).numel() * columns
    return operations


def linear_and_backward() -> None:
    hidden = torch.randn(5, 7, requires_grad=True)
    weight = torch.randn(11, 7, requires_grad=True)
    F.linear(hidden, weight, torch.randn(11)).logsumexp(-1).sum().backward()


def in_place_accumulation() -> None:
    total = torch.zeros(5, 11)
    for _ in range(3):
        total.addmm_(torch.randn(5, 7), torch.randn(7, 11))
    torch.mm(torch.randn(5, 7), torch.randn(7, 11), out=total)


def batched() -> None:
    left, right = torch.randn(2, 5, 7, requires_grad=True), torch.randn(2, 7, 3)
    torch.bmm(left, right).sum().backward()
    torch.baddbmm(torch.zeros(2, 5, 3), left.detach(), right)
    torch.einsum("bij,bjk->bik", left.detach(), right)


def attention_without_gradient() -> None:
    with torch.inference_mode():
        query = torch.randn(2, 5, 7)
        F.linear(query @ query.mT, torch.randn(3, 5))


@torch.library.custom_op("prefkern_tests::twice", mutates_args=())
def twice(left: Tensor, right: Tensor) -> Tensor:
    first = left @ right
    return first.addmm_(left, right)


def custom_operator() -> None:
    twice(torch.randn(5, 7), torch.randn(7, 11))


@pytest.mark.parametrize(
    "step",
    [
        linear_and_backward,
        in_place_accumulation,
        batched,
        attention_without_gradient,
        custom_operator,
    ],
)
def test_operations_agree_with_the_profiler(step: Callable[[], None]) -> None:
    with Meter() as meter:
        step()
    assert meter.operations == profiled_operations(step) > 0


def test_operations_of_known_products() -> None:
    with Meter() as meter:
        torch.randn(5, 7) @ torch.randn(7, 11)
        torch.randn(5, 7) @ torch.randn(7)
    assert meter.operations == 2 * 5 * 7 * 11 + 2 * 5 * 7


def test_a_freed_temporary_is_given_back() -> None:
    with Meter() as meter:
        first = torch.empty(FLOATS)
        del first
        second = torch.empty(2 * FLOATS)
        del second
    assert (meter.live_bytes, meter.peak_bytes) == (0, 2 * KILOBYTE)


def test_what_is_alive_together_adds_up() -> None:
    with Meter() as meter:
        first = torch.empty(FLOATS)
        second = torch.empty(2 * FLOATS)
        assert meter.live_bytes == 3 * KILOBYTE
        del second
        third = first + 1
    del first, third
    assert (meter.live_bytes, meter.peak_bytes) == (0, 3 * KILOBYTE)


def test_a_view_costs_nothing_and_keeps_its_storage_alive() -> None:
    with Meter() as meter:
        whole = torch.empty(4, FLOATS)
        part = whole[1:2].reshape(-1).detach()
        del whole
        assert meter.live_bytes == 4 * KILOBYTE
        del part
        assert meter.live_bytes == 0
    assert meter.peak_bytes == 4 * KILOBYTE


def test_what_was_there_before_costs_nothing() -> None:
    before = torch.ones(FLOATS)
    with Meter() as meter:
        before.mul_(2)
        view = before[1:]
        view += 1
    assert meter.peak_bytes == 0


def test_a_result_that_outgrows_its_storage_is_counted_at_its_new_size() -> None:
    left, right = torch.randn(16, 4), torch.randn(4, 16)
    with Meter() as meter:
        out = torch.empty(0)
        torch.mm(left, right, out=out)
    assert meter.live_bytes == meter.peak_bytes == out.nbytes == KILOBYTE


def test_what_autograd_keeps_is_alive_until_backward() -> None:
    leaf = torch.ones(FLOATS, requires_grad=True)
    with Meter() as meter:
        total = leaf.exp().sum()  # exp keeps its result for backward
        assert meter.live_bytes == KILOBYTE + total.nbytes
        total.backward()
        assert leaf.grad is not None
        assert meter.live_bytes == leaf.grad.nbytes + total.nbytes
    # In backward: the kept result, the gradient, the total and the total's own gradient.
    assert meter.peak_bytes == 2 * KILOBYTE + 2 * total.nbytes


def test_cost_of_a_step_includes_what_it_returns() -> None:
    def step() -> Tensor:
        scratch = torch.empty(2, FLOATS)
        return torch.ones(FLOATS) + scratch[0]

    cost = cost_of(step, torch.device("cpu"))
    assert (cost.operations, cost.peak_bytes) == (0, 4 * KILOBYTE)


@pytest.mark.parametrize("causal", [False, True])
def test_fused_attention_counts_the_pairs_that_it_computes(causal):
    """Two products forward and five backward; causal attention without a mask skips half."""
    query, key, value = (torch.randn(2, 3, 8, 16, requires_grad=True) for _ in range(3))
    pairs = 2 * 3 * (8 * 9 // 2 if causal else 8 * 8)
    with Meter() as meter:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
        assert meter.operations == 2 * 2 * pairs * 16
        out.sum().backward()
    assert meter.operations == 7 * 2 * pairs * 16


def test_masked_attention_computes_every_pair():
    query = torch.randn(1, 2, 8, 16)
    key, value = torch.randn(2, 1, 2, 12, 16)
    mask = torch.ones(8, 12, dtype=torch.bool).tril(4)
    with torch.no_grad(), Meter() as meter:
        F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    assert meter.operations == 2 * 2 * (2 * 8 * 12) * 16


def test_products_of_experts_count_each_row_once():
    """Forward, and the two products of backward: rows by matrices, and rows by rows of a group."""
    rows = torch.randn(6, 16, dtype=torch.bfloat16, requires_grad=True)
    experts = torch.randn(3, 16, 8, dtype=torch.bfloat16, requires_grad=True)
    ends = torch.tensor([1, 4, 6], dtype=torch.int32)
    with Meter() as meter:
        out = torch._grouped_mm(rows, experts, offs=ends)
        assert meter.operations == 2 * 6 * 16 * 8
        out.backward(torch.ones_like(out))
    assert meter.operations == 3 * 2 * 6 * 16 * 8


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (3, 0)], ids=str)
def test_attention_of_many_sequences_counts_their_own_pairs(window):
    """Sequences of 5 and 4 queries; the second one's follow on a prefix of 6."""
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (torch.randn(n, 3, 16, requires_grad=True) for n in (9, 15, 15))
    bounds = [torch.tensor(ends, dtype=torch.int32) for ends in ([0, 5, 9], [0, 5, 15])]
    pairs = 0
    for queries, keys in ((5, 5), (4, 10)):
        distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
        is_seen = (distance >= 0) | (window[1] < 0)
        pairs += (is_seen & ((distance <= window[0]) | torch.tensor(window[0] < 0))).sum().item()
    with flash_attention_of_shapes(), Meter() as meter:
        output = varlen_attn(query, key, value, *bounds, 5, 10, window_size=window)
        assert meter.operations == 2 * 2 * 3 * pairs * 16
        output.sum().backward()
    assert meter.operations == 7 * 2 * 3 * pairs * 16
