"""Runs under transformers' tensor parallelism, started by torchrun; each rank saves what it saw.

All ranks have the same batch: one process gets the same pairs in batches of the same size.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import zlib
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch.distributed.tensor import distribute_tensor

from prefkern.cli import __main__ as cli
from support import tiny
from support.command_line import flags
from support.ddp import torchrun
from support.family_table import DEEPSEEK, EXPERTS
from support.fsdp import SUMS, TDPO, carried, lora, record, taken_for_gpus, weights_and_gradients
from support.training import made, single_rows, step_logs, trainer

# Plans of the head. Without a rule each rank has all of it.
WHOLE_HEAD = {"lm_head": "replicate"}
EVAL_ROWS = {"eval_dataset": made(single_rows(6)), "per_device_eval_batch_size": 3}
EVAL = {"eval_dataset": tiny.dataset(5, seed=3), "per_device_eval_batch_size": 2}


def save_models(folder: Path) -> None:
    """The models of all cases, and the pairs of commands."""
    for name, options in {
        "model": {},
        "other": {"seed": 1},
        "tied": {"tie_word_embeddings": True},
        "norms": {"family": "Qwen3"},
        "norms2": {"family": "Qwen3", "seed": 1},
        # Experts as one weight, of which each rank has a part; q, k and v as one weight, whose outputs
        # are gathered; latent attention, which is whole; a softcap of logits on a tied head.
        "experts": {"family": "Mixtral", "num_local_experts": 4},
        "many experts": {"family": "Qwen3Moe", **EXPERTS, "num_experts": 4},
        "packed": {"family": "Phi3"},
        "latent": {"family": "DeepseekV3", **DEEPSEEK},
        "capped": {"family": "Gemma2", "final_logit_softcapping": 3.0},
        # Four ranks have a head of attention each.
        "four heads": {"num_key_value_heads": 4},
    }.items():
        tiny.model(**options).save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    made(tiny.pairs(8)).to_json(folder / "pairs.jsonl")


# Each batch of 4 pairs is one batch of all ranks: they do not take turns.
LAST = {"dataloader_drop_last": True, "num_train_epochs": 2}
# The layers' columns are split, or their rows.
SPLIT = ["q_proj", "v_proj", "up_proj", "o_proj", "down_proj"]
# Latent attention has others, which are whole on each rank.
ATTENTION = ["q_proj", "v_proj", "o_proj", "q_a_proj", "q_b_proj", "kv_b_proj"]
# Beside these options each run has 8 pairs and a batch of 4. The models are folders of `save_models`;
# "plan" overrides rules of how they are split, and "adapter" is LoRA with given values.
CASES: dict[str, Any] = {
    "full, none": lambda: {"objective": "simpo"},
    "full, carried": lambda: {"train_dataset": carried()},
    "full, precomputed": lambda: {**SUMS, **EVAL, "precompute_ref_batch_size": 4},
    "full, precomputed, bf16": lambda: {**SUMS, "bf16": True},
    "full, reference, evaluated first": lambda: {"ref_model": "other", **EVAL, "first": True},
    "full, copy, bf16": lambda: {"named": True, "bf16": True},
    "full, copy, tied head": lambda: {"named": True, "model": "tied"},
    "full, reference, whole head": lambda: {"ref_model": "other", "plan": WHOLE_HEAD},
    "full, whole norms": lambda: {"ref_model": "norms2", "model": "norms"},
    "lora, none": lambda: {"objective": "simpo", "adapter": "new"},
    "lora, carried": lambda: {"train_dataset": carried(), "adapter": "new"},
    "lora, adapter off": lambda: {"adapter": "new", **EVAL, "first": True},
    "lora, adapter off, bf16": lambda: {"adapter": "new", "bf16": True},
    "lora, tied head": lambda: {"adapter": "new", "model": "tied"},
    "lora, precomputed": lambda: {**SUMS, "adapter": "new"},
    "lora, reference": lambda: {"ref_model": "other", "adapter": "new"},
    "trained adapter": lambda: {"adapter": "trained"},
    "trained adapter, precomputed, bf16": lambda: {**SUMS, "adapter": "trained", "bf16": True},
    "tdpo, adapter off": lambda: {**TDPO, "adapter": "new"},
    "tdpo, reference": lambda: {**TDPO, "ref_model": "other"},
    "kto": lambda: {
        "objective": "kto",
        "model": "other",
        "ref_model": "model",
        "train_dataset": made(single_rows(8)),
        **EVAL_ROWS,
    },
    "statistics": lambda: {
        "objective": "alphadpo",
        "objective_options": {"alpha": 0.5},
        "ref_model": "other",
        "learning_rate": 0.01,
    },
    "draws": lambda: {
        "objective": "betadpo",
        "objective_options": {"keep": 0.5},
        "ref_model": "other",
    },
    "draws, whole head": lambda: {
        "objective": "betadpo",
        "objective_options": {"keep": 0.5},
        "ref_model": "other",
        "plan": WHOLE_HEAD,
    },
    "gold rows": lambda: {
        "objective": "dpo+tpo",
        "ref_model": "other",
        "train_dataset": tiny.triple_dataset(8),
    },
    "gold rows, shared prompts": lambda: {
        "objective": "tpo",
        "train_dataset": tiny.triple_dataset(8),
        "padding_free": True,
        "share_prompt": True,
        "eval_dataset": tiny.triple_dataset(5, seed=3),
        "per_device_eval_batch_size": 2,
    },
    "lora, checkpointed, packed, accumulated, clipped": lambda: {
        "adapter": "new",
        "gradient_checkpointing": True,
        "padding_free": True,
        "accumulated": 2,
        "max_grad_norm": 0.05,
    },
    "full, checkpointed, shared prompts, by tokens, clipped": lambda: {
        "named": True,
        "gradient_checkpointing": True,
        "padding_free": True,
        "share_prompt": True,
        "max_tokens_per_batch": 60,
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "max_grad_norm": 0.05,
        **SUMS,
        **EVAL,
        "per_device_eval_batch_size": 8,
    },
    "full, experts": lambda: {"model": "experts", "named": True, "router_aux_loss_coef": 0.0},
    "full, many experts, balanced": lambda: {
        "objective": "simpo",
        "model": "many experts",
        "router_aux_loss_coef": 0.5,
    },
    "lora beside experts": lambda: {"model": "many experts", "adapter": "of attention"},
    "full, packed projections": lambda: {"model": "packed", "named": True},
    "full, latent attention": lambda: {"model": "latent", "named": True},
    "lora on latent attention": lambda: {"model": "latent", "adapter": "of attention"},
    "full, softcap": lambda: {"model": "capped", "named": True},
    "lora, softcap": lambda: {"model": "capped", "adapter": "new"},
    "adamw, uneven last batches": lambda: {
        "ref_model": "other",
        "optim": "adamw_torch",
        "count": 7,
        "learning_rate": 1e-3,
        **LAST,
    },
}


def adapted(model: Any, kind: str) -> Any:
    """A model with LoRA, whose values do not depend on how the model is split."""
    targets = ATTENTION if kind == "of attention" else SPLIT
    made = peft.get_peft_model(model, lora(target_modules=targets))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if not parameter.requires_grad:
                continue
            draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            whole = 0.2 * torch.randn(parameter.shape, generator=draw)
            whole *= kind == "trained" or "lora_A" in name
            if hasattr(parameter, "device_mesh"):
                place = (parameter.device_mesh, parameter.placements)
                whole = distribute_tensor(whole, *place, src_data_rank=None)
            parameter.copy_(whole)
    return made


def loaded(folder: Path, name: str, ranks: int, plan: Any) -> Any:
    from transformers.distributed import DistributedConfig

    options = {}
    if ranks > 1:
        options["distributed_config"] = DistributedConfig(tp_size=ranks, tp_plan=plan)
    return transformers.AutoModelForCausalLM.from_pretrained(folder / name, **options)


def ranks_of_launch() -> int:
    return int(os.environ["WORLD_SIZE"])


def run_of(path: Path, models: Path, options: dict[str, Any], ranks: int) -> Any:
    """A trainer with these options of a case; `models` is the folder of `save_models`."""
    options = dict(options)
    plan, is_named = options.pop("plan", None), options.pop("named", False)
    name = options.pop("model", "model")
    if is_named:
        options["model"] = str(models / name)
        if ranks > 1:
            options["model_init_kwargs"] = {"distributed_config": {"tp_size": ranks}}
    else:
        options["model"] = loaded(models, name, ranks, plan)
    if isinstance(options.get("ref_model"), str):
        options["ref_model"] = loaded(models, options["ref_model"], ranks, plan)
    options.pop("first", None)
    if "adapter" in options:
        options["model"] = adapted(options["model"], options.pop("adapter"))
    accumulated = options.pop("accumulated", 1)
    options = {
        "count": 8,
        "optim": "sgd",
        # Large enough for the second step's gradients to depend on the first's.
        "learning_rate": 0.1,
        "max_grad_norm": 0.0,
        "gradient_accumulation_steps": accumulated,
        **options,
    }
    if "max_tokens_per_batch" not in options:
        options.setdefault("per_device_train_batch_size", 4 // accumulated)
    return trainer(path, **options)


def outcome_of(path: Path, models: Path, case: str, ranks: int) -> dict:
    options = {**CASES, **FOUR}[case]()
    is_evaluated_first = options.get("first", False)
    run = run_of(path, models, options, ranks)
    steps = record(run)
    first = [run.evaluate()] if is_evaluated_first else []
    run.train()
    assert run.args.world_size == ranks
    evaluated = [run.evaluate()] if "eval_dataset" in options else []
    return {"steps": steps, "logs": [*step_logs(run), *evaluated, *first]}


SAVED = {
    "full": lambda: {"ref_model": "other"},
    "full, tied head": lambda: {"ref_model": "other", "model": "tied"},
    "lora": lambda: {"adapter": "new"},
    "trained adapter": lambda: {"adapter": "trained"},
}


def _saved(path: Path, models: Path) -> dict:
    """Runs that save after each step and at the end, and why they do not go on from there."""
    found = {}
    for case, given in SAVED.items():
        folder = path.parent / f"saved, {case}"
        saves = {"save_strategy": "steps", "save_steps": 1, "save_only_model": True}
        run = run_of(folder, models, given() | saves, ranks_of_launch())
        run.train()
        run.save_model(str(folder / "model"))
        with pytest.raises(ValueError) as raised:
            run.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
        weights = weights_and_gradients(run.model)["weights"]
        found[case] = {"weights": weights, "said": str(raised.value)}
    return found


COMMANDS = {"full": {"ref_cache_dir": ""}, "lora": {"lora_r": 4}}


def _commands(path: Path, models: Path) -> dict:
    """`prefkern train` as `accelerate launch` sets it up, and with a keyword of the model's."""
    found = {}
    launched = {
        "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
        "PARALLELISM_CONFIG_TP_SIZE": str(ranks_of_launch()),
    }
    keyword = json.dumps({"distributed_config": {"tp_size": ranks_of_launch()}})
    for name, environment, given in (
        ("full", launched, {}),
        ("lora", {}, {"model_init_kwargs": keyword}),
    ):
        out = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
            for key, value in environment.items():
                patch.setenv(key, value)
            status = cli.main(["train", *command(models, name, **given)])
        found[name] = (status, out.getvalue())
    return found


def command(folder: Path, name: str, **given: Any) -> list[str]:
    return flags(
        {
            "model_name_or_path": folder / "model",
            "dataset": folder / "pairs.jsonl",
            "output_dir": folder / name,
            "objective": "dpo",
            "use_cpu": True,
            "max_steps": 2,
            "logging_steps": 1,
            "save_only_model": True,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.1,
            "optim": "sgd",
            "report_to": "none",
            **({"precompute_ref_log_probs": True} if name == "full" else {}),
            **COMMANDS[name],
            **given,
        }
    )


def _new_adapter(path: Path, models: Path) -> dict:
    """The first factors of an adapter that the trainer makes, whole."""
    run = run_of(path, models, {"peft_config": lora(target_modules=SPLIT)}, ranks_of_launch())
    weights = weights_and_gradients(run.model)["weights"]
    return {name: value for name, value in weights.items() if "lora_A" in name}


def _refused(path: Path, models: Path) -> dict[str, str]:
    """What is said of runs that tensor parallelism cannot do."""
    said = {}
    for name, options in REFUSED.items():
        with pytest.raises(ValueError) as raised:
            run_of(path, models, {"objective": "simpo", **options()}, ranks_of_launch())
        said[name] = str(raised.value)
    return said


def through_trl(path: Path, models: Path, ranks: int) -> dict[str, list[dict]]:
    """The logs of prefkern's trainers on TRL's: pairs, and pairs with a gold row."""
    from trl import DPOConfig
    from trl.experimental.tpo import TPOConfig

    from prefkern.integrations.trl import DPOTrainer, TPOTrainer

    found = {}
    for name, make, configure, rows, options in (
        # Draws from the pairs of a batch, which is one of all ranks.
        ("dpo", DPOTrainer, DPOConfig, tiny.dataset(8), CASES["draws, whole head"]()),
        ("tpo", TPOTrainer, TPOConfig, tiny.triple_dataset(8), {}),
    ):
        plan = options.pop("plan", None)
        if "ref_model" in options:
            options["ref_model"] = loaded(models, options["ref_model"], ranks, plan)
        args = configure(
            str(path / name), max_steps=2, logging_steps=1, report_to="none", use_cpu=True,
            per_device_train_batch_size=4, learning_rate=0.1, optim="sgd", bf16=False,
            gradient_checkpointing=False, save_strategy="no", max_grad_norm=0.0,
        )  # fmt: skip
        run = make(
            loaded(models, "model", ranks, plan),
            args=args,
            train_dataset=rows,
            processing_class=tiny.tokenizer(),
            **options,
        )
        run.train()
        found[name] = step_logs(run)
    return found


# Of models that are loaded already.
REFUSED: dict[str, Any] = {
    "a copy": lambda: {"objective": "dpo"},
    "a whole reference": lambda: {"objective": "dpo", "ref_model": tiny.model(seed=1)},
    "the head": lambda: {"peft_config": lora(target_modules=["q_proj", "lm_head"])},
    "summed gradients": lambda: {"model": "norms", "accumulated": 2},
    "experts": lambda: {
        "model": "many experts",
        "peft_config": lora(target_modules=["gate_proj", "up_proj", "down_proj"]),
    },
    "packed projections": lambda: {
        "model": "packed",
        "peft_config": lora(target_modules=["o_proj"]),
    },
}


def _heads(path: Path, models: Path) -> str:
    """What is said of a model whose heads do not divide among the ranks."""
    with pytest.raises(ValueError) as raised:
        run_of(path, models, {"objective": "simpo"}, ranks_of_launch())
    return str(raised.value)


OTHERS = {
    "saved": _saved,
    "commands": _commands,
    "new adapter": _new_adapter,
    "refused": _refused,
}
# On four ranks; as cases, which one process has too.
FOUR = {
    "full, four ranks": lambda: {"objective": "simpo", "model": "four heads"},
    "lora, four ranks": lambda: {"model": "four heads", "adapter": "new"},
}
OF_FOUR = (*FOUR, "heads")
# With TRL, which the others do without.
ON_TRL = {"trl": lambda path, models: through_trl(path, models, ranks_of_launch())}


def launch(folder: Path, *names: str, count: int = 2, **settings: str) -> None:
    torchrun("support.tensor_parallel", str(folder), *names, count=count, **settings)


if __name__ == "__main__":
    torch.set_num_threads(1)
    taken_for_gpus()
    folder = Path(sys.argv[1])
    outcomes = {}
    for case in sys.argv[2:]:
        others = {**OTHERS, **ON_TRL, "heads": _heads}
        if case in others:
            outcomes[case] = others[case](folder / case, folder)
        else:
            outcomes[case] = outcome_of(folder / case, folder, case, ranks_of_launch())
    torch.save(outcomes, folder / f"rank{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()
