"""A pair's prompt computed once: the same losses, gradients and metrics as with padded batches."""

from __future__ import annotations

import math

import pytest
import torch
import transformers

from support import tiny, versions

pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")

import prefkern
from prefkern.data.collate import PreferenceCollator
from prefkern.models import packing
from prefkern.models.head_forward import forward_with_head
from prefkern.models.scoring import align_labels
from support.packed import PACKS, assert_same_runs, both_ways, built
from support.training import (
    Record,
    assert_same_weights,
    made,
    step_logs,
    trainer,
    weights,
)
from support.varlen_kernels import Kernel, put

_EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 2,
}
# Windows shorter than prompts and responses.
FAMILIES = {
    **PACKS,
    "Mistral": {"sliding_window": 5},
    "Gemma3Text": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
    "Mixtral": {**_EXPERTS, "output_router_logits": True},
    "GptOss": {**_EXPERTS, "sliding_window": 5, "output_router_logits": True},
}
BY_BRANCH = {"Gemma2": "eager", "GptOss": "eager"}


def rows(count: int = 4, seed: int = 0) -> list[dict]:
    """Prompts and responses of unequal lengths, of one token too, and a prompt twice."""
    generator = torch.Generator().manual_seed(seed)

    def ids(n: int) -> list[int]:
        return torch.randint(3, tiny.VOCAB_SIZE, (n,), generator=generator).tolist()

    lengths = [(13, 6, 9), (1, 8, 2), (7, 1, 12), (22, 5, 1)]
    made = []
    for i in range(count):
        p, c, r = lengths[i % len(lengths)]
        made.append({"prompt_ids": ids(p), "chosen_ids": ids(c), "rejected_ids": ids(r)})
    made[-1]["prompt_ids"] = made[0]["prompt_ids"]
    return made


def test_the_row_of_a_batch():
    batch = PreferenceCollator(0, padding_free=True, share_prompt=True)(
        [
            {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 1], "rejected_ids": [9]},
            {"prompt_ids": [4], "chosen_ids": [3], "rejected_ids": [2, 1]},
            {"prompt_ids": [], "chosen_ids": [3, 1], "rejected_ids": [2, 1]},
        ]
    )
    row = [5, 6, 7, 8, 1, 4, 3, 3, 1, 7, 9, 4, 2, 1, 2, 1]
    labels = [-100, -100, -100, 8, 1, -100, 3, 3, 1, -100, 9, -100, 2, 1, 2, 1]
    assert batch["input_ids"].tolist() == [row]
    assert batch["labels"].tolist() == [labels]
    assert batch["cu_seqlens"].tolist() == [0, 5, 7, 9, 11, 14, 16]
    assert batch["prefixes"].tolist() == [[0, 0], [0, 0], [0, 0], [0, 2], [5, 0], [7, 0]]
    # Each response's tokens are predicted by the token before them, once.
    aligned = align_labels(batch["labels"], batch["cu_seqlens"])[0].tolist()
    assert [(row[i], y) for i, y in enumerate(aligned) if y != -100] == [
        *[(7, 8), (8, 1), (4, 3), (3, 1), (7, 9), (4, 2), (2, 1), (2, 1)]
    ]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_trains_as_padded(tmp_path, family, implementation):
    options = FAMILIES[family]
    padded, shared = both_ways(
        tmp_path,
        lambda seed: built(family, implementation, seed, **options),
        shares=True,
        ref_model=lambda: built(family, implementation, 1, **options),
        train_dataset=made(rows(8)),
        objective_options={"clip": 1.1},
    )
    assert_same_runs(padded, shared)
    assert step_logs(shared)[0]["loss"] != pytest.approx(math.log(2), abs=1e-3)
    by_branch = implementation == "eager" or family in BY_BRANCH
    if family == "Gemma2" and not versions.GEMMA2_EAGER.is_here:
        by_branch = implementation == "eager"
    assert packing._way(shared.model, shares=True) == ("branches" if by_branch else "paths")


OBJECTIVES = {
    "tdpo2": {"objective": "tdpo2", "beta": 0.5},
    "alphadpo": {"objective": "alphadpo", "objective_options": {"alpha": 0.5}},
    "wpo, rpo": {"objective": "dpo", "use_weighting": True, "rpo_alpha": 0.3},
    "simpo": {"objective": "simpo"},
    "precomputed": {"precompute_ref_log_probs": True},
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_kind_of_objective(tmp_path, name):
    """Two steps, and an evaluation in batches of 3 and 2."""
    padded, shared = both_ways(
        tmp_path,
        lambda seed: tiny.model(seed=seed),
        shares=True,
        ref_model=None if name == "simpo" else lambda: tiny.model(seed=1),
        train_dataset=made(rows(7)),
        per_device_eval_batch_size=3,
        **OBJECTIVES[name],
    )
    assert_same_runs(padded, shared)
    evaluated = [run.evaluate(made(rows(5, seed=1))) for run in (padded, shared)]
    names = {each for each in evaluated[0] if not each.endswith(("runtime", "per_second"))}
    assert len(names) > 8
    for each in names:
        assert evaluated[1][each] == pytest.approx(evaluated[0][each], rel=2e-5, abs=2e-6), each


def test_madpo(tmp_path):
    pairs = [{**row, "reward_margin": i - 1.5} for i, row in enumerate(rows(4))]
    padded, shared = both_ways(
        tmp_path,
        lambda seed: tiny.model(seed=seed),
        shares=True,
        ref_model=lambda: tiny.model(seed=1),
        train_dataset=made(pairs),
        objective="madpo",
    )
    assert_same_runs(padded, shared)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj", "lm_head"]], ids=str)
def test_adapters_and_checkpointed_layers(tmp_path, targets, reentrant):
    padded, shared = both_ways(
        tmp_path,
        lambda seed: tiny.model("Gemma3Text", sliding_window=5),
        shares=True,
        train_dataset=made(rows(8)),
        peft_config=peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"),
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    assert_same_runs(padded, shared)


def test_accumulated_batches(tmp_path):
    whole, split = (
        trainer(
            tmp_path,
            model=tiny.model(),
            ref_model=tiny.model(seed=1),
            train_dataset=made(rows(8)),
            padding_free=True,
            share_prompt=True,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            callbacks=[Record()],
            optim="sgd",
            max_grad_norm=0.0,
        )
        for size in (8, 2)
    )
    for run in (whole, split):
        run.train()
    assert_same_runs(whole, split)


def test_bf16_is_as_exact_as_padded(tmp_path):
    """Against float32 on the same weights: the error is that of a padded batch in bf16."""

    def gradients(dtype, **options):
        record = Record()
        run = trainer(
            tmp_path,
            model=tiny.model().bfloat16().to(dtype),
            ref_model=tiny.model(seed=1).bfloat16().to(dtype),
            train_dataset=made(rows(4)),
            callbacks=[record],
            optim="sgd",
            max_grad_norm=0.0,
            **options,
        )
        run.train()
        return record.gradients[0]

    true = gradients(torch.float32)
    errors = {}
    for shares in (False, True):
        mine = gradients(torch.bfloat16, padding_free=shares, share_prompt=shares)
        parts = [((mine[n].float() - true[n]).norm(), true[n].norm()) for n in true]
        errors[shares] = max((error / size).item() for error, size in parts if size > 1e-4)
    assert errors[True] <= 1.5 * errors[False]


def test_the_first_loss_in_bf16_is_that_of_equal_models(tmp_path):
    options = {"bf16": True, "max_steps": 1, "padding_free": True, "share_prompt": True}
    run = trainer(tmp_path, objective="dpo", **options)
    run.train()
    assert step_logs(run)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert step_logs(run)[0]["grad_norm"] > 1e-6


# Pairs 0 and 3 have equal prompts. What changes, and which sequences of the row may notice:
# chosen ones are 0 to 3, rejected ones 4 to 7.
CHANGES = {
    "a chosen response": (1, "chosen_ids", {1}),
    "a rejected response": (1, "rejected_ids", {5}),
    "a prompt": (2, "prompt_ids", {2, 6}),
    "one of two equal prompts": (0, "prompt_ids", {0, 4}),
}


@pytest.mark.parametrize("way", ["paths", "branches", "kernel"])
@pytest.mark.parametrize("name", CHANGES)
def test_sequences_see_their_own_prompt_alone(name, way, monkeypatch):
    """Other tokens leave the hidden states of all others bitwise unchanged."""
    implementation = "eager" if way == "branches" else "sdpa"
    model = built("Gemma3Text", implementation, **FAMILIES["Gemma3Text"])
    pairs = rows(4)
    kernel = Kernel()
    if way == "kernel":
        put(monkeypatch, kernel)

    def states(pairs):
        batch = PreferenceCollator(0, padding_free=True, share_prompt=True)(pairs)
        names = ("input_ids", "cu_seqlens", "prefixes")
        inputs = packing.packed_inputs(model, *(batch[name] for name in names))
        with torch.no_grad():
            found, _ = forward_with_head(model, inputs, lambda head: (head.hidden, head.hidden))
        return found[0].tensor_split(batch["cu_seqlens"][1:-1].long())

    before = states(pairs)
    assert packing._way(model, shares=True) == ("branches" if way == "branches" else "paths")
    assert bool(kernel.calls) == (way == "kernel")
    pair, column, noticed = CHANGES[name]
    changed = [dict(row) for row in pairs]
    changed[pair][column] = [5 + (token + 1) % 90 for token in pairs[pair][column]]
    after = states(changed)
    assert {i for i, (x, y) in enumerate(zip(before, after, strict=True)) if (x != y).any()} == (
        noticed
    )


def test_pairs_without_a_prompt_train_as_padded(tmp_path):
    """They have nothing to share; a padded batch scores them from their second token as well."""
    pairs = rows(8)
    for row in pairs[::3]:
        row["prompt_ids"] = []
    padded, shared = both_ways(
        tmp_path,
        lambda seed: tiny.model(seed=seed),
        shares=True,
        ref_model=lambda: tiny.model(seed=1),
        train_dataset=made(pairs),
    )
    assert_same_runs(padded, shared)


def test_a_prompt_is_computed_once(tmp_path):
    """Positions that the policy's embedding computes, and the products of its attention."""
    counts, pairs = {}, rows(4)
    for name in ("packed", "shared"):
        run = trainer(
            tmp_path,
            objective="simpo",
            train_dataset=made(pairs),
            padding_free=True,
            share_prompt=name == "shared",
        )
        seen = []
        run.model.get_input_embeddings().register_forward_hook(
            lambda m, inputs, out, seen=seen: seen.append(inputs[0].numel())
        )
        run.train()
        counts[name] = sum(seen)
    lengths = [
        tuple(len(row[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")) for row in pairs
    ]
    assert counts["packed"] == sum(2 * p + c + r for p, c, r in lengths)
    assert counts["shared"] == sum(p + 1 + c + r for p, c, r in lengths)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    options = {
        "padding_free": True,
        "share_prompt": True,
        "train_dataset": made(rows(12)),
        "per_device_train_batch_size": 2,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole = trainer(tmp_path, model=tiny.model(), **options)
    whole.train()
    resumed = trainer(tmp_path, model=tiny.model(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same_weights(weights(resumed.model), weights(whole.model), atol=0, rtol=0)


def test_kept_sums_know_their_layout(tmp_path):
    keys = set()
    for options in ({}, {"padding_free": True}, {"padding_free": True, "share_prompt": True}):
        run = trainer(
            tmp_path, train_dataset=made(rows(4)), precompute_ref_log_probs=True, **options
        )
        keys.add(run._reference_cache(run.train_dataset).key)
    assert len(keys) == 3


REFUSED = {
    "Mamba": ({"state_size": 8}, "its forward takes no position_ids"),
    "Falcon": ({"alibi": True}, "ALiBi counts along the whole row"),
    "Jamba": (
        {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "num_experts": 2},
        "sequences in one row see one another",
    ),
}


@pytest.mark.parametrize("family", REFUSED)
def test_families_that_cannot_share_are_refused(tmp_path, family):
    options, problem = REFUSED[family]
    model = built(family, "eager", **options)
    with pytest.raises(ValueError, match=f"cannot take rows that share a prompt: {problem}"):
        packing.require_packing(model, shares=True)


def test_a_router_that_counts_a_shared_prompt_once_is_refused(tmp_path, monkeypatch):
    model = tiny.model("Mixtral", **FAMILIES["Mixtral"])
    module = transformers.models.mixtral.modeling_mixtral
    original = module.load_balancing_loss_func

    def without_weights(gates, experts, top_k, attention_mask=None):
        mask = None if attention_mask is None else attention_mask.clamp(max=1)
        return original(gates, experts, top_k, mask)

    monkeypatch.setattr(module, "load_balancing_loss_func", without_weights)
    options = {"padding_free": True, "share_prompt": True, "model": model}
    with pytest.raises(ValueError, match="MixtralForCausalLM does not count a shared prompt for"):
        trainer(tmp_path, **options)
    trainer(tmp_path, router_aux_loss_coef=0.0, **options)


def test_arguments_without_effect_are_refused(tmp_path):
    shares = {"padding_free": True, "share_prompt": True}
    with pytest.raises(ValueError, match="share_prompt needs padding_free: only a packed row"):
        trainer(tmp_path, share_prompt=True)
    with pytest.raises(ValueError, match="share_prompt needs padding_free=True"):
        PreferenceCollator(0, share_prompt=True)
    with pytest.raises(ValueError, match="padding_free has no effect on a data_collator"):
        trainer(tmp_path, data_collator=PreferenceCollator(0), share_prompt=True, padding_free=True)
    with pytest.raises(ValueError, match="share_prompt has no effect on single responses"):
        trainer(tmp_path, objective="kto", **shares)
    tuned = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="rows that share a prompt: prompt learning puts its vir"):
        trainer(tmp_path, peft_config=tuned, **shares)


@pytest.mark.parametrize(
    ("prefixes", "error", "message"),
    [
        (torch.zeros(3, 2, dtype=torch.int32), ValueError, r"must have shape \[2, 2\]"),
        (torch.zeros(2, 2), TypeError, "must be an int32 or int64 tensor"),
        ([[0, 0], [0, 2]], TypeError, "must be an int32 or int64 tensor"),
        (torch.tensor([[0, 2], [0, 0]]), ValueError, r"prefixes\[0\] must lie before its sequ"),
        (torch.tensor([[0, 0], [3, 4]]), ValueError, r"prefixes\[1\] must lie before its sequ"),
        (torch.tensor([[0, 0], [0, -1]]), ValueError, r"prefixes\[1\] must lie before its sequ"),
    ],
)
def test_wrong_prefixes(prefixes, error, message):
    row = torch.arange(3, 12)[None]
    with pytest.raises(error, match=message):
        packing.packed_inputs(tiny.model(), row, torch.tensor([0, 6, 9]), prefixes)


def test_a_prefix_of_two_sequences_is_refused():
    row, bounds = torch.arange(3, 15)[None], torch.tensor([0, 4, 8, 12])
    with pytest.raises(ValueError, match=r"prefixes\[2\] must lie within one sequence"):
        packing.packed_inputs(tiny.model(), row, bounds, torch.tensor([[0, 0], [0, 0], [2, 4]]))


def test_own_loops_share_too():
    """`preference_outputs` on a batch of the collator, against a padded batch."""
    model, loss_fn = tiny.model(), prefkern.FusedPreferenceLoss(prefkern.objectives.DPO())
    reference = torch.linspace(-40, -20, 8)
    outputs = []
    for shares in (False, True):
        batch = PreferenceCollator(0, padding_free=shares, share_prompt=shares)(rows(4))
        outputs.append(prefkern.preference_outputs(model, batch, loss_fn, ref_logps=reference))
    torch.testing.assert_close(outputs[1].losses, outputs[0].losses, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        outputs[1].rejected_logps, outputs[0].rejected_logps, atol=2e-5, rtol=1e-5
    )
