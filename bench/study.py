"""Compares five objectives on one small task, in the manner of AdaDPO's Figure 3.

Each objective trains the demo's model (SmolLM2-135M-Instruct with LoRA, on sentences of movie
reviews) with `prefkern.PreferenceTrainer`, once per seed. The seed sets the order of the training
pairs and the initial adapter; the pairs are the same. The same held-out pairs are scored every few
steps, step 0 included. On them each objective gives its loss, its rewards, and the ratio of its
gradients on the two responses (`prefkern.diagnostics`). MADPO's margins come from `prefkern
margins`, whose reward model is trained once on the training pairs.

    python bench/study.py                      # the default study, some 25 minutes on two idle cores
    python bench/study.py --model Qwen/Qwen3-0.6B --data pairs.jsonl --steps 500 --held-out 512

A call writes one JSON file with all measurements and a PNG next to it. `--page` rewrites the
figures of a Markdown page from the JSON. `--draw-only` does both without training. A run is not
repeated if the output folder has it already, with the same settings, machine and versions.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
import transformers
from peft import LoraConfig
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback

import prefkern
from prefkern.cli import margins as margins_command
from prefkern.data import load_preference_dataset, tokenize_preferences
from prefkern.data.collate import PreferenceCollator
from prefkern.loss.diagnostics import objective_balance
from prefkern.objectives import Objective, Pairs
from prefkern_bench import environment

ROOT = Path(__file__).parent.parent
# The demo's model and data are scripts, not part of the package.
sys.path.append(str(ROOT / "examples"))

import movie_pairs
import smollm2

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
DEFAULT_DATA = "movie reviews"
DEFAULT_OBJECTIVES = ["dpo", "adadpo", "simpo", "alphadpo", "madpo"]
# The demo's adapter.
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
# Epochs of MADPO's reward model; its batch size and learning rate are those of the policies.
MARGIN_EPOCHS = 3
PAIRS_A_BATCH = 16  # for pairs that are only scored
START, END = "<!-- study -->\n", "<!-- /study -->\n"


class Style(NamedTuple):
    label: str
    color: str
    line: Any
    marker: str


# Okabe and Ito's colours, which differ under the common kinds of colour blindness.
STYLES = {
    "dpo": Style("DPO", "#000000", "-", "o"),
    "adadpo": Style("AdaDPO", "#D55E00", "-", "s"),
    "simpo": Style("SimPO", "#0072B2", "--", "^"),
    "alphadpo": Style("alpha-DPO", "#009E73", "-.", "D"),
    "madpo": Style("MADPO", "#CC79A7", ":", "v"),
}
OTHER_STYLES = [("#E69F00", (0, (5, 1))), ("#56B4E9", (0, (3, 1, 1, 1))), ("#7F7F7F", (0, (1, 1)))]


@dataclass(frozen=True)
class HeldOut:
    """The held-out pairs, in the same batches for every run."""

    batches: list[dict[str, Tensor]]
    lengths: Tensor  # (2, pairs) scored tokens, chosen and rejected
    ref_logps: Tensor  # (2, pairs) sums under the model without an adapter
    reward_margins: Tensor | None  # (pairs,)

    def pairs(self, logps: Tensor) -> Pairs:  # (2, pairs)
        return Pairs(*logps, *self.ref_logps, *self.lengths, self.reward_margins)


@torch.no_grad()
def response_sums(model: Any, batches: list[dict[str, Tensor]]) -> Tensor:  # (2, pairs)
    """Summed log-probs of the responses, chosen and rejected; restores the model's mode."""
    was_training = model.training
    model.eval()
    sums = []
    for batch in batches:
        batch = {name: batch[name].to(model.device) for name in batch}
        logps = prefkern.token_logprobs(
            model, batch["input_ids"], batch["attention_mask"], batch["labels"]
        )
        sums.append(logps.sum(-1).view(2, -1))
    model.train(was_training)
    return torch.cat(sums, 1)


@torch.no_grad()
def measure(objective: Objective, pairs: Pairs) -> dict[str, float]:
    """One point of every curve; changes neither the objective's mode nor its running statistics."""
    balance = objective_balance(objective, pairs)
    was_training = objective.training
    result = objective.eval()(pairs)
    objective.train(was_training)
    ref_chosen, ref_rejected = pairs.reference("the study")
    lengths = pairs.lengths("the study")
    ratios = (pairs.chosen_logps - ref_chosen) - (pairs.rejected_logps - ref_rejected)
    rewards = result.chosen_rewards - result.rejected_rewards
    per_token = pairs.chosen_logps / lengths[0] - pairs.rejected_logps / lengths[1]
    values = {
        "loss": result.losses.mean(),
        "reward_accuracy": (rewards > 0).float().mean(),
        "reward_ties": (rewards == 0).float().mean(),
        "reward_margin": rewards.mean(),
        "log_ratio_accuracy": (ratios > 0).float().mean(),
        "log_ratio_margin": ratios.mean(),
        "kl_margin": objective.beta * ratios.mean(),
        "chosen_logps": pairs.chosen_logps.mean(),
        "rejected_logps": pairs.rejected_logps.mean(),
        "logp_accuracy": (per_token > 0).float().mean(),
        "log_balance": balance.log_balance.nanquantile(0.5),
        "chosen_share": balance.chosen_share.nanmean(),
    }
    return {name: value.item() for name, value in values.items()}


class Evaluation(TrainerCallback):
    """Scores the held-out pairs before the first step, every few steps, and after the last."""

    def __init__(self, objective: Objective, held_out: HeldOut, every: int) -> None:
        self.objective, self.held_out, self.every = objective, held_out, every
        self.steps: list[int] = []
        self.curves: dict[str, list[float]] = {}
        self.logps: list[list[list[float]]] = []

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        self._evaluate(model, 0)

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._evaluate(model, state.global_step)

    def _evaluate(self, model: Any, step: int) -> None:
        sums = response_sums(model, self.held_out.batches)
        pairs = self.held_out.pairs(sums)
        self.steps.append(step)
        self.logps.append(sums.tolist())
        for name, value in measure(self.objective, pairs).items():
            self.curves.setdefault(name, []).append(value)


class Study:
    """One call of the study: its objectives, pairs, settings, and the data that all runs share."""

    def __init__(self, arguments: argparse.Namespace, console: Console) -> None:
        self.arguments, self.console = arguments, console
        self.output: Path = arguments.output
        self.objectives = {name: self.build(name) for name in arguments.objectives}
        self.output.mkdir(parents=True, exist_ok=True)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.files = self._pairs()
        digests = [hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in self.files]
        self.environment = environment(self.device, command())
        self.environment["versions"]["peft"] = metadata.version("peft")
        # Everything that a run's numbers depend on, except its objective and its seed.
        self.settings = {
            "model": arguments.model or DEFAULT_MODEL,
            "dtype": "bfloat16",
            "data": arguments.data or DEFAULT_DATA,
            "pairs": [_rows(path) for path in self.files],
            "digests": digests,
            "steps": arguments.steps,
            "pairs_a_step": arguments.pairs_a_step,
            "evaluate_every": arguments.evaluate_every,
            "learning_rate": arguments.learning_rate,
            "lr_scheduler_type": "linear",
            "warmup_steps": max(1, arguments.steps // 10),
            "lora": LORA,
            "device": self.environment["device"],
            "versions": self.environment["versions"],
        }
        self._data: tuple[Any, HeldOut] | None = None

    def build(self, name: str) -> Objective:
        """A new objective for each run, because a run changes its objective's statistics."""
        try:
            objective = prefkern.objectives.build(name, **self.arguments.options.get(name, {}))
        except (ValueError, TypeError) as error:
            raise SystemExit(f"study: {error}") from error
        unsupported = getattr(objective, "needs_kls", True) or objective.needs_alignments
        if not isinstance(objective, Objective) or unsupported:
            raise SystemExit(f"study: {name!r} needs more than log-probs of pairs")
        return objective

    def run(self, name: str, seed: int) -> dict[str, Any]:
        """One training run; read from the output folder if it is there already."""
        objective = self.build(name)
        settings = {**self.settings, "objective": describe(objective), "seed": seed}
        path = self.output / f"runs/{name}-{seed}.json"
        if path.exists():
            earlier = json.loads(path.read_text())
            if earlier["settings"] == settings:
                self.console.print(f"{label(name)}, seed {seed}: done earlier")
                return earlier
        train, held_out = self.data()
        started = time.perf_counter()
        evaluation = self.train(objective, seed, train, held_out)
        steps, curves = evaluation.steps, evaluation.curves
        seconds = time.perf_counter() - started
        result = {
            "settings": settings,
            "date": self.environment["date"],
            "seconds": round(seconds, 1),
            "steps": steps,
            "curves": curves,
            # Sums of every pair, so that a new measure needs no training; not part of the report.
            "logps": evaluation.logps,
        }
        _write(path, result)
        loss, accuracy = curves["loss"], curves["reward_accuracy"]
        self.console.print(
            f"{label(name)}, seed {seed}: {steps[-1]} steps in {seconds:.0f} s, held-out loss "
            f"{loss[0]:.4f} to {loss[-1]:.4f}, reward accuracy {accuracy[-1]:.3f}"
        )
        return result

    def train(self, objective: Objective, seed: int, train: Any, held_out: HeldOut) -> Evaluation:
        """One run of PreferenceTrainer."""
        settings = self.settings
        config = prefkern.PreferenceConfig(
            output_dir=str(self.output / "trainer"),
            seed=seed,
            max_steps=settings["steps"],
            learning_rate=settings["learning_rate"],
            lr_scheduler_type=settings["lr_scheduler_type"],
            warmup_steps=settings["warmup_steps"],
            per_device_train_batch_size=settings["pairs_a_step"],
            token_metrics=False,
            gradient_checkpointing=False,
            bf16=False,  # the weights are bfloat16 themselves
            dataloader_pin_memory=self.device.type == "cuda",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = prefkern.PreferenceTrainer(
            self.model(),
            config,
            train_dataset=train,
            processing_class=AutoTokenizer.from_pretrained(self.model_path()),
            objective=objective,
            peft_config=LoraConfig(**LORA, task_type="CAUSAL_LM"),
        )
        evaluation = Evaluation(objective, held_out, settings["evaluate_every"])
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(evaluation)
        trainer.train()
        return evaluation

    def data(self) -> tuple[Any, HeldOut]:
        """The training pairs and the held-out pairs, with margins and reference sums."""
        if self._data is None:
            files = self.files
            if any(objective.needs_reward_margins for objective in self.objectives.values()):
                files = self.margins()
            self.console.print("Reference: log-probs of every pair, once for all runs")
            tokenizer = AutoTokenizer.from_pretrained(self.model_path())
            model = self.model().to(self.device)
            train, held_out = (self._scored(model, tokenizer, path) for path in files)
            self._data = train[0], held_out[1]
        return self._data

    def _scored(self, model: Any, tokenizer: Any, path: Path) -> tuple[Any, HeldOut]:
        """The pairs of a file: as tokens with the reference's sums, and as batches to evaluate."""
        dataset = load_preference_dataset(str(path))
        tokens, _ = tokenize_preferences(dataset, tokenizer, max_length=1024, name=path.stem)
        pad = tokenizer.pad_token_id
        collate = PreferenceCollator(tokenizer.eos_token_id if pad is None else pad)
        rows = [tokens[row] for row in range(len(tokens))]
        batches = [
            collate(rows[start : start + PAIRS_A_BATCH])
            for start in range(0, len(rows), PAIRS_A_BATCH)
        ]
        sums = response_sums(model, batches)
        chosen, rejected = sums.tolist()
        tokens = tokens.add_column("ref_chosen_logps", chosen)
        tokens = tokens.add_column("ref_rejected_logps", rejected)
        lengths = torch.cat(
            [(batch["labels"][:, 1:] != -100).sum(-1).view(2, -1) for batch in batches], 1
        )
        margins = [batch.pop("reward_margins") for batch in batches if "reward_margins" in batch]
        margins = torch.cat(margins).to(sums.device) if margins else None
        return tokens, HeldOut(batches, lengths.to(sums.device), sums, margins)

    def margins(self) -> list[Path]:
        """Files of the pairs with reward margins, from the data or from `prefkern margins`."""
        if self._carries_margins():
            return self.files
        folder = self.output / "margins"
        folder.mkdir(exist_ok=True)
        outputs = [folder / path.name for path in self.files]
        settings = {
            "model": self.settings["model"],
            "digests": self.settings["digests"],
            "learning_rate": self.settings["learning_rate"],
            "pairs_a_step": self.settings["pairs_a_step"],
            "epochs": MARGIN_EPOCHS,
            "device": self.settings["device"],
            "versions": self.settings["versions"],
        }
        record = folder / "settings.json"
        if record.exists() and json.loads(record.read_text())["settings"] == settings:
            return outputs
        self.console.print("MADPO's step 1: a reward model and its margins, once for all seeds")
        started = time.perf_counter()
        options = {
            "dtype": "bfloat16",
            "disable_tqdm": True,
            "overwrite": True,
            "dataloader_pin_memory": self.device.type == "cuda",
        }
        training = {
            "model_name_or_path": self.model_path(),
            "output_dir": folder / "reward_model",
            "learning_rate": settings["learning_rate"],
            "per_device_train_batch_size": settings["pairs_a_step"],
            "num_train_epochs": MARGIN_EPOCHS,
            "lora_r": LORA["r"],
            "lora_alpha": LORA["lora_alpha"],
            "report_to": "none",
        }
        scoring = {"reward_model": folder / "reward_model"}
        for source, output, own in zip(self.files, outputs, (training, scoring), strict=True):
            given = {**own, **options, "dataset": source, "output": output}
            argv = [text for key, value in given.items() for text in (f"--{key}", str(value))]
            if margins_command.main(argv):
                raise SystemExit("study: prefkern margins failed")
        seconds = round(time.perf_counter() - started, 1)
        _write(record, {"settings": settings, "seconds": seconds})
        return outputs

    def report_margins(self) -> dict[str, Any] | None:
        """The source of MADPO's margins, and statistics of the margins and of their weights."""
        using = [o for o in self.objectives.values() if o.needs_reward_margins]
        if not using:
            return None
        files = self.margins()
        report: dict[str, Any] = {"source": "the data"}
        if not self._carries_margins():
            record = json.loads((self.output / "margins/settings.json").read_text())
            report = {"source": "prefkern margins", "seconds": record["seconds"]}
        for part, path in zip(("train", "held_out"), files, strict=True):
            dataset = load_preference_dataset(str(path))
            column = next(c for c in ("reward_margin", "margin") if c in dataset.column_names)
            margins = torch.tensor(dataset[column], dtype=torch.float64)
            weights = _margin_weights(using[0], margins)
            report[part] = {
                "accuracy": (margins > 0).double().mean().item(),
                "mean": margins.mean().item(),
                "std": margins.std(correction=0).item(),
                "quantiles_5_50_95": _quantiles(margins),
                "largest": margins.abs().max().item(),
                "weight_mean": weights.mean().item(),
                "weight_quantiles_5_50_95": _quantiles(weights),
            }
        return report

    def model(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.model_path(), dtype=torch.bfloat16)

    def model_path(self) -> str:
        # The demo uses the same folder.
        return self.arguments.model or str(smollm2.prepare(ROOT / ".demo/smollm2-135m-instruct"))

    def _pairs(self) -> list[Path]:
        """Files of the training pairs and of the held-out pairs."""
        arguments = self.arguments
        wanted = arguments.steps * arguments.pairs_a_step
        if not arguments.data:
            return [*movie_pairs.prepare(self.output / "pairs", wanted, arguments.held_out)]
        pairs = load_preference_dataset(arguments.data)
        held_out = min(arguments.held_out, len(pairs) // 5)
        if not held_out:
            raise SystemExit(f"{arguments.data} has {len(pairs)} pairs: too few to hold some out")
        parts = pairs.train_test_split(test_size=held_out, seed=0)
        # At most as many pairs as the steps use, so that every seed sees the same pairs.
        train = parts["train"].select(range(min(wanted, len(parts["train"]))))
        (self.output / "pairs").mkdir(exist_ok=True)
        paths = []
        for name, part in (("train", train), ("held_out", parts["test"])):
            paths.append(self.output / f"pairs/{name}.jsonl")
            with paths[-1].open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        return paths

    def _carries_margins(self) -> bool:
        with self.files[0].open(encoding="utf-8") as file:
            return bool({"margin", "reward_margin"} & set(json.loads(next(file))))


def conduct(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Do every missing run, and make the report of all runs."""
    study = Study(arguments, console)
    seeds = range(arguments.seeds)
    # Seed by seed, so that an interrupted study has complete comparisons for the first seeds.
    runs = {(name, seed): study.run(name, seed) for seed in seeds for name in study.objectives}
    margins = study.report_margins()
    kept = ("seconds", "steps", "curves")
    seconds = sum(run["seconds"] for run in runs.values()) + (margins or {}).get("seconds", 0)
    return {
        **study.environment,
        "seconds": round(seconds),
        "settings": {
            **{k: v for k, v in study.settings.items() if k not in study.environment},
            "seeds": [*seeds],
        },
        "margins": margins,
        "objectives": {
            name: {
                "label": label(name),
                "beta": objective.beta,
                "hyperparameters": describe(objective),
                "given": arguments.options.get(name, {}),
            }
            for name, objective in study.objectives.items()
        },
        "runs": {
            name: [{"seed": s} | {key: runs[name, s][key] for key in kept} for s in seeds]
            for name in study.objectives
        },
    }


# Rows of the table: a label, the curve, and the function that takes one number from a run's values.
Take = Callable[[list[float]], float]
FIRST: Take = lambda values: values[0]
LAST: Take = lambda values: values[-1]
CHANGE: Take = lambda values: values[-1] - values[0]
ROWS: list[tuple[str, str, Take]] = [
    ("loss before [1]", "loss", FIRST),
    ("loss after [1]", "loss", LAST),
    ("reward accuracy [2]", "reward_accuracy", LAST),
    ("reward margin [1]", "reward_margin", LAST),
    ("log-ratio accuracy [3]", "log_ratio_accuracy", LAST),
    ("log-ratio margin, nats [3]", "log_ratio_margin", LAST),
    ("log-prob accuracy before [4]", "logp_accuracy", FIRST),
    ("log-prob accuracy after [4]", "logp_accuracy", LAST),
    ("chosen log-prob, change", "chosen_logps", CHANGE),
    ("rejected log-prob, change", "rejected_logps", CHANGE),
    ("log balance before [5]", "log_balance", FIRST),
    ("log balance after [5]", "log_balance", LAST),
    ("chosen share of the push [6]", "chosen_share", LAST),
]
NOTES = [
    "in each objective's own units, so not comparable across columns",
    "share of pairs whose chosen response has a strictly higher reward, after training",
    "from rho = log P/R, policy over reference, summed: the same quantity in every column",
    "share of pairs whose chosen response has a higher log-prob per token, without a reference",
    "median over pairs of log(|dL/dP_w| / |dL/dP_l|), nats (AdaDPO, A.6)",
    "mean over pairs of |g_w| / (|g_w| + |g_l|), g the gradient on a summed log-prob, after training",
]


def table_of(report: dict[str, Any]) -> dict[str, list[str]]:
    """The table's cells by row: for each objective, mean ± standard deviation over seeds."""

    def cell(name: str, curve: str, take: Take) -> str:
        values = [take(run["curves"][curve]) for run in report["runs"][name]]
        text = f"{statistics.fmean(values):.3f}"
        return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.3f}"

    return {row: [cell(name, curve, take) for name in report["runs"]] for row, curve, take in ROWS}


def show(report: dict[str, Any], console: Console) -> None:
    """The table, on a terminal."""
    settings = report["settings"]
    table = Table(
        title=f"{settings['pairs'][1]} held-out pairs, {settings['steps']} steps of "
        f"{settings['pairs_a_step']}, {_seeds(report)}: mean ± std over seeds",
        title_style="bold",
        box=SIMPLE,
    )
    table.add_column("")
    for objective in report["objectives"].values():
        table.add_column(objective["label"], justify="right")
    for row, cells in table_of(report).items():
        # Two lines, so that five objectives fit a terminal of 80 columns.
        table.add_row(row.replace("[", "\\["), *(cell.replace(" ±", "\n±") for cell in cells))
    console.print(table)
    for number, note in enumerate(NOTES, 1):
        console.print(f"\\[{number}] {note}", style="dim")


def section(report: dict[str, Any], picture: str) -> str:
    """The figures of the page, between its markers."""
    settings, margins = report["settings"], report["margins"]
    versions = ", ".join(
        f"{name} {version}" for name, version in report["versions"].items() if version
    )
    train, held_out = settings["pairs"]
    lora = settings["lora"]
    lines = [
        (
            f"`{report['command']}` on {report['device']}; {versions}; {report['date'][:10]}; "
            f"{report['seconds'] / 60:.0f} minutes of training and evaluation in total."
        ),
        "",
        (
            f"{settings['model']} ({settings['dtype']}), LoRA of rank {lora['r']} (alpha "
            f"{lora['lora_alpha']}) on every linear layer except the head; {settings['data']}: "
            f"{train} pairs to train on, {held_out} held out; {settings['steps']} steps of "
            f"{settings['pairs_a_step']} pairs; AdamW, learning rate {settings['learning_rate']:g} "
            f"for every objective, {settings['lr_scheduler_type']} decay after "
            f"{settings['warmup_steps']} steps of warm-up; seeds "
            f"{', '.join(map(str, settings['seeds']))}."
        ),
        "",
        "| | hyper-parameters |",
        "|---|---|",
    ]
    for objective in report["objectives"].values():
        changed = ", ".join(f"{k}={v}" for k, v in objective["given"].items())
        origin = f"set here: {changed}" if changed else "the class's defaults"
        lines.append(f"| {objective['label']} | `{objective['hyperparameters']}`, {origin} |")
    if margins is not None:
        lines += [
            "",
            (
                f"| reward margins ({margins['source']}) | accuracy | mean | std | 5%, 50%, 95% "
                "| weight w(h), mean | 5%, 50%, 95% |"
            ),
            "|---|---|---|---|---|---|---|",
        ]
        for part, label_ in (("train", "training pairs"), ("held_out", "held-out pairs")):
            values = margins[part]
            spans = [
                ", ".join(f"{value:.2f}" for value in values[key])
                for key in ("quantiles_5_50_95", "weight_quantiles_5_50_95")
            ]
            lines.append(
                f"| {label_} | {values['accuracy']:.3f} | {values['mean']:.2f} "
                f"| {values['std']:.2f} | {spans[0]} | {values['weight_mean']:.2f} | {spans[1]} |"
            )
    labels = [objective["label"] for objective in report["objectives"].values()]
    lines += [
        "",
        f"![Held-out curves of {', '.join(labels)}]({picture})",
        "",
        f"On the held-out pairs, mean ± standard deviation over {_seeds(report)}:",
        "",
        "| | " + " | ".join(labels) + " |",
        "|---" * (len(labels) + 1) + "|",
        *(f"| {row} | {' | '.join(cells)} |" for row, cells in table_of(report).items()),
        "",
        "\n".join(f"{number}. {note}" for number, note in enumerate(NOTES, 1)),
    ]
    return START + "\n" + "\n".join(lines) + "\n\n" + END


def write_page(report: dict[str, Any], picture: Path, page: Path) -> None:
    """Replace the text between the page's markers."""
    text = page.read_text(encoding="utf-8") if page.exists() else START + END
    if START not in text or END not in text.split(START, 1)[1]:
        raise SystemExit(f"study: {page} has no {START.strip()} ... {END.strip()}")
    before, rest = text.split(START, 1)
    relative = Path(os.path.relpath(picture, page.parent)).as_posix()
    page.write_text(before + section(report, relative) + rest.split(END, 1)[1], encoding="utf-8")


# Panels of the picture: curve, title, label of the axis, scale. Some scales are not linear, because
# the objectives' own units differ by more than a factor of ten. "symlog" is linear up to 1 and
# logarithmic above.
PANELS = [
    ("loss", "(a) held-out loss", "each in its own units", "log"),
    ("reward_accuracy", "(b) reward accuracy", "share of pairs, strict", "linear"),
    ("kl_margin", "(c) β × KL margin", r"$\beta\,(\rho_w - \rho_l)$, each its own β", "symlog"),
    ("reward_margin", "(d) reward margin", "$r_w - r_l$, own coefficients", "symlog"),
    ("chosen_logps", "(e) chosen log-prob", "nats, mean over responses", "linear"),
    ("rejected_logps", "(f) rejected log-prob", "nats, mean over responses", "linear"),
    (
        "log_balance",
        "(g) gradient balance on P",
        r"log $|\partial L/\partial P_w|\,/\,|\partial L/\partial P_l|$, median",
        "linear",
    ),
    (
        "chosen_share",
        "(h) chosen share of the push",
        "$|g_w|\\,/\\,(|g_w| + |g_l|)$, mean",
        "linear",
    ),
]


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw eight panels over steps; a ninth cell has the legend and explains the lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 11}):
        figure, axes = pyplot.subplots(3, 3, figsize=(12, 10.5), layout="constrained")
        figure.get_layout_engine().set(h_pad=0.1)
        steps = next(iter(report["runs"].values()))[0]["steps"]
        *panels, corner = axes.flat
        for panel, (curve, title, unit, scale) in zip(panels, PANELS, strict=True):
            for name, style in styles(report).items():
                _band(panel, report["runs"][name], curve, style)
            panel.set_title(title, loc="left", fontweight="bold")
            panel.set(xlabel="step", ylabel=unit)
            if len(steps) < 10:
                panel.set_xticks(steps)
            _scale(panel, scale)
            panel.set_axisbelow(True)
            panel.grid(axis="y", color="0.9", linewidth=0.6)
        handles, _ = panels[0].get_legend_handles_labels()
        corner.axis("off")
        corner.legend(
            handles,
            [f"{o['label']}, β = {o['beta']:g}" for o in report["objectives"].values()],
            loc="upper left",
            bbox_to_anchor=(0, 1.05),
            borderaxespad=0,
            frameon=False,
            fontsize=12,
            handlelength=3.5,
        )
        corner.text(0, -0.12, _explanation(report), transform=corner.transAxes, fontsize=9.5)
        figure.savefig(path, dpi=120, metadata={"Software": None})
        pyplot.close(figure)


def _band(panel: Any, runs: list[dict[str, Any]], curve: str, style: Style) -> None:
    """Draw the mean over seeds as a line, and the range over seeds as a band."""
    steps = runs[0]["steps"]
    rows = [
        # If every pair ties, as before the first step, accuracy means nothing: leave it out.
        [
            float("nan") if curve == "reward_accuracy" and ties == 1 else value
            for value, ties in zip(run["curves"][curve], run["curves"]["reward_ties"], strict=True)
        ]
        for run in runs
    ]
    by_step = [*zip(*rows, strict=True)]
    panel.fill_between(
        steps,
        [*map(min, by_step)],
        [*map(max, by_step)],
        color=style.color,
        alpha=0.15,
        linewidth=0,
    )
    panel.plot(
        steps,
        [statistics.fmean(values) for values in by_step],
        color=style.color,
        linestyle=style.line,
        marker=style.marker,
        markersize=4,
        linewidth=1.8,
        label=style.label,
    )


def _scale(panel: Any, scale: str) -> None:
    """Set a scale with ticks at plain numbers, and with no empty range below 0."""
    from matplotlib.ticker import FixedLocator, FuncFormatter

    if scale == "linear":
        return
    if scale == "log":
        panel.set_yscale("log")
    else:
        panel.set_yscale("symlog", linthresh=1)
        if panel.dataLim.y0 >= 0:
            panel.set_ylim(bottom=-0.08)
    sizes = [digit * 10.0**power for power in range(-1, 5) for digit in (1, 2, 5)]
    ticks = sizes if scale == "log" else [0, *(sign * x for x in sizes[2:] for sign in (1, -1))]
    panel.yaxis.set_major_locator(FixedLocator(ticks))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.minorticks_off()


def _explanation(report: dict[str, Any]) -> str:
    settings = report["settings"]
    return (
        f"{Path(settings['model']).name}, LoRA, {Path(settings['data']).name}:\n"
        f"{settings['steps']} steps of {settings['pairs_a_step']} pairs, "
        f"{settings['pairs'][1]} pairs held out.\n"
        f"Line: mean of {_seeds(report)}; band: lowest to highest.\n"
        "(a) is logarithmic; (c) and (d) are above 1.\n"
        "(b): step 0 is left out if every pair ties.\n"
        "ρ = log P/R, summed over a response;\n"
        "g = dL/d log P; r: the objective's reward."
    )


def _seeds(report: dict[str, Any]) -> str:
    count = len(report["settings"]["seeds"])
    return "1 seed" if count == 1 else f"{count} seeds"


def styles(report: dict[str, Any]) -> dict[str, Style]:
    """A style for each objective in a report."""
    others = [name for name in report["runs"] if name not in STYLES]
    given = dict(STYLES)
    for number, name in enumerate(others):
        color, line = OTHER_STYLES[number % len(OTHER_STYLES)]
        given[name] = Style(name, color, line, "xP*hX"[number // len(OTHER_STYLES) % 5])
    return {name: given[name] for name in report["runs"]}


def label(name: str) -> str:
    return STYLES[name].label if name in STYLES else name


def _margin_weights(objective: Objective, margins: Tensor) -> Tensor:  # (pairs,)
    """The weights that an objective gives to reward margins, MADPO's w(h); 1 if it has none."""
    zeros = torch.zeros_like(margins)
    weigh: Any = getattr(objective, "weight", None)
    weights = weigh and weigh(Pairs(zeros, zeros, reward_margins=margins))
    return torch.ones_like(margins) if weights is None else weights


def _quantiles(values: Tensor) -> list[float]:
    return values.quantile(values.new_tensor([0.05, 0.5, 0.95])).tolist()


def describe(objective: Objective) -> str:
    """An objective's name with all its hyper-parameters, defaults included."""
    return f"{type(objective).__name__}({objective.extra_repr()})"


def command() -> str:
    return shlex.join(["python", "bench/study.py", *sys.argv[1:]])


def _rows(path: Path) -> int:
    with path.open(encoding="utf-8") as file:
        return sum(1 for _ in file)


def _write(path: Path, value: Any) -> None:
    """Write JSON under a temporary name, then rename it, so that no file is half-written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="Hugging Face folder or hub name; default: SmolLM2-135M")
    parser.add_argument("--data", help="JSONL of prompt, chosen, rejected; default: movie reviews")
    parser.add_argument("--objectives", nargs="+", default=DEFAULT_OBJECTIVES, metavar="NAME")
    parser.add_argument("--seeds", type=_positive, default=3, help="number of seeds, from 0 on")
    parser.add_argument("--steps", type=_positive, default=24)
    parser.add_argument("--pairs-a-step", type=_positive, default=8)
    parser.add_argument("--held-out", type=_positive, default=64, help="pairs to evaluate on")
    parser.add_argument("--evaluate-every", type=_positive, default=4, help="in steps")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="for every objective")
    parser.add_argument(
        "--options",
        type=_options,
        default={},
        help='hyper-parameters by objective, as JSON: \'{"simpo": {"beta": 2.5}}\'',
    )
    parser.add_argument(
        "--output", type=Path, default=ROOT / ".demo/study", help="folder that keeps finished runs"
    )
    parser.add_argument("--json", type=Path, help="default: study.json in the output folder")
    parser.add_argument("--page", type=Path, help="Markdown page whose figures to rewrite")
    parser.add_argument(
        "--draw-only", type=Path, metavar="JSON", help="only draw, from an earlier call's JSON"
    )
    arguments = parser.parse_args(argv)
    arguments.objectives = list(dict.fromkeys(arguments.objectives))
    for name in arguments.options:
        if name not in arguments.objectives:
            parser.error(f"--options names {name!r}, which is not one of the --objectives")
    return arguments


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _options(text: str) -> dict[str, dict[str, Any]]:
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from error
    if not (isinstance(options, dict) and all(isinstance(o, dict) for o in options.values())):
        raise argparse.ArgumentTypeError("must be a JSON object with one object per objective")
    return options


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    console = Console(highlight=False)
    if arguments.draw_only:
        path = arguments.draw_only
        report = json.loads(path.read_text(encoding="utf-8"))
    else:
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()
        # peft 0.21.2 reads an attribute that transformers 5.23 has renamed, and that gives a
        # warning.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        path = arguments.json or arguments.output / "study.json"
        report = conduct(arguments, console)
        _write(path, report)
    show(report, console)
    picture = path.with_suffix(".png")
    draw(report, picture)
    console.print(f"Numbers: {path}. Picture: {picture}.")
    if arguments.page:
        write_page(report, picture, arguments.page)


if __name__ == "__main__":
    main()
