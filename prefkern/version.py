"""The installed version; "unknown" for a source tree that is not installed."""

from __future__ import annotations

from importlib import metadata

try:
    VERSION = metadata.version("prefkern")
except metadata.PackageNotFoundError:
    VERSION = "unknown"
