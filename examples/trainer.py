"""PreferenceTrainer with LoRA, on pairs from a file or from the hub.

    python examples/trainer.py --model Qwen/Qwen3-0.6B --dataset trl-lib/ultrafeedback_binarized
    accelerate launch examples/trainer.py --model Qwen/Qwen3-0.6B --dataset pairs.jsonl

The reference is the model with its adapter switched off, so the weights are in memory only once.
Two things differ from transformers' Trainer: the dataset, which has pairs in one of TRL's formats,
and the objective.
"""

from __future__ import annotations

import argparse

from peft import LoraConfig

from prefkern import PreferenceConfig, PreferenceTrainer
from prefkern.data import load_preference_dataset, show


def main(argv: list[str] | None = None) -> PreferenceTrainer:
    """Train, save, and return the trainer."""
    parser = argparse.ArgumentParser(description="Preference training with LoRA.")
    parser.add_argument("--model", required=True, help="folder or hub name")
    parser.add_argument("--dataset", required=True, help="file, folder or hub name")
    parser.add_argument("--split", default="train", help="or a slice: train[:1000]")
    parser.add_argument("--output_dir", default="trained")
    parser.add_argument("--max_steps", type=int, default=-1, help="-1: one epoch")
    args = parser.parse_args(argv)

    pairs = load_preference_dataset(args.dataset, args.split)
    parts = pairs.train_test_split(test_size=0.1, seed=0)
    trainer = PreferenceTrainer(
        args.model,
        PreferenceConfig(
            output_dir=args.output_dir,
            objective="adadpo",
            beta=0.1,
            learning_rate=1e-5,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,  # below 1, a share of all steps
            num_train_epochs=1,
            max_steps=args.max_steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=4,
            max_length=1024,
            eval_strategy="epoch",
            report_to="none",
        ),
        train_dataset=parts["train"],
        eval_dataset=parts["test"],
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )
    if trainer.is_world_process_zero():
        # The lengths of the pairs, and how many of them were cut.
        show(trainer.dataset_reports.values())
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
