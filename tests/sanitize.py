"""Every kernel on small edge shapes, for a tool that watches a GPU's memory: `make sanitize`.

usage: python tests/sanitize.py                     compute-sanitizer's memcheck and racecheck over it all
       python tests/sanitize.py --tools memcheck    one of them
       python tests/sanitize.py --drive             the launches alone, to run under any tool

memcheck finds an access outside of an allocation, racecheck two threads on one shared address.
torch's caching allocator puts many tensors into one allocation, and memcheck does not see a stray
access between them. So PYTORCH_NO_CUDA_MEMORY_CACHING gives each tensor its own allocation. The
exit status is 1 if a tool found something; 2, with a message, without an NVIDIA GPU or
compute-sanitizer; 3 if a tool did not get to the end, as where it does not know the device.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
TOOLS = {
    "memcheck": ["--leak-check", "no"],
    "racecheck": ["--racecheck-report", "all"],
}
PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")
SIZES = (1, 129, 2049)
# The exit status that a tool is given for what it finds; the program has none like it.
FOUND = 86


def sanitizer() -> str | None:
    """The path of compute-sanitizer: on PATH, or where CUDA's toolkit puts it."""
    path = os.pathsep.join([os.environ.get("PATH", ""), *PLACES])
    return shutil.which("compute-sanitizer", path=path)


def missing() -> str | None:
    """What is missing of what this script needs."""
    import torch

    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "there is no NVIDIA GPU that torch can use"
    if sanitizer() is None:
        return f"there is no compute-sanitizer on PATH or in {', '.join(PLACES)} (CUDA's toolkit)"
    return None


def main(tools: Sequence[str] = tuple(TOOLS)) -> int:
    what = missing()
    if what is not None:
        print(f"sanitize: {what}; nothing was checked", file=sys.stderr)
        return 2
    environment = {
        **os.environ,
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in (".", "kernels", "tests")),
    }
    environment.pop("TRITON_INTERPRET", None)
    drive = [sys.executable, str(Path(__file__).resolve()), "--drive"]
    # Compiled beforehand: under a tool it is only run.
    subprocess.run(drive, env=environment, check=True)
    failed, ended = [], []
    for tool in tools:
        print(f"sanitize: {tool}", flush=True)
        command = [str(sanitizer()), "--tool", tool, "--error-exitcode", str(FOUND)]
        command += [*TOOLS[tool], *drive]
        status = subprocess.run(command, env=environment, check=False).returncode
        if status == FOUND:
            failed.append(tool)
        elif status:
            ended.append(tool)
    if failed:
        print(f"sanitize: {', '.join(failed)} found errors")
        return 1
    if ended:
        print(f"sanitize: {', '.join(ended)} did not get to the end")
        return 3
    print("sanitize: nothing found")
    return 0


def drive(device: str = "cuda") -> set[str]:
    """Launch every kernel; returns the launchers that ran."""
    import torch

    import prefkern_kernels as kernels
    from prefkern.objectives import build
    from prefkern_kernels import tiles
    from support.launch_cases import CASES, product

    kernels.launches.clear()
    for case in CASES.values():
        for size in SIZES:
            case(kernels, size, device)
    options = {"logit_scale": 1.0, "softcap": None, "temperature": 1.0}
    for dtype in (torch.bfloat16, torch.float32):
        chosen = tiles.product_choice_of(
            torch.device(device), tiles.product_class(dtype, tiles.allows_tf32(), 64, True)
        )
        for config in dict.fromkeys((chosen.candidates[0], tiles.FALLBACK.candidates[0])):
            sizes = config.block_n + 1, config.block_v + 65, config.block_h + 8
            kernels.product_fold(**product(*sizes, dtype, device), config=config, **options)
    offsets = torch.tensor([0, 0, 1, 1026, 1030], device=device)
    logps = -torch.rand(1030, device=device)
    for name in ("adadpo", "orpo", "alphadpo", "madpo", "adaomnidpo", "apodown", "discopop"):
        objective = build(name).to(device)
        vectors = -torch.rand(4, device=device), torch.randn(2, device=device)
        form = objective.pair_kernel_options()
        assert form is not None
        kernels.pair_loss(logps, offsets, *vectors, **form)
    if device == "cuda":
        torch.cuda.synchronize()
    return set(kernels.launches)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--drive", action="store_true", help="the launches alone")
    arguments = parser.parse_args()
    if arguments.drive:
        print("sanitize: ran", ", ".join(sorted(drive())))
        sys.exit(0)
    sys.exit(main(arguments.tools))
