"""Reward models under FSDP2 on two ranks against one process: gradients, rewards, `prefkern margins`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("peft")

from prefkern.cli import __main__ as cli
from support import tiny
from support.fsdp import launch
from support.fsdp_rewards import CASES, COMMANDS, command, outcome_of
from support.training import made


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    tiny.model().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    made(tiny.pairs(25)).to_json(folder / "pairs.jsonl")
    launch(folder, 2, *CASES, *COMMANDS, module="fsdp_rewards")
    return folder


def outcomes(folder: Path, case: str) -> list:
    return [torch.load(folder / f"rank{rank}.pt")[case] for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_gradients_and_rewards_are_those_of_the_joint_batch(ranks, case):
    expected = outcome_of(ranks, case, 1)
    # FSDP2 casts weights, autocast casts operands: in bfloat16 the two round at other places.
    tolerance = 0.1 if "bf16" in case else 1e-5
    for outcome in outcomes(ranks, case):
        assert len(outcome["steps"]) == len(expected["steps"]) == 2
        for mine, joint in zip(outcome["steps"], expected["steps"], strict=True):
            assert mine["gradients"].keys() == joint["gradients"].keys()
            for name, gradient in joint["gradients"].items():
                scale = gradient.norm().clamp(min=1e-4)
                assert (mine["gradients"][name] - gradient).norm() <= tolerance * scale, name
        # Before training, and of the best model after it.
        for mine, joint in zip(outcome["rewards"], expected["rewards"], strict=True):
            assert mine.shape == (13, 2)
            torch.testing.assert_close(mine, joint, rtol=tolerance, atol=tolerance)
        for mine, joint in zip(outcome["logs"], expected["logs"], strict=True):
            names = {"loss", "eval_loss", "eval_accuracy", "eval_margin"} & joint.keys()
            for name in names - ({"eval_accuracy"} if "bf16" in case else set()):
                assert mine[name] == pytest.approx(joint[name], rel=tolerance, abs=tolerance), name


def test_margins_are_those_of_one_process(ranks):
    def margins(name: str) -> list[float]:
        return [json.loads(line)["margin"] for line in (ranks / name).read_text().splitlines()]

    for name in COMMANDS:
        assert outcomes(ranks, name) == [0, 0]
        assert len(margins(f"{name}.jsonl")) == 25
        if "again" in name:
            # One process, too, reads what was saved.
            output = ranks / f"{name}, one.jsonl"
            assert cli.main(["margins", *command(ranks, name, output=output)]) == 0
            expected = margins(f"{name.removesuffix(', again')}.jsonl")
            assert margins(output.name) == pytest.approx(expected, rel=1e-4, abs=1e-5)
        else:
            changes = {"output": ranks / f"{name}, one.jsonl", "output_dir": ranks / f"{name}, one"}
            argv = command(ranks, name, per_device_train_batch_size=4, **changes)
            assert cli.main(["margins", *argv]) == 0
            expected = margins(f"{name}, one.jsonl")
        assert margins(f"{name}.jsonl") == pytest.approx(expected, rel=1e-3, abs=1e-4)
