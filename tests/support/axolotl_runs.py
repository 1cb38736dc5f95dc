"""Runs of `axolotl train` on a tiny model, and the same rows in PreferenceTrainer."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from axolotl.integrations.base import BasePlugin

from prefkern import PreferenceTrainer
from support import tiny
from support.processes import PYTHONPATH
from support.training import made, peft, trainer

PLUGIN = "prefkern.integrations.axolotl.PrefkernPlugin"
PAIRS, STEPS, RATE = 8, 3, 1e-3
_INITIAL = "initial.pt"


class KeepsInitialWeights(BasePlugin):
    """A plugin beside prefkern's: keeps the weights that are trained, as they are at first."""

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        trained = {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}
        Path(cfg.output_dir).mkdir(parents=True, exist_ok=True)
        torch.save(trained, Path(cfg.output_dir) / _INITIAL)


@dataclass(frozen=True)
class Case:
    """A step is always over all pairs, so that their order does not matter."""

    objective: str
    # Beside one batch of all pairs: how axolotl batches them.
    micro: int = PAIRS
    accumulated: int = 1
    lora: bool = False
    more: dict[str, Any] = field(default_factory=dict)


CASES = {
    "adadpo": Case("adadpo", micro=4, accumulated=2),
    # 3 + 3 + 2 pairs: a mean of the batches' means would be another number.
    "adadpo, uneven": Case("adadpo", micro=3, accumulated=3),
    "adadpo, lora": Case("adadpo", lora=True, more={"precompute_ref_log_probs": True}),
    "dpo, packed": Case("dpo", micro=4, accumulated=2, more={"dpo_padding_free": True}),
    "dpo, lora": Case("dpo", micro=2, accumulated=4, lora=True),
}


def recipe(folder: Path, case: Case) -> dict[str, Any]:
    """A YAML of axolotl, for a folder with `model` and `pairs.jsonl`."""
    adapter = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
    return {
        "base_model": str(folder / "model"),
        "rl": "dpo",
        "plugins": [PLUGIN, f"{__name__}.KeepsInitialWeights"],
        "prefkern": {"objective": case.objective, "beta": 0.1},
        "datasets": [
            {
                "path": str(folder / "pairs.jsonl"),
                "ds_type": "json",
                "type": "passthrough",
                "split": "train",
            }
        ],
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / "out"),
        "sequence_len": 64,
        "micro_batch_size": case.micro,
        "gradient_accumulation_steps": case.accumulated,
        "num_epochs": STEPS,
        "learning_rate": RATE,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "max_grad_norm": 1.0,
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "device": "cpu",
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "epoch",
        **({**adapter, "lora_target_modules": ["q_proj", "v_proj"]} if case.lora else {}),
        **case.more,
    }


def prepare(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tiny.model().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    made(tiny.pairs(PAIRS)).to_json(folder / "pairs.jsonl")


def train(folder: Path, recipe: dict[str, Any], *paths: Path) -> subprocess.CompletedProcess[str]:
    """`axolotl train`; `paths` go before all others that Python looks in."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [Path(sys.executable).parent / "axolotl", "train", folder / "recipe.yaml"]
    path = os.pathsep.join([*map(str, paths), PYTHONPATH])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    environment |= {"AXOLOTL_DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*map(str, command), "--launcher", "python"],
        env=environment,
        cwd=folder,
        check=False,
        capture_output=True,
        text=True,
        timeout=600,
    )


def logged(folder: Path) -> list[dict[str, float]]:
    """What axolotl's run logged at each step."""
    state = f"out/checkpoint-{STEPS}/trainer_state.json"
    history = transformers.TrainerState.load_from_json(str(folder / state)).log_history
    return [log for log in history if "loss" in log]


def ours(folder: Path, case: Case) -> PreferenceTrainer:
    """PreferenceTrainer from the same weights, in one batch of all pairs, trained."""
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    run = trainer(
        folder / "ours",
        model=transformers.AutoModelForCausalLM.from_pretrained(folder / "model"),
        train_dataset=made(tiny.pairs(PAIRS)),
        objective=case.objective,
        beta=0.1,
        peft_config=lora if case.lora else None,
        max_length=64,
        per_device_train_batch_size=PAIRS,
        num_train_epochs=STEPS,
        learning_rate=RATE,
        max_grad_norm=1.0,
    )
    initial = torch.load(folder / "out" / _INITIAL)
    trained = {n for n, p in run.model.named_parameters() if p.requires_grad}
    assert initial.keys() == trained
    run.model.load_state_dict(initial, strict=False)
    run.train()
    return run
