"""Output whose reader has gone, as in `prefkern env | head -1`: the command ends, without a word.

A command catches the OSErrors of its own work, and would take that of a closed pipe for one of
them. So the streams themselves turn it into an exit.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

# What a shell reports for a program that SIGPIPE ended.
STATUS = 141


@contextlib.contextmanager
def ending_with_the_reader() -> Iterator[None]:
    """Within the context, output into a closed pipe raises SystemExit(STATUS)."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_Stream(stream) for stream in before)
    try:
        try:
            yield
        finally:
            # What is still in a buffer meets the closed pipe here, and not in the interpreter's exit.
            sys.stdout.flush()
            sys.stderr.flush()
    finally:
        sys.stdout, sys.stderr = before


class _Stream:
    """A text stream, all of whose methods are the other stream's but for two."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._is_closed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._ending():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._ending():
            self._stream.flush()

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        # A thread that draws a progress bar may have met the closed pipe, and ended alone.
        if self._is_closed:
            sys.exit(STATUS)
        try:
            yield
        except BrokenPipeError:
            self._is_closed = True
            # The interpreter flushes once more as it exits, and would report the pipe again.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            sys.exit(STATUS)
