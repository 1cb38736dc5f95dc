"""Files that are there whole or not at all.

A reader, or a run that is started after a kill, must never find half a file under a file's name. So
what is written goes into a temporary file of the same folder, to the disk, and then takes the name
in one step of the file system. A process that is killed leaves at worst a hidden temporary file.
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
    """A path beside `path` to write a file or folder to, which takes its place if nothing raises.

    It has the same suffix, by which some writers choose the format. After an exception it is gone,
    and `path` as it was.
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
    """Write a file whole: after an interruption there is the old one, or the new one."""
    content = content.encode() if isinstance(content, str) else content
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: str | Path, value: Any, **options: Any) -> None:
    """`write_atomically` of a value as JSON; options are those of `json.dumps`."""
    write_atomically(path, json.dumps(value, **options) + "\n")


def sync(path: Path) -> None:
    """Have a file, or all of a folder, on the disk before it is renamed: power may fail, too."""
    if path.is_dir():
        for child in path.iterdir():
            sync(child)
    try:
        opened = os.open(path, os.O_RDONLY)
    except OSError:
        # Folders cannot be opened everywhere.
        return
    try:
        os.fsync(opened)
    except OSError:
        # Some network file systems cannot be asked.
        pass
    finally:
        os.close(opened)


def remove(path: Path) -> None:
    """Delete a file or folder that may not be there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
