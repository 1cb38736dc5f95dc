"""Finds out whether a checkpoint is the end of its run, so that resuming it trains on nothing.

A scheduler starts a job again, finished or not. Trainer would take one more step each time, because
it looks at the number of steps only after one. A run is over if it has taken all its steps, or if
early stopping has run out of patience. A run that another callback stopped, at a time limit for
example, is not over.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, TrainerState

# Metrics of the steps that a call to train() took. They mean nothing if it took none.
OF_STEPS = ("train_loss", "train_samples_per_second", "train_steps_per_second")


@dataclass(frozen=True)
class Progress:
    """How far the run of a checkpoint had come."""

    steps: int
    evaluations_without_improvement: int

    @staticmethod
    def of(state_file: Path) -> Progress:
        """Read it from a checkpoint's trainer_state.json."""
        state = json.loads(state_file.read_text(encoding="utf-8"))
        saved: Any = (state.get("stateful_callbacks") or {}).get(EarlyStoppingCallback.__name__, {})
        # A list if there are several of them.
        counts = [
            each.get("attributes", {}).get("early_stopping_patience_counter", 0)
            for each in (saved if isinstance(saved, list) else [saved])
        ]
        return Progress(state["global_step"], max(counts, default=0))

    def is_over(self, state: TrainerState, callbacks: Iterable[Any]) -> bool:
        """Whether a run that was just resumed there has nothing left to do."""
        if state.global_step >= state.max_steps:
            return True
        patience = [
            callback.early_stopping_patience
            for callback in callbacks
            if isinstance(callback, EarlyStoppingCallback)
        ]
        return any(self.evaluations_without_improvement >= each for each in patience)
