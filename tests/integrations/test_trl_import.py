"""The errors of `import prefkern.integrations.trl` if TRL is missing or has an unknown version."""

from __future__ import annotations

import importlib
import sys
from importlib import metadata

import pytest

NAME = "prefkern.integrations.trl"


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        (None, r'needs TRL .*>=1\.9.* not installed: pip install "trl.*>=1\.9.*"'),
        ("1.8.0", r'supports TRL .*>=1\.9.*, but 1\.8\.0 is installed: pip install "trl'),
        ("1.17.0", r"but 1\.17\.0 is installed"),
    ],
)
def test_other_versions_are_refused_on_import(monkeypatch, installed, message):
    true_version = metadata.version

    def version(name: str) -> str:
        if name != "trl":
            return true_version(name)
        if installed is None:
            raise metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(metadata, "version", version)
    for module in [name for name in sys.modules if name.startswith(NAME)]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(ImportError, match=message):
        importlib.import_module(NAME)
