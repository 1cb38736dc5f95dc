"""What the papers claim, and how each claim is judged from the study's JSON.

A claim gives differences for one seed, one for each cell that it speaks of (a cell of AdaDPO's
grid, a quality of MADPO's data), positive where it holds. The mean over cells is the seed's number.

- seen: the number is positive for every seed, its mean over seeds is more than twice their standard
  deviation, and the difference is positive in more than half of all cells and seeds;
- not seen: the same with negative numbers;
- not decidable at this size: anything else, and everything with one seed.

A claim that two things are equal is seen if no seed's number exceeds a bound. It is not seen if the
numbers exceed it in every seed, and a difference is clear in the way above.

A claim that one thing is the best (or worst) of several is compared with the best of the others,
whose noise is in its favour. So numbers below 0 decide nothing there.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from studies.parts import BETAS, CELLS, CLIPS, LEARNING_RATES, adadpo, dpo, method
from studies.readings import Runs, Seed, Take, accuracy, best_of_rates, sampled_reward, seeds_of
from studies.tasks import QUALITIES

SEEN, NOT_SEEN, UNDECIDED = "seen", "not seen", "not decidable at this size"
# Standard deviations over seeds that a mean must exceed.
LEAST_SPREADS = 2.0


@dataclass(frozen=True)
class Claim:
    part: str
    source: str
    text: str
    compared: str
    differences: Callable[[Seed], list[float]]
    equal_within: float | None = None
    # Whether the comparison is with the best, or worst, of several others.
    with_extreme: bool = False


@dataclass(frozen=True)
class Verdict:
    claim: Claim
    word: str
    by_seed: list[float]
    holds: int  # cells and seeds in which the difference is positive
    of: int

    @property
    def numbers(self) -> str:
        """Mean and standard deviation over seeds, and in how many cells the claim holds."""
        mean = f"{statistics.fmean(self.by_seed):+.3g}"
        if len(self.by_seed) > 1:
            mean += f" ± {statistics.stdev(self.by_seed):.2g}"
        seeds = ", ".join(f"{value:+.3g}" for value in self.by_seed)
        text = f"{mean} (by seed {seeds})"
        if self.claim.equal_within is None:
            text += f"; holds in {self.holds} of {self.of}"
        return text


def judged(report: dict[str, Any]) -> list[Verdict]:
    """The verdicts on all claims whose part has runs."""
    return [
        _judge(claim, report["parts"][claim.part])
        for claim in CLAIMS
        if claim.part in report["parts"]
    ]


def _judge(claim: Claim, runs: Runs) -> Verdict:
    cells = [claim.differences(Seed(runs, seed)) for seed in seeds_of(runs)]
    flat = [value for values in cells for value in values]
    word = word_of(cells, claim.equal_within, claim.with_extreme)
    by_seed = [*map(statistics.fmean, cells)]
    return Verdict(claim, word, by_seed, sum(value > 0 for value in flat), len(flat))


def word_of(
    cells: list[list[float]], equal_within: float | None = None, with_extreme: bool = False
) -> str:
    """The verdict on the differences of each seed, one for each cell."""
    if len(cells) < 2:
        return UNDECIDED
    by_seed = [*map(statistics.fmean, cells)]
    mean, spread = statistics.fmean(by_seed), statistics.stdev(by_seed)
    signs = [(value > 0) - (value < 0) for values in cells for value in values]
    sign = 1 if mean > 0 else -1
    clear = (
        abs(mean) > LEAST_SPREADS * spread
        and all(sign * value > 0 for value in by_seed)
        and 2 * signs.count(sign) > len(signs)
    )
    if equal_within is not None:
        if all(abs(value) <= equal_within for value in by_seed):
            return SEEN
        beyond = all(abs(value) > equal_within for value in by_seed)
        return NOT_SEEN if clear and beyond else UNDECIDED
    if not clear or (with_extreme and mean < 0):
        return UNDECIDED
    return SEEN if mean > 0 else NOT_SEEN


def _grid(
    curve: str, pairs: str = "held_out", lower: bool = False
) -> Callable[[Seed], list[float]]:
    """AdaDPO minus DPO at each learning rate and beta; `lower`: the other way round."""

    def differences(seed: Seed) -> list[float]:
        sign = -1 if lower else 1
        return [
            sign * (seed.last(adadpo(b, r), curve, pairs) - seed.last(dpo(b, r), curve, pairs))
            for r, b in CELLS
        ]

    return differences


def _balance(seed: Seed) -> list[float]:
    size = lambda run: abs(seed.last(run, "log_balance", "train"))
    return [size(dpo(b, r)) - size(adadpo(b, r)) for r, b in CELLS]


def _overfitting(seed: Seed) -> list[float]:
    losses = [seed.curve(dpo(beta, LEARNING_RATES[-1]), "loss") for beta in BETAS]
    return [loss[-1] - loss[0] for loss in losses]


def _suppression(seed: Seed) -> list[float]:
    """How much more DPO lowers rejected responses than it raises chosen ones, in nats."""
    return [
        -seed.last(dpo(b, r), "rejected_change", "train")
        - seed.last(dpo(b, r), "chosen_change", "train")
        for r, b in CELLS
    ]


def _clip_two_is_best(take: Take) -> Callable[[Seed], list[float]]:
    best = best_of_rates(take)
    return lambda seed: [best(seed, 2.0) - max(best(seed, clip) for clip in CLIPS if clip != 2.0)]


def _small_beats_large(take: Take) -> Callable[[Seed], list[float]]:
    best = best_of_rates(take)
    return lambda seed: [
        statistics.fmean(best(seed, clip) for clip in CLIPS if clip <= 2.5)
        - statistics.fmean(best(seed, clip) for clip in CLIPS if clip >= 5)
    ]


def _spaces(take: Take) -> Callable[[Seed], list[float]]:
    return lambda seed: [
        take(seed, adadpo(b, r, space="policy")) - take(seed, adadpo(b, r)) for r, b in CELLS
    ]


def _above(better: str, *others: str) -> Callable[[Seed], list[float]]:
    """A method's true reward above the best of others, for each quality."""
    return lambda seed: [
        seed.reward(method(quality, better))
        - max(seed.reward(method(quality, other)) for other in others)
        for quality in QUALITIES
    ]


def _worst(worst: str, *others: str) -> Callable[[Seed], list[float]]:
    return lambda seed: [
        min(seed.reward(method(quality, other)) for other in others)
        - seed.reward(method(quality, worst))
        for quality in QUALITIES
    ]


ADA_DPO = "AdaDPO minus DPO"
CLAIMS = [
    Claim(
        "grid",
        "MADPO, section 2.3",
        "DPO overfits a finite dataset",
        f"held-out loss of DPO, last step minus step 0, learning rate {LEARNING_RATES[-1]:g}",
        _overfitting,
    ),
    Claim(
        "grid",
        "AdaDPO, section 2",
        "DPO lowers rejected responses more than it raises chosen ones",
        "training pairs of DPO: fall of the rejected log-prob minus rise of the chosen one, nats",
        _suppression,
    ),
    Claim(
        "grid",
        "AdaDPO, section 1",
        "AdaDPO promotes chosen responses more than DPO does",
        f"training pairs: change of the chosen log-prob, nats, {ADA_DPO}",
        _grid("chosen_change", "train"),
    ),
    Claim(
        "grid",
        "AdaDPO, section 1",
        "AdaDPO suppresses rejected responses less than DPO does",
        f"training pairs: change of the rejected log-prob, nats, {ADA_DPO}",
        _grid("rejected_change", "train"),
    ),
    Claim(
        "grid",
        "AdaDPO, A.6",
        "AdaDPO's gradients on the two probabilities are closer to balance",
        "training pairs: size of the median log balance, nats, DPO minus AdaDPO",
        _balance,
    ),
    Claim(
        "grid",
        "AdaDPO, Figure 3a",
        "lower evaluation loss at matched beta",
        "held-out loss, DPO minus AdaDPO",
        _grid("loss", lower=True),
    ),
    Claim(
        "grid",
        "AdaDPO, Figure 3b",
        "higher reward accuracy at matched beta",
        f"held-out reward accuracy, {ADA_DPO}",
        _grid("reward_accuracy"),
    ),
    Claim(
        "grid",
        "AdaDPO, Figure 3c",
        "larger beta x KL margin at matched beta",
        f"held-out beta (rho_w - rho_l), {ADA_DPO}",
        _grid("kl_margin"),
    ),
    Claim(
        "grid",
        "AdaDPO, Figure 3d",
        "larger reward margin at matched beta",
        f"held-out r_w - r_l, {ADA_DPO}",
        _grid("reward_margin"),
    ),
    Claim(
        "grid",
        "AdaDPO, Figure 1a",
        "higher length-controlled win rate, by a stand-in",
        f"held-out accuracy where the chosen sentence is the shorter one, {ADA_DPO}",
        _grid("shorter_accuracy"),
    ),
    Claim(
        "grid",
        "AdaDPO, Figure 1b",
        "higher win rate, by a stand-in",
        f"true reward of sampled continuations, {ADA_DPO}",
        lambda seed: [
            seed.reward(adadpo(b, r), "sampled") - seed.reward(dpo(b, r), "sampled")
            for r, b in CELLS
        ],
    ),
    Claim(
        "grid",
        "AdaDPO, section 5",
        "less length bias",
        "held-out correlation of rho_w - rho_l with n_w - n_l, DPO minus AdaDPO",
        _grid("length_correlation", lower=True),
    ),
    Claim(
        "clip",
        "AdaDPO, Table 2",
        "C = 2 is the best clip",
        "held-out log-ratio accuracy, C = 2 minus the best of the others",
        _clip_two_is_best(accuracy),
        with_extreme=True,
    ),
    Claim(
        "clip",
        "AdaDPO, Table 2",
        "C = 2 is the best clip",
        "true reward of sampled continuations, C = 2 minus the best of the others",
        _clip_two_is_best(sampled_reward),
        with_extreme=True,
    ),
    Claim(
        "clip",
        "AdaDPO, A.4",
        "C in [1.5, 2.5] is better than C from 5 on",
        "held-out log-ratio accuracy, difference of means",
        _small_beats_large(accuracy),
    ),
    Claim(
        "clip",
        "AdaDPO, A.4",
        "C in [1.5, 2.5] is better than C from 5 on",
        "true reward of sampled continuations, difference of means",
        _small_beats_large(sampled_reward),
    ),
    Claim(
        "space",
        "AdaDPO, A.5",
        "ratio space and policy space perform alike",
        "held-out log-ratio accuracy, policy minus ratio, equal within 0.02",
        _spaces(accuracy),
        equal_within=0.02,
    ),
    Claim(
        "space",
        "AdaDPO, A.5",
        "ratio space and policy space perform alike",
        "true reward of sampled continuations, policy minus ratio, equal within 0.1",
        _spaces(sampled_reward),
        equal_within=0.1,
    ),
    Claim(
        "quality",
        "MADPO, Figure 1",
        "MADPO has the highest reward of the four methods",
        "true reward, MADPO minus the best of DPO, IPO and beta-DPO",
        _above("MADPO", "DPO", "IPO", "beta-DPO"),
        with_extreme=True,
    ),
    Claim(
        "quality",
        "MADPO, Figure 1",
        "beta-DPO improves upon DPO",
        "true reward, beta-DPO minus DPO",
        _above("beta-DPO", "DPO"),
    ),
    Claim(
        "quality",
        "MADPO, Figure 1",
        "IPO is the worst of the four methods",
        "true reward, the worst of DPO, beta-DPO and MADPO minus IPO",
        _worst("IPO", "DPO", "beta-DPO", "MADPO"),
        with_extreme=True,
    ),
    Claim(
        "quality",
        "MADPO, Figure 1",
        "DPO drops on data of low quality",
        "true reward of DPO, high minus low quality",
        lambda seed: [seed.reward(method("high", "DPO")) - seed.reward(method("low", "DPO"))],
    ),
    Claim(
        "quality",
        "MADPO, Figure 3",
        "amplification brings more than regularization",
        "true reward, amplify only minus regularize only",
        _above("amplify only", "regularize only"),
    ),
    Claim(
        "quality",
        "MADPO, Figure 3",
        "regularization alone improves upon DPO",
        "true reward, regularize only minus DPO",
        _above("regularize only", "DPO"),
    ),
]
