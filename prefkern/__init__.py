"""prefkern: memory-efficient, exact and fast preference training on PyTorch and Triton.

Where to begin:

- `linear_logprobs` is the operator: log-probs of labels without logits in memory. `linear_kl` adds
  the KL to a reference. `plan_for` says what a call costs. `VocabShard` is a rank's part of a head.
- `FusedPreferenceLoss` is the loss on them, and `objectives` has the formulas of the losses.
- `reference` has the same calls with logits in memory.
- `diagnostics` shows how hard the loss pushes each response.
- For transformers: `token_logprobs`, `preference_outputs` (a model's forward with the loss in it)
  and `PreferenceTrainer`.

Each name is imported at first use, so the command line shows its help without torch, and the
operator needs no transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from prefkern.version import VERSION

if TYPE_CHECKING:
    from prefkern import diagnostics, objectives, reference
    from prefkern.loss.fused import FusedPreferenceLoss
    from prefkern.loss.outputs import PreferenceOutput, UnpairedOutput
    from prefkern.models.scoring import preference_outputs, token_logprobs
    from prefkern.objectives import Pairs
    from prefkern.ops.kl import linear_kl
    from prefkern.ops.logprobs import linear_logprobs, plan_for
    from prefkern.ops.outputs import TokenKL, TokenStats
    from prefkern.ops.plan import Plan, last_plan
    from prefkern.ops.shards import VocabShard
    from prefkern.training.config import PreferenceConfig
    from prefkern.training.trainer import PreferenceTrainer

__version__ = VERSION

__all__ = [
    "FusedPreferenceLoss",
    "Pairs",
    "Plan",
    "PreferenceConfig",
    "PreferenceOutput",
    "PreferenceTrainer",
    "TokenKL",
    "TokenStats",
    "UnpairedOutput",
    "VocabShard",
    "diagnostics",
    "last_plan",
    "linear_kl",
    "linear_logprobs",
    "objectives",
    "plan_for",
    "preference_outputs",
    "reference",
    "token_logprobs",
]

_MODULES = ("diagnostics", "objectives", "reference")
_PLACES = {
    "FusedPreferenceLoss": "loss.fused",
    "Pairs": "objectives",
    "Plan": "ops.plan",
    "PreferenceConfig": "training.config",
    "PreferenceOutput": "loss.outputs",
    "PreferenceTrainer": "training.trainer",
    "TokenKL": "ops.outputs",
    "TokenStats": "ops.outputs",
    "UnpairedOutput": "loss.outputs",
    "VocabShard": "ops.shards",
    "last_plan": "ops.plan",
    "linear_kl": "ops.kl",
    "linear_logprobs": "ops.logprobs",
    "plan_for": "ops.logprobs",
    "preference_outputs": "models.scoring",
    "token_logprobs": "models.scoring",
}


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return importlib.import_module(f"prefkern.{name}")
    if name not in _PLACES:
        raise AttributeError(f"module 'prefkern' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"prefkern.{_PLACES[name]}"), name)
    # From now on a plain attribute, which torch.compile also reads.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
