"""Arguments as people have them: older names, other tools' names, numbers as text."""

from __future__ import annotations

import copy
import json
import pickle
import re
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("peft")

from prefkern import PreferenceConfig, PreferenceTrainer, keywords
from prefkern.keywords import current_names
from prefkern.training.rewards import RewardConfig
from support import tiny
from support.training import config

BFLOAT16 = ("bfloat16", "torch.bfloat16", "bf16", torch.bfloat16)


@pytest.mark.parametrize("value", [*BFLOAT16, "auto", None], ids=str)
@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_a_dtype_counts_by_both_names(tmp_path, name: str, value: Any) -> None:
    """The default, float32, shadows neither; the reference is loaded as the policy is."""
    folder = str(tmp_path / "model")
    tiny.model().to(torch.float16).save_pretrained(folder)
    args = config(tmp_path, model_init_kwargs={name: value}, ref_model_name_or_path=folder)
    trainer = PreferenceTrainer(
        folder, args, train_dataset=tiny.dataset(4), processing_class=tiny.tokenizer()
    )
    expected = {"auto": torch.float16, None: torch.float32}.get(value, torch.bfloat16)
    for model in (trainer.model, trainer.ref_model):
        assert {p.dtype for p in model.parameters()} == {expected}
    # The arguments stay JSON, for loggers.
    json.loads(args.to_json_string())


def test_dtypes_that_disagree_or_do_not_exist() -> None:
    same = {"dtype": torch.bfloat16, "torch_dtype": "bf16", "revision": "main"}
    assert current_names(same) == {"dtype": "bfloat16", "revision": "main"}
    for name in keywords._FLOATS:
        assert current_names({"dtype": getattr(torch, name)}) == {"dtype": name}
    for short, name in keywords._SHORT.items():
        assert getattr(torch, short, getattr(torch, name)) == getattr(torch, name)
    parts = {"dtype": {"text_config": "bfloat16"}}
    assert current_names(parts) == parts
    with pytest.raises(ValueError, match=r"dtype is 'float16' and torch_dtype, its older name, 'b"):
        PreferenceConfig(model_init_kwargs={"dtype": "float16", "torch_dtype": "bfloat16"})
    for wrong in ("int4", "int8", "torch.nn", 16):
        with pytest.raises(ValueError, match=f'torch_dtype must be "auto" or a .*, got {wrong!r}'):
            PreferenceConfig(model_init_kwargs={"torch_dtype": wrong})


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("use_auth_token", '"token"'),
        ("load_in_4bit", "quantization_config"),
        ("use_flash_attention_2", '"attn_implementation": "flash_attention_2"'),
    ],
)
def test_keywords_that_transformers_dropped(name: str, instead: str) -> None:
    with pytest.raises(ValueError, match=f"{name}', which transformers 5 does not take: .*"):
        PreferenceConfig(model_init_kwargs={name: True})
    with pytest.raises(ValueError, match=re.escape(instead)):
        PreferenceConfig(model_init_kwargs={name: True})


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({"objective_options": {"beta": "1e-1"}}, "objective_options.beta"),
        ({"objective_options": '{"exponent": [0.1, "0.2"]}'}, "objective_options.exponent[1]"),
        ({"objective_options": {"adaptive": {"clip": "3"}}}, "objective_options.adaptive.clip"),
        ({"lr_scheduler_kwargs": {"min_lr": "1e-6"}}, "lr_scheduler_kwargs.min_lr"),
        ({"model_init_kwargs": {"rope": {"theta": "1e6"}}}, "model_init_kwargs.rope.theta"),
    ],
)
def test_a_number_as_text_is_named_by_its_path(options: dict[str, Any], path: str) -> None:
    with pytest.raises(ValueError, match=re.escape(path) + " must be a number, got the text"):
        PreferenceConfig(**options)


def test_text_that_looks_like_a_number() -> None:
    kwargs = {"revision": "12345", "token": "1e5"}
    assert PreferenceConfig(model_init_kwargs=dict(kwargs)).model_init_kwargs == kwargs
    with pytest.raises(TypeError, match=r"model_init_kwargs.revision must be text, got 12345; put"):
        PreferenceConfig(model_init_kwargs={"revision": 12345})


@pytest.mark.parametrize("kind", [PreferenceConfig, RewardConfig])
def test_a_share_of_steps_to_warm_up_in(tmp_path, kind: Any) -> None:
    args = kind(output_dir=str(tmp_path), warmup_ratio=0.1)
    assert args.warmup_steps == 0.1 and args.get_warmup_steps(50) == 5
    again = kind(output_dir=str(tmp_path), warmup_ratio=0.1, warmup_steps=0.1)
    assert again.warmup_steps == 0.1
    assert kind(output_dir=str(tmp_path), warmup_ratio=0.0).get_warmup_steps(50) == 0
    with pytest.raises(ValueError, match=r"warmup_ratio is 0.1 and warmup_steps 5; give one"):
        kind(output_dir=str(tmp_path), warmup_ratio=0.1, warmup_steps=5)
    with pytest.raises(ValueError, match="warmup_ratio must be < 1, a share of all steps, got 100"):
        kind(output_dir=str(tmp_path), warmup_ratio=100)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("loss_type", "here it is objective (sigmoid is dpo)"),
        ("max_completion_length", "here it is max_length (it bounds prompt plus response)"),
        ("evaluation_strategy", "here it is eval_strategy"),
        ("label_pad_token_id", "prompts and padding are never scored"),
        ("use_peft", "give a LoraConfig to the trainer"),
        ("torch_dtype", 'give model_init_kwargs={"dtype": ...}'),
        ("tokenizer", "give it to the trainer, as processing_class"),
        ("ref_model", "here it is ref_model_name_or_path"),
        ("betta", "did you mean beta?"),
        ("nothing_like_it", "PreferenceConfig has no argument 'nothing_like_it'"),
    ],
)
def test_arguments_of_other_tools(name: str, said: str) -> None:
    with pytest.raises(TypeError, match=f"PreferenceConfig has no argument '{name}'") as error:
        PreferenceConfig(**{name: 1})
    assert said in str(error.value)


def test_arguments_of_older_trainers(tmp_path) -> None:
    """As older scripts call TRL's trainer: hyper-parameters and the tokenizer in its constructor."""
    for name, said in (
        ("beta", "give it to PreferenceConfig"),
        ("max_prompt_length", "give it to PreferenceConfig"),
        ("loss_type", "here it is objective"),
        ("tokenizer", "here it is processing_class"),
    ):
        with pytest.raises(TypeError, match=f"PreferenceTrainer has no argument '{name}': {said}"):
            PreferenceTrainer(tiny.model(), config(tmp_path), **{name: 1})


def test_arguments_are_copied_and_pickled(tmp_path) -> None:
    """Trainer pickles its arguments beside the model."""
    args = config(tmp_path, warmup_ratio=0.1)
    for again in (copy.copy(args), copy.deepcopy(args), pickle.loads(pickle.dumps(args))):
        assert again.to_dict() == args.to_dict()
