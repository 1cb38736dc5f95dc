"""Files that are either complete or absent.

A reader, or a run after a kill, must never find half a file under a file's name. So a file is
written under a temporary name in the same folder, synced to the disk, and renamed in one step of
the file system. A killed process leaves at worst a hidden temporary file.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path for a new file or folder, which replaces `path` if nothing raises.

    It has the same suffix, since some writers choose the format by it. After an exception it is
    deleted, and `path` is unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex}{path.suffix}")
    try:
        yield temporary
        sync(temporary)
        if temporary.is_dir() and path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except BaseException:
        remove(temporary)
        raise


def write_atomically(path: str | Path, content: bytes | str) -> None:
    """Write a file so that an interruption leaves the old file or the new one, complete."""
    content = content.encode() if isinstance(content, str) else content
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: str | Path, value: Any, **options: Any) -> None:
    """Write a value as JSON with `write_atomically`; options are those of `json.dumps`."""
    write_atomically(path, json.dumps(value, **options) + "\n")


def sync(path: Path) -> None:
    """Sync a file, or all of a folder, to the disk before it is renamed: the power may fail."""
    if path.is_dir():
        for child in path.iterdir():
            sync(child)
    try:
        opened = os.open(path, os.O_RDONLY)
    except OSError:
        # Not every system can open a folder.
        return
    try:
        os.fsync(opened)
    except OSError:
        # Some network file systems cannot sync.
        pass
    finally:
        os.close(opened)


def remove(path: Path) -> None:
    """Delete a file or folder that may not be there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
