"""`prefkern COMMAND | head -1`: a command ends with the reader of its output, without a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest

from prefkern.cli import __main__ as cli
from prefkern.cli import closed
from support import tiny
from support.command_line import flags
from support.processes import environment

COMMANDS = [["--help"], ["--version"], ["env"], *([name, "--help"] for name in cli.COMMANDS)]


def into_a_closed_pipe(
    argv: list[str], with_errors: bool = False, by: tuple[str, ...] = ("-m", "prefkern.cli")
) -> tuple[int, str]:
    """The exit status, and what was written on stderr."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, *by, *argv],
        stdout=writer, stderr=writer if with_errors else subprocess.PIPE,
        env=environment(), text=True, check=False,
    )  # fmt: skip
    os.close(writer)
    return done.returncode, done.stderr or ""


@pytest.mark.parametrize("argv", COMMANDS, ids=" ".join)
def test_every_command_ends_quietly(argv: list[str]) -> None:
    assert into_a_closed_pipe(argv) == (closed.STATUS, "")


def test_rows_of_a_dataset(tmp_path: Path) -> None:
    """Rich writes them, which has an exit of its own for a closed pipe."""
    rows = "".join(f"{json.dumps(row)}\n" for row in tiny.dataset(8))
    (tmp_path / "pairs.jsonl").write_text(rows)
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    argv = ["data", str(tmp_path / "pairs.jsonl"), "--model", str(tmp_path / "model")]
    status, said = into_a_closed_pipe(argv)
    assert status == closed.STATUS and "Traceback" not in said and "Broken pipe" not in said


def test_errors_into_the_same_pipe() -> None:
    assert into_a_closed_pipe(["no-such-command"], with_errors=True)[0] == closed.STATUS
    # These are on stderr, which is open.
    status, said = into_a_closed_pipe(["no-such-command"])
    assert status == 2 and "unknown command" in said


def test_a_run_is_not_lost_with_its_reader(files: dict) -> None:
    """`prefkern train ... | head`: it trains on and saves; stderr says that nobody reads the rest."""
    status, said = into_a_closed_pipe(["train", *flags({**files, "logging_steps": 1})])
    assert status == 0 and said.count("nobody reads this command's output any more") == 1
    assert "Traceback" not in said
    results = json.loads((Path(files["output_dir"]) / "all_results.json").read_text())
    assert "train_loss" in results and (Path(files["output_dir"]) / "model.safetensors").exists()


# As the work begins, the reader goes: of stdout, and of stderr if that is asked for.
CLOSING = """
import importlib, os, sys
from prefkern.cli import __main__ as cli

command = importlib.import_module(f"prefkern.cli.{sys.argv[2]}")
go_on = command.go_on

def closing():
    reader, writer = os.pipe()
    os.close(reader)
    for number in range(1, 1 + int(sys.argv[1])):
        os.dup2(writer, number)
    go_on()

command.go_on = closing
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.parametrize(("command", "closed_streams"), [("train", 2), ("margins", 1)])
def test_a_reader_that_goes_while_it_works(
    files: dict, tmp_path: Path, command: str, closed_streams: int
) -> None:
    made = tmp_path / ("out/model.safetensors" if command == "train" else "margins.jsonl")
    given = {**files, "disable_tqdm": False}
    if command == "margins":
        given |= {"output_dir": tmp_path / "reward", "output": made}
    argv = [sys.executable, "-c", CLOSING, str(closed_streams), command, *flags(given)]
    done = subprocess.run(
        argv, env=environment(), stderr=subprocess.PIPE, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 0 and made.exists(), done.stderr
    assert done.stderr.count("nobody reads") == (closed_streams == 1)


FAILURES = {
    "status": ("return 2", 2, ""),
    "exit": ("raise SystemExit(3)", 3, ""),
    "error": ("raise ZeroDivisionError('lost')", 1, "ZeroDivisionError: lost"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_not_hidden_by_the_closed_pipe(name: str) -> None:
    """Output that waits in a buffer meets the closed pipe after the failure."""
    failure, expected, said = FAILURES[name]
    program = f"""
import io, sys
from prefkern.cli import closed

sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w")))

def command():
    print("in the buffer")
    {failure}

sys.exit(closed.until_the_reader_goes(command))
"""
    status, errors = into_a_closed_pipe(["-c", program], by=())
    assert status == expected and said in errors and bool(errors) == bool(said)


class Closed:
    """A stream without a reader from its third write on."""

    def __init__(self, file: Path) -> None:
        self.file, self.count = file.open("w"), 0

    def fileno(self) -> int:
        return self.file.fileno()

    def flush(self) -> None: ...

    def write(self, text: str) -> int:
        self.count += 1
        if self.count > 2:
            raise BrokenPipeError(32, "Broken pipe")
        return len(text)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("in_a_thread", [False, True])
def test_a_command_that_catches_errors(in_a_thread, tmp_path, monkeypatch) -> None:
    """It does not take the closed pipe for an error of its own, or write on for nobody."""
    done: list[int] = []

    def show() -> None:
        for _ in range(3):
            sys.stdout.write("a row\n")

    def main(argv: list[str]) -> int:
        try:
            if in_a_thread:
                thread = threading.Thread(target=show)
                thread.start()
                thread.join()
            for number in range(6):
                print(number)
                done.append(number)
        except OSError:
            return 2
        return 0

    monkeypatch.setattr(cli.importlib, "import_module", lambda _: types.SimpleNamespace(main=main))
    stream = Closed(tmp_path / "out")
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit) as ended:
        cli.main(["env"])
    assert ended.value.code == closed.STATUS
    # print writes the number, and then the end of the line.
    assert done == ([] if in_a_thread else [0]) and stream.count == 3
    assert sys.stdout is stream
