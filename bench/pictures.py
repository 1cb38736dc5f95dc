"""Measures how far training on pictures is from the model's own logits, and from TRL's trainer.

usage: python bench/pictures.py [--page]        (exit status 1 if a bound is missed)

The families, tiny, their processors and the drawn pictures are those of `tests/support/pictures.py`. This
writes bench/results/pictures-cpu.json, and from that the page bench/PICTURES.md. With --page it writes
only the page, from an existing result.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in (".", "kernels", "tests", "bench")]
# So that TRL sends nothing over the network.
os.environ.setdefault("CI", "1")

import datasets
import torch
from trl import DPOConfig
from trl import DPOTrainer as PlainDPOTrainer

import prefkern
import twins
from prefkern import PreferenceConfig, PreferenceTrainer
from prefkern_bench import environment
from support import pictures
from support.pictures import FAMILIES, Family

PAGE = ROOT / "bench/PICTURES.md"
RESULT = ROOT / "bench/results/pictures-cpu.json"
# Of a sum of log-probs in nats, and of gradients; float32 rounds in the model itself.
BOUNDS = {"float64": (1e-10, 1e-5), "float32": (1e-4, 1e-3)}
MODES = ("texts", "conversations", "rows of text among them", "LoRA, adapter off as the reference")
HEAD = """\
# Training on pictures

Tiny models of each family with random weights, drawn pictures of different sizes, one or two a
prompt, and captions. Each number is a largest error of a padded batch of 6 pairs against the model's own
logits in float64, one row at a time, each row from the family's own processor. *logps*: of a response's
sum, in nats. *gradients*: of DPO's gradient of any weight (language model, projector, vision tower; with
LoRA of its factors), relative to the largest entry of that gradient, or to a thousandth of the largest of
all. The reference is another model, except beside LoRA.
"""
OF_TRL = """
## Against TRL's DPOTrainer

The same rows through TRL's trainer, collator and log-probs, and through `PreferenceTrainer`: 3 steps of SGD
and an evaluation, weights in float64. Largest differences over all steps, relative; *logps and metrics* are
relative where they are above 1. TRL caps the logits of a Gemma 3 as the config of its text says, which the
model itself does not do; here that config has no cap.
"""
dpo_config = functools.partial(PreferenceConfig, objective="dpo", beta=pictures.BETA)


def twin(family: Family, chats: bool = False, **options: Any) -> twins.Twin:
    """The differences between a short run of TRL's trainer and one of ours."""
    model, processor = family.make()
    reference = None if "peft_config" in options else family.make(1)[0]
    for each in (model, reference):
        if each is None:
            continue
        # A vision tower's smallest gradients are rounding in float32.
        each.double()
        if family.name == "Gemma3":
            # TRL caps the logits as the text's config says, which the model does not.
            each.config.text_config.final_logit_softcapping = None
    given = {
        "train_dataset": pictures.dataset(family, 12, chats=chats),
        "eval_dataset": pictures.dataset(family, 8, seed=3, chats=chats),
        "processing_class": processor,
        "max_length": None,
        "max_steps": 3,
        "optim": "sgd",
        "learning_rate": 1e-2,
        **twins.WHOLE,
        **options,
    }
    theirs, ours = (
        twins.run(
            kind,
            make_config,
            model=copy.deepcopy(model),
            ref_model=copy.deepcopy(reference),
            **given,
        )
        for kind, make_config in ((PlainDPOTrainer, DPOConfig), (PreferenceTrainer, dpo_config))
    )
    # Our own trainer counts tokens of training alone.
    return twins.compare(str(family), theirs, ours, ("eval_num_tokens",))


def errors(family: Family, mode: str, dtype: torch.dtype) -> dict[str, float]:
    """The largest errors of one step, of a model in a dtype, against its own logits in float64."""
    model, processor = family.make()
    chats, has_adapter = mode == "conversations", mode.startswith("LoRA")
    rows = pictures.rows(family, 6, chats=chats)
    if mode == "rows of text among them":
        for row in rows[1:3]:
            row["images"] = []
            row["prompt"] = row["prompt"].replace(family.placeholder, "").strip()
    reference = None if has_adapter else family.make(1)[0].to(dtype)
    with tempfile.TemporaryDirectory() as folder:
        trainer = PreferenceTrainer(
            model.to(dtype),
            dpo_config(
                folder,
                use_cpu=True,
                report_to="none",
                per_device_train_batch_size=len(rows),
                train_sampling_strategy="sequential",
                gradient_checkpointing=False,
            ),
            datasets.Dataset.from_list(rows),
            processing_class=processor,
            ref_model=reference,
            peft_config=pictures.lora() if has_adapter else None,
        )
        batch = next(iter(trainer.get_train_dataloader()))
        policy: Any = trainer.model.to(dtype)
        with torch.no_grad():
            found = prefkern.token_logprobs(policy, **batch).sum(1)
        trainer.compute_loss(policy, batch).backward()
    ours = pictures.gradients(policy)
    policy.double()
    with torch.no_grad():
        if reference is None:
            with policy.disable_adapter():
                of_reference = pictures.sums(policy, processor, rows)
        else:
            of_reference = pictures.sums(reference.double(), processor, rows)
    expected = pictures.sums(policy, processor, rows)
    pictures.dpo(expected, of_reference).backward()
    theirs = pictures.gradients(policy)
    return {
        "logps": (found.double() - expected).abs().max().item(),
        "gradients": pictures.worst(ours, theirs),
    }


def measured(command: str) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    trl: dict[str, Any] = {}
    for family in FAMILIES:
        rows[str(family)] = {
            mode: {name: errors(family, mode, getattr(torch, name)) for name in BOUNDS}
            for mode in MODES
        }
        trl[str(family)] = {
            name: {
                "loss": run.worst_loss,
                "gradients": max(run.gradients),
                "weights": run.weights,
                "metrics": run.metrics,
            }
            for name, run in (
                ("texts", twin(family)),
                ("LoRA", twin(family, peft_config=pictures.lora())),
            )
        }
    return {**environment(torch.device("cpu"), command), "rows": rows, "trl": trl}


def misses(result: dict[str, Any]) -> list[str]:
    missed = [
        f"{family}, {mode}, {dtype}: {name} {found[name]:.1e}"
        for family, row in result["rows"].items()
        for mode, by_dtype in row.items()
        for dtype, found in by_dtype.items()
        for name, bound in zip(("logps", "gradients"), BOUNDS[dtype], strict=True)
        if not found[name] <= bound
    ]
    return missed + [
        f"{family}, TRL, {run}: {name} {value:.1e}"
        for family, row in result["trl"].items()
        for run, found in row.items()
        for name, value in found.items()
        if not value <= twins.BOUND
    ]


def page(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{n} {result['versions'][n]}" for n in ("torch", "transformers", "trl"))
    lines = [
        HEAD,
        f"`{result['command']}` on {result['device']}; {versions}; {result['date'][:10]}.",
        "",
        "| family | rows | logps, float64 | gradients | logps, float32 | gradients |",
        "|---|---|---|---|---|---|",
    ]
    for family, row in result["rows"].items():
        for mode, by_dtype in row.items():
            cells = [
                f"{found[name]:.0e}"
                for found in by_dtype.values()
                for name in ("logps", "gradients")
            ]
            lines.append(f"| {family} | {mode} | {' | '.join(cells)} |")
    lines += [
        OF_TRL,
        "| family | weights that train | loss | gradients | weights | logps and metrics |",
        "|---|---|---|---|---|---|",
    ]
    for family, row in result["trl"].items():
        for run, found in row.items():
            what = "LoRA" if run == "LoRA" else "all"
            cells = [f"{value:.0e}" for value in found.values()]
            lines.append(f"| {family} | {what} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Measures training on pictures.")
    parser.add_argument("--page", action="store_true", help="only write the page, from old results")
    arguments = parser.parse_args(argv)
    if not arguments.page:
        torch.set_num_threads(1)
        datasets.disable_progress_bars()
        RESULT.write_text(json.dumps(measured("python bench/pictures.py"), indent=1) + "\n")
    result = json.loads(RESULT.read_text())
    PAGE.write_text(page(result))
    missed = misses(result)
    for miss in missed:
        print(f"missed: {miss}", file=sys.stderr)
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
