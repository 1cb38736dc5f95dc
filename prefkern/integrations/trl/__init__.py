"""prefkern in TRL: TRL's trainers without logits and, for DPO, with prefkern's objectives.

- `DPOTrainer` is TRL's trainer with prefkern's objectives: `DPOTrainer(..., objective="adadpo")`.
- `TPOTrainer` is TRL's experimental one: `TPOTrainer(..., adaptive=Adaptive())`. TRL's module is
  imported with its first use.
- `fuse_head(trainer)` puts prefkern's operator under TRL's own DPO, KTO, SFT, GRPO, RLOO, CPO,
  SimPO and ORPO; `restore_head` undoes it.

All depend on the inside of TRL's trainers, which changes with its minor versions. So only tested
versions are accepted. The import of any other version fails, before a training run can.
"""

from importlib import metadata

from packaging.specifiers import SpecifierSet

SUPPORTED = SpecifierSet(">=1.9,<1.17")

_INSTALL = f'pip install "trl{SUPPORTED}"'
try:
    _installed = metadata.version("trl")
except metadata.PackageNotFoundError as error:
    raise ImportError(
        f"prefkern.integrations.trl needs TRL {SUPPORTED}, which is not installed: {_INSTALL}"
    ) from error
if not SUPPORTED.contains(_installed, prereleases=True):
    raise ImportError(
        f"prefkern.integrations.trl supports TRL {SUPPORTED}, but {_installed} is installed: "
        f"{_INSTALL}"
    )

from typing import TYPE_CHECKING, Any

from prefkern.integrations.trl.dpo import DPOTrainer
from prefkern.integrations.trl.head import fuse_head, restore_head

if TYPE_CHECKING:
    from prefkern.integrations.trl.tpo import TPOTrainer

__all__ = ["SUPPORTED", "DPOTrainer", "TPOTrainer", "fuse_head", "restore_head"]


def __getattr__(name: str) -> Any:
    # TRL warns at the import of what is experimental.
    if name == "TPOTrainer":
        from prefkern.integrations.trl.tpo import TPOTrainer

        return TPOTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
