"""`python -m support.launched train ...`: prefkern's command on ranks of a CPU, and how it was sharded.

Two things are patched, and nothing of prefkern:

- Accelerate takes FSDP from GPUs alone (`support.fsdp.fsdp_on_cpus`);
- DeepSpeed compiles an extension for ranks of one CPU when the first is started; they do without.

Rank 0 prints, at the end, a line of JSON: how many ranks there are and how many units of FSDP2, the
shape of the mesh, and the stage of ZeRO.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch

from prefkern.cli import __main__ as cli
from prefkern.cli import train

if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
    import deepspeed  # noqa: F401

    # Not by import: of its name `deepspeed.comm` makes torch itself.
    backend: Any = sys.modules["deepspeed.comm.torch"]
    backend.build_shm_op = lambda: None


def _report(run: Any) -> dict:
    from torch.distributed.fsdp import FSDPModule

    units = [module for module in run.model.modules() if isinstance(module, FSDPModule)]
    mesh = next((p.device_mesh for p in run.model.parameters() if hasattr(p, "device_mesh")), None)
    plugin = run.accelerator.state.deepspeed_plugin
    return {
        "ranks": run.args.world_size,
        "units": len(units),
        "mesh": None if mesh is None else list(mesh.shape),
        "stage": None if plugin is None else plugin.zero_stage,
        "bf16": run.accelerator.mixed_precision == "bf16",
    }


def main() -> int:
    torch.set_num_threads(1)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" or "--fsdp" in sys.argv:
        from support.fsdp import fsdp_on_cpus

        os.environ.setdefault("FSDP_VERSION", "2")
        fsdp_on_cpus()
    plain = train._run

    def reporting(run: Any, config: Any) -> None:
        plain(run, config)
        if config.process_index == 0:
            print(json.dumps(_report(run)))

    train._run = reporting
    status = cli.main(sys.argv[1:])
    if torch.distributed.is_initialized():
        # No rank leaves while another one still needs it.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main())
