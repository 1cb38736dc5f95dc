"""What users of TRL's DPOTrainer rely on around a step, against TRL's own trainer.

LoRA on the head, packed batches, sums that a dataset carries, the names of metrics.
"""

from __future__ import annotations

import logging
import math

import pytest
import torch
import transformers

pytest.importorskip("trl")
peft = pytest.importorskip("peft")

from trl import DPOConfig
from trl import DPOTrainer as PlainDPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

import prefkern
import twins
from prefkern.integrations.trl import DPOTrainer
from support import tiny, training
from support.adapters import lora, trained
from support.trl_runs import build

KINDS = [PlainDPOTrainer, DPOTrainer]


def losses(run) -> list[float]:
    return [log["loss"] for log in run.state.log_history if "loss" in log]


def reference():
    return tiny.model(seed=1)


def on_the_head():
    return peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")


@pytest.mark.parametrize("given", ["config", "model"])
def test_lora_on_the_head_trains(tmp_path, given):
    """TRL refuses it: its operator reads the head's own weight. Logits in memory are the oracle."""
    if given == "config":
        options = {"model": tiny.model(), "peft_config": on_the_head()}
    else:
        options = {"model": trained(on_the_head())}
    run = build(tmp_path, objective="dpo", max_steps=2, **options)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    batch = run._prepare_inputs(next(iter(run.get_train_dataloader())))
    loss = run.compute_loss(run.model, batch)
    assert prefkern.last_plan().rank == 4
    ids, mask = batch["input_ids"], batch["attention_mask"]
    labels = ids.masked_fill(batch["completion_mask"] == 0, -100)[:, 1:]
    logps = run.model(ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    sums = (logps.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)).sum(1)
    chosen, rejected = (sums - torch.cat(run.compute_ref_log_probs(run.model, batch))).chunk(2)
    expected = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    run.train()
    assert losses(run)[0] == pytest.approx(math.log(2), abs=1e-6) != losses(run)[1]
    moved = {n for n, p in run.model.named_parameters() if not torch.equal(p, before[n])}
    assert any("lm_head" in name for name in moved) and all("lora_" in name for name in moved)


def test_trls_own_trainer_still_refuses_it_afterwards(tmp_path):
    """What the constructor changes in TRL, it puts back, after an error as well."""
    from trl.trainer import dpo_trainer

    layer = dpo_trainer.BaseTunerLayer
    build(tmp_path, objective="dpo", peft_config=on_the_head())
    assert dpo_trainer.BaseTunerLayer is layer
    with pytest.raises(ValueError, match="`train_dataset` is required"):
        build(tmp_path, objective="dpo", train_dataset=None)
    assert dpo_trainer.BaseTunerLayer is layer


def test_what_the_head_cannot_be_read_with_is_still_refused(tmp_path):
    config = peft.LoraConfig(target_modules=["lm_head"], use_dora=True, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="output head .* variant of LoRA"):
        build(tmp_path, objective="dpo", peft_config=config)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"objective": "tdpo2"},
        {"precompute_ref_log_probs": True},
        {"peft_config": lora()},
        {"ld_alpha": 0.3, "max_length": 7, "truncation_mode": "keep_end"},
    ],
    ids=lambda options: ", ".join(options) or "plain",
)
def test_packed_batches_train_as_padded_ones(options):
    """TRL's collator pads; the pairs are those of the padded run, and so is everything logged."""

    def run(**more):
        given = {} if "peft_config" in options else {"ref_model": reference()}
        return twins.run(DPOTrainer, DPOConfig, **given, **options, **more)

    rows, padded = [], run()
    forward = DPOTrainer._prepare_inputs

    def kept(self, inputs):
        prepared = forward(self, inputs)
        rows.append(prepared)
        return prepared

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DPOTrainer, "_prepare_inputs", kept)
        packed = run(padding_free=True)
    assert rows and all(len(row["input_ids"]) == 1 and "cu_seqlens" in row for row in rows)
    assert packed.trainer.args.padding_free
    assert twins.compare("", padded, packed).worst <= twins.BOUND
    if not options:
        theirs = twins.run(PlainDPOTrainer, DPOConfig, ref_model=reference(), padding_free=True)
        assert twins.compare("", theirs, packed, twins._OF_TOKENS).worst <= twins.BOUND


def test_packing_gives_compute_metrics_padded_rows(tmp_path):
    given = []

    def compute_metrics(predictions):
        given.append(predictions.predictions.shape)
        return {}

    options = {"padding_free": True, "compute_metrics": compute_metrics}
    options["per_device_eval_batch_size"] = 2
    build(tmp_path, ref_model=reference(), eval_dataset=tiny.dataset(4), **options).evaluate()
    assert given[0][0] == 8


def test_packing_is_refused_where_it_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="args.pad_to_multiple_of is 8, but args.padding_free"):
        build(tmp_path, ref_model=reference(), padding_free=True, pad_to_multiple_of=8)
    rows = tiny.dataset(2).add_column("images", [[], []])
    with pytest.raises(ValueError, match="args.padding_free does not support images"):
        build(tmp_path, train_dataset=rows, ref_model=reference(), padding_free=True)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="prompt learning puts its virtual tokens"):
        build(tmp_path, padding_free=True, peft_config=config)


SUMS = {"ref_chosen_logps": [-7.0 - i for i in range(8)], "ref_rejected_logps": [-9.0] * 8}


def carrying(*columns: str):
    rows = tiny.dataset(8)
    for column in columns:
        rows = rows.add_column(column, SUMS[column])
    return rows


def test_sums_that_a_dataset_carries_are_used(tmp_path, caplog):
    """Beside precompute_ref_log_probs, where TRL ends in duplicated columns."""
    options = {"train_dataset": carrying(*SUMS), "precompute_ref_log_probs": True, "max_steps": 1}
    with pytest.raises(Exception, match="duplicated"):
        build(tmp_path, PlainDPOTrainer, **options)
    with caplog.at_level(logging.WARNING):
        run = build(tmp_path, **options)
    assert "dataset 'train' has ref_chosen_logps and ref_rejected_logps" in caplog.text
    assert run.train_dataset["ref_chosen_logps"][:] == SUMS["ref_chosen_logps"]
    batch = run._prepare_inputs(next(iter(run.get_train_dataloader())))
    out = run.compute_loss(run.model, batch, return_outputs=True)[1]
    assert torch.equal(out.ref_rejected_logps, torch.full((4,), -9.0))
    assert {*out.ref_chosen_logps.tolist()} <= {*SUMS["ref_chosen_logps"]}


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        (["ref_chosen_logps"], {}, "dataset 'train' has only one of ref_chosen_logps and ref_rej"),
        ([*SUMS], {"ld_alpha": 0.5}, "carries reference sums .* args.ld_alpha has no effect"),
        ([*SUMS], {"ref_model": True}, "carries reference sums .* ref_model has no effect"),
    ],
)
def test_sums_beside_what_they_do_not_know_are_refused(tmp_path, columns, options, message):
    if "ref_model" in options:
        options = {"ref_model": reference()}
    with pytest.raises(ValueError, match=message):
        build(tmp_path, train_dataset=carrying(*columns), precompute_ref_log_probs=True, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_of_several_datasets_has_trls_name(tmp_path, kind):
    """TRL's metrics do not carry the dataset's name, and the last dataset's value stays."""
    run = build(
        tmp_path,
        kind,
        ref_model=reference(),
        eval_dataset={"a": tiny.dataset(4, seed=2), "b": tiny.dataset(4, seed=3)},
        per_device_eval_batch_size=4,
        metric_for_best_model="eval_rewards/margins",
        load_best_model_at_end=True,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        max_steps=2,
    )
    run.train()
    logs = [log for log in run.state.log_history if "eval_b_loss" in log]
    margins = [log["eval_rewards/margins"] for log in logs]
    assert run.state.best_metric == max(margins) != min(margins)
    if kind is DPOTrainer:
        assert margins == [log["eval_b_rewards/margins"] for log in logs]
        other = [
            log["eval_a_rewards/margins"] for log in run.state.log_history if "eval_a_loss" in log
        ]
        assert len(other) == 2 and other != margins
        assert "eval_loss" not in logs[0]


def test_metrics_keep_their_names_where_no_response_token_is_left(tmp_path):
    class Cut:
        """A collator of one's own that leaves no response token."""

        def __init__(self, collator):
            self.collator = collator

        def __call__(self, examples):
            batch = self.collator(examples)
            batch["completion_mask"] = torch.zeros_like(batch["completion_mask"])
            return batch

    logs = []
    for kind in KINDS:
        run = build(
            tmp_path, kind, ref_model=reference(), eval_dataset=tiny.dataset(4), max_steps=1
        )
        run.data_collator = Cut(run.data_collator)
        metrics = run.evaluate()
        run.train()
        logs.append({**run.state.log_history[-2], **metrics})
        assert logs[-1]["loss"] == pytest.approx(math.log(2))
    theirs, ours = logs
    assert theirs.keys() <= ours.keys()
    for name in twins._OF_TOKENS:
        assert ours[name] == theirs[name] == ours[f"eval_{name}"] == theirs[f"eval_{name}"] == 0.0


def encoder_decoder(tied: bool):
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(
        vocab_size=tiny.VOCAB_SIZE,
        **sizes,
        tie_word_embeddings=tied,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
        dropout_rate=0.0,
    )
    torch.manual_seed(0)
    return transformers.T5ForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("kind", "make_config", "tied", "options"),
    [
        (CPOTrainer, CPOConfig, True, {}),
        (CPOTrainer, CPOConfig, False, {"loss_type": "simpo", "cpo_alpha": 0.0}),
        (ORPOTrainer, ORPOConfig, True, {}),
        (ORPOTrainer, ORPOConfig, False, {}),
    ],
)
def test_fuse_head_on_an_encoder_decoder(kind, make_config, tied, options):
    """T5 scales hidden states before a tied head; labels are those of the decoder, not shifted."""
    pair = [
        twins.run(
            kind,
            make_config,
            fuse,
            model=encoder_decoder(tied),
            max_steps=2,
            max_completion_length=32,
            **options,
        )
        for fuse in (False, True)
    ]
    assert prefkern.last_plan().vocab_size == tiny.VOCAB_SIZE
    assert any(name.startswith("encoder.") for name in pair[1].gradients[0])
    assert twins.compare("", *pair).worst <= twins.BOUND


@pytest.mark.parametrize("options", [{}, {"padding_free": True}], ids=["padded", "packed"])
def test_our_own_trainer_counts_tokens_as_trl_does(tmp_path, options):
    rows = tiny.dataset(8)
    theirs = build(tmp_path, PlainDPOTrainer, train_dataset=rows, ref_model=reference())
    theirs.train()
    ours = training.trainer(tmp_path, train_dataset=rows, ref_model=reference(), **options)
    ours.train()
    counts = [
        [log["num_tokens"] for log in run.state.log_history if "loss" in log]
        for run in (theirs, ours)
    ]
    assert counts[0] == counts[1] and 0 < counts[0][0] < counts[0][1]
    assert ours.state.log_history[-1].get("num_tokens") in (None, counts[1][-1])
