"""Objectives by name: `build("adadpo", beta=0.1)`."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from prefkern.objectives.adaptive import Adaptive
from prefkern.objectives.alpha_dpo import AlphaDPO
from prefkern.objectives.aot import AOT, AOTUnpaired
from prefkern.objectives.base import Objective
from prefkern.objectives.bco import BCO
from prefkern.objectives.beta_dpo import BetaDPO
from prefkern.objectives.checks import require_bool
from prefkern.objectives.composed import WPO, WithNLL
from prefkern.objectives.contrastive import (
    DPO,
    EXO,
    IPO,
    LNDPO,
    RDPO,
    DiscoPOP,
    Hinge,
    RobustDPO,
)
from prefkern.objectives.kto import KTO, UnpairedObjective
from prefkern.objectives.madpo import MADPO
from prefkern.objectives.mixture import Mixture
from prefkern.objectives.omni_dpo import OmniDPO
from prefkern.objectives.reference_free import CPO, ORPO, SFT, SimPO
from prefkern.objectives.tdpo import TDPO1, TDPO2
from prefkern.objectives.tpo import TPO
from prefkern.objectives.two_sided import NCA, SPPO, APODown, APOZero
from prefkern.typos import nearest

REGISTRY: dict[str, type[Objective | UnpairedObjective]] = {
    "dpo": DPO,
    "lndpo": LNDPO,
    "robust": RobustDPO,
    "hinge": Hinge,
    "ipo": IPO,
    "rdpo": RDPO,
    "exo": EXO,
    "discopop": DiscoPOP,
    "nca": NCA,
    "sppo": SPPO,
    "apozero": APOZero,
    "apodown": APODown,
    "cpo": CPO,
    "orpo": ORPO,
    "simpo": SimPO,
    "sft": SFT,
    "tpo": TPO,
    "alphadpo": AlphaDPO,
    "madpo": MADPO,
    "omnidpo": OmniDPO,
    "betadpo": BetaDPO,
    "bco": BCO,
    "aot": AOT,
    "aotunpaired": AOTUnpaired,
    "tdpo1": TDPO1,
    "tdpo2": TDPO2,
    "kto": KTO,
}
# Other names of an objective that is exactly the same; "-" and "_" are left out.
SAME = {
    "aotpair": "aot",
    "bcopair": "bco",
    "exopair": "exo",
    "ncapair": "nca",
    "nll": "sft",
    "sigmoid": "dpo",
    "sigmoidnorm": "lndpo",
    "sppohard": "sppo",
    "unidpo": "omnidpo",
}
# Losses of TRL, Liger and others that have no name here, and what is here instead.
ELSEWHERE = {
    "cdpo": "here it is 'dpo' with label_smoothing",
    "kto_pair": "'kto' also takes pairs, whose two responses count one by one",
    "slic": "'hinge' is that loss with a reference, as in TRL",
    "tpo-l": "here it is 'tpo' with that loss_type",
    "tdpo": "here it is 'tdpo1' or 'tdpo2'",
    "wpo": "here it is use_weighting, an option of every pairwise objective",
    "rpo": "here it is rpo_alpha, an option of every pairwise objective",
    **dict.fromkeys(
        (*("alphapo", "apo_zero_unpaired", "balanced_dpo", "dpop", "rso", "sgdpo"),),
        "it is not here yet",
    ),
}
# Options by their names elsewhere.
_OPTIONS_ELSEWHERE = {
    "beta": "tau",
    "discopop_tau": "tau",
    "dpo_beta": "beta",
    "pref_beta": "beta",
    "simpo_gamma": "gamma",
    "cpo_alpha": "nll_weight",
    "sft_weight": "rpo_alpha",
    "pref_ftx": "rpo_alpha",
    "dpo_label_smoothing": "label_smoothing",
}
# Options that every pairwise objective takes besides its own.
_COMPOSED = ("use_weighting", "rpo_alpha")


def names() -> list[str]:
    """Every name that `build` takes: each objective, and `ada...` for its adaptive counterpart."""
    adaptive = [f"ada{name}" for name, cls in REGISTRY.items() if "adaptive" in _parameters(cls)]
    return [*REGISTRY, *adaptive]


def options(name: str) -> list[str]:
    """The options that `build` takes for a name. Raises ValueError for an unknown name."""
    if _is_mixture(name):
        known = [option for part in name.split("+") for option in options(part)]
        return [*dict.fromkeys(known), "loss_weights"]
    cls, is_adaptive = _lookup(name)
    own = [p for p in _parameters(cls) if not (is_adaptive and p == "adaptive")]
    adaptive = [field.name for field in fields(Adaptive)] if is_adaptive else []
    if is_adaptive and not cls().needs_reference:
        # Without a reference there are no ratios to it: see Contrastive.set_options.
        adaptive.remove("space")
    composed = _COMPOSED if issubclass(cls, Objective) else ()
    if issubclass(cls, Objective) and not cls.weighs_pairs:
        composed = tuple(option for option in _COMPOSED if option != "use_weighting")
    return [*own, *adaptive, *composed]


def build(name: str, **given: Any) -> Objective | UnpairedObjective:
    """An objective by name: "dpo", or "adadpo" for the adaptive one with the paper's defaults.

    An adaptive objective also takes the options of `Adaptive` (space, exponent, clip, k):
    `build("adadpo", beta=0.1, clip=3.0)` is `DPO(beta=0.1, adaptive=Adaptive(clip=3.0))`. Every
    pairwise objective takes `use_weighting=True` (`WPO`) and `rpo_alpha` (`WithNLL`, outermost).
    Case, spaces, "-" and "_" in names do not matter: "alpha-DPO" is "alphadpo". TRL's names are names, too:
    "sigmoid" is "dpo" and "ada_sigmoid" is "adadpo".

    Names with "+" between them are a `Mixture`: `build("dpo+simpo", loss_weights=[1.0, 0.5])`. Its
    other options go to every part that has them.

    Raises ValueError for an unknown name and TypeError for an unknown option; the message lists the
    known ones.
    """
    known = options(name)
    for option in given:
        if option not in known:
            raise TypeError(
                f"objective {name!r} has no option {option!r}{_nearest(option, known)}; "
                f"it takes {', '.join(known)}"
            )
    composed = {option: given.pop(option) for option in _COMPOSED if option in given}
    objective = _mixture(name, given) if _is_mixture(name) else _single(name, given)
    if isinstance(objective, UnpairedObjective):
        return objective
    if require_bool("use_weighting", composed.get("use_weighting", False)):
        objective = WPO(objective)
    if composed.get("rpo_alpha") is not None:
        objective = WithNLL(objective, composed["rpo_alpha"])
    return objective


def _mixture(name: str, given: dict[str, Any]) -> Mixture:
    loss_weights = given.pop("loss_weights", None)
    single = [part for part in name.split("+") if not issubclass(_lookup(part)[0], Objective)]
    if single:
        raise ValueError(
            f"{name!r} mixes pairwise objectives; {single[0]!r} is on single responses"
        )
    parts: list[Any] = [
        build(part, **{option: given[option] for option in options(part) if option in given})
        for part in name.split("+")
    ]
    return Mixture(parts, loss_weights)


def _single(name: str, given: dict[str, Any]) -> Objective | UnpairedObjective:
    cls, is_adaptive = _lookup(name)
    if isinstance(given.get("adaptive"), dict):
        # From a command line or a file.
        kept = [field.name for field in fields(Adaptive)]
        for option in given["adaptive"]:
            if option not in kept:
                raise TypeError(
                    f"adaptive has no option {option!r}{_nearest(str(option), kept)}; "
                    f"it takes {', '.join(kept)}"
                )
        given["adaptive"] = Adaptive(**given["adaptive"])
    if is_adaptive:
        chosen = {f.name: given.pop(f.name) for f in fields(Adaptive) if f.name in given}
        given["adaptive"] = Adaptive(**chosen)
    return cls(**given)


def _is_mixture(name: Any) -> bool:
    return isinstance(name, str) and "+" in name


def _lookup(name: str) -> tuple[type[Objective | UnpairedObjective], bool]:
    """The class of a name, and whether the name means its adaptive counterpart."""
    if not isinstance(name, str):
        raise TypeError(f"the name of an objective must be a string, got {name!r}")
    plain = _plain(name)
    stem = plain.removeprefix("ada")
    if stem in SAME:
        plain = plain.removesuffix(stem) + SAME[stem]
    if not plain:
        raise ValueError(f"the name of an objective is empty, got {name!r}; {_known()}")
    if plain not in names():
        if plain.removeprefix("ada") in REGISTRY:
            raise ValueError(
                f"unknown objective {name!r}: {plain.removeprefix('ada')!r} has no adaptive form; "
                f"{_known()}"
            )
        instead = {_plain(each): text for each, text in ELSEWHERE.items()}.get(plain)
        near = _nearest(plain, [*names(), *SAME]) if instead is None else f": {instead}"
        raise ValueError(f"unknown objective {name!r}{near}; {_known()}")
    is_adaptive = plain not in REGISTRY
    return REGISTRY[plain.removeprefix("ada") if is_adaptive else plain], is_adaptive


def _known() -> str:
    return f"known: {', '.join(names())}"


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "").replace(" ", "")


def _nearest(word: str, known: Iterable[str]) -> str:
    known = list(known)
    if _OPTIONS_ELSEWHERE.get(word) in known:
        return f" (here it is {_OPTIONS_ELSEWHERE[word]!r})"
    close = nearest(word, known)
    return f" (did you mean {close!r}?)" if close else ""


def _parameters(cls: type) -> list[str]:
    return list(inspect.signature(cls).parameters)
