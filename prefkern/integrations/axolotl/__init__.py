"""prefkern in axolotl: `rl: dpo` trains an objective of prefkern, with two additions to its YAML.

    plugins:
      - prefkern.integrations.axolotl.PrefkernPlugin
    prefkern: {objective: adadpo, beta: 0.1}

axolotl keeps datasets, models, adapters, callbacks and checkpoints. The step is that of
`prefkern.integrations.trl.DPOTrainer`.

axolotl catches an ImportError of a plugin's module, prints it, and trains plain DPO. So this module
imports nothing that may be missing or too old; `register` checks versions, and axolotl lets its
errors through. axolotl's `get_trainer_cls` would build the trainer without its model, so the class
is named by `trainer_cls`.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

from axolotl.integrations.base import BasePlugin  # pyright: ignore[reportMissingImports]
from packaging.specifiers import SpecifierSet

SUPPORTED = SpecifierSet(">=0.19,<0.20")

__all__ = ["SUPPORTED", "PrefkernPlugin"]

_PLUGIN = f"{__name__}.PrefkernPlugin"
_TRAINER = f"{__name__}.trainer.PrefkernDPOTrainer"
_EXAMPLE = "prefkern: {objective: adadpo, beta: 0.1}"


class PrefkernPlugin(BasePlugin):
    """Replaces axolotl's DPO trainer by one with an objective of prefkern.

    Raises RuntimeError for versions that are not supported, and if another plugin has chosen the
    trainer; ValueError for a configuration without `prefkern`, for another `rl` than dpo, and for a
    `trainer_cls`.
    """

    def register(self, cfg: Any) -> None:
        # axolotl registers the plugins of earlier configurations of a process, too.
        if _PLUGIN not in (cfg.get("plugins") or ()):
            return
        _check_versions()
        if not cfg.get("prefkern"):
            raise ValueError(f"prefkern is missing beside the plugin; set, for example, {_EXAMPLE}")
        if cfg.get("rl") != "dpo":
            raise ValueError(
                f"rl is {cfg.get('rl')!r}, but the objectives of prefkern are on pairs with a "
                "DPO dataset: set rl: dpo (for SimPO, CPO and ORPO, too)"
            )
        if cfg.get("trainer_cls") not in (None, _TRAINER):
            raise ValueError(
                f"trainer_cls is {cfg['trainer_cls']!r}, but prefkern brings its own trainer: leave "
                "it out"
            )
        cfg["trainer_cls"] = _TRAINER

    def get_input_args(self) -> str:
        return f"{__name__}.arguments.PrefkernArgs"

    def get_training_args_mixin(self) -> str:
        return f"{__name__}.arguments.PrefkernTrainingArgs"

    def get_training_args(self, cfg: Any) -> dict[str, Any] | None:
        return {"prefkern": dict(cfg.prefkern)} if cfg.prefkern else None

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        from prefkern.integrations.trl import DPOTrainer

        if cfg.prefkern and not isinstance(trainer, DPOTrainer):
            raise RuntimeError(
                f"the trainer is {type(trainer).__name__}, which another of the plugins "
                f"({', '.join(cfg.plugins)}) has chosen; prefkern needs its own"
            )


def _check_versions() -> None:
    """Raise RuntimeError unless axolotl and TRL are supported."""
    installed = metadata.version("axolotl")
    if not SUPPORTED.contains(installed, prereleases=True):
        raise RuntimeError(
            f"prefkern.integrations.axolotl supports axolotl {SUPPORTED}, but {installed} is "
            f'installed: pip install "axolotl{SUPPORTED}"'
        )
    try:
        import prefkern.integrations.trl as _  # noqa: F401
    except ImportError as error:
        raise RuntimeError(f"prefkern cannot train here: {error}") from error
