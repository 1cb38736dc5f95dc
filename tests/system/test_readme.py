"""The README's Python runs as it is printed, on tiny stand-ins for what it downloads."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import datasets
import pytest
import torch

import prefkern
from prefkern.cli import __main__ as cli
from support import tiny

README = (Path(__file__).parent.parent.parent / "README.md").read_text()


def block(heading: str, language: str = "python") -> str:
    """The first block of a section."""
    section = README.split(f"## {heading}\n")[1].split("\n## ")[0]
    found = re.search(rf"```{language}\n(.*?)```", section, re.DOTALL)
    assert found, heading
    return found[1]


def test_operator():
    names: dict = {}
    exec(block("The operator"), names)
    plan = prefkern.last_plan()
    assert plan is not None and plan.structure == "one_pass" and plan.tokens == 4 * 100
    assert plan.workspace_bytes <= 64 * 2**20
    assert names["logps"].shape == (4, 128) and names["hidden"].grad.abs().max() > 0


def test_memory_and_operations(capsys):
    section = README.split("## Memory and operations\n")[1].split("\n## ")[0]
    plan_block, compile_block = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    names: dict = {}
    exec(plan_block, names)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["two_pass", "two_pass", "one_pass"]
    assert [float(line.split()[1]) for line in lines] == [8, 7.25, 6]
    if shutil.which("g++") is None:
        pytest.skip("torch.compile's own compiler needs g++ on a CPU")
    torch._dynamo.reset()
    exec(compile_block, names)
    assert names["hidden"].grad.abs().max() > 0


def test_loop():
    ids = torch.randint(3, 17, (4, 8))
    prompt = torch.zeros(4, 8, dtype=torch.bool)
    prompt[:, :2] = True
    model = tiny.model()
    names = {
        "torch": torch,
        "prefkern": prefkern,
        "model": model,
        "ref_model": tiny.model(),
        "input_ids": ids,
        "prompt_mask": prompt,
    }
    exec(block("The loss, in a loop of your own"), names)
    assert names["out"].loss.item() == pytest.approx(0.6931472, abs=1e-6)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("heading", "arguments"), [("The trainer", "learning_rate"), ("In TRL", '"out"')]
)
def test_trainer(tmp_path, monkeypatch, heading, arguments):
    if heading == "In TRL":
        pytest.importorskip("trl")
        # So that TRL sends nothing over the network.
        monkeypatch.setenv("CI", "1")
    folder = tmp_path / "model"
    tiny.model().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **keywords: tiny.dataset(6))
    monkeypatch.chdir(tmp_path)
    code = block(heading).replace("Qwen/Qwen3-0.6B", str(folder))
    # Where it runs and for how long is not the README's matter.
    options = 'use_cpu=True, bf16=False, report_to="none", max_steps=1'
    assert code.count(arguments) == 1
    code = code.replace(
        arguments,
        f"{arguments}, {options}" if heading == "In TRL" else f"{options}, {arguments}",
    )
    names: dict = {}
    exec(code, names)
    assert names["trainer"].state.global_step == 1
    expected = prefkern.objectives.build("adadpo", beta=0.1)
    assert repr(names["trainer"].loss_fn.objective) == repr(expected)


def test_classes_of_the_families_page():
    page = (Path(__file__).parent.parent.parent / "bench/FAMILIES.md").read_text()
    total, agree, refused = re.search(
        r"^(\d+) classes: (\d+) agrees, (\d+) refused, \d+ not run, 0 differs", page, re.MULTILINE
    ).groups()
    assert (
        f"Of its {total} such classes, built tiny, {agree} agree with their own logits, gradients "
        f"included, and {refused} are refused"
    ) in " ".join(README.split())


def test_shell_line(tmp_path, monkeypatch):
    line = shlex.split(block("The trainer", "sh"))
    assert line[:2] == ["prefkern", "train"]
    folder = tmp_path / "model"
    tiny.model().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    tiny.dataset(6).to_json(tmp_path / "pairs.jsonl")
    monkeypatch.chdir(tmp_path)
    argv = [str(folder) if word == "Qwen/Qwen3-0.6B" else word for word in line[1:]]
    extra = ["--use_cpu", "true", "--report_to", "none", "--max_steps", "1"]
    assert cli.main([*argv, *extra]) == 0
    assert (tmp_path / "out/adapter_config.json").exists()
