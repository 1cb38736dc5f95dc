"""prefkern in TRL: its trainers keep everything but their logits and, for DPO, their loss.

- `DPOTrainer` is TRL's, with an objective of prefkern's: `DPOTrainer(..., objective="adadpo")`.
- `fuse_head(trainer)` takes the logits out of TRL's own CPO, SimPO and ORPO; `restore_head` puts
  them back.

Both lean on what TRL's trainers do inside, which moves with its minor versions: those that were
tested are let in, and others are refused here rather than found out in training.
"""

from importlib import metadata

from packaging.specifiers import SpecifierSet

SUPPORTED = SpecifierSet(">=1.16,<1.17")

_INSTALL = f'pip install "trl{SUPPORTED}"'
try:
    _installed = metadata.version("trl")
except metadata.PackageNotFoundError as error:
    raise ImportError(
        f"prefkern.integrations.trl needs TRL {SUPPORTED}, which is not installed: {_INSTALL}"
    ) from error
if not SUPPORTED.contains(_installed, prereleases=True):
    raise ImportError(
        f"prefkern.integrations.trl supports TRL {SUPPORTED}, and {_installed} is installed: "
        f"{_INSTALL}"
    )

from prefkern.integrations.trl.dpo import DPOTrainer
from prefkern.integrations.trl.head import fuse_head, restore_head

__all__ = ["SUPPORTED", "DPOTrainer", "fuse_head", "restore_head"]
