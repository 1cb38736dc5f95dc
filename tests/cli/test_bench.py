"""`prefkern bench`: its numbers are right and really the providers', and a failure is a row."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress
from torch import Tensor

import prefkern
from prefkern.cli import __main__ as cli
from prefkern.version import install_line
from prefkern_bench import (
    group,
    main,
    models,
    pictures,
    problem,
    providers,
    shapes,
    step,
    suites,
)
from prefkern_bench import (
    options as bench_options,
)
from prefkern_bench.group import Settings
from prefkern_bench.measure import Meter
from prefkern_bench.report import PLAIN_PRODUCT, Row
from prefkern_bench.timing import Failure, Time, describe_failure, time_in_turns
from support.processes import environment
from support.versions import TRL_TILES

CPU = torch.device("cpu")
MODULES = {"liger": "liger_kernel", "trl": "trl", "cce": "cut_cross_entropy"}
MISSING = {name for name, module in MODULES.items() if importlib.util.find_spec(module) is None}
if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
    MISSING.add("torch-lce")
if TRL_TILES.is_too_old:
    MISSING.add("trl")
# compile takes a compiler and a minute; cce a GPU.
HERE = [n for n in ("prefkern", "eager", "torch-lce", "liger", "trl") if n not in MISSING]

# Products in NHV: of suite "operator" forward, frozen, trainable, and of "loss" frozen, trainable.
# Liger computes for the tokens that are not scored, too, half of them, and dW for a frozen head.
OPERATIONS = {
    "eager": (2, 4, 6, 6, 8),
    "torch-lce": (2, 6, 8, 8, 10),
    "trl": (2, 6, 8, 8, 10),
    "liger": (2, None, None, 12, 16),
}


class Failing(providers.Eager):
    """Eager until its calls are used up."""

    def __init__(self, error: BaseException, calls: int = 0) -> None:
        self.error, self.calls = error, calls

    def token_logps(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None
    ) -> Tensor:
        if not self.calls:
            raise self.error
        self.calls -= 1
        return super().token_logps(hidden, weight, labels, softcap)


def run(tmp_path: Path, *options: str) -> tuple[int, dict[str, Any]]:
    file = tmp_path / "result.json"
    status = main(["--quick", "--no-sweep", "--device", "cpu", "--json", str(file), *options])
    return status, json.loads(file.read_text())


def settings(**changes: Any) -> Settings:
    given: dict[str, Any] = {
        "providers": HERE,
        "tasks": list(bench_options.TASKS),
        "dtype": torch.bfloat16,
        "device": CPU,
        "workspace_mb": None,
        "warm_up": 0,
        "rounds": 1,
        "seconds": 60.0,
    }
    return Settings(**given | changes)


def test_rows_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["--providers", *HERE, providers.IN_ONE_PASS, "cce", "--suite", "operator", "loss"]
    status, report = run(tmp_path, *names, "--repeats", "2", "--pictures", str(tmp_path / "drawn"))
    assert status == 0 and report["finished"]
    rows = {(row["suite"], row["task"], row["provider"]): row for row in report["rows"]}
    tasks = [("operator", task) for task in ("forward", "frozen", "trainable")]
    tasks += [("loss", task) for task in ("frozen", "trainable")]
    expected = {(*task, name) for task in tasks for name in [*HERE, "cce", PLAIN_PRODUCT]}
    expected |= {(suite, "trainable", providers.IN_ONE_PASS) for suite in ("operator", "loss")}
    assert set(rows) == expected
    for (suite, task, name), row in rows.items():
        place = tasks.index((suite, task))
        if name == "cce":
            assert row["failure"]
        elif name == "liger" and OPERATIONS["liger"][place] is None:
            assert "its own losses" in row["failure"]
        elif name == PLAIN_PRODUCT:
            assert row["operations_nhv"] == 2 and row["product_ratio"] is None
        else:
            check(row, OPERATIONS.get(name, (2, 4, 6, 6, 8))[place])
    ours, eager = (rows["operator", "forward", name] for name in ("prefkern", "eager"))
    assert ours["token_logp_error"] < 1e-4 and eager["token_logp_error"] > 1e-3
    assert ours["plan"]["structure"] == "forward"
    assert rows["operator", "frozen", "prefkern"]["plan"]["operations"] == 4 * 32 * 64 * 1000
    assert report["versions"]["torch"] == torch.__version__
    assert report["device"] and report["date"] and "--quick" in report["command"]
    output = capsys.readouterr().out
    assert "prefkern" in output and "Times on a CPU" in output
    assert "\x1b" not in output  # nothing that moves a cursor where there is none
    assert (tmp_path / "drawn/result-errors.png").stat().st_size > 10_000


def check(row: dict[str, Any], operations: int | None) -> None:
    """A row of a provider that ran."""
    assert row["failure"] is None, row
    # torch's adds a product of vectors.
    assert row["operations_nhv"] == pytest.approx(operations, rel=1e-4) and row["peak_mib"] > 0
    assert len(row["all_ms"]) == 2
    assert min(row["all_ms"]) <= row["median_ms"] <= max(row["all_ms"]) + 1e-3
    assert row["product_ratio"] > 0 and row["floor_ratio"] > 0
    forward, head_trains = row["task"] == "forward", row["task"] == "trainable"
    assert (row["dhidden_error"] is None) == forward
    assert (row["dweight_error"] is None) == (not head_trains)
    assert row["sum_logp_error"] < 0.5 and row["sum_logp_mean_error"] <= row["sum_logp_error"]
    for error in ("dhidden_error", "dweight_error"):
        assert row[error] is None or 1e-4 < row[error] < 2e-2
    assert (row["plan"] is None) == (not row["provider"].startswith("prefkern"))


def test_float32_agrees_with_float64(tmp_path: Path) -> None:
    """In float32 all providers agree, so each got the problem of its row."""
    names = ["--providers", *HERE, "--suite", "operator", "loss", "--repeats", "1"]
    _, report = run(tmp_path, *names, "--warm-up", "0", "--dtype", "float32")
    errors = [name for name in Row.__annotations__ if name.endswith("_error")]
    for row in report["rows"]:
        if row["failure"] is None:
            for error in errors:
                assert row[error] is None or row[error] < 2e-5, (row["provider"], error)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_truth_is_that_of_autograd(softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problem, "TOKEN_TILE", 7)
    monkeypatch.setattr(problem, "VOCAB_TILE", 33)
    shape = shapes.Shape("", 2, 48, 16, 100, softcap)
    made = problem.make_problem(shape, torch.bfloat16, CPU, padded=True)
    truth = problem.truth_of(made, problem.dpo_grads(made))
    hidden, weight = (x.double().requires_grad_() for x in (made.hidden, made.weight))
    assert made.ref_hidden is not None
    out = prefkern.reference.preference_loss(
        prefkern.objectives.DPO(problem.BETA), hidden, weight, made.labels, softcap=softcap,
        ref_hidden=made.ref_hidden.double(), ref_weight=made.weight.double(),
    )  # fmt: skip
    out.loss.backward()
    scored = made.labels != problem.IGNORE_INDEX
    assert int(scored.sum()) == shape.tokens == scored.numel() // 2 and hidden.grad is not None
    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(truth.sums, torch.cat([out.chosen_logps, out.rejected_logps]))
    torch.testing.assert_close(truth.dhidden, hidden.grad[scored], **close)
    torch.testing.assert_close(truth.dweight, weight.grad, **close)
    assert truth.note is None

    some = problem.truth_of(made, problem.dpo_grads(made), operations=1.0)
    assert len(some.tokens) == len(some.entries) == 32 and some.note is not None
    torch.testing.assert_close(some.dhidden, truth.dhidden[some.tokens], **close)
    torch.testing.assert_close(some.dweight, truth.dweight[some.entries], **close)
    assert "32 of 48 tokens" in some.note and "32 of 100 vocabulary entries" in some.note


PEERS = {
    "trl": ("trl.kernels", "ChunkedLogProbFunction"),
    "torch-lce": ("torch.nn.functional", "linear_cross_entropy"),
    "liger": ("liger_kernel.chunked_loss", "LigerFusedLinearDPOLoss"),
    "compile": ("torch", "compile"),
    "prefkern": ("prefkern", "linear_logprobs"),
    "cce": ("cut_cross_entropy", "linear_cross_entropy"),
}


def of_peer(name: str) -> Any:
    """A case of a peer, which is skipped where the peer is too old or missing."""
    if name == "trl" and TRL_TILES.is_too_old:
        return TRL_TILES.param(name)
    missing = pytest.mark.skipif(name in MISSING, reason=f"{name} is not installed")
    return pytest.param(name, marks=missing)


@pytest.mark.parametrize("name", [of_peer(name) for name in PEERS])
def test_a_peer_s_row_is_the_peer_s(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each package's own function is called, and its result is the one that is scored."""
    module, attribute = importlib.import_module(PEERS[name][0]), PEERS[name][1]
    calls = []

    def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        calls.append(name)
        return providers.eager_logps(hidden, weight, labels, None) - 1

    class Function:  # of TRL
        forward = staticmethod(lambda outputs: None)
        apply = staticmethod(
            lambda hidden, weight, bias, labels, *rest: (eager(hidden, weight, labels), None)
        )

    class Loss:  # of Liger
        def __init__(self, **options: Any) -> None:
            pass

        def __call__(self, weight: Tensor, hidden: Tensor, labels: Tensor, **_: Any) -> Any:
            rows = len(labels)
            logps = eager(hidden.flatten(0, 1), weight, labels.flatten())
            return None, tuple(logps.view(rows, -1).sum(-1).chunk(2))

    def negative(hidden: Tensor, weight: Tensor, labels: Tensor, **_: Any) -> Tensor:
        return -eager(hidden, weight, labels)

    stand_ins: dict[str, Any] = {
        "trl": Function,
        "liger": Loss,
        "torch-lce": negative,
        "cce": negative,
        "compile": lambda function, **_: lambda h, w, y, softcap: eager(h, w, y),
        "prefkern": lambda h, w, y, **_: eager(h, w, y),
    }
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(module, attribute, stand_ins[name])
    made = problem.make_problem(shapes.QUICK[0], torch.float32, CPU, padded=False)
    with torch.no_grad():
        sums = providers.PROVIDERS[name](None, CPU).score(made).sums
        truth = providers.Eager().score(made).sums - made.labels.shape[1]
    torch.testing.assert_close(sums, truth)
    assert calls == [name]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried ..."), "out of memory"),
        (ModuleNotFoundError("no", name="liger_kernel"), "not installed (liger_kernel)"),
        (ImportError("cannot import name 'X'"), "ImportError: cannot import name 'X'"),
        (ValueError("first line\nsecond"), "ValueError: first line"),
    ],
)
@pytest.mark.parametrize("calls", [0, 3], ids=["at once", "while it is timed"])
def test_a_failure_is_a_row(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    expected: str,
    calls: int,
) -> None:
    monkeypatch.setitem(providers.PROVIDERS, "liger", lambda *_: Failing(error, calls))
    options = ["--suite", "operator", "--tasks", "frozen", "--providers", "liger", "eager"]
    status, report = run(tmp_path, *options)
    assert status == 0
    failed, eager, _ = report["rows"]
    assert failed["failure"] == expected and failed["median_ms"] is None
    assert eager["failure"] is None and len(eager["all_ms"]) == 2
    assert f"liger: {expected}" in capsys.readouterr().out


def test_a_package_that_is_missing_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("trl", "trl.kernels", "liger_kernel", "liger_kernel.chunked_loss"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    options = ["--suite", "operator", "--tasks", "forward", "--providers"]
    _, report = run(tmp_path, *options, "trl", "liger", "torch-lce")
    trl, liger, torch_lce = report["rows"]
    assert trl["failure"] == "not installed (trl)"
    assert "not installed (liger_kernel" in liger["failure"]
    assert "needs 2.13" in torch_lce["failure"]


def test_a_trl_that_holds_logits_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "trl.kernels" else find(name)
    )
    options = ["--suite", "operator", "--tasks", "forward", "--providers", "trl"]
    _, report = run(tmp_path, *options)
    (row,) = report["rows"]
    assert row["failure"].endswith(" holds logits; its tiles need 1.14")


def test_prefkern_failing_is_the_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(providers.PROVIDERS, "prefkern", lambda *_: Failing(ValueError("no")))
    status, _ = run(tmp_path, "--suite", "operator", "--providers", "prefkern")
    assert status == 1


def test_turns_are_taken() -> None:
    seen: list[str] = []

    def step_of(name: str) -> Any:
        def one() -> None:
            seen.append(name)
            if name == "c" and seen.count("c") == 3:
                raise ValueError("tired")

        return one

    advanced = []
    times = time_in_turns(
        {name: step_of(name) for name in "abc"}, CPU,
        warm_up=1, rounds=4, seconds=60, advance=lambda: advanced.append(1),
    )  # fmt: skip
    # Warm-up, then rounds that begin with another each time; c is out after its third.
    assert "".join(seen) == "abc" + "abc" + "bca" + "ab" + "ab"
    assert times["c"] == "ValueError: tired"
    assert len(times["a"]) == len(times["b"]) == 4 and len(advanced) == 5


def test_timing_ends_after_its_seconds() -> None:
    times = time_in_turns({"a": lambda: time.sleep(0.02)}, CPU, warm_up=0, rounds=50, seconds=0.01)
    assert len(times["a"]) == 3
    for each in times["a"]:
        # Sleep takes time, but not the processor's.
        assert each.wall >= 19 and 0 <= each.processor < 15


def test_ratios_are_to_the_plain_product() -> None:
    one = group.Group(lambda _: Row("", "", "", "", 0), lambda _: None, lambda *_: None, 1, 4)
    row = Row("operator", "", "frozen", "x", 0, operations_nhv=6.0)
    rows = {"x": row, PLAIN_PRODUCT: Row("operator", "", "frozen", PLAIN_PRODUCT, 0)}
    group._record_times(
        rows,
        {"x": [Time(ms * 2, ms) for ms in (30.0, 36.0, 90.0)], PLAIN_PRODUCT: [Time(99.0, 10.0)]},
        one,
    )
    # 36 ms of the processor, where plain products of 6 and 4 NHV take 30 and 20.
    assert (
        row.median_ms == 72 and row.processor_ms == 36 and row.product_ratio == pytest.approx(1.2)
    )
    assert row.floor_ratio == pytest.approx(1.8)


@pytest.mark.parametrize("hides", ["all", "one product"])
def test_what_cannot_be_counted_has_no_number(hides: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hidden(providers.Eager):
        is_visible = hides != "all"

        def token_logps(self, hidden: Tensor, weight: Tensor, *rest: Any) -> Tensor:
            # As if a kernel did it: no operator that is a matrix product.
            logits = (hidden.unsqueeze(-2) * weight).sum(-1)
            return providers.label_logps(logits, rest[0])

    monkeypatch.setitem(providers.PROVIDERS, "cce", lambda *_: Hidden())
    given = settings(providers=["cce"], tasks=["forward"])
    (one,) = suites.operator_groups(shapes.QUICK[0], given)
    row = group.measure(one, given, Progress(disable=True))[0]
    assert row.failure is None and row.operations is None and row.product_ratio is None
    assert "operations not counted" in (row.note or "")
    assert (row.peak_mib is None) == (hides == "all")


def test_the_file_is_kept_as_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is stopped leaves the rows of all earlier groups."""
    # One for each task: the second is stopped.
    monkeypatch.setitem(providers.PROVIDERS, "eager", lambda *_: next(made))
    made = iter([providers.Eager(), Failing(KeyboardInterrupt())])
    file = tmp_path / "result.json"
    options = ["--suite", "operator", "--providers", "eager", "--json", str(file)]
    with pytest.raises(KeyboardInterrupt):
        main(["--quick", "--device", "cpu", *options])
    report = json.loads(file.read_text())
    assert not report["finished"] and report["versions"]["torch"] == torch.__version__
    assert [(row["task"], row["provider"]) for row in report["rows"]] == [
        ("forward", "eager"), ("forward", PLAIN_PRODUCT),
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("task", step.TASKS)
def test_a_training_step(task: str) -> None:
    """Every provider runs the same step of the same model, and the model does not change."""
    if task == "lora":
        pytest.importorskip("peft")
    given = settings(tasks=[task])
    (one,) = step.step_groups(models.QUICK[0], given)
    trained = one.run.__self__
    before = [p.detach().clone() for p in trained.model.parameters()]
    rows = group.measure(one, given, Progress(disable=True))
    for old, new in zip(before, trained.model.parameters(), strict=True):
        assert torch.equal(old, new)
    assert [row.provider for row in rows] == HERE
    for row in rows:
        assert row.failure is None and row.operations and row.peak_mib and row.median_ms
        assert row.sum_logp_error is not None and row.sum_logp_error < 0.1
        assert row.operations_nhv is None
    ours, eager = rows[:2]
    # The model's own forward makes logits of every token, twice as many as are scored.
    nhv = 16 * 32 * 500
    extra = (eager.operations or 0) - (ours.operations or 0)
    # A trainable head takes one pass: its probabilities fit.
    assert extra == {"lora": (8 - 4) * nhv, "full": (12 - 6) * nhv}[task]
    assert ours.plan is not None and ours.sum_logp_error < 1e-4  # type: ignore[operator]
    assert ours.plan["structure"] == "one_pass"
    assert ours.plan["trains_head"] == (task == "full")
    assert all(p.requires_grad for p in trained.model.parameters()) == (task == "full")


def test_a_compiled_provider_is_counted_as_what_it_compiles() -> None:
    trained = step.TrainedModel(models.QUICK[0], "full", settings())
    operations = []
    for provider in (providers.Compiled(CPU).uncompiled(), providers.Eager()):
        with Meter() as meter:
            trained.step(provider)
        operations.append(meter.operations)
    # Half the tokens are scored; the model's own forward takes all to logits.
    assert operations[1] - operations[0] == 6 * 16 * 32 * 500


def test_a_step_s_gradients_are_those_of_the_logits() -> None:
    given = settings(dtype=torch.float32)
    trained = step.TrainedModel(models.QUICK[0], "full", given)
    gradients = {}
    trained.optimizer.step = lambda: None
    trained.optimizer.zero_grad = lambda: None
    for name in HERE:
        trained.model.zero_grad()
        trained.step(providers.PROVIDERS[name](None, CPU))
        gradients[name] = [p.grad.clone() for p in trained.model.parameters()]
    for name in HERE:
        for ours, truth in zip(gradients[name], gradients["eager"], strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-3, atol=1e-6)


def fake_report() -> dict[str, Any]:
    rows = []
    for tokens in (64, 128, 256):
        for task in ("forward", "frozen"):
            for name in ("prefkern", "eager"):
                row = Row(
                    "operator", f"odd N={tokens}" if tokens < 256 else "odd", task, name, tokens
                )
                row.median_ms, row.peak_mib, row.token_logp_error = tokens * 1.0, tokens / 4, 1e-3
                rows.append(vars(row))
    shape = {"name": "odd", "hidden_size": 1, "vocab_size": 2}
    return {"rows": rows, "shapes": [shape], "dtype": "bfloat16", "device": "a machine"}


def test_pictures(tmp_path: Path) -> None:
    from matplotlib import pyplot

    drawn = pictures.draw(fake_report(), tmp_path)
    assert [path.name for path in drawn] == ["bench-tokens.png", "bench-errors.png"]
    for path in drawn:
        image = pyplot.imread(path)
        # More than a blank page: many colours, and marks in prefkern's own.
        assert image.shape[1] > 800 and len(set(image[..., :3].reshape(-1, 3).sum(1))) > 20
    assert pyplot.get_fignums() == []


def test_pictures_need_matplotlib(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        pictures.pyplot()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        main(["--quick", "--pictures", "somewhere"])
    assert "pip install matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ["--shapes", "no such"],
        ["--shapes", "tiny", "--suite", "step"],
        ["--repeats", "0"],
        ["--json", "/no/such/folder/x.json"],
        ["--providers", "nobody"],
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(options: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--quick", *options])


def test_the_names_of_the_options_are_those_that_exist() -> None:
    assert (*suites.FEWEST, *step.TASKS) == bench_options.TASKS
    assert tuple(providers.PROVIDERS) == bench_options.PROVIDERS


def test_shapes_are_the_ones_promised() -> None:
    sizes = {s.name: (s.tokens, s.hidden_size, s.vocab_size, s.softcap) for s in shapes.GPU}
    assert sizes == {
        "Llama-3-8B": (16384, 4096, 128256, None),
        "Qwen3-0.6B": (16384, 1024, 151936, None),
        "Gemma-3-270M": (16384, 640, 262144, None),
        "Gemma-2-9B": (8192, 3584, 256000, 30.0),
        "long context": (32768, 4096, 128256, None),
    }
    for shape in [*shapes.KNOWN.values(), *shapes.swept(shapes.CPU[0])]:
        assert shape.length * 2 * shape.pairs == shape.tokens


def test_failures_fit_a_line() -> None:
    error = RuntimeError("backend raised:\n\nwhat happened " + "x" * 200 + "\nmore")
    assert describe_failure(error).startswith("RuntimeError: backend raised: what happened x")
    assert len(describe_failure(error)) == 120


def test_what_was_not_foreseen_keeps_its_traceback() -> None:
    """As text, in the row; memory that ran out and a peer that is not installed need none."""

    def steps() -> None:
        raise RuntimeError("what happened")

    found = time_in_turns({"a": steps}, CPU, warm_up=0, rounds=1, seconds=1)["a"]
    assert isinstance(found, Failure) and found == "RuntimeError: what happened"
    assert found.traceback is not None and ", in steps\n" in found.traceback
    # Files are named as they are imported: a result that is kept says nothing of its machine.
    assert re.search(r'File "[^/"]', found.traceback) and 'File "/' not in found.traceback
    row = Row("operator", "tiny", "forward", "prefkern", 1)
    row.fail(found)
    assert json.loads(json.dumps(asdict(row)))["traceback"] == found.traceback
    assert type(row.failure) is str
    for error in (torch.OutOfMemoryError("x"), ModuleNotFoundError(name="trl")):
        assert describe_failure(error).traceback is None


def test_help_needs_no_gpu_and_no_peer() -> None:
    code = (
        "import sys\nfor name in ('trl', 'liger_kernel', 'cut_cross_entropy', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"
        "from prefkern_bench import main\nmain(['--help'])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment()
    )
    assert "--pictures" in found.stdout


def test_a_benchmark_that_is_not_installed(monkeypatch, capsys) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "prefkern_bench" else find(name)
    )
    assert cli.main(["bench", "--quick"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("prefkern bench: error: the benchmark (prefkern_bench) is not installed")
    assert said.endswith(f" is not installed: {install_line('bench')}\n")
