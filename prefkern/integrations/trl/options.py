"""TRL's arguments for an objective: each one has TRL's effect, or is an error that names it.

If no objective is given, it is built from TRL's `loss_type` and its options: `loss_weights`, `beta`,
`label_smoothing`, `f_divergence_type`, `discopop_tau`, `use_weighting`. An objective given by name
takes `beta` and `use_weighting` from the arguments and its other options from `objective_options`.
An objective given as an object takes nothing from the arguments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from importlib import metadata
from typing import Any

from packaging.version import Version
from trl.trainer.dpo_config import DPOConfig

from prefkern import objectives
from prefkern.data.columns import REFERENCE_COLUMNS
from prefkern.objectives import Objective
from prefkern.training.config import refuse_dispatched_rows, refuse_split_sequences
from prefkern.training.options import refuse_batches_by_length


class _SFT(objectives.SFT):
    """SFT beside a reference, which TRL's rewards compare with."""

    needs_reference = True  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]


def _beta(args: DPOConfig) -> dict[str, Any]:
    return {"beta": args.beta}


def _smoothed(args: DPOConfig) -> dict[str, Any]:
    return {"beta": args.beta, "label_smoothing": args.label_smoothing}


def _diverging(args: DPOConfig) -> dict[str, Any]:
    options: dict[str, Any] = {"f_divergence_type": args.f_divergence_type}
    if args.f_divergence_type == "alpha_divergence":
        options["f_alpha_divergence_coef"] = args.f_alpha_divergence_coef
    return options


# TRL's losses: the objective, and its options from TRL's arguments.
_LOSSES: dict[str, Callable[[DPOConfig], Objective]] = {
    "sigmoid": lambda args: objectives.DPO(**_beta(args), **_diverging(args)),
    "sigmoid_norm": lambda args: objectives.LNDPO(**_beta(args), **_diverging(args)),
    "hinge": lambda args: objectives.Hinge(**_beta(args), **_diverging(args)),
    "ipo": lambda args: objectives.IPO(args.beta, True, **_diverging(args)),
    "exo_pair": lambda args: objectives.EXO(**_smoothed(args), **_diverging(args)),
    "robust": lambda args: objectives.RobustDPO(**_smoothed(args), **_diverging(args)),
    "nca_pair": lambda args: objectives.NCA(**_beta(args)),
    "bco_pair": lambda args: objectives.BCO(args.beta, reward_shift=False),
    "sppo_hard": lambda args: objectives.SPPO(**_beta(args)),
    "aot": lambda args: objectives.AOT(**_smoothed(args)),
    "aot_unpaired": lambda args: objectives.AOTUnpaired(**_smoothed(args)),
    "apo_zero": lambda args: objectives.APOZero(**_beta(args)),
    "apo_down": lambda args: objectives.APODown(**_beta(args)),
    "discopop": lambda args: objectives.DiscoPOP(
        **_beta(args), tau=args.discopop_tau, **_diverging(args)
    ),
    "sft": lambda args: _SFT(token_mean=True),
}
# The losses for which TRL takes another divergence than the reverse KL.
_DIVERGING = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
# Arguments that some of TRL's losses take, and which.
_OF_LOSSES = {
    "label_smoothing": ("robust", "exo_pair", "aot", "aot_unpaired"),
    "discopop_tau": ("discopop",),
}
# Arguments that have no effect, and why.
_WITHOUT_EFFECT = {
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
    refuse_split_sequences(args, "cp_size", "sp_size")
    refuse_dispatched_rows(args)
    if objective is not None:
        _refuse_trls_losses(args)
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
    if built.needs_gold:
        raise ValueError(
            "objective needs a third response to each prompt (TPO), which TRL's DPOTrainer does not "
            "read: train it with prefkern.integrations.trl.TPOTrainer or prefkern.PreferenceTrainer"
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


def check_padding_free(args: DPOConfig, train_dataset: Any) -> None:
    """Raise ValueError where a batch cannot be packed."""
    if not args.padding_free:
        return
    if args.pad_to_multiple_of is not None:
        raise ValueError(
            f"args.pad_to_multiple_of is {args.pad_to_multiple_of!r}, but args.padding_free takes "
            "the padding out; leave one of them out"
        )
    columns = getattr(train_dataset, "column_names", None) or ()
    if {"image", "images"} & {*columns}:
        raise ValueError("args.padding_free does not support images; leave it out")


def check_carried_sums(
    dataset: Any, name: str, reference_given: bool, ld_alpha: float | None
) -> bool:
    """Whether a dataset has the reference's sums as columns.

    Raises ValueError for one of the two columns, and for arguments that would have no effect.
    """
    columns = getattr(dataset, "column_names", None) or ()
    carried = [column for column in REFERENCE_COLUMNS if column in columns]
    if not carried:
        return False
    if len(carried) < len(REFERENCE_COLUMNS):
        raise ValueError(f"dataset {name!r} has only one of {' and '.join(REFERENCE_COLUMNS)}")
    given = {"ref_model": reference_given, "args.ld_alpha": ld_alpha is not None}
    for argument, is_given in given.items():
        if is_given:
            raise ValueError(
                f"dataset {name!r} carries reference sums ({' and '.join(carried)}), beside which "
                f"{argument} has no effect: leave it out, or remove the columns "
                f"(dataset.remove_columns({carried!r})) to have them computed"
            )
    return True


def _trls_own(args: DPOConfig) -> Any:
    """The objective that TRL's own arguments describe."""
    for loss_type in args.loss_type:
        if loss_type not in _LOSSES:
            known = ", ".join(_LOSSES)
            raise ValueError(f"args.loss_type is {args.loss_type!r}, but TRL's losses are {known}")
    diverges = args.f_divergence_type != _default("f_divergence_type")
    if diverges and not set(args.loss_type) <= set(_DIVERGING):
        raise ValueError(
            f"args.f_divergence_type is {args.f_divergence_type!r}, but args.loss_type is "
            f"{args.loss_type!r}; TRL takes it for {', '.join(_DIVERGING)}"
        )
    # There TRL 1.9 drops a constant of the divergence, which a division by lengths does not cancel.
    by_length = [name for name in args.loss_type if name in ("ipo", "sigmoid_norm")]
    if diverges and by_length and Version(metadata.version("trl")).release < (1, 10):
        raise ValueError(
            f"args.f_divergence_type is {args.f_divergence_type!r} with loss_type {by_length[0]!r}, "
            "which is another loss in TRL 1.9: it needs TRL 1.10 or newer"
        )
    is_alpha = args.f_divergence_type == "alpha_divergence"
    if args.f_alpha_divergence_coef != _default("f_alpha_divergence_coef") and not is_alpha:
        raise ValueError(
            f"args.f_alpha_divergence_coef is {args.f_alpha_divergence_coef!r}, but "
            f"args.f_divergence_type is {args.f_divergence_type!r}, not 'alpha_divergence'"
        )
    for name, losses in _OF_LOSSES.items():
        if getattr(args, name) != _default(name) and not set(args.loss_type) & set(losses):
            raise ValueError(
                f"args.{name} is {getattr(args, name)!r}, but args.loss_type is "
                f"{args.loss_type!r}; it is an option of {', '.join(losses)}"
            )
    parts = [_LOSSES[loss_type](args) for loss_type in args.loss_type]
    objective = parts[0]
    if args.loss_weights is not None or len(parts) > 1:
        objective = objectives.Mixture(parts, args.loss_weights)
    return objectives.WPO(objective) if args.use_weighting else objective


def _named_options(args: DPOConfig, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options of an objective by name, including those from TRL's arguments."""
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


def _refuse_trls_losses(args: DPOConfig) -> None:
    """Raise ValueError for an argument of TRL's losses beside an objective of prefkern."""
    names = ("loss_type", "loss_weights", "f_divergence_type", "f_alpha_divergence_coef")
    for name in (*names, *_OF_LOSSES):
        value = getattr(args, name)
        if (list(value) if name == "loss_type" else value) != _default(name):
            raise ValueError(
                f"args.{name} is {value!r}, but objective was given too, and takes its options from "
                "objective_options: leave one of them out"
            )


def _default(name: str) -> Any:
    field = DPOConfig.__dataclass_fields__[name]
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default
