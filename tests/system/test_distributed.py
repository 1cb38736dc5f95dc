"""The files of examples/distributed: each starts `prefkern train` on ranks of a CPU, as it starts GPUs.

The command is `support.launched`, which says what it patches. What a run ends with is loaded on one
process, and compared with a run of one process on the joint batch.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")

import transformers

from prefkern.cli.train import _prepare
from support import tiny
from support.command_line import flags
from support.processes import ROOT, environment
from support.training import made, weights
from support.versions import PARALLELISM

FOLDER = ROOT / "examples" / "distributed"
PAGE = ROOT / "docs" / "distributed.md"
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
SHORT = {
    "max_steps": 2,
    "learning_rate": 0.1,
    "optim": "sgd",
    "save_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    tiny.model().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    made(tiny.pairs(8)).to_json(folder / "pairs.jsonl")
    return folder


def options(folder: Path, name: str, pairs: int, **given) -> list[str]:
    paths = {"model_name_or_path": folder / "model", "dataset": folder / "pairs.jsonl"}
    given = {**SHORT, "objective": "dpo", "output_dir": folder / name, **given}
    return flags({**paths, "per_device_train_batch_size": pairs, **given})


def ran(command: list[str], **settings: str) -> str:
    given = {**environment(), "PYTHONWARNINGS": "ignore", **settings}
    done = subprocess.run(
        command, env=given, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def report(said: str) -> dict:
    [line] = re.findall(r'^\{"ranks".*\}$', said, re.MULTILINE)
    return json.loads(line)


def assert_trained_as_on_one_process(
    folder: Path, name: str, rounding: float = 0.0, **given
) -> None:
    """Within the rounding of bfloat16, in which the files train."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    if "lora_r" in given:
        found = peft.PeftModel.from_pretrained(load(folder / "model"), folder / name)
    else:
        found, info = load(folder / name, output_loading_info=True)
        assert not any(info.values())
    weights_found = weights(found)
    run, _ = _prepare(options(folder, f"{name}, one process", 4, bf16=True, **given))
    before = weights(run.model)
    run.train()
    moved = []
    for weight, expected in weights(run.model).items():
        moved.append((expected - before[weight]).norm())
        allowed = 0.1 * moved[-1] + 1e-4 + rounding * expected.norm()
        assert (weights_found[weight] - expected).norm() <= allowed, weight
    assert max(moved) > 1e-2


@pytest.mark.parametrize("given", [{}, {"lora_r": 4}], ids=["full", "lora"])
@pytest.mark.long(given=[{"lora_r": 4}])
def test_fsdp2(files, given):
    name = f"fsdp2, {len(given)}"
    launch = [*ACCELERATE, "--config_file", str(FOLDER / "fsdp2.yaml"), "--num_processes", "2"]
    launch += ["--main_process_port", "0", "-m", "support.launched", "train"]
    said = ran([*launch, *options(files, name, 2, **given)])
    found = report(said)
    # Two layers are units of their own, with the embeddings, the head and the whole.
    assert found.pop("units") >= 3
    assert found == {"ranks": 2, "mesh": [2], "stage": None, "bf16": True}
    assert [*(files / name / "checkpoint-2").glob("pytorch_model_fsdp_0/*.distcp")]
    assert_trained_as_on_one_process(files, name, **given)


@PARALLELISM.needed
def test_several_nodes_by_slurm_with_hsdp(files, tmp_path):
    """Two machines of two ranks: Slurm's commands are stand-ins, and the script is run as it is."""
    fakes = {
        # Line by line: a script that stops reading after the first one must not end by that.
        "scontrol": '[ "$*" = "show hostnames two-nodes" ] && echo 127.0.0.1 && sleep 0.5 && echo other',
        # A task on each machine.
        "srun": 'SLURM_NODEID=1 "$@" & SLURM_NODEID=0 "$@" && wait $!',
        "accelerate": f'shift; exec {" ".join(ACCELERATE)} "${{@/prefkern.cli/support.launched}}"',
    }
    for name, text in fakes.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "two-nodes", "GPUS": "2"}
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    script = str(FOLDER / "several-nodes.sbatch")
    port = str(20000 + os.getpid() % 20000)
    said = ran(
        ["bash", script, *options(files, "hsdp", 1)],
        **slurm,
        PATH=path,
        PORT=port,
    )
    found = report(said)
    assert found.pop("units") >= 3
    assert found == {"ranks": 4, "mesh": [2, 2], "stage": None, "bf16": True}
    assert_trained_as_on_one_process(files, "hsdp")


def test_torchrun(files):
    """The page's line, with fewer ranks."""
    [line] = re.findall(r"^torchrun .*$", PAGE.read_text(), re.MULTILINE)
    line = line.replace("--nproc-per-node 8", "--standalone --nproc-per-node 2")
    line = line.replace("prefkern.cli", "support.launched").replace("run.yaml", '"$@"')
    line = line.replace("torchrun", f"{sys.executable} -m torch.distributed.run", 1)
    said = ran(["bash", "-c", line, "-", *options(files, "torchrun", 2, bf16=True)])
    found = report(said)
    assert found.pop("units") >= 3
    assert found == {"ranks": 2, "mesh": [2], "stage": None, "bf16": True}
    assert_trained_as_on_one_process(files, "torchrun")


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
@pytest.mark.parametrize("stage", [2, 3])
def test_zero(files, stage):
    name = f"zero{stage}"
    launch = [*ACCELERATE, "--config_file", str(FOLDER / f"{name}.yaml"), "--num_processes", "2"]
    launch += ["--main_process_port", "0", "-m", "support.launched", "train"]
    said = ran([*launch, *options(files, name, 2, lora_r=4, bf16=True)], DS_ACCELERATOR="cpu")
    found = report(said)
    assert (found["ranks"], found["stage"], found["bf16"]) == (2, stage, True)
    # DeepSpeed saves its weights in bfloat16.
    assert_trained_as_on_one_process(files, name, rounding=2.0**-8, lora_r=4)


def test_the_page_and_the_files_name_one_another():
    page = PAGE.read_text()
    for path in FOLDER.iterdir():
        assert f"../examples/distributed/{path.name}" in page
        for line in re.findall(r"^#   (\S.*)$", path.read_text(), re.MULTILINE):
            assert f"\n{line}\n" in page, line
    script = FOLDER / "several-nodes.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    # What the script starts on each machine is what the page says it does.
    [launch] = re.findall(r"srun bash -c '(.*?) \"\$@\"'", script.read_text(), re.DOTALL)
    assert re.sub(r"\s*\\\n\s*", " ", launch) in page


@pytest.mark.parametrize("count", [1, 2])
def test_processes_that_were_not_started(files, count):
    launch = [*ACCELERATE, "--cpu", "--num_processes", str(count), "-m", "prefkern.cli", "train"]
    given = {"max_steps": 1, "save_strategy": "no", "save_steps": 500}
    said = ran([*launch, *options(files, f"cpu, {count}", 2, **given)])
    warned = "was asked for more than one process and started this one alone" in said
    assert warned == (count == 2)
    assert ("torchrun --nproc-per-node N starts N processes" in said) == warned


def test_tasks_that_do_not_know_one_another(caplog, monkeypatch):
    from prefkern.training.launched import warn_of_missing_processes

    for tasks, world_size, warns in (("1", 1, False), ("4", 4, False), ("4", 1, True)):
        caplog.clear()
        monkeypatch.setenv("SLURM_STEP_NUM_TASKS", tasks)
        warn_of_missing_processes(world_size)
        assert ("srun started 4 tasks, and this one trains by itself" in caplog.text) == warns
