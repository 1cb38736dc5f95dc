"""`fuse_head` under the trainers of TRL that ask their models for log-probs.

Whole runs beside TRL's own are in test_trl.py (`twins`). Here: options of these trainers, what the
operator is asked, adapters on the head, what is undone and what is refused.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

# Older trainers ask their models for logits; test_trl.py has their refusal.
pytest.importorskip("trl", "1.16")
peft = pytest.importorskip("peft")
# So that TRL sends nothing over the network.
os.environ.setdefault("CI", "1")

import trl.trainer.utils as trls
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.cpo import CPOConfig, CPOTrainer

import prefkern
import twins
from prefkern.integrations import trl as integration
from prefkern.integrations.trl import fuse_head, fused_forward, restore_head
from support import tiny

ROOT = Path(__file__).parent.parent.parent
QUICK = {"max_steps": 2}
# One batch in each log.
WHOLE = twins.WHOLE
CONFIGS = {
    DPOTrainer: DPOConfig,
    KTOTrainer: KTOConfig,
    SFTTrainer: SFTConfig,
    GRPOTrainer: GRPOConfig,
    RLOOTrainer: RLOOConfig,
    CPOTrainer: CPOConfig,
}
KINDS = [DPOTrainer, KTOTrainer, SFTTrainer, GRPOTrainer, RLOOTrainer]


def arguments(kind, path, **options) -> dict:
    """Arguments of a trainer's constructor; options of the trainer by name, others of its config."""
    rows = tiny.dataset(8)
    given = {"model": tiny.model(), "processing_class": tiny.tokenizer(), "train_dataset": rows}
    defaults = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}
    defaults |= {"max_steps": 1, "gradient_checkpointing": False, "save_strategy": "no"}
    defaults |= {"per_device_train_batch_size": 4, "learning_rate": 0.1, "logging_steps": 1}
    if kind in (KTOTrainer, SFTTrainer):
        given["train_dataset"] = twins.responses(8)
    if kind is SFTTrainer:
        given["train_dataset"] = given["train_dataset"].remove_columns("label")
    if kind in (DPOTrainer, KTOTrainer) and "peft_config" not in options:
        given["ref_model"] = tiny.model(seed=1)
    if kind in (GRPOTrainer, RLOOTrainer):
        given |= {"reward_funcs": twins.distinct_tokens, "train_dataset": rows}
        defaults |= {"num_generations": 2, "max_completion_length": 4, "beta": 0.0}
    names = ("model", "ref_model", "peft_config", "train_dataset", "callbacks", "eval_dataset")
    given |= {name: options.pop(name) for name in names if name in options}
    return {**given, "args": CONFIGS[kind](str(path), **{**defaults, **options})}


def made(kind, path, **options):
    return kind(**arguments(kind, path, **options))


def first_batch(trainer):
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def test_the_table_of_the_docs_is_of_the_committed_run():
    rows = json.loads((ROOT / "bench/results/trl-twin-cpu.json").read_text())["rows"]
    assert twins.docs_table(rows) + "\n\n" in (ROOT / "docs/trl.md").read_text()


def dpo(**options):
    """A fused trainer beside TRL's; options that are called make one value for each."""
    return twins.fused("", DPOTrainer, DPOConfig, **{**QUICK, **options})


SINGLE = {
    "dft, packed": (SFTTrainer, {"loss_type": "dft", "packing": True, "max_length": 32}),
    "padding-free": (SFTTrainer, {"padding_free": True, "max_length": None}),
    "smoothed by TRL": (SFTTrainer, {"label_smoothing_factor": 0.1}),
    "lora": (SFTTrainer, {"peft_config": twins.lora(), "gradient_checkpointing": True}),
    "apo": (KTOTrainer, {"loss_type": "apo_zero_unpaired", "ref_model": "tiny"}),
    "kto, lora": (KTOTrainer, {"peft_config": twins.lora()}),
    "kto, beforehand": (KTOTrainer, {"precompute_ref_log_probs": True, "ref_model": "tiny"}),
}


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.long(name=["smoothed by TRL", "apo", "kto, beforehand"])
def test_options_on_single_responses(name):
    kind, options = SINGLE[name]
    if options.get("ref_model") == "tiny":
        options = {**options, "ref_model": tiny.model(seed=1)}
    assert twins.single("", kind, CONFIGS[kind], **QUICK, **options).worst <= twins.BOUND


@pytest.mark.parametrize(
    "options",
    [
        {"use_weighting": True},
        {"loss_type": ["ipo", "sft"], "loss_weights": [1.0, 0.5]},
        {"peft_config": twins.lora()},
        {"ld_alpha": 0.5, "precompute_ref_log_probs": True},
    ],
    ids=", ".join,
)
@pytest.mark.long(options=[{"loss_type": ["ipo", "sft"], "loss_weights": [1.0, 0.5]}])
def test_options_on_pairs(options):
    reference = {} if "peft_config" in options else {"ref_model": tiny.model(seed=1)}
    assert dpo(**reference, **options).worst <= twins.BOUND


@pytest.mark.parametrize(
    "options",
    [
        # Off the policy that sampled, so that ratios are not 1.
        {"num_iterations": 2, "max_steps": 4, "importance_sampling_level": "sequence"},
        {"top_entropy_quantile": 0.5, "loss_type": "dr_grpo"},
    ],
    ids=", ".join,
)
def test_options_of_grpo(options):
    twin = twins.sampled("", GRPOTrainer, GRPOConfig, **{**QUICK, **options})
    assert twin.worst <= twins.BOUND


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Gemma2", {"final_logit_softcapping": 5.0}),
        ("Cohere", {"logit_scale": 0.3}),
        ("Phi", {}),
        ("Mixtral", {"output_router_logits": True, "num_local_experts": 4}),
    ],
)
@pytest.mark.parametrize("kind", [SFTTrainer, DPOTrainer, GRPOTrainer])
@pytest.mark.long(family=["Cohere", "Phi"])
def test_families(kind, family, options, tmp_path):
    """A softcap, a scale, a head's bias, a router's loss; all metrics."""

    def model(seed=0):
        built = tiny.model(family, seed=seed, **options)
        if family == "Phi":
            torch.nn.init.normal_(built.lm_head.bias)
        return built

    # A bias starts at 0: after two steps of Adam it is as small as the rounding of its gradient.
    run = {**QUICK, "optim": "sgd", "learning_rate": 0.1}
    if kind is DPOTrainer:
        runs = [
            twins.run(kind, DPOConfig, fuse, model=model(), ref_model=model(1), **run, **WHOLE)
            for fuse in (False, True)
        ]
        twin = twins.compare("", *runs)
        assert ("aux_loss" in runs[1].logs[0]) == (family == "Mixtral")
    else:
        model().save_pretrained(tmp_path)
        ways = {SFTTrainer: twins.single, GRPOTrainer: twins.sampled}
        twin = ways[kind]("", kind, CONFIGS[kind], model=str(tmp_path), **run)
    assert twin.worst <= twins.BOUND


def test_virtual_tokens_before_the_prompt():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    # The reference is the model without them.
    assert dpo(peft_config=config).worst <= twins.BOUND


@pytest.fixture
def calls(monkeypatch) -> list:
    """The plans and the options of the operator's calls."""
    made = []
    operator = fused_forward.linear_logprobs

    def recorded(*args, **options):
        result = operator(*args, **options)
        made.append((prefkern.last_plan(), options))
        return result

    monkeypatch.setattr(fused_forward, "linear_logprobs", recorded)
    return made


class Refuses:
    """In place of TRL's operator."""

    @staticmethod
    def apply(*_):
        raise AssertionError("TRL's operator ran")


@pytest.mark.parametrize("kind", KINDS)
def test_the_operator_runs_and_trls_does_not(kind, tmp_path, monkeypatch, calls):
    trainer = fuse_head(made(kind, tmp_path), workspace_mb=3)
    heads = []
    trainer.model.lm_head.register_forward_hook(lambda m, args, out: heads.append(out.shape[-1]))
    with monkeypatch.context() as context:
        context.setattr(trls, "_ChunkedLogProbFunction", Refuses)
        trainer.train()
        assert any(plan.trains_head for plan, _ in calls) and 1 in heads
        assert {options["workspace_mb"] for _, options in calls} == {3}
        restore_head(restore_head(trainer))
        trainer = made(kind, tmp_path, model=trainer.model)
        batch = first_batch(trainer) if kind in (DPOTrainer, KTOTrainer, SFTTrainer) else None
        with pytest.raises(AssertionError, match="TRL's operator ran"):
            trainer.compute_loss(trainer.model, batch) if batch else trainer.train()


def test_generation_and_logits_are_the_models_own(tmp_path):
    model = tiny.model()
    ids = torch.tensor([[3, 7, 9]])
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    logits, loss = model(ids).logits, model(ids, labels=ids).loss
    trainer = fuse_head(made(SFTTrainer, tmp_path, model=model))
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)
    assert torch.equal(model(ids).logits, logits) and model(ids, labels=ids).loss == loss
    assert trainer.model is model


def test_a_copy_of_the_model_has_its_own_weights(tmp_path):
    """Copied while it is fused, a model is not the one that goes on training."""
    model = tiny.model()
    trainer = fuse_head(made(DPOTrainer, tmp_path, model=model))
    ids = torch.tensor([[3, 7, 9, 4]])
    ask = {"input_ids": ids, "labels": ids, "fused_lm_head": True}
    copied = copy.deepcopy(model)
    with torch.no_grad():
        logits, answer = model(ids).logits, model(**ask)
        for parameter in model.parameters():
            parameter.mul_(1.5)
        assert not torch.allclose(model(**ask).log_probs, answer.log_probs)
        for _ in range(2):
            assert torch.equal(copied(ids).logits, logits)
            assert torch.equal(copied(**ask).log_probs, answer.log_probs)
            # What is undone for the model leaves the copy as it is.
            restore_head(trainer)


def test_what_the_model_answers(tmp_path):
    """Every field, against TRL's; labels that are shifted already; a batch without a label."""
    model = tiny.model("Gemma2", final_logit_softcapping=5.0)
    trainer = made(DPOTrainer, tmp_path, model=model, use_weighting=True)
    ids = torch.randint(5, 90, (3, 7), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(ids % 3 == 0, -100)
    asked = [
        ({"labels": labels}, (3, 6)),
        ({"shift_labels": labels}, (3, 7)),
        ({"labels": labels, "num_items_in_batch": torch.tensor(5)}, (3, 6)),
        ({"labels": torch.full_like(labels, -100)}, (3, 6)),
    ]
    theirs = [model(ids, fused_lm_head=True, **options) for options, _ in asked]
    fuse_head(trainer)
    for (options, shape), expected in zip(asked, theirs, strict=True):
        # The first argument without its name, as some wrappers pass it.
        mine = model(ids, fused_lm_head=True, **options)
        assert mine.keys() == expected.keys() and len(mine) == 7
        for name, value in expected.items():
            assert mine[name].dtype == value.dtype, name
            torch.testing.assert_close(mine[name], value, atol=2e-6, rtol=1e-5)
            assert value.shape == (() if name == "loss" else shape)
        mine.loss.backward()
        assert model.lm_head.weight.grad is not None


def test_the_temperature_is_the_trainers(tmp_path):
    trainer = made(GRPOTrainer, tmp_path, temperature=0.5)
    ids = torch.randint(5, 90, (2, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = trainer.model(ids, labels=ids, fused_lm_head=True)
        mine = fuse_head(trainer).model(ids, labels=ids, fused_lm_head=True)
        at_one = prefkern.token_logprobs(trainer.model, ids)
    torch.testing.assert_close(mine.log_probs, expected.log_probs)
    torch.testing.assert_close(mine.entropy, expected.entropy)
    assert (mine.log_probs - at_one).abs().max() > 0.1
    assert mine.mean_logits is None and mine.is_top1 is None


def test_under_autocast_log_probs_are_those_of_float32_logits(tmp_path):
    """TRL rounds each logit to bfloat16."""
    trainer = made(SFTTrainer, tmp_path, bf16=True)
    hidden = []
    trainer.model.lm_head.register_forward_pre_hook(lambda m, args: hidden.append(args[0]))
    batch = first_batch(fuse_head(trainer))

    def loss():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return trainer.compute_loss(trainer.model, copy.copy(batch)).item()

    mine = loss()
    states = hidden[-1].bfloat16().float()
    logits = states @ trainer.model.lm_head.weight.bfloat16().float().T
    labels = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
    restore_head(trainer)
    assert mine == pytest.approx(expected, rel=1e-6)
    assert abs(loss() - expected) > 5 * abs(mine - expected)


@pytest.mark.parametrize("kind", [*KINDS, CPOTrainer])
def test_an_adapter_on_the_head_trains(kind, tmp_path, calls):
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    module = sys.modules[SFTTrainer.__module__ if kind is CPOTrainer else kind.__module__]
    if kind is not CPOTrainer:
        with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
            made(kind, tmp_path, peft_config=config)
    trainer = fuse_head(kind, workspace_mb=5)(**arguments(kind, tmp_path, peft_config=config))
    assert type(trainer) is kind
    assert module.BaseTunerLayer is peft.tuners.tuners_utils.BaseTunerLayer
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    if kind is not CPOTrainer:
        assert {options["workspace_mb"] for _, options in calls} == {5}
        assert 3 in {plan.rank for plan, _ in calls}
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert any("lm_head.lora_B" in name for name in moved)
    assert all("lora_" in name for name in moved)


def test_an_adapter_on_the_head_against_logits_in_memory(tmp_path):
    config = peft.LoraConfig(
        r=3, target_modules=["lm_head"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    trainer = fuse_head(SFTTrainer)(**arguments(SFTTrainer, tmp_path, peft_config=config))
    batch = first_batch(trainer)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.grad = None
    loss = trainer.compute_loss(trainer.model, copy.copy(batch))
    loss.backward()
    mine = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    mine = {name: gradient.clone() for name, gradient in mine.items()}
    true = trainer.model(**batch).loss
    true.backward()
    assert loss.item() == pytest.approx(true.item(), rel=1e-6)
    for name, parameter in trainer.model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(mine[name], parameter.grad, atol=1e-7, rtol=1e-4)
    assert sum("lm_head.lora" in name for name in mine) == 2


def test_sums_beforehand_would_miss_an_adapter_on_the_head(tmp_path):
    config = peft.LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM")
    given = arguments(DPOTrainer, tmp_path, peft_config=config, precompute_ref_log_probs=True)
    with pytest.raises(ValueError, match="precompute_ref_log_probs is True.* without the adapter"):
        fuse_head(DPOTrainer)(**given)


def test_only_this_trainer_and_until_it_is_restored(tmp_path, calls):
    model = tiny.model()
    first = made(SFTTrainer, tmp_path, model=model)
    assert fuse_head(fuse_head(first), workspace_mb=7) is first
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        model(ids, labels=ids, fused_lm_head=True)
        assert calls[-1][1]["workspace_mb"] == 7
        # TRL puts its forward over ours; a call puts ours over that one.
        second = fuse_head(made(DPOTrainer, tmp_path, model=model), workspace_mb=9)
        assert model(ids, labels=ids, fused_lm_head=True).mean_logits is not None
        assert calls[-1][1]["workspace_mb"] == 9
        restore_head(first)
        restore_head(second)
        count = len(calls)
        answer = model(ids, labels=ids, fused_lm_head=True)
    assert answer.log_probs.shape == (1, 2) and len(calls) == count
    third = tiny.model()
    trainer = made(SFTTrainer, tmp_path, model=third)
    trls_own = third.forward
    assert restore_head(fuse_head(trainer)).model.forward == trls_own
    assert restore_head(trainer) is trainer


def test_what_wraps_the_forward_in_training_stays_when_it_is_undone(tmp_path, calls):
    """Under mixed precision accelerate puts its forward over ours."""
    trainer = fuse_head(made(SFTTrainer, tmp_path, bf16=True))
    ours = trainer.model.forward
    trainer.train()
    assert trainer.model.forward != ours and calls
    wrapped = trainer.model.forward
    ids = torch.tensor([[5, 6, 7]])
    restore_head(trainer)
    calls.clear()
    answer = trainer.model(ids, labels=ids, fused_lm_head=True)
    assert answer.log_probs.shape == (1, 2) and not calls
    assert trainer.model.forward == wrapped
    fuse_head(trainer, workspace_mb=11)
    trainer.train()
    assert {options["workspace_mb"] for _, options in calls} == {11}


class OwnSFT(SFTTrainer):
    """A subclass of a user's."""


def test_a_subclass_of_your_own(tmp_path):
    given = arguments(SFTTrainer, tmp_path)
    trainer = fuse_head(OwnSFT)(**given)
    assert type(trainer) is OwnSFT
    trainer.train()
    assert prefkern.last_plan().trains_head


def test_other_trainers_are_refused_by_name(tmp_path):
    from trl.experimental.gmpo import GMPOTrainer

    names = "DPOTrainer, KTOTrainer, SFTTrainer, GRPOTrainer, RLOOTrainer, CPOTrainer, ORPOTrainer"
    for kind in (RewardTrainer, GMPOTrainer):
        with pytest.raises(TypeError, match=rf"{names}, .*got {kind.__name__} \(trl\."):
            fuse_head(kind)
    with pytest.raises(TypeError, match=f"{names}, or a subclass of your own; got int"):
        fuse_head(3)
    with pytest.raises(TypeError, match="prefkern's DPOTrainer needs no call: its operator is"):
        fuse_head(integration.DPOTrainer)


def test_versions_are_checked_where_it_is_called(tmp_path, monkeypatch):
    trainer = made(SFTTrainer, tmp_path)
    installed = metadata.version
    monkeypatch.setattr(metadata, "version", lambda n: "1.15.2" if n == "trl" else installed(n))
    with pytest.raises(ImportError, match=r"in TRL .*1\.16.*, but 1\.15\.2 is installed: pip inst"):
        fuse_head(trainer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"entropy_coef": 0.1}, "args.entropy_coef is 0.1 .*needs the entropy's gradient"),
        ({"use_adaptive_entropy": True}, "args.use_adaptive_entropy True: the bonus"),
        ({"cast_lm_head_to_fp32": True}, "args.cast_lm_head_to_fp32 is True, but .* float32 in"),
    ],
    ids=["entropy_coef", "use_adaptive_entropy", "cast_lm_head_to_fp32"],
)
def test_options_that_need_more_are_refused_by_name(tmp_path, options, message):
    trainer = made(GRPOTrainer, tmp_path, **options)
    forward = trainer.model.forward
    with pytest.raises(ValueError, match=message):
        fuse_head(trainer)
    assert trainer.model.forward == forward


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "cuda"}, "backend must be"),
        ({"workspace_mb": -1}, "workspace_mb"),
    ],
)
def test_options_are_checked_before_a_trainer_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        fuse_head(SFTTrainer, **options)
