"""Runs on padded batches and the same runs on packed ones."""

from __future__ import annotations

from pathlib import Path

import torch

from support.training import Record, trainer

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


def gradients_of(run) -> dict[str, torch.Tensor]:
    (record,) = (c for c in run.callback_handler.callbacks if isinstance(c, Record))
    return record.gradients


def both_ways(path: Path, models, **options) -> list:
    """A run padded and the same one packed; `models(seed)` makes their models."""
    runs = []
    for packed in (False, True):
        given = {name: value() for name, value in options.items() if callable(value)}
        run = trainer(
            path,
            model=models(0),
            padding_free=packed,
            callbacks=[Record()],
            max_grad_norm=0.0,
            optim="sgd",
            learning_rate=1e-3,
            train_sampling_strategy="sequential",
            **{**options, **given},
        )
        batch = next(iter(run.get_train_dataloader()))
        assert ("cu_seqlens" in batch) == packed
        run.train()
        runs.append(run)
    return runs
