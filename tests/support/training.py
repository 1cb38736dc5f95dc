"""Short runs of PreferenceTrainer on tiny models and drawn rows, and what is compared of them."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers

from support import tiny

pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")

from prefkern import PreferenceConfig, PreferenceTrainer, objectives

# Trainers collect garbage after every run: in a script, too, they need not look at what is imported.
gc.freeze()

BATCH = 4


def config(path: Path, **options) -> PreferenceConfig:
    defaults = {
        "output_dir": str(path),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
    }
    if options.get("precompute_ref_log_probs"):
        defaults["ref_cache_dir"] = str(path / "reference-sums")
    return PreferenceConfig(**{**defaults, **options})


def trainer(path: Path, count: int = 12, model=None, **options) -> PreferenceTrainer:
    names = (
        "objective",
        "ref_model",
        "peft_config",
        "eval_dataset",
        "train_dataset",
        "callbacks",
        "data_collator",
    )
    given = {name: options.pop(name) for name in names if name in options}
    if isinstance(given.get("objective"), str):
        options["objective"] = given.pop("objective")
    # Tables of objectives have one reference for all of them; where none is needed it is refused.
    objective = given.get("objective", options.get("objective", "dpo"))
    if isinstance(objective, str):
        needs_reference = objective.removeprefix("ada") not in ("simpo", "cpo", "orpo")
    else:
        needs_reference = objective.needs_reference
    if not needs_reference:
        given.pop("ref_model", None)
    given.setdefault("train_dataset", tiny.dataset(count))
    return PreferenceTrainer(
        tiny.model() if model is None else model,
        config(path, **options),
        processing_class=tiny.tokenizer(),
        **given,
    )


def reference_for(objective, model, **options):
    """A reference model, for an objective that has a reference; others refuse one."""
    built = objectives.build(objective, **options) if isinstance(objective, str) else objective
    return model if built.needs_reference else None


def lora() -> peft.LoraConfig:
    return peft.LoraConfig(r=4, task_type="CAUSAL_LM")


def step_logs(trained: transformers.Trainer) -> list[dict]:
    return [log for log in trained.state.log_history if "loss" in log]


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same_weights(first: dict, second: dict, **tolerances) -> None:
    assert first.keys() == second.keys()
    for name, weight in first.items():
        torch.testing.assert_close(weight, second[name], **tolerances)


class Record(transformers.TrainerCallback):
    """Keeps the gradients of every optimiser step."""

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.gradients.append(
            {
                name.removeprefix("module."): p.grad.clone()
                for name, p in model.named_parameters()
                if p.grad is not None
            }
        )


MARGINS = [0.5, -2.0, 6.0, 9.0, 3.0, -8.0, 1.0, 7.5]


def margin_rows(count: int, seed: int = 0) -> list[dict]:
    rows = tiny.pairs(count, seed)
    return [{**row, "margin": MARGINS[i % 8]} for i, row in enumerate(rows)]


def single_rows(count: int, seed: int = 0) -> list[dict]:
    """Single responses, two of three desirable, each with a prompt of its own."""
    return [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": i % 3 != 1}
        for i, row in enumerate(tiny.pairs(count, seed))
    ]


def made(rows: list[dict]) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows)


def _rows_of_shard(shard: list[list[dict]]) -> Iterator[dict]:
    for rows in shard:
        yield from rows


def stream(rows: int | list[dict], shards: int = 1, seed: int = 0) -> datasets.IterableDataset:
    """A stream of these rows, or of so many drawn pairs; every `shards`-th is in one shard."""
    rows = tiny.pairs(rows, seed) if isinstance(rows, int) else rows
    parts = {"shard": [rows[first::shards] for first in range(shards)]}
    return datasets.IterableDataset.from_generator(_rows_of_shard, gen_kwargs=parts)


def rows_of(name: str, count: int = 8) -> list[dict]:
    needs_margins = name in ("madpo", "omnidpo", "adaomnidpo")
    if needs_margins:
        return margin_rows(count)
    return tiny.triples(count) if name.endswith("tpo") else tiny.pairs(count)


def first_dpo_loss(model, batch: dict, coefficient: float = 0.0):
    """DPO's first loss at beta 0.1 from the model's logits, and what the model returned.

    Its own load-balancing loss is added, times a coefficient that is not 0.
    """
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    if coefficient:
        inputs["output_router_logits"] = True
    output = model(**inputs)
    labels = batch["labels"][:, 1:]
    picked = output.logits[:, :-1].log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])
    sums = (picked[..., 0] * (labels != -100)).sum(1)
    chosen, rejected = (sums - sums.detach()).chunk(2)  # the reference is the initial model
    loss = -F.logsigmoid(0.1 * (chosen - rejected)).mean()
    return (loss + coefficient * output.aux_loss if coefficient else loss), output
