"""What a checkpoint keeps besides transformers' files, so that a resumed run continues bit for bit.

    objective.pt       the objective's state: running statistics, number of draws
    since_last_log.pt  each rank's sums of metrics and losses that are not logged yet, and their
                       objective

transformers keeps weights, optimiser, schedule, data order and random states. It does not keep the
loss and the metrics between two logs, so that the first log after a resumption would cover fewer
steps than in an uninterrupted run.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from prefkern.training.checkpoint_files import CheckpointError, read_tensors

logger = logging.getLogger(__name__)

_OBJECTIVE_FILE = "objective.pt"
_LOG_FILE = "since_last_log.pt"


def save_objective(objective: nn.Module, folder: str) -> None:
    """Save the objective's state, if it has any, in a checkpoint."""
    state = objective.state_dict()
    if state:
        torch.save(state, Path(folder) / _OBJECTIVE_FILE)


def load_objective(objective: nn.Module, folder: str, otherwise: str = "start over") -> None:
    """Load the statistics that belong to a checkpoint's weights.

    If they are missing, warns that they `otherwise` ("start over"). Raises ValueError for those of
    another objective, and for a file that cannot be read.
    """
    _check_objective(objective, Path(folder) / _LOG_FILE)
    if not objective.state_dict():
        return
    file = Path(folder) / _OBJECTIVE_FILE
    if not file.exists():
        logger.warning("%s is missing: the objective's statistics %s", file, otherwise)
        return
    # Read to the CPU, and copied from there to the statistics' device.
    state = _read(file)
    try:
        objective.load_state_dict(state)
    except (RuntimeError, TypeError, KeyError, AttributeError) as error:
        name = type(objective).__name__
        raise CheckpointError(f"{file} is of another objective than {name}: {error}") from error


def _check_objective(objective: nn.Module, file: Path) -> None:
    """Raise ValueError if a checkpoint is of another objective; warn of other settings."""
    described = _read(file).get("objective") if file.exists() else None
    if described is None or described == _description(objective):
        return
    kinds, settings = described["kinds"], described["settings"]
    if kinds != _description(objective)["kinds"]:
        raise CheckpointError(
            f"{file.parent} was trained with {settings}, and this run's objective is {objective}: "
            "its optimiser's state is of another loss. To train its weights on, give the folder "
            "as the model, and do not resume"
        )
    logger.warning("%s was trained with %s, and goes on with %s", file.parent, settings, objective)


def _description(objective: nn.Module) -> dict[str, Any]:
    kinds = [type(module).__name__ for module in objective.modules()]
    return {"kinds": kinds, "settings": str(objective)}


def _read(file: Path) -> Any:
    try:
        return read_tensors(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}): resume from another checkpoint"
        ) from error


@dataclass(frozen=True)
class SinceLastLog:
    """This rank's part of the next log: sums over the steps since the last one."""

    steps: int
    loss: Tensor  # () summed over steps
    sums: dict[str, Tensor]  # (2,) each: numerators and weights of metrics

    def save(
        self, folder: str, accelerator: Accelerator, objective: nn.Module, writes: bool
    ) -> None:
        """Save every rank's part in a checkpoint. All ranks call it; those with `writes` write."""
        gathered: Any = accelerator.gather(
            {"loss": self.loss[None], "sums": {name: x[None] for name, x in self.sums.items()}}
        )
        if writes:
            saved = {"steps": self.steps, "objective": _description(objective), **gathered}
            torch.save(saved, Path(folder) / _LOG_FILE)

    @staticmethod
    def load(folder: str, accelerator: Accelerator) -> SinceLastLog | None:
        """This rank's part, from a checkpoint; None if the checkpoint has none."""
        file = Path(folder) / _LOG_FILE
        if not file.exists():
            return None
        saved = _read(file)
        loss, sums = saved["loss"], saved["sums"]  # (ranks,) and (ranks, 2)
        rank = accelerator.process_index
        # A log takes the mean of the ranks' losses and the sum of their metrics. Keep both if the
        # number of ranks has changed.
        if len(loss) == accelerator.num_processes:
            loss, sums = loss[rank], {name: total[rank] for name, total in sums.items()}
        else:
            loss = loss.mean()
            sums = {name: total.sum(0) * (rank == 0) for name, total in sums.items()}
        device = accelerator.device
        sums = {name: total.to(device) for name, total in sums.items()}
        return SinceLastLog(saved["steps"], loss.to(device), sums)
