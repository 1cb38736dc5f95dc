"""The page `bench/LAUNCHES.md`, from the result of `launch_costs.py`."""

from __future__ import annotations

from typing import Any

import time_model
from launch_costs import SHOWN, calls_of

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
- On gfx942 the operator raises half-precision operands to float32, unless torch has products with a
  float32 result: products then run at the rate of float32.
- The kernel with product and fold in one (`PREFKERN_PRODUCT_FOLD=1`) stays off. It would save a
  forward the fold and its bytes, but the rate of its product decides, and only a GPU's numbers can
  say that. So no time is given for it.

| device | memory | bf16 TFLOP/s | float32 TFLOP/s | HBM TB/s | L2 MB | L2 TB/s | processors | figures from |
|---|---|---|---|---|---|---|---|---|
"""
CALLS = """
## Calls

N scored tokens, default workspace. *before*: {before}. HBM: bytes a logit.

| device | shape | task | NHV | tiles | launches | plain ms | ms | x | HBM | before ms | before HBM | eager ms | eager HBM | of eager |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""
BEFORE = "tiles as wide as the workspace allows, whose rows a fold read twice"
ONE_BY_ONE = """
## Kernel by kernel, {device}

Bytes a logit, of HBM and asked of L2 (each operand once for each reading). *bound by*: what takes
most of the time in the model. `torch ...` are torch's own operators.

| shape | task | kernel | launches | NHV | HBM | L2 | ms | bound by |
|---|---|---|---|---|---|---|---|---|
"""
REWORKED = """
## What the model changed

`_fold_kernel` read each row twice. With several programs on each processor, the rows in flight are
larger than L2, so the second reading came from HBM as well: 4 of 10 bytes a logit. Now a row of at
most 8,192 entries is held in registers and read once, and the plan makes no wider tiles (without a
softcap). The accumulator `[n, H]` is then read and written more often, but by a product that has
time to spare. Rows of 16,384 would need all registers of a multiprocessor: most variants spill
with one of the versions of Triton. With a softcap, instructions take more time than memory, and
the tiles stay as wide as before.

{table}

Not changed, since the model shows no clear gain: tiles small enough to stay in L2. On H200 such a tile
has some 1,024 x 4,096 logits. At H = 640 its products take 14 us, and its four launches take the
host {host:.0f} us.
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
    lines.append(REWORKED.format(table=fold_table(result), host=4e6 * time_model.HOST))
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
        whole["launches"],
        f"{call['plain_ms']:.1f}",
        f"**{whole['ms']:.1f}**",
        f"{whole['ms'] / call['plain_ms']:.2f}",
        f"{whole['hbm_bytes'] / logits:.1f}",
        f"{old['ms']:.1f}" if old else "",
        f"{old['hbm_bytes'] / logits:.1f}" if old else "",
        f"{eager['ms']:.1f}",
        f"{eager['hbm_bytes'] / logits:.1f}",
        f"{whole['ms'] / eager['ms']:.2f}",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def fold_table(result: dict[str, Any]) -> str:
    """The fold's bytes and time, and the call's, before and after, on the shown device."""
    columns = ["tiles before", "now", "fold's HBM before", "now", "fold ms before", "now"]
    columns += ["call ms before", "now"]
    lines = [f"| {SHOWN} | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for call in calls_of(result):
        old = result["before"].get(name_of(call))
        if call["device"] != SHOWN or old is None:
            continue
        fold, logits = call["kernels"]["fold"], call["logits"]
        cells = [
            f"{call['shape']}, {call['task']}",
            " x ".join(map(str, old["forward_tiles"])),
            " x ".join(map(str, call["forward_tiles"])),
            f"{old['fold_hbm_bytes'] / logits:.1f}",
            f"{fold['hbm_bytes'] / logits:.1f}",
            f"{old['fold_ms']:.2f}",
            f"{fold['ms']:.2f}",
            f"{old['ms']:.1f}",
            f"{call['total']['ms']:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


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
