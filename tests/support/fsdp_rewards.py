"""Reward models under FSDP2 on ranks, and on one process: what each run saw."""

from __future__ import annotations

import os
from pathlib import Path

import peft
from transformers import set_seed

from prefkern.cli import __main__ as cli
from prefkern.training import rewards
from support import tiny
from support.command_line import flags
from support.fsdp import record, run_cases
from support.training import step_logs
from support.versions import WHOLE_ADAPTERS

CASES = {
    "full": {},
    "lora": {},
    "lora, packed, shared, checkpointed": {
        "padding_free": True,
        "share_prompt": True,
        "gradient_checkpointing": True,
    },
    "lora, bf16": {"bf16": True},
}


def outcome_of(folder: Path, case: str, ranks: int) -> dict:
    """Rewards before training, each step's gradients, rewards and loss after it."""
    adapter = None
    if "lora" in case:
        if WHOLE_ADAPTERS.is_too_old:
            os.environ["FSDP_STATE_DICT_TYPE"] = "SHARDED_STATE_DICT"
        targets = ["q_proj", "v_proj", "up_proj"]
        adapter = peft.LoraConfig(r=4, task_type="SEQ_CLS", target_modules=targets)
    args = rewards.RewardConfig(
        str(folder / f"{case}, {ranks}"),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        optim="sgd",
        learning_rate=0.1,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        num_train_epochs=1,
        logging_steps=1,
        per_device_train_batch_size=4 // ranks,
        per_device_eval_batch_size=2,
        **{"gradient_checkpointing": False, **CASES[case]},
    )
    set_seed(0)
    model, tokenizer = rewards.new_reward_model(str(folder / "model"), adapter)
    if args.gradient_checkpointing:
        model.enable_input_require_grads()
    tokens, _ = rewards.tokenize_for_rewards(tiny.dataset(13), tokenizer, args)
    pad = rewards.set_pad_token(model, tokenizer, tokens, is_new=True)
    # 5 pairs leave the ranks an uneven last batch.
    parts = {"train_dataset": tokens.select(range(8)), "eval_dataset": tokens.select(range(8, 13))}
    run = rewards.RewardTrainer(model, args, tokenizer, pad, **parts)
    steps = record(run)
    before = run.rewards(tokens)
    run.train()
    return {
        "steps": steps,
        "rewards": [before, run.rewards(tokens)],
        "logs": [*step_logs(run), run.evaluate()],
    }


def command(folder: Path, name: str, **given) -> list[str]:
    """The arguments of `prefkern margins` that train a reward model, or read one."""
    options = {
        "model_name_or_path": folder / "model",
        "output_dir": folder / name,
        "optim": "sgd",
        "learning_rate": 0.1,
        "max_grad_norm": 0,
        "max_steps": 4,
        "eval_steps": 2,
        "lora_r": 0 if "full" in name else 4,
        "per_device_train_batch_size": 2,
    }
    if "again" in name:
        options = {"reward_model": folder / name.removesuffix(", again")}
    shared = {"dataset": folder / "pairs.jsonl", "use_cpu": True, "disable_tqdm": True}
    return flags({**options, **shared, "output": folder / f"{name}.jsonl", **given})


# Trained and scored with the best model; then scored with what was saved.
COMMANDS = ("margins full", "margins full, again", "margins lora", "margins lora, again")


def _outcome(folder: Path, case: str, ranks: int) -> dict | int:
    if case in COMMANDS:
        # As `accelerate launch` sets it.
        os.environ["FSDP_STATE_DICT_TYPE"] = "SHARDED_STATE_DICT"
        return cli.main(["margins", *command(folder, case)])
    return outcome_of(folder, case, ranks)


if __name__ == "__main__":
    run_cases(_outcome)
