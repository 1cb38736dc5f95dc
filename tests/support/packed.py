"""Runs on padded batches and the same runs on packed ones."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import transformers

from support import tiny
from support.training import Record, step_logs, trainer

_EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 2,
}
# Windows shorter than the sequences, so that they matter.
PACKS = {
    "Llama": {},
    "Qwen3": {},
    "Gemma2": {"final_logit_softcapping": 5.0, "sliding_window": 4},
    "GPT2": {},
    "Qwen3Moe": {**_EXPERTS, "output_router_logits": True},
    # takes use_cache among its keywords only
    "GraniteMoe": _EXPERTS,
}


def rows_of_lengths(*lengths: tuple[int, int, int], seed: int = 0) -> list[dict]:
    """Tokenised pairs with so many tokens in prompt, chosen and rejected response."""
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        return torch.randint(3, tiny.VOCAB_SIZE, (count,), generator=generator).tolist()

    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [dict(zip(names, map(ids, each), strict=True)) for each in lengths]


def uneven_rows(count: int, seed: int = 0) -> list[dict]:
    """Tokenised pairs of up to 50 tokens, prompts and responses of one token among them."""
    draw = random.Random(seed)
    lengths = [
        (draw.randint(1, 13), draw.randint(1, 12), draw.randint(1, 12)) for _ in range(count)
    ]
    return rows_of_lengths(*lengths, seed=seed)


def gradients_of(run) -> dict[str, torch.Tensor]:
    (record,) = (c for c in run.callback_handler.callbacks if isinstance(c, Record))
    return record.gradients


def both_ways(path: Path, models, shares: bool = False, **options) -> list:
    """A run padded and the same one packed, perhaps with shared prompts; `models(seed)` makes models."""
    runs = []
    for packed in (False, True):
        given = {name: value() for name, value in options.items() if callable(value)}
        run = trainer(
            path,
            model=models(0),
            padding_free=packed,
            share_prompt=packed and shares,
            callbacks=[Record()],
            max_grad_norm=0.0,
            optim="sgd",
            learning_rate=1e-3,
            train_sampling_strategy="sequential",
            **{**options, **given},
        )
        batch = next(iter(run.get_train_dataloader()))
        assert ("cu_seqlens" in batch) == packed
        assert ("prefixes" in batch) == (packed and shares)
        run.train()
        runs.append(run)
    return runs


def built(family: str, implementation: str = "sdpa", seed: int = 0, **options):
    """A tiny model with an attention implementation; skips if transformers lacks it."""
    if not hasattr(transformers, f"{family}Config"):
        pytest.skip(f"this transformers has no {family}")
    model = tiny.model(family, seed, **options)
    try:
        model.set_attn_implementation(implementation)
    except ValueError as error:
        pytest.skip(str(error))
    return model


def assert_same_runs(padded, packed) -> None:
    """Every gradient, every logged number."""
    pairs = [*zip(gradients_of(packed), gradients_of(padded), strict=True)]
    assert pairs
    for mine, true in pairs:
        total = torch.cat([gradient.flatten() for gradient in true.values()]).norm()
        assert total > 1e-3
        assert mine.keys() == true.keys()
        for name, gradient in mine.items():
            assert (gradient - true[name]).norm() <= 2e-6 * total, name
    for mine, true in zip(step_logs(packed), step_logs(padded), strict=True):
        assert mine.keys() == true.keys()
        # A margin is a difference of rewards, and has their rounding.
        size = max(1.0, abs(true.get("rewards/chosen", 0.0)))
        for name, value in true.items():
            if name == "num_tokens" and packed.args.share_prompt:
                assert 0 < mine[name] <= value  # A shared prompt counts once.
                continue
            bound = 2e-6 * (size if name.endswith("margins") else 1.0)
            assert mine[name] == pytest.approx(value, rel=2e-5, abs=bound), name
