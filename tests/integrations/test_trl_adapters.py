"""TRL's trainer with prefkern: a trained adapter that is given is its own reference, of any kind.

Adapters that would change the reference are refused.
"""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("trl")
peft = pytest.importorskip("peft")

import twins
from support import tiny
from support.adapters import ADAPTERS, lora, trained
from support.trl_runs import build

RUN = {"objective": "dpo", "max_steps": 3, "router_aux_loss_coef": 0.0}


def losses(run) -> list[float]:
    return [log["loss"] for log in run.state.log_history if "loss" in log]


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_first_loss_is_ln_2_and_only_the_adapter_is_saved(tmp_path, kind):
    config, base = ADAPTERS[kind]
    model = trained(config(), base())
    run = build(tmp_path, model=model, **RUN)
    batch = run._prepare_inputs(next(iter(run.get_train_dataloader())))
    before = run.compute_ref_log_probs(model, batch)
    run.train()
    assert losses(run)[0] == pytest.approx(math.log(2), abs=1e-6) and len(losses(run)) == 3
    for sums, earlier in zip(run.compute_ref_log_probs(model, batch), before, strict=True):
        assert torch.equal(sums, earlier)
    run.save_model(str(tmp_path / "saved"))
    assert {path.parent for path in (tmp_path / "saved").rglob("adapter_*")} == {tmp_path / "saved"}


@pytest.mark.parametrize("precompute", [False, True])
def test_whatever_it_is_called_and_however_it_was_made(tmp_path, precompute):
    """TRL reads the adapter "default", and would add a copy of PiSSA to a base that it changes."""
    for config, name in ((lora(), "sft"), (lora(init_lora_weights="pissa"), "default")):
        model = trained(config, name=name)
        run = build(tmp_path, model=model, precompute_ref_log_probs=precompute, **RUN)
        run.train()
        assert losses(run)[0] == pytest.approx(math.log(2), abs=1e-6)
        assert [*model.peft_config] == [name]


def test_an_adapter_called_ref_is_the_reference(tmp_path):
    trained(seed=3).save_pretrained(tmp_path / "other")
    model = trained()
    model.load_adapter(tmp_path / "other", "ref")
    run = build(tmp_path, model=model, **RUN)
    batch = run._prepare_inputs(next(iter(run.get_train_dataloader())))
    expected = build(tmp_path, model=trained(seed=3), **RUN).compute_ref_log_probs
    for sums, wanted in zip(
        run.compute_ref_log_probs(model, batch), expected(trained(seed=3), batch), strict=True
    ):
        torch.testing.assert_close(sums, wanted)


def test_a_resumed_run_has_its_adapter_beside_the_reference(tmp_path):
    """transformers before 5.23 loads "ref" alone, and would train on the adapter as it was given."""
    trained(seed=3).save_pretrained(tmp_path / "other")
    ends = []
    for given in (None, str(tmp_path / "checkpoint-2")):
        model = trained()
        model.load_adapter(tmp_path / "other", "ref")
        # PEFT before 0.21 has frozen it.
        model.set_adapter("default")
        run = build(tmp_path, model=model, save_strategy="steps", save_steps=2, **RUN)
        run.train(resume_from_checkpoint=given)
        ends.append(losses(run)[-1])
    assert ends[0] == ends[1]


def test_where_weights_are_sharded_it_is_trls_second_adapter(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("prefkern.integrations.trl.dpo.is_fsdp_enabled", lambda: True)
    model = trained()
    before = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    run = build(tmp_path, model=model, **RUN)
    run.train()
    assert [*model.peft_config] == ["default", "ref"] and "frozen copy" not in caplog.text
    assert losses(run)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == before
    monkeypatch.undo()
    build(tmp_path, model=trained(), **RUN)
    assert "the reference is a frozen copy of the adapter that was given" in caplog.text


def test_checkpointed_blocks_stay_checkpointed(tmp_path):
    """TRL would checkpoint every block after a reference pass."""
    run = build(tmp_path, peft_config=lora(), **RUN, gradient_checkpointing=True)
    batch = run._prepare_inputs(next(iter(run.get_train_dataloader())))
    blocks = run.model.get_base_model().model.layers
    for block, is_checkpointed in zip(blocks, (True, False), strict=True):
        block.gradient_checkpointing = is_checkpointed
    run.compute_ref_log_probs(run.model, batch)
    assert [block.gradient_checkpointing for block in blocks] == [True, False]
    assert tiny.SIZES["num_hidden_layers"] == len(blocks)


def test_a_merged_adapter_is_refused(tmp_path):
    model = peft.get_peft_model(tiny.model(), twins.lora())
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged into its weights"):
        build(tmp_path, model=model, objective="simpo", objective_options={"beta": 2.0})


@pytest.mark.parametrize("precompute", [False, True])
def test_adapters_that_change_the_reference_are_refused(tmp_path, precompute):
    options = {"objective": "dpo", "precompute_ref_log_probs": precompute}
    pissa = peft.LoraConfig(r=4, init_lora_weights="pissa", task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="init_lora_weights='pissa', which changes the base"):
        build(tmp_path, peft_config=pissa, **options)
    model = peft.get_peft_model(tiny.model(), twins.lora())
    model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(ValueError, match="embed_tokens.weight would be trained"):
        build(tmp_path, model=model, **options)
    trainer = build(tmp_path, peft_config=pissa, ref_model=tiny.model(), objective="dpo")
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.693147, abs=1e-4)


def test_an_adapter_that_transformers_loaded_is_refused(tmp_path):
    for objective in ("dpo", "simpo"):
        model = tiny.model()
        model.add_adapter(twins.lora())
        reference = {"ref_model": tiny.model()} if objective == "dpo" else {}
        beta = {"objective_options": {"beta": 2.0}} if objective == "simpo" else {}
        with pytest.raises(ValueError, match="holds an adapter .* that transformers loaded"):
            build(tmp_path, model=model, objective=objective, **reference, **beta)
