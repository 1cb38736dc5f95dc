"""What TRL's arguments mean to an objective: each has TRL's effect, or is refused by name.

Without an objective it is built from TRL's `loss_type`, `beta`, `label_smoothing` and
`use_weighting`, where prefkern has the loss. An objective by name takes `beta` and `use_weighting`
from the arguments, and its other options from `objective_options`. One that is passed itself takes
nothing from them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from trl.trainer.dpo_config import DPOConfig

from prefkern import objectives
from prefkern.objectives import Objective
from prefkern.training.config import refuse_batches_by_length

# TRL's losses that are objectives here, and the options that say so.
_LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "sigmoid": ("dpo", {}),
    "hinge": ("hinge", {}),
    "ipo": ("ipo", {"length_normalized": True}),
    "robust": ("robust", {}),
}
# Arguments that an objective leaves without effect, and why.
_WITHOUT_EFFECT = {
    "loss_weights": "weighs TRL's losses among each other, and an objective is one",
    "ld_alpha": "weighs tokens, and an objective sees sums over responses",
    "f_divergence_type": "changes TRL's own losses alone",
    "f_alpha_divergence_coef": "changes TRL's own losses alone",
    "discopop_tau": "changes TRL's own losses alone",
    "padding_free": "TRL itself has switched off for now: batches are padded",
    "torch_compile": "is not supported yet",
    "label_smoothing_factor": "has no effect on preference pairs",
}


def objective_of(
    args: DPOConfig,
    objective: Objective | str | None = None,
    options: dict[str, Any] | None = None,
) -> Objective:
    """The objective that is asked for, in the arguments or beside them.

    Raises ValueError for arguments without effect on it and for ones that contradict each other,
    and TypeError for what is no pairwise objective.
    """
    for name, why in _WITHOUT_EFFECT.items():
        if getattr(args, name) != _default(name):
            raise ValueError(f"args.{name} is {getattr(args, name)!r}, which {why}; leave it out")
    refuse_batches_by_length(args)
    if objective is not None and list(args.loss_type) != _default("loss_type"):
        raise ValueError(
            f"args.loss_type is {args.loss_type!r}, and objective was given: leave one of them out"
        )
    if options and not isinstance(objective, str):
        raise ValueError(
            f"objective_options is {options!r}, which belongs to an objective by name, "
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
            f"objective must be on pairs, and {type(built).__name__} is on single responses: "
            "train it with prefkern.PreferenceTrainer"
        )
    return built


def check_reference(args: DPOConfig, objective: Objective, ref_model: Any) -> None:
    """Raise ValueError for what concerns the reference and would have no effect."""
    name = type(objective).__name__
    if objective.needs_kls and args.precompute_ref_log_probs:
        raise ValueError(
            f"args.precompute_ref_log_probs keeps sums, and {name} needs the reference's "
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
            raise ValueError(f"{argument} was given, and {name} has no reference; leave it out")


def _trls_own(args: DPOConfig) -> Any:
    """The objective that TRL's own arguments describe."""
    known = ", ".join(_LOSSES)
    loss_type = args.loss_type[0]
    if len(args.loss_type) != 1 or loss_type not in _LOSSES:
        raise ValueError(
            f"args.loss_type is {args.loss_type!r}, and of TRL's losses {known} are objectives "
            "here; pass another one as objective, or train with trl.DPOTrainer"
        )
    name, options = _LOSSES[loss_type]
    options = {**options, "tau" if name == "ipo" else "beta": args.beta}
    if name == "robust":
        options["label_smoothing"] = args.label_smoothing
    else:
        _refuse_smoothing(args)
    return objectives.build(name, use_weighting=args.use_weighting, **options)


def _named_options(args: DPOConfig, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """An objective's options by name, those of TRL's arguments included."""
    _refuse_smoothing(args)
    known = objectives.options(name)
    if args.use_weighting and "use_weighting" in known:
        options["use_weighting"] = True
    is_default = args.beta == _default("beta")
    if options.get("beta", args.beta) != args.beta and not is_default:
        raise ValueError(
            f"args.beta is {args.beta!r}, and beta in objective_options is {options['beta']!r}: "
            "give one"
        )
    if "beta" in options:
        return options
    if "beta" not in known:
        if not is_default:
            raise ValueError(
                f"args.beta is {args.beta!r}, and objective {name!r} has no beta; "
                f"objective_options takes {', '.join(known)}"
            )
        return options
    own = objectives.build(name, **options).beta  # pyright: ignore[reportAttributeAccessIssue]
    if is_default and own != args.beta:
        raise ValueError(
            f"args.beta is {args.beta!r}, TRL's default, and the default of objective {name!r} is "
            f'{own!r}: say which by objective_options={{"beta": ...}}'
        )
    return {**options, "beta": args.beta}


def _given(args: DPOConfig, objective: Any) -> Any:
    """An objective that was passed as such: args must not describe another."""
    _refuse_smoothing(args)
    if args.use_weighting:
        raise ValueError(
            "args.use_weighting has no effect on an objective that is passed itself; wrap it: "
            "prefkern.objectives.WPO(objective)"
        )
    beta = getattr(objective, "beta", args.beta)
    if args.beta not in (_default("beta"), beta):
        raise ValueError(
            f"args.beta is {args.beta!r}, and that of the objective is {beta!r}; leave args.beta out"
        )
    if not isinstance(objective, Objective | objectives.UnpairedObjective):
        raise TypeError(
            f"objective must be an objective of prefkern.objectives, or a name, got {objective!r}"
        )
    return objective


def _refuse_smoothing(args: DPOConfig) -> None:
    if args.label_smoothing:
        raise ValueError(
            f"args.label_smoothing is {args.label_smoothing!r}, which TRL uses in its robust loss "
            'alone (loss_type="robust"); for an objective that has the option, '
            'objective_options={"label_smoothing": ...}'
        )


def _default(name: str) -> Any:
    field = DPOConfig.__dataclass_fields__[name]
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default
