"""A run that is killed while it saves goes on from its last complete checkpoint, bit for bit.

The kill is a real SIGKILL in a separate process. A replaced function chooses the moment: between
two files, in the middle of one, between two renames, while an older checkpoint is deleted. One
script forks all of these processes, so that packages are imported once.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")

from prefkern.training import checkpoint_files, checkpoints
from support.killed import (
    BEFORE,
    LAST,
    SAVING,
    after_the_rename,
    at_step,
    before_all_files,
    before_the_rename,
    between_weights_and_optimizer,
    in_torch_file,
    in_trainer_state,
    in_weights,
    kill,
    on_call,
)
from support.processes import PYTHONPATH
from support.resumed import assert_same_runs, run_of


def while_deleting(trainer):
    """Kill when an older checkpoint's weights are deleted, and its other files are not."""

    def delete(path, **_):
        for weights in Path(path).rglob("model.safetensors"):
            weights.unlink()
            kill()

    def arrange(*_):
        if at_step(trainer):
            shutil.rmtree = delete

    on_call(checkpoints, "delete_oldest", arrange)


def between_two_renames(trainer):
    """An earlier run has left a folder of that name; kill after it was moved away."""
    delete = checkpoint_files._delete

    def delete_and_die(path):
        delete(path)
        if at_step(trainer) and path.name == taken:
            kill()

    taken = f"checkpoint-{LAST}"
    earlier = Path(trainer.args.output_dir) / taken

    def make_earlier(*_):
        if at_step(trainer):
            earlier.mkdir()
            (earlier / "model.safetensors").write_bytes(b"another run's")

    on_call(trainer, "_save_checkpoint", make_earlier)
    checkpoint_files._delete = delete_and_die


def folder_of(moment: str) -> str:
    """A folder named by the moment's number, since names are long and have an apostrophe."""
    return str([*MOMENTS].index(moment))


# What happens, to which run, and the step that it is resumed from.
MOMENTS = {
    "before all files": (before_all_files, "betadpo, composed", BEFORE),
    "in the weights": (in_weights, "betadpo, composed", BEFORE),
    "in an adapter's weights": (in_weights, "lora", BEFORE),
    "between weights and optimizer": (between_weights_and_optimizer, "lora", BEFORE),
    "in the optimizer's state": (in_torch_file("optimizer.pt"), "betadpo, composed", BEFORE),
    "in the schedule's state": (in_torch_file("scheduler.pt"), "lora", BEFORE),
    "in the objective's state": (in_torch_file("objective.pt"), "betadpo, composed", BEFORE),
    "in what is not logged": (in_torch_file("since_last_log.pt"), "lora", BEFORE),
    "in the random states": (in_torch_file("rng_state.pth"), "lora", BEFORE),
    "in the trainer's state": (in_trainer_state, "betadpo, composed", BEFORE),
    "before the rename": (before_the_rename, "lora", BEFORE),
    "between two renames": (between_two_renames, "betadpo, composed", LAST),
    "after the rename": (after_the_rename, "lora", LAST),
    "while an older one is deleted": (while_deleting, "betadpo, composed", LAST),
}
# Another file, another run's file or another side of what the others are of.
LONG = [
    "before all files",
    "in the weights",
    "between weights and optimizer",
    "in the optimizer's state",
    "in the schedule's state",
    "in the random states",
    "in the trainer's state",
    "after the rename",
]


@pytest.fixture(scope="module")
def moments(request) -> tuple[str, ...]:
    every = request.config.getoption("--long")
    return tuple(moment for moment in MOMENTS if every or moment not in LONG)


@pytest.fixture(scope="module")
def killed(moments, tmp_path_factory) -> Path:
    """The folders that killed runs left, by the moment's number."""
    folder = tmp_path_factory.mktemp("killed")
    environment = {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(
        [sys.executable, __file__, str(folder), *moments],
        env=environment,
        timeout=400,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def whole(moments, tmp_path_factory) -> dict:
    """Runs that were not killed, by case."""
    runs = {}
    for case in {MOMENTS[moment][1] for moment in moments}:
        runs[case] = run_of(tmp_path_factory.mktemp("whole"), case, **SAVING)
        runs[case].train()
    return runs


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.long(moment=LONG)
def test_killed_and_resumed(killed, whole, moment):
    _, case, step = MOMENTS[moment]
    folder = killed / folder_of(moment)
    begun = []

    class Begin(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            begun.append(state.global_step)

    torch.manual_seed(17)
    resumed = run_of(folder, case, **SAVING, callbacks=[Begin()])
    resumed.train(resume_from_checkpoint=True)
    assert begun == [step]
    assert_same_runs(resumed, whole[case])
    # Nothing of what was interrupted is left; at a limit of one, the best and the last.
    left = sorted(path.name for path in folder.iterdir() if path.name.startswith((".", "check")))
    kept = {resumed.state.best_global_step, resumed.state.global_step}
    assert left == sorted(f"checkpoint-{step}" for step in kept)
    assert not any(checkpoint_files.problem(folder / each) for each in left)


def test_what_reading_the_killed_runs_shows(moments, killed):
    """A folder has a checkpoint's name only if it is complete."""
    for moment in moments:
        for path in (killed / folder_of(moment)).glob("checkpoint-*"):
            assert checkpoint_files.problem(path) is None, (moment, path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for moment in sys.argv[2:]:
        arrange, case, _ = MOMENTS[moment]
        child = os.fork()
        if child == 0:
            run = run_of(Path(sys.argv[1]) / folder_of(moment), case, **SAVING)
            arrange(run)
            run.train()
            os._exit(3)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (moment, status)
