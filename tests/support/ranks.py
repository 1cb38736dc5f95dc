"""Runs connected processes on this machine, for tests of what ranks share.

Each process gets the environment variables of torch.distributed (rank, world size, address, port),
with one OpenMP thread. The helper waits for all and returns their output.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from support.processes import environment


@contextmanager
def group_of_one() -> Iterator[dist.ProcessGroup]:
    """A process group with this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert dist.group.WORLD is not None
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def run_on_two_ranks(*arguments: str) -> list[str]:
    return run_on_ranks(2, *arguments)


def outcomes(module: str, folder: Path, ranks: int, names: list[str]) -> list[dict[str, Any]]:
    """Run cases of a module of `support` on so many ranks; returns what each saved, by case."""
    run_on_ranks(ranks, "-m", f"support.{module}", str(folder), *names)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(ranks)]


def run_on_ranks(count: int, *arguments: str) -> list[str]:
    """Run Python with these arguments (a script, or -m and a module) as so many ranks.

    Returns the output of each rank. If a rank fails, raises AssertionError with all outputs.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {
        **environment(),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    finally:
        # If one rank fails, the other one would wait for it forever.
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * count, "\n".join(outputs)
    return outputs
