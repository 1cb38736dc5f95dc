"""ZeRO-2 and ZeRO-3 on two ranks against one process: gradients, weights, logs, what is saved.

The ranks are gloo processes on a CPU (`support.zero`), which torchrun starts. DeepSpeed is not among
the packages of `make test`: `make test-zero` installs it, in an environment of its own.
"""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: make test-zero")
peft = pytest.importorskip("peft")

import transformers

from prefkern.cli import __main__ as cli
from prefkern.cli.train import _prepare
from support import tiny
from support.command_line import flags
from support.fsdp import command, half_frozen, lora
from support.resumed import STEPS
from support.training import assert_same_weights, made, trainer, weights
from support.zero import (
    MARGINS,
    OTHERS,
    cases_of,
    commands_of,
    errors,
    launch,
    margins,
    outcome,
)

pytestmark = pytest.mark.long

LN2 = math.log(2)
STAGES = (2, 3)
# What has no reference, or another model for one.
_OTHER_REFERENCES = ("none", "carried", "reference", "kto", "draws", "head alone", "all but")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The outcome of a case on one process, which both stages are compared with."""
    folder, found = tmp_path_factory.mktemp("one"), {}

    def of(case: str) -> dict:
        if case not in found:
            found[case] = outcome(folder / case, case, ranks=1)
        return found[case]

    return of


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of a stage's runs, which are launched when the first test asks for them."""
    found: dict = {}

    def of(stage: int, *names: str) -> Path:
        if (stage, names) not in found:
            folder = tmp_path_factory.mktemp(f"zero{stage}")
            tiny.model().save_pretrained(folder / "model")
            tiny.tokenizer().save_pretrained(folder / "model")
            made(tiny.pairs(8)).to_json(folder / "pairs.jsonl")
            launch(folder, stage, *names)
            found[stage, names] = folder
        return found[stage, names]

    return of


def outcomes(folder: Path, case: str) -> list:
    return [torch.load(folder / f"rank{rank}.pt")[case] for rank in range(2)]


@pytest.mark.parametrize(
    ("stage", "case"), [(stage, case) for stage in STAGES for case in cases_of(stage)]
)
def test_gradients_are_those_of_the_joint_batch(runs, one_process, stage, case):
    cases = cases_of(stage)
    # Two launches, neither of which takes long.
    half = cases[: len(cases) // 2]
    folder = runs(stage, *(half if case in half else cases[len(half) :]))
    # DeepSpeed casts weights, autocast casts operands: in bfloat16 the two round at other places.
    tolerance = 0.1 if "bf16" in case else 1e-5
    for found in outcomes(folder, case):
        worst = errors(case, found, one_process(case))
        assert worst["still"] <= 2 / 3
        assert max(worst["gradients"], worst["weights"], worst["logs"]) <= tolerance
        if found["is_own_reference"] and not any(each in case for each in _OTHER_REFERENCES):
            assert found["logs"][0]["loss"] == pytest.approx(LN2, abs=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_four_ranks(one_process, tmp_path, stage):
    """A pair on each. Matrices of 4 rows on 4 ranks, and vectors, leave uneven parts."""
    cases = ("full, reference", "lora, adapter off", "lora, precomputed, evaluated first")
    launch(tmp_path, stage, *cases, count=4)
    for rank in range(4):
        found = torch.load(tmp_path / f"rank{rank}.pt")
        for case in cases:
            worst = errors(case, found[case], one_process(case))
            assert max(worst["gradients"], worst["weights"], worst["logs"]) <= 1e-5, (rank, case)


@pytest.mark.parametrize("stage", STAGES)
def test_ranks_find_the_sums_of_an_earlier_run(runs, stage):
    """Rank 0 alone hashes the weights, before an engine casts or shards them."""
    for found in outcomes(runs(stage, *OTHERS), "found again"):
        assert found["batches"] == [1, 0]
        assert torch.equal(*found["sums"])
        # Trainer would round the sums to bfloat16 on their way into the batch.
        assert found["losses"] == [pytest.approx(LN2, abs=1e-6)] * 2


@pytest.mark.parametrize("stage", STAGES)
def test_evaluation_before_and_after_training(runs, tmp_path, stage):
    run = trainer(tmp_path, peft_config=lora(), precompute_ref_log_probs=True)
    run.train()
    expected = run.evaluate(tiny.dataset(4, seed=4))["eval_loss"]
    for found in outcomes(runs(stage, *OTHERS), "later"):
        assert found["first"] == [pytest.approx(LN2, abs=1e-6)] * 3
        full, adapted, copied = found["losses"]
        assert "training has changed: pass this dataset to the constructor" in full
        assert adapted == pytest.approx(expected, rel=1e-5)
        if stage == 3:
            assert "the adapter's weights are sharded now" in copied
            assert "not supported as the reference yet under ZeRO-3" in found["copied"]
        else:
            assert copied > 0 and not found["copied"]


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_added_to_a_model_by_name_trains_as_on_one_that_is_given(runs, stage):
    for found in outcomes(runs(stage, *OTHERS), "added"):
        given, named = found["given"], found["named"]
        assert given["dtypes"] == named["dtypes"] == {torch.bfloat16}
        assert given["logs"][0]["loss"] == pytest.approx(LN2, abs=1e-6)
        assert given["logs"] == named["logs"]
        assert_same_weights(given["weights"], named["weights"], atol=0, rtol=0)


@pytest.mark.parametrize("name", MARGINS)
@pytest.mark.parametrize("stage", STAGES)
def test_margins_are_those_of_one_process(runs, tmp_path, stage, name):
    folder = runs(stage, *OTHERS)
    assert [each[name] for each in outcomes(folder, "margins")] == [0, 0]
    place = {"output_dir": tmp_path / "rewards", "output": tmp_path / "one.jsonl"}
    joint = {"per_device_train_batch_size": 2}
    assert cli.main(["margins", *margins(folder, name, **place, **joint)]) == 0
    mine, one = (
        [json.loads(line)["margin"] for line in path.open()]
        for path in (folder / f"{name}.jsonl", tmp_path / "one.jsonl")
    )
    # A margin of bfloat16 is a difference of two scores with 8 bits each.
    assert mine == pytest.approx(one, abs=0.1 if "bf16" in name else 1e-4)
    if "bf16" not in name:
        again = scores(folder / f"{name}, rewards", folder / "pairs.jsonl", tmp_path)
        assert mine == pytest.approx(again, abs=1e-4)


def scores(model: Path, pairs: Path, folder: Path) -> list[float]:
    """The margins of a saved reward model on one process."""
    file = folder / "again.jsonl"
    options = {"reward_model": model, "dataset": pairs, "output": file, "use_cpu": True}
    assert cli.main(["margins", *flags(options)]) == 0
    return [json.loads(line)["margin"] for line in file.open()]


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_resume_bit_for_bit(runs, stage):
    for found in outcomes(runs(stage, *OTHERS), "resumed"):
        assert len(found) == 2
        for whole, resumed in found.values():
            assert whole["steps"] == resumed["steps"] == STEPS // 2
            assert_same_weights(whole["weights"], resumed["weights"], atol=0, rtol=0)
            assert whole["logs"] == resumed["logs"]


@pytest.mark.parametrize(
    ("stage", "name"), [(stage, name) for stage in STAGES for name in commands_of(stage)]
)
def test_a_run_ends_with_what_one_process_loads(runs, stage, name):
    folder = runs(stage, *OTHERS)
    load = transformers.AutoModelForCausalLM.from_pretrained
    if name == "half frozen":
        run = trainer(folder / f"{name}, one", model=half_frozen(), count=4)
        run.train()
        found = peft.PeftModel.from_pretrained(tiny.model(), folder / name)
        assert_same_weights(weights(found), weights(run.model), atol=1e-5, rtol=1e-5)
        return
    first, second = (outcome[name] for outcome in outcomes(folder, "commands"))
    assert first[0] == second[0] == 0
    assert "saved" not in second[1]
    place = folder / name
    if name == "shards":
        assert f"saved in shards to {place}" in first[1]
        join = shlex.split(first[1].splitlines()[-1])
        assert join[0] == "python" and not [*place.glob("*.safetensors")]
        subprocess.run([sys.executable, *join[1:]], check=True)
    else:
        assert f"saved to {place}" in first[1]
    assert [*(place / "checkpoint-2").glob("global_step2/*.pt")]
    history = json.loads((place / "trainer_state.json").read_text())["log_history"]
    assert history[0]["loss"] == pytest.approx(LN2, abs=1e-6)
    if name == "lora":
        found = peft.PeftModel.from_pretrained(load(folder / "model"), place)
    else:
        found, info = load(place, output_loading_info=True, dtype=torch.float32)
        assert not any(info.values())
        assert found.config.architectures == ["LlamaForCausalLM"]
    assert transformers.AutoTokenizer.from_pretrained(place).chat_template
    same = "full" if name == "shards" else name
    options = {"output_dir": folder / f"{name}, one", "per_device_train_batch_size": 4}
    run, _ = _prepare(command(folder, same, **options))
    run.train()
    tolerance = 1e-2 if "precomputed" in name else 1e-5
    assert_same_weights(weights(found), weights(run.model), atol=tolerance, rtol=tolerance)
