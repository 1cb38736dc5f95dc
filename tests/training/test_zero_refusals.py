"""What cannot run under ZeRO is refused before anything is loaded; DeepSpeed itself is not needed."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("peft")

from prefkern import PreferenceTrainer
from prefkern.models.heads import unwrap
from prefkern.training import zero
from prefkern.training.checkpoint_files import CheckpointError, require_complete
from prefkern.training.checkpoints import _check_ranks
from prefkern.training.reference_cache import hash_weights
from support import tiny
from support.fsdp import carried, lora
from support.training import config, trainer


def arguments(path, stage: int = 3, objective: str = "dpo", **given):
    """Arguments with DeepSpeed's configuration, where transformers puts it."""
    options = {name: given.pop(name) for name in [*given] if name.endswith("_full_eval")}
    args = config(path, objective=objective, **options)
    stages = {"stage": stage, **given.pop("zero", {})}
    args.deepspeed_plugin = SimpleNamespace(deepspeed_config={"zero_optimization": stages, **given})
    return args


def fails(error, args, rows=None, **given) -> str:
    rows = tiny.dataset(4) if rows is None else rows
    given = {"processing_class": tiny.tokenizer(), **given}
    with pytest.raises(error) as raised:
        PreferenceTrainer("no/model", args, rows, **given)
    return str(raised.value)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_reference_goes_on_to_be_loaded(tmp_path, stage):
    for options in (
        {"ref_model": "no/reference"},
        {"peft_config": lora()},
        {"rows": carried()},
        {},
    ):
        fails(OSError, arguments(tmp_path, stage), **options)
    fails(OSError, arguments(tmp_path, stage, "tdpo1"))


@pytest.mark.parametrize(
    ("given", "begin", "remedy"),
    [
        (
            {"zero": {"offload_optimizer": {"device": "cpu"}}},
            "DeepSpeed's offload_optimizer (here to 'cpu') is not supported yet",
            "use ZeRO-3 over more processes, or LoRA",
        ),
        (
            {"zero": {"offload_param": {"device": "nvme"}}},
            "DeepSpeed's offload_param (here to 'nvme') is not supported yet",
            "use ZeRO-3 over more processes, or LoRA",
        ),
        (
            {"torch_autocast": {"enabled": True}},
            "DeepSpeed's torch_autocast is not supported",
            "set bf16",
        ),
        (
            {"tensor_parallel": {"autotp_size": 2}},
            "DeepSpeed's tensor_parallel is not supported",
            "use ZeRO-3",
        ),
        (
            {"bf16_full_eval": True},
            "bf16_full_eval is not supported under DeepSpeed",
            "set bf16",
        ),
    ],
)
def test_settings_that_are_refused(tmp_path, given, begin, remedy):
    said = fails(ValueError, arguments(tmp_path, **given))
    assert said.startswith(begin) and remedy in said
    off = {"zero": {"offload_param": {"device": "none"}, "offload_optimizer": None}}
    fails(OSError, arguments(tmp_path, **off))


def test_sums_stay_float32_in_a_batch(tmp_path, monkeypatch):
    """Under DeepSpeed Trainer casts floating inputs to the model's dtype: -46.43 to -46.5."""
    run = trainer(tmp_path)
    narrow = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: torch.bfloat16))
    monkeypatch.setattr(type(run.accelerator.state), "deepspeed_plugin", narrow)
    run.is_deepspeed_enabled = True
    batch = {"ref_logps": torch.tensor([-46.43147659]), "labels": torch.tensor([[3]])}
    prepared = run._prepare_inputs(batch)
    assert prepared.keys() == batch.keys()
    assert all(torch.equal(prepared[name], batch[name]) for name in batch)
    assert prepared["ref_logps"].dtype == torch.float32


def partitioned() -> torch.nn.Module:
    """A model whose parameters look as ZeRO-3's do outside of a forward."""
    model = tiny.model()
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id = number
    return model


def test_a_model_in_shards_has_no_copy_and_no_hash(tmp_path):
    assert hash_weights(tiny.model()) is not None
    assert hash_weights(partitioned()) is None
    with pytest.raises(ValueError, match="give the model by its name, pass ref_model, or set"):
        PreferenceTrainer(
            partitioned(),
            config(tmp_path, objective="dpo"),
            tiny.dataset(4),
            processing_class=tiny.tokenizer(),
        )


def test_an_engine_is_not_the_model():
    """DeepSpeed's engine answers for what the model has, and calls the model `module`."""

    class Engine(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self._modules["module"] = vars(self)["module"] = model

        def __getattr__(self, name):
            return getattr(vars(self)["module"], name)

    model = tiny.model()
    engine = Engine(model)
    assert engine.get_output_embeddings() is model.lm_head
    assert unwrap(engine) is model
    assert unwrap(Engine(Engine(model))) is model


def test_a_damaged_state_of_deepspeed_is_named(tmp_path):
    folder = tmp_path / "checkpoint-2"
    state = folder / "global_step2"
    state.mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")
    assert zero.problem(tmp_path) is None

    def problem() -> str:
        with pytest.raises(CheckpointError) as raised:
            require_complete(folder)
        return str(raised.value)

    assert "it has no latest, which DeepSpeed writes last" in problem()
    (folder / "latest").write_text("global_step2")
    assert "global_step2, which latest names, has no files" in problem()
    file = state / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"step": torch.ones(100)}, file)
    require_complete(folder)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert f"{file} is damaged or was not written to its end" in problem()


def test_parts_of_another_number_of_processes_are_refused(tmp_path):
    state = tmp_path / "global_step2"
    state.mkdir()
    args = arguments(tmp_path)
    # Weights alone, or another sharding, have no such parts.
    _check_ranks(tmp_path, args)
    (tmp_path / "latest").write_text("global_step2")
    _check_ranks(tmp_path, args)
    for rank in range(2):
        _check_ranks(tmp_path, args)
        (state / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    with pytest.raises(CheckpointError, match="by 2 processes and is resumed by 1, and DeepSpeed"):
        _check_ranks(tmp_path, args)
    _check_ranks(tmp_path, config(tmp_path))


def partitioned_in_bfloat16() -> torch.nn.Module:
    """As ZeRO-3 loads a model in bfloat16; an adapter and a whole head are added."""
    import peft

    model = tiny.model().bfloat16()
    for parameter in model.parameters():
        parameter.ds_id = 0
    return peft.get_peft_model(model, lora(modules_to_save=["lm_head"]))


@pytest.mark.parametrize("enabled", [True, False])
def test_what_is_added_to_a_model_in_shards_has_the_dtype_of_the_run(enabled):
    model = partitioned_in_bfloat16()
    before = {name: each.dtype for name, each in model.named_parameters() if each.requires_grad}
    assert {*before.values()} == {torch.float32, torch.bfloat16}
    zero.cast_added(model, {"bf16": {"enabled": enabled}})
    after = {name: each.dtype for name, each in model.named_parameters() if each.requires_grad}
    assert after == (dict.fromkeys(before, torch.bfloat16) if enabled else before)
    whole = tiny.model()
    zero.cast_added(whole, {"bf16": {"enabled": True}})
    assert {each.dtype for each in whole.parameters()} == {torch.float32}


def test_auto_is_left_to_deepspeed():
    given = {"a": "auto", "b": {"c": "auto", "d": 1}, "e": "other"}
    kept = copy.deepcopy(given)
    assert zero._without_auto(given) == {"b": {"d": 1}, "e": "other"}
    assert given == kept
