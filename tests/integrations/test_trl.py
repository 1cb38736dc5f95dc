"""prefkern in TRL against TRL, logits in memory, and itself resumed."""

from __future__ import annotations

import copy
import json
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
import transformers

from support import tiny

pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")

ROOT = Path(__file__).parent.parent.parent
# So that TRL sends nothing over the network.
os.environ.setdefault("CI", "1")

import trl
from packaging.version import Version
from torch.utils._python_dispatch import TorchDispatchMode
from trl import DPOConfig
from trl import DPOTrainer as PlainDPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

import prefkern
import twins
from prefkern import objectives
from prefkern.integrations.trl import DPOTrainer, fuse_head
from support.trl_runs import build

V = tiny.VOCAB_SIZE
IS_TRL_1_9 = Version(trl.__version__).release < (1, 10)
# Older trainers do not ask their models for log-probs.
IS_ASKED = Version(trl.__version__).release >= (1, 16)
QUICK = {"max_steps": 2}


def step_logs(trainer) -> list[dict]:
    return [log for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("name", twins.CASES)
def test_twins(name):
    if name in ("DPO, fuse_head", "KTO", "SFT", "GRPO", "RLOO") and not IS_ASKED:
        with pytest.raises(
            ImportError, match="fuse_head supports this trainer in TRL <1.17,>=1.16"
        ):
            twins.CASES[name]()
        return
    twin = twins.CASES[name]()
    assert len(twin.losses) == len(twin.gradients) == twins.STEPS
    # What samples its own responses has a loss near 0 in every step.
    changing = twin.norms if twin.least_loss else [loss for loss, _ in twin.losses]
    assert len({round(value, 4) for value in changing}) == twins.STEPS
    assert twin.worst <= twins.BOUND


def test_what_is_committed_of_the_twins_is_of_these():
    report = json.loads((ROOT / "bench/results/trl-twin-cpu.json").read_text())
    assert [row["name"] for row in report["rows"]] == [*twins.CASES]
    assert all(row["worst"] <= report["bound"] == twins.BOUND for row in report["rows"])


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": ["hinge"], "beta": 0.5, "f_divergence_type": "forward_kl"},
        {"loss_type": ["sigmoid"], "f_divergence_type": "js_divergence"},
        {
            "loss_type": ["ipo"],
            "f_divergence_type": "alpha_divergence",
            "f_alpha_divergence_coef": 0.3,
        },
        {"loss_type": ["sigmoid_norm"], "f_divergence_type": "alpha_divergence"},
        {"loss_type": ["apo_zero"], "loss_weights": [2.5]},
        {"loss_type": ["nca_pair", "sigmoid_norm"], "use_weighting": True},
        {"loss_type": ["aot", "aot_unpaired"], "label_smoothing": 0.1},
        {"ld_alpha": 0.3, "loss_type": ["sigmoid", "sft"]},
        {"ld_alpha": 0.0, "precompute_ref_log_probs": True},
        {"use_weighting": True},
        {"gradient_checkpointing": True, "peft_config": twins.lora()},
        {"max_length": 7},
        {"sync_ref_model": True, "ref_model_sync_steps": 1},
        {"train_dataset": tiny.dataset(16).to_iterable_dataset()},
    ],
    ids=lambda options: ", ".join(options)[:60],
)
def test_options_of_trl_have_trls_effect(options):
    by_length = {"ipo", "sigmoid_norm"} & {*options.get("loss_type", ())}
    if IS_TRL_1_9 and by_length and "f_divergence_type" in options:
        with pytest.raises(ValueError, match="another loss in TRL 1.9"):
            twins.run(DPOTrainer, DPOConfig, **options)
        return

    def run(kind):
        ref_model = None if "peft_config" in options else tiny.model(seed=1)
        return twins.run(kind, DPOConfig, **{**QUICK, "ref_model": ref_model, **options})

    pair = [run(kind) for kind in (PlainDPOTrainer, DPOTrainer)]
    assert twins.compare("", *pair, twins._OF_TOKENS).worst <= twins.BOUND


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Gemma2", {"final_logit_softcapping": 5.0}),
        ("Cohere", {"logit_scale": 0.3}),
        ("Phi", {}),
        ("Mixtral", {"output_router_logits": True, "num_local_experts": 4}),
    ],
)
@pytest.mark.long(family=["Cohere", "Phi"])
def test_families(family, options):
    """A softcap, a scale, a head's bias, a router's loss: through both ways in, all metrics."""

    def model(seed=0):
        built = tiny.model(family, seed=seed, **options)
        bias = getattr(built.lm_head, "bias", None)
        assert (bias is not None) == (family == "Phi")
        if bias is not None:
            torch.nn.init.normal_(bias)
        return built

    pair = [
        twins.run(kind, DPOConfig, model=model(), ref_model=model(1), **QUICK, **twins.WHOLE)
        for kind in (PlainDPOTrainer, DPOTrainer)
    ]
    assert twins.compare("", *pair).worst <= twins.BOUND
    assert ("aux_loss" in pair[0].logs[0]) == (family == "Mixtral")
    is_orpo = family in ("Mixtral", "Cohere")
    kind, make_config = (ORPOTrainer, ORPOConfig) if is_orpo else (CPOTrainer, CPOConfig)
    pair = [twins.run(kind, make_config, fuse, model=model(), **QUICK) for fuse in (False, True)]
    assert twins.compare("", *pair).worst <= twins.BOUND


@pytest.mark.parametrize(
    ("kind", "make_config", "family", "options"),
    [
        (CPOTrainer, CPOConfig, "Gemma2", {"final_logit_softcapping": 5.0}),
        (ORPOTrainer, ORPOConfig, "Cohere", {"logit_scale": 0.3}),
    ],
)
def test_an_adapter_on_the_head_of_trls_own_trainers(kind, make_config, family, options):
    config = peft.LoraConfig(
        r=3, task_type="CAUSAL_LM", target_modules=["lm_head"], init_lora_weights=False
    )
    pair = [
        twins.run(
            kind,
            make_config,
            fuse,
            model=peft.get_peft_model(tiny.model(family, **options), config),
            **QUICK,
        )
        for fuse in (False, True)
    ]
    assert prefkern.last_plan().rank == 3
    assert twins.compare("", *pair).worst <= twins.BOUND


def test_a_trained_adapter_has_its_copy_as_reference():
    def adapted():
        torch.manual_seed(0)
        return peft.get_peft_model(tiny.model(), twins.lora())

    pair = [
        twins.run(kind, DPOConfig, model=adapted(), **QUICK)
        for kind in (PlainDPOTrainer, DPOTrainer)
    ]
    assert twins.compare("", *pair, twins._OF_TOKENS).worst <= twins.BOUND
    # The copy, and not the base model: at first they agree.
    assert pair[1].logs[0]["rewards/margins"] == 0
    assert pair[1].logs[1]["rewards/margins"] != 0


def test_equal_models_give_log_2_under_autocast(tmp_path):
    trainer = build(tmp_path, ref_model=tiny.model(), bf16=True, max_steps=1)
    trainer.train()
    assert step_logs(trainer)[0]["loss"] == pytest.approx(0.69314718, abs=1e-7)


class _Shapes(TorchDispatchMode):
    """Records every [.., T, V] tensor that is made."""

    def __init__(self):
        super().__init__()
        self.logits = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.ndim == 3 and tensor.shape[-1] == V:
                self.logits.add(tuple(tensor.shape))
        return out


@pytest.mark.parametrize("kind", ["dpo", "cpo", "simpo", "orpo"])
def test_no_logits_are_made(tmp_path, kind):
    if kind == "dpo":
        trainer = build(tmp_path, ref_model=tiny.model(seed=1))
    elif kind == "orpo":
        trainer = build(tmp_path, ORPOTrainer, ORPOConfig)
    else:
        trainer = build(
            tmp_path, CPOTrainer, CPOConfig, loss_type={"cpo": "sigmoid"}.get(kind, kind)
        )
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    if kind != "dpo":
        with _Shapes() as shapes:
            trainer.compute_loss(trainer.model, batch)
        # The net catches: as TRL has it, there are logits.
        assert shapes.logits
        assert fuse_head(trainer) is trainer
    heads = []
    trainer.model.lm_head.register_forward_hook(lambda m, args, out: heads.append(out.shape))
    # The head's transform is probed once, on four tokens.
    prefkern.models.head_transform(trainer.model)
    if kind == "dpo":
        prefkern.models.head_transform(trainer.ref_model)
    heads.clear()
    with _Shapes() as shapes:
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
    assert not shapes.logits
    assert heads and all(shape[-1] == 1 for shape in heads)
    plan = prefkern.last_plan()
    assert plan is not None and plan.trains_head and plan.vocab_size == V
    assert trainer.model.lm_head.weight.grad.abs().max() > 0


ROWS = tiny.dataset(8).add_column("margin", [0.3 * i - 1 for i in range(8)])
OBJECTIVES = {
    "adadpo": {},
    "alphadpo": {"beta": 2.5},
    "simpo": {"beta": 2.0, "gamma": 0.5},
    "adaorpo": {},
    "madpo": {},
    "betadpo": {"keep": 0.5},
    "tdpo2": {},
    "ipo": {"tau": 0.3},
}


@pytest.mark.parametrize(
    ("name", "weighted"),
    [*((name, False) for name in OBJECTIVES), ("adadpo", True), ("tdpo2", True)],
)
def test_objectives_against_logits_in_memory(tmp_path, name, weighted):
    options = {"objective": name, "objective_options": OBJECTIVES[name], "use_weighting": weighted}
    needs_reference = name not in ("simpo", "adaorpo")
    reference = tiny.model(seed=1)
    if needs_reference:
        options["ref_model"] = copy.deepcopy(reference)
    trainer = build(tmp_path, train_dataset=ROWS, **options)
    assert (trainer.ref_model is not None) == needs_reference
    objective = copy.deepcopy(trainer.loss_fn.objective)
    collated = trainer.data_collator([trainer.train_dataset[i] for i in (5, 2)])
    if name == "madpo":
        assert collated["reward_margins"].tolist() == pytest.approx([0.5, -0.4])
    else:
        assert "reward_margins" not in collated
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()

    model = tiny.model()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    labels = ids.masked_fill(batch["completion_mask"] == 0, -100)
    labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    with torch.no_grad():
        ref_hidden = reference.model(ids, attention_mask=mask).last_hidden_state
    out = prefkern.reference.preference_loss(
        objective,
        model.model(ids, attention_mask=mask).last_hidden_state,
        model.lm_head.weight,
        labels,
        ref_hidden=ref_hidden,
        ref_weight=reference.lm_head.weight.detach(),
        reward_margins=batch.get("reward_margins"),
    )
    out.loss.backward()
    assert loss.item() == pytest.approx(out.loss.item(), rel=1e-5)
    for (key, mine), (_, true) in zip(
        trainer.model.named_parameters(), model.named_parameters(), strict=True
    ):
        worst = (mine.grad - true.grad).abs().max() / true.grad.abs().max()
        assert worst <= 1e-4, key


def test_an_objective_that_is_passed_is_the_one_that_trains(tmp_path):
    objective = objectives.DPO(0.7, adaptive=objectives.Adaptive(clip=1.5))
    trainer = build(tmp_path, objective=objective, ref_model=tiny.model(seed=1))
    assert trainer.loss_fn.objective is objective and trainer.beta == 0.7
    trainer.train()
    log = step_logs(trainer)[0]
    assert 0 < log["adaptive/beta_ratio"] <= 1.5
    assert log["rewards/margins"] != pytest.approx(log["rewards/base_margins"])


def test_a_small_last_batch_weighs_by_its_pairs(tmp_path):
    """2 + 2 + 1 pairs accumulated train as one batch of 5; TRL's mean of means does not."""

    def gradients(kind, size, accumulated):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
        record = twins.Record()
        trainer = build(
            tmp_path,
            kind,
            train_dataset=tiny.dataset(5),
            ref_model=tiny.model(seed=1),
            callbacks=[record],
            **options,
        )
        trainer.train()
        assert len(record.gradients) == 1
        return record.gradients[0], step_logs(trainer)[0]

    whole, log = gradients(DPOTrainer, 5, 1)
    parts, log_of_parts = gradients(DPOTrainer, 2, 3)
    trls, _ = gradients(PlainDPOTrainer, 2, 3)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], atol=1e-6, rtol=1e-4)
    assert any((trls[name] - whole[name]).abs().max() > 1e-3 for name in whole)
    for name in log.keys() - {"epoch"}:
        assert log_of_parts[name] == pytest.approx(log[name], rel=1e-4, abs=1e-5), name


def test_evaluation_means_are_over_pairs_and_carry_the_datasets_name(tmp_path):
    trainer = build(
        tmp_path,
        ref_model=tiny.model(seed=1),
        eval_dataset={"a": tiny.dataset(5, seed=2), "b": tiny.dataset(3, seed=3)},
        per_device_eval_batch_size=2,
    )
    metrics = trainer.evaluate()
    # Raw pairs, in one batch.
    trainer.args.per_device_eval_batch_size = 5
    whole = trainer.evaluate(tiny.dataset(5, seed=2))
    for name in ("loss", "rewards/margins", "logps/chosen", "entropy", "logits/rejected"):
        assert metrics[f"eval_a_{name}"] == pytest.approx(whole[f"eval_{name}"], rel=1e-5)
        assert metrics[f"eval_a_{name}"] != metrics[f"eval_b_{name}"]


def test_statistics_are_checkpointed_and_still_in_evaluation(tmp_path):
    def trainer(**options):
        return build(
            tmp_path,
            objective="alphadpo",
            objective_options={"beta": 2.5},
            ref_model=tiny.model(seed=1),
            eval_dataset=tiny.dataset(4, seed=5),
            per_device_train_batch_size=2,
            save_strategy="steps",
            save_steps=2,
            **options,
        )

    class Still(transformers.TrainerCallback):
        """Evaluates after each step, which must not change the run."""

        def on_step_end(self, args, state, control, **_):
            control.should_evaluate = True

    straight = trainer()
    straight.train()
    card = (tmp_path / "README.md").read_text()
    assert "trained with AlphaDPO" in card and "Secretly a Reward Model" not in card
    evaluated = trainer(callbacks=[Still()])
    evaluated.train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    expected = straight.loss_fn.objective.state_dict()
    assert len(expected) > 0 and any(value.abs().max() > 0 for value in expected.values())
    for other in (evaluated, resumed):
        state = other.loss_fn.objective.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in expected.items())
    for mine, true in zip(step_logs(resumed)[-2:], step_logs(straight)[-2:], strict=True):
        assert mine["loss"] == true["loss"]


def test_the_cache_of_reference_sums_is_not_trls(tmp_path, monkeypatch):
    # On disk: what is made of a dataset in memory is not found again.
    tiny.dataset(4, seed=11).save_to_disk(tmp_path / "rows")
    rows = datasets.load_from_disk(tmp_path / "rows")

    def wrong(self, model, inputs):
        zeros = torch.zeros(len(inputs["input_ids"]))
        return zeros.chunk(2)

    def sums(kind, **options):
        trainer = build(
            tmp_path,
            kind,
            train_dataset=rows,
            precompute_ref_log_probs=True,
            # Cut by the collator alone: the dataset is the same whatever the length.
            truncation_mode="keep_end",
            **options,
        )
        return trainer.train_dataset["ref_chosen_logps"][:]

    with monkeypatch.context() as context:
        context.setattr(PlainDPOTrainer, "compute_ref_log_probs", wrong)
        assert set(sums(PlainDPOTrainer)) == {0.0}
    mine = sums(DPOTrainer)
    assert all(value < -1 for value in mine)
    # Nor those of responses that are cut elsewhere.
    assert sums(DPOTrainer, max_length=7) != mine
    # And found again: no model is asked.
    monkeypatch.setattr(DPOTrainer, "compute_ref_log_probs", wrong)
    assert sums(DPOTrainer) == mine


def test_example(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "model"
    tiny.model().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    tiny.dataset(6).to_json(tmp_path / "pairs.jsonl")
    arguments = ["--model", str(folder), "--dataset", str(tmp_path / "pairs.jsonl"), "--use_cpu"]
    arguments += ["--output", str(tmp_path / "out"), "--max_steps", "2"]
    monkeypatch.setattr(sys, "argv", ["trl_dpo.py", *arguments])
    runpy.run_path(str(ROOT / "examples/trl_dpo.py"), run_name="__main__")
    printed = re.search(r"'adaptive/beta_ratio': '([\d.]+)'", capsys.readouterr().out)
    # The first step's, or in TRL 1.9, which logs later, the mean of both.
    assert float(printed[1]) == pytest.approx(1, rel=0, abs=1e-2 if IS_TRL_1_9 else 0)
    assert (tmp_path / "out/checkpoint-2/optimizer.pt").exists()
    assert (tmp_path / "out/adapter_config.json").exists()
