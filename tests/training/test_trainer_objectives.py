"""Every objective in the trainer: against float64 full logits, TRL's trainers, and resumed."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from support import tiny

pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")

import prefkern
from prefkern import PreferenceTrainer, objectives, reference
from prefkern.models.scoring import align_labels
from prefkern.models.transform import head_transform
from prefkern.training import metrics
from support.training import (
    MARGINS,
    Record,
    assert_same_weights,
    config,
    lora,
    made,
    margin_rows,
    reference_for,
    rows_of,
    single_rows,
    step_logs,
    trainer,
    weights,
)

LN2 = math.log(2)


@torch.no_grad()
def measured(model, ref_model, prompt: str, text: str) -> dict[str, float]:
    """The measurements of one response, from full logits in float64."""
    tokenizer = tiny.tokenizer()
    start = len(tokenizer(prompt)["input_ids"])
    ids = torch.tensor([tokenizer(prompt + text)["input_ids"] + [tokenizer.eos_token_id]])
    targets = ids[0, start:, None]

    def log_probs(of):
        return of(input_ids=ids).logits[0, start - 1 : -1].double().log_softmax(-1)

    log_p, log_r = log_probs(model), log_probs(ref_model)
    logps = log_p.gather(-1, targets)[:, 0]
    collision = log_p.exp().square().sum(-1).log()
    return {
        "n": len(targets),
        "logp": logps.sum().item(),
        "rho": (logps - log_r.gather(-1, targets)[:, 0]).sum().item(),
        "alignment": (logps - collision).mean().item(),
        "kl": (log_r.exp() * (log_r - log_p)).sum().item(),
    }


def measured_pairs(model, ref_model, rows: list[dict]) -> list[tuple[dict, dict]]:
    return [
        tuple(
            measured(model, ref_model, row["prompt"], row[side]) for side in ("chosen", "rejected")
        )
        for row in rows
    ]


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def softplus(x: float) -> float:
    return F.softplus(torch.tensor(x, dtype=torch.float64)).item()


def simpo_loss(pairs, beta: float, gamma: float) -> float:
    return mean(
        softplus(gamma - beta * (w["logp"] / w["n"] - r["logp"] / r["n"])) for w, r in pairs
    )


def omnidpo_loss(pairs) -> float:
    """Its two weights at the defaults; a model that is its reference is not below it."""
    weights = (
        1 / (1 + math.exp(-0.7 * h))
        / (1 + math.exp(2.0 * (w["logp"] / w["n"] - r["logp"] / r["n"]) - 0.8)) ** 3
        for h, (w, r) in zip(MARGINS, pairs, strict=False)
    )  # fmt: skip
    return LN2 * mean(weights)


def madpo_weight(h: float, tau: float = 7.0, c_max: float = 4.0, c_min: float = 0.25) -> float:
    """MADPO's Eq. 4 and 5 as they are printed."""
    if h <= -tau:
        return 1.0
    k = (c_max - 1) / (1 - c_min)
    c = c_min + (c_max - c_min) / (1 + k * math.exp(abs(h) - tau))
    return (1 + math.exp(-h)) / (1 + math.exp(-c * h))


# Hyper-parameters that first losses below are written for.
OPTIONS = {
    "ipo": {"tau": 0.1},
    "adaipo": {"tau": 0.1},
    "rdpo": {"alpha": 0.05},
    "adardpo": {"alpha": 0.05},
    "simpo": {"beta": 2.0, "gamma": 1.0},
    "alphadpo": {"beta": 10.0, "gamma": 3.0},
    "madpo": {"tau": 7.0, "c_max": 4.0, "c_min": 0.25},
}
# The first loss of a model that is its own reference; None where it depends on the model's logits
# in ways that `test_one_step_against_float64_logits` is about.
FIRST_LOSS = {
    "dpo": lambda pairs: LN2,
    "lndpo": lambda pairs: LN2,
    "robust": lambda pairs: LN2,
    "hinge": lambda pairs: 1.0,
    "ipo": lambda pairs: 25.0,  # (1 / (2 tau))^2 at tau = 0.1
    "rdpo": lambda pairs: mean(softplus(0.05 * (w["n"] - r["n"])) for w, r in pairs),
    # KL((1/2, 1/2) || (1 - e, e)), e = 1e-3
    "exo": lambda pairs: -LN2 - math.log(0.999e-3) / 2,
    "discopop": lambda pairs: (LN2 + 1) / 2,
    "nca": lambda pairs: 2 * LN2,
    "sppo": lambda pairs: 50.0,  # 2 (1 / (2 beta))^2 at beta = 0.1
    "apozero": lambda pairs: 1.0,
    "apodown": lambda pairs: 1.0,
    "cpo": None,
    "orpo": None,
    "simpo": lambda pairs: simpo_loss(pairs, 2.0, 1.0),
    "sft": lambda pairs: mean(-w["logp"] / w["n"] for w, _ in pairs),
    "tpo": None,
    # Gaps of 0 have no spread, and so no z-score.
    "alphadpo": lambda pairs: simpo_loss(pairs, 10.0, 3.0),
    "madpo": lambda pairs: LN2 * mean(map(madpo_weight, MARGINS[:4])),
    "omnidpo": omnidpo_loss,
    "betadpo": lambda pairs: LN2,
    "bco": lambda pairs: 2 * LN2,
    "aot": lambda pairs: LN2,
    "aotunpaired": lambda pairs: LN2,
    "tdpo1": lambda pairs: LN2,
    "tdpo2": lambda pairs: LN2,
    "kto": lambda pairs: 0.5,
}
# Ratios of 1, or scores of 0.
OF_RATIOS = (
    *("dpo", "lndpo", "robust", "hinge", "ipo", "rdpo", "exo", "discopop", "nca", "sppo"),
    *("apozero", "apodown", "omnidpo", "aotunpaired"),
)
FIRST_LOSS |= {f"ada{name}": FIRST_LOSS[name] for name in OF_RATIOS}
FIRST_LOSS["adabco"] = FIRST_LOSS["bco"]
FIRST_LOSS |= dict.fromkeys(("adacpo", "adaorpo", "adasimpo", "adatpo", "adaaot"))


def trained(run: PreferenceTrainer) -> list[dict]:
    """Train; assert that weights changed, logits were never made, and logs are numbers."""
    widths = []
    before = weights(run.model)
    head_transform(run.model)  # its probe holds the logits of four tokens
    head = run.model.get_output_embeddings()
    handle = head.register_forward_hook(lambda m, i, out: widths.append(out.shape[-1]))
    run.train()
    handle.remove()
    assert set(widths) == {1}
    assert prefkern.last_plan().backend == "torch"
    moved = [n for n, w in weights(run.model).items() if not torch.equal(w, before[n])]
    assert len(moved) > 0.5 * sum(p.requires_grad for p in run.model.parameters())
    for log in step_logs(run):
        assert all(math.isfinite(value) for value in log.values()), log
        assert log["grad_norm"] > 1e-6
    return step_logs(run)


def test_the_table_is_complete():
    assert FIRST_LOSS.keys() == set(objectives.names())


@pytest.mark.parametrize("name", FIRST_LOSS)
def test_every_objective_trains_from_its_first_loss(tmp_path, name):
    rows = rows_of(name)
    run = trainer(
        tmp_path,
        objective=name,
        objective_options=OPTIONS.get(name),
        train_dataset=made(rows),
        train_sampling_strategy="sequential",
    )
    needs_copy = run.loss_fn.objective.needs_reference
    assert (run.ref_model is not None) == needs_copy
    expected = FIRST_LOSS[name]
    if expected is not None:
        expected = expected(measured_pairs(tiny.model(), tiny.model(), rows[:4]))
    logs = trained(run)
    # KTO sees 16 responses in 8 pairs.
    assert len(logs) == (4 if name == "kto" else 2)
    if expected is not None:
        assert logs[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_kto_trains_on_single_responses(tmp_path):
    run = trainer(tmp_path, objective="kto", train_dataset=made(single_rows(8)))
    assert str(run.dataset_reports["train"]).startswith("train: 8 responses (0 dropped")
    logs = trained(run)
    assert len(logs) == 2
    assert logs[0]["loss"] == pytest.approx(0.5, abs=1e-6)
    assert logs[1]["kl"] >= 0


def test_mismatched_pairs_keep_to_the_bound(tmp_path):
    rows = [
        {"prompt": "the a was is film plot", "completion": " good", "label": True},
        {"prompt": "a", "completion": " very very very very good", "label": False},
    ]
    run = trainer(tmp_path, objective="kto", train_dataset=made(rows), max_length=8)
    batch = next(iter(run.get_train_dataloader()))
    assert batch["input_ids"].shape == batch["mismatched_input_ids"].shape == (2, 8)


def test_a_batch_of_one_prompt_takes_as_many_forwards(tmp_path):
    """A rank without a mismatched pair must still run the forward that other ranks wait in."""
    counts = {}
    for name, prompts in (("one", ["the"] * 4), ("two", ["the", "a"] * 2)):
        rows = [
            {**row, "prompt": prompt} for row, prompt in zip(single_rows(4), prompts, strict=True)
        ]
        model = tiny.model()
        run = trainer(tmp_path, model=model, objective="kto", train_dataset=made(rows))
        head_transform(model)  # its probe is a forward, too
        calls = []
        model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        run.train()
        assert step_logs(run)[0]["kl"] == 0
        counts[name] = len(calls)
    assert counts == {"one": 2, "two": 2}


@pytest.mark.parametrize("name", ["tdpo2", "kto", "alphadpo"])
@pytest.mark.parametrize("adapted", [False, True], ids=["copy", "adapter"])
def test_first_loss_in_bf16_is_that_of_equal_models(tmp_path, name, adapted):
    run = trainer(
        tmp_path,
        objective=name,
        objective_options=OPTIONS.get(name),
        bf16=True,
        max_steps=1,
        peft_config=lora() if adapted else None,
        train_sampling_strategy="sequential",
    )
    run.train()
    (log,) = step_logs(run)
    expected = {"tdpo2": LN2, "kto": 0.5}.get(name)
    if expected is not None:
        assert log["loss"] == pytest.approx(expected, abs=1e-6)
    for metric, value in (("kl/chosen", 0.0), ("kl", 0.0), ("alpha_dpo/margin", 3.0)):
        assert log.get(metric, value) == value, metric
    assert log["grad_norm"] > 1e-6


@pytest.mark.parametrize("name", ["tdpo2", "kto"])
def test_checkpointed_blocks_change_nothing(tmp_path, name):
    """With LoRA the reference is the same model, which runs once more before it is trained."""
    runs = [
        trainer(
            tmp_path,
            count=8,
            objective=name,
            peft_config=lora(),
            gradient_checkpointing=checkpointing,
        )
        for checkpointing in (False, True)
    ]
    for run in runs:
        trained(run)
    assert_same_weights(*(weights(run.model) for run in runs), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["tdpo1", "tdpo2"])
@pytest.mark.parametrize("kind", ["separate", "adapter"])
def test_tdpo_finds_the_references_distributions(tmp_path, name, kind):
    options = {"peft_config": lora()} if kind == "adapter" else {"ref_model": tiny.model(seed=1)}
    run = trainer(tmp_path, objective=name, count=8, **options)
    assert (run.ref_model is None) == (kind == "adapter")
    logs = trained(run)
    is_equal = kind == "adapter"
    assert (logs[0]["loss"] == pytest.approx(LN2, abs=1e-6)) == is_equal
    assert (logs[0]["kl/chosen"] == 0) == is_equal
    assert logs[1]["kl/chosen"] > 0 and logs[1]["kl/rejected"] > 0


def test_tdpo_refuses_a_reference_with_another_transform(tmp_path):
    run = trainer(
        tmp_path,
        objective="tdpo2",
        model=tiny.model("Gemma2", final_logit_softcapping=5.0),
        ref_model=tiny.model("Gemma2", seed=1, final_logit_softcapping=7.0),
    )
    with pytest.raises(ValueError, match="transform their logits differently"):
        run.train()


# name: (config, rows); one step of each is held against float64 logits.
ORACLES = {
    "adadpo": ({"objective": "adadpo", "objective_options": {"clip": 1.1}}, tiny.pairs),
    "robust, rpo_alpha": ({"objective": "robust", "rpo_alpha": 0.7}, tiny.pairs),
    "ipo": ({"objective": "ipo", "objective_options": {"length_normalized": True}}, tiny.pairs),
    "rdpo, adaptive": ({"objective": "adardpo"}, tiny.pairs),
    "orpo, adaptive": ({"objective": "adaorpo", "beta": 1.0}, tiny.pairs),
    "cpo": ({"objective": "cpo"}, tiny.pairs),
    "tpo": (
        {"objective": "tpo", "beta": 0.1, "objective_options": {"tpo_alpha": 0.7}},
        tiny.triples,
    ),
    "tpo-l, adaptive": (
        {"objective": "adatpo", "beta": 2.0, "objective_options": {"loss_type": "tpo-l"}},
        tiny.triples,
    ),
    "alphadpo": ({"objective": "alphadpo", "objective_options": {"alpha": 0.5}}, tiny.pairs),
    "madpo": ({"objective": "madpo", "beta": 0.5}, margin_rows),
    "betadpo": ({"objective": "betadpo", "objective_options": {"keep": 0.5}}, tiny.pairs),
    "bco": ({"objective": "bco"}, tiny.pairs),
    "aot": ({"objective": "adaaot"}, tiny.pairs),
    "aotunpaired": ({"objective": "aot_unpaired"}, tiny.pairs),
    "wpo": ({"objective": "dpo", "use_weighting": True}, tiny.pairs),
    "wpo, tdpo2, rpo_alpha": (
        {"objective": "tdpo2", "use_weighting": True, "rpo_alpha": 0.3},
        tiny.pairs,
    ),
    "tdpo1": ({"objective": "tdpo1", "beta": 0.5}, tiny.pairs),
    "tdpo2": ({"objective": "tdpo2", "beta": 0.5, "objective_options": {"alpha": 1.5}}, tiny.pairs),
    "kto": ({"objective": "kto", "objective_options": {"desirable_weight": 1.3}}, single_rows),
}


# Of policy and reference, such that KTO's reference point is above 0 before training.
SEEDS = {"Llama": (1, 0), "Gemma2": (0, 1)}


@pytest.mark.parametrize(
    ("name", "family"),
    [(name, "Llama") for name in ORACLES]
    + [(name, "Gemma2") for name in ("adadpo", "alphadpo", "wpo, tdpo2, rpo_alpha", "kto")],
)
def test_one_step_against_float64_logits(tmp_path, name, family):
    options, rows_from = ORACLES[name]
    transform = {"final_logit_softcapping": 5.0} if family == "Gemma2" else {}
    model, ref_model = (tiny.model(family, seed, **transform) for seed in SEEDS[family])
    rows = rows_from(4)
    record = Record()
    run = trainer(
        tmp_path,
        model=model,
        ref_model=reference_for(
            options["objective"], ref_model, **options.get("objective_options", {})
        ),
        train_dataset=made(rows),
        train_sampling_strategy="sequential",
        max_grad_norm=0.0,
        callbacks=[record],
        **options,
    )
    objective = copy.deepcopy(run.loss_fn.objective)
    batch = next(iter(run.get_train_dataloader()))
    policy, other = copy.deepcopy(model).double(), copy.deepcopy(ref_model).double()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    arguments = {}
    if options["objective"] == "kto":
        ratios = [
            measured(policy, other, row["prompt"], rows[(i + 1) % 4]["completion"])["rho"]
            for i, row in enumerate(rows)
        ]
        assert mean(ratios) > 1
        arguments = {
            "desirable": torch.tensor([row["label"] for row in rows]),
            "mismatched_log_ratios": torch.tensor(ratios, dtype=torch.float64),
        }
    if options["objective"] == "madpo":
        arguments["reward_margins"] = torch.tensor(MARGINS[:4], dtype=torch.float64)
    # With the identity as its head, the oracle takes the model's own logits for hidden states.
    identity = torch.eye(tiny.VOCAB_SIZE, dtype=torch.float64)
    if objective.needs_reference:
        with torch.no_grad():
            arguments |= {"ref_hidden": other(**inputs).logits, "ref_weight": identity}
    expected = reference.preference_loss(
        objective, policy(**inputs).logits, identity, align_labels(batch["labels"]), **arguments
    )
    expected.loss.backward()

    run.train()
    (gradients,) = record.gradients
    assert step_logs(run)[0]["loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
    true = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
    assert true.keys() == gradients.keys()
    total = torch.cat([gradient.flatten() for gradient in true.values()]).norm()
    for key, gradient in gradients.items():
        # The models' own norms and rotary embeddings are float32 in the oracle, too.
        assert (gradient.double() - true[key]).norm() < 1e-5 * total, key
    for key, values in getattr(expected, "metrics", {}).items():
        assert step_logs(run)[0][key] == pytest.approx(values.mean().item(), rel=1e-4), key


def shared_with(theirs_config, path: Path, **options) -> dict:
    """Our arguments that TRL's config has as well."""
    arguments = config(path, **options).to_dict()
    names = set(theirs_config.__dataclass_fields__)
    skipped = ("accelerator_config", "beta", "use_weighting", "model_init_kwargs")
    return {k: v for k, v in arguments.items() if k in names and k not in skipped}


def assert_same_runs(ours, theirs, names=None) -> None:
    """Assert the same logs (all of TRL's, or `names`), and the same weights at the end."""
    assert len(step_logs(ours)) == len(step_logs(theirs)) > 1
    for mine, true in zip(step_logs(ours), step_logs(theirs), strict=True):
        for name in names or true.keys() - {"num_tokens"}:
            assert mine[name] == pytest.approx(true[name], rel=1e-4, abs=1e-5), name
    assert_same_weights(weights(ours.model), weights(theirs.model), atol=1e-4, rtol=1e-3)


# loss: (TRL's options, ours, what of TRL's logs is not ours)
TRL_LOSSES = {
    "hinge": ({"loss_type": ["hinge"], "beta": 0.2}, {"objective": "hinge", "beta": 0.2}, ""),
    # TRL logs IPO's rewards as DPO's, ours are what the loss squares.
    "ipo": (
        {"loss_type": ["ipo"], "beta": 0.5},
        {"objective": "ipo", "objective_options": {"tau": 0.5, "length_normalized": True}},
        "rewards",
    ),
    "robust": (
        {"loss_type": ["robust"], "label_smoothing": 0.1},
        {"objective": "robust", "objective_options": {"label_smoothing": 0.1}},
        "",
    ),
    # What both configs have is given to both.
    "ld_alpha": ({}, {"objective": "dpo", "ld_alpha": 0.3}, ""),
    # Adam would divide rounding errors by small gradients, and the reference adds them up.
    "a moving reference": (
        {},
        {
            "objective": "dpo",
            "sync_ref_model": True,
            "ref_model_sync_steps": 1,
            "optim": "sgd",
            "learning_rate": 0.3,
        },
        "",
    ),
    "wpo": ({"use_weighting": True}, {"objective": "dpo", "use_weighting": True}, ""),
    # TRL's NLL is a mean over the tokens of a batch, ours over those of a response.
    "rpo, one pair a batch": (
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        {"objective": "dpo", "rpo_alpha": 0.5, "per_device_train_batch_size": 1},
        "",
    ),
}


@pytest.mark.parametrize("name", TRL_LOSSES)
def test_pairs_train_as_in_trl(tmp_path, name):
    trl = pytest.importorskip("trl")
    options, own, different = TRL_LOSSES[name]
    count = 4 if "one pair" in name else 12
    shared = shared_with(trl.DPOConfig, tmp_path, **own)
    theirs = trl.DPOTrainer(
        tiny.model(),
        ref_model=tiny.model(seed=1),
        args=trl.DPOConfig(**{**shared, **options}),
        train_dataset=tiny.dataset(count),
        processing_class=tiny.tokenizer(),
    )
    ours = trainer(tmp_path, count=count, ref_model=tiny.model(seed=1), **own)
    ours.train()
    theirs.train()
    names = step_logs(theirs)[0].keys() - {"num_tokens"}
    assert {"loss", "grad_norm", "rewards/margins", "entropy"} < names
    assert_same_runs(
        ours, theirs, {n for n in names if not (different and n.startswith(different))}
    )
    references = (weights(run.ref_model) for run in (ours, theirs))
    assert_same_weights(*references, atol=1e-6, rtol=1e-5)


def test_kto_trains_as_trls_does(tmp_path):
    trl = pytest.importorskip("trl")
    rows = single_rows(12, seed=4)
    own = {"objective": "kto", "beta": 0.2, "train_sampling_strategy": "sequential"}
    own["objective_options"] = {"desirable_weight": 1.5, "undesirable_weight": 0.8}
    shared = shared_with(trl.KTOConfig, tmp_path, **own)
    # Each prompt meets the response before its own in TRL, and the one after it here.
    backwards = [row for i in range(0, 12, 4) for row in reversed(rows[i : i + 4])]
    theirs = trl.KTOTrainer(
        tiny.model(),
        ref_model=tiny.model(seed=1),
        args=trl.KTOConfig(**{**shared, "beta": 0.2, **own["objective_options"]}),
        train_dataset=made(backwards),
        processing_class=tiny.tokenizer(),
    )
    ours = trainer(tmp_path, ref_model=tiny.model(seed=1), train_dataset=made(rows), **own)
    ours.train()
    theirs.train()
    names = step_logs(theirs)[0].keys()
    assert {"loss", "kl", "rewards/chosen", "rewards/rejected", "logps/chosen"} < names
    assert any(log["kl"] > 0.1 for log in step_logs(theirs))
    assert_same_runs(ours, theirs)


@pytest.mark.parametrize("name", ["simpo", "cpo"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_cpo_and_simpo_train_as_in_trl(tmp_path, name):
    cpo = pytest.importorskip("trl.experimental.cpo")
    theirs_options, own = {
        "simpo": (
            {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.7, "cpo_alpha": 0.0},
            {"objective": "simpo", "beta": 2.0, "objective_options": {"gamma": 0.7}},
        ),
        "cpo": (
            {"loss_type": "sigmoid", "beta": 0.1, "cpo_alpha": 0.6},
            {"objective": "cpo", "beta": 0.1, "objective_options": {"nll_weight": 0.6}},
        ),
    }[name]
    # AdamW would make steps of what is left of gradients that cancel.
    own |= {"optim": "sgd", "learning_rate": 0.1}
    # Its NLL, too, is a mean over the tokens of a batch: the same for one pair.
    own["per_device_train_batch_size"] = 1 if name == "cpo" else 4
    count = 3 if name == "cpo" else 8
    theirs = cpo.CPOTrainer(
        tiny.model(),
        args=cpo.CPOConfig(**{**shared_with(cpo.CPOConfig, tmp_path, **own), **theirs_options}),
        train_dataset=tiny.dataset(count),
        processing_class=tiny.tokenizer(),
    )
    ours = trainer(tmp_path, count=count, **own)
    ours.train()
    theirs.train()
    # Log-probs are logged per token there, and mean logits over prompts and padding.
    rewards = {f"rewards/{n}" for n in ("chosen", "rejected", "margins", "accuracies")}
    assert_same_runs(ours, theirs, {"loss", "grad_norm", *rewards})


STATEFUL = {
    "bco": {"objective": "bco_pair"},
    "alphadpo": {"objective": "alphadpo", "objective_options": {"alpha": 0.5}},
    "betadpo": {"objective": "betadpo", "objective_options": {"keep": 0.5}},
    "betadpo, composed": {
        "objective": "betadpo",
        "objective_options": {"keep": 0.5},
        "use_weighting": True,
        "rpo_alpha": 0.2,
    },
    "several": {
        "objective": "dpo+alphadpo+betadpo",
        "objective_options": {"keep": 0.5, "alpha": 0.5, "loss_weights": [0.5, 1.0, 2.0]},
    },
}


@pytest.mark.parametrize("name", STATEFUL)
def test_resumed_statistics_equal_uninterrupted_ones(tmp_path, name, caplog):
    options = {"count": 16, "save_strategy": "steps", "save_steps": 2, **STATEFUL[name]}
    whole, resumed, forgetful = (trainer(tmp_path, **options) for _ in range(3))
    whole.train()
    checkpoint = tmp_path / "checkpoint-2"
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert "start over" not in caplog.text
    assert resumed.state.global_step == whole.state.global_step == 4
    assert_same_weights(weights(resumed.model), weights(whole.model), atol=0, rtol=0)
    for mine, true in zip(step_logs(resumed), step_logs(whole), strict=True):
        assert mine.keys() == true.keys()
        for key in true.keys() - {"epoch"}:
            assert mine[key] == true[key], key
    states = [run.loss_fn.objective.state_dict() for run in (resumed, whole)]
    assert str(states[0]) == str(states[1])

    (checkpoint / "objective.pt").unlink()
    forgetful.train(resume_from_checkpoint=str(checkpoint))
    assert "objective.pt is missing: the objective's statistics start over" in caplog.text
    different = weights(forgetful.model)
    assert any(not torch.equal(w, different[n]) for n, w in weights(whole.model).items())


def test_beta_dpo_draws_by_the_seed(tmp_path):
    rows = made(tiny.pairs(16))
    losses = []
    for seed in (1, 1, 2):
        run = trainer(
            tmp_path,
            model=tiny.model(),
            ref_model=tiny.model(seed=1),
            train_dataset=rows,
            train_sampling_strategy="sequential",
            learning_rate=0.0,
            seed=seed,
            **STATEFUL["betadpo"],
        )
        run.train()
        losses.append([log["loss"] for log in step_logs(run)])
    assert losses[0] == losses[1] != losses[2]


def test_only_objectives_with_statistics_save_them(tmp_path):
    run = trainer(tmp_path, count=4, save_strategy="steps", save_steps=1, objective="simpo")
    run.train()
    assert (tmp_path / "checkpoint-1").exists()
    assert not (tmp_path / "checkpoint-1" / "objective.pt").exists()


@pytest.mark.parametrize("name", STATEFUL)
def test_evaluation_moves_no_statistics(tmp_path, name):
    run = trainer(tmp_path, count=4, **STATEFUL[name])
    run.train()
    before = copy.deepcopy(run.loss_fn.objective.state_dict())
    first = run.evaluate(tiny.dataset(5, seed=3))
    assert str(run.loss_fn.objective.state_dict()) == str(before)
    again = run.evaluate(tiny.dataset(5, seed=3))
    assert first["eval_loss"] == again["eval_loss"]


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("ipo", tiny.pairs(7)),
        ("simpo", tiny.pairs(7)),
        ("adaorpo", tiny.pairs(7)),
        ("madpo", margin_rows(7)),
        ("tdpo2", tiny.pairs(7)),
        # With one prompt its reference point is 0, whatever the batches.
        ("kto", [{**row, "prompt": "the film"} for row in single_rows(7)]),
    ],
)
def test_accumulated_batches_train_as_one(tmp_path, name, rows):
    """7 pairs: a step of 4 and one of 3, as 1 x 4 and 2 x 2."""
    runs = []
    for size in (4, 2):
        run = trainer(
            tmp_path,
            train_dataset=made(rows),
            ref_model=reference_for(name, tiny.model(seed=1)),
            objective=name,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
            optim="sgd",
            max_grad_norm=0.0,
            learning_rate=1e-3,
        )
        run.train()
        runs.append(run)
    moved = [w - tiny.model().state_dict()[n] for n, w in weights(runs[0].model).items()]
    assert max(m.abs().max() for m in moved) > 1e-4
    assert_same_weights(weights(runs[1].model), weights(runs[0].model), atol=2e-6, rtol=1e-5)
    for mine, true in zip(step_logs(runs[1]), step_logs(runs[0]), strict=True):
        assert mine.get("kl", 0) == true.get("kl", 0) == 0
        for key in true.keys() - {"epoch"}:
            assert mine[key] == pytest.approx(true[key], rel=1e-3, abs=1e-5), key


def first_log(
    path: Path, rows: list[dict], seeds: tuple[int, int] = (0, 1), **options
) -> dict[str, float]:
    model, ref_model = map(seeded, seeds)
    run = trainer(
        path,
        model=model,
        ref_model=reference_for(
            options["objective"], ref_model, **options.get("objective_options", {})
        ),
        train_dataset=made(rows),
        train_sampling_strategy="sequential",
        **options,
    )
    run.train()
    return step_logs(run)[0]


def seeded(seed: int):
    return tiny.model(seed=seed)


def assert_logged(log: dict, expected: dict) -> None:
    for name, value in expected.items():
        assert log[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_metrics_of_pairs_by_hand(tmp_path):
    rows = margin_rows(4)
    pairs = measured_pairs(tiny.model(), tiny.model(seed=1), rows)
    gaps = [w["rho"] / w["n"] - r["rho"] / r["n"] for w, r in pairs]
    h = [w["rho"] - r["rho"] for w, r in pairs]

    ratios = [min(math.exp(gap), 2.0) for gap in gaps]
    odds = [r["logp"] - w["logp"] for w, r in pairs]
    assert_logged(
        first_log(tmp_path, rows, objective="adadpo"),
        {
            "gradients/chosen_share": mean(ratio / (1 + ratio) for ratio in ratios),
            "gradients/log_balance": mean(
                math.log(ratio) + odd for ratio, odd in zip(ratios, odds, strict=True)
            ),
            "adaptive/beta_ratio": mean(ratios),
            "adaptive/clip_fraction": mean(float(ratio == 2) for ratio in ratios),
        },
    )
    # Without an adaptive coefficient, both sides are pushed alike.
    log = first_log(tmp_path, rows, objective="dpo", use_weighting=True)
    assert_logged(
        log,
        {
            "gradients/chosen_share": 0.5,
            "gradients/log_balance": mean(odds),
            "wpo/weight": mean(math.exp(w["alignment"] + r["alignment"]) for w, r in pairs),
        },
    )
    assert not {"adaptive/beta_ratio", "rewards/base_margins", "madpo/weight"} & log.keys()

    center = mean(gaps)
    spread = math.sqrt(mean((gap - center) ** 2 for gap in gaps))
    scores = [(gap - center) / spread for gap in gaps]
    margins = [3.0 + 0.5 * 10 * z for z in scores]
    options = {"gamma": 3.0, "alpha": 0.5}
    log = first_log(tmp_path, rows, objective="alphadpo", beta=10.0, objective_options=options)
    # The z-scores of the first batch cancel in the mean, so the loss is what tells.
    assert_logged(log, {"alpha_dpo/margin": mean(margins)})
    losses = [
        softplus(margin - 10 * (w["logp"] / w["n"] - r["logp"] / r["n"]))
        for margin, (w, r) in zip(margins, pairs, strict=True)
    ]
    assert_logged(log, {"loss": mean(losses)})

    assert_logged(
        first_log(tmp_path, rows, objective="madpo"),
        {"madpo/weight": mean(madpo_weight(margin) for margin in MARGINS[:4])},
    )
    beta = max(0.1 * (1 + 0.3 * (mean(h) - 0.1 * mean(h))), 1e-3)
    assert beta > 2e-3
    log = first_log(tmp_path, rows, objective="betadpo", objective_options={"m": 0.3})
    assert_logged(log, {"beta_dpo/beta": beta, "beta_dpo/kept": 1.0})
    assert_logged(log, {"rewards/base_margins": 0.1 * mean(h), "rewards/margins": beta * mean(h)})
    log = first_log(tmp_path, rows, objective="betadpo", objective_options={"keep": 0.5})
    assert_logged(log, {"beta_dpo/kept": 0.5})
    kls = zip(*((w["kl"], r["kl"]) for w, r in pairs), strict=True)
    log = first_log(tmp_path, rows, objective="tdpo2")
    assert_logged(log, dict(zip(("kl/chosen", "kl/rejected"), map(mean, kls), strict=True)))


def test_metrics_of_single_responses_by_hand(tmp_path):
    rows = single_rows(4)
    seeds = SEEDS["Llama"]
    models = [seeded(seed) for seed in seeds]
    seen = [measured(*models, row["prompt"], row["completion"]) for row in rows]
    mismatched = [
        measured(*models, row["prompt"], rows[(i + 1) % 4]["completion"])
        for i, row in enumerate(rows)
    ]
    z0 = max(mean(response["rho"] for response in mismatched), 0.0)
    assert z0 > 0.1
    losses = [
        torch.sigmoid(torch.tensor((0.2 if row["label"] else -0.2) * (z0 - r["rho"]))).item()
        for row, r in zip(rows, seen, strict=True)
    ]
    expected = {"kl": z0, "loss": mean(losses)}
    for side, label in (("chosen", True), ("rejected", False)):
        own = [r for row, r in zip(rows, seen, strict=True) if row["label"] == label]
        expected[f"logps/{side}"] = mean(r["logp"] for r in own)
        expected[f"rewards/{side}"] = 0.2 * mean(r["rho"] for r in own)
    expected["rewards/margins"] = expected["rewards/chosen"] - expected["rewards/rejected"]
    log = first_log(tmp_path, rows, seeds, objective="kto", beta=0.2)
    assert_logged(log, expected)
    assert "rewards/accuracies" not in log

    # Nothing is said of what there is none of.
    log = first_log(tmp_path, [{**row, "label": True} for row in rows], seeds, objective="kto")
    assert not any("rejected" in name or "margins" in name for name in log)
    assert_logged(log, {"logps/chosen": mean(r["logp"] for r in seen)})


def test_metrics_without_weight_are_left_out():
    sums = {"a": torch.tensor([3.0, 2.0]), "b": torch.tensor([0.0, 0.0])}
    assert metrics.means(sums) == {"a": 1.5}


def test_pairs_that_push_nothing_do_not_count_in_the_balance(tmp_path):
    """With a hinge, some pairs or all of them are past the margin."""
    rows = tiny.pairs(4)
    pairs = measured_pairs(tiny.model(), tiny.model(seed=1), rows)
    h = [w["rho"] - r["rho"] for w, r in pairs]
    assert min(h) < 0 < max(h)
    log = first_log(tmp_path, rows, objective="hinge", beta=100.0)
    odds = [r["logp"] - w["logp"] for x, (w, r) in zip(h, pairs, strict=True) if 100 * x < 1]
    assert 0 < len(odds) < 4
    assert_logged(log, {"gradients/chosen_share": 0.5, "gradients/log_balance": mean(odds)})
    # A pair whose chosen response alone is pushed has a share, and no finite balance.
    log = first_log(tmp_path, rows, objective="hinge", beta=100.0, rpo_alpha=50.0)
    pushes = [
        (100.0 * (100 * x < 1) + 50 / w["n"], 100 * x < 1)
        for x, (w, _) in zip(h, pairs, strict=True)
    ]
    hard = [push / 100 for push, is_hard in pushes if is_hard]
    expected = {
        "gradients/chosen_share": mean(push / (push + 100 * is_hard) for push, is_hard in pushes),
        "gradients/log_balance": mean(math.log(x) + odd for x, odd in zip(hard, odds, strict=True)),
    }
    assert_logged(log, expected)
    easy = [row for row, x in zip(rows, h, strict=True) if 100 * x > 1]
    log = first_log(tmp_path, easy, objective="hinge", beta=100.0)
    assert log["loss"] == 0
    assert not any(name.startswith("gradients/") for name in log)


SINGLE = [{"prompt": "the film", "completion": " good", "label": 1}] * 4
PAIRS = tiny.pairs(4)


@pytest.mark.parametrize(
    ("options", "rows", "message"),
    [
        ({"objective": "madpo"}, PAIRS, "'train' has no margins, .* `prefkern margins` writes"),
        ({"objective": "madpo"}, (margin_rows(4), PAIRS), "'eval' has no margins"),
        ({"objective": "madpo", "use_weighting": True}, PAIRS, "'train' has no margins"),
        (
            {"objective": "tdpo1", "precompute_ref_log_probs": True},
            PAIRS,
            "precompute_ref_log_probs keeps sums, and .* needs the reference's distributions",
        ),
        (
            {"objective": "tdpo2", "rpo_alpha": 1.0, "precompute_ref_log_probs": True},
            PAIRS,
            "precompute_ref_log_probs keeps sums, and .* needs the reference's distributions",
        ),
        (
            {"objective": "kto", "precompute_ref_log_probs": True},
            PAIRS,
            "precompute_ref_log_probs keeps sums, and .* needs mismatched pairs of each batch",
        ),
        (
            {"objective": "kto", "per_device_train_batch_size": 1},
            PAIRS,
            "mismatched responses of a batch: per_device_train_batch_size must be at least 2, got 1",
        ),
        (
            {"objective": "kto"},
            [{"prompt": "a", "text": "b"}] * 4,
            "no column 'chosen' and no column 'rejected'; .*'prompt', 'completion' and 'label'",
        ),
        (
            {"objective": "dpo"},
            SINGLE,
            "'train' has no column 'chosen' and no column 'rejected'; .*single responses .*'kto'",
        ),
        (
            {"objective": "madpo"},
            SINGLE,
            "no column 'chosen' and no column 'rejected'; .*single responses .*'kto'",
        ),
        (
            {"objective": "kto"},
            [{**row, "label": label} for row, label in zip(SINGLE, (1, 0, 3, 1), strict=True)],
            "dataset 'train', row 2: 'label' must be true or false, got 3",
        ),
        ({"objective": "ipo", "beta": 0.1}, PAIRS, "'ipo' has no option 'beta'.*it takes tau"),
        (
            {"objective": "dpo", "beta": 0.1, "objective_options": {"beta": 0.2}},
            PAIRS,
            "beta is 0.1, and 0.2 in objective_options; give one",
        ),
        (
            {"objective": "dpo", "rpo_alpha": 0.1, "objective_options": {"rpo_alpha": 0.2}},
            PAIRS,
            "rpo_alpha is 0.1, and 0.2 in objective_options; give one",
        ),
        ({"objective": "kto", "rpo_alpha": 0.1}, PAIRS, "'kto' has no option 'rpo_alpha'"),
        ({"objective": "kto", "use_weighting": True}, PAIRS, "'kto' has no option 'use_weighting'"),
        ({"objective": "dpo", "rpo_alpha": 0.0}, PAIRS, "rpo_alpha must be a finite number > 0"),
    ],
)
def test_refused_before_anything_is_loaded(tmp_path, options, rows, message):
    train, evaluated = rows if isinstance(rows, tuple) else (rows, None)
    with pytest.raises(ValueError, match=message):
        PreferenceTrainer(
            "no/such-model",
            config(tmp_path, **options),
            made(train),
            None if evaluated is None else made(evaluated),
        )


def test_raw_datasets_are_refused_in_evaluation_as_in_training(tmp_path):
    run = trainer(tmp_path, objective="madpo", train_dataset=made(margin_rows(4)))
    for dataset in (tiny.dataset(3), {"other": tiny.dataset(3)}):
        with pytest.raises(ValueError, match="has no margins"):
            run.evaluate(dataset)
    assert run.evaluate(made(margin_rows(3)))["eval_loss"] > 0
    with pytest.raises(ValueError, match="'test' has no margins"):
        run.predict(tiny.dataset(3))
    run = trainer(tmp_path, objective="kto")
    assert run.evaluate(tiny.dataset(3))["eval_loss"] == pytest.approx(0.5, abs=1e-6)
    assert run.evaluate(made(single_rows(3)))["eval_loss"] == pytest.approx(0.5, abs=1e-6)
    with pytest.raises(ValueError, match="dataset 'eval', row 1: 'label' must be true or false"):
        run.evaluate(made([SINGLE[0], {**SINGLE[0], "label": 2}]))


def test_numbers_that_the_objective_has_no_use_for_change_nothing(tmp_path):
    """SimPO on a dataset with a reference's sums and margins."""
    sums = {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}
    rows = [{**row, **sums} for row in margin_rows(4)]
    log = first_log(tmp_path, rows, objective="adasimpo")
    plain = first_log(tmp_path, tiny.pairs(4), objective="adasimpo")
    assert {k: v for k, v in log.items() if "per_second" not in k} == plain


@pytest.mark.parametrize("name", ["dpo", "simpo"])
def test_gaps_in_what_is_not_read_are_nobodys_concern(tmp_path, name):
    rows = [{**row, "score_chosen": None, "margin": float("nan")} for row in tiny.pairs(4)]
    if name == "simpo":
        rows = [{**row, "ref_chosen_logps": None} for row in rows]
    reference = reference_for(name, tiny.model(seed=1))
    run = trainer(tmp_path, train_dataset=made(rows), objective=name, ref_model=reference)
    assert (run.ref_model is None) == (name == "simpo")
    run.train()
    assert run.state.global_step == 1


def test_a_given_objective_is_all_there_is(tmp_path):
    """A given objective keeps its own options and state."""
    for option in ({"beta": 5.0}, {"rpo_alpha": 1.0}, {"use_weighting": True}):
        with pytest.raises(ValueError, match=f"args.{next(iter(option))} is .* no effect"):
            trainer(tmp_path, objective=objectives.DPO(), **option)
    with pytest.raises(TypeError, match="objective must be an objective of prefkern.objectives"):
        trainer(tmp_path, objective=objectives.DPO)
    objective = objectives.BetaDPO(keep=0.5)
    objective.manual_seed(7)
    objective.draws = 100
    run = trainer(tmp_path, objective=objective)
    assert (run.loss_fn.objective.seed, run.loss_fn.objective.draws) == (7, 100)


def test_the_best_model_comes_with_its_statistics(tmp_path):
    run = trainer(
        tmp_path,
        count=12,
        objective="alphadpo",
        eval_dataset=tiny.dataset(4, seed=3),
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
    )
    run.train()
    best = torch.load(Path(run.state.best_model_checkpoint) / "objective.pt")
    assert run.state.best_global_step < run.state.global_step
    assert str(run.loss_fn.objective.state_dict()) == str(best)
    logged = [log["eval_loss"] for log in run.state.log_history if "eval_loss" in log]
    assert run.evaluate()["eval_loss"] == pytest.approx(max(logged), abs=1e-6)


def test_statistics_of_another_objective_are_refused(tmp_path):
    options = {"count": 8, "save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path, objective="alphadpo", **options).train()
    other = trainer(tmp_path, objective="alphadpo", use_weighting=True, **options)
    with pytest.raises(
        ValueError, match=r"(?s)trained with AlphaDPO.* this run's objective is WPO"
    ):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_unshuffled_pairs_have_mismatched_responses(tmp_path, caplog):
    """The two responses of a pair are not neighbours."""
    run = trainer(
        tmp_path,
        count=4,
        ref_model=tiny.model(seed=1),
        objective="kto",
        train_sampling_strategy="sequential",
        per_device_train_batch_size=2,
    )
    batches = [*run.get_train_dataloader()]
    assert [len(batch["mismatched_input_ids"]) for batch in batches] == [2, 2, 2, 2]
    assert torch.cat([batch["desirable"] for batch in batches]).tolist() == [True] * 4 + [False] * 4
    run.train()
    assert "mismatched" not in caplog.text
    same = made([{**row, "prompt": "the film"} for row in single_rows(4)])
    trainer(tmp_path, train_dataset=same, objective="kto").train()
    assert caplog.text.count("no mismatched pairs: its reference point is 0") == 1


def test_sharded_setups_refuse_tdpo(tmp_path, monkeypatch):
    run = trainer(tmp_path, objective="tdpo2", peft_config=lora())
    run.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="TDPO is not supported under FSDP1: use FSDP2"):
        run._refuse_unsupported_setups()


def test_options_of_the_config_reach_the_objective(tmp_path):
    options = {"use_weighting": True, "rpo_alpha": 0.5, "beta": 0.2}
    built = config(tmp_path, objective="hinge", **options).build_objective()
    assert isinstance(built, objectives.WithNLL) and built.rpo_alpha == 0.5
    assert isinstance(built.objective, objectives.WPO) and built.objective.alignment
    assert isinstance(built.objective.objective, objectives.Hinge) and built.beta == 0.2
    # Given twice and the same is given once.
    twice = config(tmp_path, objective="dpo", beta=0.2, objective_options={"beta": 0.2})
    assert twice.build_objective().beta == 0.2
    for name in ("dpo", "simpo", "alphadpo", "kto"):
        own = config(tmp_path, objective=name)
        assert own.beta is None and own.build_objective().beta == objectives.build(name).beta
    assert json.loads(config(tmp_path, rpo_alpha=1.0).to_json_string())["rpo_alpha"] == 1.0
