"""The version of what is installed; "unknown" for a source tree that is not."""

from __future__ import annotations

from importlib import metadata

try:
    VERSION = metadata.version("prefkern")
except metadata.PackageNotFoundError:
    VERSION = "unknown"
