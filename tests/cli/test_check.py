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


def test_quick_takes_a_part_and_names_each_case_as_it_ends(capsys, monkeypatch):
    """Not in a terminal: the lines are there before the tables."""
    measured = []

    def measure(*case, seed, quick):
        # What is written before a case is measured is on the stream already.
        measured.append((case, capsys.readouterr().out))
        return check.Row(f"{case[0]} on {case[1]}", *case[2:])

    monkeypatch.setattr(check, "_backends", lambda: [("torch", "cpu"), ("triton", "cpu")])
    monkeypatch.setattr(check, "_check", measure)
    assert check.main(["--quick"]) == 0
    cases = [case for case, _ in measured]
    everything = {
        ("torch", "cpu", dtype, name, head)
        for dtype in check.LOGP_BOUND
        for name in check.QUICK
        for head in check.HEADS
    }
    interpreted = {
        ("triton", "cpu", "bfloat16", name, head) for name in check.QUICK for head in check.HEADS
    }
    assert set(cases) == everything | interpreted and len(cases) == len(set(cases))
    written = [out for _, out in measured]
    assert written[0] == "torch on cpu, float32:" and written[1] == " all" and written[2] == ""
    assert written[9] == "\ntorch on cpu, bfloat16:"
    assert capsys.readouterr().out.startswith("\n")


def test_quick_measures_one_shape(monkeypatch):
    shapes = []

    def errors(backend, device, dtype, case, trained, shape, seed):
        shapes.append(shape[:3])
        return {"logp": 0.0, "dhidden": 0.0}, {"logp": 1.0, "dhidden": 1.0}

    monkeypatch.setattr(check, "_operator_errors", errors)
    for quick in (True, False):
        check._check("torch", "cpu", "float32", "all", "frozen", seed=0, quick=quick)
    assert shapes == [check.SHAPES[0][:3], *(shape[:3] for shape in check.SHAPES)]
