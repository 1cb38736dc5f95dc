"""Runs under DDP on two ranks, started by torchrun as users do it; each rank saves what it saw.

The same pairs in the same order reach one process as joint batches (`gradients_of` with one rank).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import datasets
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version

from prefkern.data import DatasetMix
from prefkern.data.collate import ExampleCollator
from prefkern.training import reference_cache
from support import tiny
from support.adapters import trained
from support.packed import rows_of_lengths, uneven_rows
from support.processes import environment
from support.reference_sums import precomputing, shards, sums
from support.resumed import logs_of, run_of
from support.training import Record, lora, made, single_rows, step_logs, stream, trainer, weights

# Older ones hand torch.load the device "cpu:0", which it does not know.
RESUMES = Version(transformers.__version__) >= Version("5.23")
UNEVEN = {"accelerator_config": {"even_batches": False}}


def single_rows_by_rank() -> datasets.Dataset:
    """The second rank's first batch has one prompt twice, so no mismatched pair at all."""
    rows = single_rows(8)
    rows[3]["prompt"] = rows[2]["prompt"]
    return made(rows)


class MismatchedByRank:
    """KTO's batch of one process, its mismatched pairs those that two ranks would form."""

    def __init__(self, pad_token_id: int):
        self.inner = ExampleCollator(pad_token_id)

    def __call__(self, examples):
        half = len(examples) // 2
        batch = self.inner(examples)
        parts = [self.inner(examples[:half]), self.inner(examples[half:])]
        for name, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
            rows = [part[f"mismatched_{name}"] for part in parts]
            longest = max(row.shape[1] for row in rows)
            padded = [F.pad(row, (0, longest - row.shape[1]), value=fill) for row in rows]
            batch[f"mismatched_{name}"] = torch.cat(padded)
        return batch


def softcapped(seed: int = 0) -> transformers.PreTrainedModel:
    return tiny.model("Gemma2", seed, final_logit_softcapping=5.0)


# 5 pairs leave the ranks an uneven last batch.
EVALUATED = {
    "eval_dataset": tiny.dataset(5, seed=2),
    "per_device_eval_batch_size": 2,
    "objective_options": {"clip": 1.1},
}
# Pairs, a rank's batch, accumulated batches, and other options. The joint batch is of 4 or 8 pairs.
# What one process is given beside them is `joint`.
CASES = {
    "full": (8, 2, 1, dict),
    "tied head": (8, 2, 1, lambda: {"model": tiny.model("Gemma2", tie_word_embeddings=True)}),
    "lora": (8, 2, 1, lambda: {"peft_config": lora()}),
    "lora, checkpointed": (
        8,
        2,
        1,
        lambda: {"peft_config": lora(), "gradient_checkpointing": True},
    ),
    "accumulated": (8, 1, 2, lambda: {"objective_options": {"clip": 1.1}}),
    "evaluated": (
        8,
        1,
        2,
        lambda: {**EVALUATED, "model": softcapped(), "ref_model": softcapped(1)},
    ),
    "lora, evaluated": (
        8,
        1,
        2,
        lambda: {
            **EVALUATED,
            "model": softcapped(),
            "peft_config": lora(),
            "precompute_ref_log_probs": True,
        },
    ),
    "trained adapter": (8, 1, 2, lambda: {"model": trained(), "ref_model": None}),
    "ipo, bf16": (8, 2, 1, lambda: {"objective": "ipo", "bf16": True, "peft_config": lora()}),
    "statistics": (8, 2, 1, lambda: {"objective": "alphadpo", "objective_options": {"alpha": 0.5}}),
    "draws": (8, 2, 1, lambda: {"objective": "betadpo", "objective_options": {"keep": 0.5}}),
    # Sorted over both ranks' pairs, the last batch uneven.
    "uneven, sorted": (
        7,
        2,
        1,
        lambda: {**UNEVEN, "objective": "adaaotunpaired", "ref_model": tiny.model(seed=1)},
    ),
    "moving reference": (
        8,
        1,
        1,
        lambda: {
            "sync_ref_model": True,
            "ref_model_sync_steps": 1,
            "ref_model": tiny.model(seed=1),
            "ld_alpha": 0.4,
        },
    ),
    # Between this policy and this reference KTO's reference point is above 0.
    "kto": (
        8,
        2,
        1,
        lambda: {
            "objective": "kto",
            "model": tiny.model(seed=1),
            "ref_model": tiny.model(),
            "train_dataset": single_rows_by_rank(),
            "train_sampling_strategy": "sequential",
            "joint": {"data_collator": MismatchedByRank(0)},
        },
    ),
    # 7 pairs: the second rank's last batch is of one.
    "uneven": (7, 2, 1, lambda: {**UNEVEN, "max_length": 9}),
    "uneven, tied, accumulated": (
        7,
        2,
        2,
        lambda: {**UNEVEN, "model": tiny.model("Gemma2", tie_word_embeddings=True)},
    ),
    "uneven, statistics": (7, 2, 1, lambda: {**UNEVEN, "objective": "alphadpo"}),
    "uneven, lora, precomputed": (
        7,
        2,
        2,
        # An adapter that changes the model from the start, so that no margin is rounding alone.
        lambda: {
            **UNEVEN,
            "peft_config": peft.LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False),
            "precompute_ref_log_probs": True,
        },
    ),
}
# Each rank reads the streams, and takes its part of every joint batch. A worker has its own shards.
CASES |= {
    "streams": (
        8,
        2,
        1,
        lambda: {
            "train_dataset": DatasetMix({"a": stream(8), "b": stream(5, seed=1)}, [1, 2]),
            "max_steps": 4,
            "eval_dataset": stream(5, seed=2),
            "per_device_eval_batch_size": 2,
        },
    ),
    "stream, workers": (
        8,
        2,
        1,
        lambda: {
            "train_dataset": stream(16, shards=2).shuffle(seed=1, buffer_size=5),
            "max_steps": 6,
            "dataloader_num_workers": 2,
        },
    ),
}
# By tokens a rank's batch is not a number of pairs. Two ranks take two batches at a time; the one
# process accumulates these two.
BY_TOKENS = {"padding_free": True, "share_prompt": True, "max_tokens_per_batch": 60}
CASES |= {
    "by tokens": (
        None,
        None,
        2,
        lambda: {
            **BY_TOKENS,
            "train_dataset": made(uneven_rows(19)),
            "eval_dataset": made(uneven_rows(9, seed=1)),
            "objective_options": {"clip": 1.1},
        },
    ),
    # Each batch is a pair: the second rank's last batch of the evaluation repeats the first pair.
    "by tokens, repeated": (
        None,
        None,
        1,
        lambda: {
            **BY_TOKENS,
            "train_dataset": made(rows_of_lengths(*[(20, 9, 7)] * 4)),
            "eval_dataset": made(rows_of_lengths(*[(20, 9, 7), (8, 9, 27), (20, 15, 3)], seed=1)),
            "peft_config": lora(),
            "precompute_ref_log_probs": True,
        },
    ),
}
# What these go through others go through as well.
LONG = (
    "full", "tied head", "lora", "accumulated", "lora, evaluated", "ipo, bf16", "uneven",
    "uneven, statistics",
)  # fmt: skip


def gradients_of(path: Path, case: str, ranks: int) -> dict:
    pairs, batch, accumulated, options = CASES[case]
    sizes = {"gradient_accumulation_steps": accumulated * (2 if ranks == 1 else 1)}
    sizes |= {"per_device_train_batch_size": 8}
    if batch is not None:
        sizes = {
            "count": pairs,
            "per_device_train_batch_size": batch if ranks == 2 else batch * 2 * accumulated,
            "gradient_accumulation_steps": accumulated if ranks == 2 else 1,
        }
    record, given = Record(), options()
    joint = given.pop("joint", {})
    given.setdefault("model", tiny.model())
    if "peft_config" not in given:
        given.setdefault("ref_model", tiny.model(seed=1))
    run = trainer(
        path,
        **sizes,
        optim="sgd",
        # Large enough for the second step's gradients to depend on the first's.
        learning_rate=0.1,
        max_grad_norm=0.0,
        callbacks=[record],
        **given,
        **(joint if ranks == 1 else {}),
    )
    run.train()
    assert run.args.world_size == ranks
    evaluated = [run.evaluate()] if "eval_dataset" in given else []
    state = {k: v for k, v in run.loss_fn.objective.state_dict().items() if torch.is_tensor(v)}
    logs = [*step_logs(run), *evaluated]
    return {"gradients": record.gradients, "logs": logs, "state": state}


def _resumed(path: Path) -> list[dict]:
    """A run that is saved between two logs and one that goes on from there."""
    runs = []
    for resumes in (False, True):
        options = {"save_strategy": "no"} if resumes else {}
        run = run_of(path, "betadpo", **options)
        run.train(resume_from_checkpoint=str(path / "checkpoint-3") if resumes else None)
        steps = run.state.global_step
        runs.append({"steps": steps, "weights": weights(run.model), "logs": logs_of(run)})
    return runs


def _resumed_stream(path: Path) -> list[dict]:
    """Two workers on each rank, stopped after the stream began again."""
    given = {"max_steps": 8, "dataloader_num_workers": 2, "per_device_train_batch_size": 2}
    given |= {"save_strategy": "steps", "save_steps": 5, "ref_model": tiny.model(seed=1)}
    runs = []
    for start in (None, str(path / "checkpoint-5")):
        rows = stream(12, shards=2).shuffle(seed=1, buffer_size=5)
        run = trainer(path, train_dataset=rows, **given)
        run.train(resume_from_checkpoint=start)
        runs.append({"weights": weights(run.model), "losses": [x["loss"] for x in step_logs(run)]})
    return runs


def _refused(path: Path) -> list[str]:
    messages = []
    for options in ({"count": 5}, {"count": 8, "eval_dataset": tiny.dataset(7)}):
        sizes = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}
        with pytest.raises(ValueError) as raised:
            trainer(path, **UNEVEN, **sizes, **options)
        messages.append(str(raised.value))
    return messages


def _cached(path: Path) -> dict:
    path = path / "cached"
    with pytest.raises(KeyboardInterrupt):
        precomputing(path, dies_after=6)
    # Rank 0 writes.
    torch.distributed.barrier()
    assert shards(path).keys() == {"000000000-000000004"}
    torch.distributed.barrier()
    runs = [precomputing(path) for _ in range(2)]
    return {"rows": [rows for _, rows in runs], "sums": [sums(r.train_dataset) for r, _ in runs]}


# By name; each case is a run of its own on both ranks.
OTHERS = {"refused": _refused, "cached": _cached}
if RESUMES:
    OTHERS |= {"resumed": _resumed, "resumed stream": _resumed_stream}


def torchrun(module: str, *arguments: str, count: int = 2, **settings: str) -> None:
    """Run a module on so many ranks, with these environment variables."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = [f"--nproc-per-node={count}", "-m", module, *arguments]
    subprocess.run([*launcher, *script], env={**environment(), **settings}, check=True, timeout=400)


def launch(folder: Path, *names: str) -> None:
    """Run these cases on two ranks; each leaves what it saw in `folder`/rank0.pt or rank1.pt."""
    torchrun("support.ddp", str(folder), *names)


if __name__ == "__main__":
    torch.set_num_threads(1)
    reference_cache._SHARD_PAIRS = 4
    folder = Path(sys.argv[1])
    outcomes = {
        case: OTHERS[case](folder) if case in OTHERS else gradients_of(folder, case, ranks=2)
        for case in sys.argv[2:]
    }
    torch.save(outcomes, folder / f"rank{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()
