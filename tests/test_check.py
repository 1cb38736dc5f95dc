"""`prefkern check` passes on this machine, and fails where a kernel is wrong."""

from __future__ import annotations

import pytest
from conftest import BACKENDS, DEVICE

from prefkern import torch_tiles
from prefkern.cli import check


def test_passes(capsys):
    assert check.main(["--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    for backend in BACKENDS:
        assert f"{backend} on {DEVICE}" in out
    assert "MISS" not in out and "within bounds" in out


@pytest.mark.parametrize("wrong", ["gradient", "value", "nan"])
def test_fails_on_a_wrong_result(wrong, capsys, monkeypatch):
    """A label's gradient rounded before the subtraction, a tail read, a NaN."""
    right = {"gradient": torch_tiles.logits_gradient, "value": torch_tiles.fold}
    name = "logits_gradient" if wrong == "gradient" else "fold"

    def broken(tile, *args, **keywords):
        result = right["gradient" if wrong == "gradient" else "value"](tile, *args, **keywords)
        if wrong == "gradient":
            args[5].mul_(1.01)
        elif wrong == "value":
            args[3].mul_(1.01)
        else:
            args[3].fill_(float("nan"))
        return result

    monkeypatch.setattr(torch_tiles, name, broken)
    monkeypatch.setattr(check, "_backends", lambda: [("torch", DEVICE)])
    assert check.main(["--dtype", "float32"]) == 1
    assert "MISS" in capsys.readouterr().out
