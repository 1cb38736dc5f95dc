"""Memory that a command frees on a CPU is used again, without the system's help."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from prefkern.cli import allocator
from support.processes import environment

FAULTS = """
import resource, sys
import torch
from prefkern.cli.allocator import keep_freed_memory

print(keep_freed_memory(sys.argv[1]))
hidden = torch.ones(256, 32, requires_grad=True)
weight = torch.ones(2**15, 32)


def steps(count):
    for _ in range(count):
        (hidden @ weight.T).log_softmax(-1).sum().backward()


steps(4)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
steps(8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(device: str, **variables: str) -> tuple[str, int]:
    """Whether memory is kept, and the pages that the system hands out in eight steps."""
    env = {k: v for k, v in environment().items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, device],
        env=env | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    kept, count = done.stdout.split()
    return kept, int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_what_is_freed_is_used_again_on_a_cpu():
    kept, count = faults("cpu")
    left, others = faults("cuda")
    assert (kept, left) == ("True", "False")
    assert count < others / 4, (count, others)


def test_the_environment_is_respected():
    kept, _ = faults("cpu", MALLOC_TRIM_THRESHOLD_="131072")
    assert kept == "False"


@pytest.mark.parametrize(
    ("library", "largest", "expected"),
    [
        (("glibc", "2.36"), 2**31 - 1, [2**31 - 1]),
        (("glibc", "2.31"), 2**25, [2**31 - 1, 2**25]),
        (("musl", "1.2.4"), None, []),
        # macOS and Windows.
        (("", ""), None, []),
    ],
)
def test_what_is_asked_of_each_c_library(library, largest, expected, monkeypatch):
    asked = []

    class Library:
        @staticmethod
        def mallopt(what: int, size: int) -> int:
            asked.append((what, size))
            return int(what == -1 or size <= largest)

    for name in allocator._VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(platform, "libc_ver", lambda: library)
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: Library)
    assert allocator.keep_freed_memory("cpu") is bool(expected)
    assert [size for what, size in asked if what == -3] == expected
    assert [size for what, size in asked if what == -1] == [2**31 - 1] * bool(expected)


@pytest.mark.parametrize("variable", ["GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_"])
def test_no_variable_is_overruled(variable, monkeypatch):
    monkeypatch.setattr(allocator.ctypes, "CDLL", None)
    monkeypatch.setenv(variable, "")
    assert allocator.keep_freed_memory("cpu") is False


@pytest.mark.parametrize("command", ["train", "margins"])
def test_the_commands_ask_for_it(command, tmp_path, monkeypatch):
    """Before anything is loaded: here the dataset cannot be read."""
    pytest.importorskip("peft")
    from prefkern.cli import __main__ as cli
    from prefkern.cli import margins, train

    asked = []
    module = {"train": train, "margins": margins}[command]
    monkeypatch.setattr(module, "keep_freed_memory", asked.append)
    data = tmp_path / "data.jsonl"
    data.write_text("{")
    flags = ["--use_cpu", "--report_to", "none", "--output_dir", os.fspath(tmp_path / "out")]
    if command == "margins":
        flags += ["--output", os.fspath(tmp_path / "margins.jsonl")]
    cli.main([command, "--model_name_or_path", "gpt2", "--dataset", os.fspath(data), *flags])
    assert asked == ["cpu"]
    assert allocator.keep_freed_memory("cuda") is False
