"""A DPO step of Llama-shaped layers, padded, packed and shared: `python -m gpu_day.layouts --json FILE`.

A step is the policy's forward and backward, of LoRA adapters or of all parameters, with the
reference's sums computed before. "logits in memory" is the model's own forward on the padded batch.
The pairs and weights are random, the weights' dtype is bfloat16. For each way: time in turns, the
allocator's peak beyond weights and batch (gradients included), counted operations, the loss, which
is ln 2 since the policy is its own reference, and the norm of the gradients.

`--dry`: a tiny model in float32 on a CPU.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import prefkern
from prefkern.data.collate import PreferenceCollator, sequence_count
from prefkern.objectives import DPO
from prefkern.training.files import write_json
from prefkern_bench.group import MIB, Settings
from prefkern_bench.measure import cost_of
from prefkern_bench.models import QUICK, STACK, Model
from prefkern_bench.problem import BETA, IGNORE_INDEX, dpo_loss
from prefkern_bench.providers import label_logps
from prefkern_bench.step import TASKS, build
from prefkern_bench.timing import Failure, describe_failure, release, time_in_turns

LAYOUTS = {
    "padded": {},
    "packed": {"padding_free": True},
    "shared": {"padding_free": True, "share_prompt": True},
}
EAGER = "logits in memory"
# Tokens of prompts and responses, at least and at most.
LENGTHS = {"prompt": (256, 1536), "response": (128, 768)}
DRY_LENGTHS = {"prompt": (2, 6), "response": (1, 6)}
PAIRS, DRY_PAIRS = 6, 2
Step = Callable[[], tuple[Tensor, Tensor]]


def pairs(count: int, lengths: dict[str, tuple[int, int]], vocab: int) -> list[dict[str, Any]]:
    """Pairs of random tokens, of random lengths."""
    generator = torch.Generator().manual_seed(0)

    def ids(kind: str) -> list[int]:
        least, most = lengths[kind]
        length = int(torch.randint(least, most + 1, (), generator=generator))
        return torch.randint(3, vocab, (length,), generator=generator).tolist()

    return [
        {
            "prompt_ids": ids("prompt"),
            "chosen_ids": ids("response"),
            "rejected_ids": ids("response"),
        }
        for _ in range(count)
    ]


def batches(model: Model, device: torch.device, dry: bool) -> dict[str, dict[str, Tensor]]:
    """The same pairs in each layout."""
    lengths = DRY_LENGTHS if dry else LENGTHS
    rows = pairs(DRY_PAIRS if dry else PAIRS, lengths, model.config["vocab_size"])
    made = {name: PreferenceCollator(0, **options)(rows) for name, options in LAYOUTS.items()}
    return {
        name: {key: value.to(device) for key, value in batch.items()}
        for name, batch in made.items()
    }


def eager_loss(model: Any, batch: dict[str, Tensor], ref_sums: Tensor) -> Tensor:
    """The loss by the model's own forward, with the logits of all tokens."""
    out = model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    labels = batch["labels"][:, 1:]
    scored = labels != IGNORE_INDEX
    logps = label_logps(out.logits[:, :-1][scored], labels[scored])
    sums = torch.zeros(scored.shape, device=logps.device).masked_scatter(scored, logps).sum(-1)
    return dpo_loss(sums, ref_sums)


def steps_of(model: Any, given: dict[str, dict[str, Tensor]]) -> dict[str, Step]:
    """Each way's step: its loss and the norm of its gradients."""
    loss_fn = prefkern.FusedPreferenceLoss(DPO(BETA))
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step(loss_of: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        loss = loss_of()
        loss.backward()
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        for parameter in parameters:
            parameter.grad = None
        return loss.detach(), norm

    def fused(name: str, ref_logps: Tensor) -> prefkern.PreferenceOutput:
        out = prefkern.preference_outputs(model, given[name], loss_fn, ref_logps=ref_logps)
        assert isinstance(out, prefkern.PreferenceOutput)
        return out

    made: dict[str, Step] = {}
    for name, batch in given.items():
        with torch.no_grad():
            none = torch.zeros(sequence_count(batch), device=batch["input_ids"].device)
            out = fused(name, none)
        sums = torch.cat([out.chosen_logps, out.rejected_logps])
        if name == "padded":
            # The reference of the same sequences: its loss is ln 2 but for errors of its own.
            made[EAGER] = lambda sums=sums: step(lambda: eager_loss(model, given["padded"], sums))
        made[name] = lambda name=name, sums=sums: step(lambda: fused(name, sums).loss)
    return made


def fail(row: dict[str, Any], failure: Failure) -> None:
    row |= {"failure": str(failure), "traceback": failure.traceback}


def measure(model: Model, task: str, settings: Settings, dry: bool) -> list[dict[str, Any]]:
    """A row for each way, of one task."""
    built = build(model, task, settings.dtype, settings.device)
    given = batches(model, settings.device, dry)
    rows: dict[str, dict[str, Any]] = {}
    steps = steps_of(built, given)
    for name, step in list(steps.items()):
        tokens = given[name if name in given else "padded"]["input_ids"].numel()
        row = rows[name] = {"task": task, "way": name, "tokens": tokens, "failure": None}
        try:
            loss, norm = step()
            cost = cost_of(step, settings.device)
        except Exception as error:  # noqa: BLE001, a failure is a result, with its traceback
            fail(row, describe_failure(error))
            del steps[name], error
        else:
            row |= {"loss": loss.item(), "gradient_norm": norm.item()}
            row |= {"operations": cost.operations, "peak_mib": cost.peak_bytes / MIB}
        release(settings.device)
    times = time_in_turns(
        steps,
        settings.device,
        warm_up=settings.warm_up,
        rounds=settings.rounds,
        seconds=settings.seconds,
    )
    for name, outcome in times.items():
        if isinstance(outcome, Failure):
            fail(rows[name], outcome)
        else:
            rows[name]["median_ms"] = statistics.median(each.wall for each in outcome)
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--dry", action="store_true")
    arguments = parser.parse_args()
    dry = arguments.dry
    settings = Settings(
        providers=[],
        tasks=list(TASKS),
        dtype=torch.float32 if dry else torch.bfloat16,
        device=torch.device("cpu" if dry else "cuda"),
        workspace_mb=None,
        warm_up=0 if dry else 1,
        rounds=1 if dry else 8,
        seconds=60.0 if dry else 4.0,
    )
    model = QUICK[0] if dry else STACK
    result: dict[str, Any] = {"model": model.name, "rows": []}
    for task in TASKS:
        result["rows"] += measure(model, task, settings, dry)
        # A process that runs out of time leaves the tasks that it has done.
        write_json(arguments.json, result, indent=1)


if __name__ == "__main__":
    main()
