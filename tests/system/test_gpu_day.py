"""`bench/gpu.py`, tried without a GPU: faults of every kind, its real commands, and a whole dry run."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import gpu
from gpu_day import runs, stages, verdicts
from gpu_day.stages import RESULT, Part, Stage
from prefkern_bench import options, shapes
from prefkern_bench.claims import Verdict
from support.processes import ROOT, environment

ABOUT = {
    "date": "2026-12-01T00:00:00+00:00",
    "device": "a processor",
    "device_type": "cpu",
    "versions": {"python": "3.12.3", "torch": "2.11.0", "trl": None},
}
NAMES = [stage.name for stage in stages.real()]


def script(name: str, text: str, seconds: float = 20.0, **options: Any) -> Part:
    """A part that runs a program; `result` and `count()` are at hand: its file, and its runs."""
    head = (
        "import json, os, pathlib, sys, time\n"
        f"result, counter = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]) / '{name}'\n"
        "counter.write_text(str(int(counter.read_text()) + 1) if counter.exists() else '1')\n"
    )
    return Part(name, ["-c", head + text, RESULT, "{counts}"], seconds, **options)


# Seconds, in which a busy machine still starts Python.
SHORT = 10.0
GOOD = "result.write_text(json.dumps({'fine': 1}))"
FAULTS = [
    script("good", GOOD),
    script("fails", "print('what went wrong', file=sys.stderr); sys.exit(3)"),
    script(
        "fails with a result",
        "result.write_text(json.dumps({'rows': []})); print('a miss'); sys.exit(1)",
    ),
    script(
        "hangs",
        "import signal, subprocess\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "counter.with_name('child').write_text(str(child.pid))\n"
        "time.sleep(600)",
        SHORT,
    ),
    script("writes when interrupted", f"try: time.sleep(600)\nfinally: {GOOD}", SHORT),
    script("says nothing", "pass"),
    script("half a result", "result.write_text('{')"),
    script("lacks a tool", "print('there is no such tool'); sys.exit(2)", reads="", absent=2),
    script("is not there", "import no_such_module"),
    script("good after all that", GOOD),
]


@pytest.fixture
def faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two stages of faults in place of the real ones; returns the folder of results."""
    counts = tmp_path / "counts"
    counts.mkdir()
    parts = [
        Part(
            part.name,
            [word.replace("{counts}", str(counts)) for word in part.command],
            part.seconds,
            part.reads,
            part.absent,
        )
        for part in FAULTS
    ]
    planned = [
        Stage("check", "the first", 100, parts[:5]),
        Stage("tests", "the second", 100, parts[5:]),
    ]
    monkeypatch.setattr(stages, "dry", lambda: planned)
    monkeypatch.setattr(gpu, "looked_at", lambda environment: (copy.deepcopy(ABOUT), None))
    monkeypatch.setattr(gpu.verdicts, "judged", lambda records, model: [Verdict("a", "b", True)])
    folder = tmp_path / "results"
    folder.mkdir()
    return folder


def outcomes(folder: Path) -> dict[str, dict[str, Any]]:
    records = [gpu.read(gpu.file_of(folder, name)) for name in NAMES]
    return {k: part for record in records if record for k, part in record["parts"].items()}


def count(folder: Path, name: str) -> int:
    return int((folder.parent / "counts" / name).read_text())


@pytest.fixture
def interrupts_ignored() -> Iterator[None]:
    """As for what a shell starts in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts_ignored")
def test_a_fault_is_a_result_and_takes_nothing_with_it(faults: Path) -> None:
    begin = time.monotonic()
    assert gpu.main(["--dry", "--results", str(faults)]) == 1
    assert time.monotonic() - begin < 200
    found = outcomes(faults)
    assert {name: part["status"] for name, part in found.items()} == {
        "good": "done",
        "fails": "failed",
        "fails with a result": "failed",
        "hangs": "out of time",
        "writes when interrupted": "out of time",
        "says nothing": "failed",
        "half a result": "failed",
        "lacks a tool": "absent",
        "is not there": "failed",
        "good after all that": "done",
    }
    assert found["fails"]["error"] == "exit status 3\nwhat went wrong"
    assert found["fails with a result"]["result"] == {"rows": []}
    assert found["hangs"]["error"] == "stopped after 10 s" and found["hangs"]["result"] is None
    assert found["writes when interrupted"]["result"] == {"fine": 1}
    assert found["says nothing"]["error"] == "it wrote no result"
    assert "cannot be read" in found["half a result"]["error"]
    assert found["lacks a tool"]["error"] == "there is no such tool"
    assert "No module named 'no_such_module'" in found["is not there"]["error"]
    assert is_gone(count(faults, "child"))


def is_gone(pid: int) -> bool:
    """Whether a process has ended, reaped or not."""
    for _ in range(50):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


def test_what_is_done_is_not_done_again(faults: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time only what failed runs; a result that cannot be read is made again."""
    first, second = stages.dry()
    fast = [part for part in first.parts if part.seconds > SHORT]
    monkeypatch.setattr(stages, "dry", lambda: [Stage("check", "", 100, fast), second])
    gpu.main(["--dry", "--results", str(faults)])
    gpu.main(["--dry", "--results", str(faults)])
    runs_of = {part.name: count(faults, part.name) for part in [*fast, *second.parts]}
    once = {"good", "good after all that", "lacks a tool"}
    assert {name for name, runs in runs_of.items() if runs == 1} == once
    gpu.main(["--dry", "--results", str(faults), "--stages", "check", "--again", "check"])
    assert count(faults, "good") == 2 and count(faults, "good after all that") == 1
    gpu.file_of(faults, "tests").write_text("{")
    gpu.main(["--dry", "--results", str(faults), "--stages", "tests"])
    assert count(faults, "good after all that") == 2
    assert outcomes(faults)["good after all that"]["status"] == "done"


def test_the_file_is_there_before_the_next_part_begins(faults: Path) -> None:
    # Of a part's output a record keeps lines of a bounded length.
    look = f"import json; print(*json.load(open({str(gpu.file_of(faults, 'check'))!r}))['parts'])"
    seen = Part("looks", ["-c", look], 20.0, "")
    stage = Stage("check", "", 100, [stages.dry()[0].parts[0], seen])
    about = {**copy.deepcopy(ABOUT), "dry": True}
    gpu.run(stage, faults, about, dict(os.environ), time.monotonic() + 60)
    assert outcomes(faults)["looks"]["output"] == ["good"]


def test_what_finds_no_time_keeps_its_earlier_outcome(faults: Path) -> None:
    stage = stages.dry()[0]
    about = {**copy.deepcopy(ABOUT), "dry": True}
    part = Stage("check", "", 100, stage.parts[1:2])
    gpu.run(part, faults, about, dict(os.environ), time.monotonic() + 60)
    gpu.run(stage, faults, about, dict(os.environ), time.monotonic() + 1)
    found = outcomes(faults)
    assert found["fails"]["status"] == "failed" and found["good"]["status"] == "no time"
    assert not gpu.verdicts.is_complete(gpu.read(gpu.file_of(faults, "check")))


def test_a_stage_that_breaks_the_script_takes_nothing_with_it(
    faults: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = runs.run

    def broken(part: Part, *rest: Any) -> dict[str, Any]:
        if part.name == "good":
            raise OSError("no space left")
        return right(part, *rest)

    monkeypatch.setattr(runs, "run", broken)
    gpu.main(["--dry", "--results", str(faults)])
    assert outcomes(faults)["good after all that"]["status"] == "done"
    kept = gpu.read(gpu.file_of(faults, "check"))
    assert kept is not None and "in broken\n" in kept["broken"]
    assert kept["broken"].endswith("OSError: no space left\n")
    assert not verdicts.is_complete(kept)
    page = (faults / "gpu.md").read_text()
    assert "| check | the script itself | failed | - | OSError: no space left |" in page
    # Another time it is whole.
    monkeypatch.setattr(runs, "run", right)
    gpu.main(["--dry", "--results", str(faults), "--stages", "check"])
    assert "broken" not in gpu.file_of(faults, "check").read_text()


def test_a_stage_whose_file_cannot_be_written_is_printed(
    faults: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, *rest: Any, **options: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(gpu, "write_json", full)
    fast = [Stage("check", "", 100, stages.dry()[0].parts[:1])]
    monkeypatch.setattr(stages, "dry", lambda: fast)
    assert gpu.main(["--dry", "--results", str(faults)]) == 2
    said = capsys.readouterr().out
    assert "in full\n" in said and "cannot be written: no space left" in said


@pytest.mark.parametrize("change", [{"device": "another"}, {"versions": {}}, {"dry": False}])
def test_results_of_another_machine_are_kept(
    change: dict[str, Any], faults: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = {**ABOUT, "dry": True, "parts": {}, **change}
    gpu.file_of(faults, "tests").write_text(json.dumps(record))
    assert gpu.main(["--dry", "--results", str(faults)]) == 2
    assert "gpu-tests.json" in capsys.readouterr().err
    assert json.loads(gpu.file_of(faults, "tests").read_text()) == record
    assert not gpu.file_of(faults, "check").exists()


def test_without_a_gpu_nothing_is_run(faults: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--results", str(faults)]) == 2
    assert "torch sees no GPU; --dry tries the commands on a CPU" in capsys.readouterr().err
    assert not [*faults.iterdir()]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--dry", "--results", str(gpu.RESULTS)], "bench/results is for figures of a GPU"),
        (["--results", "no/such"], "--results: there is no folder"),
        (["--wheels", "no/such"], "--wheels: there is no wheel in"),
        (["--stages", "coffee"], "invalid choice"),
    ],
)
def test_bad_options(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu.main(given)
    assert said in capsys.readouterr().err


def test_wheels_go_into_a_folder_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that cannot be installed is named and keeps out no other; the second time none is."""
    import zipfile

    with zipfile.ZipFile(tmp_path / "apeer-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("apeer.py", "there = True\n")
        wheel.writestr(
            "apeer-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: apeer\nVersion: 1.0\n"
        )
        wheel.writestr(
            "apeer-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr("apeer-1.0.dist-info/RECORD", "")
    (tmp_path / "abroken-1.0-py3-none-any.whl").write_text("no wheel")
    monkeypatch.setattr(gpu, "SITE", tmp_path / "site")
    made = gpu.environment_of(dry=True)
    gpu.install(tmp_path, made)
    assert "wheel abroken-1.0-py3-none-any.whl: ERROR" in capsys.readouterr().out
    code = "import apeer; print(apeer.there, apeer.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=made, capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith(f"True {tmp_path / 'site'}"), done.stderr
    (tmp_path / "site/apeer.py").write_text("there = 2\n")
    gpu.install(tmp_path, made)
    assert (tmp_path / "site/apeer.py").read_text() == "there = 2\n"


def test_the_real_commands_are_such_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their options are known, their modules and tests there, and they fit into eight minutes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [stage.name for stage in stages.dry()] == NAMES
    assert sum(stage.seconds for stage in stages.real()) <= gpu.SECONDS - 30
    seen = set()
    for part in (part for stage in stages.real() for part in stage.parts):
        command = [word.replace(RESULT, "x.json") for word in part.command]
        assert part.seconds <= 90 and part.reads in ("json", "junit", "")
        if command[:3] == ["-m", "prefkern.cli", "bench"]:
            options.parse(command[3:])
            seen |= set(command) & set(shapes.KNOWN)
        elif command[:2] == ["-m", "pytest"]:
            (path,) = (word for word in command if word.endswith(".py"))
            text = (ROOT / path).read_text()
            assert "-k" not in command or command[command.index("-k") + 1] in text
        elif command[0] == "-m":
            assert importlib.util.find_spec(command[1]) is not None
        else:
            assert (ROOT / command[0]).exists()
    assert seen == set(stages.SHAPES)


def test_the_page_needs_no_torch(tmp_path: Path) -> None:
    """From results alone, also where the environment of the day is not there."""
    for name, record in records().items():
        gpu.file_of(tmp_path, name).write_text(json.dumps(record))
    code = (
        "import sys\nfor name in ('torch', 'triton', 'rich', 'numpy'):\n    sys.modules[name] = None\n"
        f"import gpu\nsys.exit(gpu.main(['--page', '--results', {str(tmp_path)!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    page = (tmp_path / "gpu.md").read_text()
    costs = json.loads((ROOT / "bench/results/launch-costs.json").read_text())
    assert page == verdicts.page(records(), verdicts.judged(records(), costs), costs)
    for part in ("holds", "MISS", "not measured", "a processor", "| check | quick | done | 3 |"):
        assert part in page and part.strip("| ").split(" | ")[0] in done.stdout + page


def record(**parts: dict[str, Any]) -> dict[str, Any]:
    given = {"status": "done", "error": None, "seconds": 3.0, "exit_status": 0}
    return {
        **ABOUT,
        "dry": False,
        "parts": {name.replace("_", " "): {**given, **part} for name, part in parts.items()},
    }


def records() -> dict[str, dict[str, Any]]:
    """Results of every kind: what holds, what does not, and what was not measured."""
    case = {"backend": "triton on cuda", "dtype": "float16", "case": "all", "head": "kept"}
    tests = {"command": "python -m pytest", "result": {"passed": 9, "failed": [], "skipped": {}}}
    failing = copy.deepcopy(tests)
    failing["result"]["failed"] = ["tests.kernels.test_fold"]
    only_skips = copy.deepcopy(tests)
    only_skips["result"] = {"passed": 0, "failed": [], "skipped": {"no GPU": 2}}
    late = {**copy.deepcopy(tests), "status": "no time", "result": None}
    shapes_of = {"dtype": "bfloat16", "device_type": "cuda", "shapes": [{"name": "S"}], "rows": []}
    times = {"prefkern": 5.0, "prefkern-fold": 4.0}
    for name, ms in times.items():
        row = {"suite": "operator", "shape": "S", "task": "forward", "provider": name}
        row |= {"failure": None, "median_ms": ms}
        row |= dict.fromkeys(("peak_mib", "plan", "token_logp_error", "dhidden_error"))
        shapes_of["rows"].append({**row, "floor_ratio": 1.1, "dweight_error": None})
    shapes_of["shapes"][0] |= {"hidden_size": 4096}
    whole = {"result": {**shapes_of, "finished": True}}
    cut = {"status": "out of time", "error": "stopped after 9 s"}
    cut["result"] = {**copy.deepcopy(shapes_of), "finished": False}
    cut["result"]["rows"] = []
    stopped = {**copy.deepcopy(tests), "status": "out of time", "error": "stopped after 9 s"}
    way = {"task": "full", "failure": None, "loss": verdicts.LN2, "gradient_norm": 2.0}
    sizes = {"logits in memory": 100.0, "padded": 50.0, "packed": 40.0, "shared": 45.0}
    ways = [{**way, "way": n, "peak_mib": s, "median_ms": s} for n, s in sizes.items()]
    kernels = [{"kernel": "a|kernel", "launches": 2, "us": 1500.0}]
    call = {"call": "forward", "ms": 2.0, "kernels": kernels}
    profile = {"shape": "S", "tokens": 1, "hidden_size": 2, "vocab_size": 3, "calls": [call]}
    return {
        "check": record(
            quick={"result": {"rows": [{**case, "passed": True}, {**case, "passed": False}]}}
        ),
        "tests": record(kernels=tests, guards=failing, gradients=stopped, late=late),
        "operator": record(S=whole, T=cut, U={**cut, "result": None}, tiles=cut),
        "step": record(layouts={"result": {"rows": ways}}),
        "profile": record(calls={"result": profile}),
        "memcheck": record(
            memcheck={
                "status": "absent",
                "error": "there is no tool",
                "exit_status": 2,
                "result": None,
            }
        ),
        "modes": record(CUDA_graph=only_skips),
    }


def test_verdicts() -> None:
    found = {each.claim: each for each in verdicts.judged(records())}

    def of(part: str) -> tuple[bool | None, str]:
        (each,) = (each for claim, each in found.items() if part in claim)
        return each.holds, each.measured

    assert of("main cases") == (False, "1 of 2: triton on cuda, float16, all, kept")
    assert of("every case") == (None, "not run")
    assert of("device: kernels") == (True, "9 passed, 0 failed, 0 skipped")
    assert of("device: guards") == (False, "9 passed, 1 failed, 0 skipped: test_fold")
    assert of("device: gradients")[0] is None
    assert of("tests: CUDA graph") == (None, "0 passed, 0 failed, 2 skipped")
    assert of("device: late") == (None, "no time")
    assert of("S, forward: at least 85%") == (True, "91%")
    assert of("`product_fold` is faster") == (True, "4.0 ms against 5.0")
    assert of("T: the claims of its other tasks") == (None, "out of time: stopped after 9 s")
    assert of("U: the claims of time, memory and error") == (None, "out of time: stopped after 9 s")
    assert not any(claim.startswith("tiles") for claim in found)
    (none,) = (v for v in verdicts.judged({}) if v.claim.startswith("log-probs"))
    assert (none.holds, none.measured) == (None, "the stage was not run")
    assert of("first loss is ln 2")[0] is True and of("norms are the same")[0] is True
    assert of("less memory padded than with logits in memory") == (True, "50 MiB against 100")
    assert of("less time shared than with packed rows") == (False, "45 ms against 40")
    assert of("model's time") == (None, "no model")
    assert of("memcheck") == (None, "absent: there is no tool")


def test_verdicts_of_a_step_that_is_wrong() -> None:
    given = records()
    rows = given["step"]["parts"]["layouts"]["result"]["rows"]
    rows[1]["loss"], rows[2]["gradient_norm"], rows[3]["failure"] = 0.6932, 2.5, "out of memory"
    found = {each.claim: each.holds for each in verdicts.judged(given)}
    assert found["step, full: the first loss is ln 2"] is False
    assert found["step, full: gradients' norms are the same padded, packed and shared"] is False
    assert not any("shared than" in claim for claim in found)
    rows[1]["loss"] = float("nan")
    found = {each.claim: each.holds for each in verdicts.judged(given)}
    assert found["step, full: the first loss is ln 2"] is False


def test_a_profile_beside_the_model() -> None:
    """Kernels in the model's groups; the device's own call; what takes more than the model says."""
    kernels = {"product": 10.0, "fold": 2.0, "torch copy": 0.5, "torch mul": 0.25}
    cost = {name: {"launches": 4, "ms": ms} for name, ms in kernels.items()}
    call = {"shape": "S", "task": "forward", "kernels": cost, "total": {"ms": 13.0}}
    costs = {"reports": [{"calls": [{**call, "device": "A100 SXM"}]}, {"triton": "3.9"}]}
    given = records()
    part = given["profile"]["parts"]["calls"]["result"]["calls"][0]
    part["ms"] = 14.0
    part["kernels"] = [
        {"kernel": "nvjet_sm90_tst_128x256", "launches": 4, "us": 9000.0},
        {"kernel": "_fold_kernel", "launches": 4, "us": 4500.0},
        {"kernel": "void at::native::elementwise_kernel<4>", "launches": 3, "us": 250.0},
    ]
    given["profile"]["device"] = "NVIDIA A100 80GB"

    def of(costs: dict[str, Any]) -> Verdict:
        (found,) = (v for v in verdicts.judged(given, costs) if "model's time" in v.claim)
        return found

    assert (of(costs).measured, of(costs).holds) == (
        "14.00 ms, the model 13.00; fold +2.50 ms",
        True,
    )
    part["ms"] = 20.0
    assert of(costs).holds is False
    page = verdicts.page(given, [], costs)
    for line in (
        "| product | 4 | 9.000 | 4 | 10.000 |",
        "| fold | 4 | 4.500 | 4 | 2.000 |",
        "| torch | 3 | 0.250 | 8 | 0.750 |",
        "**forward: 20.00 ms, of which kernels run 13.75**",
    ):
        assert line in page
    given["profile"]["device"] = "NVIDIA H200"
    assert (of(costs).measured, of(costs).holds) == ("the model has no such call", None)


@pytest.mark.parametrize(("exit_status", "holds"), [(0, True), (1, False), (3, None)])
def test_verdict_of_memcheck(exit_status: int, holds: bool | None) -> None:
    """Found nothing, found errors, did not get to the end."""
    status = "failed" if exit_status else "done"
    part = {"status": status, "error": "x" if exit_status else None, "exit_status": exit_status}
    given = {"memcheck": record(memcheck={**part, "result": None})}
    (found,) = (each for each in verdicts.judged(given) if "memcheck" in each.claim)
    assert found.holds is holds


@pytest.mark.long
def test_a_whole_dry_run(tmp_path: Path) -> None:
    """Every stage and command on a CPU: all end well, and the second time nothing is run."""
    command = [sys.executable, str(ROOT / "bench/gpu.py"), "--dry", "--results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (tmp_path / "gpu.md").exists(), done.stdout + done.stderr
    found = outcomes(tmp_path)
    wrong = {name: part["error"] for name, part in found.items() if part["status"] != "done"}
    assert wrong.keys() <= {"memcheck"} and found["memcheck"]["status"] == "absent", wrong
    assert {part.name for stage in stages.dry() for part in stage.parts} == set(found)
    assert "nothing was checked" in wrong["memcheck"]
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.stdout.count("there already") == sum(len(stage.parts) for stage in stages.dry())
