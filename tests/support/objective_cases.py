"""The table of all objectives with their oracles, and the pairs to compare them on.

Each row is a case: how the library builds the objective, and the name and options of the same
objective in `oracles`. The tests of the torch classes, the tests of the pair kernel and
`bench/objectives.py` all read this table. So an objective that is added here is tested everywhere.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefkern.loss import pairwise
from prefkern.objectives import (
    AOT,
    BCO,
    CPO,
    DPO,
    EXO,
    IPO,
    KTO,
    LNDPO,
    MADPO,
    MAX_LOG_RATIO,
    NCA,
    ORPO,
    RDPO,
    SFT,
    SPPO,
    TDPO1,
    TDPO2,
    TPO,
    WPO,
    Adaptive,
    AlphaDPO,
    AOTUnpaired,
    APODown,
    APOZero,
    BetaDPO,
    DiscoPOP,
    Examples,
    Hinge,
    Objective,
    OmniDPO,
    Pairs,
    RobustDPO,
    SimPO,
    UnpairedObjective,
    WithNLL,
)
from prefkern.objectives.links import MAX_SQUARED
from prefkern.objectives.running import RunningStatistics
from support import oracles
from support.oracles import Pair


class Sample(NamedTuple):
    """A pair, and its alignments for WPO."""

    pair: Pair
    alignment_w: float = 0.0
    alignment_l: float = 0.0


def _sample(*pair: float, alignments: tuple[float, float] = (0.0, 0.0)) -> Sample:
    # Rounded to float32, so that float32, float64 and the oracle get exactly the same pair.
    exact = Pair(*(struct.unpack("f", struct.pack("f", x))[0] for x in pair))
    gold = {"L_g": exact.L_l / 2, "n_g": 2 * exact.n_w}
    return Sample(exact._replace(**gold), *alignments)


#           L_w       L_l       R_w       R_l     n_w    n_l    K_w   K_l    h
ORDINARY = [
    _sample(-35.25, -41.75, -36.0, -40.0, 12, 15, 1.5, 2.25, 1.5, alignments=(-0.25, 0.5)),
    _sample(-80.5, -20.25, -60.0, -30.0, 40, 9, 0.5, 3.0, -4.0, alignments=(-2.0, 0.125)),
    _sample(-7.0, -7.5, -7.0, -7.5, 3, 3, 0.0, 0.0, 9.5, alignments=(0.75, 0.25)),
    _sample(-20.0, -64.0, -28.0, -61.5, 30, 50, 6.0, 4.0, -8.0, alignments=(0.0, -3.0)),
    _sample(-5.0, -12.0, -6.5, -8.0, 3, 4, 0.25, 0.75, 2.5, alignments=(0.5, -0.5)),
    _sample(-310.5, -290.25, -300.0, -300.0, 128, 100, 9.0, 11.0, 6.0, alignments=(1.0, -1.0)),
]
HARD = {
    "P near 1": [
        _sample(-1.2e-6, -3e-6, -2.4e-6, -1.5e-6, 12, 15, 1e-7, 2e-7, 0.0),
        _sample(-5e-12, -9e-9, -1e-11, -1e-8, 5, 9, 1e-9, 1e-9, 7.0),
    ],
    "P near 0": [
        _sample(-7e-10, -1e4, -1e-3, -9.9e3, 7, 7, 0.5, 90.0, 1e-4),
        _sample(-1e4, -7e-10, -9.9e3, -1e-3, 7, 7, 90.0, 0.5, -1e-4),
    ],
    "32k tokens": [
        _sample(-30000.5, -28000.25, -30010.0, -27950.0, 32768, 32000, 700.0, 650.0, 20.0),
    ],
}
GROUPS = {"ordinary": ORDINARY, **HARD}

ADAPTIVES = {
    "adaptive": Adaptive(),
    "policy space": Adaptive("policy"),
    "policy space, exponent 1, no clip": Adaptive("policy", 1.0, None),
    "exponent 0.3": Adaptive("ratio", 0.3, 4.0),
    "exponents 0.05, 0.2, no clip": Adaptive("ratio", (0.05, 0.2), None),
    "no clip": Adaptive(clip=None),
    "k 2, clip 1.5": Adaptive(clip=1.5, k=2.0),
    "exponent 0, no clip": Adaptive(exponent=0.0, clip=None),
}
# Dyadic numbers, so that the square root and float32 are exact.
MEAN, STD = 0.25, 0.75
MISMATCHED = (0.5, -1.0, 2.75)


@dataclass(frozen=True)
class Case:
    objective: str  # name in the registry, or name of the wrapper
    variant: str  # name of this row among the rows of the objective
    make: Callable[[], Objective | UnpairedObjective]
    oracle: str
    options: dict[str, Any]
    wpo: str | None = None  # "aligned" or "unaligned"

    @property
    def id(self) -> str:
        return f"{self.objective}: {self.variant}"

    def expected(self, samples: list[Sample]) -> list[tuple[float, ...]]:
        """The oracle's loss, d/dL_w, d/dL_l, beta_w and beta_l for each sample."""
        return [_truth(self.oracle, s.pair, self.options_for(s, samples)) for s in samples]

    def is_bounded(self, expected: tuple[float, ...], pair: Pair) -> bool:
        """Whether the library bounds a value against overflow here; no paper has such a bound."""
        if self.oracle in ("ipo", "sppo") and expected[0] > MAX_SQUARED**2:
            return True
        if self.options.get("f_divergence_type") == "forward_kl":
            # 1 - exp(-rho)
            return min(pair.L_w - pair.R_w, pair.L_l - pair.R_l) < -MAX_LOG_RATIO
        adaptive = self.options.get("adaptive")
        if adaptive is None or adaptive.clip is not None:
            return False
        return expected[3] > expected[4] * adaptive.k * math.exp(MAX_LOG_RATIO)

    def options_for(self, sample: Sample, samples: list[Sample]) -> tuple[tuple[str, Any], ...]:
        """The oracle's options for a pair; some of them depend on the whole batch."""
        options = dict(self.options)
        if self.wpo is not None:
            a_w, a_l = sample.alignment_w, sample.alignment_l
            if self.wpo == "unaligned":
                p = sample.pair
                a_w, a_l = p.L_w / p.n_w, p.L_l / p.n_l
            options["weight"] = oracles.wpo_weight([(a_w, 0.0)], [(a_l, 0.0)], clamp=False)
        if self.oracle == "betadpo":
            gaps = [(p.L_w - p.R_w) - (p.L_l - p.R_l) for p, *_ in samples]
            options["mean_gap"] = math.fsum(gaps) / len(gaps)
        if self.oracle in ("aot", "aotunpaired"):
            options |= _sorted_with(self.oracle, sample, samples, self.options)
        return tuple(sorted(options.items()))


@functools.cache
def _truth(name: str, pair: Pair, options: tuple[tuple[str, Any], ...]) -> tuple[float, ...]:
    return oracles.value_and_gradient(name, pair, **dict(options))


def _sorted_with(
    oracle: str, sample: Sample, samples: list[Sample], options: dict[str, Any]
) -> dict[str, Any]:
    """AOT's partners of a pair: what the batch has at the same place of the other order."""
    pairs = [Pair(*map(oracles.exact, each.pair)) for each in samples]
    own = samples.index(sample)
    given = {name: options[name] for name in ("beta", "adaptive") if name in options}
    with oracles.precisely():

        def betas(pair: Pair) -> tuple[Any, Any]:
            beta_w, beta_l = oracles.coefficients("dpo", pair, **given)[:2]
            return min(beta_w, beta_l * _largest_coefficient(given.get("adaptive"))), beta_l

        def order(values: list[Any]) -> list[int]:
            return sorted(range(len(values)), key=values.__getitem__)

        if oracle == "aot":
            margins = []
            for p in pairs:
                beta_w, beta_l = betas(p)
                policy, reference = (beta_w * w - beta_l * l for w, l in (p[:2], p[2:4]))
                margins.append((policy, reference))
            place = order([policy for policy, _ in margins]).index(own)
            return {"quantile": sorted(reference for _, reference in margins)[place]}
        by_chosen = order([p.L_w - p.R_w for p in pairs])
        by_rejected = order([p.L_l - p.R_l for p in pairs])
        rejected = pairs[by_rejected[by_chosen.index(own)]]
        chosen = pairs[by_chosen[by_rejected.index(own)]]
        second = pairs[own]._replace(L_w=chosen.L_w, R_w=chosen.R_w, n_w=chosen.n_w)
        return {"rejected": rejected, "chosen": chosen, "lent": betas(second)[0]}


def _largest_coefficient(adaptive: oracles.Adaptive | None) -> Any:
    """Of beta_w / beta_l: the library's bound, which no paper has."""
    if adaptive is None:
        return 1
    return oracles.exact(adaptive.k) * oracles.exact(MAX_LOG_RATIO).exp()


def _with_statistics(objective: AlphaDPO | BCO | BetaDPO) -> Objective:
    # Options may leave an objective without any.
    for statistics in objective.modules():
        if isinstance(statistics, RunningStatistics):
            statistics.mean.fill_(MEAN)
            statistics.variance.fill_(STD**2)
    return objective.eval()


def _row(
    objective: str, variant: str, cls: type, oracle: dict[str, Any] | None = None, **options: Any
) -> Case:
    """A row with equal option names on both sides; `oracle` has options only for the oracle."""
    theirs = {**options, **(oracle or {})}
    adaptive = theirs.get("adaptive")
    if adaptive is not None:
        theirs["adaptive"] = oracles.Adaptive(*dataclasses.astuple(adaptive))
    has_statistics = cls in (AlphaDPO, BCO, BetaDPO)

    def make() -> Objective | UnpairedObjective:
        made = cls(**options)
        return _with_statistics(made) if has_statistics else made

    return Case(objective, variant, make, objective, theirs)


def _adaptable() -> Iterable[Case]:
    """The methods of AdaDPO's Table 3 and similar ones, plain and adaptive."""
    for name, cls, options in (
        ("dpo", DPO, {"beta": 0.1}),
        ("lndpo", LNDPO, {"beta": 2.0}),
        ("robust", RobustDPO, {"beta": 0.2, "label_smoothing": 0.2}),
        ("hinge", Hinge, {"beta": 0.05}),
        ("ipo", IPO, {"tau": 0.1}),
        ("rdpo", RDPO, {"beta": 0.1, "alpha": 0.05}),
        ("exo", EXO, {"beta": 0.1, "label_smoothing": 0.02}),
        ("discopop", DiscoPOP, {"beta": 0.1, "tau": 0.05}),
        ("nca", NCA, {"beta": 0.1}),
        ("sppo", SPPO, {"beta": 0.05}),
        ("apozero", APOZero, {"beta": 0.1}),
        ("apodown", APODown, {"beta": 0.1}),
        ("cpo", CPO, {"beta": 0.1, "nll_weight": 0.7}),
        ("orpo", ORPO, {"beta": 0.4, "nll_weight": 1.3}),
        ("simpo", SimPO, {"beta": 2.0, "gamma": 0.8}),
        ("tpo", TPO, {"beta": 0.05, "tpo_alpha": 0.7}),
        (
            "omnidpo",
            OmniDPO,
            {"beta": 2.0, "eta": 0.7, "tau": 0.8, "gamma": 3.0, "nll_weight": 0.01},
        ),
        ("aot", AOT, {"beta": 0.1}),
        ("aotunpaired", AOTUnpaired, {"beta": 0.1}),
    ):
        yield _row(name, "plain", cls, **options)
        for variant, adaptive in ADAPTIVES.items():
            yield _row(name, variant, cls, **options, adaptive=adaptive)
    yield _row("dpo", "smoothed", DPO, beta=0.3, label_smoothing=0.2)
    yield _row("dpo", "smoothed, adaptive", DPO, beta=0.3, label_smoothing=0.2, adaptive=Adaptive())
    yield _row("aot", "smoothed", AOT, beta=0.02, label_smoothing=0.2, adaptive=Adaptive())
    yield _row(
        "aotunpaired", "smoothed", AOTUnpaired, beta=0.02, label_smoothing=0.2, adaptive=Adaptive()
    )
    yield _row("robust", "no flips", RobustDPO, beta=0.2, label_smoothing=0.0)
    yield _row("rdpo", "length preferred", RDPO, beta=0.1, alpha=-0.05)
    yield _row("ipo", "by length", IPO, tau=0.5, length_normalized=True)
    yield _row(
        "ipo", "by length, adaptive", IPO, tau=0.5, length_normalized=True, adaptive=Adaptive()
    )
    yield _row("cpo", "no NLL", CPO, beta=0.1, nll_weight=0.0)
    smoothing = {"label_smoothing": 0.2}
    yield _row("cpo", "smoothed", CPO, beta=0.1, nll_weight=0.7, **smoothing)
    yield _row("cpo", "smoothed, adaptive", CPO, beta=0.1, **smoothing, adaptive=Adaptive())
    yield _row("simpo", "smoothed", SimPO, beta=2.0, gamma=0.8, **smoothing)
    yield _row("simpo", "smoothed, adaptive", SimPO, beta=2.0, gamma=0.8, **smoothing,
               adaptive=Adaptive())  # fmt: skip
    for variant, options in TPO_LOSSES.items():
        yield _row("tpo", variant, TPO, **options)
        yield _row("tpo", f"{variant}, adaptive", TPO, **options, adaptive=Adaptive())
    yield _row("tpo", "no gold response", TPO, beta=0.1, tpo_alpha=0.0)
    yield _row("exo", "smoothed by 1e-3", EXO, beta=0.3, label_smoothing=1e-3)
    yield _row("discopop", "warm", DiscoPOP, beta=0.1, tau=0.7)
    yield _row("discopop", "beyond 1", DiscoPOP, beta=0.1, tau=2.5)
    omni = {"beta": 2.0, "eta": 0.7, "tau": 0.8}
    yield _row("omnidpo", "no NLL", OmniDPO, **omni, gamma=3.0, nll_weight=0.0)
    yield _row("omnidpo", "no weight of the policy", OmniDPO, **omni, gamma=0.0, nll_weight=0.01)
    yield _row("orpo", "no NLL", ORPO, beta=0.1, nll_weight=0.0)
    yield _row("orpo", "no NLL, adaptive", ORPO, beta=0.1, nll_weight=0.0, adaptive=Adaptive())


TPO_LOSSES: dict[str, dict[str, Any]] = {
    "smoothed": {"beta": 0.3, "label_smoothing": 0.2},
    "hinge": {"beta": 0.05, "loss_type": "hinge"},
    "ipo": {"beta": 0.4, "loss_type": "ipo", "tpo_alpha": 0.5},
    "tpo-l": {"beta": 2.0, "loss_type": "tpo-l", "tpo_l_gamma": 0.8},
    "tpo-l, smoothed": {"beta": 2.0, "loss_type": "tpo-l", "label_smoothing": 0.2},
}
DIVERGENCES = {
    "forward KL": {"f_divergence_type": "forward_kl"},
    "Jensen-Shannon": {"f_divergence_type": "js_divergence"},
    "alpha 0.5": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
    "alpha 1.25": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.25},
}


def _divergences() -> Iterable[Case]:
    """The losses that TRL takes an f-divergence for."""
    for variant, divergence in DIVERGENCES.items():
        yield _row("dpo", variant, DPO, beta=0.1, **divergence)
        yield _row("dpo", f"{variant}, adaptive", DPO, beta=0.1, **divergence, adaptive=Adaptive())
    few = {name: DIVERGENCES[name] for name in ("Jensen-Shannon", "alpha 0.5")}
    for name, cls, options in (
        ("lndpo", LNDPO, {"beta": 2.0}),
        ("robust", RobustDPO, {"beta": 0.2, "label_smoothing": 0.2}),
        ("hinge", Hinge, {"beta": 0.05}),
        ("ipo", IPO, {"tau": 0.3, "length_normalized": True}),
        ("exo", EXO, {"beta": 0.1, "label_smoothing": 0.02}),
        ("discopop", DiscoPOP, {"beta": 0.1, "tau": 0.05}),
    ):
        for variant, divergence in few.items():
            yield _row(name, variant, cls, **options, **divergence)


def _others() -> Iterable[Case]:
    statistics = {"mean": MEAN, "std": STD}
    yield _row("sft", "plain", SFT)
    for reference, by_length, by_beta in itertools.product(
        ("ratio", "policy", "reference", "inverse_reference"), (True, False), (True, False)
    ):
        variant = reference + ", by length" * by_length + ", by beta" * by_beta
        yield _row(
            "alphadpo",
            "plain" if variant == "ratio, by length, by beta" else variant,
            AlphaDPO,
            statistics,
            # Without lengths, log-probs are sums, so beta multiplies a larger number.
            beta=2.5 if by_length else 0.1,
            gamma=0.6,
            alpha=0.2,
            length_normalized=by_length,
            implicit_reference=reference,
            scale_by_beta=by_beta,
        )
    for reference, normalize, stop_gradient in itertools.product(
        ("ratio", "policy", "reference"), (True, False), (True, False)
    ):
        if normalize and stop_gradient:
            continue
        ablated = "not normalised" * (not normalize), "no stop-gradient" * (not stop_gradient)
        for by_length in (True, False) if reference == "ratio" else (True,):
            yield _row(
                "alphadpo",
                ", ".join((reference, *filter(None, ablated), *(() if by_length else ("sums",)))),
                AlphaDPO,
                statistics,
                beta=2.5 if by_length else 0.1,
                gamma=0.6,
                alpha=0.2,
                length_normalized=by_length,
                implicit_reference=reference,
                normalize=normalize,
                stop_gradient=stop_gradient,
            )
    for mode, c_min in itertools.product(("full", "amplify", "regularize"), (None, 0.0, 0.4)):
        yield _row(
            "madpo",
            "plain" if (mode, c_min) == ("full", None) else f"{mode}, c_min {c_min}",
            MADPO,
            beta=0.1,
            tau=7.0,
            c_max=4.0,
            c_min=c_min,
            lam=0.5,
            mode=mode,
        )
    yield _row("madpo", "steep", MADPO, beta=0.1, tau=2.0, c_max=1.5, c_min=0.9, lam=30.0)
    # beta-DPO depends on the batch's mean gap. In the second row beta is at its floor.
    yield _row("betadpo", "plain", BetaDPO, {"h0": MEAN}, beta=0.1, m=0.03)
    yield _row("betadpo", "floor", BetaDPO, {"h0": MEAN}, beta=0.1, m=1e-9, beta_min=0.2)
    yield _row("bco", "plain", BCO, {"mean": MEAN}, beta=0.1)
    for variant, adaptive in ADAPTIVES.items():
        yield _row("bco", variant, BCO, {"mean": MEAN}, beta=0.1, adaptive=adaptive)
    yield _row("bco", "no shift", BCO, {"mean": MEAN}, beta=0.3, reward_shift=False)
    yield _row("tdpo1", "plain", TDPO1, beta=0.1)
    yield _row("tdpo2", "plain", TDPO2, beta=0.1, alpha=0.5)
    yield _row("tdpo2", "alpha 0", TDPO2, beta=0.1, alpha=0.0)
    z0 = oracles.kto_z0(MISMATCHED)
    for variant, desirable, undesirable in (("plain", 1.0, 1.0), ("weighted", 1.5, 0.25)):
        yield Case(
            "kto",
            variant,
            functools.partial(KTO, 0.1, desirable, undesirable),
            "kto",
            {"beta": 0.1, "z0": z0, "lambda_d": desirable, "lambda_u": undesirable},
        )


def _composed(rows: list[Case]) -> Iterable[Case]:
    """WPO and the NLL term around the objectives that they usually wrap."""

    def wrapped(inner: Case, name: str, wrap: Callable, wpo: str | None = None, **options) -> Case:
        def make() -> Objective:
            objective = wrap(inner.make())
            return objective.train(objective.objective.training)

        return Case(
            name,
            inner.id.removesuffix(": plain"),
            make,
            inner.oracle,
            {**inner.options, **options},
            wpo,
        )

    by_id = {row.id: row for row in rows}
    for inner in ("dpo: plain", "dpo: adaptive", "cpo: plain", "alphadpo: plain", "tdpo2: plain"):
        row = by_id[inner]
        yield wrapped(row, "wpo", WPO, "aligned")
        yield wrapped(row, "nll", lambda o: WithNLL(o, 0.3), rpo_alpha=0.3)
    yield wrapped(by_id["dpo: plain"], "wpo unaligned", lambda o: WPO(o, False), "unaligned")
    yield wrapped(by_id["cpo: adaptive"], "nll", lambda o: WithNLL(o, 0.3), rpo_alpha=0.3)
    yield wrapped(
        by_id["dpo: adaptive"],
        "nll of wpo",
        lambda o: WithNLL(WPO(o), 0.3),
        "aligned",
        rpo_alpha=0.3,
        weight_nll=False,
    )
    yield wrapped(
        by_id["dpo: adaptive"],
        "wpo of nll",
        lambda o: WPO(WithNLL(o, 0.3)),
        "aligned",
        rpo_alpha=0.3,
        weight_nll=True,
    )


def _all() -> list[Case]:
    rows = [*_adaptable(), *_divergences(), *_others()]
    rows += list(_composed(rows))
    first = list(dict.fromkeys(row.objective for row in rows))
    return sorted(rows, key=lambda row: first.index(row.objective))


CASES = {case.id: case for case in _all()}


class Answer(NamedTuple):
    """The library's results, (B,) each, as float64 on the CPU."""

    losses: Tensor
    dchosen: Tensor
    drejected: Tensor
    beta_chosen: Tensor
    beta_rejected: Tensor


def columns(
    samples: list[Sample], dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> dict[str, Tensor]:
    """The samples' numbers under the names of `Pairs`; log-probs and KLs are leaves."""

    def column(values: Iterable[float]) -> Tensor:
        return torch.tensor(list(values), dtype=dtype, device=device)

    pairs = [sample.pair for sample in samples]
    values = {
        "chosen_logps": column(p.L_w for p in pairs),
        "rejected_logps": column(p.L_l for p in pairs),
        "ref_chosen_logps": column(p.R_w for p in pairs),
        "ref_rejected_logps": column(p.R_l for p in pairs),
        "chosen_lengths": column(p.n_w for p in pairs).long(),
        "rejected_lengths": column(p.n_l for p in pairs).long(),
        "reward_margins": column(p.h for p in pairs),
        "chosen_alignments": column(s.alignment_w for s in samples),
        "rejected_alignments": column(s.alignment_l for s in samples),
        "chosen_kls": column(p.K_w for p in pairs),
        "rejected_kls": column(p.K_l for p in pairs),
        "gold_logps": column(p.L_g for p in pairs),
        "gold_lengths": column(p.n_g for p in pairs).long(),
    }
    for name in ("chosen_logps", "rejected_logps", "chosen_kls", "rejected_kls", "gold_logps"):
        values[name].requires_grad_()
    return values


def evaluate(
    case: Case,
    samples: list[Sample],
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> Answer:
    """The torch class, differentiated by autograd."""
    objective = case.make().to(device)
    values = columns(samples, dtype, device)
    chosen, rejected = values["chosen_logps"], values["rejected_logps"]
    if isinstance(objective, Objective):
        result = objective(Pairs(**values))
        losses, betas = result.losses, (result.beta_chosen, result.beta_rejected)
    else:
        count = len(samples)
        examples = Examples(
            torch.cat([chosen, rejected]),
            torch.arange(2 * count, device=device) < count,
            torch.cat([values["ref_chosen_logps"], values["ref_rejected_logps"]]),
            torch.tensor(MISMATCHED, dtype=dtype, device=device),
        )
        # The oracle's loss is the sum over the two responses of a pair.
        losses = sum(objective(examples).losses.chunk(2))
        betas = (torch.full_like(losses, objective.beta),) * 2
    assert losses.dtype == dtype
    gradients = torch.autograd.grad(losses.sum(), [chosen, rejected], materialize_grads=True)
    return Answer(*(x.detach().cpu().double() for x in (losses, *gradients, *betas)))


def scores(
    samples: list[Sample], device: str, objective: Objective | None = None
) -> pairwise.Scores:
    """The samples as the inputs of the pair loss: one float32 log-prob per token, as a leaf.

    The first token of a response has the whole log-prob, so that the sum is exact. Inputs that the
    objective does not need are None.
    """
    values = columns(samples, torch.float32, device)

    def both(name: str) -> Tensor:
        return torch.cat([values[f"chosen_{name}"], values[f"rejected_{name}"]]).detach()

    responses = 2 if objective is None else objective.responses
    sides = ("chosen", "rejected", "gold")[:responses]
    lengths = torch.cat([values[f"{side}_lengths"] for side in sides])
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    logps = torch.zeros(int(offsets[-1]), device=device)
    sums = torch.cat([values[f"{side}_logps"] for side in sides]).detach()
    logps[offsets[:-1][lengths > 0]] = sums[lengths > 0]
    needs_reference = objective is None or objective.needs_reference
    needs_margins = objective is None or objective.needs_reward_margins
    reference = torch.cat([values["ref_chosen_logps"], values["ref_rejected_logps"]])
    return pairwise.Scores(
        logps.requires_grad_(),
        offsets,
        reference if needs_reference else None,
        values["reward_margins"] if needs_margins else None,
        both("alignments") if objective is None or objective.needs_alignments else None,
        both("kls") if objective is None or objective.needs_kls else None,
        responses=responses,
    )


def evaluate_kernel(case: Case, samples: list[Sample], device: str) -> Answer:
    """The pair kernel, through the call that the loss makes, with gradients of the tokens."""
    objective = case.make().to(device)
    assert isinstance(objective, Objective)
    inputs = scores(samples, device, objective)
    out = pairwise.pair_loss(objective, inputs, "triton")
    (dlogps,) = torch.autograd.grad(out.result.losses.sum(), inputs.logps)
    gradients = dlogps[inputs.offsets[:-1]].chunk(objective.responses)[:2]
    result = out.result
    values = (result.losses, *gradients, result.beta_chosen, result.beta_rejected)
    return Answer(*(x.detach().cpu().double() for x in values))


class Errors(NamedTuple):
    value: float
    gradient: float
    coefficient: float


# Below these a number counts as 0 in its dtype.
TINY = {torch.float64: 1e-280, torch.float32: 1e-30}
# Bounds on the errors: some twenty roundings. Cancelling digits would cost thousands.
BOUNDS = {torch.float64: 1e-11, torch.float32: 1e-5}


def errors(case: Case, samples: list[Sample], answer: Answer, dtype: torch.dtype) -> Errors:
    """The worst relative errors |x - truth| / max(|truth|, TINY), pair by pair.

    Pairs for which the library bounds a value against overflow are left out, because the oracle,
    like the papers, has no such bounds.
    """
    worst = [0.0, 0.0, 0.0]
    for row, truth in enumerate(case.expected(samples)):
        if case.is_bounded(truth, samples[row].pair):
            continue
        mine = [column[row].item() for column in answer]
        relative = [
            abs(x - true) / max(abs(true), TINY[dtype]) for x, true in zip(mine, truth, strict=True)
        ]
        for kind, values in enumerate((relative[:1], relative[1:3], relative[3:])):
            # Not max(): it would drop a NaN.
            worst[kind] = math.nan if any(map(math.isnan, values)) else max(worst[kind], *values)
    return Errors(*worst)
