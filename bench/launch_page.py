"""The page `bench/LAUNCHES.md`, from the result of `launch_costs.py`."""

from __future__ import annotations

from typing import Any

import time_model
from launch_costs import SHOWN, calls_of
from prefkern_bench.shapes import GPU

HEAD = """\
# What the kernels cost as compiled, and a model of time

Written by `{command}` on {date}. **Nothing here was measured on a GPU.** The first part is what
Triton's compilers make of each launch, with the arguments that the operator passes at the five
shapes of `prefkern bench` on a GPU (bf16). The second part is a model: it says what a first
profile should show, so that a profile has something to disagree with.
"""
KERNELS = """
## Compiled kernels

One row for each variant of a kernel and block; if Triton compiles a variant several times (sizes
that 16 divides, or not), the largest number. Three versions of Triton are divided by slashes:
{versions}. *Registers* of a thread (vector registers on gfx942). *Spills*: bytes of stack, or
vector registers on gfx942. *Programs*: how many a processor holds at once, and what bounds them.
*Instructions* of a thread and special functions (exponentials, reciprocals) for each element of a
row, counted in the assembly; both, and the programs, with the first version. *Products*: the instructions of the matrix unit, copies that run
ahead; kernels that walk rows have none. [COMPILE.md](COMPILE.md) has all candidates of
`_product_fold_kernel`.
"""
MODEL = """
## The model

- **Products**: {product:.0%} of the peak, in whole waves of output tiles ({tiles}, the best of these
  and of {splits} splits of the inner size). Operands come from HBM once. The library's choices are
  not known.
- **Memory**: {hbm:.0%} of HBM's figure, {l2:.0%} of L2's. L2's speed is 5,120 bytes a clock on A100
  (whitepaper), assumed the same on H100 and H200 and twice that on B200; on MI300X the figure of
  the Infinity Cache.
- **L2 as a cache**: what is read again is in L2 if fewer bytes than {fill:.0%} of its size were
  touched since its last use. A row that a kernel reads twice is in L2 if the rows of all running
  programs fit.
- **Kernels that walk rows**: the slowest of HBM, L2, instructions, special functions and latency. A
  program waits {latency:.1f} us for each block of its row and for loads that depend on others;
  as many programs run at once as registers, threads and shared memory allow.
- **Launches**: {gap:.0f} us between two on the device, {host:.0f} us of the host for one. A call takes
  at least its host time.
- What depends on numbers is taken at its expectation, with a token's largest logit anywhere in the
  vocabulary: the i-th tile raises the maximum with probability 1 / i.
- **Eager** is logits in memory with autograd (`bench/prefkern_bench/providers.py`): the same rules
  for its launches, but streams only, with no latency and no instructions.
- *x* is the time by that of plain bf16 products of as many operations, by the same rules. The
  targets are 1.15 for H >= 2048 and 1.5 below, and 1.18 for a forward.
- *MI300X*: torch for ROCm has products of half-precision operands with a float32 result
  ([pytorch#162600](https://github.com/pytorch/pytorch/pull/162600), of September 2025), and the operator tries them on the device
  (`prefkern/ops/wide_products.py`). *float32 operands* is what a build without them costs: operands are
  raised, and products run at the rate of float32.
- The kernel with product and fold in one (`PREFKERN_PRODUCT_FOLD=1`) stays off. It would save a
  forward the fold and its bytes, but the rate of its product decides, and only a GPU's numbers can
  say that. So no time is given for it.

| device | memory | bf16 TFLOP/s | float32 TFLOP/s | HBM TB/s | L2 MB | L2 TB/s | processors | figures from |
|---|---|---|---|---|---|---|---|---|
"""
CALLS = """
## Calls

N scored tokens, default workspace (1/128 of the memory, 1/24 if the head is trained; *MB* is what the
plan takes of it). *before*: {before}. HBM: bytes a logit. *packed*: every second row of hidden is a
prompt's, and those of the scored tokens are gathered. *LoRA on the head*: of rank 16. *KL*: to a
reference with a head of its own.

| device | shape | task | NHV | tiles | MB | launches | plain ms | ms | x | HBM | before ms | before HBM | eager ms | eager HBM | of eager |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""
BEFORE = (
    "the same workspace for all calls, a fold that waited for its label and compared it as 64 bits, "
    "rows with a softcap read twice, and float32 operands on MI300X"
)
ONE_BY_ONE = """
## Kernel by kernel, {device}

Bytes a logit, of HBM and asked of L2 (each operand once for each reading). *bound by*: what takes
most of the time in the model. `torch ...` are torch's own operators.

| shape | task | kernel | launches | NHV | HBM | L2 | ms | bound by |
|---|---|---|---|---|---|---|---|---|
"""
REWORKED = """
## What the model changed

First, `_fold_kernel` read each row twice, and the second reading came from HBM as well: 4 of 10 bytes a
logit. A row of at most 8,192 entries is held in registers and read once, and the plan makes no wider
tiles. The accumulator `[n, H]` is then read and written more often, but by a product that has time to
spare. Rows of 16,384 would need all registers of a multiprocessor: most variants spill with one of the
versions of Triton.

Then three things that the model still showed as slow:

- **A trained head at the shape of Llama-3-8B** took longer than logits in memory. What it cost was the
  second product for the logits of 7 tokens in 8, a quarter of their operations each. The default
  workspace of a call that trains the head is now 1/24 of the memory, for probabilities that forward
  keeps; it is bounded as before, and still a fraction of what logits in memory take.
- **The fold** was bound by instructions and by waiting, not by memory. Labels are compared as 32 bits,
  a row is masked once and not twice, and the label's own logit is stored at the end, so that nothing
  waits for its reading. With a softcap one reciprocal serves tanh and its slope, and rows are held there
  too: they no longer need more registers than a multiprocessor has for two programs.
- **MI300X** was modelled with float32 operands, at an eighth of the rate. Supported versions of torch
  have the product that the operator asks for.

{table}

## What no plan of a product and a fold mends

A fold reads the 4 bytes of every logit that a product has written, and for a frozen head writes 2 more,
while no product runs. At a small H this is much beside the product's 2 H operations a logit, so the
time by that of plain products has a lower bound, whatever the tiles are:

{bounds}

Tiles small enough to stay in L2 avoid HBM, and cost more in launches: on H200 such a tile has some
1,024 x 4,096 logits. At H = 640 its products take 14 us, and its four launches take the host
{host:.0f} us. The kernel with product and fold in one writes no logit, and waits for a GPU's numbers.
On an A100 a trained head at the long context recomputes: the probabilities of 32,768 tokens are 8.4 GB.
"""


def page(result: dict[str, Any]) -> str:
    """The whole page."""
    reports = result["reports"]
    versions = list(dict.fromkeys(report["triton"] for report in reports))
    lines = [HEAD.format(**result), KERNELS.format(versions=", ".join(versions))]
    for target in dict.fromkeys(report["target"] for report in reports):
        lines += kernel_table(target, [each for each in reports if each["target"] == target])
    figures = MODEL.format(
        product=time_model.PRODUCT_SHARE,
        tiles=", ".join(f"{m} x {n}" for m, n in time_model.PRODUCT_TILES),
        splits=", ".join(map(str, time_model.SPLITS_OF_A_PRODUCT)),
        hbm=time_model.HBM_SHARE,
        l2=time_model.L2_SHARE,
        fill=time_model.L2_FILL,
        latency=1e6 * time_model.LATENCY,
        gap=1e6 * time_model.GAP,
        host=1e6 * time_model.HOST,
    )
    lines.append(figures + "\n".join(map(device_row, time_model.DEVICES)))
    lines.append(
        CALLS.format(before=BEFORE)
        + "\n".join(call_row(call, result["before"]) for call in calls_of(result))
    )
    bounds = bound_table(result)
    lines.append(
        REWORKED.format(table=change_table(result), bounds=bounds, host=4e6 * time_model.HOST)
    )
    lines.append(
        ONE_BY_ONE.format(device=SHOWN)
        + "\n".join(
            row for call in calls_of(result) if call["device"] == SHOWN for row in kernel_rows(call)
        )
    )
    return "\n".join(lines) + "\n"


def kernel_table(target: str, reports: list[dict[str, Any]]) -> list[str]:
    columns = (
        *("kernel", "variant", "block", "warps", "registers", "spills", "shared bytes"),
        *("programs", "instructions", "special", "products"),
    )
    lines = [f"\n### {target}\n", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    found = [{key_of(row): row for row in report["kernels"]} for report in reports]
    for key, row in found[0].items():
        others = [each[key] for each in found if key in each]

        def each(name: str, others: list[dict[str, Any]] = others) -> str:
            values = [str(other[name]) for other in others]
            return values[0] if len({*values}) == 1 else " / ".join(values)

        cells = [
            f"`{row['kernel']}`",
            row["variant"],
            row["block"],
            row["num_warps"],
            each("registers"),
            each("spills"),
            each("shared"),
            f"{row['resident']} ({row['resident_bound']})",
            f"{row['instructions']:.0f}" if row["instructions"] else "",
            f"{row['special']:.1f}" if row["instructions"] else "",
            ", ".join(f"`{name}`" for name in row["uses"]),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def key_of(row: dict[str, Any]) -> tuple[str, str, int, int]:
    return row["kernel"], row["variant"], row["block"], row["num_warps"]


def device_row(device: time_model.Device) -> str:
    cells = [
        device.name,
        f"{device.memory / 1e9:.0f} GB",
        f"{device.half / 1e12:.0f}",
        f"{device.single / 1e12:.1f}",
        f"{device.hbm / 1e12:.2f}",
        f"{device.l2 / 2**20:.0f}",
        f"{device.l2_speed / 1e12:.1f}",
        device.processors,
        device.source,
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def name_of(call: dict[str, Any]) -> str:
    return f"{call['device']}, {call['shape']}, {call['task']}"


def call_row(call: dict[str, Any], before: dict[str, Any]) -> str:
    whole, eager, logits = call["total"], call["eager"], call["logits"]
    old = before.get(name_of(call))
    cells = [
        call["device"],
        call["shape"],
        call["task"],
        f"{call['nhv']:.2f}",
        " x ".join(map(str, call["forward_tiles"])),
        call["workspace_mb"],
        whole["launches"],
        f"{call['plain_ms']:.1f}",
        f"**{whole['ms']:.1f}**",
        f"{whole['ms'] / call['plain_ms']:.2f}",
        f"{whole['hbm_bytes'] / logits:.1f}",
        f"{old['ms']:.1f}" if old else "",
        f"{old['hbm_bytes'] / logits:.1f}" if old else "",
        f"{eager['ms']:.1f}" if eager else "",
        f"{eager['hbm_bytes'] / logits:.1f}" if eager else "",
        f"{whole['ms'] / eager['ms']:.2f}" if eager else "",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def change_table(result: dict[str, Any]) -> str:
    """Operations, the fold's time and the call's, before and after, on the shown device."""
    columns = ["tiles before", "now", "NHV before", "now", "fold ms before", "now"]
    columns += ["call ms before", "now", "of eager before", "now"]
    lines = [f"| {SHOWN} | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for call in calls_of(result):
        old = result["before"].get(name_of(call))
        if call["device"] != SHOWN or old is None:
            continue
        cells = [
            f"{call['shape']}, {call['task']}",
            " x ".join(map(str, old["forward_tiles"])),
            " x ".join(map(str, call["forward_tiles"])),
            f"{old['nhv']:.2f}",
            f"{call['nhv']:.2f}",
            f"{old['fold_ms']:.2f}",
            f"{call['kernels']['fold']['ms']:.2f}",
            f"{old['ms']:.1f}",
            f"{call['total']['ms']:.1f}",
            *(f"{ms / call['eager']['ms']:.2f}" for ms in (old["ms"], call["total"]["ms"])),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# Bytes of a logit that a fold reads and writes, and products of 2NHV, of two tasks.
FOLDED = {"forward": (4, 1), "frozen": (6, 2)}


def bound_table(result: dict[str, Any]) -> str:
    """The least time by that of plain products, and the model's, of small H on each device."""
    found = {name_of(call): call for call in calls_of(result)}
    shapes = [shape for shape in GPU if shape.hidden_size <= 1024]
    columns = [f"{shape.name}, {task}" for shape in shapes for task in FOLDED]
    lines = [f"| bound, model | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for device in time_model.DEVICES:
        if device.upcasts:
            continue
        cells = []
        for shape in shapes:
            for task in FOLDED:
                call = found[f"{device.name}, {shape.name}, {task}"]
                ratio = call["total"]["ms"] / call["plain_ms"]
                cells.append(f"{least_ratio(device, shape.hidden_size, task):.2f}, {ratio:.2f}")
        lines.append(f"| {device.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def least_ratio(device: time_model.Device, hidden_size: int, task: str) -> float:
    """Of products at their rate and of the fold's bytes at HBM's, one after the other."""
    moved, products = FOLDED[task]
    product = products * 2 * hidden_size / (time_model.PRODUCT_SHARE * device.half)
    return 1 + moved / (time_model.HBM_SHARE * device.hbm) / product


def kernel_rows(call: dict[str, Any]) -> list[str]:
    """One row for each kernel of a call, the longest first."""
    ordered = sorted(call["kernels"].items(), key=lambda item: -item[1]["ms"])
    rows, logits = [], call["logits"]
    nhv = call["plain_operations"] / call["nhv"]
    for name, cost in ordered:
        cells = [
            call["shape"],
            call["task"],
            name,
            cost["launches"],
            f"{cost['operations'] / nhv:.2f}" if cost["operations"] else "",
            f"{cost['hbm_bytes'] / logits:.2f}",
            f"{cost['l2_bytes'] / logits:.2f}",
            f"{cost['ms']:.2f}",
            cost["bound"],
        ]
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return rows
