"""The product with the fold in its epilogue, against float64 and against the kernels it replaces.

Configurations are small here, so that few tokens and entries make several tiles, splits and groups.
"""

from __future__ import annotations

import math

import pytest
import torch

from prefkern.ops import fold_state

kernels = pytest.importorskip("prefkern_kernels")

from prefkern_kernels import tiles
from support.product import ACCURACY, PLAIN, TRANSFORMS, assert_right, truth

CONFIGS = {
    "pointers": tiles.ProductConfig(16, 32, 32, 4, 2, tiles=2, group=2),
    "flat pointers": tiles.ProductConfig(16, 32, 32, 4, 2, flatten=True, tiles=3, group=2),
    "one split": tiles.ProductConfig(32, 64, 32, 4, 2, tiles=1000, group=1),
    "descriptors": tiles.ProductConfig(16, 32, 32, 4, 2, True, tiles=2, group=3),
    "flat descriptors": tiles.ProductConfig(16, 32, 64, 4, 2, True, True, tiles=2, group=2),
}


def case(n, v, h, dtype, device, seed=0, spread=4.0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=generator)
    weight = torch.randn(v, h, generator=generator) * (spread / math.sqrt(h))
    labels = torch.randint(v, (n,), generator=generator)
    labels[0], labels[-1] = 0, v - 1
    return hidden.to(device, dtype), weight.to(device, dtype), labels.to(device)


def fresh_state(n, device) -> fold_state.FoldState:
    state = fold_state.FoldState.empty(n, device)
    fold_state.clear(*state.sums())
    return state


def run(hidden, weight, bias, labels, state=None, **options) -> fold_state.FoldState:
    state = state or fresh_state(labels.shape[0], hidden.device)
    before = kernels.launches["product_fold"]
    kernels.product_fold(
        hidden,
        weight,
        bias,
        labels,
        state.maximum,
        state.total,
        state.label_logit,
        state.label_slope,
        **{**PLAIN, **options},
    )
    assert kernels.launches["product_fold"] == before + 1
    return state


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("n", "v", "h"), [(37, 201, 72), (1, 17, 8), (64, 256, 64)])
@pytest.mark.long(n=64)
@pytest.mark.long(config=["one split", "flat descriptors"])
def test_against_float64(n, v, h, config, transform, device):
    """Sizes that are multiples of the blocks or not, with every way to read operands."""
    hidden, weight, labels = case(n, v, h, torch.bfloat16, device)
    bias = torch.randn(v, device=device).to(torch.bfloat16) if n != 64 else None
    options = TRANSFORMS[transform]
    state = run(hidden, weight, bias, labels, config=CONFIGS[config], **options)
    expected = truth(hidden, weight, bias, labels, **options)
    assert_right(state, expected, ACCURACY[torch.bfloat16], options["softcap"])


@pytest.mark.parametrize("dtype", ACCURACY)
@pytest.mark.parametrize(
    "v", [1, 2, 31, 32, 33, 65, 129, pytest.param(513, marks=pytest.mark.long)]
)
def test_every_label(v, dtype, device):
    """A token for each entry, so that labels lie in first, last and cut tiles and splits."""
    hidden, weight, _ = case(v, v, 48, dtype, device)
    labels = torch.arange(v, device=device)
    state = run(hidden, weight, None, labels, config=CONFIGS["pointers"])
    assert_right(state, truth(hidden, weight, None, labels, **PLAIN), ACCURACY[dtype], None)


@pytest.mark.parametrize("size", [0.0, 1e4, -1e4])
def test_equal_logits(size, device):
    """All logits the same: log-probs of -log V, at any size of logit."""
    hidden = torch.full((5, 16), size / 16, device=device, dtype=torch.bfloat16)
    weight = torch.ones(100, 16, device=device, dtype=torch.bfloat16)
    labels = torch.tensor([0, 31, 32, 98, 99], device=device)
    state = run(hidden, weight, None, labels, config=CONFIGS["pointers"])
    expected = torch.full((5,), -math.log(100.0), device=device)
    torch.testing.assert_close(fold_state.finish(state).logps, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("config", ["pointers", "descriptors", "one split"])
def test_extreme_logits(config, device):
    """Logits of both signs up to 1e4, the label among the largest or the smallest of them."""
    v = 150
    row = torch.linspace(-1e4, 1e4, v)
    hidden = torch.eye(16, device=device)[:4].contiguous()
    weight = torch.zeros(v, 16)
    weight[:, 0], weight[:, 1], weight[:, 2] = row, -row, row.abs()
    weight[:, 3] = -1e4
    weight = weight.to(device)
    labels = torch.tensor([v - 1, v - 1, 0, 7], device=device)
    state = run(hidden, weight, None, labels, config=CONFIGS[config])
    logps, miss, label, *_ = truth(hidden, weight, None, labels, **PLAIN)
    folded = fold_state.finish(state)
    torch.testing.assert_close(folded.logps.double(), logps, rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(folded.miss.double(), miss, rtol=2e-3, atol=1e-37)
    assert torch.equal(state.label_logit.double(), label)


def test_confident_tokens(device):
    """1 - p_label keeps its relative accuracy however small it is."""
    hidden, weight, labels = case(20, 90, 32, torch.bfloat16, device)
    bias = torch.zeros(90, device=device)
    labels[:] = 50
    bias[50] = 60.0
    state = run(hidden, weight, bias, labels, config=CONFIGS["pointers"])
    _, miss, *_ = truth(hidden, weight, bias, labels, **PLAIN)
    assert miss.max() < 1e-15
    torch.testing.assert_close(fold_state.finish(state).miss.double(), miss, rtol=3e-5, atol=0)


@pytest.mark.parametrize("config", CONFIGS)
def test_masked_entries(config, device):
    """A bias of -inf rules entries out, also whole splits of them."""
    hidden, weight, labels = case(9, 200, 32, torch.float32, device)
    bias = torch.zeros(200, device=device)
    bias[:130] = -math.inf
    bias[150] = -math.inf
    labels[:] = 140
    state = run(hidden, weight, bias, labels, config=CONFIGS[config])
    assert_right(state, truth(hidden, weight, bias, labels, **PLAIN), 4e-6, None)


@pytest.mark.parametrize("config", CONFIGS)
def test_rows_of_hidden(config, device):
    """Scored tokens are rows of a larger, strided hidden; the weight is part of a larger one."""
    hidden, weight, _ = case(60, 140, 96, torch.bfloat16, device)
    wide = torch.full((60, 128), math.nan, dtype=torch.bfloat16, device=device)
    wide[:, 16:112] = hidden
    hidden = wide[:, 16:112]
    tall = torch.full((150, 112), math.nan, dtype=torch.bfloat16, device=device)
    tall[8:148, 8:104] = weight
    weight = tall[8:148, 8:104]
    rows = torch.tensor([3, 3, 59, 0, 17], device=device)
    labels = torch.tensor([0, 139, 70, 31, 32], device=device)
    state = run(hidden, weight, None, labels, rows=rows, config=CONFIGS[config])
    assert_right(state, truth(hidden[rows], weight, None, labels, **PLAIN), 2e-6, None)


@pytest.mark.parametrize("config", ["descriptors", "flat descriptors"])
def test_unaligned_operands_go_by_pointers(config, device):
    """A descriptor needs 16-byte rows: H of 9 has none."""
    hidden, weight, labels = case(21, 70, 9, torch.bfloat16, device)
    state = run(hidden, weight, None, labels, config=CONFIGS[config])
    assert_right(state, truth(hidden, weight, None, labels, **PLAIN), 2e-6, None)


@pytest.mark.parametrize("softcap", [None, 10.0])
def test_parts_of_the_vocabulary_add_up(softcap, device):
    """Three calls on parts, in any mixture with `fold`, give the state of one call."""
    n, v = 25, 300
    hidden, weight, labels = case(n, v, 64, torch.bfloat16, device)
    options = {**PLAIN, "softcap": softcap}
    whole = run(hidden, weight, None, labels, config=CONFIGS["pointers"], **options)
    parts = fresh_state(n, hidden.device)
    for start, stop in ((0, 70), (70, 75), (190, 300)):
        run(hidden, weight[start:stop], None, labels, parts, start=start,
            config=CONFIGS["pointers"], **options)  # fmt: skip
    kernels.fold(
        hidden.float() @ weight[75:190].float().t(), labels, None, parts.maximum, parts.total,
        parts.label_logit, parts.label_slope, *(None,) * 6, start=75, first=False, **options,
    )  # fmt: skip
    # The two round a softcap's logit, of 10 at most, in their own ways.
    for name in ("maximum", "total", "label_logit", "label_slope"):
        torch.testing.assert_close(getattr(whole, name), getattr(parts, name), rtol=2e-5, atol=3e-6)


def test_state_is_that_of_fold(device):
    """Field by field, maximum included."""
    hidden, weight, labels = case(33, 130, 64, torch.bfloat16, device)
    mine = run(hidden, weight, None, labels, config=CONFIGS["pointers"])
    other = fold_state.FoldState.empty(33, hidden.device)
    kernels.fold(
        hidden.float() @ weight.float().t(), labels, None, other.maximum, other.total,
        other.label_logit, other.label_slope, *(None,) * 6, start=0, first=True, **PLAIN,
    )  # fmt: skip
    for name in ("maximum", "total", "label_logit", "label_slope"):
        torch.testing.assert_close(getattr(mine, name), getattr(other, name), rtol=5e-6, atol=4e-6)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.long(config=["one split", "flat pointers", "flat descriptors"])
def test_bitwise_the_same(config, device):
    """In two runs, and for a token beside any other tokens."""
    hidden, weight, labels = case(50, 333, 64, torch.bfloat16, device)
    first, second = (run(hidden, weight, None, labels, config=CONFIGS[config]) for _ in range(2))
    few = run(hidden[20:27].contiguous(), weight, None, labels[20:27].contiguous(),
              config=CONFIGS[config])  # fmt: skip
    for name in ("maximum", "total", "label_logit"):
        assert torch.equal(getattr(first, name), getattr(second, name))
        if device == "cpu":
            # A GPU's result is the same row by row; numpy's product is not, at every size.
            torch.testing.assert_close(getattr(first, name)[20:27], getattr(few, name))
        else:
            assert torch.equal(getattr(first, name)[20:27], getattr(few, name))


@pytest.mark.parametrize("config", CONFIGS)
def test_writes_nowhere_else(config, device):
    """The state is cut out of larger buffers; their rest does not change."""
    n, guard = 21, 12345.0
    hidden, weight, labels = case(n, 100, 32, torch.bfloat16, device)
    whole = torch.full((4, n + 10), guard, device=device)
    window = whole[:, 5 : n + 5]
    fresh = fresh_state(n, hidden.device)
    fields = (fresh.maximum, fresh.total, fresh.label_logit, fresh.label_slope)
    for row, field in zip(window, fields, strict=True):
        row.copy_(field)
    kernels.product_fold(
        hidden, weight, None, labels, *window,
        logit_scale=1.0, softcap=5.0, temperature=1.0, config=CONFIGS[config],
    )  # fmt: skip
    assert (whole[:, :5] == guard).all() and (whole[:, n + 5 :] == guard).all()
    assert (window != guard).all()


def test_table_s_choice(device):
    """Without a configuration, the device's table decides."""
    hidden, weight, labels = case(70, 700, 64, torch.float32, device)
    state = run(hidden, weight, None, labels)
    assert_right(state, truth(hidden, weight, None, labels, **PLAIN), 4e-6, None)


def test_no_tokens_no_launch(device):
    _, weight, labels = case(4, 20, 16, torch.bfloat16, device)
    before = kernels.launches["product_fold"]
    empty = torch.empty(0, device=device)
    kernels.product_fold(weight[:0], weight, None, labels[:0], empty, empty, empty, empty, **PLAIN)
    assert kernels.launches["product_fold"] == before


def test_refusals(device):
    hidden, weight, labels = case(6, 20, 16, torch.bfloat16, device)
    with pytest.raises(ValueError, match="unit stride"):
        run(hidden, weight.t().contiguous().t(), None, labels)
    with pytest.raises(ValueError, match="does not meet"):
        run(hidden.float(), weight, None, labels)
    with pytest.raises(ValueError, match="does not meet"):
        run(hidden[:, :8], weight, None, labels)
    with pytest.raises(ValueError, match="5 labels for 6 rows"):
        run(hidden, weight, None, labels[:5])
    with pytest.raises(ValueError, match="bias must be contiguous"):
        run(hidden, weight, torch.ones(40, device=device)[::2], labels)


def test_bytes():
    """Allocated are two floats a token and split, and the rows if a descriptor needs them."""
    config = CONFIGS["pointers"]
    assert config.splits(129) == 3
    assert kernels.product_fold_bytes(10, 129, 128, config) == 2 * 4 * 3 * 10
    config = CONFIGS["descriptors"]
    assert kernels.product_fold_bytes(10, 129, 128, config) == 2 * 4 * 3 * 10 + 1280


@pytest.mark.parametrize("softcap", [None, 10.0])
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.long(ignored=True, softcap=10.0)
@pytest.mark.long(ignored=False)
def test_the_operator_uses_it_where_it_is_the_faster_way(ignored, softcap, device, monkeypatch):
    """Log-probs alone use it; a call with a gradient, statistics or a shared reference does not."""
    import prefkern

    monkeypatch.setenv("PREFKERN_PRODUCT_FOLD", "1")
    hidden, weight, labels = case(50, 333, 64, torch.float32, device)
    bias = torch.randn(333, device=device)
    if ignored:
        labels[::3] = -100
    options = {"softcap": softcap, "workspace_mb": 0.01, "backend": "triton"}
    before = kernels.launches["product_fold"]
    logps = prefkern.linear_logprobs(hidden, weight, labels, bias, **options)
    made = prefkern.last_plan()
    assert made.product_in_kernel and made.operations_nhv == 2
    tiles = -(-made.tokens // made.forward_tiles.token_tile)
    assert tiles > 1 and kernels.launches["product_fold"] == before + tiles
    assert made.workspace_bytes <= 0.01 * 2**20
    truth = prefkern.reference.linear_logprobs(
        hidden.double(), weight.double(), labels, bias.double(), softcap=softcap
    )
    torch.testing.assert_close(logps.double(), truth, rtol=1e-6, atol=1e-5)
    hidden.requires_grad_()
    prefkern.linear_logprobs(hidden, weight, labels, **options)
    assert not prefkern.last_plan().product_in_kernel
    with torch.no_grad():
        prefkern.linear_logprobs(hidden, weight, labels, return_stats=True, **options)
        assert not prefkern.last_plan().product_in_kernel
        # The table, which has no measurement yet, is asked where nothing else is said.
        monkeypatch.delenv("PREFKERN_PRODUCT_FOLD")
        prefkern.linear_logprobs(hidden, weight, labels, **options)
        assert not prefkern.last_plan().product_in_kernel


def test_an_entry_without_a_chance(device, monkeypatch):
    """A bias of -inf: the probability is 0, or under a softcap that of a logit of minus the cap."""
    import prefkern

    monkeypatch.setenv("PREFKERN_PRODUCT_FOLD", "1")
    hidden, weight, labels = case(20, 90, 64, torch.float32, device)
    labels[labels == 7] = 8
    bias = torch.randn(90, device=device)
    bias[7] = -float("inf")
    for softcap in (None, 2.0):
        arguments = (hidden, weight, labels, bias)
        mine = prefkern.linear_logprobs(*arguments, softcap=softcap, backend="triton")
        assert prefkern.last_plan().product_in_kernel
        truth = prefkern.reference.linear_logprobs(
            hidden.double(), weight.double(), labels, bias.double(), softcap=softcap
        )
        torch.testing.assert_close(mine.double(), truth, rtol=1e-6, atol=1e-5)


def test_strided_states_take_the_other_way(device, monkeypatch):
    import prefkern

    monkeypatch.setenv("PREFKERN_PRODUCT_FOLD", "1")
    _, weight, labels = case(20, 90, 64, torch.float32, device)
    hidden = torch.randn(64, 20, device=device).t()
    mine = prefkern.linear_logprobs(hidden, weight, labels, backend="triton")
    assert not prefkern.last_plan().product_in_kernel
    truth = prefkern.reference.linear_logprobs(hidden.double(), weight.double(), labels)
    torch.testing.assert_close(mine.double(), truth, rtol=1e-6, atol=1e-5)
