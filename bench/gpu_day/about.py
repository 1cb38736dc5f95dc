"""Writes the machine, the versions and what a GPU has: `python -m gpu_day.about --json FILE`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from prefkern.training.files import write_json
from prefkern_bench import environment


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = environment(device, "python bench/gpu.py")
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        about["gpu"] = {
            "architecture": f"sm_{gpu.major}{gpu.minor}",
            "memory_gib": round(gpu.total_memory / 2**30, 1),
            "multiprocessors": gpu.multi_processor_count,
            "l2_mib": getattr(gpu, "L2_cache_size", 0) / 2**20,
            "cuda": torch.version.cuda or torch.version.hip,
        }
    write_json(arguments.json, about)


if __name__ == "__main__":
    main()
