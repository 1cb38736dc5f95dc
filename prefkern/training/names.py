"""Names of options in other tools, and what they are called here.

`ELSEWHERE` maps an option of TRL, transformers 4, axolotl, LLaMA-Factory, ms-swift or unsloth to
the option here that means the same, and a remark; without such an option the remark says what to
do. `hint` looks there first, since a name with a similar spelling often means something else
(`use_peft` and `use_cpu`). Letters decide only for a near typo.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self

from prefkern.typos import nearest

_RANK = ("lora_r", "an adapter is trained where this rank is not 0")
_QUANTIZED = (
    "model_init_kwargs",
    '{"quantization_config": ...}, or load the model quantized and pass it to PreferenceTrainer',
)
_OTHER_LORA = ("", "in Python, give a LoraConfig to PreferenceTrainer as peft_config")
_LAUNCH = ("", "accelerate launch takes it: accelerate launch ... -m prefkern.cli train ...")
_LENGTH = ("max_length", "it bounds prompt plus response")
_IN_OPTIONS = "a key of it, where the objective has that option"
_FUSED = ("", "the loss here is always fused: leave it out")
_REMOVED = ("", "transformers 5 removed it: leave it out")

# The option here ("" if there is none), and a remark.
ELSEWHERE: dict[str, tuple[str, str]] = {
    # The model.
    "base_model": ("model_name_or_path", ""),
    "model_name": ("model_name_or_path", ""),
    "model_id": ("model_name_or_path", ""),
    "model_path": ("model_name_or_path", ""),
    "pretrained_model_name_or_path": ("model_name_or_path", ""),
    **dict.fromkeys(
        ("adapter_name_or_path", "lora_model_dir", "adapter_path", "adapters", "lora_path"),
        ("adapter", "the folder of a trained adapter"),
    ),
    "torch_dtype": ("dtype", ""),
    "model_dtype": ("dtype", ""),
    "flash_attn": ("attn_implementation", "flash_attention_2, sdpa or eager"),
    "flash_attention": ("attn_implementation", "flash_attention_2, sdpa or eager"),
    "use_flash_attention_2": ("attn_implementation", "flash_attention_2"),
    "model_revision": ("model_init_kwargs", '{"revision": ...}'),
    "revision": ("model_init_kwargs", '{"revision": ...}'),
    "device_map": ("model_init_kwargs", '{"device_map": ...}'),
    "hf_token": ("model_init_kwargs", '{"token": ...}'),
    "token": ("model_init_kwargs", '{"token": ...}'),
    "use_auth_token": ("model_init_kwargs", '{"token": ...}'),
    "tokenizer": ("processing_class", ""),
    "tokenizer_name": ("", "the model's own tokenizer is used"),
    "tokenizer_name_or_path": ("", "the model's own tokenizer is used"),
    "load_in_4bit": _QUANTIZED,
    "load_in_8bit": _QUANTIZED,
    "quantization": _QUANTIZED,
    "quantization_bit": _QUANTIZED,
    "quant_bits": _QUANTIZED,
    "quantization_method": _QUANTIZED,
    "bnb_4bit_quant_type": _QUANTIZED,
    "bnb_4bit_compute_dtype": _QUANTIZED,
    "use_bnb_nested_quant": _QUANTIZED,
    # The adapter.
    "use_peft": _RANK,
    "use_lora": _RANK,
    "finetuning_type": _RANK,
    "train_type": _RANK,
    "lora_rank": _RANK,
    "r": _RANK,
    "lora_target": ("lora_target_modules", ""),
    "target_modules": ("lora_target_modules", ""),
    "lora_target_linear": ("lora_target_modules", "all linear layers by default"),
    **dict.fromkeys(
        (
            *("use_dora", "use_rslora", "lora_bias", "lora_modules_to_save", "modules_to_save"),
            *("lora_target_parameters", "additional_target", "loraplus_lr_ratio"),
        ),
        _OTHER_LORA,
    ),
    "lora_task_type": ("", "it is that of a language model: leave it out"),
    # The reference.
    "ref_model": ("ref_model_name_or_path", ""),
    "ref_model_path": ("ref_model_name_or_path", ""),
    "reference_model": ("ref_model_name_or_path", ""),
    "model_adapter_name": ("", "the active adapter of the model is trained"),
    "reference_free": ("objective", "simpo, cpo and orpo need no reference"),
    "precompute_ref_logprobs": ("precompute_ref_log_probs", ""),
    # The data.
    "data_path": ("dataset", ""),
    "dataset_path": ("dataset", ""),
    "datasets": ("dataset", "one dataset"),
    "train_file": ("dataset", ""),
    "train_dataset": ("dataset", ""),
    "dataset_train_split": ("dataset_split", ""),
    "dataset_test_split": ("eval_split", ""),
    "test_split": ("eval_split", ""),
    "val_dataset": ("eval_dataset", ""),
    "val_size": ("eval_fraction", ""),
    "val_set_size": ("eval_fraction", ""),
    "split_dataset_ratio": ("eval_fraction", ""),
    "cutoff_len": _LENGTH,
    "sequence_len": _LENGTH,
    "seq_len": _LENGTH,
    "max_seq_len": _LENGTH,
    "max_seq_length": _LENGTH,
    "max_completion_length": _LENGTH,
    "max_target_length": _LENGTH,
    "max_response_length": _LENGTH,
    "packing": ("padding_free", "a batch in one row, without padding"),
    "sample_packing": ("padding_free", "a batch in one row, without padding"),
    "label_pad_token_id": ("", "prompts and padding are never scored: leave it out"),
    "padding_value": ("", "the tokenizer's pad token is used: leave it out"),
    "split": ("dataset_split", ""),
    "max_samples": ("dataset_split", "train[:1000]"),
    "template": ("", "the tokenizer's own chat template is used"),
    "chat_template": ("", "the tokenizer's own chat template is used"),
    "preprocessing_num_workers": ("dataset_num_proc", ""),
    "dataset_num_workers": ("dataset_num_proc", ""),
    "dataset_streaming": ("streaming", "a stream goes to PreferenceTrainer, as train_dataset"),
    "streaming": ("", "a stream goes to PreferenceTrainer, as train_dataset"),
    "padding_side": ("", "it makes no difference here: leave it out"),
    "pad_token": ("", "the tokenizer's pad token is used, or its end token"),
    # The loss.
    "loss_type": ("objective", "sigmoid is dpo"),
    "stage": ("objective", ""),
    "pref_loss": ("objective", "sigmoid is dpo"),
    "rl": ("objective", ""),
    "rlhf_type": ("objective", ""),
    "pref_beta": ("beta", ""),
    "dpo_beta": ("beta", ""),
    "pref_ftx": ("rpo_alpha", ""),
    "sft_weight": ("rpo_alpha", ""),
    "label_smoothing": ("objective_options", '{"label_smoothing": ...}'),
    "dpo_label_smoothing": ("objective_options", '{"label_smoothing": ...}'),
    "simpo_gamma": ("objective_options", '{"gamma": ...}'),
    "gamma": ("objective_options", _IN_OPTIONS),
    "gamma_beta_ratio": ("objective_options", '{"gamma": ...}, beta times the ratio'),
    "cpo_alpha": ("objective_options", '{"nll_weight": ...}'),
    "alpha": ("objective_options", _IN_OPTIONS),
    "tau": ("objective_options", _IN_OPTIONS),
    "discopop_tau": ("objective_options", '{"tau": ...}'),
    "f_divergence_type": ("objective_options", '{"f_divergence_type": ...}'),
    "f_alpha_divergence_coef": ("objective_options", '{"f_alpha_divergence_coef": ...}'),
    "loss_weights": ("objective_options", '{"loss_weights": [...]}, and "+" between the names'),
    "desirable_weight": ("objective_options", _IN_OPTIONS),
    "undesirable_weight": ("objective_options", _IN_OPTIONS),
    "generate_during_eval": ("generate_samples", "a number of prompts"),
    "use_logits_to_keep": _FUSED,
    "use_liger_loss": _FUSED,
    "use_liger": ("use_liger_kernel", ""),
    "enable_liger_kernel": ("use_liger_kernel", ""),
    # The run.
    "lr": ("learning_rate", ""),
    "num_epochs": ("num_train_epochs", ""),
    "epochs": ("num_train_epochs", ""),
    "max_epochs": ("num_train_epochs", ""),
    "num_train_steps": ("max_steps", ""),
    "batch_size": ("per_device_train_batch_size", "pairs on a device"),
    "micro_batch_size": ("per_device_train_batch_size", "pairs on a device"),
    "train_batch_size": ("per_device_train_batch_size", "pairs on a device"),
    "per_gpu_train_batch_size": ("per_device_train_batch_size", ""),
    "per_gpu_eval_batch_size": ("per_device_eval_batch_size", ""),
    "eval_batch_size": ("per_device_eval_batch_size", ""),
    "gradient_accumulation": ("gradient_accumulation_steps", ""),
    "grad_accum": ("gradient_accumulation_steps", ""),
    "beta1": ("adam_beta1", ""),
    "beta2": ("adam_beta2", ""),
    "optimizer": ("optim", ""),
    "scheduler": ("lr_scheduler_type", ""),
    "lr_scheduler": ("lr_scheduler_type", ""),
    "warmup": ("warmup_steps", ""),
    "max_grad_clip": ("max_grad_norm", ""),
    "gradient_clipping": ("max_grad_norm", ""),
    "evaluation_strategy": ("eval_strategy", ""),
    "activation_checkpointing": ("gradient_checkpointing", ""),
    "evals_per_epoch": ("eval_steps", "below 1, a share of all steps"),
    "saves_per_epoch": ("save_steps", "below 1, a share of all steps"),
    "output": ("output_dir", ""),
    "output_path": ("output_dir", ""),
    "save_dir": ("output_dir", ""),
    "no_cuda": ("use_cpu", ""),
    "mixed_precision": ("bf16", "or fp16"),
    "group_by_length": ("", "batches by length are not supported on preference pairs"),
    "deepspeed_config": ("deepspeed", ""),
    **dict.fromkeys(
        ("accelerate_config", "num_processes", "num_machines", "machine_rank", "gpu_ids"), _LAUNCH
    ),
    "env": ("", "set these variables in the shell, before the command"),
    "test_split_size": ("eval_fraction", ""),
    "ignore_bias_buffers": ("", "it makes no difference here: leave it out"),
    "bnb_4bit_quant_storage": _QUANTIZED,
    "bnb_4bit_use_double_quant": ("use_bnb_nested_quant", ""),
    "activation_offloading": ("gradient_checkpointing", "it recomputes activations instead"),
    "gradient_checkpointing_use_reentrant": (
        "gradient_checkpointing_kwargs",
        '{"use_reentrant": ...}',
    ),
    "push_to_hub_token": ("hub_token", ""),
    "push_to_hub_model_id": ("hub_model_id", ""),
    "wandb_project": ("report_to", "wandb, which reads WANDB_PROJECT"),
    "use_wandb": ("report_to", "wandb"),
    "logging_dir": ("", "TensorBoard's callback reads the environment's TENSORBOARD_LOGGING_DIR"),
    "overwrite_output_dir": _REMOVED,
    "save_safetensors": _REMOVED,
    "include_tokens_per_second": _REMOVED,
    "no_deprecation_warnings": _REMOVED,
}


# Options of TRL that are not here, and the value, beside null, with which they ask for nothing.
_NOTHING = {
    "activation_offloading": False,
    "bnb_4bit_quant_storage": None,
    "dataset_streaming": False,
    "datasets": [],
    "ignore_bias_buffers": False,
    "lora_task_type": "CAUSAL_LM",
    "pad_token": None,
    "streaming": False,
    "test_split_size": None,
}


def asks_nothing(name: str, value: Any) -> bool:
    """Whether a file's option that is not here has the value with which it has no effect."""
    return name in _NOTHING and value in (None, _NOTHING[name])


def hint(
    name: str, known: Iterable[str], shown: str = "{}", places: Mapping[str, str] | None = None
) -> str:
    """What to write instead of an unknown option, as the end of an error; "" if nothing is near.

    Args:
        name: the option that the user gave.
        known: the options that exist.
        shown: how an option is written, "--{}" on a command line.
        places: where other options are given, by name.
    """
    known = list(known)
    plain = name.lstrip("-").replace("-", "_").lower()
    ours, remark = ELSEWHERE.get(plain, (plain, ""))
    if ours != plain and ours in known:
        remark = f" ({remark})" if remark else ""
        return f": here it is {shown.format(ours)}{remark}"
    if places is not None and ours in places:
        return f": give {places[ours]}"
    if not ours:
        return f": {remark}"
    close = nearest(plain, known)
    return f"; did you mean {shown.format(close)}?" if close else ""


class NamedArguments:
    """A class whose unknown keyword arguments are errors with a hint."""

    # Where an argument is given that this class does not take, by its name.
    _places: ClassVar[Mapping[str, str]] = {}

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        parameters = inspect.signature(cls.__init__).parameters
        takes_all = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
        for name in kwargs:
            if name not in parameters and not takes_all:
                near = hint(name, parameters, places=cls._places)
                raise TypeError(f"{cls.__name__} has no argument {name!r}{near}")
        return super().__new__(cls)
