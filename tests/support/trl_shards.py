"""TRL's own trainers under `fuse_head`, sharded over two gloo ranks, or on one process.

Started by torchrun (`launch`) as `python -m support.trl_shards FOLDER MODE`, where the mode is
"FSDP2", "ZeRO-2" or "ZeRO-3"; each rank saves what it saw.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from prefkern.integrations.trl import fuse_head
from support import fsdp, tiny, zero
from support.ddp import torchrun
from support.fsdp import lora
from support.training import made, single_rows, step_logs
from support.trl_runs import build

# Beside these options each run has 8 rows and a joint batch of 4.
CASES: dict[str, Any] = {
    "sft, full": (SFTTrainer, SFTConfig, dict),
    "sft, lora on the head": (
        SFTTrainer,
        SFTConfig,
        lambda: {"peft_config": lora(target_modules=["q_proj", "lm_head"])},
    ),
    "dpo, full": (DPOTrainer, DPOConfig, lambda: {"ref_model": tiny.model(seed=1)}),
    "dpo, adapter off": (DPOTrainer, DPOConfig, lambda: {"peft_config": lora()}),
    "kto, full": (KTOTrainer, KTOConfig, lambda: {"ref_model": tiny.model(seed=1)}),
}


def rows_of(kind: type) -> Any:
    if kind is SFTTrainer:
        return made([{"text": row["prompt"] + row["chosen"]} for row in tiny.pairs(8)])
    return made(single_rows(8)) if kind is KTOTrainer else tiny.dataset(8)


def outcome_of(
    path: Path, case: str, ranks: int, record: Any = fsdp.record, **options: Any
) -> dict:
    kind, configure, given = CASES[case]
    run = build(
        path,
        kind=fuse_head(kind),
        make_config=configure,
        train_dataset=rows_of(kind),
        max_steps=2,
        per_device_train_batch_size=4 // ranks,
        **given(),
        **options,
    )
    steps = record(run)
    run.train()
    assert run.args.world_size == ranks
    return {"steps": steps, "logs": step_logs(run)}


def launch(folder: Path, mode: str) -> None:
    settings = (
        {**fsdp.SETTINGS, **fsdp.VERSIONS[2]} if mode == "FSDP2" else {"DS_ACCELERATOR": "cpu"}
    )
    torchrun("support.trl_shards", str(folder), mode, **settings)


def main(folder: Path, mode: str) -> None:
    torch.set_num_threads(1)
    options: dict[str, Any] = {}
    if mode == "FSDP2":
        fsdp.fsdp_on_cpus()
    else:
        zero.on_cpus()
        options = {"deepspeed": zero.configuration(int(mode[-1])), "record": zero.record}
    found: dict[str, Any] = {}
    for case in CASES:
        # Else transformers would make the case's models in the shards of the last case's ZeRO-3.
        unset_hf_deepspeed_config()
        found[case] = outcome_of(folder / case, case, 2, **options)
    torch.save(found, folder / f"rank{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
