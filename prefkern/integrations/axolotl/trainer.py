"""axolotl's DPO trainer with the step of prefkern's, built from the arguments that axolotl makes."""

from __future__ import annotations

from typing import Any

from axolotl.core.trainers.dpo.trainer import (  # pyright: ignore[reportMissingImports]
    AxolotlDPOTrainer,
)

from prefkern.integrations.trl import DPOTrainer


class PrefkernDPOTrainer(DPOTrainer, AxolotlDPOTrainer):
    """`prefkern.integrations.trl.DPOTrainer` with axolotl's optimizers, schedules and tokenizer.

    Its objective is that of `args.prefkern`; all else is as in axolotl's trainer.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = kwargs["args"].prefkern or {}
        options = {name: value for name, value in given.items() if value is not None}
        named = {name: options.pop(name, None) for name in ("objective", "workspace_mb", "backend")}
        super().__init__(*args, objective_options=options, **named, **kwargs)
