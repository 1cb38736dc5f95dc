"""ld_alpha in training: batches of every layout, and sums of the reference with the same weights."""

from __future__ import annotations

import json
import math

import pytest

pytest.importorskip("accelerate")

from support import tiny
from support.training import assert_same_weights, lora, step_logs, trainer, weights

LN2 = math.log(2)
OPTIONS = {"ld_alpha": 0.3, "objective": "adadpo", "rpo_alpha": 0.2}


def losses(run) -> list[float]:
    run.train()
    return [log["loss"] for log in step_logs(run)]


@pytest.mark.parametrize(
    "layout", [{"padding_free": True}, {"padding_free": True, "share_prompt": True}]
)
def test_every_layout_trains_alike(tmp_path, layout):
    runs = [
        trainer(tmp_path, ref_model=tiny.model(seed=1), **OPTIONS, **each) for each in ({}, layout)
    ]
    padded, packed = (losses(run) for run in runs)
    assert packed == pytest.approx(padded, rel=1e-4)
    assert_same_weights(weights(runs[0].model), weights(runs[1].model), atol=1e-4, rtol=1e-3)
    plain = trainer(tmp_path, ref_model=tiny.model(seed=1), **{**OPTIONS, "ld_alpha": None})
    assert losses(plain) != pytest.approx(padded, rel=1e-3)


def test_equal_models_have_a_first_loss_of_ln_2(tmp_path):
    for options in ({}, {"peft_config": lora()}, {"precompute_ref_log_probs": True}):
        run = trainer(tmp_path, count=4, ld_alpha=0.3, objective="dpo", **options)
        assert losses(run)[0] == pytest.approx(LN2, abs=1e-6)


def test_precomputed_sums_have_the_same_weights(tmp_path):
    found = {}
    for name, options in {
        "each step": {},
        "precomputed": {"precompute_ref_log_probs": True},
        "again": {"precompute_ref_log_probs": True},
        "other weights": {"precompute_ref_log_probs": True, "ld_alpha": 0.9},
        "none": {"precompute_ref_log_probs": True, "ld_alpha": None},
    }.items():
        run = trainer(tmp_path, ref_model=tiny.model(seed=1), **{**OPTIONS, **options})
        found[name] = losses(run)
    assert found["precomputed"] == pytest.approx(found["each step"], rel=1e-5)
    assert found["again"] == found["precomputed"]
    assert len({round(run[0], 4) for run in found.values()}) == 3
    # Each has a key of its own; without weights it is what it was.
    keys = [json.loads(path.read_text()) for path in tmp_path.glob("reference-sums/*/key.json")]
    assert sorted(str(key["arithmetic"].get("ld_alpha")) for key in keys) == ["0.3", "0.9", "None"]


def test_carried_sums_are_refused(tmp_path):
    rows = tiny.dataset(4)
    carried = rows.add_column("ref_chosen_logps", [-9.0] * 4)
    carried = carried.add_column("ref_rejected_logps", [-9.0] * 4)
    for names in (
        {"train_dataset": carried},
        {"train_dataset": rows, "eval_dataset": carried},
    ):
        with pytest.raises(
            ValueError, match="carries reference sums .* and ld_alpha is 0.3: remove"
        ):
            trainer(tmp_path, **OPTIONS, **names)
    # Objectives without a reference leave them unread.
    trainer(tmp_path, train_dataset=carried, ld_alpha=0.3, objective="simpo")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "kto"}, "ld_alpha is 0.3, and KTO has no pairs"),
        ({"objective": "tdpo1"}, "ld_alpha is 0.3, and TDPO1's divergences"),
        ({"ld_alpha": 1.5}, r"ld_alpha must be in \[0, 1\], got 1.5"),
        ({"ld_alpha": "0.5"}, "ld_alpha must be a number, got str '0.5'"),
    ],
)
def test_where_it_cannot(tmp_path, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        trainer(tmp_path, **{"ld_alpha": 0.3, **options})
