"""What is counted of a body without weights, against steps of the same model that run and are measured."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from prefkern.data.collate import PreferenceCollator
from prefkern.models.adapters import disable_dropout
from prefkern.models.body_cost import Sequences, body_cost
from prefkern.models.head_forward import head_forward
from prefkern.models.scoring import model_inputs
from prefkern_bench.measure import Meter
from support import tiny, versions

_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
# The window is longer than some of the sequences, and shorter than others.
FAMILIES = {
    "Llama": {},
    "Qwen3": {},
    # Without a mask it looks for this token among the ids.
    "GPT2": {"pad_token_id": 0},
    "Gemma3Text": {"sliding_window": 80, "layer_types": ["sliding_attention", "full_attention"]},
    "Mixtral": _EXPERTS,
}
LAYOUTS = ("padded", "packed", "shared")
SHAPES = [(70, 30, 41), (20, 55, 9), (45, 1, 60), (3, 40, 37), (1, 2, 3)]


def without_weights(family: str, **options):
    with torch.device("meta"):
        return tiny.model(family, **options)


def batch(layout: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [
        {
            column: torch.randint(5, tiny.VOCAB_SIZE, (n,), generator=generator).tolist()
            for column, n in zip(columns, shape, strict=True)
        }
        for shape in SHAPES
    ]
    is_packed = layout != "padded"
    return PreferenceCollator(0, padding_free=is_packed, share_prompt=layout == "shared")(rows)


def sequences(layout: str) -> Sequences:
    p, c, r = np.array(SHAPES).T
    none = np.zeros(2 * len(SHAPES), np.int64)
    if layout == "padded":
        longest = int((p + np.maximum(c, r)).max())
        return Sequences(none + longest, none, is_padded=True, has_padding=True)
    if layout == "packed":
        return Sequences(np.concatenate([p + c, p + r]), none, is_padded=False)
    prefixes = np.concatenate([0 * p, p - 1])
    return Sequences(np.concatenate([p + c, 1 + r]), prefixes, is_padded=False)


def measured(model, layout: str) -> tuple[int, int, int]:
    """Operations of forward and of backward, and the bytes that are alive between them."""
    inputs = model_inputs(model, batch(layout))
    head_forward(model, inputs, _end)  # probes
    with Meter() as forward:
        _, output = head_forward(model, inputs, _end)
    kept = forward.live_bytes
    with Meter() as backward:
        output.logits.sum().backward()
    return forward.operations, backward.operations, kept


def _end(head):
    return None, head.hidden.sum(-1, keepdim=True)


def _of_positions(family: str) -> int:
    """What older ones save: the products of rotations are of one row of a padded batch for all.

    A position costs 2 operations for each of half a head's dimensions, in each table of rotations.
    """
    tables = {"GPT2": 0, "Gemma3Text": 2}.get(family, 1)
    rows, longest = batch("padded")["input_ids"].shape
    return 2 * (rows - 1) * longest * tiny.SIZES["head_dim"] // 2 * tables


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_those_of_a_step(family, layout):
    options = FAMILIES[family]
    model = tiny.model(family, **options).train()
    disable_dropout(model)
    # A loop over experts, to measure plain products. They are counted in one grouped product, which
    # has shapes without bytes in bfloat16 alone.
    model.set_experts_implementation("eager")
    dtype = torch.bfloat16 if family == "Mixtral" else torch.float32
    cost = body_cost(without_weights(family, **options), dtype).of(sequences(layout))
    forward, backward, kept = measured(model, layout)
    assert sequences(layout).tokens == batch(layout)["input_ids"].numel()
    saved = 0
    if layout == "padded" and not versions.ROTATIONS_WITHOUT_PRODUCTS.is_here:
        saved = _of_positions(family)
    assert (forward, backward) == (cost.forward - saved, cost.backward)
    if family != "Mixtral":
        assert kept == pytest.approx(cost.kept, rel=0.02)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    _, again, _ = measured(model, layout)
    assert again - backward == cost.recomputed


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_under_checkpointing(layout):
    """Layers keep their inputs; in this small model also tables of rotations, the same for all."""
    options = {"num_hidden_layers": 12, "hidden_size": 128, "max_position_embeddings": 128}
    model = tiny.model(**options).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    cost = body_cost(without_weights("Llama", **options), torch.float32).of(sequences(layout))
    _, _, kept = measured(model, layout)
    one_layer = cost.kept_checkpointed - kept
    assert one_layer == pytest.approx(cost.kept / 12, rel=0.1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_frozen_body_has_no_products_for_its_weights(layout):
    model = tiny.model().train()
    model.requires_grad_(False)
    model.enable_input_require_grads()
    found = body_cost(without_weights("Llama"), torch.float32, trains_weights=False)
    trained = body_cost(without_weights("Llama"), torch.float32)
    assert found.backward == trained.backward / 2
    assert found.recomputed == trained.forward > trained.recomputed
    assert measured(model, layout)[1] == found.of(sequences(layout)).backward


def test_adapters_keep_what_is_counted():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules="all-linear", r=1, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny.model(hidden_size=64, intermediate_size=192), config).train()
    model.enable_input_require_grads()
    empty = without_weights("Llama", hidden_size=64, intermediate_size=192)
    cost = body_cost(empty, torch.float32, trains_weights=False).of(sequences("shared"))
    assert measured(model, "shared")[2] == pytest.approx(cost.kept, rel=0.05)


REFUSED = {
    "Gemma2": ({}, "its attention is 'eager', and only sdpa is counted"),
    "Mamba": ({"state_size": 8}, "its attention is 'eager', and only sdpa is counted"),
    "Falcon": ({}, "not all of its attention goes through transformers' table of attention"),
    "Mixtral": (_EXPERTS, "in float32: without weights it raises RuntimeError: Expected inputs"),
}


@pytest.mark.parametrize(
    "family",
    [versions.GEMMA2_EAGER.param(name) if name == "Gemma2" else name for name in REFUSED],
)
def test_what_cannot_be_counted_is_refused(family):
    options, problem = REFUSED[family]
    with pytest.raises(
        ValueError, match=f"the body of {family}ForCausalLM cannot be counted.*"
    ) as e:
        body_cost(without_weights(family, **options), torch.float32)
    assert problem in str(e.value)


def test_nothing_is_left_behind():
    """The model's class and transformers' tables serve other models as before."""
    body_cost(without_weights("Llama"), torch.float32)
    model, ids = tiny.model(), torch.arange(3, 9)[None]
    assert model.config._attn_implementation == "sdpa"
    assert model(ids).logits.isfinite().all()
    assert isinstance(model, transformers.LlamaForCausalLM)
