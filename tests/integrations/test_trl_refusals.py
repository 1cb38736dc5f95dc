"""What prefkern's DPOTrainer for TRL refuses, by name: options without effect, margins, objectives."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from prefkern import objectives
from support import tiny
from support.trl_runs import build


def _with_margins(*values) -> datasets.Dataset:
    return tiny.dataset(len(values)).add_column("margin", list(values))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (tiny.dataset(4), "dataset 'train' has no column reward_margin or margin"),
        (_with_margins(1.0, None, 1.0, 1.0), r"dataset 'train', row 1: no margin \('margin' is No"),
        (_with_margins(1.0, 1.0, math.nan), r"dataset 'train', row 2: no margin \('margin' is nan"),
    ],
    ids=["none", "null", "nan"],
)
def test_margins_are_numbers(tmp_path, rows, message):
    """In a stream a bad one is refused when its batch is made, before it is trained on."""
    options = {"objective": "madpo", "ref_model": tiny.model(seed=1), "max_steps": 1}
    with pytest.raises(ValueError, match=message):
        build(tmp_path, train_dataset=rows, **options)
    with pytest.raises(ValueError, match="no margin|no column reward_margin"):
        build(tmp_path, train_dataset=rows.to_iterable_dataset(), **options).train()


REFUSED = [
    ({"loss_type": ["ipo"], "objective": "adadpo"}, "args.loss_type .* objective was given"),
    ({"ld_alpha": 0.5, "objective": "tdpo1"}, "ld_alpha is 0.5, and TDPO1's divergences"),
    ({"loss_weights": [2.0], "objective": "dpo"}, r"args.loss_weights is \[2.0\].*objective was"),
    ({"label_smoothing": 0.1}, "args.label_smoothing is 0.1.*option of robust, exo_pair, aot"),
    ({"label_smoothing": 0.1, "objective": "dpo"}, "args.label_smoothing .* objective_options"),
    (
        {"f_divergence_type": "forward_kl", "loss_type": ["nca_pair"]},
        r"args.f_divergence_type is 'forward_kl'.*\['nca_pair'\]; TRL takes it for sigmoid",
    ),
    ({"f_divergence_type": "forward_kl", "objective": "dpo"}, "args.f_divergence_type"),
    ({"f_alpha_divergence_coef": 0.7}, "args.f_alpha_divergence_coef is 0.7.*'reverse_kl'"),
    ({"discopop_tau": 0.1}, "args.discopop_tau is 0.1.*option of discopop"),
    ({"loss_type": ["exo_pair"]}, "label_smoothing"),
    ({"loss_type": ["sigmoid", "nope"]}, r"'nope'\], but TRL's losses are sigmoid, sigmoid_norm"),
    ({"torch_compile": True}, "args.torch_compile"),
    ({"label_smoothing_factor": 0.1}, "args.label_smoothing_factor"),
    ({"use_weighting": True, "objective": objectives.DPO(0.1)}, "args.use_weighting .*WPO"),
    ({"beta": 0.3, "objective": objectives.DPO(0.2)}, "args.beta is 0.3.* is 0.2"),
    (
        {"beta": 0.3, "objective": "dpo", "objective_options": {"beta": 0.2}},
        "args.beta is 0.3.* is 0.2",
    ),
    ({"beta": 0.3, "objective": "ipo"}, "args.beta is 0.3.*no beta"),
    ({"objective": "simpo"}, r"args.beta is 0.1, TRL's default.* is 2.0"),
    ({"objective_options": {"clip": 2.0}}, "objective_options .* needs an objective by name"),
    ({"objective": "simpo", "beta": 1.0, "precompute_ref_log_probs": True}, "SimPO has no ref"),
    ({"objective": "simpo", "beta": 1.0, "sync_ref_model": True}, "args.sync_ref_model"),
    ({"objective": "simpo", "beta": 1.0, "ref_model": "tiny"}, "ref_model was given"),
    ({"objective": "tdpo1", "precompute_ref_log_probs": True}, "args.precompute_ref_log_probs"),
    ({"objective": "adadp"}, "unknown objective 'adadp'"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[m[:30] for _, m in REFUSED])
def test_what_would_have_no_effect_is_refused_by_name(tmp_path, options, message):
    if options.get("ref_model") == "tiny":
        options = {**options, "ref_model": tiny.model(seed=1)}
    with pytest.raises(ValueError, match=message):
        build(tmp_path, **options)


@pytest.mark.parametrize("loss_type", ["ipo", "sigmoid_norm"])
def test_divergences_that_trl_1_9_defines_otherwise_are_refused_there(
    tmp_path, monkeypatch, loss_type
):
    monkeypatch.setattr("prefkern.integrations.trl.options.metadata.version", lambda name: "1.9.2")
    with pytest.raises(ValueError, match=f"with loss_type '{loss_type}', .* needs TRL 1.10"):
        build(tmp_path, loss_type=["hinge", loss_type], f_divergence_type="forward_kl")


def test_what_is_no_objective_of_pairs_is_refused(tmp_path):
    for objective in ("kto", objectives.KTO(0.1)):
        with pytest.raises(TypeError, match="KTO is on single responses"):
            build(tmp_path, objective=objective)
    with pytest.raises(TypeError, match="must be an objective of prefkern.objectives"):
        build(tmp_path, objective=3)
