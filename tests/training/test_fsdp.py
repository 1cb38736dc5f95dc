"""FSDP on two ranks against one process: every gradient of every step, whole, and what is logged.

The ranks are gloo processes on a CPU (`support.fsdp`). One launch by torchrun runs all cases.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")

import transformers
from transformers.training_args import ParallelMode

from prefkern import PreferenceConfig, PreferenceTrainer
from prefkern.cli.train import _prepare
from prefkern.training.sharding import mode_of
from support import tiny
from support.ddp import RESUMES
from support.fsdp import (
    CASES,
    COMMANDS,
    LATER,
    LONG,
    SETTINGS_CASES,
    carried,
    command,
    later,
    launch,
    lora,
    outcome_of,
)
from support.resumed import STEPS
from support.training import assert_same_weights, config, made, weights

LN2 = math.log(2)
KINDS = ("FULL_STATE_DICT", "SHARDED_STATE_DICT")


@pytest.fixture(scope="module")
def ranks(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    tiny.model().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    made(tiny.pairs(8)).to_json(folder / "pairs.jsonl")
    cases = [case for case in CASES if _runs(case, request.config)]
    launch(folder, 2, *cases, *SETTINGS_CASES, "found again", "later", "commands", "other kind")
    return folder


def _runs(case: str, config: pytest.Config) -> bool:
    return case not in LONG or config.getoption("--long")


def outcomes(folder: Path, case: str) -> list[dict]:
    return [torch.load(folder / f"rank{rank}.pt")[case] for rank in range(2)]


def assert_same_runs(folder: Path, case: str) -> None:
    expected = outcome_of(folder / "one process", case, ranks=1)
    # FSDP2 casts weights, autocast casts operands: in bfloat16 the two round at other places.
    tolerance = 0.1 if "bf16" in case else 1e-5
    for outcome in outcomes(folder, case):
        assert len(outcome["steps"]) == len(expected["steps"]) == 2
        # Between steps no rank holds more of a reference than its shards.
        assert outcome["gathered"] == []
        for mine, joint in zip(outcome["steps"], expected["steps"], strict=True):
            assert mine["gradients"].keys() == joint["gradients"].keys()
            pushed = 0
            for name, gradient in joint["gradients"].items():
                scale = gradient.norm().clamp(min=1e-4)
                assert (mine["gradients"][name] - gradient).norm() <= tolerance * scale, name
                pushed += bool(gradient.norm() > 1e-3)
            assert pushed >= len(joint["gradients"]) / 3
        for mine, joint in zip(outcome["logs"], expected["logs"], strict=True):
            # A count of margins above 0, which rounding decides for a pair in bfloat16.
            counts = {name for name in joint if "bf16" in case and name.endswith("accuracies")}
            times = {name for name in joint if name.endswith(("epoch", "time", "per_second"))}
            for name in joint.keys() - counts - times:
                assert mine[name] == pytest.approx(joint[name], rel=tolerance, abs=tolerance), name
    if outcome["is_own_reference"]:
        assert outcome["logs"][0]["loss"] == pytest.approx(LN2, abs=1e-6)


@pytest.mark.parametrize("case", [*CASES, *SETTINGS_CASES])
@pytest.mark.long(case=[*LONG])
def test_gradients_are_those_of_the_joint_batch(ranks, case):
    assert_same_runs(ranks, case)


def test_ranks_find_the_sums_of_an_earlier_run(ranks):
    """Rank 0 alone hashes the weights, before they are sharded, and forgets the probe it took."""
    for outcome in outcomes(ranks, "found again"):
        assert outcome["batches"] == [1, 0]
        assert outcome["probed"] == [False, False]
        assert torch.equal(*outcome["sums"])
        assert outcome["losses"] == [pytest.approx(LN2, abs=1e-6)] * 2


def test_evaluation_of_datasets_that_come_after_training(ranks, tmp_path):
    for outcome in outcomes(ranks, "later"):
        found = dict(zip(LATER, outcome, strict=True))
        refused = found.pop("full")
        assert "training has changed: pass this dataset to the constructor" in refused
        for case, loss in found.items():
            expected = later(tmp_path / case, case, per_device_train_batch_size=4)
            assert loss == pytest.approx(expected, rel=1e-5)


def test_checkpoints_of_the_other_kind_are_refused_on_every_rank(ranks):
    """Where rank 0 alone misses a file, the others would wait for it."""
    for refused in outcomes(ranks, "other kind"):
        for message, saved, wanted in zip(refused, KINDS, KINDS[::-1], strict=True):
            assert f"was saved with fsdp_state_dict_type {saved}" in message
            assert message.endswith(f"this run has {wanted}: set {saved}")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_ends_with_what_one_process_loads(ranks, name):
    first, second = (outcome[name] for outcome in outcomes(ranks, "commands"))
    assert first[0] == second[0] == 0
    folder = ranks / name
    assert f"saved to {folder}" in first[1] and "saved to" not in second[1]
    # Checkpoints stay in shards.
    assert [*(folder / "checkpoint-2").glob("pytorch_model_fsdp_0/*.distcp")]
    load = transformers.AutoModelForCausalLM.from_pretrained
    if name == "lora":
        found = peft.PeftModel.from_pretrained(load(ranks / "model"), folder)
    else:
        found, info = load(folder, output_loading_info=True)
        assert not any(info.values())
        assert found.config.architectures == ["LlamaForCausalLM"]
    assert transformers.AutoTokenizer.from_pretrained(folder).chat_template
    expected = one_process(ranks, name)
    tolerance = 1e-2 if "precomputed" in name else 1e-5
    assert_same_weights(weights(found), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.long
@pytest.mark.skipif(not RESUMES, reason="this transformers loads no optimiser on two CPU ranks")
def test_two_ranks_resume_bit_for_bit(tmp_path):
    launch(tmp_path, 2, "resumed")
    for outcome in outcomes(tmp_path, "resumed"):
        assert len(outcome) == 4
        for whole, resumed in outcome.values():
            assert whole["steps"] == resumed["steps"] == STEPS // 2
            assert_same_weights(whole["weights"], resumed["weights"], atol=0, rtol=0)
            assert whole["logs"] == resumed["logs"]


def one_process(folder: Path, name: str) -> dict:
    """The weights of the same command on one process."""
    options = {"output_dir": folder / f"{name}, one process", "per_device_train_batch_size": 4}
    run, _ = _prepare(command(folder, name, **options))
    run.train()
    return weights(run.model)


REFERENCES = {
    "given": {"ref_model": "no/reference"},
    "named": {"ref_model_name_or_path": "no/reference"},
    "copied": {},
    "adapter off": {"peft_config": lora()},
    "precomputed": {"precompute_ref_log_probs": True},
}


def test_references_that_fsdp1_does_not_compute_are_refused_before_anything_is_loaded(tmp_path):
    given = {"fsdp_plugin_args": {"fsdp_version": 1}}

    def fails(error, rows=None, ref_model=None, peft_config=None, given=given, **options) -> str:
        args = config(tmp_path, **{"objective": "dpo", **options})
        # Given to the constructor, they would have transformers look for other processes.
        vars(args).update(given)
        assert mode_of(args) == f"FSDP{given['fsdp_plugin_args']['fsdp_version']}"
        with pytest.raises(error) as raised:
            PreferenceTrainer(
                "no/model",
                args,
                tiny.dataset(4) if rows is None else rows,
                processing_class=tiny.tokenizer(),
                ref_model=ref_model,
                peft_config=peft_config,
            )
        return str(raised.value)

    for options in REFERENCES.values():
        said = fails(ValueError, **options)
        assert "under FSDP1" in said
        assert "use FSDP2 (fsdp_config={'version': 2}, or accelerate launch" in said
    # Of TDPO the sums are no reference.
    said = fails(ValueError, carried(), objective="tdpo1")
    assert "TDPO is not supported under FSDP1: use FSDP2" in said and "ZeRO or DDP" in said
    # What needs no reference, or has it, or another mode, goes on to be loaded.
    fails(OSError, objective="simpo")
    fails(OSError, carried())
    fails(OSError, given={"fsdp_plugin_args": {"fsdp_version": 2}})
    fails(OSError, given={"fsdp_plugin_args": {"fsdp_version": 2}}, objective="tdpo1")


def test_how_a_launcher_shards(tmp_path, monkeypatch):
    args = config(tmp_path)
    assert mode_of(args) is None
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert mode_of(args) is None
    monkeypatch.setattr(PreferenceConfig, "parallel_mode", ParallelMode.DISTRIBUTED)
    assert mode_of(args) == "FSDP1"
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert mode_of(args) == "FSDP2"
    # Trainer's arguments have a plugin, whether they or the launcher name DeepSpeed.
    args.deepspeed_plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 3}})
    assert mode_of(args) == "ZeRO-3"


@pytest.mark.long
def test_fsdp1_without_a_reference_and_with_carried_sums(tmp_path):
    cases = ("full, none", "full, carried", "lora, none", "lora, carried")
    launch(tmp_path, 1, *cases, "refused")
    for case in cases:
        assert_same_runs(tmp_path, case)
    for message in outcomes(tmp_path, "refused"):
        assert message.startswith("no reference is computed under FSDP1")
