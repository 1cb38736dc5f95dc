"""Your own training loop with Accelerate: losses of the DPO family, no trainer, no logits.

    python examples/accelerate_loop.py --model Qwen/Qwen3-0.6B --dataset pairs.jsonl
    accelerate launch --num_processes 2 examples/accelerate_loop.py --model ... --dataset ...

The loss runs inside the wrapped model's forward (`prefkern.preference_outputs`), so that DDP reduces
gradients as usual. The loss of a step is the mean over all its pairs, in all accumulated batches
and on all ranks, also if batches have different sizes.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import prefkern
from prefkern.data import load_preference_dataset, show, tokenize_preferences
from prefkern.data.collate import PreferenceCollator
from prefkern.models.adapters import disable_dropout
from prefkern.models.calls import evaluation_mode
from prefkern.models.own_reference import adapter_in_use


def main(argv: list[str] | None = None) -> tuple[Any, list[float]]:
    """Train, save, and return the model and each step's loss."""
    parser = argparse.ArgumentParser(description="Preference training in a plain loop.")
    parser.add_argument("--model", required=True, help="folder or hub name")
    parser.add_argument("--dataset", required=True, help="file, folder or hub name")
    parser.add_argument("--objective", default="adadpo")
    parser.add_argument("--output_dir", default="trained")
    parser.add_argument("--max_steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4, help="pairs per forward")
    parser.add_argument("--accumulate", type=int, default=4, help="forwards per step")
    parser.add_argument("--learning_rate", type=float, default=1e-5)
    args = parser.parse_args(argv)

    # Accelerate does not accumulate here: it would take the mean of the batches' means.
    accelerator = Accelerator()
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with accelerator.main_process_first():
        pairs = load_preference_dataset(args.dataset)
        tokens, report = tokenize_preferences(pairs, tokenizer, max_length=1024)
    if accelerator.is_main_process:
        show([report])
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    loader = DataLoader(tokens, args.batch, shuffle=True, collate_fn=PreferenceCollator(pad))

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    # The trainer's default too: a log-ratio must compare two models, not two draws of dropout.
    disable_dropout(model)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=0.0)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    loss_fn = prefkern.FusedPreferenceLoss(prefkern.objectives.build(args.objective))
    loss_fn.to(accelerator.device)

    losses = []
    model.train()
    for batches in itertools.islice(steps(loader, args.accumulate), args.max_steps):
        # The pairs of all ranks. DDP takes the mean over ranks, hence `num_processes` below.
        count = torch.tensor(sum(len(batch["labels"]) // 2 for batch in batches))
        count = accelerator.reduce(count.to(accelerator.device), "sum")
        total = torch.zeros((), device=accelerator.device)
        for batch in batches:
            is_last = batch is batches[-1]
            # Ranks synchronise once per step, in its last batch.
            with nullcontext() if is_last else accelerator.no_sync(model):
                ref_logps = reference_logps(accelerator.unwrap_model(model), batch)
                out = prefkern.preference_outputs(model, batch, loss_fn, ref_logps=ref_logps)
                share = len(out.losses) / count
                accelerator.backward(out.loss * share * accelerator.num_processes)
            total += out.loss.detach() * share
        accelerator.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(total, "sum").item())
        accelerator.print(f"step {len(losses)}: loss {losses[-1]:.4f}")

    accelerator.unwrap_model(model).save_pretrained(
        args.output_dir, is_main_process=accelerator.is_main_process
    )
    return model, losses


def steps(loader: DataLoader, accumulate: int) -> Iterator[list[dict[str, Tensor]]]:
    """The batches of each optimiser step, without end; the last step of an epoch may have fewer."""
    while True:
        epoch = iter(loader)
        while batches := list(itertools.islice(epoch, accumulate)):
            yield batches


@torch.no_grad()
def reference_logps(model: Any, batch: dict[str, Tensor]) -> Tensor:  # (2B,)
    """Log-probs of the responses under the model without its adapter and without dropout."""
    # Unlike model.disable_adapter() and model.train(), these leave what was frozen frozen.
    with adapter_in_use(model, None), evaluation_mode(model):
        return prefkern.token_logprobs(model, **batch).sum(-1)


if __name__ == "__main__":
    main()
