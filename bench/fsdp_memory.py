"""Counts the bytes that each rank holds under FSDP2: parameters, gradients, the optimizer's state.

usage: python bench/fsdp_memory.py [--page]     (exit status 1 if a bound is missed)

A Llama with random weights takes a DPO step with AdamW on 2 and on 4 gloo ranks of a CPU. What is
counted are the tensors themselves: of a sharded one, this rank's part. A rank's number is that of the
rank with the most, since shards may be uneven. `a whole reference` is what prefkern does not do: its
reference model is left unsharded for the comparison. Activations, and what FSDP2 gathers of a layer
during its forward and backward, are not in these numbers.

This writes bench/results/fsdp-memory-cpu.json, and from that the table of docs/distributed.md. With
--page it writes only the table, from an existing result.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in (".", "kernels", "tests", "bench")]

import torch

from prefkern_bench import environment

PAGE = ROOT / "docs/distributed.md"
RESULT = ROOT / "bench/results/fsdp-memory-cpu.json"
MARKERS = "<!-- memory -->\n", "<!-- /memory -->\n"
RANKS = (2, 4)
PARTS = ("policy", "reference", "gradients", "optimizer")
MODEL = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "vocab_size": 8192,
}
CASES = {
    "LoRA, adapter off": {"lora": True},
    "LoRA, reference model": {"lora": True, "reference": True},
    "LoRA, a whole reference": {"lora": True, "reference": True, "whole": True},
    "full, precomputed": {"precomputed": True},
    "full, reference model": {"reference": True},
    "full, a whole reference": {"reference": True, "whole": True},
}
# How far the largest rank may be above an even share of what is sharded: vectors and uneven shards.
BOUND = 1.02


def held(tensors: Any) -> int:
    """Bytes of this rank's part of each tensor; one that is there twice counts once."""
    parts = [x.to_local() if hasattr(x, "to_local") else x for x in tensors]
    memory = {part.data_ptr(): part.numel() * part.element_size() for part in parts if part.numel()}
    return sum(memory.values())


def counted(folder: Path, case: str) -> dict[str, int]:
    """What this process holds in the first step of a run."""
    import transformers

    from prefkern.training import trainer as module
    from support import tiny
    from support.fsdp import lora
    from support.training import trainer

    given = CASES[case]
    options: dict[str, Any] = {"peft_config": lora()} if given.get("lora") else {}
    if given.get("reference"):
        options["ref_model"] = tiny.model(seed=1, **MODEL)
    if given.get("precomputed"):
        options["precompute_ref_log_probs"] = True
    found: dict[str, int] = {}

    class Count(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **_: Any) -> None:
            parameters = [*run.model.parameters()]
            found["policy"] = held(parameters)
            found["gradients"] = held([p.grad for p in parameters if p.grad is not None])
            reference = run.ref_model
            found["reference"] = 0 if reference is None else held(reference.parameters())

        def on_step_end(self, *args: Any, **_: Any) -> None:
            states = run.optimizer.state.values()
            tensors = [x for state in states for x in state.values() if torch.is_tensor(x)]
            found["optimizer"] = held([x for x in tensors if x.dim()])

    plain = module.sharded
    if given.get("whole"):
        module.sharded = lambda model, _: model.requires_grad_(False).eval()
    try:
        run = trainer(
            folder,
            count=4,
            model=tiny.model(**MODEL),
            per_device_train_batch_size=1,
            max_steps=1,
            callbacks=[Count()],
            **options,
        )
        run.train()
    finally:
        module.sharded = plain
    return found


def measured(command: str) -> dict[str, Any]:
    from support.ddp import torchrun
    from support.fsdp import SETTINGS, VERSIONS

    rows: dict[str, dict[str, Any]] = {case: {} for case in CASES}
    with tempfile.TemporaryDirectory() as name:
        for ranks in (1, *RANKS):
            folder = Path(name) / str(ranks)
            folder.mkdir()
            if ranks == 1:
                found = [{case: counted(folder / "run", case) for case in CASES}]
            else:
                settings = {**SETTINGS, **VERSIONS[2]}
                torchrun("fsdp_memory", "--rank", str(folder), count=ranks, **settings)
                files = [folder / f"rank{rank}.json" for rank in range(ranks)]
                found = [json.loads(file.read_text()) for file in files]
            for case in CASES:
                most = max((each[case] for each in found), key=lambda part: sum(part.values()))
                rows[case][str(ranks)] = most
    report = environment(torch.device("cpu"), command)
    names = ("accelerate", "peft")
    report["versions"] |= {name: metadata.version(name) for name in names}
    return report | {"model": MODEL, "rows": rows}


def rank(folder: Path) -> None:
    """What each rank does."""
    from support.fsdp import fsdp_on_cpus

    torch.set_num_threads(1)
    fsdp_on_cpus()
    found = {case: counted(folder / "run", case) for case in CASES}
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def misses(result: dict[str, Any]) -> list[str]:
    """What is not its share of one process's bytes, or, of a whole reference, not all of them."""
    missed = []
    for case, row in result["rows"].items():
        for ranks in RANKS:
            for part in PARTS:
                is_whole = part == "reference" and CASES[case].get("whole")
                share = row["1"][part] / (1 if is_whole else ranks)
                found = row[str(ranks)][part]
                if not share / BOUND <= found <= share * BOUND + 4096:
                    missed.append(f"{case}, {ranks} ranks: {part} {found:,} of {share:,.0f} bytes")
    return missed


def section(result: dict[str, Any]) -> str:
    names = ("torch", "transformers", "accelerate", "peft")
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in names)
    model = result["model"]
    sizes = (model["num_hidden_layers"], model["hidden_size"], model["vocab_size"])
    lines = [
        "MiB that the fullest rank holds of policy / reference / gradients / AdamW's two moments, all",
        "in float32, for a Llama of {} layers, hidden size {} and {:,} vocabulary entries:".format(
            *sizes
        ),
        "",
        "| run | one process | a rank of 2 | a rank of 4 | a rank of 4, in all |",
        "|---|---|---|---|---|",
    ]
    for case, row in result["rows"].items():
        cells = [
            " / ".join(f"{row[ranks][part] / 2**20:.2f}" for part in PARTS)
            for ranks in ("1", "2", "4")
        ]
        total = sum(row["4"].values()) / 2**20
        lines.append(f"| {case} | {' | '.join(cells)} | {total:.2f} |")
    source = "[fsdp-memory-cpu.json](../bench/results/fsdp-memory-cpu.json)"
    date = result["date"][:10]
    lines += ["", f"`{result['command']}` on {result['device']}; {versions}; {date} ({source})."]
    return "\n".join(lines)


def page(text: str, result: dict[str, Any]) -> str:
    """The page with its table written anew."""
    before, rest = text.split(MARKERS[0])
    after = rest.split(MARKERS[1])[1]
    return f"{before}{MARKERS[0]}\n{section(result)}\n\n{MARKERS[1]}{after}"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Counts the bytes that a rank holds under FSDP2.")
    parser.add_argument(
        "--page", action="store_true", help="only write the table, from old results"
    )
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.rank is not None:
        rank(arguments.rank)
        return 0
    if not arguments.page:
        RESULT.write_text(json.dumps(measured("python bench/fsdp_memory.py"), indent=1) + "\n")
    result = json.loads(RESULT.read_text())
    PAGE.write_text(page(PAGE.read_text(), result))
    missed = misses(result)
    for miss in missed:
        print(f"missed: {miss}", file=sys.stderr)
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
