"""The `prefkern` entry of axolotl's YAML, and the same in the arguments of its trainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from prefkern import objectives


class PrefkernOptions(BaseModel):
    """`objective` by name, `workspace_mb` and `backend`; all others are the objective's own.

    An unknown objective and its unknown or bad options are errors before a model is loaded.
    """

    model_config = ConfigDict(extra="allow")

    objective: str = "adadpo"
    workspace_mb: float | None = None
    backend: str | None = None

    @model_validator(mode="after")
    def _objective_can_be_built(self) -> PrefkernOptions:
        objectives.build(self.objective, **(self.model_extra or {}))
        return self


class PrefkernArgs(BaseModel):
    """What axolotl adds to the entries that its YAML may have."""

    prefkern: PrefkernOptions | None = None


@dataclass
class PrefkernTrainingArgs:
    """What axolotl adds to the arguments of its trainers."""

    prefkern: dict[str, Any] | str | None = field(default=None)
