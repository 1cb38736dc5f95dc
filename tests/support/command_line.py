"""`prefkern train` in this process: its arguments, and the one line of a failure."""

from __future__ import annotations

from prefkern.cli import __main__ as cli


def flags(options: dict) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def error(argv: list[str], capsys) -> str:
    """The one line that a failing run prints on stderr."""
    assert cli.main(["train", *argv]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    bars = ("it/s", "examples/s")
    lines = [line for line in lines if line.strip() and not any(bar in line for bar in bars)]
    assert len(lines) == 1, lines
    assert lines[0].startswith("prefkern train: error: ")
    return lines[0]
