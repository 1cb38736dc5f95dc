"""Measures what must not change a training run: packing, resumption, ranks, an adapter on the head.

usage: python bench/training.py [--page]         (exit status 1 if a bound is missed)

The models are tiny, on a CPU in float32. The cases and bounds are those of the tests; this script
shows how far the numbers are below the bounds. It writes bench/results/training-cpu.json. From that
and from the result of bench/twins.py it writes the page bench/TRAINING.md. With --page it writes
only the page, from existing results.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in (".", "kernels", "tests")]

import datasets
import torch
from torch import Tensor

import prefkern
from prefkern_bench import environment
from support import ddp, tiny
from support.packed import PACKS, both_ways, gradients_of
from support.resumed import CASES, logs_of, run_of
from support.training import step_logs, weights

PAGE = ROOT / "bench/TRAINING.md"
RESULT = ROOT / "bench/results/training-cpu.json"
TWINS = ROOT / "bench/results/trl-twin-cpu.json"
# Bounds for float32, relative to a tensor's norm, or to the norm of all tensors if that of the
# tensor is only rounding.
BOUNDS = {"packing": 2e-5, "ranks": 1e-4, "adapter": 1e-5}
HALF_BOUND = 6e-3


def relative(a: Tensor, b: Tensor, floor: float = 1e-30) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=floor)).item()


def packing() -> list[dict[str, Any]]:
    """Padded against packed runs: the largest difference of a loss and of a gradient."""
    rows = []
    for family in PACKS:

        def model(seed: int, family: str = family) -> Any:
            return tiny.model(family, seed, **PACKS[family])

        with tempfile.TemporaryDirectory() as folder:
            runs = both_ways(Path(folder), model, ref_model=lambda model=model: model(1), count=8)
        losses = [[log["loss"] for log in step_logs(run)] for run in runs]
        gradients = [gradients_of(run) for run in runs]
        worst = 0.0
        for padded, packed in zip(*gradients, strict=True):
            total = torch.cat([gradient.flatten() for gradient in padded.values()]).norm().item()
            for name, gradient in padded.items():
                worst = max(worst, (packed[name] - gradient).norm().item() / total)
        batches = [next(iter(run.get_train_dataloader()))["input_ids"].numel() for run in runs]
        rows.append(
            {
                "family": family,
                "steps": len(losses[0]),
                "loss": max(abs(x - y) / x for x, y in zip(*losses, strict=True)),
                "gradient": worst,
                "tokens_padded": batches[0],
                "tokens_packed": batches[1],
            }
        )
    return rows


def resumption() -> list[dict[str, Any]]:
    """Runs stopped after 3 of 8 steps and resumed: the weights that are not bitwise equal."""
    rows = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            whole = run_of(Path(folder), case)
            whole.train()
            resumed = run_of(Path(folder), case, save_strategy="no")
            resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-3")
        mine, theirs = weights(resumed.model), weights(whole.model)
        logged = logs_of(whole)
        rows.append(
            {
                "case": case,
                "steps": whole.state.global_step,
                "weights": len(theirs),
                "weights_that_differ": sum(not torch.equal(mine[n], theirs[n]) for n in theirs),
                "numbers_logged": sum(map(len, logged)),
                "logs_equal": logs_of(resumed) == logged,
            }
        )
    return rows


def ranks() -> list[dict[str, Any]]:
    """Two ranks under torchrun against one process on the joint batch: gradients of each step."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        ddp.launch(Path(folder), *ddp.CASES)
        both = [torch.load(f"{folder}/rank{rank}.pt") for rank in range(2)]
        for case in ddp.CASES:
            expected = ddp.gradients_of(Path(folder), case, ranks=1)["gradients"]
            first, second = (outcome[case]["gradients"] for outcome in both)
            worst = max(
                relative(mine[name], joint[name], 1e-4)
                for mine, joint in zip(first, expected, strict=True)
                for name in joint
            )
            differ = sum(
                not torch.equal(mine[name], other[name])
                for mine, other in zip(first, second, strict=True)
                for name in mine
            )
            pairs, batch, accumulated, _ = ddp.CASES[case]
            rows.append(
                {
                    "case": case,
                    "pairs": pairs,
                    "batch": batch,
                    "accumulated": accumulated,
                    "gradients": sum(map(len, first)),
                    "gradients_that_differ_between_ranks": differ,
                    "worst": worst,
                }
            )
    return rows


def adapter() -> list[dict[str, Any]]:
    """LoRA on the head: errors of log-probs and gradients against float64; also eager's errors."""
    N, H, R, V = 512, 512, 16, 8192
    draw = torch.Generator().manual_seed(0)
    shapes = {"hidden": (N, H), "A": (R, H), "B": (V, R)}
    exact = {n: torch.randn(*s, generator=draw, dtype=torch.float64) for n, s in shapes.items()}
    exact["A"] /= H**0.5
    exact["B"] *= 0.5
    weight = torch.randn(V, H, generator=draw, dtype=torch.float64) * 2 / H**0.5
    labels = torch.randint(V, (N,), generator=draw)
    push = torch.randn(N, generator=draw, dtype=torch.float64)

    def gradients(function: Any, dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
        leaves = {n: x.detach().to(dtype, copy=True).requires_grad_() for n, x in rounded.items()}
        hidden, a, b = leaves.values()
        logps = function(
            hidden, rounded_weight.to(dtype), labels,
            lora_hidden=hidden @ a.T, lora_weight=b, **options,
        )  # fmt: skip
        (logps * push.to(logps.dtype)).sum().backward()
        return {"logp": logps.detach(), **{f"d{n}": leaf.grad for n, leaf in leaves.items()}}

    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        rounded = {n: x.to(dtype).double() for n, x in exact.items()}
        rounded_weight = weight.to(dtype).double()
        for softcap in (None, 5.0):
            keywords = {"softcap": softcap}
            truth = gradients(prefkern.reference.linear_logprobs, torch.float64, **keywords)
            ways = {
                "prefkern, kept": {"workspace_mb": 256},
                "prefkern, recomputed": {"workspace_mb": 8},
                "logits in memory": None,
            }
            for way, options in ways.items():
                function = prefkern.linear_logprobs
                if options is None:
                    function = prefkern.reference.linear_logprobs
                mine = gradients(function, dtype, **keywords, **(options or {}))
                plan = None if options is None else prefkern.last_plan()
                errors = {
                    name: relative(mine[name], truth[name]) for name in truth if name != "logp"
                }
                rows.append(
                    {
                        "dtype": str(dtype).removeprefix("torch."),
                        "softcap": softcap,
                        "way": way,
                        "nhv": None if plan is None else plan.operations_nhv,
                        "logp": (mine["logp"].double() - truth["logp"]).abs().max().item(),
                        **errors,
                    }
                )
    return rows


def misses(result: dict[str, Any]) -> list[str]:
    """The cases that are above their bound."""
    found = []
    for row in result["packing"]:
        if not max(row["loss"], row["gradient"]) <= BOUNDS["packing"]:
            found.append(f"packing, {row['family']}")
    for row in result["resumption"]:
        if row["weights_that_differ"] or not row["logs_equal"]:
            found.append(f"resumption, {row['case']}")
    for row in result["ranks"]:
        bound = 0.05 if "bf16" in row["case"] else BOUNDS["ranks"]
        if row["gradients_that_differ_between_ranks"] or not row["worst"] <= bound:
            found.append(f"ranks, {row['case']}")
    for row in result["adapter"]:
        bound = BOUNDS["adapter"] if row["dtype"] == "float32" else HALF_BOUND
        worst = max(row[name] for name in ("dhidden", "dA", "dB"))
        if row["way"] != "logits in memory" and not worst <= bound:
            found.append(f"adapter, {row['dtype']}, {row['way']}")
    return found


def _table(columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join(lines)


def page(result: dict[str, Any], twins: dict[str, Any]) -> str:
    """The page, in Markdown, from both results."""

    def made(by: dict[str, Any]) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in by["versions"].items())
        return f"`{by['command']}` on {by['device']}; {versions}; {by['date'][:10]}."

    packed = [
        (r["family"], r["steps"], f"{r['loss']:.0e}", f"{r['gradient']:.0e}", r["tokens_padded"],
         r["tokens_packed"])
        for r in result["packing"]
    ]  # fmt: skip
    resumed = [
        (r["case"], r["steps"], f"{r['weights_that_differ']} of {r['weights']}",
         r["numbers_logged"], "equal" if r["logs_equal"] else "different")
        for r in result["resumption"]
    ]  # fmt: skip
    spread = [
        (r["case"], r["pairs"], f"2 x {r['batch']} x {r['accumulated']}",
         f"{r['gradients_that_differ_between_ranks']} of {r['gradients']}", f"{r['worst']:.0e}")
        for r in result["ranks"]
    ]  # fmt: skip
    adapted = [
        (r["dtype"], "-" if r["softcap"] is None else r["softcap"], r["way"],
         "-" if r["nhv"] is None else f"{r['nhv']:.2f}",
         *(f"{r[name]:.1e}" for name in ("logp", "dhidden", "dA", "dB")))
        for r in result["adapter"]
    ]  # fmt: skip
    sides = [
        (twin["name"], step, f"{row['trl_loss']:.7f}", f"{row['prefkern_loss']:.7f}",
         f"{row['worst_gradient']:.0e}")
        for twin in twins["rows"]
        if ":" not in twin["name"]
        for step, row in enumerate(twin["steps"], 1)
    ]  # fmt: skip
    worst = [
        (twin["name"], f"{max(abs(s['trl_loss'] - s['prefkern_loss']) for s in twin['steps']):.0e}",
         f"{max(s['worst_gradient'] for s in twin['steps']):.0e}", f"{twin['weights']:.0e}",
         f"{twin['metrics']:.0e}")
        for twin in twins["rows"]
    ]  # fmt: skip
    return f"""# What must not change a training run

Tiny models, float32 unless said otherwise, on a CPU. {made(result)}

## Packed against padded

AdaDPO with a separate reference model, steps of 4 pairs. Loss: the largest relative difference.
Gradient: the largest difference of a parameter's gradient, relative to the norm of all gradients.
Tokens: the number of positions that the model computes for the first batch.

{_table(("family", "steps", "loss", "gradient", "tokens padded", "packed"), packed)}

## Stopped and resumed

8 steps with dropout and shuffled data, against 3 steps, a checkpoint and 5 more steps by another
trainer. The table counts the weights that are not bitwise equal at the end, and compares all logged
numbers.

{_table(("case", "steps", "weights that differ", "numbers logged", "they are"), resumed)}

## Two ranks against one process

torchrun with two gloo ranks, against one process on the joint batch; gradients are taken before
each optimiser step. The table counts the gradients that are not bitwise equal between the ranks. It
also has the largest difference from the one process, relative to the gradient's norm. *Uneven*: the
last batch of the second rank has one pair.

{_table(("case", "pairs", "ranks x pairs x accumulated", "differ between ranks", "from one process"), spread)}

## LoRA on the head

512 tokens, H = 512, R = 16, V = 8,192, against float64 on the same rounded inputs. The table has
the largest error of a log-prob, in nats, and the error of each gradient, relative to its norm. NHV:
operations of the matrix products, forward and backward. In bfloat16, prefkern's remaining error is
mostly the rounding of `hidden @ A.T`. The adapter's own layer computes that; it is not part of the
head's product.

{_table(("dtype", "softcap", "way", "NHV", "logp", "dhidden", "dA", "dB"), adapted)}

## TRL's trainers and their twins

TRL's trainer and its twin get the same model and the same pairs (KTO and SFT their responses, GRPO
and RLOO their prompts) in the same order. The twin is `DPOTrainer` or `TPOTrainer` of
`prefkern.integrations.trl` with TRL's own arguments, or TRL's own trainer after `fuse_head`. "DPO:
ipo" is TRL's `loss_type` of that name; "several" is `sigmoid`, `bco_pair` and
`sft` with weights. Both run 6 steps of AdamW in float32. The difference of a gradient is relative to its
largest entry, that of the weights at the end to the parameter's. {made(twins)}

{_table(("twin", "worst loss difference", "worst gradient", "worst weight", "worst metric"), worst)}

{_table(("twin", "step", "TRL's loss", "prefkern's", "worst gradient"), sides)}
"""


def measured(argv: list[str]) -> dict[str, Any]:
    """Measure everything that the page shows, except the twins."""
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    command = shlex.join(["python", "bench/training.py", *argv])
    result = environment(torch.device("cpu"), command)
    for each in (packing, resumption, ranks, adapter):
        # Trainers print their logs, so discard stdout.
        with contextlib.redirect_stdout(io.StringIO()):
            result[each.__name__] = each()
    return result


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Measures what must not change a training run.")
    parser.add_argument("--page", action="store_true", help="only write the page, from old results")
    arguments = parser.parse_args(argv)
    if not arguments.page:
        RESULT.write_text(json.dumps(measured(argv), indent=1) + "\n")
    result = json.loads(RESULT.read_text())
    PAGE.write_text(page(result, json.loads(TWINS.read_text())))
    missed = misses(result)
    for miss in missed:
        print(f"missed: {miss}", file=sys.stderr)
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
