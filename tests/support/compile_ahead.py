"""Compiles every launch of every kernel for a GPU, without that GPU; prints a report as JSON.

usage, in tests/: python -m support.compile_ahead sm_90 [--all]      (or sm_80, sm_100, gfx942)

For the product kernel this compiles the configurations in use (the first of each class), with the
variants of a call. With `--all` it compiles every candidate of the table, and nothing else.

The real launchers run on meta tensors. Triton's driver is replaced by one that names the target and
launches nothing. This is a separate process, because Triton must be imported in compiling mode, not
in interpreter mode. Each row has the kernel, variant, warps and shared memory; for NVIDIA also
registers, stack and spills.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel

import prefkern_kernels as kernels
from prefkern.objectives import Objective, build, names
from prefkern_kernels import tiles

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"

# One objective for each variant of the pair kernel, and options that change its constexprs. R-DPO
# has the same variant as DPO; an adaptive coefficient has one with each score, not with each link.
SAME_VARIANT = ("rdpo", *(f"ada{name}" for name in (
    "robust", "hinge", "ipo", "rdpo", "exo", "discopop", "nca", "sppo", "apozero", "apodown"
)))  # fmt: skip


def has_kernel(name: str) -> bool:
    objective = build(name)
    return isinstance(objective, Objective) and objective.pair_kernel_options() is not None


OBJECTIVES = [
    *(build(name) for name in names() if name not in SAME_VARIANT and has_kernel(name)),
    build("ipo", length_normalized=True),
    build("dpo", f_divergence_type="js_divergence"),
    build("lndpo", f_divergence_type="forward_kl"),
    build("adadpo", space="policy", exponent=1.0, clip=None),
    build("adasimpo", exponent=0.0, clip=None),
    build("alphadpo", length_normalized=False, implicit_reference="policy"),
    build("alphadpo", normalize=False),
    build("alphadpo", stop_gradient=False),
    build("alphadpo", length_normalized=False, normalize=False, stop_gradient=False),
    build("madpo", mode="amplify"),
    build("madpo", mode="regularize"),
]


class OfflineDriver:
    """Answers the questions of a launch to its driver, without a device."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_interface(self):
        return torch.cpu


compiled: list[CompiledKernel] = []
# What was launched last.
latest: list[CompiledKernel] = []


def keep_and_do_not_load(kernel: CompiledKernel) -> None:
    compiled.append(kernel)
    kernel.module = kernel.function = None

    def run(*args: Any, **keywords: Any) -> None:
        latest[:] = [kernel]

    kernel._run = run


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def launch_all() -> None:
    """Launch every combination of the launchers' constexprs, at the size of a real tile."""
    n, v, h = 2048, 16384, 4096
    labels = meta(n, dtype=torch.int64)
    plain = {"logit_scale": 1.0, "softcap": None, "temperature": 1.0}
    capped = {"logit_scale": 0.5, "softcap": 30.0, "temperature": 1.0}
    # Rows that a fold holds, and rows that it reads twice.
    for row, transform, bias, out, stats in itertools.product(
        (tiles.FOLD_BLOCK, v),
        (plain, capped),
        (None, torch.bfloat16),
        (None, torch.bfloat16, torch.float32),
        (False, True),
    ):
        per_token = [meta(n) for _ in range(9)]
        kernels.fold(
            meta(n, row),
            labels,
            None if bias is None else meta(row, dtype=bias),
            *per_token[:4],
            per_token[4] if out else None,
            meta(n, row, dtype=out) if out else None,
            *(per_token[5:9] if stats else (None,) * 4),
            start=0,
            first=True,
            **transform,
        )
        if row != v:
            continue
        if out is not None and not stats:
            kernels.remake_weights(
                meta(n, v),
                labels,
                None if bias is None else meta(v, dtype=bias),
                *per_token[:3],
                meta(n, v, dtype=out),
                start=0,
                **transform,
            )
        if not stats:
            launch_pair(transform, bias, out, n, v)
    kernels.rescale_rows(meta(n, h), meta(n))
    for rows in (None, labels):
        kernels.scatter_scaled(meta(n, h), meta(n), rows, meta(2 * n, h, dtype=torch.bfloat16))
    for dtype in (torch.float32, torch.bfloat16):
        vectors = meta(n), meta(n), labels
        kernels.settle(meta(n, 8 * v, dtype=dtype), meta(8, n), *vectors, v)
        for gradients in itertools.product((False, True), repeat=2):
            launch_finish(dtype, *gradients, n, h)
    for objective in OBJECTIVES:
        launch_pair_loss(objective, pairs=8)
    # Triton treats a size of 1 as a constant.
    launch_pair_loss(OBJECTIVES[0], pairs=1)
    launch_pair_loss(OBJECTIVES[0], pairs=8, ld_alpha=0.5)


def launch_finish(dtype: torch.dtype, of_head: bool, of_hidden: bool, n: int, h: int) -> None:
    """Launch the end of a fold, with the outputs that its gradients need."""
    kernels.finish(
        *(meta(n) for _ in range(4)),
        meta(n, dtype=torch.int64),
        meta(n),
        *(meta(n) if of_head else None for _ in range(3)),
        meta(n, h) if of_hidden else None,
        meta(128256, h, dtype=dtype) if of_hidden else None,
        compute_dtype=dtype,
        operand_dtype=dtype,
    )


def launch_pair_loss(objective: Objective, pairs: int, ld_alpha: float | None = None) -> None:
    """Launch the loss of pairs, with only the inputs that its objective needs."""
    options = objective.to("meta").pair_kernel_options()
    assert options is not None
    kernels.pair_loss(
        meta(2048),
        meta(2 * pairs + 1, dtype=torch.int64),
        meta(2 * pairs) if objective.needs_reference else None,
        meta(pairs) if objective.needs_reward_margins else None,
        **options,
        ld_alpha=ld_alpha,
    )


def launch_pair(
    transform: dict[str, float | None],
    bias: torch.dtype | None,
    out: torch.dtype | None,
    n: int,
    v: int,
) -> None:
    """Launch the kernels that take a tile of the policy and a tile of the reference."""
    labels = meta(n, dtype=torch.int64)
    biases = [None if bias is None else meta(v, dtype=dtype) for dtype in (bias, torch.float32)]
    reference = {
        "ref_tile": meta(n, v),
        "ref_bias": biases[1],
        **{name: meta(n) for name in ("ref_maximum", "ref_total", "ref_label_logit", "cross")},
        "ref_rescale": meta(n) if out else None,
        "ref_weights": meta(n, v, dtype=out) if out else None,
    }
    for moments in (0, 4):
        kernels.fold(
            meta(n, v),
            labels,
            biases[0],
            *(meta(n) for _ in range(4)),
            meta(n) if out else None,
            meta(n, v, dtype=out) if out else None,
            *(meta(n) for _ in range(moments)),
            **reference,
            start=0,
            first=True,
            **transform,
        )
    for is_kept in (False, True) if out else ():
        kept = {"dtype": out} if is_kept else {}
        kernels.remake_weights(
            meta(n, v, **kept),
            labels,
            None if is_kept else biases[0],
            *(meta(n) for _ in range(3)),
            meta(n, v, dtype=out),
            ref_tile=meta(n, v, **kept),
            ref_bias=None if is_kept else biases[1],
            ref_unit=meta(n),
            ref_factor=meta(n),
            is_kept=is_kept,
            start=0,
            **transform,
        )
    kernels.scatter_scaled(
        *(meta(n, 576), meta(n), None, meta(n, 576, dtype=out or torch.float32)),
        *(meta(n, 576), meta(n)),
    )


# Variants of a call: bare, or with everything that a class allows. In the bare one every block size
# divides the sizes. The others leave a tail of vocabulary entries, which compiles as another
# kernel.
VARIANTS: dict[str, dict[str, Any]] = {
    "bare": {},
    "rows and tail": {"rows": True, "cut": True},
    "bias": {"bias": True},
    "softcap": {"softcap": 30.0},
    "softcap, bias, rows and tail": {"softcap": 30.0, "bias": True, "rows": True, "cut": True},
}


def launch_products(arch: str, every: bool) -> list[dict[str, Any]]:
    """Launch the products in an architecture's table; returns a description of each kernel."""
    descriptions = []
    seen = set()
    for product, choice in tiles.PRODUCTS[arch].items():
        # Narrow products use the tiles of wide ones in longer strips: the compiled code is the
        # same.
        if not product.wide:
            continue
        names = ["bare", "rows and tail"] if product.plain else ["softcap", "bias"]
        if every and not product.plain:
            names.append("softcap, bias, rows and tail")
        if not every and product.operands != "half":
            names = names[:1]
        for config in choice.candidates if every else choice.candidates[:1]:
            for name in names:
                if (product.operands, config, name) in seen:
                    continue
                seen.add((product.operands, config, name))
                before = len(compiled)
                launch_product(product.operands, config, **VARIANTS[name])
                for kernel in compiled[before:]:
                    descriptions.append(
                        {
                            "operands": product.operands,
                            "plain": product.plain,
                            "in_use": config == choice.candidates[0],
                            "config": config._asdict(),
                            "variant": name,
                            "instructions": instructions(kernel),
                        }
                    )
    return descriptions


def launch_product(
    operands: str,
    config: tiles.ProductConfig,
    rows: bool = False,
    bias: bool = False,
    cut: bool = False,
    softcap: float | None = None,
) -> None:
    n, v, h = 2048, 131072 - 3 * cut, 4096 - 32 * cut
    dtype = torch.bfloat16 if operands == "half" else torch.float32
    torch.backends.cuda.matmul.fp32_precision = "tf32" if operands == "tf32" else "ieee"
    kernels.product_fold(
        meta(n, h, dtype=dtype),
        meta(v, h, dtype=dtype),
        meta(v, dtype=torch.bfloat16) if bias else None,
        meta(n, dtype=torch.int64),
        *(meta(n) for _ in range(4)),
        rows=meta(n, dtype=torch.int64) if rows else None,
        logit_scale=1.0,
        softcap=softcap,
        temperature=1.0,
        config=config,
    )


def instructions(kernel: CompiledKernel) -> list[str]:
    """The instructions for products, copies and warp specialisation that a kernel has."""
    text = kernel.asm["ptx"] if "ptx" in kernel.asm else kernel.asm["amdgcn"]
    names = (
        ("wgmma.mma_async", "tcgen05.mma", "mma.sync", "v_mfma")
        + ("cp.async.bulk", "cp.async.cg")
        + ("setmaxnreg",)
    )
    return [name for name in names if name in text]


def resources(kernel: CompiledKernel, backend: str) -> dict[str, int]:
    if backend != "cuda":
        pairs = re.findall(r"\.((?:vgpr|sgpr)(?:_spill)?_count):\s*(\d+)", kernel.asm["amdgcn"])
        return {name: int(value) for name, value in pairs}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def compile_for(name: str) -> GPUTarget:
    """From here on, launches are compiled for a target and not run."""
    target = TARGETS[name]
    triton.runtime.driver.set_active(OfflineDriver(target))
    CompiledKernel._init_handles = keep_and_do_not_load
    return target


def main() -> None:
    target = compile_for(sys.argv[1])
    every = "--all" in sys.argv
    if not every:
        launch_all()
    others: list[dict[str, Any]] = [{} for _ in compiled]
    rows = [
        {
            "kernel": kernel.name,
            "shared": kernel.metadata.shared,
            "num_warps": kernel.metadata.num_warps,
            **resources(kernel, target.backend),
            **description,
        }
        for kernel, description in zip(
            compiled, others + launch_products(sys.argv[1], every), strict=True
        )
    ]
    versions = {"triton": triton.__version__, "torch": torch.__version__}
    json.dump({"target": sys.argv[1], **versions, "kernels": rows}, sys.stdout)


if __name__ == "__main__":
    main()
