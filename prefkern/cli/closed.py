"""Output whose reader has gone, as in `prefkern env | head -1`: the command ends, without a word.

A command catches the OSErrors of its own work, and would take that of a closed pipe for one of
them. So the streams themselves turn it into an exit. From `go_on` on they drop the output instead:
a run that trains is not lost because nobody reads its log.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

# What a shell reports for a program that SIGPIPE ended.
STATUS = 141


def until_the_reader_goes(command: Callable[[], int]) -> int:
    """The command's status. Within it, output into a closed pipe raises SystemExit(STATUS).

    A failure stays one: neither its status nor its traceback gives way to the closed pipe.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_Stream(stream) for stream in before)
    status: Any = 1  # of an exception
    try:
        try:
            status = command()
        except SystemExit as ended:
            status = ended.code
            raise
        finally:
            # What is still in a buffer meets the closed pipe here, and not in the interpreter's exit.
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(*[SystemExit] if status else []):
                    stream.flush()
    finally:
        sys.stdout, sys.stderr = before
    return status


def go_on() -> None:
    """From here on, the command goes on without a reader."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, _Stream):
            stream.goes_on = True


class _Stream:
    """A text stream, all of whose methods are the other stream's but for three."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._is_closed = False
        self.goes_on = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._ending():
            return self._stream.write(text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with self._ending():
            self._stream.flush()

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        # A thread that draws a progress bar may have met the closed pipe, and ended alone.
        if self._is_closed and not self.goes_on:
            sys.exit(STATUS)
        try:
            yield
        except BrokenPipeError:
            self._is_closed = True
            # The interpreter flushes once more as it exits, and would report the pipe again.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            if not self.goes_on:
                sys.exit(STATUS)
            if self is sys.stdout:
                print(
                    "prefkern: nobody reads this command's output any more; it goes on without",
                    file=sys.stderr,
                )
