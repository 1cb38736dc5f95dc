"""Models that take images, trained on pairs of text."""

from __future__ import annotations

import math
from pathlib import Path

import peft
import pytest
import torch

import prefkern
from prefkern import PreferenceTrainer
from support import family_table, tiny
from support.family_table import VISION, Family
from support.training import first_dpo_loss, step_logs, trainer, weights


@pytest.mark.parametrize("family", VISION, ids=str)
def test_a_step_on_text_is_that_of_the_models_own_logits(tmp_path: Path, family: Family) -> None:
    model = family_table.build(family)
    # In training, where Gemma 3 was once particular about what it was given.
    run = trainer(tmp_path, model=model.train(), objective="dpo", beta=0.1)
    batch = next(iter(run.get_train_dataloader()))
    loss = run.compute_loss(model, batch)
    loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected, _ = first_dpo_loss(model, batch)
    expected.backward()
    theirs = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert ours.keys() == theirs.keys()
    assert any("language_model" in name or "text_model" in name for name in theirs)
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, atol=2e-6, rtol=2e-4)
    assert prefkern.last_plan().backend == "torch"


@pytest.mark.parametrize("name", ["Qwen2_5_VL", "Gemma3"])
def test_it_is_loaded_by_name_and_trained(tmp_path: Path, name: str) -> None:
    family = next(each for each in VISION if each.name == name)
    model = family_table.build(family)
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    options = {"gradient_checkpointing": True, "num_train_epochs": 4}
    args = trainer(tmp_path, objective="dpo", **options).args
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    run = PreferenceTrainer(str(tmp_path / "model"), args, tiny.dataset(4), peft_config=adapter)
    assert type(run.model.get_base_model()) is type(model)
    before = weights(run.model)
    run.train()
    assert step_logs(run)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert step_logs(run)[-1]["loss"] < math.log(2)
    changed = [n for n, w in weights(run.model).items() if not torch.equal(w, before[n])]
    assert changed and all("lora" in each for each in changed)
