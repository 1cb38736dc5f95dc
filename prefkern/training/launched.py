"""What a launcher asked for; warns where fewer processes train together than a launcher was asked for.

`accelerate launch --cpu --num_processes 2` starts one process, and so does `--num_processes 2` on a
machine with one GPU. The number that was asked for reaches that process neither by its environment
nor by its arguments. What the launcher leaves is the address at which several processes would meet,
without a rank among them. Slurm's `srun` starts all of its tasks and says how many there are, but
tasks without ranks of torch.distributed train apart, each on all pairs, into the same folder.
"""

from __future__ import annotations

import logging
import os
from importlib import metadata
from typing import Any

logger = logging.getLogger(__name__)

_REMEDY = "torchrun --nproc-per-node N starts N processes that train together"


def launched_parallelism(args: Any) -> Any:
    """Accelerate's ParallelismConfig, by a run's arguments or its launcher; None without one.

    Raises ValueError for one of an accelerate that is too old for transformers' Trainer.
    """
    given = args.parallelism_config
    if given is None and os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "").lower() == "true":
        from accelerate.parallelism_config import ParallelismConfig

        given = ParallelismConfig()
    # Trainer asks every one for this.
    if given is not None and not hasattr(given, "sp_backend"):
        raise ValueError(
            "parallelism_config needs accelerate 1.12 or newer, but "
            f"{metadata.version('accelerate')} is installed: pip install 'accelerate>=1.12'"
        )
    return given


def warn_of_missing_processes(world_size: int) -> None:
    """Warn if this process is alone and its launcher was to start several."""
    if world_size > 1:
        return
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    # Its launcher of one process alone says this.
    by_accelerate = "ACCELERATE_USE_CPU" in os.environ and "MASTER_PORT" in os.environ
    if by_accelerate and "WORLD_SIZE" not in os.environ:
        logger.warning(
            "accelerate launch was asked for more than one process and started this one alone, as "
            "it does with --cpu and where it finds a single GPU: %s",
            _REMEDY,
        )
    elif tasks.isdigit() and int(tasks) > 1:
        logger.warning(
            "srun started %s tasks, and this one trains by itself on all pairs, as the others do: "
            "start one launcher a machine (--ntasks-per-node 1); %s",
            tasks,
            _REMEDY,
        )
