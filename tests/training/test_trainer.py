"""PreferenceTrainer against TRL, hand-written formulas and itself resumed."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
import transformers

from support import tiny

pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")

import prefkern
from prefkern import PreferenceConfig, PreferenceTrainer, objectives
from prefkern.data.collate import PreferenceCollator
from support.training import (
    assert_same_weights,
    config,
    lora,
    step_logs,
    trainer,
    weights,
)


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_dpo_trains_as_trls_does(tmp_path, adapted):
    trl = pytest.importorskip("trl")
    arguments = config(tmp_path).to_dict()
    names = {field.name for field in trl.DPOConfig.__dataclass_fields__.values()}
    # A beta of None is the objective's own; TRL's own is the same.
    skipped = ("accelerator_config", "beta")
    shared = {k: v for k, v in arguments.items() if k in names and k not in skipped}
    theirs = trl.DPOTrainer(
        tiny.model(),
        ref_model=None if adapted else tiny.model(),
        args=trl.DPOConfig(**{**shared, "model_init_kwargs": None}),
        train_dataset=tiny.dataset(12),
        processing_class=tiny.tokenizer(),
        peft_config=lora() if adapted else None,
    )
    ours = trainer(tmp_path, objective="dpo", peft_config=lora() if adapted else None)
    if adapted:
        ours.model.load_state_dict(theirs.model.state_dict())
    ours.train()
    theirs.train()

    assert len(step_logs(ours)) == len(step_logs(theirs)) == 3
    for mine, reference in zip(step_logs(ours), step_logs(theirs), strict=True):
        missing = {"rewards/chosen", "logps/chosen", "entropy", "logits/chosen"} - mine.keys()
        assert not missing
        for name in reference.keys() - {"num_tokens"}:
            assert mine[name] == pytest.approx(reference[name], rel=1e-4, abs=1e-5), name
    assert_same_weights(weights(ours.model), weights(theirs.model), atol=1e-4, rtol=1e-3)


def _oracle_metrics(model, reference, rows, beta: float, clip: float) -> dict[str, float]:
    """AdaDPO's loss and every metric from full logits, one response at a time."""
    tokenizer = tiny.tokenizer()
    sums: dict[str, float] = {}

    def response(row, key):
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = torch.tensor([tokenizer(row["prompt"] + row[key])["input_ids"] + [1]])
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
        ref_logits = reference(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
        targets = ids[0, len(prompt) :]
        logps = logits.log_softmax(-1)
        return {
            "n": len(targets),
            "logp": logps.gather(-1, targets[:, None]).sum(),
            "ref": ref_logits.log_softmax(-1).gather(-1, targets[:, None]).sum(),
            "entropy": -(logps.exp() * logps).sum(),
            "logits": logits.mean(-1).sum(),
            "top1": (logits.argmax(-1) == targets).sum(),
        }

    pairs = [(response(row, "chosen"), response(row, "rejected")) for row in rows]
    for w, r in pairs:
        rho_w, rho_r = w["logp"] - w["ref"], r["logp"] - r["ref"]
        ratio = (rho_w / w["n"] - rho_r / r["n"]).exp()
        beta_w = beta * min(ratio, clip)
        values = {
            "loss": -F.logsigmoid(beta_w * rho_w - beta * rho_r),
            "rewards/chosen": beta_w * rho_w,
            "rewards/rejected": beta * rho_r,
            "rewards/margins": beta_w * rho_w - beta * rho_r,
            "rewards/accuracies": float(beta_w * rho_w > beta * rho_r),
            "rewards/base_margins": beta * (rho_w - rho_r),
            "rewards/base_accuracies": float(rho_w > rho_r),
            "logps/chosen": w["logp"],
            "logps/rejected": r["logp"],
            "adaptive/beta_ratio": beta_w / beta,
            "adaptive/clip_fraction": float(ratio >= clip),
        }
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + float(value) / len(pairs)
    chosen_tokens, rejected_tokens = (sum(pair[i]["n"] for pair in pairs) for i in (0, 1))

    def total(name, *sides):
        return sum(float(pair[side][name]) for pair in pairs for side in sides)

    sums["entropy"] = total("entropy", 0, 1) / (chosen_tokens + rejected_tokens)
    sums["logits/chosen"] = total("logits", 0) / chosen_tokens
    sums["logits/rejected"] = total("logits", 1) / rejected_tokens
    sums["mean_token_accuracy"] = total("top1", 0) / chosen_tokens
    return sums


@pytest.mark.parametrize(
    ("family", "transform"),
    [("Gemma2", {"final_logit_softcapping": 3.0}), ("Cohere", {"logit_scale": 0.25})],
)
@torch.no_grad()
def test_evaluation_of_an_uneven_batch_is_the_mean_over_pairs(tmp_path, family, transform):
    model, reference = (tiny.model(family, seed, **transform) for seed in (0, 1))
    rows = tiny.pairs(7, seed=3)
    options = {"clip": 1.02}
    evaluated = trainer(
        tmp_path,
        model=model,
        ref_model=reference,
        objective="adadpo",
        objective_options=options,
        per_device_eval_batch_size=3,
    )
    heads = []
    model.lm_head.register_forward_hook(lambda m, i, out: heads.append(out.shape[-1]))
    prefkern.models.head_transform(model)  # the probe holds logits of four tokens
    heads.clear()
    metrics = evaluated.evaluate(datasets.Dataset.from_list(rows))
    assert heads == [1, 1, 1]
    expected = _oracle_metrics(model, reference, rows, 0.1, 1.02)
    assert 0 < expected["adaptive/clip_fraction"] < 1
    for name, value in expected.items():
        assert metrics[f"eval_{name}"] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_accumulation_trains_as_one_batch_does(tmp_path):
    """11 pairs: a step of 8 and one of 3, as 1 x 8, 4 x 2 and 8 x 1."""
    runs = {}
    for size in (8, 2, 1):
        run = trainer(
            tmp_path,
            count=11,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            optim="sgd",
            max_grad_norm=0.0,
            learning_rate=1.0,
        )
        run.train()
        runs[size] = (weights(run.model), step_logs(run))
    for size in (2, 1):
        assert_same_weights(runs[size][0], runs[8][0], atol=2e-6, rtol=1e-4)
        for mine, reference in zip(runs[size][1], runs[8][1], strict=True):
            for name in reference.keys() - {"epoch"}:
                assert mine[name] == pytest.approx(reference[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("reference", ["copy", "adapter", "precomputed", "precomputed adapter"])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_first_loss_is_ln2(tmp_path, reference, bf16):
    run = trainer(
        tmp_path,
        bf16=bf16,
        max_steps=1,
        peft_config=lora() if "adapter" in reference else None,
        precompute_ref_log_probs="precomputed" in reference,
    )
    assert (run.ref_model is not None) == (reference == "copy")
    run.train()
    assert step_logs(run)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert prefkern.last_plan().backend == "torch"


def test_precomputed_sums_train_like_a_reference_model(tmp_path):
    separate = trainer(tmp_path, ref_model=tiny.model(seed=1))
    computed = trainer(tmp_path, ref_model=tiny.model(seed=1), precompute_ref_log_probs=True)
    carried = trainer(tmp_path, train_dataset=computed.train_dataset)
    assert carried.ref_model is None
    for run in (separate, computed, carried):
        run.train()
    for run in (computed, carried):
        assert_same_weights(weights(run.model), weights(separate.model), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="which training has changed"):
        carried.evaluate(tiny.dataset(3))


def test_the_reference_of_a_trained_adapter_may_be_the_base_model(tmp_path):
    model = peft.get_peft_model(tiny.model(), lora())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    run = trainer(tmp_path, model=model, objective="dpo", ref_adapter_name="__base__")
    rows = tiny.pairs(4)
    metrics = run.evaluate(datasets.Dataset.from_list(rows))
    with torch.no_grad():
        expected = _oracle_metrics(model.eval(), tiny.model(), rows, 0.1, 2.0)
    # Plain DPO: the rewards are those at the base beta.
    assert metrics["eval_rewards/margins"] == pytest.approx(
        expected["rewards/base_margins"], rel=1e-3, abs=1e-5
    )
    assert abs(expected["rewards/base_margins"]) > 1e-3


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, adapted):
    whole, resumed = (
        trainer(
            tmp_path,
            count=16,
            save_strategy="steps",
            save_steps=2,
            peft_config=lora() if adapted else None,
            lr_scheduler_type="linear",
        )
        for _ in range(2)
    )
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == whole.state.global_step == 4
    assert_same_weights(weights(resumed.model), weights(whole.model), atol=0, rtol=0)
    for mine, reference in zip(step_logs(resumed), step_logs(whole), strict=True):
        for name in ("loss", "rewards/margins", "logps/chosen"):
            assert mine[name] == reference[name]


def test_what_is_saved_loads_without_prefkern(tmp_path):
    ids = torch.arange(3, 12)[None]
    adapted = trainer(tmp_path, peft_config=lora())
    adapted.train()
    adapted.save_model(str(tmp_path / "adapter"))
    loaded = peft.PeftModel.from_pretrained(tiny.model(), str(tmp_path / "adapter"))
    expected = adapted.model.eval()(input_ids=ids).logits
    assert (expected - tiny.model()(input_ids=ids).logits).abs().max() > 1e-3
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected)

    full = trainer(tmp_path)
    full.train()
    full.save_model(str(tmp_path / "full"))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    torch.testing.assert_close(
        model.eval()(input_ids=ids).logits, full.model.eval()(input_ids=ids).logits
    )
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "full").eos_token == "<eos>"


def test_lora_with_gradient_checkpointing_learns(tmp_path):
    run = trainer(
        tmp_path,
        count=16,
        objective=objectives.DPO(beta=0.5),
        peft_config=lora(),
        gradient_checkpointing=True,
        num_train_epochs=6,
        eval_dataset={"one": tiny.dataset(4), "two": tiny.dataset(4, 1)},
        eval_strategy="epoch",
    )
    base = copy.deepcopy(weights(run.model))
    run.train()
    losses = [log["loss"] for log in step_logs(run)]
    assert losses[-1] < losses[0] - 0.2
    changed = {name for name, w in weights(run.model).items() if not torch.equal(w, base[name])}
    assert changed == {name for name, p in run.model.named_parameters() if p.requires_grad}
    evaluated = {key for log in run.state.log_history for key in log}
    assert {"eval_one_loss", "eval_two_rewards/accuracies"} <= evaluated


def test_metrics_between_logs_are_means_over_pairs(tmp_path):
    """Steps of 4, 4 and 2 pairs, logged each or all at once."""
    each = trainer(tmp_path, count=10, learning_rate=0.0)
    whole = trainer(tmp_path, count=10, learning_rate=0.0, logging_steps=3)
    each.train()
    whole.train()
    parts = step_logs(each)
    for name in ("logps/chosen", "logps/rejected", "rewards/margins"):
        mean = sum(n * log[name] for n, log in zip((4, 4, 2), parts, strict=True)) / 10
        assert step_logs(whole)[0][name] == pytest.approx(mean, rel=1e-5)


def test_adapters_start_from_the_seed(tmp_path):
    runs = []
    for state in (1, 2):
        torch.manual_seed(state)
        model = tiny.model()
        torch.manual_seed(state)
        runs.append(weights(trainer(tmp_path, model=model, peft_config=lora()).model))
    assert_same_weights(*runs, atol=0, rtol=0)


def test_dropout_is_off_unless_asked_for(tmp_path):
    dropping = peft.LoraConfig(r=4, lora_dropout=0.5)
    for disable in (True, False):
        run = trainer(
            tmp_path,
            # An adapter that comes with its model is the model's.
            model=peft.get_peft_model(tiny.model(), dropping),
            disable_dropout=disable,
        )
        rates = {m.p for m in run.model.modules() if isinstance(m, torch.nn.Dropout)}
        assert rates == ({0.0} if disable else {0.5})
    trainer(tmp_path, peft_config=dropping, disable_dropout=False)
    with pytest.raises(ValueError, match="lora_dropout has no effect under disable_dropout"):
        trainer(tmp_path, peft_config=dropping)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Llama", {"attention_dropout": 0.5}),
        ("GPT2", {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5}),
        # reads its rates off the config at every call
        ("Falcon", {"hidden_dropout": 0.5, "attention_dropout": 0.5}),
    ],
)
def test_no_kind_of_dropout_disturbs_the_first_loss(tmp_path, family, options):
    losses = {}
    for disable in (True, False):
        model = tiny.model(family, **options)
        run = trainer(
            tmp_path, model=model, objective="dpo", max_steps=1, disable_dropout=disable, beta=1.0
        )
        run.train()
        losses[disable] = step_logs(run)[0]["loss"]
    assert losses[True] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(losses[False] - math.log(2)) > 1e-3


@pytest.mark.parametrize(
    ("family", "rates"),
    [
        ("GPT2", {"attn_pdrop": 0.3, "resid_pdrop": 0.2, "embd_pdrop": 0.1}),
        ("Falcon", {"hidden_dropout": 0.5, "attention_dropout": 0.5}),
    ],
)
@pytest.mark.parametrize("disable", [True, False])
def test_a_saved_model_keeps_its_own_dropout(tmp_path, family, rates, disable):
    """Checkpoints and the final model have it; training runs without dropout."""
    run = trainer(
        tmp_path,
        model=tiny.model(family, **rates),
        max_steps=2,
        disable_dropout=disable,
        save_strategy="steps",
        save_steps=1,
    )
    run.train()
    run.save_model()
    for folder in ("checkpoint-1", "."):
        saved = json.loads((tmp_path / folder / "config.json").read_text())
        assert {name: saved[name] for name in rates} == rates
    used = {name: getattr(run.model.config, name) for name in rates}
    assert used == (dict.fromkeys(rates, 0.0) if disable else rates)


def test_config_can_be_parsed_from_flags():
    parser = transformers.HfArgumentParser(PreferenceConfig)
    flags = (
        '--objective adadpo --beta 0.2 --objective_options {"clip":3.0,"exponent":[0.1,0.2]} '
        "--max_length 512 --precompute_ref_log_probs --use_cpu --gradient_checkpointing false"
    )
    (parsed,) = parser.parse_args_into_dataclasses(flags.split(), look_for_args_file=False)
    adaptive = parsed.build_objective().adaptive
    assert (adaptive.clip, adaptive.exponent) == (3.0, (0.1, 0.2))
    assert parsed.build_objective().beta == 0.2
    assert not parsed.gradient_checkpointing
    assert (parsed.bf16, parsed.learning_rate) == (False, 1e-6)
    assert json.loads(parsed.to_json_string())["objective_options"]["clip"] == 3.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "adadopo"}, r"unknown objective 'adadopo' \(did you mean 'adadpo'\?\)"),
        ({"objective_options": {"klip": 1}}, r"no option 'klip' \(did you mean 'clip'\?\)"),
        ({"beta": -1.0}, "beta must be a finite number > 0"),
        ({"objective_options": "{clip"}, "objective_options is not JSON"),
        ({"objective_options": "3"}, "must be a JSON object"),
        ({"label_smoothing_factor": 0.1}, "no effect on preference pairs"),
        (
            {"average_tokens_across_devices": False},
            "average_.* has no effect .* and is False; leave",
        ),
        ({"batch_eval_metrics": True}, "batch_eval_metrics has no effect on preference pairs"),
        (
            {"eval_accumulation_steps": 2},
            "eval_accumulation_steps has no effect .* and is 2; leave",
        ),
        ({"eval_do_concat_batches": False}, "eval_do_concat_batches has no effect on"),
        ({"eval_use_gather_object": True}, "eval_use_gather_object has no effect on"),
        (
            {"include_for_metrics": ["inputs"]},
            "include_for_metrics has no effect .* is .'inputs'.;",
        ),
        ({"label_names": ["labels"]}, "label_names has no effect on preference pairs"),
        ({"length_column_name": "n"}, "length_column_name has no effect on preference pairs"),
        ({"prediction_loss_only": True}, "prediction_loss_only has no effect on"),
        ({"torch_compile": True}, "torch_compile is not supported"),
        ({"backend": "cuda"}, "backend must be None or one of 'triton', 'torch', got 'cuda'"),
        ({"workspace_mb": 0}, "workspace_mb must be > 0"),
        ({"ref_cache_dir": "here"}, "ref_cache_dir is 'here', which has no effect without"),
        ({"precompute_ref_batch_size": 2}, "precompute_ref_batch_size is 2, which has no effect"),
        ({"objective": "simpo", "precompute_ref_log_probs": True}, "objective has no reference"),
        ({"objective": "simpo", "ref_model_name_or_path": "other"}, "'other', and this objective"),
        ({"max_length": 1}, "max_length must be None or an int >= 2, got 1"),
        ({"max_length": 12.5}, "max_length must be None or an int"),
        ({"max_prompt_length": 0}, "max_prompt_length must be None or an int >= 1"),
        ({"train_sampling_strategy": "group_by_length"}, "batches by length are not supported"),
    ],
)
def test_wrong_arguments_are_found_before_anything_is_loaded(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        PreferenceTrainer("no/such-model", config(tmp_path, **options), tiny.dataset(4))


def test_wrong_data_and_models(tmp_path):
    wrong = tiny.dataset(4).remove_columns("rejected")
    with pytest.raises(ValueError, match="no column 'rejected'"):
        PreferenceTrainer("no/such-model", config(tmp_path), wrong)
    with pytest.raises(ValueError, match="'eval' has no column"):
        PreferenceTrainer("no/such-model", config(tmp_path), tiny.dataset(4), wrong)
    with pytest.raises(ValueError, match="'train' is empty"):
        PreferenceTrainer("no/such-model", config(tmp_path), tiny.dataset(4).select([]))
    with pytest.raises(ValueError, match="DoraLinearVariant.*leave the head out"):
        dora = peft.LoraConfig(target_modules=["lm_head"], use_dora=True)
        trainer(tmp_path, peft_config=dora)
    with pytest.raises(ValueError, match="PEFT model already"):
        trainer(tmp_path, model=peft.get_peft_model(tiny.model(), lora()), peft_config=lora())


def test_wrong_kinds_of_arguments(tmp_path):
    plain = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(TypeError, match="args must be a PreferenceConfig, got TrainingArguments"):
        PreferenceTrainer(tiny.model(), plain, tiny.dataset(4))
    for model in (None, 3):
        with pytest.raises(TypeError, match="model must be a causal LM"):
            PreferenceTrainer(model, config(tmp_path), tiny.dataset(4))
    with pytest.raises(ValueError, match="ref_model is 'LlamaForCausalLM', and this objective has"):
        PreferenceTrainer(
            tiny.model(),
            config(tmp_path, objective="simpo"),
            tiny.dataset(4),
            processing_class=tiny.tokenizer(),
            ref_model=tiny.model(seed=1),
        )
    for options, message in (
        ({"ref_model_name_or_path": "other"}, "ref_model was given, and .* is 'other': give one"),
        ({"model_init_kwargs": {"dtype": "bfloat16"}}, "no effect on a model that is loaded"),
        ({"bf16_full_eval": True}, "bf16_full_eval casts the policy and not its reference"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, ref_model=tiny.model(seed=1), **options)
    noisy = {"neftune_noise_alpha": 5.0, "objective": "dpo"}
    with pytest.raises(ValueError, match="neftune_noise_alpha=5.0 scales .* under padding_free"):
        trainer(tmp_path, padding_free=True, **noisy)
    with pytest.raises(ValueError, match="neftune_noise_alpha=5.0 adds its noise to the reference"):
        trainer(tmp_path, peft_config=lora(), **noisy)
    with pytest.raises(ValueError, match="pad_to_multiple_of has no effect on a data_collator"):
        trainer(tmp_path, pad_to_multiple_of=8, data_collator=PreferenceCollator(0))
    model = tiny.model()
    with pytest.raises(ValueError, match="ref_model is the model that is trained"):
        trainer(tmp_path, model=model, ref_model=model)
    # PEFT puts its layers into the model it is given.
    with pytest.raises(ValueError, match="ref_model is the model that is trained"):
        trainer(tmp_path, model=peft.get_peft_model(model, lora()), ref_model=model)


def test_rows_without_their_numbers_are_named_before_training(tmp_path):
    for column, message in (("margin", "margin"), ("reward_margin", "margin")):
        rows = tiny.dataset(4).add_column(column, [0.5, None, 0.5, 0.5])
        with pytest.raises(ValueError, match=f"dataset 'train', row 1: no {message}"):
            trainer(tmp_path, train_dataset=rows, objective="madpo")
    sums = tiny.dataset(4).add_column("ref_chosen_logps", [-1.0] * 4)
    sums = sums.add_column("ref_rejected_logps", [-1.0, -1.0, None, -1.0])
    with pytest.raises(ValueError, match="dataset 'train', row 2: no reference sum"):
        trainer(tmp_path, train_dataset=sums)


def test_evaluation_casts_an_adapter_and_its_base_alike(tmp_path):
    """Else reference sums would be of the weights before the cast."""
    adapted = {"peft_config": lora(), "bf16_full_eval": True, "eval_dataset": tiny.dataset(4)}
    assert trainer(tmp_path, **adapted).evaluate()["eval_rewards/margins"] == 0
    with pytest.raises(ValueError, match="casts the policy and not its reference"):
        trainer(tmp_path, precompute_ref_log_probs=True, **adapted)


def test_noise_of_embeddings_is_the_policys_alone(tmp_path):
    """Sums that are computed before training have none, nor has a reference model."""
    for reference in ({"precompute_ref_log_probs": True}, {"ref_model": tiny.model()}):
        adapted = {"peft_config": lora()} if "ref_model" not in reference else {}
        wanted = []
        for alpha in (None, 5.0):
            run = trainer(
                tmp_path,
                objective="dpo",
                neftune_noise_alpha=alpha,
                max_steps=1,
                eval_dataset=tiny.dataset(4),
                **reference,
                **adapted,
            )
            before = run.evaluate()["eval_loss"]
            run.train()
            wanted.append((before, step_logs(run)[0]["loss"]))
        (quiet, first), (noisy_before, noisy_first) = wanted
        assert quiet == noisy_before == pytest.approx(math.log(2), abs=1e-6)
        assert first == pytest.approx(math.log(2), abs=1e-6) != noisy_first


def test_a_model_that_is_no_number_is_not_trained(tmp_path):
    """transformers would log a loss of 0."""
    run = trainer(tmp_path, objective="simpo", max_steps=1)
    transform = prefkern.models.head_transform(run.model)
    with torch.no_grad():
        run.model.model.norm.weight[0] = math.nan
    # Of a model that comes with them, the weights are named.
    probed = run.model.__dict__.pop("_prefkern_head_transform")
    with pytest.raises(ValueError, match="not finite: model.norm.weight holds nan or inf"):
        run.evaluate(tiny.dataset(4))
    run.model.__dict__["_prefkern_head_transform"] = probed
    assert prefkern.models.head_transform(run.model) == transform
    with pytest.raises(FloatingPointError, match="hidden: "):
        run.train()
    assert run.state.global_step == 0


def test_margins_go_only_to_objectives_that_use_them(tmp_path):
    class Margins(objectives.DPO):
        needs_reward_margins = True

        def forward(self, pairs):
            seen.append(pairs.reward_margins)
            return super().forward(pairs)

        def pair_kernel_options(self):
            return None

    class Plain(Margins):
        needs_reward_margins = False

    rows = tiny.dataset(4).add_column("margin", [0.5] * 4)
    for objective, expected in ((Margins(), [0.5] * 4), (Plain(), None)):
        seen = []
        trainer(tmp_path, train_dataset=rows, objective=objective).train()
        assert len(seen) == 1
        assert (seen[0] if seen[0] is None else seen[0].tolist()) == expected


def test_dropping_the_last_batch_has_to_leave_one(tmp_path):
    message = "'train' has 3 pairs, fewer than a batch of 4 .* dataloader_drop_last"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, count=3, dataloader_drop_last=True)
    run = trainer(tmp_path, count=5, dataloader_drop_last=True, per_device_eval_batch_size=4)
    run.train()
    assert run.state.global_step == 1
    with pytest.raises(ValueError, match="'eval' has 3 pairs"):
        run.evaluate(tiny.dataset(3))


@pytest.mark.parametrize("precompute", [False, True])
def test_predict_takes_raw_pairs_as_evaluate_does(tmp_path, precompute):
    run = trainer(tmp_path, ref_model=tiny.model(seed=1), precompute_ref_log_probs=precompute)
    evaluated = run.evaluate(tiny.dataset(5, 2))
    predicted = run.predict(tiny.dataset(5, 2))
    assert predicted.predictions is None
    names = {n.removeprefix("test_") for n in predicted.metrics if "rewards" in n or "loss" in n}
    assert len(names) > 4
    for name in names:
        assert predicted.metrics[f"test_{name}"] == evaluated[f"eval_{name}"]
