"""Preference objectives: small functions of `[B]` tensors, differentiated by autograd.

`docs/objectives.md` has a table of all of them, with formulas, sources and defaults. In reading
order: `base` (what an objective is), `adaptive` (AdaDPO's coefficient), `scores`, `links` and
`contrastive` (the common form), `two_sided` and `reference_free` (more of that form), `alpha_dpo`,
`madpo`, `omni_dpo`, `tpo` (with a third response), `beta_dpo`, `bco` and `aot` (of the whole
batch), `tdpo`, `kto`, `composed` (options that wrap any of them), `mixture` (several as one),
`registry` (all of them by name).
`running` has the statistics that some of them keep, `checks` the checks of their arguments.

To add an objective, write one class, one line in `registry.REGISTRY` and one row in the tests.
"""

from prefkern.objectives.adaptive import MAX_LOG_RATIO, Adaptive
from prefkern.objectives.alpha_dpo import AlphaDPO
from prefkern.objectives.aot import AOT, AOTUnpaired
from prefkern.objectives.base import Objective, PairLoss, Pairs
from prefkern.objectives.bco import BCO
from prefkern.objectives.beta_dpo import BetaDPO
from prefkern.objectives.composed import WPO, WithNLL
from prefkern.objectives.contrastive import (
    DPO,
    EXO,
    IPO,
    LNDPO,
    RDPO,
    Contrastive,
    DiscoPOP,
    Hinge,
    RobustDPO,
)
from prefkern.objectives.kto import KTO, ExampleLoss, Examples, UnpairedObjective
from prefkern.objectives.madpo import MADPO
from prefkern.objectives.mixture import Mixture
from prefkern.objectives.omni_dpo import OmniDPO
from prefkern.objectives.reference_free import CPO, ORPO, SFT, SimPO
from prefkern.objectives.registry import REGISTRY, build, names, options
from prefkern.objectives.tdpo import TDPO1, TDPO2
from prefkern.objectives.tpo import TPO
from prefkern.objectives.two_sided import NCA, SPPO, APODown, APOZero

__all__ = [
    "AOT",
    "BCO",
    "CPO",
    "DPO",
    "EXO",
    "IPO",
    "KTO",
    "LNDPO",
    "MADPO",
    "MAX_LOG_RATIO",
    "NCA",
    "ORPO",
    "RDPO",
    "REGISTRY",
    "SFT",
    "SPPO",
    "TDPO1",
    "TDPO2",
    "TPO",
    "WPO",
    "AOTUnpaired",
    "APODown",
    "APOZero",
    "Adaptive",
    "AlphaDPO",
    "BetaDPO",
    "Contrastive",
    "DiscoPOP",
    "ExampleLoss",
    "Examples",
    "Hinge",
    "Mixture",
    "Objective",
    "OmniDPO",
    "PairLoss",
    "Pairs",
    "RobustDPO",
    "SimPO",
    "UnpairedObjective",
    "WithNLL",
    "build",
    "names",
    "options",
]
