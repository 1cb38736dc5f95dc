"""PreferenceTrainer refuses what would train something else or fail later, before it trains."""

from __future__ import annotations

import math
import types

import pytest

from support import tiny, versions

pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")

from accelerate.parallelism_config import ParallelismConfig

from prefkern.data.collate import PreferenceCollator
from prefkern.training.config import PreferenceConfig
from prefkern.training.rewards import RewardConfig
from support.training import made, single_rows, step_logs, trainer

LN2 = math.log(2)


def with_sums(count: int = 4) -> datasets.Dataset:
    """Pairs with reference sums of some other model."""
    rows = tiny.dataset(count).add_column("ref_chosen_logps", [-5.0] * count)
    return rows.add_column("ref_rejected_logps", [-50.0] * count)


@pytest.mark.parametrize("place", ["train", "eval", "eval_one"])
@pytest.mark.parametrize(
    "argument",
    ["ref_model", "ref_model_name_or_path", "ref_adapter_name", "precompute_ref_log_probs"],
)
def test_sums_in_a_dataset_are_not_used_in_place_of_what_was_asked_for(tmp_path, argument, place):
    value = {"ref_model": tiny.model(seed=1), "precompute_ref_log_probs": True}
    given = {argument: value.get(argument, "some/name")}
    evaluated = {"eval": with_sums(), "eval_one": {"two": tiny.dataset(4), "one": with_sums()}}
    if place == "train":
        given["train_dataset"] = with_sums()
    with pytest.raises(ValueError, match=f"dataset '{place}' carries reference sums") as caught:
        trainer(tmp_path, objective="dpo", eval_dataset=evaluated.get(place), **given)
    message = str(caught.value)
    assert f"beside which {argument} (" in message and f"leave {argument} out" in message
    assert "dataset.remove_columns(['ref_chosen_logps', 'ref_rejected_logps'])" in message


def test_nor_in_a_later_evaluation(tmp_path):
    """Sums that the trainer computed itself are recognised when they are passed back."""
    options = {"objective": "dpo", "precompute_ref_log_probs": True}
    run = trainer(tmp_path, eval_dataset={"one": tiny.dataset(4)}, **options)
    for dataset in (run.eval_dataset, run.eval_dataset["one"], {"one": tiny.dataset(4)}):
        metrics = run.evaluate(dataset)
        (loss,) = [value for name, value in metrics.items() if name.endswith("_loss")]
        assert loss == pytest.approx(LN2, abs=1e-6)
    for dataset, name in ((with_sums(), "eval"), ({"one": with_sums()}, "eval_one")):
        with pytest.raises(ValueError, match=f"dataset '{name}' carries reference sums"):
            run.evaluate(dataset)
    with pytest.raises(ValueError, match="dataset 'test' carries reference sums"):
        run.predict(with_sums())
    # Alone they are the reference, and an objective that has none of its own leaves them.
    run = trainer(tmp_path, objective="dpo", train_dataset=with_sums(), eval_dataset=with_sums())
    assert run.ref_model is None and run.evaluate()["eval_loss"] > 2
    trainer(tmp_path, objective="simpo", train_dataset=with_sums())


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (PreferenceConfig, "sp_size"),
        (RewardConfig, "cp_size"),
        (RewardConfig, "sp_size"),
    ],
)
@versions.PARALLELISM.needed
def test_sequences_over_several_ranks(tmp_path, monkeypatch, kind, name):
    """By the arguments, and as `accelerate launch` says it; with what works instead."""
    message = f"parallelism_config has {name}=2, .*by cp_size=2 under FSDP2, .*sequence_group=group"
    with pytest.raises(ValueError, match=message):
        kind(str(tmp_path), parallelism_config=ParallelismConfig(**{name: 2}))
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{name.upper()}", "2")
    with pytest.raises(ValueError, match=message):
        kind(str(tmp_path))


@pytest.mark.parametrize("kind", [PreferenceConfig, RewardConfig])
def test_a_parallelism_config_before_accelerate_1_12(tmp_path, kind):
    """Trainer itself, of transformers, would end with an AttributeError."""
    message = (
        r"parallelism_config needs accelerate 1.12 or newer, but 1\.\d+.* is installed: pip inst"
    )
    with pytest.raises(ValueError, match=message):
        kind(str(tmp_path), parallelism_config=types.SimpleNamespace(cp_size=1))


# Families with a table of positions, and what makes one of 16; OPT's and RoBERTa's have rows to spare.
TABLES = {
    "GPT2": {"n_positions": 16},
    "OPT": {"max_position_embeddings": 16, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "GPTJ": {
        "max_position_embeddings": 16,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "rotary_dim": 4,
    },
    "Roberta": {"max_position_embeddings": 18, "is_decoder": True, "pad_token_id": 1},
}


def of_length(count: int) -> list[dict]:
    """Three pairs; the longest row has `count` tokens, including the <eos> after the response."""
    rows = tiny.pairs(3)
    rows[1] = {"prompt": "film " * (count - 3), "chosen": "good film", "rejected": "bad"}
    return rows


@pytest.mark.parametrize("family", TABLES)
def test_rows_beyond_the_table_of_positions(tmp_path, family):
    model = tiny.model(family, **TABLES[family])
    options = {"model": model, "objective": "dpo", "max_steps": 1}
    message = (
        rf"dataset 'train' has a row of 17 tokens, but the model .{type(model).__name__}. has 16"
    )
    for packed in ({}, {"padding_free": True}):
        with pytest.raises(ValueError, match=f"{message} positions: max_length must be at most 16"):
            trainer(tmp_path, train_dataset=made(of_length(17)), **options, **packed)
    # As long as the table, and cut to it, they train.
    for length, bound in ((16, 1024), (17, 16)):
        run = trainer(tmp_path, train_dataset=made(of_length(length)), max_length=bound, **options)
        run.train()
        assert step_logs(run)[0]["loss"] > 0
    with pytest.raises(ValueError, match="dataset 'eval' has a row of 17 tokens"):
        run = trainer(tmp_path, train_dataset=made(of_length(9)), **options)
        run.evaluate(made(of_length(17)))


def test_rows_of_evaluation_padding_and_reference(tmp_path):
    model = tiny.model("GPT2", n_positions=16)
    short, long = made(of_length(16)), made(of_length(17))
    for given, message in (
        (
            {"model": model, "eval_dataset": {"one": short, "two": long}},
            "'eval_two' has a row of 17",
        ),
        ({"model": model, "pad_to_multiple_of": 10}, "16 tokens .padded to 20, a multiple of 10."),
        ({"ref_model": model, "train_dataset": long}, "the reference .GPT2LMHeadModel. has 16"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, objective="dpo", **{"train_dataset": short, **given})
    # Each prompt of KTO also meets the next response.
    rows = single_rows(4)
    rows[0]["prompt"], rows[1]["completion"] = "film " * 10, "good " * 10
    with pytest.raises(ValueError, match="has a row of 21 tokens, .* at most 16, got 1024"):
        trainer(tmp_path, model=model, objective="kto", train_dataset=made(rows))
    trainer(tmp_path, model=model, objective="kto", train_dataset=made(rows), max_length=16)

    # A collator may cut rows itself.
    def cutting(rows):
        return PreferenceCollator(0)(
            [{**row, "prompt_ids": row["prompt_ids"][-4:]} for row in rows]
        )

    trainer(tmp_path, model=model, train_dataset=long, data_collator=cutting).train()


def test_rotary_positions_go_on_with_a_warning(tmp_path, caplog):
    model = tiny.model(max_position_embeddings=16)
    trainer(tmp_path, model=model, train_dataset=made(of_length(16)))
    assert "max_position_embeddings" not in caplog.text
    run = trainer(tmp_path, model=model, train_dataset=made(of_length(17)), max_steps=1)
    assert "a row of 17 tokens, but the model (LlamaForCausalLM) was made for 16" in caplog.text
    run.train()


@pytest.mark.parametrize("place", ["model", "ref_model"])
def test_logits_that_are_not_explained_are_told_by_the_constructor(tmp_path, place):
    model = tiny.model(seed=1)

    class Odd(type(model)):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 1.7
            return out

    model.__class__ = Odd
    with pytest.raises(ValueError, match="the logits of Odd are not explained by its config"):
        # Of DPO the reference is a copy, which would tell instead.
        trainer(tmp_path, objective="simpo" if place == "model" else "dpo", **{place: model})


def test_columns_of_other_names_are_read_by_every_dataset(tmp_path):
    rows = tiny.pairs(8)
    others = [
        {"question": row["prompt"], "chosen": row["chosen"], "worse": row["rejected"]}
        for row in rows
    ]
    dataset = datasets.Dataset.from_list(others)
    expected = trainer(tmp_path / "a", train_dataset=datasets.Dataset.from_list(rows))
    with pytest.raises(ValueError, match="dataset 'train' has no column 'rejected'"):
        trainer(tmp_path / "b", train_dataset=dataset)
    names = {"prompt": "question", "rejected": "worse"}
    run = trainer(tmp_path / "c", train_dataset=dataset, eval_dataset=dataset, columns=names)
    assert run.train_dataset[:] == expected.train_dataset[:] == run.eval_dataset[:]
    later, again = run.evaluate(dataset)["eval_loss"], run.evaluate()["eval_loss"]
    assert later == again
    # A margin that this objective does not need is not read, whatever its name.
    gaps = dataset.add_column("delta", [None] * 8)
    trainer(tmp_path / "d", train_dataset=gaps, columns={**names, "margin": "delta"})
    with pytest.raises(ValueError, match="columns gives a name to 'answer', which is not read"):
        trainer(tmp_path / "e", train_dataset=dataset, columns={"answer": "worse"})
