"""Checks of the arguments of training, without transformers; only objectives need torch.

`PreferenceConfig` and `RewardConfig` run them before those of transformers' TrainingArguments. The
command line runs them on the options that were given, before it spends seconds on the import of
transformers' classes. So `args` is any object with these attributes. Each error names the argument,
what was given and what is expected.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from prefkern.data.columns import read_renaming
from prefkern.data.truncation import check_mode
from prefkern.keywords import current_names
from prefkern.ops import plain

if TYPE_CHECKING:
    from prefkern.objectives import Objective, UnpairedObjective

JSON_OPTIONS = ("objective_options", "model_init_kwargs")
# Keywords of from_pretrained whose text may be all digits.
_AS_TEXT = ("revision", "code_revision", "token", "subfolder", "variant", "cache_dir")
# Whole numbers, and their minimum.
_LEAST_OF_SAMPLES = {"generate_samples": 0, "generate_max_new_tokens": 1}
# Whole numbers that may be None, and their minimum.
_LEAST = {
    "max_length": 2,
    "max_prompt_length": 1,
    "pad_to_multiple_of": 1,
    "max_tokens_per_batch": 1,
    "dataset_num_proc": 1,
    "precompute_ref_batch_size": 1,
}
# transformers' own, which it does not check, and their minimum.
_LEAST_OF_TRAINING = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "seed": 0,
}
# transformers' own, for predictions and labels that an evaluation keeps (here it keeps sums), for
# batches by length, and for counted tokens (here pairs are counted, over all ranks).
_WITHOUT_EFFECT = (
    "average_tokens_across_devices",
    "batch_eval_metrics",
    "eval_accumulation_steps",
    "eval_do_concat_batches",
    "eval_use_gather_object",
    "include_for_metrics",
    "label_names",
    "length_column_name",
    "prediction_loss_only",
)
# What decides on batches of a number of pairs.
_WITHOUT_EFFECT_BY_TOKENS = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "precompute_ref_batch_size",
    "auto_find_batch_size",
    "dataloader_drop_last",
)
_WITHOUT_EFFECT_ON_REWARDS = (
    "average_tokens_across_devices",
    "batch_eval_metrics",
    "eval_do_concat_batches",
    "include_for_metrics",
    "label_names",
    "label_smoothing_factor",
    "length_column_name",
    "prediction_loss_only",
)
# How far and how often a reference moves, TRL's defaults.
MOVING_REFERENCE = {"ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": 512}
_BOOLS = (
    "assistant_only_loss",
    "last_turn_only",
    "use_weighting",
    "padding_free",
    "share_prompt",
    "precompute_ref_log_probs",
    "disable_dropout",
    "token_metrics",
    "sync_ref_model",
    "gradient_checkpointing",
)


def check_preference(args: Any, defaults: Mapping[str, Any]) -> None:
    """Check a `PreferenceConfig`'s arguments, and read those that are JSON.

    Args:
        defaults: those of TrainingArguments in the installed version.
    """
    for name in JSON_OPTIONS:
        setattr(args, name, json_object(name, getattr(args, name)))
    check_numbers_in("objective_options", args.objective_options)
    check_numbers_in("model_init_kwargs", args.model_init_kwargs)
    if args.model_init_kwargs:
        args.model_init_kwargs = current_names(args.model_init_kwargs)
    args.columns = read_renaming(args.columns)
    for name, least in _LEAST.items():
        value = getattr(args, name)
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if value is not None and not (is_whole and value >= least):
            raise ValueError(f"{name} must be None or an int >= {least}, got {value!r}")
    for name, least in _LEAST_OF_SAMPLES.items():
        value = getattr(args, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be an int >= {least}, got {value!r}")
    check_training(args)
    for name in _BOOLS:
        plain.boolean(name, getattr(args, name))
    for name in ("bf16", "fp16"):
        if getattr(args, name) is not None:
            plain.boolean(name, getattr(args, name))
    for name in ("ref_cache_dir", "ref_model_name_or_path", "ref_adapter_name"):
        value = getattr(args, name)
        if value is not None and not isinstance(value, str):
            raise TypeError(f"{name} must be a string or None, got {value!r}")
    if args.workspace_mb is not None:
        plain.positive("workspace_mb", args.workspace_mb)
    if args.ld_alpha is not None:
        plain.share("ld_alpha", args.ld_alpha)
    if args.router_aux_loss_coef is not None:
        plain.not_negative("router_aux_loss_coef", args.router_aux_loss_coef)
    if args.backend is not None and args.backend not in plain.BACKENDS:
        known = ", ".join(map(repr, plain.BACKENDS))
        raise ValueError(f"backend must be None or one of {known}, got {args.backend!r}")
    _check_moving_reference(args)
    check_mode(args.truncation_mode)
    refuse_batches_by_length(args)
    _refuse_without_effect(args, _WITHOUT_EFFECT, "preference pairs", defaults)
    if args.padding_free and args.pad_to_multiple_of is not None:
        raise ValueError(
            f"pad_to_multiple_of ({args.pad_to_multiple_of}) has no effect under padding_free, "
            "which pads nothing; give one of them"
        )
    if args.padding_free and args.neftune_noise_alpha is not None:
        raise ValueError(
            f"neftune_noise_alpha={args.neftune_noise_alpha} scales its noise by the length of a row, "
            "and under padding_free all pairs of a batch are one row; leave one of them out"
        )
    _check_sharing(args)
    if args.max_tokens_per_batch is not None:
        if not args.padding_free:
            raise ValueError(
                f"max_tokens_per_batch ({args.max_tokens_per_batch}) needs padding_free: the "
                "tokens of a packed row are those of its pairs, without padding"
            )
        for name in _WITHOUT_EFFECT_BY_TOKENS:
            if getattr(args, name) != defaults.get(name):
                raise ValueError(
                    f"{name} is {getattr(args, name)!r}, which has no effect under "
                    "max_tokens_per_batch: batches are as large as it allows; give one of them"
                )
    if args.label_smoothing_factor:
        raise ValueError(
            "label_smoothing_factor has no effect on preference pairs; use "
            'objective_options={"label_smoothing": ...}'
        )
    for name in ("ref_cache_dir", "precompute_ref_batch_size"):
        value = getattr(args, name)
        if value is not None and not args.precompute_ref_log_probs:
            raise ValueError(
                f"{name} is {value!r}, which has no effect without precompute_ref_log_probs"
            )
    if args.logging_nan_inf_filter:
        raise ValueError(
            "logging_nan_inf_filter is True, which would hide a loss that is nan or inf in the "
            "log; leave it out"
        )
    if args.torch_compile:
        raise ValueError("torch_compile is not supported yet")


def check_rewards(args: Any, defaults: Mapping[str, Any]) -> None:
    """Check a `RewardConfig`'s arguments; `defaults` as in `check_preference`."""
    args.columns = read_renaming(args.columns)
    for name, least in (
        ("early_stopping_patience", 1),
        ("max_length", 2),
        ("max_prompt_length", 1),
        ("dataset_num_proc", 1),
    ):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    for name in ("padding_free", "share_prompt"):
        plain.boolean(name, getattr(args, name))
    _check_sharing(args)
    _refuse_without_effect(args, _WITHOUT_EFFECT_ON_REWARDS, "a reward model", defaults)
    check_mode(args.truncation_mode)
    check_training(args)
    refuse_batches_by_length(args)
    if args.eval_strategy == "no":
        raise ValueError("early stopping needs evaluation: eval_strategy must be steps or epoch")
    if not args.load_best_model_at_end:
        raise ValueError("load_best_model_at_end must be true: margins are the best model's")


def check_spreading(args: Any) -> None:
    """Raise for ways to spread batches over ranks without effect under max_tokens_per_batch."""
    if args.max_tokens_per_batch is None:
        return
    for name, default in (("split_batches", False), ("even_batches", True)):
        value = getattr(args.accelerator_config, name)
        if value != default:
            raise ValueError(
                f"accelerator_config's {name} is {value!r}, which has no effect under "
                "max_tokens_per_batch: each process has as many batches; leave it out"
            )


def _check_moving_reference(args: Any) -> None:
    plain.share("ref_model_mixup_alpha", args.ref_model_mixup_alpha)
    if args.ref_model_mixup_alpha == 0:
        raise ValueError("ref_model_mixup_alpha must be > 0, got 0: the reference would stay")
    steps = args.ref_model_sync_steps
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"ref_model_sync_steps must be an int >= 1, got {steps!r}")
    if args.sync_ref_model and args.precompute_ref_log_probs:
        raise ValueError(
            "precompute_ref_log_probs keeps the sums of a reference that stays, and under "
            "sync_ref_model it moves; give one of them"
        )
    for name, default in MOVING_REFERENCE.items():
        if not args.sync_ref_model and getattr(args, name) != default:
            raise ValueError(
                f"{name} is {getattr(args, name)!r}, which has no effect without sync_ref_model; "
                "set sync_ref_model, or leave it out"
            )


def _check_sharing(args: Any) -> None:
    if args.share_prompt and not args.padding_free:
        raise ValueError("share_prompt needs padding_free: only a packed row can share a prompt")


def build_objective(args: Any) -> Objective | UnpairedObjective:
    """The configured objective. Raises ValueError for an unknown name, option or value."""
    from prefkern import objectives

    options: dict[str, Any] = dict(args.objective_options or {})
    given = {
        "beta": args.beta,
        "rpo_alpha": args.rpo_alpha,
        "use_weighting": args.use_weighting or None,
    }
    for name, value in given.items():
        if value is None:
            continue
        if name in options and options[name] != value:
            raise ValueError(
                f"{name} is {value!r}, and {options[name]!r} in objective_options; give one"
            )
        options[name] = value
    try:
        return objectives.build(args.objective, **options)
    except TypeError as error:
        raise ValueError(str(error)) from error


def check_training(args: Any) -> None:
    """Raise for numbers that transformers takes and no run can use, and for numbers as text."""
    check_numbers_in("lr_scheduler_kwargs", args.lr_scheduler_kwargs)
    for name, least in _LEAST_OF_TRAINING.items():
        value: Any = getattr(args, name)
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if not (is_whole and value >= least):
            raise ValueError(f"{name} must be an int >= {least}, got {value!r}")
    for name in ("learning_rate", "weight_decay", "num_train_epochs"):
        plain.not_negative(name, getattr(args, name))
    ratio = args.warmup_ratio
    if ratio is None:
        return
    plain.not_negative("warmup_ratio", ratio)
    if ratio >= 1:
        raise ValueError(f"warmup_ratio must be < 1, a share of all steps, got {ratio!r}")
    if args.warmup_steps not in (0, ratio):
        raise ValueError(
            f"warmup_ratio is {ratio!r} and warmup_steps {args.warmup_steps!r}; give one "
            "(warmup_steps below 1 is a share of all steps)"
        )


def check_numbers_in(path: str, values: Any) -> None:
    """Raise ValueError for a number that a dict or list holds as text, with its full path."""
    if isinstance(values, Mapping):
        items = {f"{path}.{name}": each for name, each in values.items() if name not in _AS_TEXT}
        for name in _AS_TEXT:
            value = values.get(name)
            if isinstance(value, int | float) and not isinstance(value, bool):
                raise TypeError(f"{path}.{name} must be text, got {value!r}; put it in quotes")
    elif isinstance(values, list | tuple):
        items = {f"{path}[{index}]": each for index, each in enumerate(values)}
    else:
        return
    for name, value in items.items():
        if isinstance(value, str) and _is_number(value):
            raise ValueError(
                f"{name} must be a number, got the text {value!r}; take off its quotes"
            )
        check_numbers_in(name, value)


def json_object(name: str, value: Any) -> dict[str, Any] | None:
    """A dict that may be given as JSON. Raises ValueError for anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name} is not JSON: {error}") from error
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name} must be a JSON object, got {value!r}")
    return value


def refuse_batches_by_length(args: Any) -> None:
    """Raise ValueError for sampling by length, since a row has several sequences."""
    if getattr(args, "train_sampling_strategy", "random") not in ("random", "sequential"):
        raise ValueError(
            "batches by length are not supported on preference pairs; "
            'train_sampling_strategy must be "random" or "sequential"'
        )


def _refuse_without_effect(
    args: Any, names: Collection[str], what: str, defaults: Mapping[str, Any]
) -> None:
    """Raise ValueError for an argument of transformers that is set and would have no effect."""
    for name in names:
        if name in defaults and getattr(args, name) != defaults[name]:
            raise ValueError(
                f"{name} has no effect on {what}, and is {getattr(args, name)!r}; leave it out"
            )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
