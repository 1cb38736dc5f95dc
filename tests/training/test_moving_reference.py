"""TR-DPO: a reference that follows the policy, in steps, in checkpoints, and where it cannot."""

from __future__ import annotations

import math

import pytest
import torch
import transformers

pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")

from prefkern.training.moving_reference import REFERENCE_FILE, check_can_follow, move
from support import tiny
from support.training import assert_same_weights, lora, step_logs, trainer, weights

FOLLOWS = {"sync_ref_model": True, "ref_model_sync_steps": 1}
LN2 = math.log(2)


class Follow(transformers.TrainerCallback):
    """Keeps the policy's weights of every step."""

    def __init__(self):
        self.policies = []

    def on_step_end(self, args, state, control, model=None, **_):
        self.policies.append(weights(model))


@pytest.mark.parametrize("objective", ["adadpo", "tdpo2", "kto"])
@pytest.mark.parametrize("steps", [1, 2])
def test_it_moves_every_so_many_steps(tmp_path, steps, objective):
    followed = Follow()
    run = trainer(
        tmp_path,
        count=20,
        ref_model=tiny.model(seed=1),
        objective=objective,
        callbacks=[followed],
        sync_ref_model=True,
        ref_model_sync_steps=steps,
        ref_model_mixup_alpha=0.25,
    )
    expected = weights(run.ref_model)
    before = weights(run.ref_model)
    run.train()
    assert run.state.global_step == len(followed.policies) >= 5
    for step, policy in enumerate(followed.policies, start=1):
        if step % steps == 0:
            expected = {name: 0.75 * x + 0.25 * policy[name] for name, x in expected.items()}
    assert_same_weights(weights(run.ref_model), expected, atol=1e-7, rtol=1e-6)
    moved = weights(run.ref_model)
    assert all(not torch.equal(x, moved[name]) for name, x in before.items())
    assert not any(p.requires_grad or p.grad is not None for p in run.ref_model.parameters())


def test_a_share_of_1_makes_it_the_policy(tmp_path):
    """Then each step's loss is that of equal models."""
    run = trainer(tmp_path, objective="dpo", ref_model_mixup_alpha=1.0, **FOLLOWS)
    run.train()
    losses = [log["loss"] for log in step_logs(run)]
    assert len(losses) == 3 and losses == [pytest.approx(LN2, abs=1e-6)] * 3
    assert_same_weights(weights(run.ref_model), weights(run.model), atol=0, rtol=0)


def test_a_reference_in_bfloat16_is_rounded_once():
    policy, reference = tiny.model(), tiny.model(seed=1).bfloat16()
    before = weights(reference)
    move(reference, policy, 0.3)
    for name, x in weights(reference).items():
        true = 0.7 * before[name].double() + 0.3 * weights(policy)[name].double()
        assert (x.double() - true).abs().max() <= 2**-8 * true.abs().max()
        exact = true.bfloat16()
        assert (x == exact).float().mean() > 0.999  # float32 ties aside
    assert {x.dtype for x in reference.parameters()} == {torch.bfloat16}


def test_the_best_model_has_its_reference(tmp_path):
    run = trainer(
        tmp_path,
        count=16,
        ref_model=tiny.model(seed=1),
        eval_dataset=tiny.dataset(4, seed=2),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        **FOLLOWS,
    )
    run.train()
    best = run.state.best_metric
    assert run.state.best_model_checkpoint and not run.state.best_model_checkpoint.endswith("-4")
    assert run.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-6)


def test_checkpoints_of_another_kind_are_refused(tmp_path):
    moving = trainer(tmp_path / "moving", save_strategy="steps", save_steps=1, **FOLLOWS)
    moving.train()
    checkpoint = tmp_path / "moving" / "checkpoint-1"
    assert (checkpoint / REFERENCE_FILE).exists()
    with pytest.raises(ValueError, match="reference that follows the policy.*set sync_ref_model"):
        trainer(tmp_path / "a").train(resume_from_checkpoint=str(checkpoint))
    staying = trainer(tmp_path / "staying", save_strategy="steps", save_steps=1)
    staying.train()
    fixed = str(tmp_path / "staying" / "checkpoint-1")
    with pytest.raises(ValueError, match="sync_ref_model is True, and .* holds no reference"):
        trainer(tmp_path / "b", **FOLLOWS).train(resume_from_checkpoint=fixed)
    with pytest.raises(ValueError, match="is of another reference: its weights have other names"):
        other = trainer(tmp_path / "c", ref_model=tiny.model(seed=1).bfloat16(), **FOLLOWS)
        other.train(resume_from_checkpoint=str(checkpoint))
    file = checkpoint / REFERENCE_FILE
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=f"{REFERENCE_FILE} is damaged"):
        trainer(tmp_path / "d", **FOLLOWS).train(resume_from_checkpoint=str(checkpoint))


def with_sums():
    rows = tiny.dataset(4)
    return rows.add_column("ref_chosen_logps", [-9.0] * 4).add_column(
        "ref_rejected_logps", [-9.0] * 4
    )


REFUSED = {
    "precomputed": ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs keeps the sums"),
    "carried": ({"train_dataset": with_sums}, "carries reference sums .* sync_ref_model .True."),
    "no reference": ({"objective": "simpo"}, "sync_ref_model is True, and this objective has no"),
    "adapter": ({"peft_config": lora}, "sync_ref_model moves a reference model of its own"),
    "adapter and a model": (
        {"peft_config": lora, "ref_model": tiny.model},
        "sync_ref_model moves a reference model of its own",
    ),
    "another family": (
        {"ref_model": lambda: tiny.model("Gemma2")},
        "sync_ref_model moves each weight .* give a ref_model of the same shapes",
    ),
    "FSDP": ({"fsdp": True, "fsdp_config": {"version": 2}}, "sync_ref_model is not supported yet"),
    "share 0": ({"ref_model_mixup_alpha": 0}, "ref_model_mixup_alpha must be > 0, got 0"),
    "share 2": ({"ref_model_mixup_alpha": 2.0}, r"ref_model_mixup_alpha must be in \[0, 1\]"),
    "no number": ({"ref_model_mixup_alpha": "x"}, "ref_model_mixup_alpha must be a number"),
    "steps 0": ({"ref_model_sync_steps": 0}, "ref_model_sync_steps must be an int >= 1, got 0"),
    "steps 1.5": ({"ref_model_sync_steps": 1.5}, "ref_model_sync_steps must be an int >= 1"),
    "share alone": (
        {"ref_model_mixup_alpha": 0.5, "sync_ref_model": False},
        "ref_model_mixup_alpha is 0.5, which has no effect without sync_ref_model",
    ),
    "steps alone": (
        {"ref_model_sync_steps": 5, "sync_ref_model": False},
        "ref_model_sync_steps is 5, which has no effect without sync_ref_model",
    ),
    "no switch": ({"sync_ref_model": 1}, "sync_ref_model must be True or False"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_where_it_cannot(tmp_path, name):
    options, message = REFUSED[name]
    made = {key: x() if callable(x) else x for key, x in options.items()}
    with pytest.raises((TypeError, ValueError), match=message):
        trainer(tmp_path, **{"sync_ref_model": True, **made})


def test_weights_that_are_no_numbers_are_refused():
    quantised, policy = torch.nn.Module(), torch.nn.Module()
    for module, dtype in ((quantised, torch.uint8), (policy, torch.float32)):
        module.weight = torch.nn.Parameter(torch.zeros(2, dtype=dtype), requires_grad=False)
    with pytest.raises(
        ValueError, match="floating-point numbers, and weight of ref_model is torch.u"
    ):
        check_can_follow(quantised, policy)
