"""Where prefkern, TRL and Liger mean different things by the same name: each row of the table.

The table is in docs/objectives.md. A test has the name of its row and runs what the row says about
the three. The last test asserts that every row has a test.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from support import tiny

pytest.importorskip("trl")
pytest.importorskip("liger_kernel")

import datasets
import trl
from liger_kernel.chunked_loss import (
    LigerFusedLinearCPOLoss,
    LigerFusedLinearDPOLoss,
    LigerFusedLinearKTOLoss,
    LigerFusedLinearORPOLoss,
    LigerFusedLinearSimPOLoss,
)
from trl import DPOTrainer as PlainDPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

import prefkern
from prefkern import objectives
from prefkern.data import truncate
from prefkern.data.collate import PreferenceCollator
from prefkern.integrations.trl import DPOTrainer
from support.liger_cases import CASES, SHAPES, batch, liger, run, sums
from support.oracles import Pair
from support.trl_loss import trl_dpo
from support.trl_runs import build
from support.versions import TRL_TILES

PAGE = Path(__file__).parent.parent.parent / "docs/objectives.md"
CPU = {"use_cpu": True, "bf16": False, "report_to": "none"}
ROWS: dict[str, Callable] = {}


def row(name: str) -> Callable:
    def keep(test: Callable) -> Callable:
        assert name not in ROWS
        ROWS[name] = test
        return test

    return keep


def token_rows(*rows: tuple[list[int], list[int], list[int]]) -> datasets.Dataset:
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return datasets.Dataset.from_list([dict(zip(names, each, strict=True)) for each in rows])


def first_log(tmp_path, kind, make_config=trl.DPOConfig, **options) -> dict[str, float]:
    """The log of a trainer's first step, with all pairs in one batch."""
    trainer = build(tmp_path, kind, make_config, max_steps=1, **options)
    trainer.train()
    return trainer.state.log_history[0]


def of_ours(tmp_path, objective, options, **given) -> dict[str, float]:
    options = {"objective": objective, "objective_options": options}
    return first_log(tmp_path, DPOTrainer, **options, **given)


def uneven():
    """Rows of 1 to 10 scored tokens, the chosen ones included."""
    data = batch((3, 10, 16, 50))
    for at, count in enumerate((1, 10, 4, 7, 2, 5)):
        data.labels[at] = torch.arange(10).where(torch.arange(10) < count, -100)
    return data


def halves(data):
    logps, lengths = sums(data.hidden, data.weight, data.bias, data.labels, -100)
    return [*logps.chunk(2), *lengths.chunk(2)]


@row("labels")
def test_labels_are_shifted_once(tmp_path):
    data = batch(SHAPES[2])
    ours, theirs = data.leaves(), data.leaves()
    torch.testing.assert_close(run(CASES["dpo"], ours).loss, liger(CASES["dpo"], theirs)[0])
    # The trainers, and token_logprobs, take labels as a model does.
    example = {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 1], "rejected_ids": [9, 1]}
    model = tiny.model()
    trainer = build(tmp_path, PlainDPOTrainer, ref_model=tiny.model())
    collated = trainer._prepare_inputs(trainer.data_collator([example]))
    expected = torch.cat(trainer.compute_ref_log_probs(trainer.ref_model, collated))
    ours = PreferenceCollator(0)([example])
    actual = prefkern.token_logprobs(model, ours["input_ids"], ours["attention_mask"],
                                     ours["labels"])  # fmt: skip
    torch.testing.assert_close(actual.sum(1), expected, atol=1e-5, rtol=1e-5)


@row("rows of a batch")
def test_chosen_rows_come_first():
    examples = token_rows(([5], [7, 8], [9]), ([6, 5], [7], [8, 9, 9])).to_list()
    ours, theirs = PreferenceCollator(0)(examples), DataCollatorForPreference(0)(examples)
    torch.testing.assert_close(ours["input_ids"], theirs["input_ids"])
    assert ours["input_ids"][:, :3].tolist()[:2] == [[5, 7, 8], [6, 5, 7]]
    data = batch(SHAPES[2]).leaves()
    out, aux = run(CASES["dpo"], data), liger(CASES["dpo"], data)[1]
    torch.testing.assert_close(out.chosen_logps, aux[0], atol=1e-4, rtol=1e-5)


@row("what is not scored")
def test_what_is_not_scored():
    examples = token_rows(([5], [7, 8], [9]), ([6, 5], [7], [8, 9, 9])).to_list()
    ours, theirs = PreferenceCollator(0)(examples), DataCollatorForPreference(0)(examples)
    assert torch.equal(ours["labels"] != -100, theirs["completion_mask"] == 1)
    data = batch(SHAPES[2], ignore_index=7).leaves()
    torch.testing.assert_close(run(CASES["cpo"], data).loss, liger(CASES["cpo"], data)[0])


@row("log-prob of a response")
def test_sums_or_means(tmp_path):
    data = uneven()
    chosen, rejected, n, m = halves(data)
    of_sums = -F.logsigmoid(0.1 * (chosen - rejected)).mean()
    of_means = -F.logsigmoid(0.1 * (chosen / n - rejected / m)).mean()
    call = (data.weight, data.hidden, data.labels)
    plain = {"use_ref_model": False, "compiled": False}
    torch.testing.assert_close(LigerFusedLinearDPOLoss(**plain)(*call)[0], of_sums)
    averaged = LigerFusedLinearDPOLoss(average_log_prob=True, **plain)(*call)[0]
    torch.testing.assert_close(averaged, of_means)
    loss_fn = prefkern.FusedPreferenceLoss(objectives.DPO(0.1))
    ours = loss_fn(data.hidden, data.weight, data.labels, ref_logps=torch.zeros(6))
    torch.testing.assert_close(ours.loss, of_sums)
    loss_fn = prefkern.FusedPreferenceLoss(objectives.SimPO(0.1, gamma=0.0))
    torch.testing.assert_close(loss_fn(data.hidden, data.weight, data.labels).loss, of_means)
    # The mean's loss of TRL, with a reference.
    given = {"ref_model": tiny.model(seed=1)}
    theirs = first_log(tmp_path, PlainDPOTrainer, loss_type=["sigmoid_norm"], beta=2.0, **given)
    mine = of_ours(tmp_path, "sigmoid_norm", {"beta": 2.0}, **given)
    assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


@row("IPO")
def test_ipo(tmp_path):
    with pytest.raises(ValueError, match="Unsupported loss_type: ipo"):
        LigerFusedLinearDPOLoss(loss_type="ipo")
    given = {"ref_model": tiny.model(seed=1), "beta": 0.3, "loss_type": ["ipo"]}
    theirs = first_log(tmp_path, PlainDPOTrainer, **given)["loss"]
    assert first_log(tmp_path, DPOTrainer, **given)["loss"] == pytest.approx(theirs, rel=1e-5)
    del given["beta"], given["loss_type"]
    normalised = {"tau": 0.3, "length_normalized": True}
    assert of_ours(tmp_path, "ipo", normalised, **given)["loss"] == pytest.approx(theirs, rel=1e-5)
    assert of_ours(tmp_path, "ipo", {"tau": 0.3}, **given)["loss"] > 1.1 * theirs


@row("tokens of a response without a prompt")
def test_the_first_token_without_a_prompt_is_no_token_of_a_mean(tmp_path):
    """Nothing predicts it, so it has no log-prob; TRL's IPO counts it in the mean."""
    row = {"prompt": "", "chosen": "good film", "rejected": "bad plot actor"}
    given = {
        "train_dataset": datasets.Dataset.from_list([row]),
        "beta": 0.3,
        "loss_type": ["ipo"],
        "per_device_train_batch_size": 1,
    }
    logs = [
        first_log(tmp_path, kind, ref_model=tiny.model(seed=1), **given)
        for kind in (PlainDPOTrainer, DPOTrainer)
    ]

    def loss(log, n, m):
        # TRL's rewards are 0.3 times the log-ratios that both see.
        chosen, rejected = (logs[0][f"rewards/{side}"] / 0.3 for side in ("chosen", "rejected"))
        return (chosen / n - rejected / m - 1 / 0.6) ** 2

    assert logs[0]["loss"] == pytest.approx(loss(logs[0], 3, 4), rel=1e-4)
    assert logs[1]["loss"] == pytest.approx(loss(logs[0], 2, 3), rel=1e-4)


@row("NLL of chosen (TPO: gold) responses")
def test_nll(tmp_path):
    data = uneven()
    chosen, rejected, n, _ = halves(data)
    preference = -F.logsigmoid(0.1 * (chosen - rejected)).mean()
    of_tokens, of_pairs = -chosen.sum() / n.sum(), -(chosen / n).mean()
    assert abs(of_tokens - of_pairs) > 0.1
    call = (data.weight, data.hidden, data.labels)
    theirs = LigerFusedLinearCPOLoss(compiled=False)(*call)[0]
    torch.testing.assert_close(theirs, preference + of_tokens)
    loss_fn = prefkern.FusedPreferenceLoss(objectives.CPO(0.1, nll_weight=1.0))
    ours = loss_fn(data.hidden, data.weight, data.labels).loss
    torch.testing.assert_close(ours, preference + of_pairs)
    # TRL's CPO has the tokens of the batch, and its ORPO the prompts as well.
    rows = token_rows(([5, 6], [7, 8, 9, 1], [9, 1]), ([4], [7, 1], [5, 5, 5, 1]))
    model, logps = tiny.model(), []
    for example in rows:
        ids = torch.tensor([example["prompt_ids"] + example["chosen_ids"]])
        logps.append(prefkern.token_logprobs(model, ids)[0])
    responses = [logps[0][1:], logps[1]]
    lines = tiny.dataset(4)
    nll = {}
    for kind, make_config, name in (
        (CPOTrainer, CPOConfig, "nll_loss"),
        (ORPOTrainer, ORPOConfig, "nll_loss"),
    ):
        trainer = build(tmp_path, kind, make_config, train_dataset=lines)
        cut = []
        for example in rows:
            sides = {"prompt_input_ids": example["prompt_ids"]}
            for side in ("chosen", "rejected"):
                ids = example["prompt_ids"] + example[f"{side}_ids"]
                labels = [-100] * len(example["prompt_ids"]) + example[f"{side}_ids"]
                sides |= {f"{side}_input_ids": ids, f"{side}_labels": labels}
                sides[f"{side}_attention_mask"] = [1] * len(ids)
            cut.append({**sides, "prompt_attention_mask": [1] * len(example["prompt_ids"])})
        _, metrics = trainer.get_batch_loss_metrics(
            trainer.model, trainer._prepare_inputs(trainer.data_collator(cut))
        )
        nll[kind] = float(metrics[name])
    assert nll[CPOTrainer] == pytest.approx(-torch.cat(responses).mean().item(), rel=1e-4)
    assert nll[ORPOTrainer] == pytest.approx(-torch.cat(logps).mean().item(), rel=1e-4)


@row("beta of ORPO")
def test_orpos_beta(tmp_path):
    data = uneven()
    chosen, rejected, n, m = halves(data)
    odds = [mean - torch.log1p(-mean.exp()) for mean in (chosen / n, rejected / m)]
    inside = -F.logsigmoid(0.5 * (odds[0] - odds[1])).mean()
    outside = -0.5 * F.logsigmoid(odds[0] - odds[1]).mean()
    call = (data.weight, data.hidden, data.labels)
    theirs = LigerFusedLinearORPOLoss(beta=0.5, compute_nll_loss=False, compiled=False)(*call)[0]
    torch.testing.assert_close(theirs, outside)
    loss_fn = prefkern.FusedPreferenceLoss(objectives.ORPO(0.5, nll_weight=0.0))
    torch.testing.assert_close(loss_fn(data.hidden, data.weight, data.labels).loss, inside)
    logs = first_log(tmp_path, ORPOTrainer, ORPOConfig, beta=0.5)
    # log_odds_ratio is the mean of logsigmoid of the odds' ratio.
    assert logs["loss"] == pytest.approx(logs["nll_loss"] - 0.5 * logs["log_odds_ratio"], rel=1e-4)


@row("SimPO's margin")
def test_simpos_gamma(tmp_path):
    data = batch(SHAPES[2]).leaves()
    call = (data.weight, data.hidden, data.labels)
    options = {"beta": 2.0, "gamma": 0.6, "compute_nll_loss": False, "compiled": False}
    theirs = LigerFusedLinearSimPOLoss(**options)(*call)[0]
    loss_fn = prefkern.FusedPreferenceLoss(objectives.SimPO(2.0, gamma=0.6))
    torch.testing.assert_close(loss_fn(data.hidden, data.weight, data.labels).loss, theirs)
    given = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 0.6}
    theirs = first_log(tmp_path, CPOTrainer, CPOConfig, **given)["loss"]
    ours = of_ours(tmp_path, "simpo", {"beta": 2.0, "gamma": 0.6})["loss"]
    assert ours == pytest.approx(theirs, rel=1e-4)


@row("label smoothing")
def test_label_smoothing(tmp_path):
    data = batch(SHAPES[2]).leaves()
    case = CASES["dpo"]
    plain = liger(case, data)[0]
    assert liger(case, data, label_smoothing=0.2)[0] == plain
    given = {"ref_model": tiny.model(seed=1)}
    theirs = [
        first_log(tmp_path, PlainDPOTrainer, label_smoothing=smoothing, **given)["loss"]
        for smoothing in (0.0, 0.2)
    ]
    assert theirs[0] == theirs[1]
    with pytest.raises(ValueError, match="args.label_smoothing is 0.2"):
        build(tmp_path, label_smoothing=0.2, **given)
    ours = [
        of_ours(tmp_path, "dpo", {"beta": 0.1, "label_smoothing": smoothing}, **given)["loss"]
        for smoothing in (0.0, 0.2)
    ]
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5) and abs(ours[1] - ours[0]) > 1e-3
    # Of CPO and SimPO it is the same everywhere.
    call = (data.weight, data.hidden, data.labels)
    for make, mine in (
        (LigerFusedLinearCPOLoss, objectives.CPO(0.1, nll_weight=0.0, label_smoothing=0.2)),
        (LigerFusedLinearSimPOLoss, objectives.SimPO(0.1, gamma=0.5, label_smoothing=0.2)),
    ):
        options = {"compute_nll_loss": False, "compiled": False}
        theirs = make(label_smoothing=0.2, **options)(*call)[0]
        assert theirs != make(**options)(*call)[0]
        loss_fn = prefkern.FusedPreferenceLoss(mine)
        torch.testing.assert_close(loss_fn(data.hidden, data.weight, data.labels).loss, theirs)
    trainer = build(tmp_path, CPOTrainer, CPOConfig, label_smoothing=0.2, beta=1.0)
    losses, *_ = trainer.cpo_loss(torch.tensor([-1.0]), torch.tensor([-3.0]))
    mine = objectives.CPO(1.0, nll_weight=0.0, label_smoothing=0.2)
    pair = prefkern.Pairs(torch.tensor([-1.0]), torch.tensor([-3.0]))
    torch.testing.assert_close(losses, mine(pair).losses)


@row("f-divergences")
def test_f_divergences_hold_their_exponents(tmp_path):
    """TRL's alpha-divergence holds an exponent below 80, its forward KL none; here it is 60."""
    far = torch.tensor([-70.0])
    pairs = prefkern.Pairs(far, torch.zeros(1), torch.zeros(1), torch.zeros(1))
    loss = objectives.DPO(0.1, f_divergence_type="forward_kl")(pairs).losses.item()
    assert loss == pytest.approx(0.1 * (math.exp(60) - 1), rel=1e-5)
    near = prefkern.Pairs(far / 2, torch.zeros(1), torch.zeros(1), torch.zeros(1))
    loss = objectives.DPO(0.1, f_divergence_type="forward_kl")(near).losses.item()
    assert loss == pytest.approx(0.1 * (math.exp(35) - 1), rel=1e-5)

    def theirs(rho: float, kind: str) -> float:
        pair = Pair(rho, 0.0)
        w, l = torch.tensor(pair[:2])
        return trl_dpo(pair, w, l, {"sigmoid": 1.0}, 0.1, f_divergence_type=kind).item()

    assert theirs(-70.0, "forward_kl") == pytest.approx(0.1 * math.exp(70), rel=1e-4)
    # (t^-0.5 - 1) / -0.5
    assert theirs(-170.0, "alpha_divergence") == pytest.approx(0.2 * math.exp(80), rel=1e-4)


@row("SFT")
def test_sft_is_a_mean_over_pairs_or_over_tokens(tmp_path):
    data = uneven()
    chosen, _, n, _ = halves(data)
    for token_mean, expected in ((False, -(chosen / n).mean()), (True, -chosen.sum() / n.sum())):
        loss_fn = prefkern.FusedPreferenceLoss(objectives.SFT(token_mean=token_mean))
        loss = loss_fn(data.hidden, data.weight, data.labels).loss
        torch.testing.assert_close(loss, expected)
    given = {"ref_model": tiny.model(seed=1)}
    theirs = first_log(tmp_path, PlainDPOTrainer, loss_type=["sft"], **given)["loss"]
    ours = of_ours(tmp_path, "sft", {"token_mean": True})["loss"]
    assert ours == pytest.approx(theirs, rel=1e-4)


@row("rewards")
def test_rewards(tmp_path):
    given = {"ref_model": tiny.model(seed=1)}
    theirs = first_log(tmp_path, PlainDPOTrainer, **given)
    ours = of_ours(tmp_path, "dpo", {"beta": 0.1}, **given)
    adaptive = of_ours(tmp_path, "adadpo", {"beta": 0.1}, **given)
    ipo = of_ours(tmp_path, "ipo", {"tau": 0.1}, **given)
    for side in ("chosen", "rejected"):
        name = f"rewards/{side}"
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4)
        assert ipo[name] == pytest.approx(10 * theirs[name], rel=1e-4)
    assert adaptive["rewards/rejected"] == pytest.approx(theirs["rewards/rejected"], rel=1e-4)
    assert abs(adaptive["rewards/chosen"] - theirs["rewards/chosen"]) > 1e-3
    assert adaptive["rewards/base_margins"] == pytest.approx(theirs["rewards/margins"], rel=1e-4)
    data = uneven()
    chosen, _, n, _ = halves(data)
    call = (data.weight, data.hidden, data.labels)
    _, aux = LigerFusedLinearORPOLoss(beta=0.5, compiled=False)(*call)
    torch.testing.assert_close(aux[5], 0.5 * chosen / n)
    loss_fn = prefkern.FusedPreferenceLoss(objectives.ORPO(0.5))
    out = loss_fn(data.hidden, data.weight, data.labels)
    odds = chosen / n - torch.log1p(-(chosen / n).exp())
    torch.testing.assert_close(out.chosen_rewards, 0.5 * odds)


@row("mean of a step")
def test_mean_of_a_step(tmp_path):
    """Three pairs in batches of two: the third weighs a third here, and half in TRL."""
    given = {
        "train_dataset": tiny.dataset(3),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "seed": 1,
    }
    alone = []
    for kind in (PlainDPOTrainer, DPOTrainer):
        reference = tiny.model(seed=1)
        trainer = build(tmp_path, kind, max_steps=1, ref_model=reference, **given)
        trainer.train()
        alone.append(trainer.state.log_history[0]["loss"])
    trainer = build(tmp_path, PlainDPOTrainer, ref_model=tiny.model(seed=1), **given)
    each = [
        trainer.compute_loss(trainer.model, trainer.data_collator([example])).item()
        for example in trainer.train_dataset
    ]
    assert alone[1] == pytest.approx(sum(each) / 3, rel=1e-4)
    halved = [(sum(each) - last) / 4 + last / 2 for last in each]
    assert min(abs(alone[0] - value) for value in halved) < 1e-4 < abs(alone[0] - alone[1])
    data = uneven().leaves()
    loss, _ = liger(CASES["dpo"], data)
    torch.testing.assert_close(run(CASES["dpo"], data).losses.mean(), loss)


@row("a response without tokens")
def test_responses_without_tokens():
    data = uneven()
    data.labels[0] = -100
    call = (data.weight, data.hidden, data.labels)
    assert LigerFusedLinearDPOLoss(use_ref_model=False, compiled=False)(*call)[0].isfinite()
    assert LigerFusedLinearSimPOLoss(compiled=False)(*call)[0].isnan()
    loss_fn = prefkern.FusedPreferenceLoss(objectives.SimPO(2.0, gamma=1.0))
    out = loss_fn(data.hidden, data.weight, data.labels)
    assert out.loss.isfinite() and out.chosen_rewards[0] == 0
    # TRL's CPO, whose code averages log-probs for SimPO.
    logits, labels = torch.randn(2, 4, 9), torch.full((2, 4), -100)
    logps = CPOTrainer.get_batch_logps(logits, labels, average_log_prob=True)
    assert logps.isnan().all()


@row("KTO's reference point")
def test_ktos_reference_point():
    data = batch(SHAPES[2])
    desirable, kl = torch.tensor([True, False] * 4), torch.tensor([-3.0])
    reference = (data.ref_hidden, data.ref_weight, None)
    call = (data.hidden, data.weight, data.labels, None)
    theirs = LigerFusedLinearKTOLoss(use_ref_model=True, compiled=False)
    below, at_zero = (theirs(*call, desirable, *reference, z)[0] for z in (kl, torch.zeros(1)))
    loss_fn = prefkern.FusedPreferenceLoss(objectives.KTO(0.1))
    ours = loss_fn(*call, *reference, desirable=desirable, mismatched_log_ratios=kl)
    torch.testing.assert_close(ours.loss, at_zero, atol=1e-5, rtol=1e-5)
    assert abs(below - at_zero) > 1e-3 and ours.reference_point == 0


@row("the reference's gradient")
def test_the_reference_gets_no_gradient(tmp_path):
    data = batch(SHAPES[2])
    for loss in (lambda x: run(CASES["dpo"], x), lambda x: liger(CASES["dpo"], x)):
        leaves = data.leaves()
        leaves.ref_weight = data.ref_weight.clone().requires_grad_()
        loss(leaves)
        assert leaves.ref_weight.grad is None and leaves.weight.grad is not None
    for kind in (PlainDPOTrainer, DPOTrainer):
        trainer = build(tmp_path, kind, max_steps=1, ref_model=tiny.model(seed=1))
        trainer.train()
        assert all(p.grad is None for p in trainer.ref_model.parameters())


def trl_logprobs(data) -> torch.Tensor:
    """Those of TRL's DPO trainer: in tiles, or from logits in versions before."""
    if TRL_TILES.is_too_old:
        logits, labels = data.hidden @ data.weight.T, data.labels.clamp(min=0)
        return trl.trainer.utils.selective_log_softmax(logits, labels)
    flat = (data.hidden.flatten(0, 1), data.weight, None, data.labels.flatten(), 1.0, 32768, None)
    function = importlib.import_module("trl.kernels").ChunkedLogProbFunction
    return function.apply(*flat, 1.0, ("log_probs",))[0].view_as(data.labels)


@row("logits in bfloat16")
def test_what_logits_are_rounded_to():
    data = batch((2, 64, 64, 300), torch.bfloat16)
    exact, _ = sums(data.hidden.double(), data.weight.double(), None, data.labels, -100)
    ours = prefkern.linear_logprobs(data.hidden, data.weight, data.labels).sum(1)
    _, aux = liger(CASES["cpo"], data.leaves())
    trls = trl_logprobs(data).where(data.labels != -100, 0.0).sum(1)
    errors = [(x.double() - exact).abs().max() for x in (ours, torch.cat(aux[:2]), trls)]
    assert errors[0] < 1e-3 and min(errors[1:]) > 30 * errors[0]


@row("keep_end")
def test_truncation_at_the_beginning():
    prompt, chosen, rejected = [1, 2, 3], [4, 5, 6, 7], [8]
    example = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
    with pytest.warns(FutureWarning, match="keep_end"):
        trl.DPOConfig("x", truncation_mode="keep_end", **CPU)
    theirs = DataCollatorForPreference(0, max_length=3, truncation_mode="keep_end")([example])
    assert theirs["input_ids"].tolist() == [[5, 6, 7], [2, 3, 8]]
    assert truncate(prompt, chosen, rejected, 3, None, "keep_end") == ([3], [4, 5], [8])
    theirs = DataCollatorForPreference(0, max_length=5, truncation_mode="keep_start")([example])
    prompt, chosen, rejected = truncate(prompt, chosen, rejected, 5, None, "keep_start")
    assert theirs["input_ids"].tolist() == [[*prompt, *chosen], [*prompt, *rejected, 0]]


@row("a loss that is nan")
def test_a_loss_that_is_nan(tmp_path):
    assert trl.DPOConfig("x", **CPU).logging_nan_inf_filter
    with pytest.raises(ValueError, match="logging_nan_inf_filter is True, which would hide"):
        prefkern.PreferenceConfig("x", logging_nan_inf_filter=True, **CPU)
    for kind in (PlainDPOTrainer, DPOTrainer):
        trainer = build(tmp_path, kind, max_steps=1, ref_model=tiny.model(seed=1))
        prefkern.models.head_transform(trainer.model)
        prefkern.models.head_transform(trainer.ref_model)
        with torch.no_grad():
            trainer.model.model.norm.weight[0] = math.nan
        if kind is PlainDPOTrainer:
            trainer.train()
            assert trainer.state.log_history[0]["loss"] == 0.0
        else:
            with pytest.raises(FloatingPointError, match="hidden: "):
                trainer.train()


def test_every_row_of_the_table_is_run():
    section = PAGE.read_text().split("## Conventions, and where the peers differ")[1]
    table = [line for line in section.split("\n## ")[0].splitlines() if line.startswith("| ")]
    names = [re.split(r" *\| *", line)[1] for line in table[1:]]
    assert names == [*ROWS]
