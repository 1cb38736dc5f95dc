"""Runs a part of a stage: one command in a process of its own, with a limit of time, to a record.

Nothing that the command does reaches the caller: it may fail, end without a result, or hang. At its
limit it is interrupted, so that it can still write what it has (pytest does), and soon after that
it is killed with all processes that it began. The record is what JSON takes:

    status   "done" | "failed" | "out of time" | "no time" | "absent": this machine lacks what the
             part needs
    error    why there is no result, or only a part of one, in some lines; None when it is done
    result   what the command wrote; None if it wrote nothing
    seconds, limit, exit_status, command
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compatibility import outcomes
from gpu_day.stages import RESULT, Part

ROOT = Path(__file__).parent.parent.parent
# Of a limit, what is left for an interrupted command to write its result.
GRACE = 4.0
# Lines of output that a record keeps.
KEPT = 40
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def run(part: Part, limit: float, environment: dict[str, str]) -> dict[str, Any]:
    """Run a part, for at most `limit` seconds; its record."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="prefkern-gpu-") as folder:
        result = Path(folder) / "result"
        command = [word.replace(RESULT, str(result)) for word in part.command]
        with open(Path(folder) / "output", "w+b") as output:
            status = _watched(command, limit, {**environment, **part.environment}, output)
            output.seek(0)
            said = _last_lines(output.read().decode(errors="replace"))
        found, unread = _read(result, part.reads)
    record = {
        "status": "done",
        "error": None,
        "seconds": round(time.monotonic() - begin, 1),
        "limit": round(limit, 1),
        "exit_status": status,
        "command": _shown(part),
        "result": found,
        "output": said,
    }
    if status is None:
        record |= {"status": "out of time", "error": f"stopped after {limit:.0f} s"}
    elif status == part.absent:
        record |= {"status": "absent", "error": said[-1] if said else f"exit status {status}"}
    elif status != 0 or unread:
        why = f"exit status {status}" if status else unread
        record |= {"status": "failed", "error": "\n".join([why, *said[-8:]])}
    return record


def not_begun(part: Part) -> dict[str, Any]:
    """The record of a part that found no time."""
    return {"status": "no time", "error": None, "command": _shown(part), "result": None}


def _shown(part: Part) -> str:
    return shlex.join(["python", *part.command])


@contextlib.contextmanager
def _interrupts_heeded() -> Iterator[None]:
    """What starts in here heeds an interrupt, which a shell has its background jobs ignore."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _watched(
    command: list[str], limit: float, environment: dict[str, str], output: Any
) -> int | None:
    """The exit status; None if the limit ended it."""
    with _interrupts_heeded():
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        return process.wait(max(limit - GRACE, limit / 2))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(min(GRACE, limit / 2))
        return None
    finally:
        # What it began, and what is left of it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _read(path: Path, kind: str) -> tuple[Any, str | None]:
    """A result, or why it cannot be read."""
    if not kind:
        return None, None
    if not path.exists():
        return None, "it wrote no result"
    try:
        return (outcomes(path) if kind == "junit" else json.loads(path.read_text())), None
    except Exception:  # noqa: BLE001, whatever is in the file
        return None, f"its result cannot be read:\n{traceback.format_exc()}"


def _last_lines(text: str) -> list[str]:
    lines = [_ESCAPES.sub("", line.split("\r")[-1]).rstrip() for line in text.splitlines()]
    return [line[:400] for line in lines if line][-KEPT:]
