"""PreferenceConfig: the arguments of `PreferenceTrainer`, on transformers' TrainingArguments.

A dataclass. The command line reads its fields from this file, without importing it. Names are TRL's
where TRL has the option. Arguments of transformers that would have no effect on a preference loss
are refused: see `options`, which has the checks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from transformers.training_args import TrainingArguments

from prefkern.data.columns import COLUMNS_HELP
from prefkern.data.truncation import TRUNCATION_HELP, TRUNCATION_MODES
from prefkern.objectives import Objective, UnpairedObjective
from prefkern.training import options
from prefkern.training.names import NamedArguments


@dataclass
class PreferenceConfig(NamedArguments, TrainingArguments):
    """Training arguments of `PreferenceTrainer`; the rest are transformers' TrainingArguments.

    Defaults that differ from theirs, as in TRL: `learning_rate` 1e-6 (for all weights; LoRA needs
    about ten times as much), `logging_steps` 10, `gradient_checkpointing` on, and `bf16` on if the
    GPU supports it. `logging_nan_inf_filter` is off: the log shows nan and inf.

    Raises ValueError for an objective, option or argument that is unknown or has no effect here.
    """

    _places: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("lora_r", "lora_target_modules"), "a LoraConfig to the trainer"),
        **dict.fromkeys(("model_name_or_path", "model"), "it to the trainer, as model"),
        **dict.fromkeys(("dataset", "dataset_split"), "train_dataset to the trainer"),
        **dict.fromkeys(
            ("eval_dataset", "eval_split", "eval_fraction"), "eval_dataset to the trainer"
        ),
        "processing_class": "it to the trainer, as processing_class",
        "dtype": 'model_init_kwargs={"dtype": ...}',
        "attn_implementation": 'model_init_kwargs={"attn_implementation": ...}',
        "trust_remote_code": 'model_init_kwargs={"trust_remote_code": True}',
    }

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

    warmup_ratio: float | None = field(
        default=None, metadata={"help": "warmup_steps as a share of all steps, in [0, 1)."}
    )

    objective: str = field(
        default="adadpo",
        metadata={"help": 'Name of the objective; "dpo+sft" is the sum of several.'},
    )
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
    ld_alpha: float | None = field(
        default=None,
        metadata={
            "help": "Weight of tokens beyond the length of a pair's shorter response, in [0, 1] "
            "(LD-DPO). Default: 1."
        },
    )
    use_weighting: bool = field(
        default=False, metadata={"help": "Weight pairs as WPO does, alignment included."}
    )
    columns: dict[str, str] | str | list[str] | None = field(
        default=None, metadata={"help": COLUMNS_HELP}
    )
    assistant_only_loss: bool = field(
        default=False,
        metadata={
            "help": "Score the assistant's tokens alone, by the generation marks of the chat "
            "template: no turn of a user or a tool inside a response."
        },
    )
    last_turn_only: bool = field(
        default=False, metadata={"help": "Score the last message of each response alone."}
    )
    max_length: int | None = field(
        default=1024, metadata={"help": "Bound on prompt plus response, in tokens."}
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Bound on the prompt, in tokens."}
    )
    truncation_mode: str = field(
        default="keep_end", metadata={"help": TRUNCATION_HELP, "choices": TRUNCATION_MODES}
    )
    pad_to_multiple_of: int | None = field(
        default=None, metadata={"help": "Round the length of batches up to a multiple."}
    )
    padding_free: bool = field(
        default=False,
        metadata={"help": "Pack a batch into one row without padding, where the model allows it."},
    )
    share_prompt: bool = field(
        default=False,
        metadata={"help": "Compute a pair's prompt once, where the model allows it."},
    )
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Pack as many pairs into a batch as fit this many tokens, in place of a number "
            "of pairs. Needs padding_free."
        },
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
    sync_ref_model: bool = field(
        default=False,
        metadata={"help": "Let the reference model follow the policy during training (TR-DPO)."},
    )
    ref_model_mixup_alpha: float = field(
        default=0.6,
        metadata={"help": "The share of the way that it moves to the policy, in (0, 1]."},
    )
    ref_model_sync_steps: int = field(
        default=512, metadata={"help": "It moves every so many optimiser steps."}
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
    generate_samples: int = field(
        default=0,
        metadata={
            "help": "Show the model's responses to so many prompts of the eval_dataset at each "
            "evaluation, in the terminal and in report_to's wandb, trackio or tensorboard."
        },
    )
    generate_max_new_tokens: int = field(
        default=128, metadata={"help": "Bound on such a response, in tokens."}
    )
    workspace_mb: float | None = field(
        default=None, metadata={"help": "Bound on the loss's temporary memory."}
    )
    backend: str | None = field(
        default=None, metadata={"help": "triton or torch. Default: chosen for the device."}
    )

    def __post_init__(self) -> None:
        read_json(self)
        options.check_preference(self, training_defaults())
        if self.warmup_ratio is not None:
            self.warmup_steps = self.warmup_ratio
        if self.bf16 is None:
            on_gpu = torch.cuda.is_available() and not self.use_cpu
            supported = on_gpu and torch.cuda.is_bf16_supported()
            self.bf16 = supported and not self.fp16  # pyright: ignore[reportIncompatibleVariableOverride]
        if getattr(self, "activation_checkpointing", False) is None:
            # The newer name of gradient_checkpointing, from transformers 5.2x on.
            self.activation_checkpointing = self.gradient_checkpointing
        refuse_split_sequences(self, "sp_size")
        super().__post_init__()
        refuse_dispatched_rows(self)
        options.check_spreading(self)
        if self.fp16 and self.device.type == "cpu":
            # accelerate would silently train in float32.
            raise ValueError("fp16 has no effect on a CPU; use bf16")

    def build_objective(self) -> Objective | UnpairedObjective:
        """The configured objective. Raises ValueError for an unknown name, option or value."""
        return options.build_objective(self)


def read_json(args: TrainingArguments) -> None:
    """Raise ValueError for an argument that should be a dict and is JSON with a mistake."""
    for name in args._VALID_DICT_FIELDS:
        value = getattr(args, name, None)
        # Otherwise it is the name of a file.
        if isinstance(value, str) and value.lstrip().startswith("{"):
            setattr(args, name, options.json_object(name, value))


def refuse_dispatched_rows(args: Any) -> None:
    """Raise ValueError if accelerate would cut batches for the ranks."""
    if getattr(args.accelerator_config, "dispatch_batches", None):
        raise ValueError(
            "dispatch_batches cuts a batch by its rows, also between a pair's two responses; leave "
            "dispatch_batches out of accelerator_config"
        )


def refuse_split_sequences(args: Any, *names: str) -> None:
    """Raise ValueError for these kinds of parallelism (`cp_size`, `sp_size`), by arguments or launcher."""
    from prefkern.training.launched import launched_parallelism

    given = launched_parallelism(args)
    for name in names:
        size = getattr(given, name, 1)
        if size > 1:
            raise ValueError(
                f"parallelism_config has {name}={size}, which this trainer does not support: "
                f"PreferenceTrainer cuts sequences over ranks by cp_size={size} under FSDP2, and so "
                "can a loop of your own (prefkern.preference_outputs with "
                "FusedPreferenceLoss(objective, sequence_group=group))"
            )


def training_defaults() -> dict[str, Any]:
    """The defaults of the installed TrainingArguments."""
    return {
        each.name: each.default
        if each.default_factory is dataclasses.MISSING
        else each.default_factory()
        for each in dataclasses.fields(TrainingArguments)
    }
