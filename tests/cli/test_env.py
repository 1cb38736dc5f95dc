"""`prefkern env`: one paste with what a result may depend on, and nothing of the user's own."""

from __future__ import annotations

import getpass
import socket
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

import prefkern
from prefkern.cli import env
from prefkern.cli.__main__ import main
from prefkern.ops import cpu


def test_what_it_names(capsys, monkeypatch):
    monkeypatch.setenv("PREFKERN_CPU_BF16", "0")
    monkeypatch.delenv("PREFKERN_AUTOTUNE", raising=False)
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert lines["prefkern"] == prefkern.__version__
    assert lines["torch"].startswith(torch.__version__)
    for package in ("transformers", "accelerate", "peft", "datasets"):
        assert lines[package] == metadata.version(package)
    assert lines["PREFKERN_CPU_BF16"] == "0" and "PREFKERN_AUTOTUNE" not in lines
    assert f"{torch.get_num_threads()} threads of" in lines["processor"]
    assert ("GPU" in lines) == (not torch.cuda.is_available())
    # A report is public.
    private = (str(Path.home()), str(Path.cwd()), getpass.getuser(), socket.gethostname())
    for each in [text for text in private if len(text) > 3]:
        assert each not in out


@pytest.mark.parametrize("interpreted", [True, False])
def test_backends(interpreted, monkeypatch):
    from prefkern.ops import call

    real = call.resolve_backend

    def resolve(backend, device):
        if backend == "triton" and not interpreted:
            raise RuntimeError("triton needs a GPU")
        return backend if backend == "triton" else real(backend, device)

    monkeypatch.setattr(call, "resolve_backend", resolve)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = dict(env.facts())
    assert found["backends on cpu"].startswith("torch, triton;" if interpreted else "torch;")


@pytest.mark.parametrize(("has", "wide"), [(False, False), (True, False), (True, True)])
def test_the_processors_units(has, wide, monkeypatch):
    monkeypatch.setattr(cpu, "has_bfloat16_units", lambda: has)
    monkeypatch.setattr(cpu, "has_wide_product", lambda: wide)
    line = dict(env.facts())["processor"]
    assert ("; no bfloat16 units;" in line) == (not has)
    assert ("; bfloat16 units with float32 results;" in line) == wide


def test_gpus(monkeypatch):
    class Properties:
        name, major, minor, total_memory = "NVIDIA H200", 9, 0, 141 * 2**30

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    assert dict(env.facts())["GPU 0"] == "NVIDIA H200, sm_90, 141 GiB"


def test_a_package_that_is_missing_or_broken(monkeypatch):
    def version(package):
        if package == "trl":
            raise metadata.PackageNotFoundError(package)
        return "1.0"

    monkeypatch.setattr(metadata, "version", version)
    assert dict(env.facts())["trl"] == "-"
    monkeypatch.setitem(sys.modules, "torch", None)
    assert env.facts()[-1][0] == "torch" and "cannot be imported" in env.facts()[-1][1]


def test_it_takes_no_options(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["env", "--json"])
    assert stopped.value.code == 2 and "--json" in capsys.readouterr().err
