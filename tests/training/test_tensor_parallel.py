"""transformers' tensor parallelism in the trainer: two ranks against one process, by `support.tensor_parallel`.

One launch by torchrun runs all cases.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import transformers

from support.versions import TENSOR_PARALLEL, TENSOR_PARALLEL_ADAPTERS

pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")

for each in (TENSOR_PARALLEL, TENSOR_PARALLEL_ADAPTERS):
    if not each.is_here:
        pytest.skip(each.reason, allow_module_level=True)

from accelerate.parallelism_config import ParallelismConfig
from transformers.distributed import DistributedConfig

from prefkern import PreferenceConfig, PreferenceTrainer
from prefkern.cli import __main__ as cli
from prefkern.training import tensor_parallel
from prefkern.training.rewards import RewardConfig
from support import tiny
from support.fsdp import lora
from support.tensor_parallel import (
    CASES,
    COMMANDS,
    FOUR,
    OF_FOUR,
    OTHERS,
    SAVED,
    command,
    launch,
    outcome_of,
    save_models,
)
from support.training import config, weights
from support.zero import errors

LN2 = math.log(2)
# What these go through others go through as well.
LONG = ("full, carried", "lora, none", "lora, carried", "lora, tied head", "lora, precomputed")


@pytest.fixture(scope="module")
def ranks(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    save_models(folder)
    is_long = request.config.getoption("--long")
    launch(folder, *(case for case in CASES if is_long or case not in LONG), *OTHERS)
    return folder


def outcomes(folder: Path, case: str) -> list[dict]:
    return [torch.load(folder / f"rank{rank}.pt")[case] for rank in range(2)]


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.long if case in LONG else ()) for case in CASES]
)
def test_gradients_are_those_of_one_process(ranks, case):
    expected = outcome_of(ranks / "one process", ranks, case, ranks=1)
    # In bfloat16 each rank's part of a sum is rounded.
    tolerance = 0.1 if "bf16" in case else 1e-5
    assert len(expected["steps"]) >= 2
    for found in outcomes(ranks, case):
        worst = errors(case, found, expected)
        # The adapter's first factors have no gradient while the second are 0.
        assert worst["still"] <= 0.5
        assert max(worst["gradients"], worst["logs"]) <= tolerance, worst
        # AdamW divides by a gradient's own size, so that the error of a small one weighs more.
        assert worst["weights"] <= tolerance * (10 if "adamw" in case else 1), worst
        is_equal = any(name in case for name in ("off", "copy", "precomputed", "trained adapter"))
        if is_equal:
            assert found["logs"][0]["loss"] == pytest.approx(LN2, abs=1e-6)


@pytest.mark.long
def test_four_ranks_and_heads_that_do_not_divide_among_them(ranks, tmp_path):
    for each in (ranks / "four heads", ranks / "model"):
        (tmp_path / each.name).symlink_to(each)
    launch(tmp_path, *OF_FOUR, count=4)
    for rank in range(4):
        found = torch.load(tmp_path / f"rank{rank}.pt")
        for case in FOUR:
            expected = outcome_of(tmp_path / "one process", tmp_path, case, ranks=1)
            worst = errors(case, found[case], expected)
            assert worst["still"] <= 0.5
            assert max(worst["gradients"], worst["weights"], worst["logs"]) <= 1e-5, worst
        assert "num_key_value_heads=2 does not divide by that: set tp_size" in found["heads"]


@pytest.mark.parametrize("case", SAVED)
def test_what_is_saved_loads_on_one_process(ranks, case):
    first, second = outcomes(ranks, "saved")
    for name, value in first[case]["weights"].items():
        assert torch.equal(value, second[case]["weights"][name])
    for place in ("model", "checkpoint-2"):
        folder = ranks / f"saved, {case}" / place
        if "full" in case:
            model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        else:
            base = transformers.AutoModelForCausalLM.from_pretrained(ranks / "model")
            model = peft.PeftModel.from_pretrained(base, folder, is_trainable=True)
        assert "distributed_config" not in model.config.to_dict()
        found = weights(model)
        for name, value in first[case]["weights"].items():
            assert torch.equal(found[name], value), (place, name)
    for each in (first, second):
        assert "give the checkpoint's folder as the model" in each[case]["said"]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_line_as_accelerate_launches_it(ranks, tmp_path, name):
    assert [each[name][0] for each in outcomes(ranks, "commands")] == [0, 0]
    assert cli.main(["train", *command(ranks, name, output_dir=tmp_path)]) == 0
    found, expected = (
        transformers.AutoModelForCausalLM.from_pretrained(folder)
        for folder in (ranks / name, tmp_path)
    )
    if name == "full":
        for key, value in weights(expected).items():
            torch.testing.assert_close(weights(found)[key], value, rtol=1e-5, atol=1e-6)
    else:
        # An adapter is drawn otherwise than on one process.
        assert weights(found).keys() == weights(expected).keys()


def test_a_new_adapter_is_drawn_for_whole_layers(ranks):
    first, second = outcomes(ranks, "new adapter")
    assert first.keys() == second.keys() and len(first) == 10
    for name, value in first.items():
        assert torch.equal(value, second[name])
        if "o_proj" in name or "down_proj" in name:
            left, right = value.chunk(2, dim=1)
            assert not torch.allclose(left, right)
            # PEFT's bound, for the whole width.
            bound = 1 / math.sqrt(value.shape[1])
            assert 0.8 * bound < value.abs().max() <= bound


SAID = {
    "a copy": "tensor parallelism holds the weights of the model that was given, .*by its name",
    "a whole reference": "loaded for tp_size=2 and ref_model for tp_size=1: load both with the same",
    "the head": "LoRA on lm_head is not supported under tensor parallelism: .*use FSDP2",
    "experts": "PEFT does not adapt .* as where a mixture's experts are one weight: leave these out",
    "packed projections": "LoRA on model.layers.0.self_attn.o_proj is not .*leave it out of target",
    "summed gradients": "gradient_accumulation_steps=2 is not supported .*q_norm is trained",
}


@pytest.mark.parametrize("name", SAID)
def test_refusals_of_models_that_are_loaded(ranks, name):
    for said in outcomes(ranks, "refused"):
        assert said.keys() == SAID.keys()
        with pytest.raises(ValueError, match=SAID[name]):
            raise ValueError(said[name])


TWO = {"model_init_kwargs": {"distributed_config": {"tp_size": 2}}, "save_strategy": "no"}
BEFORE = {
    "dropout": ({"disable_dropout": False}, {}, "dropout is not .*: set disable_dropout"),
    "resuming": ({"save_strategy": "steps"}, {}, "to resume from is not .*: set save_only_model"),
    "the best": (
        {
            "save_strategy": "steps",
            "eval_strategy": "steps",
            "save_only_model": True,
            "load_best_model_at_end": True,
        },
        {"eval_dataset": tiny.dataset(4)},
        "load_best_model_at_end is not supported",
    ),
    "a reference that moves": (
        {"sync_ref_model": True},
        {"ref_model": tiny.model()},
        "loaded for tp_size=2 and ref_model for tp_size=1",
    ),
    "modules": ({}, {"peft_config": lora(modules_to_save=["lm_head"])}, "modules_to_save=.*FSDP2"),
    "dora": ({}, {"peft_config": lora(use_dora=True)}, "use_dora=True of the peft_config"),
    "initial values": (
        {},
        {"peft_config": lora(init_lora_weights="pissa")},
        "init_lora_weights='pissa' is not supported",
    ),
    "another adapter": (
        {},
        {"peft_config": peft.IA3Config(task_type="CAUSAL_LM")},
        "supported for LoRA alone, .* got IA3Config",
    ),
    "one process": ({}, {}, r"\(tp_size=2\) is not supported together with 1 processes"),
    "the plan": (
        {"model_init_kwargs": {"tp_plan": "auto", "tp_size": 2}},
        {},
        r"\(tp_size=2\) is not supported together with 1 processes",
    ),
    "shards too": (
        {"model_init_kwargs": {"distributed_config": {"tp_size": 2, "fsdp_size": 2}}},
        {},
        "is not supported together with fsdp_size=2: .*use FSDP2",
    ),
    "another size": (
        {"parallelism_config": ParallelismConfig(tp_size=4)},
        {},
        "parallelism_config has tp_size=4, and the model is loaded for tp_size=2",
    ),
}


@pytest.mark.parametrize("name", BEFORE)
def test_what_cannot_run_is_refused_before_anything_is_loaded(tmp_path, monkeypatch, name):
    options, given, message = BEFORE[name]
    is_alone = "processes" in message or "fsdp_size" in message
    if not is_alone:
        monkeypatch.setattr(PreferenceConfig, "world_size", 2)
    args = config(tmp_path, objective="dpo" if "ref_model" in given else "simpo", **TWO | options)
    with pytest.raises(ValueError, match=message):
        PreferenceTrainer("no such folder", args, tiny.dataset(8), **given)


def test_a_whole_model_under_a_size_of_the_launcher(tmp_path):
    args = config(tmp_path, objective="simpo", parallelism_config=ParallelismConfig(tp_size=2))
    with pytest.raises(ValueError, match="has tp_size=2, and the model is loaded for tp_size=1"):
        PreferenceTrainer(tiny.model(), args, tiny.dataset(8), processing_class=tiny.tokenizer())


def test_fsdp_and_older_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(PreferenceConfig, "world_size", 2)
    args = config(tmp_path, objective="simpo", **TWO)
    for name, version, message in (
        ("_TRANSFORMERS", "99.0", "tensor parallelism needs transformers 99.0 or newer"),
        ("_PEFT", "98.0", "tensor parallelism needs peft 98.0 or newer"),
    ):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=message):
            patch.setattr(tensor_parallel, name, version)
            PreferenceTrainer("no such folder", args, tiny.dataset(8), peft_config=lora())
    monkeypatch.setattr(tensor_parallel, "mode_of", lambda args: "FSDP2")
    with pytest.raises(ValueError, match="not supported together with FSDP2"):
        PreferenceTrainer("no such folder", args, tiny.dataset(8))


def test_reward_models(tmp_path):
    with pytest.raises(ValueError, match="not supported for reward models: leave it out"):
        RewardConfig(str(tmp_path), parallelism_config=ParallelismConfig(tp_size=2))


def test_sizes_by_each_way_to_say_them():
    plain = PreferenceConfig.__new__(PreferenceConfig)
    plain.parallelism_config = ParallelismConfig(tp_size=2)
    given = {"dtype": "bfloat16"}
    assert tensor_parallel.with_parallelism(given, plain, "name") == {
        **given,
        "distributed_config": {"tp_size": 2},
    }
    for own in ({"tp_size": 4}, {"distributed_config": DistributedConfig(tp_size=4)}):
        assert tensor_parallel.with_parallelism(own, plain, "name") == own
