"""Packed batches against padded ones and each sequence alone: values, gradients, metrics, ranks.

What cannot be packed must be refused. Families of every kind are tested: no model is packed if its
sequences see one another.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import pytest
import torch
import transformers

from support import tiny, versions
from support.ranks import run_on_two_ranks

pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")

import prefkern
from prefkern.data.collate import ExampleCollator, PreferenceCollator, sequence_count
from prefkern.models import packing
from prefkern.models.packing import packed_inputs, require_packing
from prefkern.models.scoring import align_labels
from support.packed import PACKS, assert_same_runs, both_ways, built, gradients_of
from support.training import (
    Record,
    assert_same_weights,
    made,
    margin_rows,
    single_rows,
    step_logs,
    trainer,
)

IMPLEMENTATIONS = ("sdpa", "eager")
_RECURRENT_GEMMA = {
    "num_hidden_layers": 3,
    "lru_width": 32,
    "block_types": ["recurrent", "recurrent", "attention"],
    "attention_window_size": 8,
}
_JAMBA = {
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "mamba_d_state": 8,
    "num_experts": 2,
}
REFUSED = {
    "Mamba": ({"state_size": 8}, "its forward takes no position_ids"),
    "Bloom": ({}, "its forward takes no position_ids"),
    "Falcon": ({"alibi": True}, "sequences in one row see one another"),
    "Jamba": (_JAMBA, "sequences in one row see one another"),
    # resets its recurrence where positions do, and not the convolution before it
    "RecurrentGemma": (_RECURRENT_GEMMA, "sequences in one row see one another"),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", PACKS)
def test_packed_trains_as_padded(tmp_path, family, implementation):
    padded, packed = both_ways(
        tmp_path,
        lambda seed: built(family, implementation, seed, **PACKS[family]),
        ref_model=lambda: built(family, implementation, 1, **PACKS[family]),
        count=4,
        objective_options={"clip": 1.1},
    )
    assert_same_runs(padded, packed)
    assert step_logs(packed)[0]["loss"] != pytest.approx(math.log(2), abs=1e-3)
    named = {name for name, p in packed.model.named_parameters() if p.requires_grad}
    assert len(gradients_of(packed)[0]) > 0.9 * len(named)


OBJECTIVES = {
    "tdpo2": ({"objective": "tdpo2", "beta": 0.5}, tiny.pairs),
    "kto": ({"objective": "kto"}, single_rows),
    "kto, one prompt": ({"objective": "kto"}, lambda n: _one_prompt(n)),
    "alphadpo": ({"objective": "alphadpo", "objective_options": {"alpha": 0.5}}, tiny.pairs),
    "madpo": ({"objective": "madpo"}, margin_rows),
    "wpo, rpo": ({"objective": "dpo", "use_weighting": True, "rpo_alpha": 0.3}, tiny.pairs),
    "simpo": ({"objective": "simpo"}, tiny.pairs),
    "precomputed": ({"precompute_ref_log_probs": True}, tiny.pairs),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_kind_of_objective(tmp_path, name):
    """Steps of 4, 4 and 3 items, then an evaluation in batches of 3 and 2."""
    options, rows = OBJECTIVES[name]
    padded, packed = both_ways(
        tmp_path,
        lambda seed: tiny.model(seed=seed),
        ref_model=None if name == "simpo" else lambda: tiny.model(seed=1),
        train_dataset=made(rows(11)),
        per_device_eval_batch_size=3,
        **options,
    )
    assert len(step_logs(packed)) == 3
    assert_same_runs(padded, packed)
    evaluated = [run.evaluate(made(rows(5))) for run in (padded, packed)]
    times = ("runtime", "per_second")
    names = {n for n in evaluated[0] if not n.endswith(times)}
    assert len(names) > 8
    for each in names:
        assert evaluated[1][each] == pytest.approx(evaluated[0][each], rel=2e-5, abs=2e-6), each


@pytest.mark.parametrize(
    ("objective", "targets", "checkpointing", "reference"),
    [
        ("tdpo2", "all-linear", False, "__base__"),
        ("tdpo2", "all-linear", True, "__base__"),
        ("adadpo", ["q_proj", "lm_head"], False, "__base__"),
        ("tdpo2", "all-linear", False, None),
        ("adadpo", ["q_proj", "lm_head"], False, None),
    ],
)
def test_adapters_that_are_their_own_reference(
    tmp_path, objective, targets, checkpointing, reference
):
    """Their base, or their state before training, from which the second step differs."""

    def adapted(_):
        config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=targets)
        model = peft.get_peft_model(tiny.model(), config)
        torch.manual_seed(3)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        return model

    padded, packed = both_ways(
        tmp_path,
        adapted,
        count=8,
        objective=objective,
        gradient_checkpointing=checkpointing,
        ref_adapter_name=reference,
    )
    assert packed.ref_model is None
    assert_same_runs(padded, packed)
    first, second = (abs(log["rewards/margins"]) for log in step_logs(packed))
    # Steps are small here.
    assert min(first, second) > 1e-3 if reference else first == 0 and second > 1e-5
    assert prefkern.last_plan().rank == (4 if "lm_head" in targets else 0)


def test_accumulated_packed_batches_train_as_one(tmp_path):
    """7 pairs: a step of 4 and one of 3, as 1 x 4 padded and as 2 x 2 packed."""
    runs = [
        trainer(
            tmp_path,
            count=7,
            ref_model=tiny.model(seed=1),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
            padding_free=packed,
            callbacks=[Record()],
            optim="sgd",
            max_grad_norm=0.0,
        )
        for size, packed in ((4, False), (2, True))
    ]
    for run in runs:
        run.train()
    assert_same_runs(*runs)


def test_first_loss_in_bf16_is_that_of_equal_models(tmp_path):
    run = trainer(tmp_path, objective="dpo", bf16=True, max_steps=1, padding_free=True)
    run.train()
    assert step_logs(run)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert step_logs(run)[0]["grad_norm"] > 1e-6


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "bounds_only"])
def test_attention_over_the_whole_row_is_told_of(tmp_path, caplog, implementation):
    transformers.AttentionInterface.register("bounds_only", BoundsOnly())
    trainer(tmp_path, model=built("Llama", implementation), padding_free=True)
    assert ("multiplies the whole row" in caplog.text) == (implementation == "eager")


def sequences(lengths=(9, 1, 14, 5), seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, tiny.VOCAB_SIZE, (length,), generator=generator) for length in lengths]


def packed_row(parts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    bounds = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0)
    return torch.cat(parts)[None], bounds.int()


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "GPT2"])
def test_token_logprobs_of_a_packed_row_are_those_of_each_alone(family):
    """Against the model's own logits, one sequence at a time; every parameter's gradient."""
    model = built(family, "eager", **PACKS[family])
    parts = sequences()
    row, bounds = packed_row(parts)
    draw = torch.randn(row.shape[1] - 1, generator=torch.Generator().manual_seed(1))

    expected = torch.zeros(row.shape[1] - 1)
    for part, start in zip(parts, bounds.tolist(), strict=False):
        logits = model(input_ids=part[None]).logits[0, :-1].float()
        picked = logits.log_softmax(-1).gather(-1, part[1:, None])[:, 0]
        expected = expected.index_put((torch.arange(start, start + len(part) - 1),), picked)
    (expected * draw).sum().backward()
    true = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    actual = prefkern.token_logprobs(model, row, cu_seqlens=bounds)
    (actual * draw).sum().backward()
    assert actual.shape == (1, row.shape[1] - 1)
    assert actual[0, bounds[1:-1].long() - 1].eq(0).all()
    assert (actual != 0).sum() == sum(len(part) - 1 for part in parts)
    torch.testing.assert_close(actual[0], expected, atol=2e-5, rtol=2e-5)
    for name, parameter in model.named_parameters():
        if name in true:
            torch.testing.assert_close(parameter.grad, true[name], atol=2e-5, rtol=2e-4)
    assert prefkern.last_plan().backend == "torch"


def test_no_label_crosses_a_boundary():
    labels = torch.tensor([[10, 11, 12, 20, 30, 31]])
    bounds = torch.tensor([0, 3, 4, 6], dtype=torch.int32)
    assert align_labels(labels).tolist() == [[11, 12, 20, 30, 31, -100]]
    assert align_labels(labels, bounds).tolist() == [[11, 12, -100, -100, 31, -100]]


def test_collators_pack_what_they_pad():
    rows = [
        {"prompt_ids": [5, 6], "chosen_ids": [7, 1], "rejected_ids": [8]},
        # without a prompt: its first token has no context
        {"prompt_ids": [], "chosen_ids": [9, 9, 1], "rejected_ids": [4, 1]},
    ]
    batch = PreferenceCollator(0, padding_free=True)(rows)
    assert batch.keys() == {"input_ids", "labels", "cu_seqlens"}
    assert batch["input_ids"].tolist() == [[5, 6, 7, 1, 9, 9, 1, 5, 6, 8, 4, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 1, 9, 9, 1, -100, -100, 8, 4, 1]]
    assert batch["cu_seqlens"].tolist() == [0, 4, 7, 10, 12]
    assert batch["cu_seqlens"].dtype == torch.int32
    assert sequence_count(batch) == sequence_count(PreferenceCollator(0)(rows)) == 4
    padded = align_labels(PreferenceCollator(0)(rows)["labels"])
    aligned = align_labels(batch["labels"], batch["cu_seqlens"])
    assert aligned[aligned != -100].tolist() == padded[padded != -100].tolist()

    single = [
        {"prompt_ids": [5], "completion_ids": [7, 1], "desirable": True},
        {"prompt_ids": [6], "completion_ids": [8], "desirable": False},
    ]
    batch = ExampleCollator(0, padding_free=True)(single)
    assert batch["mismatched_input_ids"].tolist() == [[5, 8, 6, 7, 1]]
    assert batch["mismatched_labels"].tolist() == [[-100, 8, -100, 7, 1]]
    assert batch["mismatched_cu_seqlens"].tolist() == [0, 2, 5]
    batch = ExampleCollator(0, padding_free=True)([single[0]] * 2)
    assert batch["mismatched_input_ids"].shape == (1, 0)
    assert batch["mismatched_cu_seqlens"].tolist() == [0]


def test_a_model_computes_as_many_tokens_as_there_are(tmp_path):
    """Pairs of 5 to 40 tokens: the positions that the policy's embedding computes in a step."""
    words = ["good", "film", "plot", "bad"]
    rows = [
        {
            "prompt": "the film",
            "chosen": " " + " ".join(words[i % 4] for i in range(n)),
            "rejected": " bad",
        }
        for n in (2, 5, 12, 37)
    ]
    counts = {}
    for packed in (False, True):
        run = trainer(
            tmp_path,
            objective="simpo",
            train_dataset=made(rows),
            padding_free=packed,
            include_num_input_tokens_seen="non_padding",
        )
        # As base models often have it: not everything that equals the pad token is padding.
        run.processing_class.pad_token = "<eos>"
        prefkern.models.head_transform(run.model)
        seen = []
        run.model.get_input_embeddings().register_forward_hook(
            lambda m, inputs, out, seen=seen: seen.append(inputs[0].numel())
        )
        run.train()
        counts[packed] = sum(seen)
        # Trainer's own counts.
        assert run.state.num_input_tokens_seen == 84
        operations = 6 * counts[packed] * run.model.num_parameters(exclude_embeddings=True)
        assert run.state.total_flos == operations
    # 8 rows of 2 + 37 + 1; 4 x (2 + 1) of prompts and ends twice, responses of 56 and 4.
    assert counts == {False: 320, True: 84}


class BoundsOnly:
    """Attention without a mask: it finds sequences by the bounds alone, as flash attention does."""

    def __init__(self):
        self.calls = 0

    def __call__(self, module, query, key, value, attention_mask, scaling, **kwargs):
        assert attention_mask is None
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        bounds = kwargs.get("cu_seq_lens_q")
        if bounds is None:
            parts = [(query, key, value)]
        else:
            self.calls += 1
            assert torch.equal(bounds, kwargs["cu_seq_lens_k"]) and bounds.dtype == torch.int32
            lengths = bounds.diff().tolist()
            assert kwargs["max_length_q"] == kwargs["max_length_k"] == max(lengths)
            parts = zip(*(x.split(lengths, 2) for x in (query, key, value)), strict=True)
        outs = [
            torch.nn.functional.scaled_dot_product_attention(*part, is_causal=True, scale=scaling)
            for part in parts
        ]
        return torch.cat(outs, 2).transpose(1, 2), None


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_bounds_reach_attention_that_has_no_mask(tmp_path, checkpointing):
    attention = BoundsOnly()
    transformers.AttentionInterface.register("bounds_only", attention)
    padded, packed = both_ways(
        tmp_path,
        lambda seed: built("Llama", "bounds_only", seed),
        ref_model=lambda: tiny.model(seed=1),
        count=4,
        gradient_checkpointing=checkpointing,
    )
    assert attention.calls > 4
    assert_same_runs(padded, packed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", REFUSED)
def test_a_family_whose_sequences_see_one_another_is_refused(family, dtype):
    options, problem = REFUSED[family]
    model = built(family, "eager", **options).to(dtype)
    row, bounds = packed_row(sequences())
    kind, implementation = type(model).__name__, model.config._attn_implementation
    message = f"{kind} with attn_implementation='{implementation}' cannot take packed.*{problem}"
    with pytest.raises(ValueError, match=message):
        prefkern.token_logprobs(model, row, cu_seqlens=bounds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", PACKS)
def test_no_family_that_packs_is_refused(family, dtype):
    require_packing(built(family, "eager", **PACKS[family]).to(dtype))


def test_positions_that_a_model_counts_itself_are_found():
    model = tiny.model("GPT2")
    embed = model.transformer.wpe.forward
    model.transformer.wpe.forward = lambda ids: embed(torch.arange(ids.shape[-1])[None])
    with pytest.raises(ValueError, match="a model that counts positions along the row"):
        require_packing(model)


def test_chunks_of_attention_begin_with_each_sequence():
    """Llama 4's. Older transformers lay them over the row, so there each sequence goes alone."""
    options = {
        "num_local_experts": 2,
        "intermediate_size_mlp": 32,
        "layer_types": ["chunked_attention", "full_attention"],
    }
    model = built("Llama4Text", "eager", attention_chunk_size=12, **options)
    parts = sequences((17, 30))
    row, bounds = packed_row(parts)
    inputs = packing._inputs(model, row, bounds, None, "positions")
    with torch.no_grad():
        packed = model(**inputs).logits[0]
        alone = torch.cat([model(input_ids=part[None]).logits[0] for part in parts])
    is_right = versions.CHUNKS_PER_SEQUENCE.is_here
    assert bool((packed - alone).abs().max() < 1e-4) == is_right
    # Of a model whose chunks are too long for the probe's sequences.
    model.config.attention_chunk_size = 8192
    require_packing(model)
    assert model.config.attention_chunk_size == 8192
    assert packing._way(model, shares=False) == ("positions" if is_right else "branches")
    model.config.attention_chunk_size = 12
    with torch.no_grad():
        logps = prefkern.token_logprobs(model, row, cu_seqlens=bounds)
        expected = [prefkern.token_logprobs(model, part[None])[0] for part in parts]
    first, second = (part.shape[0] - 1 for part in parts)
    torch.testing.assert_close(logps[0, :first], expected[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(logps[0, -second:], expected[1], atol=1e-4, rtol=0)


def test_the_probe_runs_once_for_each_implementation(monkeypatch):
    model = tiny.model().train()
    probes = []
    problem = packing._problem
    monkeypatch.setattr(packing, "_problem", lambda *a: probes.append(1) or problem(*a))
    state = torch.random.get_rng_state()
    for implementation in ("sdpa", "sdpa", "eager", "eager"):
        model.set_attn_implementation(implementation)
        require_packing(model)
    assert len(probes) == 2
    assert model.training and torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_prompt_learning_is_refused(tmp_path):
    tuned = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="LlamaForCausalLM .* prompt learning puts its virtual"):
        trainer(tmp_path, peft_config=tuned, padding_free=True)


def test_refusals_come_with_the_trainer(tmp_path):
    options, problem = REFUSED["Falcon"]
    with pytest.raises(ValueError, match=f"FalconForCausalLM .*{problem}.*Leave out padding_free"):
        trainer(tmp_path, model=tiny.model("Falcon", **options), padding_free=True)
    with pytest.raises(ValueError, match=r"pad_to_multiple_of \(8\) has no effect under padding_f"):
        trainer(tmp_path, padding_free=True, pad_to_multiple_of=8)
    with pytest.raises(ValueError, match="dispatch_batches cuts a batch by its rows"):
        trainer(tmp_path, accelerator_config={"dispatch_batches": True})
    with pytest.raises(ValueError, match="padding_free has no effect on a data_collator"):
        trainer(tmp_path, padding_free=True, data_collator=PreferenceCollator(0))


def test_a_collator_of_ones_own_may_pack(tmp_path):
    run = trainer(tmp_path, count=4, data_collator=PreferenceCollator(0, padding_free=True))
    run.train()
    assert step_logs(run)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)

    def with_mask(rows):
        batch = PreferenceCollator(0, padding_free=True)(rows)
        return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}

    with pytest.raises(
        ValueError, match="from which all other inputs follow; got .*attention_mask"
    ):
        trainer(tmp_path, count=4, data_collator=with_mask).train()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"bounds": torch.tensor([0, 4, 30])}, ValueError, "rise from 0 to the number of tokens"),
        ({"bounds": torch.tensor([1, 4, 29])}, ValueError, "rise from 0"),
        ({"bounds": torch.tensor([0, 4, 4, 29])}, ValueError, "by at least 1 each"),
        ({"bounds": torch.tensor([0])}, ValueError, r"must have shape \[S \+ 1\]"),
        ({"bounds": torch.tensor([0.0, 29.0])}, TypeError, "int32 or int64"),
        ({"bounds": [0, 29]}, TypeError, "int32 or int64"),
        ({"row": torch.ones(2, 29, dtype=torch.int64)}, ValueError, r"one row \[1, M\], got shape"),
    ],
)
def test_wrong_bounds(change, error, message):
    row, bounds = packed_row(sequences())
    given = {"row": row, "bounds": bounds, **change}
    with pytest.raises(error, match=message):
        packed_inputs(tiny.model(), given["row"], given["bounds"])


def test_a_packed_row_has_no_mask():
    row, bounds = packed_row(sequences())
    for name in ("attention_mask", "position_ids"):
        with pytest.raises(
            ValueError, match=f"takes only input_ids and cu_seqlens, also got {name}"
        ):
            prefkern.token_logprobs(
                tiny.model(), row, cu_seqlens=bounds, **{name: torch.ones_like(row)}
            )


RANKED = {
    "adadpo": {"objective_options": {"clip": 1.1}},
    "kto": {"objective": "kto"},
    "shared": {"objective_options": {"clip": 1.1}},
}


def _one_prompt(count: int, seed: int = 0) -> list[dict]:
    """Without mismatched pairs, which depend on the batch."""
    return [{**row, "prompt": "the film"} for row in single_rows(count, seed)]


def _train_on_ranks(path: Path, name: str, ranks: int) -> dict:
    record = Record()
    options = dict(RANKED[name])
    rows = {"adadpo": tiny.pairs, "kto": _one_prompt, "shared": tiny.pairs}[name]
    if name == "shared":
        options["share_prompt"] = ranks > 1
    run = trainer(
        path,
        model=tiny.model(),
        ref_model=tiny.model(seed=1),
        train_dataset=made(rows(8)),
        # 5 items leave the ranks an uneven last batch.
        eval_dataset=made(rows(5, 2)),
        per_device_train_batch_size=4 // ranks,
        per_device_eval_batch_size=2,
        padding_free=ranks > 1,
        train_sampling_strategy="sequential",
        optim="sgd",
        max_grad_norm=0.0,
        include_num_input_tokens_seen="non_padding",
        callbacks=[record],
        **options,
    )
    run.train()
    metrics = run.evaluate()
    assert run.args.world_size == ranks
    return {"gradients": record.gradients, "logs": [*step_logs(run), metrics]}


@pytest.mark.long
def test_two_packed_ranks_train_and_evaluate_as_one_padded(tmp_path):
    run_on_two_ranks(__file__, str(tmp_path))
    for name in RANKED:
        expected = _train_on_ranks(tmp_path, name, ranks=1)
        for rank in range(2):
            actual = torch.load(tmp_path / f"{name}{rank}.pt")
            assert len(actual["gradients"]) == len(expected["gradients"]) == 2
            for mine, true in zip(actual["gradients"], expected["gradients"], strict=True):
                assert_same_weights(mine, true, atol=1e-6, rtol=1e-3)
                assert max(gradient.abs().max() for gradient in true.values()) > 1e-3
            for mine, true in zip(actual["logs"], expected["logs"], strict=True):
                # A shared prompt is one input.
                own = ("time", "second", "norm", *(["tokens_seen"] if name == "shared" else []))
                names = {n for n in true if not n.endswith(own)}
                assert len(names) > 8 and {"loss", "eval_loss"} & names
                for key in names:
                    assert mine[key] == pytest.approx(true[key], rel=1e-4, abs=1e-5), (name, key)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for each in RANKED:
        torch.save(_train_on_ranks(folder, each, 2), folder / f"{each}{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()
