"""Each row of the error catalogue gets its own error, before any memory is taken; and none is missing.

Two counts keep the catalogue whole: every parameter of a call in it has a row, and every `raise` in
the package is reached by a row, or its message is in another test.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import subprocess
import sys
import traceback
from pathlib import Path

import error_catalogue as catalogue
import pytest
import torch
from error_catalogue import CALLS, LABELS_OUT_OF_RANGE, ROWS, Row, operator

import prefkern
from prefkern.measure import Meter

ROOT = Path(__file__).parent.parent
# Calls that run nothing before they have looked at everything.
CHEAP = ("linear_logprobs", "linear_kl", "loss", "plan_for", "Pairs", "reference.linear_logprobs")


@functools.cache
def error_of(row: Row) -> Exception | None:
    call = CALLS[row.call]
    arguments = {**call.good(), **row.change}
    try:
        call.function(**arguments)
    except Exception as error:  # noqa: BLE001
        return error
    return None


@pytest.mark.parametrize("number", range(len(ROWS)), ids=lambda number: str(ROWS[number]))
def test_bad_argument(number):
    row = ROWS[number]
    error = error_of(row)
    assert type(error) is row.error, error
    message = str(error)
    for part in row.says:
        assert part in message
    if (row.call, row.argument) not in catalogue.SAID_OTHERWISE:
        assert re.search(rf"\b{row.argument}\b", message), message
    # A line or two that can be read, and not a tensor printed.
    assert len(message) < 500


@pytest.mark.parametrize("call", CHEAP)
def test_nothing_is_allocated_before_the_error(call):
    """But for the range of the labels, which holds some masks of their size."""
    torch.manual_seed(0)
    for row in ROWS:
        if row.call != call:
            continue
        arguments = {**CALLS[call].good(), **row.change}
        with Meter() as meter, pytest.raises(row.error):
            CALLS[call].function(**arguments)
        assert meter.peak_bytes <= 1024, row


@pytest.mark.parametrize("call", CALLS)
def test_what_is_right_is_taken(call):
    if call in ("gradient_balance", "loss of tdpo1", "loss of madpo", "oracle of madpo"):
        pytest.skip("a call that is right takes more than its errors need")
    CALLS[call].function(**CALLS[call].good())


@pytest.mark.parametrize("call", CALLS)
def test_every_parameter_has_a_row(call):
    if " of " in call:
        pytest.skip("beside the call that it is one of")
    function = CALLS[call].function
    function = function.forward if isinstance(function, torch.nn.Module) else function
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    names = {
        name for name, each in inspect.signature(function).parameters.items()
        if each.kind not in kinds
    }  # fmt: skip
    tried = {name for row in ROWS if row.call == call for name in row.change}
    missing = names - tried - set(CALLS[call].any_value)
    assert not missing


def raise_sites() -> dict[tuple[str, int], ast.Raise]:
    """Every `raise` of the package by file and line, but those that pass on what they caught."""
    sites = {}
    for path in sorted((ROOT / "prefkern").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                sites[str(path.relative_to(ROOT)), node.lineno] = node
    return sites


def reached(error: BaseException | None) -> set[tuple[str, int]]:
    """The lines of the package that an error, and those that it came of, were raised in."""
    lines = set()
    while error is not None:
        for frame in traceback.extract_tb(error.__traceback__):
            path = Path(frame.filename)
            if path.is_relative_to(ROOT) and frame.lineno is not None:
                lines.add((str(path.relative_to(ROOT)), frame.lineno))
        error = error.__cause__ or error.__context__
    return lines


def phrases(node: ast.Raise) -> set[str]:
    """Runs of three words, or of two where there are no more, that a message has as they are."""
    texts = [
        re.findall(r"[\w'-]+", each.value)
        for each in ast.walk(node)
        if isinstance(each, ast.Constant) and isinstance(each.value, str)
    ]
    for size in (3, 2):
        found = {
            " ".join(words[at : at + size])
            for words in texts
            for at in range(len(words) - size + 1)
        }
        if found:
            return found
    return set()


# Sites that no test can reach, or whose message has no words of its own: by a phrase in the source.
ELSEWHERE = {}


def test_every_raise_is_reached_or_tested():
    sites = raise_sites()
    lines = set().union(*(reached(error_of(row)) for row in ROWS))
    tests = "".join(
        path.read_text()
        for path in (ROOT / "tests").glob("*.py")
        if path.name != Path(__file__).name
    )
    # As a test writes a message: without the escapes of a pattern, and over lines.
    tests = " ".join(re.findall(r"[\w'-]+", re.sub(r"\\(.)", r"\1", tests)))
    missing = []
    for (path, line), node in sites.items():
        last = node.end_lineno or line
        if any((path, at) in lines for at in range(line, last + 1)):
            continue
        if any(phrase in tests for phrase in phrases(node)):
            continue
        source = ast.unparse(node)
        if any(path == file and part in source for file, part in ELSEWHERE):
            continue
        missing.append(f"{path}:{line}: {source[:160]}")
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize("bad", LABELS_OUT_OF_RANGE)
def test_the_oracle_refuses_labels_too(bad):
    arguments = operator()
    arguments["labels"][0, 0] = bad
    with pytest.raises(ValueError, match="labels"):
        prefkern.reference.linear_logprobs(**arguments)


def test_triton_without_a_gpu_says_what_it_needs():
    """In a process without the interpreter; on a GPU machine the operands are on the CPU."""
    code = """if 1:
        import torch, prefkern
        try:
            prefkern.linear_logprobs(
                torch.randn(3, 8), torch.randn(50, 8), torch.zeros(3).long(), backend="triton"
            )
        except RuntimeError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=environment_without_interpreter(),
    )
    assert "triton" in done.stdout and (
        "needs a GPU" in done.stdout or "not installed" in done.stdout
    )


def environment_without_interpreter() -> dict[str, str]:
    import os

    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    environment.pop("TRITON_INTERPRET", None)
    return environment
