"""TRL's arguments for an objective: each one has TRL's effect, or is an error that names it.

If no objective is given, it is built from TRL's `loss_type`, `beta`, `label_smoothing` and
`use_weighting`, if prefkern has that loss. An objective given by name takes `beta` and
`use_weighting` from the arguments and its other options from `objective_options`. An objective
given as an object takes nothing from the arguments.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from trl.trainer.dpo_config import DPOConfig

from prefkern import objectives
from prefkern.objectives import Objective
from prefkern.training.options import refuse_batches_by_length

# TRL's losses that prefkern has: the name and the options of the objective.
_LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "sigmoid": ("dpo", {}),
    "hinge": ("hinge", {}),
    "ipo": ("ipo", {"length_normalized": True}),
    "robust": ("robust", {}),
    # TRL 1.16 has no shift.
    "bco_pair": ("bco", {"reward_shift": False}),
    "aot": ("aot", {}),
    "aot_unpaired": ("aotunpaired", {}),
}
# Arguments that have no effect on an objective, and why.
_WITHOUT_EFFECT = {
    "loss_weights": "weights several losses of TRL, but an objective is one loss",
    "f_divergence_type": "changes only TRL's own losses",
    "f_alpha_divergence_coef": "changes only TRL's own losses",
    "discopop_tau": "changes only TRL's own losses",
    "padding_free": "TRL itself has switched off: batches are padded. prefkern.PreferenceTrainer packs",
    "torch_compile": "is not supported yet",
    "label_smoothing_factor": "has no effect on preference pairs",
}


def objective_of(
    args: DPOConfig,
    objective: Objective | str | None = None,
    options: dict[str, Any] | None = None,
) -> Objective:
    """The objective to train: the given one, or the one that TRL's arguments describe.

    Raises ValueError for arguments that have no effect on it or contradict each other, and
    TypeError for an objective that is not on pairs.
    """
    for name, why in _WITHOUT_EFFECT.items():
        if getattr(args, name) != _default(name):
            raise ValueError(f"args.{name} is {getattr(args, name)!r}, which {why}; leave it out")
    refuse_batches_by_length(args)
    if objective is not None and list(args.loss_type) != _default("loss_type"):
        raise ValueError(
            f"args.loss_type is {args.loss_type!r}, but objective was given too: leave one of them "
            "out"
        )
    if options and not isinstance(objective, str):
        raise ValueError(
            f"objective_options is {options!r}, but it needs an objective by name, "
            f"and objective is {objective!r}"
        )
    if isinstance(objective, str):
        built = objectives.build(objective, **_named_options(args, objective, dict(options or {})))
    elif objective is None:
        built = _trls_own(args)
    else:
        built = _given(args, objective)
    if not isinstance(built, Objective):
        raise TypeError(
            f"objective must be on pairs, but {type(built).__name__} is on single responses: "
            "train it with prefkern.PreferenceTrainer"
        )
    return built


def check_reference(args: DPOConfig, objective: Objective, ref_model: Any) -> None:
    """Raise ValueError for arguments about the reference that would have no effect."""
    name = type(objective).__name__
    if objective.needs_kls and args.precompute_ref_log_probs:
        raise ValueError(
            f"args.precompute_ref_log_probs keeps only sums, but {name} needs the reference's "
            "distributions; leave it out"
        )
    if objective.needs_reference:
        return
    given = {
        "ref_model": ref_model is not None,
        "args.precompute_ref_log_probs": args.precompute_ref_log_probs,
        "args.sync_ref_model": args.sync_ref_model,
    }
    for argument, is_given in given.items():
        if is_given:
            raise ValueError(f"{argument} was given, but {name} has no reference; leave it out")


def _trls_own(args: DPOConfig) -> Any:
    """The objective that TRL's own arguments describe."""
    known = ", ".join(_LOSSES)
    loss_type = args.loss_type[0]
    if len(args.loss_type) != 1 or loss_type not in _LOSSES:
        raise ValueError(
            f"args.loss_type is {args.loss_type!r}, but of TRL's losses prefkern has {known}; pass "
            "another one as objective, or train with trl.DPOTrainer"
        )
    name, options = _LOSSES[loss_type]
    options = {**options, "tau" if name == "ipo" else "beta": args.beta}
    if "label_smoothing" in objectives.options(name) and name != "dpo":
        options["label_smoothing"] = args.label_smoothing
    else:
        _refuse_smoothing(args)
    if args.use_weighting:
        options["use_weighting"] = True
    return objectives.build(name, **options)


def _named_options(args: DPOConfig, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options of an objective by name, including those from TRL's arguments."""
    _refuse_smoothing(args)
    known = objectives.options(name)
    if args.use_weighting and "use_weighting" in known:
        options["use_weighting"] = True
    is_default = args.beta == _default("beta")
    if options.get("beta", args.beta) != args.beta and not is_default:
        raise ValueError(
            f"args.beta is {args.beta!r}, but beta in objective_options is {options['beta']!r}: "
            "give only one"
        )
    if "beta" in options:
        return options
    if "beta" not in known:
        if not is_default:
            raise ValueError(
                f"args.beta is {args.beta!r}, but objective {name!r} has no beta; "
                f"objective_options takes {', '.join(known)}"
            )
        return options
    own = objectives.build(name, **options).beta  # pyright: ignore[reportAttributeAccessIssue]
    if is_default and own != args.beta:
        raise ValueError(
            f"args.beta is {args.beta!r}, TRL's default, but the default of objective {name!r} is "
            f'{own!r}: choose one with objective_options={{"beta": ...}}'
        )
    return {**options, "beta": args.beta}


def _given(args: DPOConfig, objective: Any) -> Any:
    """An objective passed as an object: args must not describe another one."""
    _refuse_smoothing(args)
    if args.use_weighting:
        raise ValueError(
            "args.use_weighting has no effect on an objective passed as an object; wrap it: "
            "prefkern.objectives.WPO(objective)"
        )
    beta = getattr(objective, "beta", args.beta)
    if args.beta not in (_default("beta"), beta):
        raise ValueError(
            f"args.beta is {args.beta!r}, but the objective's beta is {beta!r}; leave args.beta out"
        )
    if not isinstance(objective, Objective | objectives.UnpairedObjective):
        raise TypeError(
            f"objective must be an objective of prefkern.objectives, or a name, got {objective!r}"
        )
    return objective


def _refuse_smoothing(args: DPOConfig) -> None:
    if args.label_smoothing:
        raise ValueError(
            f"args.label_smoothing is {args.label_smoothing!r}, which TRL uses only in its robust "
            'and AOT losses (loss_type="robust", "aot"); if the objective has the option, use '
            'objective_options={"label_smoothing": ...}'
        )


def _default(name: str) -> Any:
    field = DPOConfig.__dataclass_fields__[name]
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default
