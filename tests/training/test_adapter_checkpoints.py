"""Adapters on disk: with their own names, beside each other, and in a folder of another model."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from support import tiny

pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")

from prefkern.training import checkpoint_files
from prefkern.training.checkpoint_files import CheckpointError
from support.training import lora, trainer, weights

BEST_IS_EARLY = {
    "save_strategy": "steps",
    "save_steps": 1,
    "max_steps": 3,
    "count": 8,
    "learning_rate": 0.1,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": True,
}


def adapted(*names: str) -> peft.PeftModel:
    """A model with adapters on different layers, all active and trained."""
    torch.manual_seed(0)
    layers = (["q_proj"], ["v_proj"])
    configs = [peft.LoraConfig(r=4, target_modules=x, task_type="CAUSAL_LM") for x in layers]
    model = peft.get_peft_model(tiny.model(), configs[0], adapter_name=names[0])
    for name, config in zip(names[1:], configs[1:], strict=False):
        model.add_adapter(name, config)
    model.base_model.set_adapter(list(names))
    return model


def adapters(model) -> dict[str, torch.Tensor]:
    return {name: value for name, value in weights(model).items() if "lora_" in name}


@pytest.mark.parametrize(
    "names",
    [("default",), ("policy",), ("a", "b"), ("default", "b"), ("b", "default")],
    ids="+".join,
)
@pytest.mark.long(names=[("a", "b"), ("default", "b")])
def test_the_best_model_is_loaded_whatever_its_adapters_are_called(tmp_path, names):
    run = trainer(tmp_path, model=adapted(*names), eval_dataset=tiny.dataset(6, 3), **BEST_IS_EARLY)
    at_step = {}
    run.add_callback(_Keep(at_step))
    run.train()
    best = run.state.best_global_step
    assert best != run.state.global_step and run.state.best_model_checkpoint is not None
    assert at_step[best].keys() == adapters(run.model).keys()
    for name, value in adapters(run.model).items():
        assert torch.equal(value, at_step[best][name]), name
        assert not torch.equal(value, at_step[run.state.global_step][name]), name
    trained = {name for name, p in run.model.named_parameters() if p.requires_grad}
    assert trained == adapters(run.model).keys()
    assert run.evaluate()["eval_loss"] == pytest.approx(run.state.best_metric, abs=1e-6)


class _Keep(transformers.TrainerCallback):
    def __init__(self, kept: dict) -> None:
        self.kept = kept

    def on_step_end(self, args, state, control, model=None, **_):
        self.kept[state.global_step] = adapters(model)


def test_a_best_checkpoint_of_another_adapter_is_refused(tmp_path):
    run = trainer(
        tmp_path, model=adapted("a", "b"), eval_dataset=tiny.dataset(6, 3), **BEST_IS_EARLY
    )
    run.train()
    best = Path(run.state.best_model_checkpoint)
    shutil.rmtree(best / "b")
    shutil.copytree(best / "a", best / "b")
    with pytest.raises(CheckpointError, match="another adapter than 'b' of this model"):
        run._load_best_model()
    shutil.rmtree(best)
    with pytest.raises(CheckpointError, match="the best checkpoint, is gone"):
        run._load_best_model()


def test_a_damaged_adapter_is_named_whatever_it_is_called(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "count": 4}
    trainer(tmp_path, model=adapted("policy"), **options).train()
    checkpoint = tmp_path / "checkpoint-1"
    assert checkpoint_files.problem(checkpoint) is None
    file = checkpoint / "policy" / "adapter_model.safetensors"
    whole = file.read_bytes()
    os.truncate(file, len(whole) // 2)
    with pytest.raises(CheckpointError, match="policy/adapter_model.safetensors is damaged"):
        checkpoint_files.require_complete(checkpoint)
    file.unlink()
    with pytest.raises(CheckpointError, match="policy is incomplete: it has no adapter_model.safe"):
        checkpoint_files.require_complete(checkpoint)
    file.write_bytes(whole)
    # Its folder is not taken for a sharded optimiser's.
    (checkpoint / "optimizer.pt").unlink()
    with pytest.raises(CheckpointError, match="it has no optimizer.pt"):
        checkpoint_files.require_complete(checkpoint)


# What is saved into a folder that holds something


def test_a_whole_model_replaces_an_adapter(tmp_path, caplog):
    tiny.model().save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    out = tmp_path / "out"
    first = trainer(out, model=base, peft_config=lora(), max_steps=2, learning_rate=0.1)
    first.train()
    first.save_model()
    (out / "notes.txt").write_text("somebody's")
    second = trainer(out, model=tiny.model(), max_steps=2)
    second.train()
    with caplog.at_level(logging.WARNING):
        second.save_model()
    assert f"{out} held an adapter, which would be loaded: it is deleted" in caplog.text
    assert not [*out.glob("adapter_*")] and (out / "notes.txt").exists()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(weights(loaded), weights(second.model), rtol=0, atol=0)
    caplog.clear()
    second.save_model()
    assert not caplog.text


def test_an_adapter_is_not_loaded_over_an_earlier_model(tmp_path, caplog):
    """transformers would take a model in the adapter's folder for its base."""
    tiny.model().save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    out = tmp_path / "out"
    tiny.model(seed=5).save_pretrained(out)
    run = trainer(out, model=base, peft_config=lora(), max_steps=2, learning_rate=0.1)
    run.train()
    run.save_model()
    assert "its config.json is renamed to config.json.earlier" in caplog.text
    assert_loads_as(out, run.model)
    earlier = weights(tiny.model(seed=5))
    (out / "adapter_config.json").unlink()
    (out / "config.json.earlier").rename(out / "config.json")
    kept = transformers.AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(weights(kept), earlier, rtol=0, atol=0)


def test_an_adapter_beside_its_own_base_leaves_it_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.model().save_pretrained("base")
    base = transformers.AutoModelForCausalLM.from_pretrained("base")
    run = trainer(tmp_path / "base", model=base, peft_config=lora(), max_steps=2, learning_rate=0.1)
    run.train()
    run.save_model()
    assert_loads_as(tmp_path / "base", run.model)
    assert (tmp_path / "base" / "config.json").exists()


def assert_loads_as(folder: Path, model) -> None:
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits)


def test_an_adapter_of_a_name_replaces_one_without(tmp_path):
    run = trainer(tmp_path, model=adapted("default"))
    run.save_model()
    named = trainer(tmp_path, model=adapted("policy"))
    named.save_model()
    assert not [*tmp_path.glob("adapter_*")]
    assert (tmp_path / "policy" / "adapter_config.json").exists()
    run.save_model()
    both = trainer(tmp_path, model=adapted("default", "policy"))
    both.save_model()
    assert (tmp_path / "adapter_config.json").exists()
    assert (tmp_path / "policy" / "adapter_model.safetensors").exists()
