"""Preference objectives: small functions of `[B]` tensors, differentiated by autograd.

`docs/objectives.md` has a table of all of them, with formulas, sources and defaults. In reading
order: `base` (what an objective is), `adaptive` (AdaDPO's coefficient), `contrastive` (the
methods of AdaDPO's Table 3), `alpha_dpo`, `madpo`, `beta_dpo`, `tdpo`, `kto`, `composed` (options
that wrap any of them), `mixture` (several as one), `registry` (all of them by name). `running` has
the statistics that some of them keep, `checks` the checks of their arguments.

To add an objective, write one class, one line in `registry.REGISTRY` and one row in the tests.
"""

from prefkern.objectives.adaptive import MAX_LOG_RATIO, Adaptive
from prefkern.objectives.alpha_dpo import AlphaDPO
from prefkern.objectives.base import Objective, PairLoss, Pairs
from prefkern.objectives.beta_dpo import BetaDPO
from prefkern.objectives.composed import WPO, WithNLL
from prefkern.objectives.contrastive import (
    CPO,
    DPO,
    IPO,
    ORPO,
    RDPO,
    Contrastive,
    Hinge,
    RobustDPO,
    SimPO,
)
from prefkern.objectives.kto import KTO, ExampleLoss, Examples, UnpairedObjective
from prefkern.objectives.madpo import MADPO
from prefkern.objectives.mixture import Mixture
from prefkern.objectives.registry import REGISTRY, build, names, options
from prefkern.objectives.tdpo import TDPO1, TDPO2

__all__ = [
    "CPO",
    "DPO",
    "IPO",
    "KTO",
    "MADPO",
    "MAX_LOG_RATIO",
    "ORPO",
    "RDPO",
    "REGISTRY",
    "TDPO1",
    "TDPO2",
    "WPO",
    "Adaptive",
    "AlphaDPO",
    "BetaDPO",
    "Contrastive",
    "ExampleLoss",
    "Examples",
    "Hinge",
    "Mixture",
    "Objective",
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
