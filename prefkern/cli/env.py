"""`prefkern env`: versions, devices and backends of this machine, to paste into a report.

It lists what results may depend on: the packages, the processor and the GPUs, which backends can
run on which device, and the settings that are in force. It names no user, host or path.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
from importlib import metadata
from pathlib import Path

from prefkern.version import VERSION

# In the order in which a reader looks for them.
_PACKAGES = (
    *("torch", "triton", "transformers", "accelerate", "peft", "trl", "datasets", "tokenizers"),
    *("bitsandbytes", "deepspeed", "flash-attn", "liger-kernel", "cut-cross-entropy"),
)
# Settings that change which code runs, or where.
_VARIABLES = (
    *("PREFKERN_AUTOTUNE", "PREFKERN_CPU_BF16", "PREFKERN_PRODUCT_FOLD"),
    *("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"),
    *("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"),
)


def main(argv: list[str]) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="prefkern env", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.parse_args(argv)
    for name, value in facts():
        print(f"{name:<18} {value}")
    return 0


def facts() -> list[tuple[str, str]]:
    """What the command prints, line by line."""
    found = [
        ("prefkern", VERSION),
        ("python", platform.python_version()),
        ("platform", f"{platform.system()} {platform.machine()}"),
    ]
    for package in _PACKAGES:
        try:
            found.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            found.append((package, "-"))
    try:
        import torch
    except ImportError as error:
        return [*found, ("torch", f"cannot be imported: {error}")]
    found[3] = ("torch", f"{torch.__version__}{_libraries()}")
    found.append(("processor", _processor()))
    found += _gpus() or [("GPU", "none that torch can use")]
    found += _backends() + _products()
    found += [(name, os.environ[name]) for name in _VARIABLES if name in os.environ]
    return found


def _libraries() -> str:
    import torch

    built = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    return "".join(f", {name} {version}" for name, version in built.items() if version)


def _processor() -> str:
    import torch

    from prefkern.ops import cpu

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    name = next(names, platform.processor() or platform.machine())
    units = "bfloat16 units" if cpu.has_bfloat16_units() else "no bfloat16 units"
    if cpu.has_wide_product():
        units += " with float32 results"
    return f"{name}; {units}; {torch.get_num_threads()} threads of {os.cpu_count()} cores"


def _gpus() -> list[tuple[str, str]]:
    import torch

    found: list[tuple[str, str]] = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        found.append((f"GPU {index}", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {memory}"))
    if torch.backends.mps.is_available():
        found.append(("GPU", "Apple MPS"))
    if torch.xpu.is_available():
        found.append(("GPU", torch.xpu.get_device_name(0)))
    return found


def _backends() -> list[tuple[str, str]]:
    import torch

    from prefkern.ops.call import resolve_backend

    found: list[tuple[str, str]] = []
    for kind in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        device = torch.device(kind)
        names = ["torch"]
        with contextlib.suppress(RuntimeError):
            names.append(resolve_backend("triton", device))
        default = resolve_backend(None, device)
        found.append((f"backends on {kind}", f"{', '.join(names)}; {default} by default"))
    return found


def _products() -> list[tuple[str, str]]:
    """Whether a GPU's library makes float32 of half-precision operands, as it was tried there."""
    from prefkern.ops import wide_products

    found: list[tuple[str, str]] = []
    for kind in ("cuda", "xpu", "mps"):
        if not wide_products.can_try(kind):
            continue
        said = []
        for dtype in wide_products.HALVES:
            name = str(dtype).removeprefix("torch.")
            refusal = wide_products.refusal(kind, dtype)
            said.append(
                f"float32 from {name}"
                if refusal is None
                else f"{name} is raised to float32 first ({refusal})"
            )
        found.append((f"products on {kind}", "; ".join(said)))
    return found
