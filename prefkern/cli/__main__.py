"""Entry point of `prefkern` and `python -m prefkern.cli`.

A command is a module of this package with `main(argv) -> exit status`. It is imported only when it
is called, and imports what it needs when it needs it: help and errors in options come without torch.
"""

from __future__ import annotations

import importlib
import sys

from prefkern.cli.closed import until_the_reader_goes
from prefkern.typos import nearest

COMMANDS = {
    "check": "compare the backends of this machine with the float64 reference",
    "bench": "compare time, memory, operations and error with eager and the peers",
    "train": "train a model on preference pairs",
    "data": "show what would be trained on: the report, and rows as the model sees them",
    "plan": "show what a step of a model will cost, without loading its weights",
    "margins": "train a reward model and write its margins into the dataset, for MADPO",
    "env": "show versions, devices and backends of this machine, to paste into a report",
}


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status; 2 for a command that does not exist."""
    given = sys.argv[1:] if argv is None else argv
    return until_the_reader_goes(lambda: _run(given))


def _run(argv: list[str]) -> int:
    if "--version" in argv[:2]:
        from prefkern.version import VERSION

        print(f"prefkern {VERSION}")
        return 0
    if argv and argv[0] in COMMANDS:
        return importlib.import_module(f"prefkern.cli.{argv[0]}").main(argv[1:])
    lines = ["usage: prefkern COMMAND [options]", "", "commands:"]
    lines += [f"  {name:<7} {description}" for name, description in COMMANDS.items()]
    lines += ["", "prefkern COMMAND --help shows a command's options; --version the version."]
    if argv and argv[0] in ("-h", "--help"):
        print("\n".join(lines))
        return 0
    if argv:
        close = nearest(argv[0], COMMANDS)
        hint = f"; did you mean {close}?" if close else ""
        print(f"prefkern: unknown command {argv[0]!r}{hint}\n", file=sys.stderr)
    print("\n".join(lines), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
