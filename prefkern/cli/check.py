"""`prefkern check`: compares every backend of this machine with the float64 reference.

The check runs a grid of shapes, dtypes, transforms and heads: frozen; trained with the
probabilities kept for backward; trained with recomputation in backward. On each it compares
log-probs, dH and dW; then log-probs and the KL to a reference with its own head, and the policy's
dH and dW; then the whole preference loss. The truth is `prefkern.reference` in float64, on the same
inputs after rounding to the dtype. A row shows the worst of its shapes. The bounds are:

- log-probs and KL: 1e-3 nats per token for half-precision inputs, 1e-4 for float32;
- dH and dW, as norm of the error / norm of the truth: 1e-5 for float32. For half precision, the
  error of the eager path (logits in memory, same dtype and device) on the same inputs.

Without a GPU the Triton kernels run in Triton's interpreter. Exit status 1 if an error is above its
bound. `--quick` takes the cases that contain most of the others: some seconds. Where the output is
not a terminal, each case is written as it ends. The last line is one to paste into a report.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from prefkern.cli.arguments import spelled
from prefkern.keywords import full_dtype

# Half-precision results that are rounded once may exceed eager's error a little, by chance.
EAGER_SLACK = 1.02
LOGP_BOUND = {"float32": 1e-4, "bfloat16": 1e-3, "float16": 1e-3}
# N, H, V and a workspace in MiB, so small that tokens and vocabulary both take several tiles. The
# interpreter is slow for each token and tile, so it gets fewer of them.
SHAPES = ((96, 64, 1000, 0.1), (33, 96, 127, 0.02), (256, 32, 4099, 0.5))
INTERPRETED_SHAPES = ((18, 64, 300, 0.03), (17, 32, 127, 0.01))
# A workspace in MiB that holds everything: one tile, and a trained head's probabilities are kept.
ROOMY = 64
HEADS = ("frozen", "kept", "recomputed")
TRANSFORMS = {
    "none": {},
    "bias": {"bias": True},
    "scale": {"logit_scale": 0.125},
    "softcap": {"softcap": 5.0},
    "all": {"bias": True, "logit_scale": 1.5, "softcap": 20.0, "temperature": 0.7},
}


# Of `--quick`: every transform at once, the KL and the loss, and in the interpreter one dtype.
QUICK = ("all", "kl", "loss")
QUICK_INTERPRETED_DTYPE = "bfloat16"

# Backend, device, dtype, case, head.
Case = tuple[str, str, str, str, str]


@dataclasses.dataclass
class Row:
    """The worst errors of one backend, dtype, transform and head, with their bounds."""

    backend: str
    dtype: str
    case: str
    head: str
    logp: float = 0.0
    logp_bound: float = 0.0
    dhidden: float = 0.0
    dhidden_bound: float = 0.0
    dweight: float | None = None
    dweight_bound: float | None = None

    @property
    def passed(self) -> bool:
        return all(part <= 1 for part in self.parts().values())

    def parts(self) -> dict[str, float]:
        """Each error as a part of its bound; a NaN is infinite, and so is any error without one."""
        pairs = {
            "logp": (self.logp, self.logp_bound),
            "dH": (self.dhidden, self.dhidden_bound),
            "dW": (self.dweight, self.dweight_bound),
        }
        return {
            name: _part(error, bound)
            for name, (error, bound) in pairs.items()
            if error is not None and bound is not None
        }


def _part(error: float, bound: float) -> float:
    if math.isnan(error) or math.isnan(bound):
        return math.inf
    if not bound:
        return math.inf if error else 0.0
    return error / bound


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="prefkern check", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random inputs")
    parser.add_argument(
        "--dtype",
        action="append",
        type=full_dtype,
        choices=list(LOGP_BOUND),
        help="only this dtype; may be given more than once",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="the cases that contain most of the others, in some seconds",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    args = parser.parse_args(spelled(argv, "-"))
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json: there is no folder {args.json.parent}")

    import torch

    if not torch.cuda.is_available() and "triton" not in sys.modules:
        os.environ.setdefault("TRITON_INTERPRET", "1")

    from rich.console import Console

    console = Console()
    runs = _backends()
    cases = [
        (backend, device, dtype, name, head)
        for backend, device in runs
        for dtype in _dtypes(args, backend, device)
        for name in (QUICK if args.quick else [*TRANSFORMS, "kl", "loss"])
        for head in HEADS
    ]
    rows = [_check(*case, seed=args.seed, quick=args.quick) for case in _shown(cases, console)]
    for backend in dict.fromkeys(row.backend for row in rows):
        console.print(_table(backend, [row for row in rows if row.backend == backend]))
    console.print(_environment(runs))
    missed = [row for row in rows if not row.passed]
    console.print(f"{len(rows) - len(missed)} of {len(rows)} within bounds")
    pasted = _line(rows, runs)
    console.print(
        f"To paste into a report:\n{pasted}", markup=False, highlight=False, soft_wrap=True
    )
    if args.json:
        from prefkern.training.files import write_json

        rows_of = [dataclasses.asdict(row) | {"passed": row.passed} for row in rows]
        write_json(args.json, {"line": pasted, "rows": rows_of}, indent=1)
    return 1 if missed else 0


def _dtypes(args: argparse.Namespace, backend: str, device: str) -> Iterable[str]:
    if args.quick and not args.dtype and _interpreted(backend, device):
        return [QUICK_INTERPRETED_DTYPE]
    return args.dtype or LOGP_BOUND


def _interpreted(backend: str, device: str) -> bool:
    return backend == "triton" and device == "cpu"


def _shown(cases: list[Case], console: Any) -> Iterator[Case]:
    """The cases one by one: a bar in a terminal; else a line for each dtype, as it goes."""
    from rich.progress import track

    if console.is_terminal:
        yield from track(cases, "checking", console=console, transient=True)
        return
    begun: tuple[str, ...] = ()
    for backend, device, dtype, name, head in cases:
        if begun[:2] != (f"{backend} on {device}", dtype):
            end = "\n" if begun else ""
            print(f"{end}{backend} on {device}, {dtype}:", end="", flush=True)
            begun = ()
        yield backend, device, dtype, name, head
        if begun[2:] != (name,):
            print(f" {name}", end="", flush=True)
        begun = (f"{backend} on {device}", dtype, name)
    print(flush=True)


def _backends() -> list[tuple[str, str]]:
    """Each (backend, device) that this machine can run."""
    import torch

    from prefkern.ops import call

    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    runs = [("torch", device) for device in devices]
    for device in devices:
        try:
            call.resolve_backend("triton", torch.device(device))
        except RuntimeError:
            continue
        runs.append(("triton", device))
    return runs


def _check(
    backend: str, device: str, dtype: str, case: str, head: str, seed: int, quick: bool = False
) -> Row:
    row = Row(f"{backend} on {device}", dtype, case, head)
    measure = {"loss": _loss_errors, "kl": _kl_errors}.get(case, _operator_errors)
    shapes = INTERPRETED_SHAPES if _interpreted(backend, device) else SHAPES
    for N, H, V, small in shapes[:1] if quick else shapes:
        shape = (N, H, V, ROOMY if head == "kept" else small)
        errors, bounds = measure(backend, device, dtype, case, head != "frozen", shape, seed)
        for name, error in errors.items():
            worst, bound = getattr(row, name), getattr(row, f"{name}_bound")
            # Keep the shape that uses the largest part of its bound; a NaN counts as the worst.
            if worst is None or not bound or not error / bounds[name] <= worst / bound:
                setattr(row, name, error)
                setattr(row, f"{name}_bound", bounds[name])
    return row


def _operator_errors(
    backend: str,
    device: str,
    dtype: str,
    case: str,
    trained: bool,
    shape: tuple[int, int, int, float],
    seed: int,
) -> tuple[dict[str, float], dict[str, float]]:
    """Errors and bounds of logp, dH and dW of `linear_logprobs` on one shape."""
    import torch

    from prefkern import linear_logprobs, reference

    N, H, V, workspace_mb = shape
    options = dict(TRANSFORMS[case])
    has_bias = options.pop("bias", False)
    generator = torch.Generator().manual_seed(seed)
    # Logits with a spread of 5, as in a trained model. Half of the tokens predict their label.
    hidden = torch.randn(N, H, generator=generator) * 5 / H**0.5
    weight = torch.randn(V, H, generator=generator)
    bias = torch.randn(V, generator=generator)
    labels = torch.randint(V, (N,), generator=generator)
    labels[: N // 2] = (hidden @ weight.T).argmax(-1)[: N // 2]
    labels[::7] = -100
    grad = torch.randn(N, generator=generator).to(device)

    def run(function, cast, **keywords):
        h, w, b = (cast(x).to(device).requires_grad_() for x in (hidden, weight, bias))
        w.requires_grad_(trained)
        b.requires_grad_(trained)
        logps = function(h, w, labels.to(device), b if has_bias else None, **options, **keywords)
        logps.backward(grad.to(logps.dtype))
        return logps.detach(), h.grad, w.grad

    rounded = getattr(torch, dtype)
    ours = run(
        linear_logprobs,
        lambda x: x.to(rounded, copy=True),
        backend=backend,
        workspace_mb=workspace_mb,
    )
    eager = run(reference.linear_logprobs, lambda x: x.to(rounded, copy=True))
    truth = run(reference.linear_logprobs, lambda x: x.to(rounded).double())
    _assert_structure(trained, workspace_mb)
    return _compare(ours, eager, truth, dtype)


def _kl_errors(
    backend: str,
    device: str,
    dtype: str,
    case: str,
    trained: bool,
    shape: tuple[int, int, int, float],
    seed: int,
) -> tuple[dict[str, float], dict[str, float]]:
    """The same for `linear_kl`; "logp" is the worse error of the log-prob and the KL."""
    import torch

    from prefkern import linear_kl, reference

    del case
    N, H, V, workspace_mb = shape
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=generator) * 5 / H**0.5
    ref_hidden = hidden + 0.3 * torch.randn(N, H, generator=generator) / H**0.5
    weight = torch.randn(V, H, generator=generator)
    labels = torch.randint(V, (N,), generator=generator)
    labels[::7] = -100
    grads = torch.randn(2, N, generator=generator).to(device)

    def run(function, cast, **keywords):
        h, w = (cast(x).to(device).requires_grad_() for x in (hidden, weight))
        w.requires_grad_(trained)
        reference_head = (cast(ref_hidden).to(device), cast(weight).to(device))
        out = function(h, w, labels.to(device), *reference_head, **keywords)
        values = torch.stack([out.logps, out.kl])
        values.backward(grads.to(values.dtype))
        return values.detach(), h.grad, w.grad

    rounded = getattr(torch, dtype)
    ours = run(
        linear_kl, lambda x: x.to(rounded, copy=True), backend=backend, workspace_mb=workspace_mb
    )
    _assert_structure(trained, workspace_mb)
    eager = run(reference.linear_kl, lambda x: x.to(rounded, copy=True))
    truth = run(reference.linear_kl, lambda x: x.to(rounded).double())
    return _compare(ours, eager, truth, dtype)


def _loss_errors(
    backend: str,
    device: str,
    dtype: str,
    case: str,
    trained: bool,
    shape: tuple[int, int, int, float],
    seed: int,
) -> tuple[dict[str, float], dict[str, float]]:
    """The same for AdaDPO's loss; "logp" is a sequence's log-prob per token."""
    import torch

    from prefkern import FusedPreferenceLoss, objectives, reference

    del case
    N, H, V, workspace_mb = shape
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(4, N // 4, H, generator=generator) * 5 / H**0.5
    ref_hidden = hidden + 0.1 * torch.randn(hidden.shape, generator=generator) / H**0.5
    weight = torch.randn(V, H, generator=generator)
    labels = torch.randint(V, hidden.shape[:-1], generator=generator)
    labels[:, : N // 16] = -100
    objective = objectives.build("adadpo", beta=0.1)

    def run(function, cast):
        h, w = (cast(x).to(device).requires_grad_() for x in (hidden, weight))
        w.requires_grad_(trained)
        out = function(
            h, w, labels.to(device), ref_hidden=cast(ref_hidden).to(device), ref_weight=w
        )
        out.loss.backward()
        return out.chosen_logps.detach() / out.chosen_lengths, h.grad, w.grad

    def oracle(*args, **keywords):
        return reference.preference_loss(objective, *args, **keywords)

    rounded = getattr(torch, dtype)
    fused = FusedPreferenceLoss(objective, backend=backend, workspace_mb=workspace_mb)
    ours = run(fused, lambda x: x.to(rounded, copy=True))
    _assert_structure(trained, workspace_mb)
    eager = run(oracle, lambda x: x.to(rounded, copy=True))
    truth = run(oracle, lambda x: x.to(rounded).double())
    return _compare(ours, eager, truth, dtype)


def _assert_structure(trained: bool, workspace_mb: float) -> None:
    """Assert that the plan that ran is the one that the row's head names."""
    from prefkern import last_plan

    plan = last_plan()
    assert plan is not None and plan.trains_head == trained
    assert (plan.structure == "two_pass") == (trained and workspace_mb != ROOMY)


def _compare(ours, eager, truth, dtype: str) -> tuple[dict[str, float], dict[str, float]]:
    errors = {"logp": (ours[0].double() - truth[0]).abs().max().item()}
    bounds = {"logp": LOGP_BOUND[dtype]}
    for index, name in ((1, "dhidden"), (2, "dweight")):
        if truth[index] is None:
            continue
        size = truth[index].norm()
        errors[name] = ((ours[index].double() - truth[index]).norm() / size).item()
        bounds[name] = 1e-5
        if dtype != "float32":
            bounds[name] = (
                EAGER_SLACK * ((eager[index].double() - truth[index]).norm() / size).item()
            )
    return errors, bounds


def _table(backend: str, rows: list[Row]):
    from rich import box
    from rich.table import Table

    table = Table(
        title=f"{backend}: error / bound (logp in nats, dH and dW relative)",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    for column in ("dtype", "case", "head"):
        table.add_column(column)
    for column in ("logp", "dH", "dW"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    previous = rows[0].dtype
    for row in rows:
        if row.dtype != previous:
            table.add_section()
        previous = row.dtype
        cells = [
            "-" if error is None or bound is None else f"{_short(error)} / {_short(bound)}"
            for error, bound in (
                (row.logp, row.logp_bound),
                (row.dhidden, row.dhidden_bound),
                (row.dweight, row.dweight_bound),
            )
        ]
        verdict = "[green]ok[/]" if row.passed else "[bold red]MISS[/]"
        table.add_row(_SHORT_DTYPES[row.dtype], row.case, row.head, *cells, verdict)
    return table


_SHORT_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def _short(value: float) -> str:
    return f"{value:.1e}".replace("e-0", "e-")


def _line(rows: list[Row], runs: list[tuple[str, str]]) -> str:
    """The verdict, the device, the versions and the error that uses most of its bound."""
    import importlib.metadata
    import platform

    import torch

    import prefkern

    missed = [row for row in rows if not row.passed]
    parts = [f"{len(rows) - len(missed)} of {len(rows)} within bounds"]
    device = f"no GPU, {platform.machine()}"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    versions = [f"torch {torch.__version__}", f"python {platform.python_version()}"]
    if any(backend == "triton" for backend, _ in runs):
        versions.insert(1, f"triton {importlib.metadata.version('triton')}")
    if ("triton", "cpu") in runs:
        versions.append("Triton's interpreter")
    parts.append(", ".join([device, *versions]))
    part, name, row = max(
        ((part, name, row) for row in rows for name, part in row.parts().items()),
        key=lambda each: each[0],
    )
    parts.append(f"nearest its bound: {name} at {part:.2f} of it ({_named(row)})")
    if missed:
        some = [_named(row) for row in missed[:_NAMED]]
        some += [f"and {len(missed) - _NAMED} more"] * (len(missed) > _NAMED)
        parts.append("misses: " + "; ".join(some))
    return f"prefkern check {prefkern.__version__}: " + " | ".join(parts)


_NAMED = 3  # misses that a line names


def _named(row: Row) -> str:
    return f"{row.backend}, {_SHORT_DTYPES[row.dtype]}, {row.case}, {row.head}"


def _environment(runs: list[tuple[str, str]]) -> str:
    import platform

    import torch

    import prefkern

    versions = f"prefkern {prefkern.__version__}, torch {torch.__version__}"
    lines = [f"{versions}, Python {platform.python_version()}, {platform.machine()}"]
    if torch.cuda.is_available():
        tf32 = torch.backends.cuda.matmul.allow_tf32
        lines.append(f"{torch.cuda.get_device_name()}; TF32 products {'on' if tf32 else 'off'}")
    if ("triton", "cpu") in runs:
        lines.append("no GPU: the Triton kernels ran in Triton's interpreter")
    elif not any(backend == "triton" for backend, _ in runs):
        lines.append("the triton backend cannot run here")
    return "\n".join(lines)
