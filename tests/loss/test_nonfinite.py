"""A NaN is reported with its origin, reaches no other sequence, and costs a healthy step nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import prefkern
from prefkern.loss.diagnostics import explain_nonfinite
from prefkern.objectives import build
from support import tiny
from support.machine import BACKENDS

B, T, H, V, R = 2, 5, 8, 130, 3
BAD = [math.nan, math.inf, -math.inf]
# The interpreter takes its time.
SPOILT = [("torch", bad) for bad in BAD] + [(BACKENDS[-1], math.nan)]


def call(device: str = "cpu", packed: bool = False) -> dict[str, torch.Tensor]:
    """Arguments of a loss without a NaN, including MADPO's and an adapter's."""
    torch.manual_seed(1)
    case = {
        "hidden": torch.randn(2 * B, T, H),
        "weight": torch.randn(V, H),
        "labels": torch.randint(V, (2 * B, T)),
        "bias": torch.randn(V),
        "lora_hidden": torch.randn(2 * B, T, R),
        "lora_weight": torch.randn(V, R),
        "ref_logps": -10 * torch.rand(2 * B) - 15,
        "reward_margins": torch.randn(B),
    }
    case["labels"][1, 3:] = -100
    # An entry is ruled out, and is no label: nothing to report.
    case["labels"][case["labels"] == 4] = 5
    case["bias"][4] = -math.inf
    if packed:
        for name in ("hidden", "labels", "lora_hidden"):
            case[name] = case[name].flatten(0, 1)
        case["cu_seqlens"] = torch.tensor([0, 3, 10, 15, 20], dtype=torch.int32)
    return {name: value.to(device) for name, value in case.items()}


def loss_fn(mode: str | None = "raise", name: str = "madpo", **options):
    return prefkern.FusedPreferenceLoss(build(name), on_nonfinite=mode, **options)


# What is spoilt, where, and what the report says of it.
SOURCES = {
    "hidden": ((2, 1, 3), "1 of 18 scored tokens, the first is token 1 of sequence 2 (REJECTED 0)"),
    "lora_hidden": (
        (1, 2, 0),
        "1 of 18 scored tokens, the first is token 2 of sequence 1 (CHOSEN 1)",
    ),
    "weight": ((129, 7), "1 of 130 vocabulary entries, the first is 129"),
    "lora_weight": ((7, 0), "1 of 130 vocabulary entries, the first is 7"),
    "ref_logps": ((3,), "1 of 4 sequences, the first is sequence 3 (REJECTED 1)"),
    "reward_margins": ((1,), "1 of 2 pairs, the first is pair 1"),
}


@pytest.mark.parametrize(("backend", "bad"), SPOILT)
@pytest.mark.parametrize("name", SOURCES)
def test_the_source_is_named(name, bad, backend, device):
    case = call(device)
    place, said = SOURCES[name]
    for side in ("chosen", "rejected"):
        said = said.replace(side.upper(), f"the {side} response of pair")
    case[name][place] = bad
    with pytest.raises(FloatingPointError) as raised:
        loss_fn(backend=backend)(**case)
    lines = str(raised.value).split("\n")
    assert lines[0].startswith("the loss is ") and len(lines) == 2
    assert lines[1].startswith(f"{name}: {said}; ") and len(lines[1]) > len(said) + 30
    with pytest.warns(RuntimeWarning, match=name):
        loss_fn("warn", backend=backend)(**case)
    assert lines[1] == explain_nonfinite(**case)


@pytest.mark.parametrize(("backend", "value"), SPOILT)
def test_bias(value, backend, device):
    """NaN and inf are reported at any entry; -inf, which rules it out, only at a label."""
    case = call(device)
    label = int(case["labels"][0, 0])
    for entry in (label, 4):
        bias = case["bias"].clone()
        bias[entry] = value
        if entry == 4 and value == -math.inf:
            assert explain_nonfinite(**{**case, "bias": bias}) is None
            assert loss_fn(backend=backend)(**{**case, "bias": bias}).loss.isfinite()
            continue
        with pytest.raises(
            FloatingPointError, match=rf"bias: 1 of {V} vocabulary entries.*is {entry};"
        ):
            loss_fn(backend=backend)(**{**case, "bias": bias})


def test_of_a_packed_batch():
    case = call(packed=True)
    case["hidden"][10] = math.nan
    expected = r"token 0 of sequence 2 \(the rejected response of pair 0\)"
    with pytest.raises(FloatingPointError, match=expected):
        loss_fn()(**case)


@pytest.mark.parametrize("name", ["ref_hidden", "ref_weight", "ref_bias"])
def test_of_a_reference_s_head(name):
    case = call()
    del case["ref_logps"], case["reward_margins"]
    case |= {f"ref_{key}": case[key].clone() + 0.1 for key in ("hidden", "weight", "bias")}
    case[name][-1] = math.nan
    case["labels"][-1, -1] = V - 1
    with pytest.raises(FloatingPointError, match=rf"\n{name}: \d+ of .*the reference made it"):
        loss_fn(name="dpo")(**case)


def test_of_single_responses():
    case = call()
    del case["reward_margins"]
    case["desirable"] = torch.tensor([True, False, True, False])
    case["mismatched_log_ratios"] = torch.tensor([0.1, math.nan])
    with pytest.raises(FloatingPointError, match="number 1; policy or reference made it"):
        loss_fn(name="kto")(**case)
    case["mismatched_log_ratios"] = torch.zeros(2)
    case["hidden"][3, 0] = math.inf
    with pytest.raises(FloatingPointError, match=r"token 0 of sequence 3 \(response 3\)"):
        loss_fn(name="kto")(**case)


def test_everything_at_once_is_listed():
    case = call()
    for name, (place, _) in SOURCES.items():
        case[name][place] = math.nan
    with pytest.raises(FloatingPointError) as raised:
        loss_fn()(**case)
    named = [line.split(":")[0] for line in str(raised.value).split("\n")[1:]]
    assert sorted(named) == sorted(SOURCES)


def test_finite_inputs_whose_logits_overflow():
    case = call()
    case["hidden"] *= 1e30
    case["weight"] *= 1e30
    said = r"not finite, the first at 0\. Every input is finite, so a logit .* overflowed float32"
    with pytest.raises(FloatingPointError, match=said):
        loss_fn()(**case)


def test_a_float64_beyond_float32_is_finite():
    """A loss of 1e44 is finite; so are margins that are bounded before they are rounded."""
    case = {name: x.double() if x.is_floating_point() else x for name, x in call().items()}
    case["bias"][4] = 0.0
    case["hidden"] *= 1e30
    case["weight"] *= 1e15
    out = loss_fn(backend="torch")(**case)
    assert out.loss.isfinite() and out.loss > torch.finfo(torch.float32).max
    case["lora_hidden"] *= 1e300
    case["lora_weight"] *= 1e300
    with pytest.raises(FloatingPointError, match="Every input is finite, .* overflowed float64"):
        loss_fn(backend="torch")(**case)
    case = call()
    case["reward_margins"] = torch.tensor([1e300, -1e300], dtype=torch.float64)
    assert loss_fn()(**case).loss.isfinite()


def test_a_reference_point_that_overflows_shows():
    """KTO's losses are finite in spite of it."""
    case = call()
    del case["reward_margins"]
    case["desirable"] = torch.tensor([True, False, True, False])
    case["mismatched_log_ratios"] = torch.full((2,), 3e38)
    with pytest.raises(FloatingPointError, match="a logit or a sum overflowed float32"):
        loss_fn(name="kto")(**case)


def test_what_an_objective_has_no_use_for_does_not_count():
    case = call()
    case["reward_margins"][0] = case["ref_logps"][0] = math.nan
    assert loss_fn(name="simpo")(**case).loss.isfinite()


def test_refusals(monkeypatch):
    with pytest.raises(ValueError, match="on_nonfinite must be None or one of .*'stop'"):
        loss_fn("stop")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(NotImplementedError, match="torch.compile and CUDA graphs cannot"):
        loss_fn()(**call())


class Reads(TorchDispatchMode):
    """Counts how often Python reads a number from a tensor, and so waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waits = (torch.ops.aten._local_scalar_dense, torch.ops.aten.is_nonzero)
        self.count += function.overloadpacket in waits
        return function(*args, **(kwargs or {}))


def reads(mode: str | None) -> int:
    case = call()
    with Reads() as counted:
        loss_fn(mode)(**case)
    return counted.count


def test_a_healthy_call_reads_one_number_more():
    assert reads("raise") == reads("warn") == reads(None) + 1


# Spoilt, each in its way, and in a sequence of its own.
BAD_TOKENS = {(2, 1): math.nan, (0, 2): math.inf, (3, 3): -math.inf}


def spoilt(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states with bad tokens, some of them scored; and a mask of the good tokens."""
    hidden, others = hidden.clone(), torch.ones(2 * B, T, dtype=torch.bool, device=hidden.device)
    for token, bad in BAD_TOKENS.items():
        hidden[token][0] = bad
        others[token] = False
    # Tokens that are not scored may hold anything.
    hidden[1, 3:] = torch.tensor([[math.nan], [math.inf]], device=hidden.device)
    return hidden, others


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("workspace_mb", [0.003, 4], ids=["tiles", "one tile"])
def test_a_bad_token_reaches_no_other(workspace_mb, trains, backend, device):
    """Log-probs and gradients of all other tokens are bitwise those of a good batch."""

    def run(hidden, with_stats=False):
        case = call(device)
        hidden = hidden.clone().requires_grad_()
        weight = case["weight"].requires_grad_(trains)
        out = prefkern.linear_logprobs(
            hidden, weight, case["labels"], case["bias"], workspace_mb=workspace_mb,
            backend=backend, return_stats=with_stats,
        )  # fmt: skip
        logps = out.logps if with_stats else out
        logps.sum().backward()
        return logps.detach(), hidden.grad, weight.grad

    hidden = call(device)["hidden"]
    healthy = run(hidden)
    plan = prefkern.last_plan()
    assert plan.structure == ("two_pass" if trains and workspace_mb < 1 else "one_pass")
    bad, others = spoilt(hidden)
    for with_stats in (False, True):
        logps, gradient, dweight = run(bad, with_stats)
        assert torch.equal(logps[others], healthy[0][others])
        assert torch.equal(gradient[others], healthy[1][others])
        assert logps[~others].isnan().all() and gradient[~others].isnan().all()
        assert dweight is None or dweight.isnan().any()
    # A batch whose scored tokens are all healthy is healthy.
    bad[~others] = hidden[~others]
    for mine, theirs in zip(run(bad), healthy, strict=True):
        assert mine is None or torch.equal(mine, theirs)


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
def test_a_bad_token_reaches_no_other_divergence(trains, backend, device):
    case = call(device)

    def run(hidden, ref_hidden):
        out = prefkern.linear_kl(
            hidden.clone().requires_grad_(), case["weight"].clone().requires_grad_(trains),
            case["labels"], ref_hidden, case["weight"] + 0.1, backend=backend,
        )  # fmt: skip
        return [value.detach() for value in out]

    hidden, ref_hidden = case["hidden"], case["hidden"] + 0.1
    healthy = run(hidden, ref_hidden)
    for states in ((spoilt(hidden)[0], ref_hidden), (hidden, spoilt(ref_hidden)[0])):
        others = spoilt(hidden)[1]
        values = run(*states)
        for mine, theirs in zip(values, healthy, strict=True):
            assert torch.equal(mine[others], theirs[others])
        assert values[2][~others].isnan().all()


def test_an_infinite_logit_of_the_label_is_no_certainty(backend, device):
    """inf has no softmax: the log-prob is NaN, as in log_softmax, and not 0."""
    case = call(device)
    label = int(case["labels"][0, 0])
    bias = case["bias"].clone()
    bias[label] = math.inf
    logps = prefkern.linear_logprobs(
        case["hidden"], case["weight"], case["labels"], bias, backend=backend
    )
    is_it = case["labels"] == label
    assert logps[is_it].isnan().all()
    with torch.no_grad():
        eager = prefkern.reference.linear_logprobs(
            case["hidden"], case["weight"], case["labels"], bias
        )
    assert torch.equal(logps.isnan() | (logps == -math.inf), eager.isnan() | (eager == -math.inf))


# The trainer.


def trainer(tmp_path, **options):
    from support.training import trainer

    return trainer(tmp_path, objective="dpo", **options)


def spoil_after(model, calls: int) -> None:
    """From the n-th forward on, one hidden state of the last row is NaN."""
    seen = {"calls": 0}

    def spoil(module, args):
        # The probe of a head is one row.
        seen["calls"] += len(args[0]) > 1
        if seen["calls"] > calls:
            hidden = args[0].clone()
            # Towards the end of the row: where the response is.
            hidden[-1, hidden.shape[1] // 2 :] = math.nan
            return (hidden, *args[1:])
        return None

    model.get_output_embeddings().register_forward_pre_hook(spoil)


def test_the_trainer_stops_before_the_weights_are_spoilt(tmp_path):
    trained = trainer(tmp_path, precompute_ref_log_probs=True)
    spoil_after(trained.model, calls=1)
    with pytest.raises(FloatingPointError, match="hidden: .* scored tokens, the first is token"):
        trained.train()
    # The first step was made, the second left nothing.
    assert trained.state.global_step == 1
    assert all(p.isfinite().all() and p.grad is None for p in trained.model.parameters())


def test_the_trainer_says_what_the_reference_gave(tmp_path):
    dataset = tiny.dataset(8)
    for side in ("chosen", "rejected"):
        sums = [-20.0] * 8
        dataset = dataset.add_column(f"ref_{side}_logps", sums)
    trained = trainer(tmp_path, train_dataset=dataset, ref_model=None)
    collate = trained.data_collator

    def with_a_nan(rows):
        batch = collate(rows)
        batch["ref_logps"][5] = math.nan
        return batch

    trained.data_collator = with_a_nan
    with pytest.raises(FloatingPointError, match="ref_logps: 1 of 8 sequences, the first is .* 5"):
        trained.train()


def test_a_model_that_is_spoilt_already(tmp_path):
    trained = trainer(tmp_path)
    with torch.no_grad():
        trained.model.get_output_embeddings().weight[3, 3] = math.nan
    with pytest.raises(
        FloatingPointError, match="weight: 1 of 97 vocabulary entries, the first is 3"
    ):
        trained.train()
    # What is spoilt from the start has no trainer.
    model = tiny.model()
    with torch.no_grad():
        model.get_output_embeddings().weight[3, 3] = math.nan
    with pytest.raises(ValueError, match="lm_head.weight holds nan or inf"):
        trainer(tmp_path, model=model)


def test_evaluation_warns_and_hides_nothing(tmp_path):
    trained = trainer(tmp_path, eval_dataset=tiny.dataset(4))
    spoil_after(trained.model, calls=0)
    with pytest.warns(RuntimeWarning, match="hidden: "):
        metrics = trained.evaluate()
    assert math.isnan(metrics["eval_loss"])


def test_a_training_step_waits_no_more_than_without(tmp_path):
    """transformers' filter of NaN from its log (off here) waits twice a step; this waits once."""
    counts = []
    for checked in (True, False):
        trained = trainer(tmp_path, count=8, logging_steps=100, max_grad_norm=0.0)
        assert trained.args.logging_nan_inf_filter is False
        if not checked:
            trained.args.logging_nan_inf_filter = True
            type(trained.loss_fn).on_nonfinite = property(lambda _: None, lambda *_: None)
        try:
            with Reads() as counted:
                trained.train()
        finally:
            if not checked:
                del type(trained.loss_fn).on_nonfinite
        counts.append(counted.count)
    assert counts[0] < counts[1]


def test_the_reward_model_stops_as_well():
    from prefkern.training.rewards import RewardTrainer

    class Trained(RewardTrainer):
        def __init__(self) -> None:
            self.args = type("Args", (), {"fp16": False})()

    rewards = torch.zeros(4, 2)
    Trained()._refuse_nonfinite(rewards)
    rewards[2, 1] = math.nan
    with pytest.raises(
        FloatingPointError, match="1 of the batch's 4 pairs, the first of them pair 2"
    ):
        Trained()._refuse_nonfinite(rewards)
