"""Counts a training step with padded, packed and shared pairs, beside TRL's, and writes the page.

usage: python bench/sharing.py [--page | --batches] [--rounds N]

A step is the policy's forward and backward and the reference's forward, of a Llama with random
weights on a CPU in float32, through the trainers' own `training_step`. It is counted, not only
timed: matrix-product operations (attention included, see `prefkern_bench.measure`), the peak of
bytes beyond the weights (gradients are counted), and processor time of one thread, the least of
interleaved rounds. Lengths are drawn from three log-normal distributions. Then the same for the
model, the adapter and the pairs of `make demo`, which need its packages.

Batches by tokens (`max_tokens_per_batch`) are counted as well: how full they are, beside batches of a
number of pairs. That takes seconds and no model.

The numbers go to bench/results/sharing-cpu.json, the page to bench/SHARING.md and the picture to
bench/results/sharing.png. With --page only these two are drawn, from an existing result; with
--batches the batches of an existing result are counted again before that.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in (".", "kernels", "tests")]

import datasets
import numpy as np
import torch
import transformers
from peft import LoraConfig
from torch import Tensor

import prefkern
from prefkern.training.token_batches import TokenBatches, pair_tokens
from prefkern_bench import environment
from prefkern_bench.measure import Meter
from prefkern_bench.pictures import STYLES, pyplot
from support import tiny

# The demo's model and data are scripts, not part of the package.
sys.path.append(str(ROOT / "examples"))

import movie_pairs
import smollm2

PAGE = ROOT / "bench/SHARING.md"
RESULT = ROOT / "bench/results/sharing-cpu.json"
PICTURE = ROOT / "bench/results/sharing.png"
# The demo's adapter.
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
WEIGHTS = ROOT / ".demo/smollm2-135m-instruct"
VOCAB = 4096
MODEL = {
    "vocab_size": VOCAB,
    "hidden_size": 320,
    "intermediate_size": 864,
    "num_hidden_layers": 4,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
}
# name: medians of prompt and response, spreads of their logarithms
LENGTHS = {
    "short prompts": (120, 290, 0.9, 0.7),
    "dialogues": (350, 220, 0.5, 0.5),
    "long prompts": (820, 205, 0.2, 0.3),
}
LAYOUTS = {
    "trl": "TRL, padded",
    "padded": "prefkern, padded",
    "packed": "prefkern, packed",
    "shared": "prefkern, prompt shared",
}
PAIRS = 4
BATCHES = 1
# What is batched by tokens.
BUDGET = 16384
MANY_PAIRS = 4000
BY_TOKENS = (
    f"An epoch of {MANY_PAIRS:,} pairs with shared prompts, in batches of at most {BUDGET:,} tokens "
    "(`max_tokens_per_batch`), beside shuffled batches of a number of pairs with about as many "
    "tokens on average. Memory follows the largest batch. Counted by "
    "`python bench/sharing.py --batches`."
)
DEMO = "demo"
DEMO_PAIRS = 8
DEMO_BATCHES = 1


def drawn(name: str, count: int) -> list[dict[str, list[int]]]:
    """Pairs of random tokens, with lengths of a distribution."""
    generator = torch.Generator().manual_seed(0)
    prompt, response, prompt_spread, response_spread = LENGTHS[name]

    def ids(median: int, spread: float) -> list[int]:
        factor = math.exp(spread * torch.randn((), generator=generator).item())
        length = max(4, min(2048, round(median * factor)))
        return torch.randint(10, VOCAB, (length,), generator=generator).tolist()

    return [
        {
            "prompt_ids": ids(prompt, prompt_spread),
            "chosen_ids": ids(response, response_spread),
            "rejected_ids": ids(response, response_spread),
        }
        for _ in range(count)
    ]


def model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**MODEL))


def trainer(pairs: list[dict[str, list[int]]], layout: str, folder: str) -> Any:
    """A trainer of DPO on the pairs, with a reference model, in a layout."""
    common = {
        "output_dir": folder,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "per_device_train_batch_size": PAIRS,
        "max_length": None,
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
        "bf16": False,
    }
    if layout != "trl":
        config = prefkern.PreferenceConfig(
            **common,
            objective="dpo",
            padding_free=layout != "padded",
            share_prompt=layout == "shared",
            token_metrics=False,
        )
        return prefkern.PreferenceTrainer(
            model(),
            config,
            datasets.Dataset.from_list(pairs),
            processing_class=tiny.tokenizer(),
            ref_model=model(seed=1),
        )
    import trl

    class OfTokens(trl.DPOTrainer):
        """On rows that are tokens already: TRL itself reads only text."""

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

    return OfTokens(
        model(),
        ref_model=model(seed=1),
        args=trl.DPOConfig(**common),
        train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=tiny.tokenizer(),
    )


def steps(run: Any) -> list[dict[str, Tensor]]:
    return [run._prepare_inputs(batch) for batch in run.get_train_dataloader()]


def step(run: Any, batch: dict[str, Tensor]) -> float:
    run.model.zero_grad()
    run.model.train()
    # Set by the loop of train().
    run.current_gradient_accumulation_steps = 1
    return run.training_step(run.model, dict(batch)).item()


def gradient_norm(run: Any) -> float:
    gradients = [p.grad for p in run.model.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients).item()


def demo_trainer(layout: str, folder: str) -> Any:
    """The demo's trainer: LoRA on SmolLM2-135M, AdaDPO, reference sums computed before."""
    weights = smollm2.prepare(WEIGHTS)
    train, _ = movie_pairs.prepare(Path(folder), DEMO_PAIRS * DEMO_BATCHES, 0)
    config = prefkern.PreferenceConfig(
        output_dir=folder,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        objective="adadpo",
        per_device_train_batch_size=DEMO_PAIRS,
        precompute_ref_log_probs=True,
        gradient_checkpointing=False,
        bf16=False,
        train_sampling_strategy="sequential",
        padding_free=layout != "padded",
        share_prompt=layout == "shared",
        token_metrics=False,
    )
    torch.manual_seed(0)
    return prefkern.PreferenceTrainer(
        transformers.AutoModelForCausalLM.from_pretrained(weights, dtype=torch.bfloat16),
        config,
        prefkern.data.load_preference_dataset(str(train)),
        processing_class=transformers.AutoTokenizer.from_pretrained(weights),
        peft_config=LoraConfig(**LORA, task_type="CAUSAL_LM"),
    )


def measure(
    name: str, rounds: int, layouts: Iterable[str], make: Callable[[str, str], Any]
) -> list[dict[str, Any]]:
    """Counts and times the steps of the trainers `make(layout, folder)`."""
    rows: list[dict[str, Any]] = []
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        for layout in layouts:
            run = make(layout, folder)
            batches = steps(run)
            losses, norms = [], []
            for batch in batches:
                losses.append(step(run, batch))
                norms.append(gradient_norm(run))
            operations, peak = 0, 0
            for batch in batches:
                with Meter() as meter:
                    step(run, batch)
                operations += meter.operations
                peak = max(peak, meter.peak_bytes)
            row = {
                "lengths": name,
                "layout": layout,
                "losses": losses,
                "gradient_norms": norms,
                "tokens": sum(batch["input_ids"].numel() for batch in batches),
                "operations": operations,
                "peak_bytes": peak,
                "seconds": math.inf,
            }
            rows.append(row)
            runs[layout] = (run, batches, row)
        for _ in range(rounds):
            for run, batches, row in runs.values():
                begin = time.process_time()
                for batch in batches:
                    step(run, batch)
                row["seconds"] = min(row["seconds"], time.process_time() - begin)
        print(name, *(f"{r['layout']} {r['seconds']:.2f} s" for r in rows), flush=True)
    return rows


def batches(name: str) -> list[dict[str, Any]]:
    """Tokens and pairs of batches with shared prompts: by tokens, and of as many pairs each."""
    sizes = pair_tokens(datasets.Dataset.from_list(drawn(name, MANY_PAIRS)), shares=True)
    by_tokens = list(TokenBatches(sizes, BUDGET, seed=0))
    each = round(MANY_PAIRS / len(by_tokens))
    order = np.random.default_rng(0).permutation(MANY_PAIRS)
    of_pairs = [order[start : start + each] for start in range(0, MANY_PAIRS - each + 1, each)]
    rows = []
    for kind, plan in (("tokens", by_tokens), ("pairs", of_pairs)):
        tokens = [int(sizes[batch].sum()) for batch in plan]
        pairs = [len(batch) for batch in plan]
        rows.append(
            {
                "lengths": name,
                "kind": kind,
                "batches": len(plan),
                "pairs": [min(pairs), max(pairs)],
                "tokens": [sum(tokens) / len(tokens), min(tokens), max(tokens)],
            }
        )
    return rows


def page(report: dict[str, Any]) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in report["versions"].items() if v)
    head = (
        f"Written by `{report['command']}` on {report['date'][:10]}; {report['device']}; "
        f"{versions}.\n\n"
        "A training step of DPO with another reference model, full training, float32: the reference's "
        "forward, and the policy's forward and backward. The model is a Llama of "
        f"{MODEL['num_hidden_layers']} layers with random weights, H = {MODEL['hidden_size']}, with "
        f"{VOCAB} vocabulary entries; sdpa attention. "
        f"{PAIRS * BATCHES} pairs in batches of {PAIRS}. Operations are those of matrix products, "
        "attention included. Memory is the peak beyond the weights, gradients included. Time is "
        f"processor time, the least of {report['rounds']} interleaved rounds.\n\n"
        "![operations, memory and time of a step](results/sharing.png)"
    )
    lines = ["# A pair's prompt once", "", head]
    for name, (prompt, response, *_) in LENGTHS.items():
        title = f"{name.capitalize()}: medians of {prompt} and {response} tokens"
        lines += ["", f"## {title}", "", *table(report["rows"], name)]
    agreement = (
        f"Among all layouts, losses agree within {spread(report['rows'], LENGTHS):.0e} of each "
        f"other, norms of gradients within {spread(report['rows'], LENGTHS, 'gradient_norms'):.0e}."
    )
    prompt, response = report["demo"]["prompt"], report["demo"]["response"]
    norms = spread(report["rows"], [DEMO], "gradient_norms")
    demo = (
        "A step as in `make demo`: SmolLM2-135M-Instruct in bf16, "
        f"LoRA of rank {LORA['r']}, reference sums computed before, at the first step's weights, on "
        f"{DEMO_PAIRS} pairs of movie reviews from `examples/movie_pairs.py`. A pair "
        f'is the prompt "{movie_pairs.PROMPT}" of {prompt} tokens and two sentences of '
        f"{response:.0f} on average. Of these {2 * (prompt + response):.0f} tokens, sharing saves "
        f"{prompt - 1}: nearly all of the gain is that of packing. Norms of gradients agree within "
        f"{norms:.0e} of each other."
    )
    lines += ["", agreement, "", "## The data of the demo", "", demo, ""]
    lines += table(report["rows"], DEMO)
    lines += [
        "",
        "## Batches by tokens",
        "",
        BY_TOKENS,
        "",
        "| lengths | batches | pairs | tokens: mean | least | largest |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["batches"]:
        (fewest, most), (mean, least, largest) = row["pairs"], row["tokens"]
        kind = "by tokens" if row["kind"] == "tokens" else f"of {most} pairs"
        pairs = f"{fewest} to {most}" if fewest < most else str(most)
        lines.append(
            f"| {row['lengths']} | {row['batches']} {kind} | {pairs} | {mean:,.0f} | {least:,} | "
            f"{largest:,} |"
        )
    return "\n".join(lines) + "\n"


def table(rows: list[dict[str, Any]], name: str) -> list[str]:
    """The layouts' rows for one kind of lengths; the first is the base of the last column."""
    rows = [row for row in rows if row["lengths"] == name]
    base = rows[0]
    columns = ["layout", "tokens", "operations, 1e12", "peak memory, MiB", "time, s"]
    columns.append(f"to {LAYOUTS[base['layout']]}")
    lines = [f"| {' | '.join(columns)} |", "|---|---|---|---|---|---|"]
    for row in rows:
        relative = "operations {:.2f}, memory {:.2f}, time {:.2f}".format(
            *(row[key] / base[key] for key in ("operations", "peak_bytes", "seconds"))
        )
        lines.append(
            f"| {LAYOUTS[row['layout']]} | {row['tokens']:,} | {row['operations'] / 1e12:.2f} | "
            f"{row['peak_bytes'] / 2**20:,.0f} | {row['seconds']:.2f} | {relative} |"
        )
    return lines


def demo_lengths() -> dict[str, float]:
    """Tokens of the demo's prompt, and of its responses on average."""
    weights = smollm2.prepare(WEIGHTS)
    with tempfile.TemporaryDirectory() as folder:
        train, _ = movie_pairs.prepare(Path(folder), DEMO_PAIRS * DEMO_BATCHES, 0)
        pairs = prefkern.data.load_preference_dataset(str(train))
        tokenizer = transformers.AutoTokenizer.from_pretrained(weights)
        rows = [*prefkern.data.tokenize_preferences(pairs, tokenizer)[0]]
    prompts = {len(row["prompt_ids"]) for row in rows}
    responses = [len(row[f"{side}_ids"]) for row in rows for side in ("chosen", "rejected")]
    assert len(prompts) == 1
    return {"prompt": prompts.pop(), "response": sum(responses) / len(responses)}


def spread(rows: list[dict[str, Any]], names: Iterable[str], key: str = "losses") -> float:
    """The largest relative difference of a loss, or of a gradient's norm, between layouts."""
    worst = 0.0
    for name in names:
        values = torch.tensor([row[key] for row in rows if row["lengths"] == name])
        worst = max(worst, ((values.amax(0) - values.amin(0)) / values.mean(0)).max().item())
    return worst


def picture(report: dict[str, Any]) -> None:
    plots = pyplot()
    colors = {"trl": STYLES["trl"].color, "padded": STYLES["torch-lce"].color}
    colors |= {
        "packed": STYLES["prefkern-roomy"].color,
        "shared": STYLES["prefkern"].color,
    }
    quantities = {
        "operations": ("operations", 1e12, "1e12"),
        "peak_bytes": ("peak memory", 2**20, "MiB"),
        "seconds": ("processor time", 1, "s"),
    }
    figure, axes = plots.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for axis, (key, (title, unit, label)) in zip(axes, quantities.items(), strict=True):
        for place, (layout, name) in enumerate(LAYOUTS.items()):
            found = [
                (group + (place - 1.5) * 0.2, row[key] / unit)
                for group, lengths in enumerate(LENGTHS)
                for row in report["rows"]
                if (row["lengths"], row["layout"]) == (lengths, layout) and key in row
            ]
            if found:
                axis.bar(*zip(*found, strict=True), width=0.19, color=colors[layout], label=name)
        axis.set_title(title)
        axis.set_ylabel(label)
        axis.set_xticks(range(len(LENGTHS)), LENGTHS)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(LAYOUTS),
        frameon=False,
    )
    figure.savefig(PICTURE, dpi=110)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--page", action="store_true", help="draw an existing result")
    parser.add_argument("--batches", action="store_true", help="count its batches by tokens again")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args(argv)
    counted = [] if arguments.page else [row for name in LENGTHS for row in batches(name)]
    if arguments.batches:
        report = {**json.loads(RESULT.read_text()), "batches": counted}
        RESULT.write_text(json.dumps(report, indent=1) + "\n")
    elif not arguments.page:
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        rows = []
        for name in LENGTHS:
            pairs = drawn(name, PAIRS * BATCHES)
            make = functools.partial(trainer, pairs)
            rows += measure(name, arguments.rounds, LAYOUTS, make)
        rows += measure(DEMO, arguments.rounds, ["padded", "packed", "shared"], demo_trainer)
        command = shlex.join(["python", "bench/sharing.py", *argv])
        report = environment(torch.device("cpu"), command)
        report |= {"rounds": arguments.rounds, "model": MODEL, "rows": rows, "batches": counted}
        report["demo"] = demo_lengths()
        RESULT.write_text(json.dumps(report, indent=1) + "\n")
    report = json.loads(RESULT.read_text())
    picture(report)
    PAGE.write_text(page(report))
    return int(spread(report["rows"], LENGTHS) > 1e-4)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
