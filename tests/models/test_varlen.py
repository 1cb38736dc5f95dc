"""Attention along paths by one kernel: bounds and keys, which rows it takes, and wrong kernels."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import masking_utils

import prefkern
from prefkern.models import packing, paths, varlen
from prefkern.models.head_forward import forward_with_head
from support import tiny
from support.machine import HAS_GPU
from support.varlen_kernels import Kernel, flash_attention_of_shapes, put

LENGTHS = (9, 1, 14, 5, 3)
# The fourth sequence sees the first four tokens, the fifth two of the third sequence.
TREE = ((0, 0), (0, 0), (0, 0), (0, 4), (12, 2))
FAMILIES = {
    "Llama": {},
    "GPT2": {},
    "Mistral": {"sliding_window": 4},
    "Gemma3Text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
}
CPU = torch.device("cpu")


def row_of(lengths=LENGTHS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    row = torch.randint(3, tiny.VOCAB_SIZE, (1, sum(lengths)), generator=generator)
    return row, torch.tensor([0, *lengths]).cumsum(0)


def scored(model, tree=TREE, lengths=LENGTHS) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    row, bounds = row_of(lengths)
    prefixes = None if tree is None else torch.tensor(tree)
    inputs = packing.packed_inputs(model, row, bounds, prefixes)
    hidden, _ = forward_with_head(model, inputs, lambda head: (head.hidden, head.hidden))
    # Every token counts differently.
    (hidden * torch.arange(1.0, hidden.shape[1] + 1)[:, None]).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return hidden.detach(), gradients


def assert_same(found, expected) -> None:
    torch.testing.assert_close(found[0], expected[0], atol=2e-5, rtol=1e-5)
    total = torch.cat([gradient.flatten() for gradient in expected[1].values()]).norm()
    assert found[1].keys() == expected[1].keys()
    for name, gradient in found[1].items():
        assert (gradient - expected[1][name]).norm() <= 1e-5 * total, name


def test_the_keys_of_each_path():
    layout = varlen.Layout.of(LENGTHS, TREE, CPU)
    assert layout.bounds_q.tolist() == [0, 9, 10, 24, 29, 32]
    assert layout.bounds_k.tolist() == [0, 9, 10, 24, 33, 38]
    assert (layout.longest_q, layout.longest_k) == (14, 14)
    gathered = layout.gathered(torch.arange(32)[:, None]).flatten().tolist()
    assert gathered == [*range(24), *range(4), *range(24, 29), 12, 13, *range(29, 32)]


def test_without_prefixes_nothing_is_copied():
    layout = varlen.Layout.of(LENGTHS, ((0, 0),) * 5, CPU)
    keys = torch.randn(32, 2, 8)
    assert layout.gathered(keys) is keys
    assert layout.bounds_k.tolist() == layout.bounds_q.tolist()


@pytest.mark.parametrize("knows_groups", [True, False], ids=["2.13", "2.11"])
@pytest.mark.parametrize("tree", [TREE, None], ids=["tree", "row"])
@pytest.mark.parametrize("family", FAMILIES)
def test_as_path_by_path(family, tree, knows_groups, monkeypatch):
    model = tiny.model(family, **FAMILIES[family])
    expected = scored(model, tree)
    kernel, _ = put(monkeypatch, Kernel(knows_groups=knows_groups))
    # Nothing is left to go path by path.
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)
    scored(model, tree)
    kernel.calls.clear()
    assert_same(scored(model, tree), expected)
    keys = sum(LENGTHS) + (0 if tree is None else 6)
    reaches = [3, -1] if family == "Gemma3Text" else [3, 3] if family == "Mistral" else [-1, -1]
    assert kernel.calls == [(sum(LENGTHS), keys, reach) for reach in reaches]


def test_a_window_that_is_wider_than_the_row_is_none(monkeypatch):
    model = tiny.model("Mistral", sliding_window=14)
    kernel, _ = put(monkeypatch, Kernel())
    scored(model)
    assert kernel.calls[-1] == (32, 38, -1)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers(monkeypatch, reentrant):
    """Also where the kernel is first checked within a layer that is computed again."""
    model = tiny.model()
    expected = scored(model)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    kernel, _ = put(monkeypatch, Kernel())
    assert_same(scored(model), expected)
    assert kernel.calls[1:] == [(32, 38, -1)] * 4


def test_two_runs_are_bitwise_equal(monkeypatch):
    put(monkeypatch, Kernel())
    model = tiny.model("Gemma3Text", sliding_window=4)
    torch.testing.assert_close(scored(model), scored(model), atol=0, rtol=0)


def test_under_autocast(monkeypatch):
    """Rotary embeddings leave float32 queries; sdpa rounds them, and so does this."""
    model = tiny.model()
    with torch.autocast("cpu", torch.bfloat16):
        expected = scored(model)
    put(monkeypatch, Kernel())
    monkeypatch.setattr(varlen, "_DTYPES", (torch.bfloat16,))
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)
    with torch.autocast("cpu", torch.bfloat16):
        hidden, gradients = scored(model)
    assert (hidden - expected[0]).norm() <= 0.02 * expected[0].norm()
    assert gradients.keys() == expected[1].keys()


WRONG = {
    "looks ahead": {"shift": 1},
    "does not see itself": {"shift": -1},
    "aligned at the first key": {"upper_left": True},
    "half the gradient of queries": {"halves": "queries"},
    "half the gradient of keys": {"halves": "keys"},
    "half the gradient of values": {"halves": "values"},
    "raises": {"problem": RuntimeError("FlashAttention only supports Ampere GPUs or newer.")},
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_kernel_is_not_used(name, monkeypatch):
    model = tiny.model()
    expected = scored(model)
    put(monkeypatch, Kernel(**WRONG[name]))
    told = "Ampere GPUs or newer; flash_attn" if name == "raises" else "varlen_attn "
    with pytest.warns(UserWarning, match=f"one sequence at a time.*{told}"):
        found = scored(model)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scored(model)


@pytest.mark.parametrize("widens", [1, -1])
def test_a_window_that_is_wrong_by_a_token_is_not_used(widens, monkeypatch):
    model = tiny.model(
        "Gemma3Text", sliding_window=4, layer_types=FAMILIES["Gemma3Text"]["layer_types"]
    )
    expected = scored(model)
    kernel, _ = put(monkeypatch, Kernel(widens=widens))
    with pytest.warns(
        UserWarning, match="varlen_attn differs from causal attention after a prefix"
    ):
        scored(model)
    kernel.calls.clear()
    assert_same(scored(model), expected)
    # The layer without a window goes by the kernel all the same.
    assert kernel.calls == [(32, 38, -1)]


def test_flash_attn_takes_the_rows_that_torch_does_not(monkeypatch):
    model = tiny.model("Mistral", sliding_window=4)
    expected = scored(model)
    kernel, flash = put(monkeypatch, Kernel(upper_left=True), Kernel())
    scored(model)
    kernel.calls.clear()
    assert_same(scored(model), expected)
    assert flash.calls[-2:] == [(32, 38, 3)] * 2
    assert not kernel.calls


# The model or its options, and why no kernel takes its rows.
NOT_TAKEN = {
    "a head size of 12": ("Llama", {"head_dim": 12}),
    "attention dropout": ("Llama", {"attention_dropout": 0.5}),
    "chunks": ("Llama4Text", {"attention_chunk_size": 8}),
}


@pytest.mark.parametrize("name", NOT_TAKEN)
def test_rows_that_no_kernel_takes(name, monkeypatch):
    family, options = NOT_TAKEN[name]
    if family == "Llama4Text":
        options = {
            **options,
            "num_local_experts": 2,
            "intermediate_size_mlp": 48,
            "no_rope_layers": [1, 1],
        }
    model = tiny.model(family, **options)
    packing.require_packing(model, shares=True)
    kernel, _ = put(monkeypatch, Kernel())
    model.train(name == "attention dropout")
    scored(model)
    assert not kernel.calls


def test_only_half_precision_on_a_gpu_is_taken(monkeypatch):
    layout = varlen.Layout.of(LENGTHS, TREE, CPU)
    tensors = [torch.randn(1, 2, 32, 8) for _ in range(3)]
    dtypes, devices = varlen._DTYPES, varlen._DEVICES
    assert devices == ("cuda",)
    put(monkeypatch, Kernel())
    assert varlen.attention(*tensors, layout, -1, None) is not None
    monkeypatch.setattr(varlen, "_DTYPES", dtypes)
    assert varlen.attention(*tensors, layout, -1, None) is None
    half = [x.bfloat16() for x in tensors]
    assert varlen.attention(*half, layout, -1, None) is not None
    assert varlen.attention(*half[:2], tensors[2], layout, -1, None) is None
    monkeypatch.setattr(varlen, "_DEVICES", devices)
    assert varlen.attention(*half, layout, -1, None) is None


@pytest.mark.parametrize(
    "options", [{"is_causal": False}, {"position_bias": torch.zeros(1)}, {"softcap": 5.0}], ids=str
)
def test_what_a_kernel_does_not_know_goes_to_the_original(options, monkeypatch):
    """Attention in both directions, a bias by position, a softcap."""
    seen = []

    def original(module, query, key, value, attention_mask, dropout=0.0, scaling=None,
                 is_causal=None, position_bias=None, **kwargs):  # fmt: skip
        seen.append({"is_causal": is_causal, "position_bias": position_bias, **kwargs})
        return query.transpose(1, 2), None

    kernel, _ = put(monkeypatch, Kernel())
    attention = paths._attention_of(original)
    mask = paths.PathMask(paths.Paths(LENGTHS, TREE), lambda **sizes: None, reach=-1)
    tensors = [torch.randn(1, 2, 32, 8) for _ in range(3)]
    attention(nn.Module(), *tensors, mask, **options)
    assert len(seen) == len(LENGTHS)
    assert not kernel.calls
    attention(nn.Module(), *tensors, mask)
    assert len(seen) == len(LENGTHS)


def test_masks_that_are_known():
    causal, window = (
        masking_utils.causal_mask_function,
        masking_utils.sliding_window_causal_mask_function,
    )
    chunked = masking_utils.chunked_causal_mask_function(7, torch.zeros(1, dtype=torch.int64))
    block = masking_utils.blockwise_overlay(torch.zeros(1, 9))
    assert varlen.reach_of(causal, None) == -1
    assert varlen.reach_of(window(7), 7) == 6
    unknown = [
        (window(6), 7),
        (window(7), None),
        (chunked, 7),
        (masking_utils.or_masks(causal, block), None),
        (masking_utils.or_masks(window(7), block), 7),
        (masking_utils.and_masks(window(7), block), 7),
        (masking_utils.bidirectional_mask_function, None),
        (masking_utils.sliding_window_bidirectional_mask_function(7), 7),
        (None, None),
    ]
    for function, size in unknown:
        assert varlen.reach_of(function, size) is None


def test_this_torch_s_own_varlen_attn():
    """What reaches flash attention, forward and backward, and that gradients come back."""
    layout = varlen.Layout.of(LENGTHS, TREE, CPU)
    queries, keys, values = (torch.randn(32, n, 8, requires_grad=True) for n in (4, 2, 2))
    for reach in (-1, 3):
        with flash_attention_of_shapes() as calls:
            kernel = varlen._torch_varlen
            output = varlen._applied(kernel, queries, keys, values, layout, reach, 0.5)
            gradients = torch.autograd.grad(output.sum(), (queries, keys, values))
        assert [x.shape for x in gradients] == [x.shape for x in (queries, keys, values)]
        assert output.shape == queries.shape
        # A window whose right side is 0 is causal as well.
        expected = {"is_causal": reach < 0, "window": (reach, 0), "scale": 0.5}
        assert calls == [expected] * 2


@pytest.mark.skipif(not HAS_GPU, reason="the kernels run on GPUs")
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_gpu(family):
    """In bf16, against padded rows in float32: the kernel is used, and its error is rounding."""
    options = FAMILIES[family]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = tiny.model(family, **options).cuda().bfloat16()
        row, bounds = (x.cuda() for x in row_of())
        logps = prefkern.token_logprobs(model, row, cu_seqlens=bounds)
    expected = prefkern.token_logprobs(
        tiny.model(family, **options).bfloat16().float(), row.cpu(), cu_seqlens=bounds.cpu()
    )
    kinds = [varlen._Kind(row.device, torch.bfloat16, 4, n, 8, w) for n in (2, 4) for w in (0, 1)]
    assert varlen._kernel_for.cache_info().currsize
    assert any(varlen._kernel_for(kind) for kind in kinds)
    assert (logps.cpu() - expected).abs().max() < 0.1
