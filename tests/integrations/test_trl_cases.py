"""The cases of TRL's own tests of its DPO, CPO and ORPO trainers, run through prefkern.

Data in each format and of each kind of dataset, adapters, references, losses, evaluation, tags: the
right parameters train and no others, and what TRL refuses is refused. If `PreferenceTrainer` has
the case as well, it runs there, too. test_trl.py compares numbers with TRL's.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from support import tiny

pytest.importorskip("trl")

import datasets
import peft
from trl import DPOConfig
from trl import DPOTrainer as PlainDPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from prefkern import PreferenceTrainer
from prefkern.data.collate import PreferenceCollator
from prefkern.integrations.trl import DPOTrainer, fuse_head
from support import training
from support.trl_runs import build

BOTH = ["trl", "prefkern"]


def long(*values):
    return pytest.param(*values, marks=pytest.mark.long)


# Tiny gradients move weights visibly.
STEEP = {"learning_rate": 0.5, "max_steps": 2}


def made(path: Path, kind: str, **options):
    """A DPO trainer of either kind, with options that both take."""
    options = {**STEEP, **options}
    if kind == "trl":
        if "ref_model" not in options and "peft_config" not in options:
            options["ref_model"] = None if _is_adapted(options) else tiny.model(seed=1)
        return build(path, DPOTrainer, DPOConfig, **options)
    return training.trainer(path, objective="dpo", max_grad_norm=0.0, **options)


def _is_adapted(options) -> bool:
    return isinstance(options.get("model"), peft.PeftModel)


def trained(trainer) -> dict[str, bool]:
    """Which parameters a run has moved, by name."""
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] is not None
    return {n: not torch.equal(p, before[n]) for n, p in trainer.model.named_parameters()}


def conversation(answer: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": answer}]


def in_format(name: str, rows) -> datasets.Dataset:
    """Pairs of tiny.dataset in one of TRL's formats."""
    is_conversation, is_implicit = "conversational" in name, "implicit" in name
    result = []
    for row in rows:
        prompt, chosen, rejected = (row[side].strip() for side in ("prompt", "chosen", "rejected"))
        if is_conversation:
            prompt = [{"role": "user", "content": prompt}]
            chosen, rejected = conversation(chosen), conversation(rejected)
        else:
            chosen, rejected = f" {chosen}", f" {rejected}"
        if is_implicit:
            result.append({"chosen": prompt + chosen, "rejected": prompt + rejected})
        else:
            result.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return datasets.Dataset.from_list(result)


EXAMPLES = [
    {"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]},
    {"prompt_ids": [7, 8], "chosen_ids": [9, 10], "rejected_ids": [11, 12, 13]},
]


@pytest.mark.parametrize("multiple", [None, 5, 8])
def test_collated(multiple):
    theirs = DataCollatorForPreference(pad_token_id=0, pad_to_multiple_of=multiple)(EXAMPLES)
    ours = PreferenceCollator(0, multiple)(EXAMPLES)
    assert ours.keys() == {"input_ids", "attention_mask", "labels"}
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert torch.equal(ours["attention_mask"], theirs["attention_mask"])
    masked = theirs["input_ids"].masked_fill(theirs["completion_mask"] == 0, -100)
    assert torch.equal(ours["labels"], masked)


def test_collated_reference_sums():
    sums = [{"ref_chosen_logps": 0.1, "ref_rejected_logps": 0.2},
            {"ref_chosen_logps": 0.3, "ref_rejected_logps": 0.4}]  # fmt: skip
    rows = [{**row, **each} for row, each in zip(EXAMPLES, sums, strict=True)]
    theirs, ours = DataCollatorForPreference(0)(rows), PreferenceCollator(0)(rows)
    expected = torch.cat([theirs["ref_chosen_logps"], theirs["ref_rejected_logps"]])
    assert torch.equal(ours["ref_logps"], expected)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize(
    "name",
    [long("standard"), "conversational", "standard_implicit", long("conversational_implicit")],
)
def test_formats(tmp_path, name, kind):
    moved = trained(made(tmp_path, kind, train_dataset=in_format(name, tiny.dataset(8))))
    assert all(moved.values())


@pytest.mark.parametrize(
    "family",
    ["Cohere2", "GPT2", *map(long, ("Qwen2", "Qwen3", "Olmo3", "Gemma3Text"))],
)
def test_families(tmp_path, family):
    """All parameters of a whole model move, tied ones once."""
    moved = trained(
        made(tmp_path, "trl", model=tiny.model(family), ref_model=tiny.model(family, 1))
    )
    assert all(moved.values())


@pytest.mark.parametrize("kind", BOTH)
def test_a_mixture_of_experts_and_its_routers_loss(tmp_path, kind):
    options = {"output_router_logits": True, "num_local_experts": 4}
    model, reference = (tiny.model("Mixtral", seed, **options) for seed in (0, 1))
    trainer = made(tmp_path, kind, model=model, ref_model=reference)
    moved = trained(trainer)
    assert all(moved.values())
    assert any("aux_loss" in log for log in trainer.state.log_history)


@pytest.mark.parametrize("kind", BOTH)
def test_the_reference_stays_as_it_is(tmp_path, kind):
    reference = tiny.model(seed=1)
    before = copy.deepcopy(reference.state_dict())
    trainer = made(tmp_path, kind, ref_model=reference)
    assert all(trained(trainer).values())
    after = trainer.ref_model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_synchronised_reference_follows(tmp_path):
    trainer = made(tmp_path, "trl", sync_ref_model=True, ref_model_sync_steps=2)
    before = copy.deepcopy(trainer.ref_model.state_dict())
    assert all(trained(trainer).values())
    after = trainer.ref_model.state_dict()
    assert not any(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("kind", BOTH)
def test_a_models_dtype_is_kept(tmp_path, kind, name):
    """`torch_dtype` is the older name, which TRL's own default shadows."""
    tiny.model().save_pretrained(tmp_path / "model")
    given = {"model": str(tmp_path / "model"), "model_init_kwargs": {name: "bfloat16"}}
    trainer = made(tmp_path, kind, ref_model=None, learning_rate=5.0, **given)
    moved = trained(trainer)
    assert all(p.dtype == torch.bfloat16 for p in trainer.model.parameters())
    assert all(p.dtype == torch.bfloat16 for p in trainer.ref_model.parameters())
    assert all(moved.values())


@pytest.mark.parametrize("kind", [PlainDPOTrainer, DPOTrainer])
def test_weights_that_an_optimiser_spoils_stop_the_run(tmp_path, kind):
    """Adam's epsilon is 0 in float16: TRL trains on, and every weight ends as NaN."""
    options = {"optim": "adamw_torch", "max_steps": 4}
    trainer = build(
        tmp_path, kind, model=tiny.model().half(), ref_model=tiny.model(seed=1).half(), **options
    )
    if kind is PlainDPOTrainer:
        trainer.train()
        assert all(weight.isnan().any() for weight in trainer.model.parameters())
        return
    with pytest.raises(FloatingPointError, match="an earlier optimiser step has spoilt it"):
        trainer.train()


@pytest.mark.parametrize("loss_type", [["bco_pair"], long(["sigmoid", "sft"])], ids=str)
def test_a_run_goes_on_in_the_other_trainer(tmp_path, caplog, loss_type):
    """With TRL's losses a checkpoint of one trainer is one of the other."""
    options = {"loss_type": loss_type, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}

    def losses(kind, checkpoint=None):
        path = tmp_path / kind.__module__
        trainer = build(path, kind, ref_model=tiny.model(seed=1), **options)
        trainer.train(resume_from_checkpoint=checkpoint)
        return [log["loss"] for log in trainer.state.log_history if "loss" in log]

    kinds = [PlainDPOTrainer, DPOTrainer]
    expected = losses(PlainDPOTrainer)
    assert losses(DPOTrainer) == pytest.approx(expected, rel=1e-5)
    assert expected[0] != expected[1]
    for kind, other in zip(kinds, reversed(kinds), strict=True):
        went_on = losses(kind, str(tmp_path / other.__module__ / "checkpoint-1"))
        assert went_on == pytest.approx(expected, rel=1e-5)
    assert "objective.pt is missing" not in caplog.text


ADAPTERS = {
    "config": lambda: {"peft_config": peft.LoraConfig(task_type="CAUSAL_LM")},
    "model": lambda: {"model": peft.get_peft_model(tiny.model(), peft.LoraConfig())},
    "checkpointed": lambda: {
        "peft_config": peft.LoraConfig(task_type="CAUSAL_LM"),
        "gradient_checkpointing": True,
    },
    "experts": lambda: {
        "model": tiny.model("Mixtral", num_local_experts=4),
        "peft_config": peft.LoraConfig(
            target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        ),
    },
    "model of experts": lambda: {
        "model": peft.get_peft_model(
            tiny.model("Mixtral", num_local_experts=4),
            peft.LoraConfig(target_parameters=["mlp.experts.down_proj"]),
        )
    },
    "prompt": lambda: {
        "peft_config": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    },
}


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize(
    "name",
    ["config", "model of experts", "prompt", *map(long, ("model", "checkpointed", "experts"))],
)
def test_adapters_train_and_their_base_does_not(tmp_path, name, kind):
    trainer = made(tmp_path, kind, learning_rate=5.0, max_steps=3, **ADAPTERS[name]())
    moved = trained(trainer)
    parts = ("lora_", "prompt_encoder")
    added = {n: has for n, has in moved.items() if any(part in n for part in parts)}
    reference = {n for n in added if ".ref." in n or n.endswith(".ref")}
    assert added and all(has for n, has in added.items() if n not in reference)
    assert not any(moved[n] for n in moved.keys() - (added.keys() - reference))


@pytest.mark.parametrize("kind", BOTH)
def test_an_adapter_on_the_head(tmp_path, kind):
    """TRL's own trainer refuses what its own operator would ignore; these train it."""
    config = peft.LoraConfig(target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    moved = trained(made(tmp_path, kind, learning_rate=5.0, peft_config=config))
    assert all(has for name, has in moved.items() if "lm_head.lora" in name)


def _stream(rows):
    return rows.to_iterable_dataset()


KINDS = {
    "dataset": lambda rows: rows,
    "stream": _stream,
    "DatasetDict": lambda rows: datasets.DatasetDict({"one": rows, "two": rows}),
    "IterableDatasetDict": lambda rows: datasets.IterableDatasetDict(
        {"one": _stream(rows), "two": _stream(rows)}
    ),
    "dict": lambda rows: {"one": rows, "two": rows},
    "dict of streams": lambda rows: {"one": _stream(rows), "two": _stream(rows)},
}


@pytest.mark.parametrize("when", ["beforehand", long("later")])
@pytest.mark.parametrize("precompute", [False, True], ids=["", "precomputed"])
@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_datasets_to_evaluate_on(tmp_path, name, precompute, when):
    rows = KINDS[name](tiny.dataset(3, seed=5))
    options = {"precompute_ref_log_probs": precompute, "ref_model": tiny.model(seed=1)}
    expected = build(tmp_path, eval_dataset=tiny.dataset(3, seed=5), ref_model=tiny.model(seed=1))

    def evaluated():
        if when == "later":
            return build(tmp_path, **options).evaluate(rows)
        return build(tmp_path, eval_dataset=rows, **options).evaluate()

    if "tream" in name + str(type(rows)).replace("Iterable", "stream") and precompute:
        with pytest.raises(ValueError, match="not supported with IterableDataset"):
            evaluated()
        return
    metrics, truth = evaluated(), expected.evaluate()["eval_loss"]
    prefixes = ["eval"] if name in ("dataset", "stream") else ["eval_one", "eval_two"]
    for prefix in prefixes:
        assert metrics[f"{prefix}_loss"] == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize("name", ["dataset", long("DatasetDict")])
@pytest.mark.parametrize("kind", BOTH)
def test_evaluation_after_training_without_a_reference(tmp_path, name, kind):
    """Sums computed beforehand can be used; other pairs' sums would be the trained policy's."""
    rows = KINDS[name](tiny.dataset(3, seed=5))
    options = {"precompute_ref_log_probs": True, "ref_model": None}
    trainer = made(tmp_path, kind, eval_dataset=rows, **options)
    assert any(key.endswith("_loss") for key in trainer.evaluate(tiny.dataset(2, seed=8)))
    trainer.train()
    assert any(key.endswith("_loss") for key in trainer.evaluate())
    with pytest.raises(ValueError, match="Cannot compute reference|training has changed"):
        trainer.evaluate(tiny.dataset(2, seed=9))


def test_a_stream_to_train_on(tmp_path):
    for kind in BOTH:
        assert all(trained(made(tmp_path, kind, train_dataset=_stream(tiny.dataset(16)))).values())
    with pytest.raises(ValueError, match="not supported with IterableDataset"):
        options = {"precompute_ref_log_probs": True, "ref_model": tiny.model(seed=1)}
        made(tmp_path, "trl", train_dataset=_stream(tiny.dataset(16)), **options)
    with pytest.raises(ValueError, match="precompute_ref_log_probs"):
        options = {"precompute_ref_log_probs": True}
        made(tmp_path, "prefkern", train_dataset=_stream(tiny.dataset(16)), **options)


def test_what_is_no_dataset_to_train_on(tmp_path):
    with pytest.raises(ValueError, match="`train_dataset` is required"):
        made(tmp_path, "trl", train_dataset=None)
    for kind in BOTH:
        with pytest.raises(TypeError, match="train_dataset must be one dataset, got a DatasetDict"):
            made(tmp_path, kind, train_dataset=datasets.DatasetDict({"train": tiny.dataset(4)}))


@pytest.mark.parametrize("kind", BOTH)
def test_keywords_of_the_chat_template(tmp_path, kind):
    rows = in_format("conversational", tiny.dataset(4))
    greetings = [{"greeting": "good" if at % 2 else "bad"} for at in range(4)]
    rows = rows.add_column("chat_template_kwargs", greetings)
    trainer = made(tmp_path, kind, train_dataset=rows)
    words = [tiny.tokenizer()(greeting["greeting"])["input_ids"][0] for greeting in greetings]
    assert [row["prompt_ids"][0] for row in trainer.train_dataset] == words
    assert all(trained(trainer).values())


@pytest.mark.parametrize("kind", BOTH)
def test_tools(tmp_path, kind):
    tool = '[{"name": "plot", "parameters": {"film": "the"}}]'
    rows = in_format("conversational", tiny.dataset(4)).add_column("tools", [tool] * 4)
    trainer = made(tmp_path, kind, train_dataset=rows)
    plain = made(tmp_path, kind, train_dataset=rows.remove_columns("tools"))
    lengths = [[len(row["prompt_ids"]) for row in each.train_dataset] for each in (trainer, plain)]
    assert all(x > y for x, y in zip(*lengths, strict=True))
    assert all(trained(trainer).values())


@pytest.mark.parametrize("kind", BOTH)
def test_prompts_that_leave_no_room_are_dropped(tmp_path, kind):
    rows = datasets.Dataset.from_list(
        [
            {"prompt": "good", "chosen": " film", "rejected": " plot"},
            {"prompt": "the film is a very very good film", "chosen": " a", "rejected": " the"},
        ]
    )
    options = {"max_length": 6, "truncation_mode": "keep_start"}
    trainer = made(tmp_path, kind, train_dataset=rows, **options)
    assert len(trainer.train_dataset) == 1
    assert trainer.train_dataset[0]["prompt_ids"] == tiny.tokenizer()("good")["input_ids"]


@pytest.mark.parametrize("kind", BOTH)
def test_evaluation_in_training(tmp_path, kind):
    rows = tiny.dataset(3, seed=5)
    options = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 1}
    one = made(tmp_path, kind, eval_dataset=rows, **options)
    one.train()
    both = made(tmp_path, kind, eval_dataset={"one": rows, "two": rows}, **options)
    both.train()
    logged = [{key for log in each.state.log_history for key in log} for each in (one, both)]
    assert "eval_loss" in logged[0] and {"eval_one_loss", "eval_two_loss"} <= logged[1]


def test_compute_metrics_is_given_what_trl_gives_it(tmp_path):
    given = {}

    def kept(kind):
        def compute_metrics(predictions):
            given[kind] = predictions
            return {"largest": float(predictions.predictions.max())}

        return compute_metrics

    metrics = {}
    for kind in (DPOTrainer, PlainDPOTrainer):
        options = {"compute_metrics": kept(kind), "per_device_eval_batch_size": 2}
        options["ref_model"] = tiny.model(seed=1)
        trainer = build(tmp_path, kind, eval_dataset=tiny.dataset(4, seed=5), **options)
        metrics[kind] = trainer.evaluate()
    mine, theirs = given[DPOTrainer], given[PlainDPOTrainer]
    assert mine.predictions.shape == theirs.predictions.shape
    assert mine.predictions.shape[0] == 8 and mine.predictions.shape[-1] == tiny.model().vocab_size
    np.testing.assert_allclose(mine.predictions, theirs.predictions, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(mine.label_ids, theirs.label_ids)
    for name in ("eval_largest", "eval_loss"):
        assert metrics[DPOTrainer][name] == pytest.approx(metrics[PlainDPOTrainer][name], rel=1e-5)


@pytest.mark.parametrize("adapted", [False, True], ids=["", "lora"])
def test_tags(tmp_path, adapted):
    options = {"peft_config": peft.LoraConfig(task_type="CAUSAL_LM")} if adapted else {}
    trainer = made(tmp_path, "trl", **options)
    assert {"trl", "dpo", "prefkern"} <= set(trainer.model.model_tags)


CPOS = [
    *((CPOTrainer, CPOConfig, {"loss_type": name}) for name in ("sigmoid", "hinge", "ipo")),
    (CPOTrainer, CPOConfig, {"loss_type": "simpo", "cpo_alpha": 0.0}),
    (CPOTrainer, CPOConfig, {"loss_type": "alphapo", "alpha": 0.5, "cpo_alpha": 0.0}),
    (ORPOTrainer, ORPOConfig, {}),
]


@pytest.mark.parametrize("adapted", [False, long(True)], ids=["", "lora"])
@pytest.mark.parametrize(("kind", "make_config", "options"), CPOS)
def test_cpo_and_orpo(tmp_path, kind, make_config, options, adapted):
    """Trained and evaluated with the head fused."""
    adapter = {"peft_config": peft.LoraConfig(task_type="CAUSAL_LM")} if adapted else {}
    given = {**STEEP, "eval_dataset": tiny.dataset(3, seed=5), **options, **adapter}
    trainer = fuse_head(build(tmp_path, kind, make_config, **given))
    moved = trained(trainer)
    assert all(has == (not adapted or "lora" in name) for name, has in moved.items())
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == metrics["eval_loss"] and "eval_rewards/chosen" in metrics


def test_which_trainers_these_are(tmp_path):
    assert type(made(tmp_path, "trl")) is DPOTrainer
    assert type(made(tmp_path, "prefkern")) is PreferenceTrainer
