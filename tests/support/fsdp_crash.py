"""Two ranks under FSDP2 of which one or both die while they save; then a run that goes on from there.

One process imports the packages and forks every pair of ranks. A moment is a function that gets a
trainer and arranges a SIGKILL of its own process at a point of the save. The other rank
then finds its peer gone, and must not finish the checkpoint alone.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.distributed.checkpoint import FileSystemWriter

from prefkern.training import checkpoint_files, checkpoints
from support import zero
from support.fsdp import SETTINGS, VERSIONS, fsdp_on_cpus, weights_and_gradients
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
from support.resumed import logs_of, run_of
from support.training import assert_same_weights

# Makes a run: a folder, the name of the run, how it saves, and options.
Make = Callable[..., Any]
RANKS = 2
STEPS = 6
FULL, SHARDED = "FULL_STATE_DICT", "SHARDED_STATE_DICT"


def in_a_shard(trainer: Any) -> None:
    """Kill when this rank's file has half of its bytes; `.metadata`, which rank 0 writes, is not there."""
    write = FileSystemWriter.write_data

    def write_half(self, *args, **kwargs):
        written = write(self, *args, **kwargs)
        if at_step(trainer):
            written.wait()
            [path] = Path(self.path).glob(f"__{trainer.args.process_index}_*.distcp")
            os.truncate(path, path.stat().st_size // 2)
            kill()
        return written

    FileSystemWriter.write_data = write_half


def before_the_metadata(trainer: Any) -> None:
    on_call(FileSystemWriter, "finish", lambda *_: at_step(trainer) and kill())


def before_metadata_of_the_optimizer(trainer: Any) -> None:
    def look(writer, *_):
        if at_step(trainer) and Path(writer.path).name == "optimizer_0":
            kill()

    on_call(FileSystemWriter, "finish", look)


def before_the_last_barrier(trainer: Any) -> None:
    """This rank has written all of its files, and does not say so."""
    save = transformers.Trainer._save_checkpoint

    def save_and_die(self, *args, **kwargs):
        save(self, *args, **kwargs)
        if at_step(trainer):
            kill()

    transformers.Trainer._save_checkpoint = save_and_die


def while_deleting(trainer: Any) -> None:
    """Kill when one file of an older checkpoint's weights is deleted, and the others are not."""

    def delete(path, **_):
        for weights in (*Path(path).rglob("*.distcp"), *Path(path).rglob("*fsdp.bin")):
            weights.unlink()
            kill()

    def arrange(*_):
        if at_step(trainer):
            shutil.rmtree = delete

    on_call(checkpoints, "delete_oldest", arrange)


BOTH = range(RANKS)
# What happens, on which ranks, to which run, how it saves, and the step that it is resumed from.
MOMENTS: dict[str, tuple[Callable, Any, str, str, int]] = {
    "before all files": (before_all_files, BOTH, "lora", SHARDED, BEFORE),
    "in the first rank's shard": (in_a_shard, [0], "lora", SHARDED, BEFORE),
    "in the second rank's shard": (in_a_shard, [1], "alphadpo", SHARDED, BEFORE),
    "in both shards": (in_a_shard, BOTH, "alphadpo", SHARDED, BEFORE),
    "before the metadata": (before_the_metadata, [0], "alphadpo", SHARDED, BEFORE),
    "before the optimizer's metadata": (
        before_metadata_of_the_optimizer,
        [0],
        "alphadpo",
        SHARDED,
        BEFORE,
    ),
    "in the whole weights": (in_weights, [0], "alphadpo", FULL, BEFORE),
    "in FSDP's weights": (in_torch_file("pytorch_model_fsdp.bin"), [0], "lora", FULL, BEFORE),
    "in the whole optimizer's state": (in_torch_file("optimizer.bin"), [0], "lora", FULL, BEFORE),
    "between weights and optimizer": (
        between_weights_and_optimizer,
        [1],
        "alphadpo",
        FULL,
        BEFORE,
    ),
    "in the second rank's random states": (
        in_torch_file("rng_state_1.pth"),
        [1],
        "alphadpo",
        FULL,
        BEFORE,
    ),
    "in the trainer's state": (in_trainer_state, [0], "lora", SHARDED, BEFORE),
    "before the last barrier": (before_the_last_barrier, [1], "lora", SHARDED, BEFORE),
    "before the rename": (before_the_rename, [0], "lora", SHARDED, BEFORE),
    "after the rename": (after_the_rename, [0], "alphadpo", SHARDED, LAST),
    "while an older one is deleted": (while_deleting, [0], "alphadpo", SHARDED, LAST),
    "while an older, whole one is deleted": (while_deleting, [0], "alphadpo", FULL, LAST),
}


def folder_of(moment: str) -> str:
    """A folder named by the moment's number, since names are long and have an apostrophe."""
    return str([*MOMENTS].index(moment))


def made(folder: Path, case: str, kind: str, **options: Any) -> Any:
    """A run; every rank sets the state dict type first."""
    os.environ["FSDP_STATE_DICT_TYPE"] = kind
    torch.manual_seed(17)
    # 14 pairs, 2 a rank and batch, 2 batches a step: 2 steps an epoch.
    return run_of(folder, case, **{**SAVING, "num_train_epochs": 3}, **options)


def killed(folder: Path, make: Make, moment: tuple) -> None:
    arrange, who, case, kind, _ = moment
    run = make(folder, case, kind)
    if run.args.process_index in who:
        arrange(run)
    run.train()


def finished(folder: Path, make: Make, case: str, kind: str, resumes: bool) -> None:
    """A run from the start or from the last whole checkpoint; each rank keeps what it saw."""
    begun = []

    class Begin(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            begun.append(state.global_step)

    run = make(folder, case, kind, callbacks=[Begin()])
    run.train(resume_from_checkpoint=True if resumes else None)
    found = {
        "begun": begun,
        "step": run.state.global_step,
        "best": run.state.best_global_step,
        "weights": weights_of(run.model),
        "logs": logs_of(run),
        "objective": str(run.loss_fn.objective.state_dict()),
    }
    torch.save(found, folder / f"found{run.args.process_index}.pt")


def on_ranks(what: Callable[..., None], *args: Any, patience: float = 60) -> list[int]:
    """Call it on forked ranks. How each ended: its exit status, or minus the signal that killed it.

    Once a rank has ended otherwise than well, the others have `patience` seconds.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(RANKS)}
    children = {}
    for rank in range(RANKS):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            _rank(what, *args)
        children[child] = rank
    ended: dict[int, int] = {}
    deadline = float("inf")
    while len(ended) < RANKS:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child == 0:
            if time.monotonic() > deadline:
                for each, rank in children.items():
                    if rank not in ended:
                        os.kill(each, signal.SIGKILL)
                deadline = float("inf")
            time.sleep(0.02)
            continue
        ended[children[child]] = os.waitstatus_to_exitcode(status)
        if ended[children[child]] != 0:
            deadline = time.monotonic() + patience
    return [ended[rank] for rank in range(RANKS)]


def _rank(what: Callable[..., None], *args: Any) -> None:
    status = 1
    try:
        what(*args)
        torch.distributed.destroy_process_group()
        status = 0
    except (Exception, SystemExit) as error:  # noqa: BLE001
        print(f"{what.__name__}, {args[2:]}: {type(error).__name__}: {error}", file=sys.stderr)
    finally:
        # Nothing of the parent's is run.
        sys.stderr.flush()
        os._exit(status)


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    """Of every trained parameter, whole: of FSDP2's, or of DeepSpeed's."""
    if any(hasattr(each, "device_mesh") for each in model.parameters()):
        return weights_and_gradients(model)["weights"]
    return zero.weights(model)


def try_moments(folder: Path, moments: dict[str, tuple], make: Make, names: list[str]) -> None:
    """Runs that are killed at these moments and then resumed, and those that are not."""
    for case, kind in sorted({moments[name][2:4] for name in names}):
        whole = folder / f"{case}, {kind}"
        whole.mkdir()
        assert on_ranks(finished, whole, make, case, kind, False) == [0] * RANKS
    for moment in names:
        _, who, case, kind, _ = moments[moment]
        left = folder / str([*moments].index(moment))
        left.mkdir()
        statuses = on_ranks(killed, left, make, moments[moment])
        # Of two that die, one may see first that the other is gone.
        assert any(statuses[rank] == -signal.SIGKILL for rank in who), (moment, statuses)
        assert 0 not in statuses, (moment, statuses)
        # As it was found, before another run.
        problems = {
            path.name: checkpoint_files.problem(path) for path in sorted(left.glob("checkpoint-*"))
        }
        torch.save(problems, left / "problems.pt")
        assert on_ranks(finished, left, make, case, kind, True) == [0] * RANKS, moment


def main(folder: Path, moments: list[str]) -> None:
    torch.set_num_threads(1)
    os.environ |= {**SETTINGS, **VERSIONS[2]}
    fsdp_on_cpus()
    try_moments(folder, MOMENTS, made, moments)


def assert_went_on(folder: Path, of_whole: Path, step: int) -> None:
    """A run that was killed, and resumed from a step, is bit for bit the one that was not.

    Args:
        folder, of_whole: of the killed run, and of the other.
    """
    # A folder had a checkpoint's name only if it was complete.
    left = torch.load(folder / "problems.pt")
    assert f"checkpoint-{step}" in left
    assert set(left.values()) == {None}
    for rank in range(RANKS):
        resumed = torch.load(folder / f"found{rank}.pt")
        whole = torch.load(of_whole / f"found{rank}.pt")
        assert (resumed["begun"], whole["begun"]) == ([step], [0])
        assert resumed["step"] == whole["step"] == STEPS
        assert resumed["logs"] == whole["logs"]
        assert resumed["objective"] == whole["objective"]
        assert_same_weights(resumed["weights"], whole["weights"], atol=0, rtol=0)
    # Nothing of what was interrupted is left; at a limit of one, the best and the last.
    names = {path.name for path in folder.iterdir() if path.name.startswith((".", "check"))}
    assert names == {f"checkpoint-{each}" for each in (resumed["best"], STEPS)}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
