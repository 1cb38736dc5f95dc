"""Attention along paths: what is multiplied, who sees whom, and that transformers is left as it was."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import prefkern
from prefkern.models import packing, paths
from prefkern.models.head_forward import forward_with_head
from support import tiny, versions
from support.packed import PACKS

LENGTHS = (9, 1, 14, 5)


def row_of(lengths=LENGTHS, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    row = torch.randint(3, tiny.VOCAB_SIZE, (1, sum(lengths)), generator=generator)
    return row, torch.tensor([0, *lengths]).cumsum(0)


def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Queries and keys of each call of scaled_dot_product_attention from now on."""
    seen = []
    original = F.scaled_dot_product_attention

    def counted(query, key, *args, **kwargs):
        seen.append((query.shape[2], key.shape[2]))
        return original(query, key, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    return seen


def scored(model, row: Tensor, bounds: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    logps = prefkern.token_logprobs(model, row, cu_seqlens=bounds)
    logps.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return logps.detach(), gradients


def test_a_row_costs_what_its_sequences_cost(monkeypatch):
    model = tiny.model(attn_implementation="sdpa")
    row, bounds = row_of()
    packing.require_packing(model)
    seen = products(monkeypatch)
    scored(model, row, bounds)
    assert seen == [(n, n) for n in LENGTHS] * model.config.num_hidden_layers
    assert not packing.reads_whole_row(model)


# Families that go by paths, and those whose softcap sdpa does not take: transformers gives them eager.
BY_PATHS = {"Llama", "Qwen3", "GPT2", "Qwen3Moe", "GraniteMoe", "Mistral", "Gemma3Text", "Cohere2"}
WAYS = {"OPT": "paths", "GptOss": "branches"}
OPTIONS = {
    **PACKS,
    "Mistral": {"sliding_window": 4},
    "Gemma3Text": {"sliding_window": 4},
    "Cohere2": {"sliding_window": 4},
    # These read neither positions nor bounds in their masks.
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 512},
    "GptOss": {"sliding_window": 4, "num_local_experts": 4, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize("family", OPTIONS)
def test_by_paths_as_each_alone(family, monkeypatch):
    """Values and gradients, with windows shorter than the sequences."""
    model = tiny.model(family, **OPTIONS[family]).eval()
    row, bounds = row_of()
    logps, gradients = scored(model, row, bounds)
    model.zero_grad()
    alone = []
    for start, end in itertools.pairwise(bounds):
        part = prefkern.token_logprobs(model, row[:, start:end])
        part.sum().backward()
        alone.append(F.pad(part.detach(), (0, 1)))
    torch.testing.assert_close(logps, torch.cat(alone, 1)[:, :-1], atol=2e-5, rtol=1e-5)
    total = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    for name, parameter in model.named_parameters():
        if name in gradients:
            assert (gradients[name] - parameter.grad).norm() <= 1e-5 * total, name
    expected = "paths" if family in BY_PATHS else WAYS.get(family, "positions")
    if family == "Gemma2" and not versions.GEMMA2_EAGER.is_here:
        expected = "paths"
    assert packing._way(model, shares=False) == expected


def test_masks_are_made_for_windows_alone(monkeypatch):
    kinds = ["sliding_attention", "full_attention"]
    model = tiny.model("Gemma3Text", sliding_window=4, layer_types=kinds)
    masks = []
    original = paths.PathMask.of

    def noted(self, length, prefix):
        mask = original(self, length, prefix)
        masks.append((length, None if mask is None else tuple(mask.shape)))
        return mask

    monkeypatch.setattr(paths.PathMask, "of", noted)
    row, bounds = row_of()
    packing.require_packing(model)
    masks.clear()
    scored(model, row, bounds)
    expected = []
    for kind in kinds:
        is_full = kind == "full_attention"
        expected += [(n, None if is_full or n < 4 else (1, 1, n, n)) for n in LENGTHS]
    assert masks == expected


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_are_computed_again_along_the_paths(monkeypatch, reentrant):
    model = tiny.model().train()
    row, bounds = row_of()
    expected = scored(model, row, bounds)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    seen = products(monkeypatch)
    logps, gradients = scored(model, row, bounds)
    assert len(seen) == 2 * len(LENGTHS) * model.config.num_hidden_layers
    torch.testing.assert_close(logps, expected[0], atol=0, rtol=0)
    torch.testing.assert_close(gradients, expected[1], atol=0, rtol=0)


def test_two_runs_are_bitwise_equal():
    model = tiny.model("Gemma3Text", sliding_window=4)
    row, bounds = row_of((120, 3, 77, 64))
    first, second = scored(model, row, bounds), scored(model, row, bounds)
    torch.testing.assert_close(first, second, atol=0, rtol=0)


def test_other_forwards_are_transformers_own():
    """Padded rows, a cache, and packed rows without the keyword, after the tables were replaced."""
    row, bounds = row_of()
    padded = {"input_ids": row.view(1, -1), "attention_mask": torch.ones_like(row)}
    plain, model = tiny.model(seed=3), tiny.model(seed=3)
    with torch.no_grad():
        expected = plain(**padded, use_cache=True).logits
        scored_row = prefkern.token_logprobs(model, row, cu_seqlens=bounds)
        torch.testing.assert_close(model(**padded, use_cache=True).logits, expected)
        inputs = packing.packed_inputs(model, row, bounds)
        assert inputs.pop(paths.KEYWORD).lengths == LENGTHS
        logits = model(**inputs).logits
    logps = logits[:, :-1].log_softmax(-1).gather(-1, row[:, 1:, None])[..., 0]
    is_scored = torch.ones(row.shape[1] - 1, dtype=torch.bool)
    is_scored[bounds[1:-1] - 1] = False
    torch.testing.assert_close(scored_row[0, is_scored], logps[0, is_scored])


def test_a_compiled_model_masks_its_row(monkeypatch):
    """It would be compiled again for the lengths of each batch."""
    model = tiny.model()
    row, bounds = row_of()
    expected = scored(model, row, bounds)
    model.model.layers[0].mlp.compile(backend="eager")
    packing.require_packing(model)
    seen = products(monkeypatch)
    logps, _ = scored(model, row, bounds)
    assert set(seen) == {(row.shape[1], row.shape[1])}
    assert packing._way(model, shares=False) == "positions"
    torch.testing.assert_close(logps, expected[0], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("shares", [False, True])
def test_a_wholly_compiled_model(shares):
    model = tiny.model()
    row, bounds = row_of((11, 6))
    tree = torch.tensor([[0, 0], [0, 4]]) if shares else None

    def hidden(model):
        inputs = packing.packed_inputs(model, row, bounds, tree)
        with torch.no_grad():
            return forward_with_head(model, inputs, lambda head: (head.hidden, head.hidden))[0]

    expected = hidden(model)
    actual = hidden(torch.compile(model, backend="eager"))
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-5)


def test_a_model_compiles_whole_after_the_tables_were_replaced():
    """Nothing that torch.compile cannot read is left in transformers' tables."""
    model = tiny.model().eval()
    row, bounds = row_of()
    prefkern.token_logprobs(model, row, cu_seqlens=bounds)
    compiled = torch.compile(
        lambda ids: model(input_ids=ids, use_cache=False).logits, backend="eager", fullgraph=True
    )
    with torch.no_grad():
        torch.testing.assert_close(compiled(row), model(input_ids=row).logits)


def test_threads_do_not_see_one_anothers_paths():
    model = tiny.model().eval()
    row, _ = row_of()
    with torch.no_grad():
        expected = model(input_ids=row).logits
        found = []

        def other():
            with torch.no_grad():
                found.append(model(input_ids=row).logits)

        with paths.along(paths.Paths.of([0, 9, 29])):
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
    torch.testing.assert_close(found[0], expected, atol=0, rtol=0)


def test_a_model_that_drops_the_mask_is_refused():
    model = tiny.model()
    layer = model.model.layers[0]
    forward = layer.forward
    layer.forward = lambda hidden, attention_mask=None, **kwargs: forward(hidden, **kwargs)
    row, bounds = row_of()
    with pytest.raises(ValueError, match="sequences in one row see one another"):
        prefkern.token_logprobs(model, row, cu_seqlens=bounds)


def test_a_model_that_reads_the_mask_itself_masks_its_row(monkeypatch):
    """The probe finds that it cannot read a PathMask."""
    model = tiny.model()
    layer = model.model.layers[0]
    forward = layer.forward

    def reads(hidden, attention_mask=None, **kwargs):
        if attention_mask is not None:
            attention_mask = attention_mask[..., : hidden.shape[1]]
        return forward(hidden, attention_mask=attention_mask, **kwargs)

    layer.forward = reads
    row, bounds = row_of()
    packing.require_packing(model)
    assert packing.reads_whole_row(model)
    seen = products(monkeypatch)
    logps, _ = scored(model, row, bounds)
    assert set(seen) == {(row.shape[1], row.shape[1])}
    torch.testing.assert_close(
        logps, prefkern.token_logprobs(tiny.model(), row, cu_seqlens=bounds), atol=2e-5, rtol=1e-5
    )


def test_a_path_sees_its_prefix():
    """A branch of a row equals the same tokens after their prefix, each by itself."""
    model = tiny.model("Gemma3Text", sliding_window=4).eval()
    row, _ = row_of((11, 6))
    prompt, chosen, rejected = row[:, :4], row[:, 4:11], row[:, 11:]
    tree = paths.Paths((11, 6), ((0, 0), (0, 4)))
    positions = torch.cat([torch.arange(11), torch.arange(4, 10)])[None]
    inputs = {"input_ids": row, "position_ids": positions, paths.KEYWORD: tree}
    with torch.no_grad():
        hidden, _ = forward_with_head(model, inputs, lambda head: (head.hidden, head.hidden))
        for response, start in ((chosen, 4), (rejected, 11)):
            whole = {"input_ids": torch.cat([prompt, response], 1)}
            alone, _ = forward_with_head(model, whole, lambda head: (head.hidden, head.hidden))
            torch.testing.assert_close(
                hidden[:, start : start + response.shape[1]], alone[:, 4:], atol=1e-5, rtol=1e-5
            )
