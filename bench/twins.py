"""Compares TRL's trainers with their twins on prefkern: losses, gradients and metrics of each step.

usage: python bench/twins.py [--json PATH]         (exit status 1 if a bound is missed)

Two trainers start from the same tiny model and see the same uneven pairs in the same order, 4 pairs
a step (2 accumulated twice), in float32 with AdamW. One is TRL's own trainer, the other computes
its log-probs with prefkern. For each step the table has both losses, and the largest difference of
any parameter's gradient, relative to the largest entry of that gradient; and at the end that of the
weights. The weights of the twins are never synchronised, so a difference in one step would grow in
the next steps. SFT, KTO, GRPO and RLOO get the responses or the prompts of the pairs; the last two
sample their own responses.

It also writes the table of docs/trl.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import datasets
import peft
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import Trainer, TrainerCallback, set_seed
from trl import (
    DPOConfig,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl import DPOTrainer as PlainDPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.tpo import TPOConfig
from trl.experimental.tpo import TPOTrainer as PlainTPOTrainer

from prefkern.integrations.trl import DPOTrainer, TPOTrainer, fuse_head
from prefkern_bench import environment
from support import tiny

STEPS, PAIRS = 6, 24
DOCS = ROOT / "docs/trl.md"
# Bound on relative differences of losses, gradients and metrics, in float32, over all steps.
BOUND = 2e-5
# A gradient's difference is relative to its own largest entry, or to this share of the largest
# entry in the step, whichever is larger.
LEAST_SCALE = 1e-3
# Metrics of time are not compared.
_OF_TIME = ("runtime", "per_second", "step_time")
# These metrics are means over all tokens of a log in prefkern, and means of batches' means in TRL.
_OF_TOKENS = ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy")


class Record(TrainerCallback):
    """Keeps the gradients of every optimiser step."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_: Any) -> None:
        named = model.named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})


@dataclass
class Run:
    """The results of a run: a log and all gradients of each step, and the final evaluation."""

    trainer: Trainer
    gradients: list[dict[str, Tensor]]
    metrics: dict[str, float]

    @property
    def weights(self) -> dict[str, Tensor]:
        model: Any = self.trainer.model
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    @property
    def logs(self) -> list[dict[str, float]]:
        return [log for log in self.trainer.state.log_history if "loss" in log]


@dataclass
class Twin:
    """Differences between two runs: losses, worst gradient per step, worst metric and weight."""

    name: str
    losses: list[tuple[float, float]] = field(default_factory=list)  # TRL's, prefkern's
    gradients: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)  # of TRL's gradient
    metrics: float = 0.0
    weights: float = 0.0  # relative to the largest entry of the same parameter
    # A mean of advantages is near 0, so that its own size is no scale.
    least_loss: float = 0.0

    @property
    def worst_loss(self) -> float:
        return max(abs(x - y) / max(abs(x), self.least_loss) for x, y in self.losses)

    @property
    def worst(self) -> float:
        return max(self.worst_loss, *self.gradients, self.metrics, self.weights)


def run(kind: type, make_config: Callable[..., Any], fuse: bool = False, **options: Any) -> Run:
    """Train and evaluate a tiny model; `names` go to the trainer, other options to its config."""
    names = ("ref_model", "peft_config", "objective", "adaptive", "processing_class")
    names = (*names, "train_dataset", "eval_dataset", "reward_funcs")
    given: dict[str, Any] = {name: options.pop(name) for name in names if name in options}
    defaults: dict[str, Any] = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,  # gradients are recorded without clipping
        "remove_unused_columns": False,
        "gradient_checkpointing": False,
    }
    model = options.pop("model", None)
    record = Record()
    given.setdefault("processing_class", tiny.tokenizer())
    given.setdefault("train_dataset", tiny.dataset(PAIRS))
    given.setdefault("eval_dataset", tiny.dataset(8, seed=3))
    with tempfile.TemporaryDirectory() as folder:
        args = make_config(folder, **{**defaults, **options})
        # An adapter's weights: TRL before 1.16 draws them without a seed.
        set_seed(args.seed)
        trainer = kind(
            model=tiny.model() if model is None else model,
            args=args,
            callbacks=[record],
            **given,
        )
        if fuse:
            fuse_head(trainer)
        trainer.train()
        return Run(trainer, record.gradients, trainer.evaluate())


def compare(name: str, theirs: Run, ours: Run, without: tuple[str, ...] = ()) -> Twin:
    """Compare all losses, metrics and gradients of two runs.

    Metrics whose name ends with a string in `without` are left out.
    """
    twin = Twin(name)
    for x, y in zip(theirs.logs, ours.logs, strict=True):
        twin.losses.append((x["loss"], y["loss"]))
    for x, y in zip([*theirs.logs, theirs.metrics], [*ours.logs, ours.metrics], strict=True):
        for key in x:
            if not key.endswith((*_OF_TIME, *without)):
                # A mean near 0 may be a mean of numbers around 1, so the scale is at least 1.
                twin.metrics = max(twin.metrics, abs(x[key] - y[key]) / max(abs(x[key]), 1.0))
    for x, y in zip(theirs.gradients, ours.gradients, strict=True):
        if x.keys() != y.keys():
            raise ValueError(
                f"{name}: only one run has gradients of these parameters: {x.keys() ^ y.keys()}"
            )
        # Some gradients are only rounding (a key's bias does not change attention), so their own
        # largest entry is no scale.
        least = LEAST_SCALE * max(gradient.abs().max() for gradient in x.values())
        worst = max(
            (x[key] - y[key]).abs().max() / x[key].abs().max().clamp(min=least) for key in x
        )
        twin.gradients.append(worst.item())
        twin.norms.append(sum(gradient.square().sum() for gradient in x.values()).sqrt().item())
    for key, weight in theirs.weights.items():
        difference = (weight - ours.weights[key]).abs() * _is_trained(theirs.gradients, key)
        twin.weights = max(twin.weights, (difference.max() / weight.abs().max()).item())
    return twin


def _is_trained(gradients: list[dict[str, Tensor]], key: str) -> Tensor:
    """The entries of a parameter whose gradient is more than rounding in every step.

    Adam makes whole steps of the others too: half of a key's bias with rotary positions, say, which
    changes no attention.
    """
    if not any(key in step for step in gradients):
        return torch.tensor(True)  # It has no gradient: the two runs leave it alone alike.
    return torch.stack(
        [
            step[key].abs() > 1e-4 * max(gradient.abs().max() for gradient in step.values())
            for step in gradients
            if key in step
        ]
    ).all(0)


def dpo(name: str, **options: Any) -> Twin:
    def each(kind: type) -> Run:
        # A separate reference, so that rewards are not 0 in the first step.
        ref_model = None if "peft_config" in options else tiny.model(seed=1)
        return run(kind, DPOConfig, ref_model=ref_model, **options)

    without = () if options.get("gradient_accumulation_steps") == 1 else _OF_TOKENS
    return compare(name, each(PlainDPOTrainer), each(DPOTrainer), without)


def fused(name: str, kind: type, make_config: Callable[..., Any], **options: Any) -> Twin:
    return compare(name, run(kind, make_config, **options), run(kind, make_config, True, **options))


def tpo(name: str, **options: Any) -> Twin:
    def each(kind: type) -> Run:
        data = {"train_dataset": tiny.triple_dataset(PAIRS)}
        data["eval_dataset"] = tiny.triple_dataset(8, seed=3)
        return run(kind, TPOConfig, **data, **WHOLE, **options)

    return compare(name, each(PlainTPOTrainer), each(TPOTrainer))


def responses(count: int, seed: int = 0) -> datasets.Dataset:
    """Single responses with labels, for KTO and SFT."""
    sides = ("chosen", "rejected")
    return datasets.Dataset.from_list(
        [
            {"prompt": row["prompt"], "completion": row[sides[i % 2]], "label": i % 2 == 0}
            for i, row in enumerate(tiny.dataset(count, seed=seed))
        ]
    )


def single(name: str, kind: type, make_config: Callable[..., Any], **options: Any) -> Twin:
    """A trainer on single responses."""
    datasets = {"train_dataset": responses(PAIRS), "eval_dataset": responses(8, seed=3)}
    if kind is SFTTrainer:
        datasets = {key: rows.remove_columns("label") for key, rows in datasets.items()}
    return fused(name, kind, make_config, **datasets, **options)


def distinct_tokens(completions: list[str], **_: Any) -> list[float]:
    """A reward: the number of different words in a response."""
    return [float(len(set(text.split()))) for text in completions]


def sampled(name: str, kind: type, make_config: Callable[..., Any], **options: Any) -> Twin:
    """A trainer that samples responses, with a reference."""
    options = {
        "reward_funcs": distinct_tokens,
        "train_dataset": tiny.dataset(PAIRS).select_columns("prompt"),
        "eval_dataset": tiny.dataset(4, seed=3).select_columns("prompt"),
        "num_generations": 4,
        "per_device_train_batch_size": 4,
        "max_completion_length": 6,
        "temperature": 0.8,
        "beta": 0.1,
        **options,
    }
    with tempfile.TemporaryDirectory() as folder:
        # These trainers load the reference from where the model is from.
        tiny.model().save_pretrained(folder)
        twin = fused(name, kind, make_config, **{"model": folder, **options})
    twin.least_loss = 1.0
    return twin


def lora() -> peft.LoraConfig:
    return peft.LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False)


# Each of TRL's losses but `sigmoid`, which is "DPO", with its options; and several at once.
LOSSES: dict[str, dict[str, Any]] = {
    **{
        f"DPO: {loss_type}": {"loss_type": [loss_type], **options}
        for loss_type, options in {
            "hinge": {"beta": 0.5},
            "ipo": {"beta": 0.3},
            "exo_pair": {"label_smoothing": 0.01},
            "nca_pair": {},
            "robust": {"label_smoothing": 0.2},
            "bco_pair": {},
            "sppo_hard": {"beta": 0.5},
            "aot": {"label_smoothing": 0.1},
            "aot_unpaired": {},
            "apo_zero": {},
            "apo_down": {},
            "discopop": {"discopop_tau": 0.1},
            "sft": {},
            "sigmoid_norm": {"beta": 2.0},
        }.items()
    },
    "DPO: several": {
        "loss_type": ["sigmoid", "bco_pair", "sft"],
        "loss_weights": [0.8, 0.2, 1.0],
    },
}

# TRL's losses of TPO.
TPO_LOSSES: dict[str, dict[str, Any]] = {
    "TPO": {"beta": 0.1, "label_smoothing": 0.1},
    "TPO: hinge": {"loss_type": "hinge", "beta": 0.1},
    "TPO: ipo": {"loss_type": "ipo", "beta": 0.5, "tpo_alpha": 0.5},
    "TPO: tpo-l": {"loss_type": "tpo-l", "beta": 2.0, "tpo_l_gamma": 0.8},
    "TPO, no gold response": {"tpo_alpha": 0.0, "beta": 0.1},
}

# One batch in each log, so that metrics over tokens can be compared too.
WHOLE = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "per_device_eval_batch_size": 8,
}
CASES: dict[str, Callable[[], Twin]] = {
    "DPO": lambda: dpo("DPO"),
    "DPO, one batch a step": lambda: dpo("DPO, one batch a step", **WHOLE),
    "DPO, LoRA": lambda: dpo("DPO, LoRA", peft_config=lora()),
    "DPO, reference beforehand": lambda: dpo(
        "DPO, reference beforehand", precompute_ref_log_probs=True
    ),
    **{name: functools.partial(dpo, name, **options) for name, options in LOSSES.items()},
    "CPO": lambda: fused("CPO", CPOTrainer, CPOConfig),
    "SimPO": lambda: fused("SimPO", CPOTrainer, CPOConfig, loss_type="simpo", cpo_alpha=0.0),
    "ORPO": lambda: fused("ORPO", ORPOTrainer, ORPOConfig),
    **{name: functools.partial(tpo, name, **options) for name, options in TPO_LOSSES.items()},
    "DPO, fuse_head": lambda: fused("DPO, fuse_head", PlainDPOTrainer, DPOConfig, **_reference()),
    "KTO": lambda: single("KTO", KTOTrainer, KTOConfig, **_reference()),
    "SFT": lambda: single("SFT", SFTTrainer, SFTConfig),
    "GRPO": lambda: sampled("GRPO", GRPOTrainer, GRPOConfig),
    "RLOO": lambda: sampled("RLOO", RLOOTrainer, RLOOConfig),
}
# TRL's own trainers after `fuse_head`, in the order of docs/trl.md.
OF_FUSE_HEAD = {
    "DPO, fuse_head": "`DPOTrainer`",
    "KTO": "`KTOTrainer`",
    "SFT": "`SFTTrainer`",
    "GRPO": "`GRPOTrainer`",
    "RLOO": "`RLOOTrainer`",
    "CPO": "`CPOTrainer`",
    "SimPO": "`CPOTrainer`, SimPO",
    "ORPO": "`ORPOTrainer`",
}


def _reference() -> dict[str, Any]:
    return {"ref_model": tiny.model(seed=1)}


def docs_table(rows: list[dict[str, Any]]) -> str:
    """The table of docs/trl.md."""
    lines = ["| trainer | loss | gradients | weights | metrics |", "|---|---|---|---|---|"]
    by_name = {row["name"]: row for row in rows}
    for name, trainer in OF_FUSE_HEAD.items():
        row = by_name[name]
        gradient = max(step["worst_gradient"] for step in row["steps"])
        values = (row["loss"], gradient, row["weights"], row["metrics"])
        lines.append(f"| {trainer} | {' | '.join(f'{value:.0e}' for value in values)} |")
    return "\n".join(lines)


def table_of(twin: Twin) -> Table:
    title = f"{twin.name}: metrics within {twin.metrics:.0e}"
    table = Table(title=title, box=SIMPLE, pad_edge=False)
    for column in ("step", "TRL loss", "prefkern loss", "difference", "worst gradient"):
        table.add_column(column, justify="right")
    for step, ((x, y), gradient) in enumerate(zip(twin.losses, twin.gradients, strict=True), 1):
        table.add_row(str(step), f"{x:.7f}", f"{y:.7f}", f"{y - x:.0e}", f"{gradient:.0e}")
    return table


def row_of(twin: Twin) -> dict[str, Any]:
    columns = ("trl_loss", "prefkern_loss", "worst_gradient")
    steps = [
        dict(zip(columns, (*losses, gradient), strict=True))
        for losses, gradient in zip(twin.losses, twin.gradients, strict=True)
    ]
    return {
        "name": twin.name,
        "worst": twin.worst,
        "loss": twin.worst_loss,
        "metrics": twin.metrics,
        "weights": twin.weights,
        "steps": steps,
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Compares TRL's trainers with prefkern twins.")
    default = ROOT / "bench/results/trl-twin-cpu.json"
    parser.add_argument("--json", type=Path, default=default, metavar="PATH")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    console = Console()
    twins = [case() for case in CASES.values()]
    for twin in twins:
        console.print(table_of(twin))
    command = shlex.join(["python", "bench/twins.py", *argv])
    report = {
        **environment(torch.device("cpu"), command),
        "bound": BOUND,
        "rows": [row_of(twin) for twin in twins],
    }
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    table = re.compile(r"^\| trainer \| loss \|.*?(?=\n\n)", re.DOTALL | re.MULTILINE)
    DOCS.write_text(table.sub(docs_table(report["rows"]), DOCS.read_text()))
    missed = [twin for twin in twins if not twin.worst <= BOUND]
    for twin in missed:
        console.print(f"missed: {twin.name} {twin.worst:.1e}", style="red")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
