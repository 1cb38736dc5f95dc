"""Training with turns that are not scored, held to the models' own logits in float64.

The oracle reads a batch's masks from the dataset, not from the batch's labels, and takes log-probs,
divergences and lengths of the scored tokens alone.
"""

from __future__ import annotations

import copy
import json
import math
from itertools import zip_longest

import pytest
import torch

pytest.importorskip("accelerate")

import datasets

from prefkern import PreferenceTrainer, objectives
from prefkern.objectives import Examples, Pairs
from support import chats, tiny
from support.training import Record, assert_same_weights, config, lora, step_logs, weights

SIDES = ("chosen", "rejected")
ROWS = [chats.pair(number) for number in range(4)]
LAYOUTS = {
    "padded": {},
    "packed": {"padding_free": True},
    "shared": {"padding_free": True, "share_prompt": True},
}
# Name: options of the config. Lengths of scored tokens enter SimPO, ORPO, IPO's mean and AdaDPO.
OBJECTIVES = {
    "dpo": {"objective": "dpo"},
    "adadpo": {"objective": "adadpo"},
    "simpo": {"objective": "simpo"},
    "orpo": {"objective": "orpo"},
    "mean ipo": {
        "objective": "ipo",
        "objective_options": {"tau": 0.5, "length_normalized": True},
    },
    "rpo": {"objective": "dpo", "rpo_alpha": 0.5},
    "wpo": {"objective": "dpo", "use_weighting": True},
    "tdpo1": {"objective": "tdpo1"},
    "tdpo2": {"objective": "tdpo2"},
    "alpha-dpo": {"objective": "alphadpo"},
    "ld_alpha": {"objective": "dpo", "ld_alpha": 0.3, "rpo_alpha": 0.2},
}


def _model(seed: int = 0):
    return tiny.model(seed=seed, vocab_size=chats.SIZE, max_position_embeddings=256)


def _trainer(path, rows=ROWS, **options) -> PreferenceTrainer:
    names = ("ref_model", "peft_config", "callbacks", "eval_dataset")
    given = {name: options.pop(name) for name in names if name in options}
    model = options.pop("model", None)
    dataset = rows if isinstance(rows, datasets.Dataset) else datasets.Dataset.from_list(rows)
    options.setdefault("assistant_only_loss", not options.get("last_turn_only"))
    return PreferenceTrainer(
        _model() if model is None else model,
        config(path, **options),
        processing_class=chats.tokenizer(),
        train_dataset=dataset,
        **given,
    )


def _values(model, row: dict, side: str, reference=None):
    """Log-probs, WPO's alignments and divergences of a row's scored tokens, from whole logits."""
    ids = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
    mask = torch.tensor([False] * len(row["prompt_ids"]) + row[f"{side}_mask"])[1:]
    logps = model(ids).logits[0, :-1].log_softmax(-1)[mask]
    own = logps.gather(1, ids[0, 1:][mask][:, None])[:, 0]
    alignments = own.detach() - logps.detach().mul(2).logsumexp(-1)
    kls = torch.zeros(())
    if reference is not None:
        with torch.no_grad():
            theirs = reference(ids).logits[0, :-1].log_softmax(-1)[mask]
        kls = (theirs.exp() * (theirs - logps)).sum()
    return own, alignments, kls


def _weighed(values, other: int, ld_alpha: float | None):
    """The sum of a response's tokens, those beyond the other response's length weighed less."""
    if ld_alpha is None:
        return values.sum()
    return values[:other].sum() + ld_alpha * values[other:].sum()


def _expected(run, policy, reference, rows: list[dict]):
    """The loss of pairs under the run's objective, in float64."""
    objective = run.args.build_objective().train()
    parts: dict[str, list] = {}
    for side in SIDES:
        for row in rows:
            own, alignments, kls = _values(policy, row, side, reference)
            with torch.no_grad():
                theirs = _values(reference, row, side)[0]
            other = sum(row[f"{SIDES[side == SIDES[0]]}_mask"])
            values = {
                "logps": _weighed(own, other, run.args.ld_alpha),
                "ref": _weighed(theirs, other, run.args.ld_alpha),
                "lengths": torch.tensor(len(own)),
                "alignments": alignments.mean(),
                "kls": kls,
                "whole": own.sum(),
            }
            for name, value in values.items():
                parts.setdefault(name, []).append(value)
    found = {name: torch.stack(values) for name, values in parts.items()}
    pairs = Pairs.of_sequences(
        found["logps"],
        found["ref"] if objective.needs_reference else None,
        found["lengths"],
        None,
        found["alignments"],
        found["kls"] if objective.needs_kls else None,
        found["whole"],
    )
    return objective(pairs).losses.mean(), found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_and_gradients_are_those_of_the_models_own_logits(tmp_path, name, layout):
    record = Record()
    options = {**OBJECTIVES[name], **LAYOUTS[layout], "max_grad_norm": 0.0}
    references = _model(seed=1), _model(seed=1).double()
    needs = objectives.build(options["objective"]).needs_reference
    run = _trainer(
        tmp_path, ref_model=references[0] if needs else None, callbacks=[record], **options
    )
    rows = [*run.train_dataset]
    assert sum(not kept for row in rows for kept in row["chosen_mask"]) == 4 * 24
    policy = copy.deepcopy(run.model).double()
    run.train()
    loss, found = _expected(run, policy, references[1], rows)
    loss.backward()
    log = step_logs(run)[0]
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
    for side, sums in zip(SIDES, found["logps"].chunk(2), strict=True):
        assert log[f"logps/{side}"] == pytest.approx(sums.mean().item(), rel=1e-5)
    total = math.sqrt(sum(p.grad.square().sum().item() for p in policy.parameters()))
    true = dict(policy.named_parameters())
    for key, gradient in record.gradients[0].items():
        assert (gradient.double() - true[key].grad).norm() < 2e-5 * total, key


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_kto_scores_the_assistants_tokens(tmp_path, layout):
    """Also of mismatched responses, which keep their own masks beside other prompts."""
    record = Record()
    run = _trainer(
        tmp_path,
        ref_model=_model(seed=1),
        callbacks=[record],
        objective="kto",
        max_grad_norm=0.0,
        per_device_train_batch_size=8,
        **LAYOUTS[layout],
    )
    rows = [*run.train_dataset]
    policy, reference = copy.deepcopy(run.model).double(), _model(seed=1).double()
    order = []

    collate = run.data_collator

    def noted(examples):
        order[:] = [rows.index({key: example[key] for key in rows[0]}) for example in examples]
        return collate(examples)

    run.data_collator = noted
    run.train()
    batch = [rows[place] for place in order]

    def sums(model, prompt_of: dict, row: dict):
        given = {**row, "prompt_ids": prompt_of["prompt_ids"]}
        return _values(model, given, "completion")[0].sum()

    others = [
        next(
            batch[(place + step) % 8]
            for step in range(1, 8)
            if batch[(place + step) % 8]["prompt_ids"] != row["prompt_ids"]
        )
        for place, row in enumerate(batch)
    ]
    with torch.no_grad():
        ratios = [
            sums(policy, row, other) - sums(reference, row, other)
            for row, other in zip(batch, others, strict=True)
        ]
        theirs = torch.stack([sums(reference, row, row) for row in batch])
    mine = torch.stack([sums(policy, row, row) for row in batch])
    desirable = torch.tensor([row["desirable"] for row in batch])
    examples = Examples(mine, desirable, theirs, mismatched_log_ratios=torch.stack(ratios))
    loss = run.args.build_objective()(examples).losses.mean()
    loss.backward()
    assert step_logs(run)[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    total = math.sqrt(sum(p.grad.square().sum().item() for p in policy.parameters()))
    true = dict(policy.named_parameters())
    for key, gradient in record.gradients[0].items():
        assert (gradient.double() - true[key].grad).norm() < 2e-5 * total, key


@pytest.mark.parametrize("options", [{"assistant_only_loss": True}, {"last_turn_only": True}])
def test_every_layout_trains_alike(tmp_path, options):
    rows = [chats.pair(number) for number in range(8)]
    runs = [
        _trainer(tmp_path, rows, ref_model=_model(seed=1), objective="dpo", **options, **each)
        for each in LAYOUTS.values()
    ]
    for run in runs:
        run.train()
    for run in runs[1:]:
        for log, true in zip_longest(step_logs(run), step_logs(runs[0])):
            for key in true.keys() - {"epoch", "num_tokens", "grad_norm"}:
                assert log[key] == pytest.approx(true[key], rel=1e-3, abs=1e-4), key
        assert_same_weights(weights(run.model), weights(runs[0].model), atol=2e-3, rtol=1e-2)


def test_metrics_are_of_scored_tokens(tmp_path):
    run = _trainer(tmp_path, ref_model=_model(seed=1), objective="dpo")
    rows, policy = [*run.train_dataset], copy.deepcopy(run.model).double()
    run.train()
    entropies, hits, count = [], [], {side: 0 for side in SIDES}
    for side in SIDES:
        for row in rows:
            ids = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
            mask = torch.tensor([False] * len(row["prompt_ids"]) + row[f"{side}_mask"])[1:]
            with torch.no_grad():
                logps = policy(ids).logits[0, :-1].log_softmax(-1)[mask]
            entropies.append(-(logps.exp() * logps).sum())
            count[side] += len(logps)
            if side == "chosen":
                hits.append((logps.argmax(-1) == ids[0, 1:][mask]).sum())
    log = step_logs(run)[0]
    assert log["entropy"] == pytest.approx(sum(entropies).item() / sum(count.values()), rel=1e-4)
    assert log["mean_token_accuracy"] == pytest.approx(sum(hits).item() / count["chosen"])


def test_precomputed_sums_are_of_scored_tokens(tmp_path):
    found = {}
    computed = {"precompute_ref_log_probs": True}
    for name, options in {
        "each step": {},
        "precomputed": computed,
        "again": computed,
        "last turn": {**computed, "last_turn_only": True},
        "all": {**computed, "assistant_only_loss": False},
    }.items():
        run = _trainer(tmp_path, ref_model=_model(seed=1), objective="dpo", **options)
        run.train()
        found[name] = [log["loss"] for log in step_logs(run)]
    assert found["precomputed"] == pytest.approx(found["each step"], rel=1e-5)
    assert found["again"] == found["precomputed"]
    assert len({round(losses[0], 4) for losses in found.values()}) == 3
    keys = [json.loads(path.read_text()) for path in tmp_path.glob("reference-sums/*/key.json")]
    assert len({key["tokens"] for key in keys}) == len(keys) == 3


@pytest.mark.parametrize("options", [{}, {"peft_config": True}, {"precompute_ref_log_probs": True}])
def test_equal_models_have_a_first_loss_of_ln_2(tmp_path, options):
    if options.get("peft_config"):
        options = {"peft_config": lora()}
    run = _trainer(
        tmp_path, objective="dpo", eval_dataset=datasets.Dataset.from_list(ROWS), **options
    )
    assert run.evaluate()["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    # The trainer's own dataset, and raw pairs, are scored alike.
    run.train()
    again = run.evaluate(run.eval_dataset)["eval_loss"]
    if not options.get("precompute_ref_log_probs"):
        assert run.evaluate(datasets.Dataset.from_list(ROWS))["eval_loss"] == again
    assert run.dataset_reports["eval"].unscored == 4 * 24


def test_carried_sums_are_refused(tmp_path):
    carried = datasets.Dataset.from_list(ROWS)
    for column in ("ref_chosen_logps", "ref_rejected_logps"):
        carried = carried.add_column(column, [-9.0] * 4)
    for options in ({"assistant_only_loss": True}, {"last_turn_only": True}):
        name = next(iter(options))
        with pytest.raises(
            ValueError, match=f"carries reference sums .* and {name} is True: remove the columns"
        ):
            _trainer(tmp_path, carried, objective="dpo", **options)


@pytest.mark.parametrize("name", ["assistant_only_loss", "last_turn_only"])
def test_options_are_bools(tmp_path, name):
    with pytest.raises(TypeError, match=f"{name} must be True or False, got str 'yes'"):
        config(tmp_path, **{name: "yes"})
