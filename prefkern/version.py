"""The version, which pyproject.toml has, and the line that installs more of prefkern.

The version of a source tree that is not installed is "unknown".
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

try:
    VERSION = metadata.version("prefkern")
except metadata.PackageNotFoundError:
    VERSION = "unknown"


def install_line(extra: str) -> str:
    """The command that installs an extra.

    pip takes the name for the prefkern that is installed, whether from an index, a file or a clone,
    and adds what is missing. A source tree that is only on the path has to be named.
    """
    place = "prefkern" if VERSION != "unknown" else Path(__file__).parent.parent
    return f"pip install '{place}[{extra}]'"
