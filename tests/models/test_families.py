"""Every family against its own logits: values, and every parameter's gradient."""

from __future__ import annotations

import pytest
import torch

import prefkern
from prefkern.models.head_forward import forward_with_head
from prefkern.models.heads import find_head
from prefkern.models.transform import head_transform
from support import family_table, tiny
from support.family_table import FAMILIES, VISION, Family


def _agree(family: Family, model: torch.nn.Module, ids, mask, labels, **inputs) -> None:
    weights = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    expected = family_table.oracle(model, ids, mask, labels, **inputs)
    (expected * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    actual = prefkern.token_logprobs(model, ids, mask, labels, **inputs)
    (actual * weights).sum().backward()

    assert actual.dtype == torch.float32
    assert expected.abs().max() > 1  # the case says something
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)
    assert prefkern.last_plan().backend == "torch"
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(gradients)
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(
                parameter.grad, gradients[name], atol=2e-5, rtol=2e-4, msg=lambda m, n=name: n + m
            )
    assert family.transform in (None, head_transform(model))
    # Of what is trained, the head has the gradient that is easiest to lose.
    assert find_head(model)[1].weight.grad.abs().max() > 1e-3


@pytest.mark.parametrize("family", [*FAMILIES, *VISION], ids=str)
def test_values_and_all_gradients_equal_the_models_own(family: Family) -> None:
    model = family_table.build(family)
    if model is None:
        pytest.skip(f"this transformers has no {family.name}")
    ids, mask, labels = family_table.batch()
    _agree(family, model, ids, mask, labels)
    cap = head_transform(model).softcap
    if cap is not None:
        # Where the cap bends, and not where it is a straight line.
        raw, _ = forward_with_head(
            model,
            {"input_ids": ids, "attention_mask": mask},
            lambda head: (head.hidden @ head.weight.T, head.hidden),
        )
        assert raw.abs().max() > 4 * cap


@pytest.mark.parametrize("family", VISION, ids=str)
def test_a_picture_among_the_tokens(family: Family) -> None:
    model = family_table.build(family)
    ids, mask, labels = family_table.batch()
    ids, labels, inputs = family_table.with_image(family, ids, labels)
    _agree(family, model, ids, mask, labels, **inputs)
    seen = [n for n, p in model.named_parameters() if "vis" in n and p.grad is not None]
    assert seen  # the picture was looked at


def test_heads_are_tied_and_untied() -> None:
    for tied in (True, False):
        family = Family("Qwen2", {"tie_word_embeddings": tied})
        model = family_table.build(family)
        embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
        assert (embeddings.weight is head.weight) == tied
    assert len({str(family) for family in FAMILIES}) == len(FAMILIES)
    assert tiny.VOCAB_SIZE > family_table.IMAGE
