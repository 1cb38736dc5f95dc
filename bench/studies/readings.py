"""What claims, pictures and tables read from the runs of a part in the study's JSON."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from studies.parts import CLIP_BETA, LEARNING_RATES, Run, adadpo

# The runs of a part: by their key, and then by their seed.
Runs = dict[str, dict[str, Any]]


class Seed:
    """The runs of a part, of one seed."""

    def __init__(self, runs: Runs, seed: str) -> None:
        self._runs, self._seed = runs, seed

    def curve(self, run: Run, name: str, pairs: str = "held_out") -> list[float]:
        return self._runs[run.key][self._seed]["curves"][pairs][name]

    def last(self, run: Run, curve: str, pairs: str = "held_out") -> float:
        return self.curve(run, curve, pairs)[-1]

    def reward(self, run: Run, how: str | None = None) -> float:
        """True reward of continuations, greedy or sampled; None: the mean of both."""
        judged = self._runs[run.key][self._seed]["judged"]
        return statistics.fmean(
            judged[each]["reward"] for each in ("greedy", "sampled") if how in (None, each)
        )


Take = Callable[[Seed, Run], float]


def accuracy(seed: Seed, run: Run) -> float:
    return seed.last(run, "log_ratio_accuracy")


def shorter_accuracy(seed: Seed, run: Run) -> float:
    return seed.last(run, "shorter_accuracy")


def sampled_reward(seed: Seed, run: Run) -> float:
    return seed.reward(run, "sampled")


def greedy_reward(seed: Seed, run: Run) -> float:
    return seed.reward(run, "greedy")


def last(curve: str, pairs: str = "held_out") -> Take:
    return lambda seed, run: seed.last(run, curve, pairs)


def best_of_rates(take: Take) -> Callable[[Seed, float], float]:
    """A clip's value at the better of the learning rates, as in AdaDPO's Table 2."""
    return lambda seed, clip: max(
        take(seed, adadpo(CLIP_BETA, rate, clip)) for rate in LEARNING_RATES
    )


def seeds_of(runs: Runs) -> list[str]:
    return [*next(iter(runs.values()))]


def over_seeds(runs: Runs, take: Callable[[Seed, Any], float], of: Any) -> list[float]:
    """A reading of a run (or of a clip) for each seed."""
    return [take(Seed(runs, seed), of) for seed in seeds_of(runs)]


# What the pictures and tables of a part show, apart from curves.
GRID: list[tuple[str, Take]] = [
    ("training accuracy", last("reward_accuracy", "train")),
    ("held-out accuracy", last("reward_accuracy")),
    ("held-out loss", last("loss")),
    ("chosen, training", last("chosen_change", "train")),
    ("rejected, training", last("rejected_change", "train")),
    ("log balance, training", last("log_balance", "train")),
    ("length, held-out", last("length_correlation")),
    ("true reward", sampled_reward),
]
CLIP: list[tuple[str, Take]] = [
    ("held-out log-ratio accuracy", accuracy),
    ("where chosen is shorter", shorter_accuracy),
    ("true reward", sampled_reward),
]
SPACE: list[tuple[str, Take]] = [
    ("held-out log-ratio accuracy", accuracy),
    ("coefficient, training", last("coefficient", "train")),
    ("true reward", sampled_reward),
]
QUALITY: list[tuple[str, Take]] = [("greedy", greedy_reward), ("sampled", sampled_reward)]
