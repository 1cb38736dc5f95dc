"""Runs whose sequences are cut over ranks (`cp_size`), started by torchrun; each rank saves what it saw.

torch's ring attention has no kernel of a CPU: `ring_on_cpus` gives it torch's own, forward and
backward. The ring, the cut of the rows and its order are torch's. FSDP2 is on a CPU as in
`support.fsdp`. The ranks of a sequence have the same batch: one process gets the same pairs in
batches of the same size, or joint ones if there are several such groups.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.experimental._context_parallel import _attention as ring

from support import fsdp, tiny
from support.fsdp import (
    FIRST,
    SUMS,
    TDPO,
    carried,
    lora,
    run_cases,
    tied,
    weights_and_gradients,
)
from support.resumed import logs_of, run_of
from support.training import made, single_rows

_KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def ring_on_cpus() -> None:
    """Give torch's ring attention the kernel of a CPU."""

    def attend(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, **given: Any) -> Any:
        return _KERNEL(query, key, value, 0.0, is_causal, **given)

    def differentiate(*, grad_out, query, key, value, out, logsumexp, is_causal, **given):
        of = (grad_out, query, key, value, out, logsumexp)
        return _BACKWARD(*of, 0.0, is_causal, **given)

    def forward(op: Any, args: Any, given: Any) -> Any:
        query, key, value = args[:3]
        group = query.device_mesh.get_group()
        is_causal = args[4] if len(args) > 4 else False
        rows = (each.to_local() for each in (query, key, value))
        found = ring._templated_ring_attention(
            group, 2, attend, *rows, is_causal=is_causal, **given
        )
        return _as_parts(found, query)

    def backward(op: Any, args: Any, given: Any) -> Any:
        grad_out, query, key, value, out, logsumexp = (each.to_local() for each in args[:6])
        group = args[1].device_mesh.get_group()
        found = ring._templated_ring_attention_backward(
            group, 2, differentiate, grad_out.contiguous(), "grad_out", query, key, value, out,
            logsumexp, args[7], **given,
        )  # fmt: skip
        return _as_parts(found, args[1])

    ring.custom_ops |= {_KERNEL: forward, _BACKWARD: backward}


def _as_parts(values: Any, like: DTensor) -> tuple[DTensor, ...]:
    return tuple(
        DTensor.from_local(x, like.device_mesh, [Shard(2)], run_check=False) for x in values
    )


EVAL = {"eval_dataset": tiny.dataset(5, seed=3), "per_device_eval_batch_size": 2}
# Beside these options each run has 8 pairs and a joint batch of 4.
CASES: dict[str, Any] = {
    "full, none": lambda: {
        "objective": "simpo",
        **EVAL,
        "include_num_input_tokens_seen": "non_padding",
    },
    "full, carried": lambda: {"train_dataset": carried()},
    "full, precomputed": lambda: {**SUMS, **EVAL, "precompute_ref_batch_size": 3},
    "full, copy, bf16": lambda: {"bf16": True},
    "full, reference, evaluated first": lambda: {
        **FIRST,
        "ref_model": tiny.model(seed=1),
        "learning_rate": 0.02,
    },
    "lora, adapter off": lambda: {"peft_config": lora(), **EVAL},
    "lora, adapter off, bf16": lambda: {"peft_config": lora(), "bf16": True},
    "lora, tied head": lambda: {"model": tied(), "peft_config": lora()},
    "lora on the head": lambda: {"peft_config": lora(target_modules=["q_proj", "lm_head"])},
    "lora, precomputed, evaluated first": lambda: {**FIRST, **SUMS, "peft_config": lora()},
    "trained adapter": fsdp.CASES["trained adapter"],
    "tdpo, adapter off": lambda: {**TDPO, "peft_config": lora()},
    "tdpo, reference": lambda: {**TDPO, "ref_model": tiny.model(seed=1)},
    "kto": lambda: {
        "objective": "kto",
        "model": tiny.model(seed=1),
        "ref_model": tiny.model(),
        "train_dataset": made(single_rows(8)),
        "eval_dataset": made(single_rows(6)),
        "per_device_eval_batch_size": 6,
    },
    "statistics": fsdp.CASES["statistics"],
    "draws": fsdp.CASES["draws"],
    "gold rows": lambda: {"objective": "tpo", "train_dataset": tiny.triple_dataset(8)},
    "lora, checkpointed, accumulated, clipped": lambda: {
        "peft_config": lora(),
        "gradient_checkpointing": True,
        "accumulated": 2,
        "max_grad_norm": 0.05,
    },
}


# What these go through others go through as well.
LONG = ("full, carried", "lora, tied head", "lora on the head", "tdpo, adapter off", "gold rows")
# Of four ranks: batches of two groups. KTO's mismatched pairs are of a group's own batch.
BY_GROUPS = {"kto by groups": fsdp.CASES["kto"]}
GROUPS = ("full, none", "full, precomputed", "statistics", "draws", "tdpo, reference", *BY_GROUPS)


def outcome_of(path: Path, case: str, ranks: int) -> dict:
    """A run of two steps; ranks in twos have a sequence together, one process has it alone."""
    cases = {**CASES, **BY_GROUPS}
    accumulated = cases[case]().get("accumulated", 1)
    size = 4 // max(ranks // 2, 1) // accumulated
    return fsdp.outcome_of(path, case, ranks, cases=cases, per_device_train_batch_size=size)


def launch(folder: Path, *names: str, count: int = 2) -> None:
    """Run these cases on ranks, two to a sequence."""
    fsdp.launch(
        folder,
        2,
        *names,
        module="context_parallel",
        count=count,
        ACCELERATE_USE_PARALLELISM_CONFIG="true",
        PARALLELISM_CONFIG_CP_SIZE="2",
        PARALLELISM_CONFIG_DP_SHARD_SIZE=str(count // 2),
    )


def _resumed(path: Path) -> list[dict]:
    """A run that saves after each step, and another that goes on from the third."""
    found = []
    for resumes in (False, True):
        options = {"save_strategy": "no"} if resumes else {}
        options |= {"eval_strategy": "no", "disable_dropout": True}
        run = run_of(path, "alphadpo", **options)
        run.train(resume_from_checkpoint=str(path / "checkpoint-3") if resumes else None)
        whole = weights_and_gradients(run.model)["weights"]
        found.append({"steps": run.state.global_step, "weights": whole, "logs": logs_of(run)})
    return found


OTHERS = {"resumed": _resumed}


def _outcome(folder: Path, case: str, ranks: int) -> Any:
    if case in OTHERS:
        return OTHERS[case](folder / case)
    return outcome_of(folder / case, case, ranks)


if __name__ == "__main__":
    ring_on_cpus()
    run_cases(_outcome)
