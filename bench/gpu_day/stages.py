"""The stages of `bench/gpu.py` in the order of what matters, their commands and their limits of time.

A stage is a list of parts, and a part is one command in a process of its own. `real` is for a GPU:
a stage ends at the sum of the limits up to its own, so that the time that one leaves is the next
one's. `dry` has the same stages and commands on a CPU: tiny shapes, Triton's interpreter, and of
the tests a few.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# Stands for the file that a command writes its result into.
RESULT = "{result}"
MODULE = ["-m"]
BENCH = [*MODULE, "prefkern.cli", "bench", "--no-sweep", "--json", RESULT]
CHECK = [*MODULE, "prefkern.cli", "check", "--json", RESULT]
PYTEST = [*MODULE, "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={RESULT}"]
# A test that hangs says where.
PYTEST += ["-o", "faulthandler_timeout=25"]

SHAPES = ("Llama-3-8B", "Qwen3-0.6B", "Gemma-3-270M", "Gemma-2-9B")
DRY_SHAPES = ("tiny",)
PEERS = ("eager", "trl", "torch-lce")
# What these compile at first may take longer than all that they are compared with.
SLOW_TO_BEGIN = ("liger", "cce")
OURS = ("prefkern", "prefkern-roomy", "prefkern-fold")


@dataclass(frozen=True)
class Part:
    """One command of a stage.

    Args:
        command: after the interpreter; `RESULT` stands for the file of its result.
        seconds: the most that it may take.
        reads: what the result is: "json", a file of JUnit's ("junit"), or nothing ("").
        absent: the exit status that says that this machine lacks what the part needs.
    """

    name: str
    command: list[str]
    seconds: float
    reads: str = "json"
    absent: int | None = None
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """Parts that belong together, with one result file and a share of the time."""

    name: str
    title: str
    seconds: float
    parts: list[Part]


def real() -> list[Stage]:
    """The stages on a GPU: at most eight minutes with what starts and ends the run."""
    return [
        Stage("check", "prefkern check", 60, [Part("quick", [*CHECK, "--quick"], 60)]),
        Stage(
            "tests",
            "tests on the device",
            70,
            [
                _tests("kernels", 50, "tests/kernels/test_kernels.py"),
                _tests("guards", 40, "tests/kernels/test_guards.py"),
                _tests("determinism", 40, "tests/ops/test_determinism.py"),
                _tests("gradients", 40, "tests/ops/test_linear_logprobs.py"),
                _tests("pair kernel", 30, "tests/kernels/test_pair_kernel.py"),
                _tests("product fold", 30, "tests/kernels/test_product_fold.py"),
            ],
        ),
        Stage(
            "operator",
            "log-probs and gradients beside the peers",
            135,
            [
                # The default holds what a trained head keeps, as "prefkern-roomy" does: of the two
                # workspaces the other is small.
                *(_shape(shape, [*OURS, *PEERS], 40, "--workspace-mb", "1024") for shape in SHAPES),
                _own("tiles", 40, "gpu_day.tiles", "--shapes", *SHAPES[:2]),
                _bench("Liger and CCE", 45, "operator", SHAPES, ["prefkern", *SLOW_TO_BEGIN]),
                _bench("loss", 30, "loss", SHAPES[:1], [*OURS[:2], "liger", "trl"]),
                _bench("compile", 40, "operator", SHAPES[:2], ["prefkern", "compile"]),
            ],
        ),
        Stage(
            "step",
            "a training step of Llama-shaped layers",
            65,
            [
                _bench("peers", 40, "step", ["Llama-3-8B, 2 layers"], ["prefkern", "eager", "trl"]),
                _own("layouts", 40, "gpu_day.layouts"),
            ],
        ),
        Stage("profile", "one call, kernel by kernel", 25, [_own("calls", 25, "gpu_day.profile")]),
        Stage("memcheck", "compute-sanitizer's memcheck", 45, [_memcheck(60)]),
        Stage(
            "modes",
            "graphs, compilation, fp16, memory that runs out",
            50,
            [
                _tests(
                    "CUDA graph", 30, "tests/ops/test_compile.py", "-k", "cuda_graph", workers=0
                ),
                _tests("fp16 with a scaler", 30, "tests/loss/test_scaler.py", workers=0),
                _tests("out of memory", 40, "tests/ops/test_refusals.py", workers=0),
                _tests("packed attention", 30, "tests/models/test_varlen.py", workers=0),
                _tests("torch.compile", 60, "tests/ops/test_compile.py"),
                Part("check, all cases", CHECK, 90),
            ],
        ),
    ]


def dry() -> list[Stage]:
    """The same commands on a CPU, as small as they get."""
    quick = ["--quick", "--device", "cpu"]
    tasks = ["--repeats", "1", "--warm-up", "0"]
    return [
        Stage(
            "check",
            "prefkern check",
            200,
            [Part("quick", [*CHECK, "--quick", "--dtype", "bfloat16"], 200)],
        ),
        Stage(
            "tests",
            "tests on the device",
            300,
            [
                _tests("kernels", 150, "tests/kernels/test_kernels.py", "-k", "rescale", workers=0),
                _tests(
                    "determinism", 150, "tests/ops/test_determinism.py", "-k", "head", workers=0
                ),
            ],
        ),
        Stage(
            "operator",
            "log-probs and gradients beside the peers",
            400,
            [
                _shape("tiny", [*OURS, *PEERS, *SLOW_TO_BEGIN], 200, *quick, *tasks),
                _own("tiles", 100, "gpu_day.tiles", "--shapes", "tiny"),
            ],
        ),
        Stage(
            "step",
            "a training step of Llama-shaped layers",
            300,
            [
                _bench(
                    "peers",
                    200,
                    "step",
                    ["tiny model"],
                    ["prefkern", "eager", "trl"],
                    *quick,
                    *tasks,
                ),
                _own("layouts", 200, "gpu_day.layouts", "--dry"),
            ],
        ),
        Stage(
            "profile",
            "one call, kernel by kernel",
            200,
            [_own("calls", 200, "gpu_day.profile", "--dry")],
        ),
        Stage("memcheck", "compute-sanitizer's memcheck", 100, [_memcheck(100)]),
        Stage(
            "modes",
            "graphs, compilation, fp16, memory that runs out",
            400,
            [
                _tests(
                    "CUDA graph", 100, "tests/ops/test_compile.py", "-k", "cuda_graph", workers=0
                ),
                _tests("fp16 with a scaler", 150, "tests/loss/test_scaler.py", workers=0),
                _tests("out of memory", 150, "tests/ops/test_refusals.py", workers=0),
            ],
        ),
    ]


def _tests(name: str, seconds: float, *options: str, workers: int = 8) -> Part:
    """Tests of the suite; on a machine with cores to spare most of their time is compilation."""
    spread = ["-n", str(workers), "--dist", "worksteal"] if workers else []
    return Part(name, [*PYTEST, *options, *spread], seconds, "junit")


def _shape(shape: str, providers: list[str], seconds: float, *options: str) -> Part:
    """Suite "operator" at one shape: two workspaces, both ways of the product, and the peers."""
    return _bench(shape, seconds, "operator", [shape], providers, *options)


def _bench(
    name: str,
    seconds: float,
    suite: str,
    shapes: tuple[str, ...] | list[str],
    providers: list[str],
    *options: str,
) -> Part:
    given = ["--suite", suite, "--shapes", *shapes, "--providers", *providers]
    brief = (
        [] if "--repeats" in options else ["--repeats", "8", "--warm-up", "1", "--seconds", "1.5"]
    )
    return Part(name, [*BENCH, *given, *brief, *options], seconds)


def _own(name: str, seconds: float, module: str, *options: str) -> Part:
    return Part(name, [*MODULE, module, "--json", RESULT, *options], seconds)


def _memcheck(seconds: float) -> Part:
    return Part("memcheck", ["tests/sanitize.py", "--tools", "memcheck"], seconds, "", absent=2)
