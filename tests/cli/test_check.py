"""`prefkern check` passes on this machine, and fails where a kernel is wrong."""

from __future__ import annotations

import pytest

from prefkern.cli import check
from prefkern.ops import torch_tiles
from support.machine import BACKENDS, DEVICE


@pytest.mark.parametrize("transforms", ["all", pytest.param(None, marks=pytest.mark.long)])
def test_passes(transforms, capsys, monkeypatch):
    if transforms:
        monkeypatch.setattr(check, "INTERPRETED_SHAPES", check.INTERPRETED_SHAPES[:1])
        monkeypatch.setattr(check, "TRANSFORMS", {transforms: check.TRANSFORMS[transforms]})
    assert check.main(["--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    for backend in BACKENDS:
        assert f"{backend} on {DEVICE}" in out
    assert "MISS" not in out and "within bounds" in out


@pytest.mark.parametrize("wrong", ["dH", "dW, kept", "dW, recomputed", "value", "nan"])
@pytest.mark.long(wrong=["dW, recomputed", "nan"])
def test_fails_on_a_wrong_result(wrong, capsys, monkeypatch):
    """A per cent in a gradient or a sum, a NaN."""
    name = {"dH": "finish", "dW, kept": "settle", "dW, recomputed": "remake_weights"}
    name = name.get(wrong, "fold")
    right = getattr(torch_tiles, name)

    def broken(*args, **keywords):
        right(*args, **keywords)
        if wrong == "dH" and args[9:] and args[9] is not None:
            args[9].mul_(1.01)
        elif wrong == "dW, kept":
            args[0].mul_(1.01)
        elif wrong == "dW, recomputed":
            args[6].mul_(1.01)
        elif wrong == "value":
            args[4].mul_(1.01)
        elif wrong == "nan":
            args[4].fill_(float("nan"))

    monkeypatch.setattr(torch_tiles, name, broken)
    monkeypatch.setattr(check, "_backends", lambda: [("torch", DEVICE)])
    assert check.main(["--dtype", "float32"]) == 1
    assert "MISS" in capsys.readouterr().out
