"""A trained adapter that is given has its state before training as the reference."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from prefkern.models.adapters import BASE
from prefkern.training import trainer as module_of_trainer
from support import tiny

pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")

from support.adapters import ADAPTERS, lora, trained
from support.reference_sums import sums
from support.training import single_rows, step_logs, trainer
from support.versions import ADAPTERS_LOADED_BESIDE

LN2 = math.log(2)
COPIED = "the reference is a frozen copy of the adapter"
IDS = torch.tensor([[5, 6, 7, 8, 9]])


def batch_of(run) -> dict:
    return run._prepare_inputs(next(iter(run.get_train_dataloader())))


def folders_of_adapters(folder) -> set:
    return {path.parent for path in folder.rglob("adapter_*")}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_first_loss_is_ln_2_and_the_reference_does_not_move(tmp_path, caplog, kind):
    config, base = ADAPTERS[kind]
    model = trained(config(), base())
    run = trainer(tmp_path, model=model, objective="dpo", max_steps=3)
    assert COPIED in caplog.text
    batch = batch_of(run)
    before = run._sums(model.eval(), batch)
    assert torch.equal(run._reference_logps(batch), before)
    run.train()
    losses = [log["loss"] for log in step_logs(run)]
    assert losses[0] == pytest.approx(LN2, abs=1e-6) and len(losses) == 3
    assert torch.equal(run._reference_logps(batch), before)
    assert (run._sums(model.eval(), batch) - before).abs().max() > 1e-4

    run.save_model(str(tmp_path / "saved"))
    assert folders_of_adapters(tmp_path / "saved") == {tmp_path / "saved"}
    again = peft.PeftModel.from_pretrained(base(), str(tmp_path / "saved")).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, model.eval()(IDS).logits)


def test_whatever_it_is_called(tmp_path):
    model = trained(name="sft")
    run = trainer(
        tmp_path, model=model, objective="dpo", max_steps=2, save_strategy="steps", save_steps=2
    )
    run.train()
    assert step_logs(run)[0]["loss"] == pytest.approx(LN2, abs=1e-6)
    run.save_model(str(tmp_path / "saved"))
    assert folders_of_adapters(tmp_path) == {
        tmp_path / "saved" / "sft", tmp_path / "checkpoint-2" / "sft",
    }  # fmt: skip
    assert [*model.peft_config] == ["sft"]


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "tdpo1"},
        {"objective": "dpo", "padding_free": True},
        {"objective": "dpo", "precompute_ref_log_probs": True},
        {"objective": "dpo", "bf16_full_eval": True},
        {"objective": "kto", "train_dataset": datasets.Dataset.from_list(single_rows(8))},
    ],
    ids=lambda options: "+".join(map(str, options.values()))[:24],
)
def test_in_every_kind_of_run_the_policy_is_its_reference_at_first(tmp_path, options):
    options = {"train_dataset": tiny.dataset(8), **options}
    evaluated = options["train_dataset"]
    run = trainer(tmp_path, model=trained(), max_steps=2, eval_dataset=evaluated, **options)
    metrics = run.evaluate()
    wanted = 0.5 if options["objective"] == "kto" else LN2
    assert metrics["eval_loss"] == pytest.approx(wanted, abs=1e-6)
    if not options.get("bf16_full_eval"):  # which casts the model for good
        run.train()
        assert step_logs(run)[0]["loss"] == pytest.approx(wanted, abs=1e-6)
        # Rows that were not there before training have the same reference.
        later = run.evaluate(evaluated.select(range(4)))
        assert later["eval_loss"] < wanted - 1e-4


@pytest.mark.parametrize("name", [BASE, "frozen"])
def test_another_reference_is_asked_for_by_name(tmp_path, caplog, name):
    model = trained()
    model.load_adapter(_saved(tmp_path / "frozen", trained(seed=3)), "frozen")
    if ADAPTERS_LOADED_BESIDE.is_too_old:
        run = trainer(tmp_path, model=model, objective="dpo", ref_adapter_name=name, max_steps=1)
        with pytest.raises(ValueError, match=r"adapter is frozen.*set_adapter\('default'\)"):
            run.train()
        model.set_adapter("default")
        caplog.clear()
    run = trainer(tmp_path, model=model, objective="dpo", ref_adapter_name=name, max_steps=1)
    assert COPIED not in caplog.text
    other = tiny.model() if name == BASE else trained(seed=3)
    batch = batch_of(run)
    torch.testing.assert_close(run._reference_logps(batch), run._sums(other, batch))
    run.train()
    assert abs(step_logs(run)[0]["loss"] - LN2) > 1e-3


def test_a_fresh_adapter_needs_no_copy(tmp_path, caplog):
    model = peft.get_peft_model(tiny.model(), lora())
    run = trainer(tmp_path, model=model, objective="dpo", max_steps=1)
    run.train()
    assert COPIED not in caplog.text and run._initial_adapter is None
    assert step_logs(run)[0]["loss"] == pytest.approx(LN2, abs=1e-6)
    # An objective without a reference makes none either.
    assert trainer(tmp_path, model=trained(), objective="simpo")._initial_adapter is None


def test_the_base_by_name_needs_an_adapter(tmp_path):
    with pytest.raises(ValueError, match=r"ref_adapter_name is '__base__', but the model is a Lla"):
        trainer(tmp_path, ref_adapter_name=BASE, objective="dpo")
    message = r"must be an adapter of the model \('default'\), or '__base__' for the model without"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, model=trained(), ref_adapter_name="base", objective="dpo")


def _saved(folder, model) -> str:
    model.save_pretrained(folder)
    return str(folder)


def test_sums_on_disk_are_of_one_initial_adapter(tmp_path):
    options = {"objective": "dpo", "precompute_ref_log_probs": True}
    runs = [trainer(tmp_path, model=trained(seed=seed), **options) for seed in (0, 1, 0)]
    first, second, third = (sums(run.train_dataset) for run in runs)
    assert torch.equal(first, third) and (first - second).abs().max() > 1e-2
    assert len([*(tmp_path / "reference-sums").iterdir()]) == 2
    based = trainer(tmp_path, model=trained(), ref_adapter_name=BASE, **options)
    assert len([*(tmp_path / "reference-sums").iterdir()]) == 3
    assert (sums(based.train_dataset) - first).abs().max() > 1e-2


CHECKPOINTS = {"objective": "dpo", "save_strategy": "steps", "save_steps": 1, "max_steps": 2}


def test_a_run_resumed_with_another_reference_is_noticed(tmp_path, caplog):
    trainer(tmp_path, model=trained(), **CHECKPOINTS).train()
    checkpoint = str(tmp_path / "checkpoint-1")
    other = "was trained with another reference"

    def resumed(model, **options) -> str:
        caplog.clear()
        run = trainer(tmp_path / "resumed", model=model, **CHECKPOINTS, **options)
        run.train(resume_from_checkpoint=checkpoint)
        return caplog.text

    assert other not in resumed(trained())
    # The checkpoint's own adapter in place of the one that the run began with.
    own = peft.PeftModel.from_pretrained(tiny.model(), checkpoint, is_trainable=True)
    assert other in resumed(own)
    text = resumed(tiny.model(), peft_config=lora())
    assert other in text and "weights of its own, and is the base model, without an adapter" in text
    trainer(tmp_path / "fresh", model=tiny.model(), peft_config=lora(), **CHECKPOINTS).train()
    checkpoint = str(tmp_path / "fresh" / "checkpoint-1")
    assert other not in resumed(tiny.model(), peft_config=lora())
    own = peft.PeftModel.from_pretrained(tiny.model(), checkpoint, is_trainable=True)
    assert "without an adapter, and is weights of its own now" in resumed(own)


def test_what_cannot_have_a_copy_as_reference_says_what_to_do(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.ERROR)
    model = trained(lora(target_modules=["lm_head", "q_proj"]))
    message = r"copy of the adapter that was given: merge it .*ref_adapter_name='__base__'"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, model=model, objective="tdpo1")
    run = trainer(tmp_path, model=trained(), objective="dpo")
    run.is_fsdp_enabled = True
    run._refuse_unsupported_setups()
    given = {"objective": "dpo", "precompute_ref_log_probs": True}
    computed = trainer(tmp_path, model=trained(), **given)
    carrying = {"objective": "dpo", "train_dataset": computed.train_dataset}
    carried = trainer(tmp_path, model=trained(), **carrying)
    # DeepSpeed need not be there: nothing is loaded from here on.
    monkeypatch.setattr(module_of_trainer, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="yet under ZeRO-3: set precompute_ref_log_probs, or"):
        run._refuse_unsupported_setups()
    for each in (computed, carried):
        each._refuse_unsupported_setups()
