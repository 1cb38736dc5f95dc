"""TPO in PreferenceTrainer: rows with a third, gold response, in every layout; and what it refuses."""

from __future__ import annotations

import pytest
import torch

from support import tiny

pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")

from support.training import Record, assert_same_weights, made, step_logs, trainer, weights

LAYOUTS = {
    "packed": {"padding_free": True},
    "prompt shared": {"padding_free": True, "share_prompt": True},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
}


def run_of(tmp_path, **options):
    record = Record()
    run = trainer(
        tmp_path,
        train_dataset=tiny.triple_dataset(8),
        eval_dataset=tiny.triple_dataset(5, seed=3),
        train_sampling_strategy="sequential",
        max_grad_norm=0.0,
        callbacks=[record],
        **{"objective": "tpo", "beta": 0.1, "token_metrics": True, **options},
    )
    run.train()
    return run, run.evaluate(), record.gradients


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_one_run(tmp_path, layout):
    (padded, metrics, gradients), (other, others, found) = (
        run_of(tmp_path, **options) for options in ({}, LAYOUTS[layout])
    )
    assert len(step_logs(padded)) == len(step_logs(other)) == 2
    for mine, true in zip([*step_logs(other), others], [*step_logs(padded), metrics], strict=True):
        # A prompt that is shared counts once among the tokens.
        others_own = ("runtime", "per_second", "num_tokens")
        for name in (n for n in true if not n.endswith(others_own)):
            assert mine[name] == pytest.approx(true[name], rel=1e-4, abs=1e-5), name
    # Adam divides small gradients by themselves: of the first step they are compared to rounding.
    total = torch.cat([gradient.flatten() for gradient in gradients[0].values()]).norm()
    for name, true in gradients[0].items():
        assert (found[0][name] - true).norm() < 1e-6 * total, name
    assert_same_weights(weights(other.model), weights(padded.model), atol=1e-4, rtol=1e-3)
    assert padded.ref_model is None and metrics["eval_logps/gold"] < 0


def test_batches_by_tokens_count_the_third_response(tmp_path):
    run, _, _ = run_of(
        tmp_path, padding_free=True, max_tokens_per_batch=120,
        per_device_train_batch_size=8, per_device_eval_batch_size=8,
    )  # fmt: skip
    (batch, *_) = run.get_train_dataloader()
    assert batch["input_ids"].shape[1] <= 120 and (len(batch["cu_seqlens"]) - 1) % 3 == 0
    assert sum(log["batch/pairs"] for log in step_logs(run)) >= 8
    with pytest.raises(ValueError, match="raise max_tokens_per_batch"):
        longest = max(len(row["reference_ids"]) for row in run.train_dataset)
        trainer(
            tmp_path, objective="tpo", train_dataset=tiny.triple_dataset(8), padding_free=True,
            max_tokens_per_batch=2 * longest,
            per_device_train_batch_size=8, per_device_eval_batch_size=8,
        )  # fmt: skip


@pytest.mark.parametrize("ld_alpha", [None, 0.5])
@pytest.mark.parametrize("precompute", [False, True])
def test_with_a_reference_for_the_pairs(tmp_path, ld_alpha, precompute):
    """`dpo+tpo` from equal models: the pair's part of DPO is ln 2."""
    options = {"ref_cache_dir": ""} if precompute else {}
    runs = [
        trainer(
            tmp_path,
            objective=name,
            train_dataset=tiny.triple_dataset(4),
            max_steps=1,
            ld_alpha=ld_alpha,
            precompute_ref_log_probs=precompute and name != "tpo",
            **(options if name != "tpo" else {}),
        )
        for name in ("dpo+tpo", "tpo")
    ]
    for run in runs:
        run.train()
    both, alone = (step_logs(run)[0]["loss"] for run in runs)
    # Equal beta is not asked for: each has its default.
    assert both == pytest.approx(alone + 0.693147, rel=1e-5)


def test_without_a_third_response_pairs_are_enough(tmp_path):
    run = trainer(tmp_path, objective="tpo", objective_options={"tpo_alpha": 0.0})
    run.train()
    assert "logps/gold" not in step_logs(run)[0]


def test_what_is_missing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'train' has no column 'reference', the third response"):
        trainer(tmp_path, objective="tpo", train_dataset=made(tiny.pairs(4)))
    run = trainer(tmp_path, objective="tpo", train_dataset=tiny.triple_dataset(8))
    with pytest.raises(ValueError, match="'eval' has no column 'reference'"):
        run.evaluate(tiny.dataset(4))
    with pytest.raises(ValueError, match="mixes pairwise objectives; 'kto' is on single responses"):
        trainer(tmp_path, objective="tpo+kto", train_dataset=tiny.triple_dataset(8))
