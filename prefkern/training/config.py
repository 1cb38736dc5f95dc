"""PreferenceConfig: the arguments of `PreferenceTrainer`, on transformers' TrainingArguments.

A dataclass that HfArgumentParser reads from flags or a file. Names are TRL's where TRL has the
option. Arguments of transformers that would have no effect on a preference loss are refused.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from prefkern import objectives
from prefkern.data.columns import COLUMNS_HELP, read_renaming
from prefkern.data.truncation import TRUNCATION_HELP, TRUNCATION_MODES, check_mode
from prefkern.objectives import Objective, UnpairedObjective
from prefkern.ops import checks
from prefkern.ops.call import BACKENDS

_JSON_OPTIONS = ("objective_options", "model_init_kwargs")
# Whole numbers that may be None, and their minimum.
_LEAST = {
    "max_length": 2,
    "max_prompt_length": 1,
    "pad_to_multiple_of": 1,
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
_BOOLS = (
    "use_weighting",
    "padding_free",
    "precompute_ref_log_probs",
    "disable_dropout",
    "token_metrics",
    "gradient_checkpointing",
)


@dataclass
class PreferenceConfig(TrainingArguments):
    """Training arguments of `PreferenceTrainer`; the rest are transformers' TrainingArguments.

    Defaults that differ from theirs, as in TRL: `learning_rate` 1e-6 (for all weights; LoRA needs
    about ten times as much), `logging_steps` 10, `gradient_checkpointing` on, and `bf16` on if the
    GPU supports it. `logging_nan_inf_filter` is off: the log shows nan and inf.

    Raises ValueError for an objective, option or argument that is unknown or has no effect here.
    """

    learning_rate: float = field(default=1e-6, metadata={"help": "Initial learning rate."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    gradient_checkpointing: bool = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=True, metadata={"help": "Recompute activations in backward to save memory."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Refused: a loss that is nan or inf is never hidden."}
    )
    bf16: bool | None = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=None, metadata={"help": "bf16 mixed precision. Default: where a GPU supports it."}
    )

    objective: str = field(default="adadpo", metadata={"help": "Name of the objective."})
    beta: float | None = field(
        default=None, metadata={"help": "beta of the objective. Default: the objective's own."}
    )
    objective_options: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": 'Further options of the objective, as JSON: {"clip": 3.0}.'},
    )
    rpo_alpha: float | None = field(
        default=None, metadata={"help": "Weight of an NLL term on chosen responses. Default: none."}
    )
    use_weighting: bool = field(
        default=False, metadata={"help": "Weight pairs as WPO does, alignment included."}
    )
    columns: dict[str, str] | str | None = field(
        default=None, metadata={"help": COLUMNS_HELP, "nargs": "+"}
    )
    max_length: int | None = field(
        default=1024, metadata={"help": "Bound on prompt plus response, in tokens."}
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Bound on the prompt, in tokens."}
    )
    truncation_mode: str = field(
        default="keep_end", metadata={"help": TRUNCATION_HELP, "choices": list(TRUNCATION_MODES)}
    )
    pad_to_multiple_of: int | None = field(
        default=None, metadata={"help": "Round the length of batches up to a multiple."}
    )
    padding_free: bool = field(
        default=False,
        metadata={"help": "Pack a batch into one row without padding, where the model allows it."},
    )
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Processes that tokenise the dataset."}
    )
    precompute_ref_log_probs: bool = field(
        default=False, metadata={"help": "Compute the reference's sums once, before training."}
    )
    precompute_ref_batch_size: int | None = field(
        default=None, metadata={"help": "Pairs a batch for that. Default: as in evaluation."}
    )
    ref_cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder that keeps those sums for later runs. Default: prefkern's in HF_HOME. "
            "An empty name keeps nothing."
        },
    )
    ref_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Reference model. Default: the initial model."}
    )
    ref_adapter_name: str | None = field(
        default=None,
        metadata={
            "help": "Adapter of the model that is the reference; __base__: the model without "
            "adapter. Default: the adapter before training."
        },
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keywords of from_pretrained, as JSON."}
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Set every dropout to 0, in policy and reference."}
    )
    router_aux_loss_coef: float | None = field(
        default=None,
        metadata={
            "help": "Weight of a mixture of experts' load-balancing loss. Default: the model's own "
            "if its config has output_router_logits on, else 0."
        },
    )
    token_metrics: bool = field(
        default=True, metadata={"help": "Log entropy, mean logits and token accuracy."}
    )
    workspace_mb: float | None = field(
        default=None, metadata={"help": "Bound on the loss's temporary memory."}
    )
    backend: str | None = field(
        default=None, metadata={"help": "triton or torch. Default: chosen for the device."}
    )

    def __post_init__(self) -> None:
        for name in _JSON_OPTIONS:
            setattr(self, name, _json_object(name, getattr(self, name)))
        self.columns = read_renaming(self.columns)
        for name, least in _LEAST.items():
            value = getattr(self, name)
            is_whole = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and not (is_whole and value >= least):
                raise ValueError(f"{name} must be None or an int >= {least}, got {value!r}")
        check_training(self)
        for name in _BOOLS:
            checks.boolean(name, getattr(self, name))
        for name in ("bf16", "fp16"):
            if getattr(self, name) is not None:
                checks.boolean(name, getattr(self, name))
        for name in ("ref_cache_dir", "ref_model_name_or_path", "ref_adapter_name"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise TypeError(f"{name} must be a string or None, got {value!r}")
        if self.workspace_mb is not None:
            checks.positive("workspace_mb", self.workspace_mb)
        if self.router_aux_loss_coef is not None:
            checks.not_negative("router_aux_loss_coef", self.router_aux_loss_coef)
        if self.backend is not None and self.backend not in BACKENDS:
            known = ", ".join(map(repr, BACKENDS))
            raise ValueError(f"backend must be None or one of {known}, got {self.backend!r}")
        check_mode(self.truncation_mode)
        refuse_batches_by_length(self)
        refuse_without_effect(self, _WITHOUT_EFFECT, "preference pairs")
        if self.padding_free and self.pad_to_multiple_of is not None:
            raise ValueError(
                f"pad_to_multiple_of ({self.pad_to_multiple_of}) has no effect under padding_free, "
                "which pads nothing; give one of them"
            )
        if self.bf16 is None:
            on_gpu = torch.cuda.is_available() and not self.use_cpu
            supported = on_gpu and torch.cuda.is_bf16_supported()
            self.bf16 = supported and not self.fp16  # pyright: ignore[reportIncompatibleVariableOverride]
        if getattr(self, "activation_checkpointing", False) is None:
            # The newer name of gradient_checkpointing, from transformers 5.2x on.
            self.activation_checkpointing = self.gradient_checkpointing
        if self.label_smoothing_factor:
            raise ValueError(
                "label_smoothing_factor has no effect on preference pairs; use "
                'objective_options={"label_smoothing": ...}'
            )
        for name in ("ref_cache_dir", "precompute_ref_batch_size"):
            value = getattr(self, name)
            if value is not None and not self.precompute_ref_log_probs:
                raise ValueError(
                    f"{name} is {value!r}, which has no effect without precompute_ref_log_probs"
                )
        if self.logging_nan_inf_filter:
            raise ValueError(
                "logging_nan_inf_filter is True, which would hide a loss that is nan or inf in the "
                "log; leave it out"
            )
        if self.torch_compile:
            raise ValueError("torch_compile is not supported yet")
        super().__post_init__()
        if self.padding_free and getattr(self.accelerator_config, "dispatch_batches", None):
            raise ValueError(
                "dispatch_batches cuts a batch by its rows, and under padding_free it has one; "
                "leave dispatch_batches out of accelerator_config"
            )
        if self.fp16 and self.device.type == "cpu":
            # accelerate would silently train in float32.
            raise ValueError("fp16 has no effect on a CPU; use bf16")

    def build_objective(self) -> Objective | UnpairedObjective:
        """The configured objective. Raises ValueError for an unknown name, option or value."""
        configured: Any = self.objective_options  # a dict or None, since __post_init__
        options: dict[str, Any] = dict(configured or {})
        given = {
            "beta": self.beta,
            "rpo_alpha": self.rpo_alpha,
            "use_weighting": self.use_weighting or None,
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
            return objectives.build(self.objective, **options)
        except TypeError as error:
            raise ValueError(str(error)) from error


def check_training(args: TrainingArguments) -> None:
    """Raise for numbers that transformers takes and no run can use, and for invalid JSON."""
    for name in args._VALID_DICT_FIELDS:
        value = getattr(args, name, None)
        # Otherwise it is the name of a file.
        if isinstance(value, str) and value.lstrip().startswith("{"):
            _json_object(name, value)
    for name, least in _LEAST_OF_TRAINING.items():
        value: Any = getattr(args, name)
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if not (is_whole and value >= least):
            raise ValueError(f"{name} must be an int >= {least}, got {value!r}")
    for name in ("learning_rate", "weight_decay", "num_train_epochs"):
        checks.not_negative(name, getattr(args, name))


def refuse_batches_by_length(args: TrainingArguments) -> None:
    """Raise ValueError for sampling by length, since a row has several sequences."""
    if getattr(args, "train_sampling_strategy", "random") not in ("random", "sequential"):
        raise ValueError(
            "batches by length are not supported on preference pairs; "
            'train_sampling_strategy must be "random" or "sequential"'
        )


def refuse_without_effect(args: TrainingArguments, names: Collection[str], what: str) -> None:
    """Raise ValueError for an argument of transformers that is set and would have no effect."""
    for each in dataclasses.fields(TrainingArguments):
        if each.name not in names:
            continue
        value, make = getattr(args, each.name), each.default_factory
        # The default of the installed version.
        if value != (each.default if make is dataclasses.MISSING else make()):
            raise ValueError(f"{each.name} has no effect on {what}, and is {value!r}; leave it out")


def _json_object(name: str, value: Any) -> dict[str, Any] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name} is not JSON: {error}") from error
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name} must be a JSON object, got {value!r}")
    return value
