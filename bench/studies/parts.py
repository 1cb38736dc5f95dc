"""The four parts of the study, and the runs that each needs.

A run that two parts need is done once: the clip C = 2 of the second part is AdaDPO of the first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import prefkern
from prefkern.objectives import Objective
from studies.tasks import QUALITIES

# AdaDPO's grid of beta; its learning rates are of full training of 8B parameters.
BETAS = (0.005, 0.01, 0.05, 0.1)
LEARNING_RATES = (5e-4, 2e-3)
# AdaDPO's Table 2, at this beta.
CLIPS = (1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 10.0)
CLIP_BETA = 0.01
# MADPO's experiment: one beta for all methods. tau and c_max are within its search; at its best
# tau = 7 no margin of a small reward model counts as large, so regularize-only would be DPO.
QUALITY_BETA, TAU, C_MAX = 0.1, 2.0, 4.0
QUALITY_LEARNING_RATE = 2e-3
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "DPO": ("dpo", {"beta": QUALITY_BETA}),
    "IPO": ("ipo", {"tau": QUALITY_BETA}),
    "beta-DPO": ("beta_dpo", {"beta": QUALITY_BETA, "m": 0.6, "keep": 0.8}),
    "MADPO": ("madpo", {"beta": QUALITY_BETA, "tau": TAU, "c_max": C_MAX}),
    "amplify only": (
        "madpo",
        {"beta": QUALITY_BETA, "tau": TAU, "c_max": C_MAX, "mode": "amplify"},
    ),
    "regularize only": (
        "madpo",
        {"beta": QUALITY_BETA, "tau": TAU, "c_max": C_MAX, "mode": "regularize"},
    ),
}
SENTENCES = "sentences"


@dataclass(frozen=True)
class Run:
    """One run of one seed: its data, its objective and its learning rate."""

    task: str  # SENTENCES, or one of QUALITIES
    objective: str
    learning_rate: float
    options: dict[str, Any] = field(hash=False)

    @property
    def key(self) -> str:
        """A name for files, with everything that tells runs apart."""
        options = "".join(f"-{name}{value}" for name, value in self.options.items())
        return f"{self.task}-{self.objective}{options}-lr{self.learning_rate:g}"

    def build(self) -> Objective:
        """A new objective, because a run changes its statistics."""
        objective = prefkern.objectives.build(self.objective, **self.options)
        assert isinstance(objective, Objective)
        return objective


def dpo(beta: float, learning_rate: float) -> Run:
    return Run(SENTENCES, "dpo", learning_rate, {"beta": beta})


def adadpo(beta: float, learning_rate: float, clip: float = 2.0, space: str = "ratio") -> Run:
    options = {"beta": beta, "clip": clip, "space": space}
    return Run(SENTENCES, "adadpo", learning_rate, options)


def method(quality: str, name: str) -> Run:
    objective, options = METHODS[name]
    return Run(quality, objective, QUALITY_LEARNING_RATE, options)


CELLS = [(rate, beta) for rate in LEARNING_RATES for beta in BETAS]
PARTS: dict[str, list[Run]] = {
    "grid": [make(beta, rate) for rate, beta in CELLS for make in (dpo, adadpo)],
    "quality": [method(quality, name) for quality in QUALITIES for name in METHODS],
    "clip": [adadpo(CLIP_BETA, rate, clip) for rate in LEARNING_RATES for clip in CLIPS],
    "space": [
        adadpo(beta, rate, space=space) for rate, beta in CELLS for space in ("ratio", "policy")
    ],
}
