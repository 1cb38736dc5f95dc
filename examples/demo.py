"""`make demo`: a real language model learns preferences with AdaDPO, without logits in memory.

1. Run `prefkern check`, which compares this machine's backends with float64.
2. Prepare model (SmolLM2-135M-Instruct) and pairs (movie reviews), or use `--model` and `--data`.
3. Train LoRA with `prefkern.PreferenceTrainer`; score held-out pairs before, during and after.
4. Measure bytes and time of the loss step alone, at the run's own shape: fused, and with logits.
5. Draw a picture. Save the adapter, load it with plain peft, and compare the log-probs.

Every printed number was measured in the same run. On the default data, "preferred" means "of
positive sentiment": no person ranked these sentences.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import datasets
import movie_pairs
import smollm2
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, PeftModel
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback

import prefkern
from prefkern.data import load_preference_dataset
from prefkern.models.head_forward import forward_with_head
from prefkern.models.heads import HeadInputs
from prefkern.models.scoring import align_labels
from prefkern.models.transform import head_transform
from prefkern.objectives import Pairs
from prefkern_bench import environment
from prefkern_bench.measure import Cost, cost_of

PAIRS_A_STEP = 8
EVALUATE_EVERY = 10  # steps
HELD_OUT = 128  # pairs
TIMED_ROUNDS = 7


class Watcher(TrainerCallback):
    """Shows progress, and records the curves of the picture and the plan of every step's loss."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.console = console
        self.progress = Progress(*columns, console=console)
        self.plans: list[prefkern.Plan] = []
        self.training: list[tuple[int, dict[str, float]]] = []
        self.held_out: list[tuple[int, dict[str, float]]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.task = self.progress.add_task("training", total=state.max_steps)
        self.progress.start()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.stop()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.advance(self.task)
        plan = prefkern.last_plan()
        if plan is not None and not any(plan is earlier for earlier in self.plans):
            self.plans.append(plan)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.training.append((state.global_step, logs))

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        self.held_out.append((state.global_step, metrics))
        self.console.print(
            f"step {state.global_step:>3}: held-out loss {metrics['eval_loss']:.4f}, reward "
            f"accuracy {metrics['eval_rewards/accuracies']:.3f}, margin "
            f"{metrics['eval_rewards/margins']:+.3f}"
        )


def prepare(arguments: argparse.Namespace, console: Console) -> tuple[str, Any, Any]:
    """The model's folder or name, the training pairs and the held-out pairs."""
    model = arguments.model or str(smollm2.prepare(arguments.output / "smollm2-135m-instruct"))
    if arguments.data:
        pairs = load_preference_dataset(arguments.data)
        held_out = min(HELD_OUT, len(pairs) // 5)
        if not held_out:
            raise SystemExit(f"{arguments.data} has {len(pairs)} pairs: too few to hold some out")
        parts = pairs.train_test_split(test_size=held_out, seed=0)
        train, held_out = parts["train"], parts["test"]
        console.print(f"Pairs: {arguments.data}")
    else:
        paths = movie_pairs.prepare(
            arguments.output / "pairs", arguments.steps * PAIRS_A_STEP, HELD_OUT
        )
        train, held_out = (load_preference_dataset(str(path)) for path in paths)
        console.print(
            "Pairs: sentences of movie reviews, a positive one chosen over a negative one.\n"
            "This is sentiment preference, [bold]not human ranking[/bold]."
        )
    console.print(f"{len(train)} pairs to train on, {len(held_out)} held out. Model: {model}\n")
    return model, train, held_out


def make_trainer(
    model: str, train: Any, held_out: Any, arguments: argparse.Namespace
) -> prefkern.PreferenceTrainer:
    """AdaDPO with LoRA on every linear layer except the head; a frozen head needs only one pass."""
    config = prefkern.PreferenceConfig(
        output_dir=str(arguments.output / "run"),
        objective="adadpo",
        beta=0.1,
        max_steps=arguments.steps,
        learning_rate=5e-4,
        lr_scheduler_type="linear",
        warmup_steps=max(1, arguments.steps // 10),
        per_device_train_batch_size=PAIRS_A_STEP,
        per_device_eval_batch_size=16,
        precompute_ref_log_probs=True,
        token_metrics=False,
        workspace_mb=16,  # bound on the temporary memory of the loss
        gradient_checkpointing=False,
        bf16=False,  # the weights are bfloat16 themselves
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=EVALUATE_EVERY,
        eval_on_start=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return prefkern.PreferenceTrainer(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16),
        config,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(
            r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )


@torch.no_grad()
def score(model: Any, trainer: prefkern.PreferenceTrainer, pairs: Any) -> tuple[Tensor, Tensor]:
    """Summed log-probs and lengths of held-out responses, chosen and rejected, (2, pairs) each."""
    model.eval()
    sums, lengths = [], []
    for start in range(0, len(pairs), 16):
        examples = [pairs[row] for row in range(start, min(start + 16, len(pairs)))]
        batch = {
            name: value.to(model.device) for name, value in trainer.data_collator(examples).items()
        }
        logps = prefkern.token_logprobs(
            model, batch["input_ids"], batch["attention_mask"], batch["labels"]
        )
        sums.append(logps.sum(-1).view(2, -1))
        lengths.append((batch["labels"][:, 1:] != -100).sum(-1).view(2, -1))
    return torch.cat(sums, 1), torch.cat(lengths, 1)


def report_learning(
    console: Console,
    watcher: Watcher,
    before: tuple[Tensor, Tensor],
    after: tuple[Tensor, Tensor],
) -> dict[str, list[float]]:
    """Held-out pairs before and after: the trainer's metrics, and separately scored log-probs."""

    def per_token_accuracy(scores: tuple[Tensor, Tensor]) -> float:
        chosen, rejected = scores[0] / scores[1]
        return (chosen > rejected).float().mean().item()

    (_, first), (last_step, last) = watcher.held_out[0], watcher.held_out[-1]
    table = Table(
        title=f"{before[0].shape[1]} held-out pairs, {last_step} steps of AdaDPO",
        title_style="bold",
        box=SIMPLE,
    )
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    keys = {
        "loss": "eval_loss",
        "reward accuracy [1]": "eval_rewards/accuracies",
        "reward margin": "eval_rewards/margins",
        "mean log-prob of a chosen response": "eval_logps/chosen",
        "mean log-prob of a rejected response": "eval_logps/rejected",
    }
    rows = {label: [first[key], last[key]] for label, key in keys.items()}
    rows["log-prob accuracy [2]"] = [per_token_accuracy(scores) for scores in (before, after)]
    for label, row in rows.items():
        table.add_row(label, *(f"{value:.4f}" for value in row))
    console.print(table)
    console.print(
        "\\[1] share of pairs whose chosen response has a strictly higher reward; before\n"
        "    training, policy and reference are equal and every pair ties, hence 0.\n"
        "\\[2] share of pairs whose chosen response has a higher mean log-prob per\n"
        "    token, without a reference.\n",
        style="dim",
    )
    return rows


def loss_step_inputs(trainer: prefkern.PreferenceTrainer) -> dict[str, Any]:
    """The inputs of the loss for one batch: hidden states, head, labels, reference sums."""
    model: Any = trainer.model
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    labels = align_labels(batch["labels"])

    def keep(head: HeadInputs) -> tuple[Any, Tensor]:
        states = head.of_tokens(labels).hidden.detach()
        bias = None if head.bias is None else head.bias.detach()
        return {"hidden": states, "weight": head.weight.detach(), "bias": bias}, head.hidden

    with torch.no_grad():
        inputs, _ = forward_with_head(
            model, {name: batch[name] for name in ("input_ids", "attention_mask")}, keep
        )
    transform = head_transform(model)
    options = {"logit_scale": transform.logit_scale, "softcap": transform.softcap}
    return {**inputs, **options, "labels": labels, "ref_logps": batch["ref_logps"]}


def eager_loss(
    objective: prefkern.objectives.Objective,
    hidden: Tensor,  # (2B, T, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (2B, T)
    ref_logps: Tensor,  # (2B,)
    **options: Any,
) -> Tensor:
    """The same loss with float32 logits [N, V] of the scored tokens in memory."""
    scored = labels != -100
    logits = prefkern.reference.logits(hidden[scored], weight, **options)
    logps = -F.cross_entropy(logits, labels[scored], reduction="none")
    per_token = logps.new_zeros(labels.shape).masked_scatter(scored, logps)
    lengths = scored.sum(-1)
    pairs = Pairs(*per_token.sum(-1).chunk(2), *ref_logps.chunk(2), *lengths.chunk(2))
    return objective(pairs).losses.mean()


def report_loss_step(console: Console, trainer: prefkern.PreferenceTrainer) -> dict[str, Any]:
    """Measure the loss and its gradient of hidden states, fused and eager; print the costs."""
    inputs = loss_step_inputs(trainer)
    device = inputs["hidden"].device

    def run(is_fused: bool, dtype: torch.dtype | None = None) -> tuple[float, Tensor]:
        operands = {name: inputs[name] for name in ("hidden", "weight", "bias")}
        if dtype is not None:
            operands = {name: x if x is None else x.to(dtype) for name, x in operands.items()}
        hidden = operands["hidden"].detach().requires_grad_()
        step = inputs | operands | {"hidden": hidden}
        if is_fused:
            loss = trainer.loss_fn(**step).loss
        else:
            loss = eager_loss(trainer.loss_fn.objective, **step)
        loss.backward()
        assert hidden.grad is not None
        return loss.item(), hidden.grad

    true_loss, truth = run(False, torch.float64)
    costs: dict[bool, Cost] = {}
    errors: dict[bool, tuple[float, float]] = {}
    times: dict[bool, list[float]] = {True: [], False: []}
    for is_fused in times:
        loss, gradient = run(is_fused)
        gradient_error = (gradient.double() - truth).norm() / truth.norm()
        errors[is_fused] = abs(loss - true_loss), gradient_error.item()
        costs[is_fused] = cost_of(lambda fused=is_fused: run(fused), device)
    for _ in range(TIMED_ROUNDS):
        for is_fused, milliseconds in times.items():
            # Other programs on the machine change the wall time of a CPU, and its own time little.
            clock = time.perf_counter if device.type == "cuda" else time.process_time
            start = clock()
            run(is_fused)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            milliseconds.append((clock() - start) * 1e3)

    tokens = int((inputs["labels"] != -100).sum())
    vocab_size, hidden_size = inputs["weight"].shape
    table = Table(
        title=f"The loss step: {tokens} scored tokens, H = {hidden_size}, V = {vocab_size}, "
        f"{str(inputs['hidden'].dtype).removeprefix('torch.')}, {device.type}",
        title_style="bold",
        box=SIMPLE,
    )
    table.add_column("")
    for column in ("peak MiB", "ms", "NHV", "loss error", "dH error"):
        table.add_column(column, justify="right")
    shape = {"tokens": tokens, "hidden_size": hidden_size, "vocab_size": vocab_size}
    rows: dict[str, dict[str, float]] = {}
    for is_fused, milliseconds in times.items():
        row = rows["prefkern" if is_fused else "logits in memory"] = {
            "peak_mib": costs[is_fused].peak_bytes / 2**20,
            "median_ms": statistics.median(milliseconds),
            "operations_nhv": costs[is_fused].operations / (tokens * hidden_size * vocab_size),
            "loss_error": errors[is_fused][0],
            "dhidden_error": errors[is_fused][1],
        }
        formats = (".1f", ".1f", ".2f", ".1e", ".1e")
        cells = [format(value, spec) for value, spec in zip(row.values(), formats, strict=True)]
        table.add_row([*rows][-1], *cells)
    console.print(table)
    console.print(
        "Peak of temporary memory and gradients; median time of forward and backward\n"
        f"{'on the GPU' if device.type == 'cuda' else '(processor time of all threads)'};\n"
        "matrix-product operations per scored token, hidden unit and vocabulary entry;\n"
        "errors against float64 of the loss and (relative) of the hidden states' gradient.",
        style="dim",
    )
    if device.type == "cpu":
        console.print(
            "Such times say little about a GPU: use `prefkern bench` there.",
            style="dim",
        )
    return {**shape, "rows": rows}


def report_plans(console: Console, watcher: Watcher, steps: int) -> None:
    """Print the plan of the last step; stop if the fused path did not run in every step."""
    if len(watcher.plans) != steps:
        raise SystemExit(f"the fused path ran in only {len(watcher.plans)} of {steps} steps")
    plan = watcher.plans[-1]
    console.print(
        f"\nThe fused path ran in all {steps} steps ({plan.backend} backend, {plan.structure}).\n"
        f"In the last one: {plan.tokens} tokens x {plan.vocab_size} entries, in tiles of "
        f"{plan.forward_tiles.token_tile} x {plan.forward_tiles.vocab_tile},\n"
        f"{plan.workspace_bytes / 2**20:.1f} MiB of workspace."
    )


def draw(watcher: Watcher, path: Path) -> None:
    """Draw training loss, held-out accuracy and margin, and held-out log-probs over steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def curve(name: str) -> tuple[list[int], list[float]]:
        return [step for step, _ in watcher.held_out], [log[name] for _, log in watcher.held_out]

    pyplot.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10})
    figure, ((loss, accuracy), (margin, logps)) = pyplot.subplots(2, 2, figsize=(10, 7))
    losses = [(step, log["loss"]) for step, log in watcher.training]
    loss.plot(*zip(*losses, strict=True), color="C7", linewidth=1, label="training batch")
    loss.plot(*curve("eval_loss"), "o-", color="C0", label="held-out")
    loss.set(title="AdaDPO loss", ylabel="nats")
    loss.legend(frameon=False)

    # Before the first step every reward is 0: each pair ties, so leave that point out.
    steps, accuracies = curve("eval_rewards/accuracies")
    accuracy.plot(steps[1:], accuracies[1:], "o-", color="C2")
    accuracy.axhline(0.5, color="C7", linestyle=":", linewidth=1)
    accuracy.text(0, 0.51, "chance", color="C7")
    accuracy.set(title="Held-out reward accuracy", ylabel="share of pairs", ylim=(0.4, 1.0))
    accuracy.set_xlim(loss.get_xlim())

    margin.plot(*curve("eval_rewards/margins"), "o-", color="C4")
    margin.axhline(0, color="C7", linestyle=":", linewidth=1)
    margin.set(title="Held-out reward margin", ylabel="chosen - rejected reward")

    logps.plot(*curve("eval_logps/chosen"), "o-", color="C0", label="chosen")
    logps.plot(*curve("eval_logps/rejected"), "s-", color="C3", label="rejected")
    logps.set(title="Held-out log-probs", ylabel="nats, mean over responses")
    logps.legend(frameon=False)

    for axes in (loss, accuracy, margin, logps):
        axes.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def check_adapter(
    console: Console, trainer: prefkern.PreferenceTrainer, model: str, folder: Path
) -> None:
    """Save the adapter, load it with plain peft on a fresh base model, and compare log-probs."""
    trained: Any = trainer.model
    trained.save_pretrained(folder)
    base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    loaded = PeftModel.from_pretrained(base.to(trained.device), str(folder))
    dataset: Any = trainer.eval_dataset
    pairs = dataset.select(range(min(16, len(dataset))))
    sums, loaded_sums = (score(each, trainer, pairs)[0] for each in (trained, loaded))
    difference = (sums - loaded_sums).abs().max().item()
    if not difference <= 1e-3:
        raise SystemExit(f"the reloaded adapter differs by {difference} nats")
    console.print(
        f"\nAdapter: {folder}\n"
        f"Loaded again with peft's own PeftModel, its {sums.numel()} log-probs differ by at most\n"
        f"{difference:.1e} nats from the trained model's."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a Hugging Face folder or hub name; default: SmolLM2-135M")
    parser.add_argument("--data", help="JSONL of prompt, chosen, rejected; default: movie reviews")
    parser.add_argument("--steps", type=int, default=40, help=f"of {PAIRS_A_STEP} pairs each")
    parser.add_argument("--output", type=Path, default=Path(".demo"), help="folder for all results")
    arguments = parser.parse_args()
    started = time.perf_counter()
    console = Console()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    # peft 0.21.2 reads an attribute that transformers 5.23 has renamed, and that gives a warning.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)

    console.rule("prefkern check")
    if subprocess.run([sys.executable, "-m", "prefkern.cli", "check"], check=False).returncode:
        raise SystemExit("prefkern check failed on this machine: see its table")

    console.rule("AdaDPO training")
    arguments.output.mkdir(parents=True, exist_ok=True)
    model, train, held_out = prepare(arguments, console)
    trainer = make_trainer(model, train, held_out, arguments)
    watcher = Watcher(console)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(watcher)
    before = score(trainer.model, trainer, trainer.eval_dataset)
    trainer.train()
    if not watcher.held_out or watcher.held_out[-1][0] != trainer.state.global_step:
        trainer.evaluate()
    after = score(trainer.model, trainer, trainer.eval_dataset)
    report_plans(console, watcher, trainer.state.global_step)

    console.rule("What changed")
    learning = report_learning(console, watcher, before, after)
    loss_step = report_loss_step(console, trainer)
    picture = arguments.output / "learning.png"
    draw(watcher, picture)
    check_adapter(console, trainer, model, arguments.output / "adapter")
    is_default = not (arguments.model or arguments.data)
    seconds = time.perf_counter() - started
    numbers = {
        **environment(trainer.args.device, "make demo" if is_default else " ".join(sys.argv)),
        "seconds": round(seconds),
        "steps": trainer.state.global_step,
        "held_out_pairs": len(held_out),
        "learning": learning,
        "loss_step": loss_step,
    }
    report = arguments.output / "report.json"
    report.write_text(json.dumps(numbers, indent=1) + "\n")
    console.print(f"Picture: {picture}. The numbers above: {report}.")
    console.print(f"{seconds:.0f} s in total.")


if __name__ == "__main__":
    main()
