"""FusedPreferenceLoss against the oracle, against itself packed, and against Liger."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import prefkern
from prefkern import objectives, reference
from prefkern.objectives import (
    DPO,
    IPO,
    KTO,
    MADPO,
    ORPO,
    TDPO1,
    TDPO2,
    WPO,
    Adaptive,
    AlphaDPO,
    BetaDPO,
    SimPO,
    WithNLL,
)
from prefkern.ops import call
from prefkern_bench.measure import Meter
from support.listing import listing_1
from support.machine import BACKENDS

OBJECTIVES = {
    "dpo": DPO(0.1),
    "adadpo": DPO(0.1, adaptive=Adaptive()),
    "smoothed": DPO(0.5, label_smoothing=0.2),
    "policy space": DPO(0.1, adaptive=Adaptive("policy", "length", 1.3, 0.8)),
    "exponents": DPO(0.1, adaptive=Adaptive("ratio", (0.1, 0.2), None)),
    "ipo": IPO(0.5, length_normalized=True),
    "adaorpo": ORPO(1.0, adaptive=Adaptive()),
    "adasimpo": SimPO(2.0, 0.5, adaptive=Adaptive(clip=3.0)),
    "alphadpo": AlphaDPO(2.5, 0.3, 0.4),
    "madpo": MADPO(0.1, tau=2.0),
    "betadpo": BetaDPO(0.1, m=0.1, keep=0.7),
    "wpo": WPO(DPO(0.1)),
    "rpo": WithNLL(DPO(0.1), 0.5),
    "tdpo1": TDPO1(0.1),
    "tdpo2": TDPO2(0.1, 0.8),
    "wpo, tdpo2": WithNLL(WPO(TDPO2(0.1, 0.8)), 0.5),
}
# Of each way through the loss, one: kernel or torch, statistics or not, one head's pass or both's.
WAYS = ("adadpo", "adaorpo", "alphadpo", "madpo", "betadpo", "wpo", "rpo", "tdpo2")
SMALL = 0.01


def batch(B=3, T=9, H=16, V=129, ref_H=None) -> dict[str, torch.Tensor]:
    labels = torch.randint(V, (2 * B, T))
    labels[:, :2] = -100  # prompts
    labels[0, 4:] = -100  # padding
    labels[B + 1, 6:] = -100
    return {
        "hidden": torch.randn(2 * B, T, H) * 5 / H**0.5,
        "weight": torch.randn(V, H),
        "labels": labels,
        "bias": torch.randn(V),
        "ref_hidden": torch.randn(2 * B, T, ref_H or H) * 5 / (ref_H or H) ** 0.5,
        "ref_weight": torch.randn(V, ref_H or H),
        "ref_bias": torch.randn(V),
        "reward_margins": torch.linspace(-3, 5, B),
    }


def fresh(name: str, device: str) -> objectives.Objective:
    """A copy with unmoved statistics."""
    return copy.deepcopy(OBJECTIVES[name]).to(device)


def move(data: dict, device: str, dtype=torch.float32) -> dict:
    """Copies; the policy's tensors are leaves that require a gradient."""
    moved = {
        name: x.to(device, dtype if x.is_floating_point() else x.dtype, copy=True)
        for name, x in data.items()
    }
    for name in ("hidden", "weight", "bias"):
        moved[name].requires_grad_()
    return moved


def assert_same(out, expected, leaves, truth, *, atol=1e-5):
    for name in (
        "loss", "losses", "chosen_logps", "rejected_logps", "ref_chosen_logps",
        "ref_rejected_logps", "chosen_rewards", "rejected_rewards", "beta_chosen", "beta_rejected",
        "chosen_gradients", "rejected_gradients",
    ):  # fmt: skip
        mine, true = getattr(out, name), getattr(expected, name)
        torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=atol, msg=name)
    assert torch.equal(out.chosen_lengths, expected.chosen_lengths)
    assert torch.equal(out.rejected_lengths, expected.rejected_lengths)
    assert out.metrics.keys() == expected.metrics.keys()
    for name, mine in out.metrics.items():
        torch.testing.assert_close(
            mine.double(), expected.metrics[name].double(), rtol=1e-4, atol=atol, msg=name
        )
    for name in ("hidden", "weight", "bias"):
        mine, true = leaves[name].grad, truth[name].grad
        if true is not None:
            error = (mine.double() - true).norm() / true.norm()
            assert error < 1e-5, name


# The head's gradient is no concern of the objective's: one of its two passes each is enough.
CASES = [(name, trained) for name in ("dpo", "adadpo") for trained in (False, True)]
CASES += [(name, i % 2 == 1) for i, name in enumerate(OBJECTIVES) if name not in ("dpo", "adadpo")]
# Nor is the objective the kernels': under their interpreter one of each way through the loss.
BACKEND_CASES = [
    pytest.param(
        *case, backend, marks=() if backend == "torch" or case[0] in WAYS else pytest.mark.long
    )
    for case in CASES
    for backend in BACKENDS
]


@pytest.mark.parametrize(("name", "trained", "backend"), BACKEND_CASES)
@pytest.mark.long(backend="triton", name=[n for n in WAYS if n not in ("adadpo", "tdpo2")])
def test_against_float64(name, trained, backend, device):
    data = batch(ref_H=24)
    ours, truth = move(data, device), move(data, device, torch.float64)
    for leaves in (ours, truth):
        leaves["weight"].requires_grad_(trained)
        leaves["bias"].requires_grad_(trained)
    options = {"logit_scale": 0.9, "softcap": 15.0, "temperature": 1.1}
    loss_fn = prefkern.FusedPreferenceLoss(fresh(name, device), workspace_mb=SMALL, backend=backend)
    out = loss_fn(**ours, **options)
    expected = reference.preference_loss(fresh(name, device), **truth, **options)
    # Weights of one's own over the pairs, and a term of one's own on chosen log-probs.
    for result in (out, expected):
        weights = torch.tensor([0.2, 0.5, 1.5], device=device, dtype=result.losses.dtype)
        ((result.losses * weights).sum() - 0.01 * result.chosen_logps.sum()).backward()
    assert_same(out, expected, ours, truth)
    assert out.plan.backend == backend
    assert out.plan.trains_head == trained and out.plan.trains_hidden


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.long(backend="triton", dtype=torch.float32)
def test_adadpo_is_listing_1_down_to_the_head(dtype, backend, device):
    """The paper's code on the log-probs of float64 logits: value, dH and dW of the whole loss."""
    data = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch(B=4).items()}
    ours, truth = move(data, device, dtype), move(data, device, torch.float64)
    out = prefkern.FusedPreferenceLoss(
        objectives.build("adadpo", beta=0.1), workspace_mb=SMALL, backend=backend
    )(**ours)
    out.loss.backward()

    labels = truth["labels"]
    scored = labels != -100

    def sums(hidden, weight, bias):
        log_p = (hidden @ weight.T + bias).log_softmax(-1)
        logps = log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return (logps * scored).sum(-1)

    lengths = scored.sum(-1)
    losses = listing_1(
        sums(truth["hidden"], truth["weight"], truth["bias"]),
        sums(truth["ref_hidden"], truth["ref_weight"], truth["ref_bias"]).detach(),
        slice(0, 4),
        slice(4, 8),
        beta=0.1,
        yw_lens=lengths[:4],
        yl_lens=lengths[4:],
    )
    losses.mean().backward()
    torch.testing.assert_close(out.losses.double(), losses, rtol=1e-5, atol=1e-5)
    bound = 1e-5 if dtype == torch.float32 else 4e-3  # of bf16, one rounding
    for name in ("hidden", "weight", "bias"):
        mine, true = ours[name].grad.double(), truth[name].grad
        assert (mine - true).norm() <= bound * true.norm(), name


# What is summed of the tokens is the same on both backends; their kernels differ by operator.
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *((name, "torch") for name in ("dpo", "adadpo", "alphadpo", "wpo", "tdpo2")),
        *((name, "triton") for name in ("adadpo", "tdpo2") if "triton" in BACKENDS),
    ],
)
@pytest.mark.long(backend="triton", name="tdpo2")
def test_packed_is_padded(name, backend, device):
    data = batch()
    padded = move(data, device)

    def loss_fn(*args, **kwargs):
        objective = fresh(name, device)
        made = prefkern.FusedPreferenceLoss(objective, workspace_mb=SMALL, backend=backend)
        return made(*args, **kwargs)

    expected = loss_fn(**padded)
    expected.loss.backward()

    # Drop the padding at the end of rows, keep the prompts.
    lengths = [4, 9, 9, 9, 6, 9]
    kept = torch.cat([torch.arange(n) + 9 * row for row, n in enumerate(lengths)])
    flat = {
        name: x.reshape(-1, *x.shape[2:])[kept] if name in ("hidden", "labels", "ref_hidden") else x
        for name, x in data.items()
    }
    packed = move(flat, device)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    out = loss_fn(**packed, cu_seqlens=cu_seqlens)
    out.loss.backward()
    torch.testing.assert_close(out.losses, expected.losses, rtol=1e-6, atol=1e-6)
    assert torch.equal(out.chosen_lengths, expected.chosen_lengths)
    unpacked = torch.zeros_like(padded["hidden"]).reshape(-1, 16)
    unpacked[kept.to(device)] = packed["hidden"].grad
    torch.testing.assert_close(
        unpacked.view_as(padded["hidden"]), padded["hidden"].grad, rtol=1e-5, atol=1e-7
    )
    torch.testing.assert_close(packed["weight"].grad, padded["weight"].grad, rtol=1e-5, atol=1e-7)

    truth = move(flat, device, torch.float64)
    oracle = reference.preference_loss(fresh(name, device), **truth, cu_seqlens=cu_seqlens)
    torch.testing.assert_close(out.losses.double(), oracle.losses, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.long(backend="triton")
def test_first_loss_of_equal_models_is_ln_2(dtype, backend, device):
    data = move(batch(B=3, T=14), device, dtype)
    data |= {"ref_hidden": data["hidden"].detach(), "ref_weight": data["weight"].detach()}
    data["ref_bias"] = data["bias"].detach()
    for name in ("dpo", "adadpo"):
        out = prefkern.FusedPreferenceLoss(OBJECTIVES[name], workspace_mb=SMALL, backend=backend)(
            **data
        )
        assert abs(out.loss.item() - math.log(2)) < 1e-6
        assert (out.beta_chosen == out.beta_rejected).all()


def test_reference_sums_computed_earlier(backend, device):
    data = move(batch(), device)
    loss_fn = prefkern.FusedPreferenceLoss(OBJECTIVES["adadpo"], backend=backend)
    through_head = loss_fn(**data)
    sums = torch.cat([through_head.ref_chosen_logps, through_head.ref_rejected_logps])
    for name in ("ref_hidden", "ref_weight", "ref_bias"):
        del data[name]
    given = loss_fn(**data, ref_logps=sums)
    assert torch.equal(given.losses, through_head.losses)


def test_a_reference_gets_no_gradient(backend, device):
    data = move(batch(), device)
    for name in ("ref_hidden", "ref_weight", "ref_bias"):
        data[name].requires_grad_()
    prefkern.FusedPreferenceLoss(OBJECTIVES["dpo"], backend=backend)(**data).loss.backward()
    assert all(data[name].grad is None for name in ("ref_hidden", "ref_weight", "ref_bias"))
    assert data["hidden"].grad is not None


# The loss of a pair of empty responses; MADPO's is weighted, SimPO's and alpha-DPO's have margins.
EMPTY_LOSS = {
    "ipo": 1.0,
    "adasimpo": math.log1p(math.exp(0.5)),
    "alphadpo": math.log1p(math.exp(0.3)),
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.long(backend="triton", name=[n for n in OBJECTIVES if n != "adadpo"])
def test_all_masked_responses_are_a_differentiable_zero(name, backend, device):
    data = batch()
    data["labels"][1] = -100
    data["labels"][4] = -100  # the whole second pair
    data["labels"][3] = -100  # the first pair's rejected response
    leaves = move(data, device)
    out = prefkern.FusedPreferenceLoss(fresh(name, device), backend=backend)(**leaves)
    out.loss.backward()
    assert out.chosen_lengths.tolist()[1] == 0 and out.chosen_logps[1] == 0
    for value in (out.losses, out.beta_chosen, *(leaves[n].grad for n in ("hidden", "weight"))):
        assert value.isfinite().all()
    assert (leaves["hidden"].grad[[1, 3, 4]] == 0).all()

    data["labels"][:] = -100
    leaves = move(data, device)
    out = prefkern.FusedPreferenceLoss(fresh(name, device), backend=backend)(**leaves)
    out.loss.backward()
    expected = EMPTY_LOSS.get(name, math.log(2))
    if name == "madpo":
        expected *= out.metrics["madpo/weight"].mean().item()
    assert out.loss.item() == pytest.approx(expected, abs=1e-6)
    assert (leaves["hidden"].grad == 0).all()


def test_one_pair(backend, device):
    data = move(batch(B=2), device)
    one = {
        name: x.detach()[[0, 2]].requires_grad_(x.requires_grad)
        if x.ndim > 1 and len(x) == 4
        else x
        for name, x in data.items()
        if name != "reward_margins"
    }
    loss_fn = prefkern.FusedPreferenceLoss(OBJECTIVES["adadpo"], backend=backend)
    torch.testing.assert_close(loss_fn(**one).losses, loss_fn(**data).losses[:1])


def test_statistics_on_request(backend, device):
    data = move(batch(), device)
    loss_fn = prefkern.FusedPreferenceLoss(OBJECTIVES["dpo"], backend=backend)
    assert loss_fn(**data).token_stats is None
    out = loss_fn(**data, return_stats=True)
    stats = prefkern.linear_logprobs(
        data["hidden"], data["weight"], data["labels"], data["bias"], return_stats=True
    )
    assert out.token_stats.logps.shape == data["labels"].shape
    for mine, theirs in zip(out.token_stats, stats, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert not out.token_stats.logps.requires_grad


@pytest.mark.long(backend="triton")
def test_against_liger(backend, device):
    """Value, dH and dW of Liger's fused DPO loss in float32."""
    dpo_loss = pytest.importorskip("liger_kernel.chunked_loss.dpo_loss")
    data = batch()
    ours, theirs = move(data, device), move(data, device)
    out = prefkern.FusedPreferenceLoss(DPO(0.3), workspace_mb=SMALL, backend=backend)(**ours)
    out.loss.backward()
    liger = dpo_loss.LigerFusedLinearDPOLoss(beta=0.3, compiled=False, average_log_prob=False)
    loss, _ = liger(
        theirs["weight"],
        theirs["hidden"],
        theirs["labels"],
        theirs["bias"],
        theirs["ref_hidden"],
        theirs["ref_weight"],
        theirs["ref_bias"],
    )
    loss.backward()
    torch.testing.assert_close(out.loss, loss, rtol=1e-5, atol=1e-5)
    for name in ("hidden", "weight", "bias"):
        torch.testing.assert_close(ours[name].grad, theirs[name].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["dpo", *WAYS])
@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"]
)
@pytest.mark.long(backend="triton", name=[n for n in WAYS if n != "adadpo"])
@pytest.mark.long(backend="triton", mode=torch.inference_mode)
def test_without_gradients_the_numbers_are_the_same(name, mode, backend, device):
    """Losses, gradients on log-probs and metrics are those of a differentiated call."""
    data = batch()
    loss_fn = prefkern.FusedPreferenceLoss(fresh(name, device), backend=backend).eval()
    before = str(loss_fn.state_dict())
    expected = loss_fn(**move(data, device))
    assert expected.loss.requires_grad
    with mode():
        out = loss_fn(**move(data, device))
    for key, value in vars(expected).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(out, key), value), key
            assert not getattr(out, key).requires_grad, key
    assert out.metrics.keys() == expected.metrics.keys()
    for key, value in expected.metrics.items():
        assert torch.equal(out.metrics[key], value), key
    assert out.chosen_gradients.abs().max() > 0
    assert str(loss_fn.state_dict()) == before


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.long(backend="triton", packed=False)
@pytest.mark.long(backend="triton", trained=False)
def test_kto_against_float64(packed, trained, backend, device):
    """Five responses, one of them empty, and three mismatched log-ratios."""
    data = {name: x[:5] if x.ndim > 1 and len(x) == 6 else x for name, x in batch().items()}
    data.pop("reward_margins")
    data["labels"][3] = -100
    extra = {}
    if packed:
        for name in ("hidden", "ref_hidden", "labels"):
            data[name] = data[name].flatten(0, 1)[:-2]
        extra["cu_seqlens"] = torch.tensor([0, 9, 18, 27, 36, 43], device=device)
    desirable = torch.tensor([True, False, True, True, False], device=device)
    mismatched = torch.tensor([2.0, -1.5, 3.0], device=device)
    ours, truth = move(data, device), move(data, device, torch.float64)
    for leaves in (ours, truth):
        leaves["weight"].requires_grad_(trained)
        leaves["bias"].requires_grad_(trained)
    objective = KTO(0.1, 1.3, 0.7)
    loss_fn = prefkern.FusedPreferenceLoss(objective, workspace_mb=SMALL, backend=backend)
    out = loss_fn(
        **ours, **extra, desirable=desirable, mismatched_log_ratios=mismatched, return_stats=True
    )
    expected = reference.preference_loss(
        objective,
        **truth,
        **extra,
        desirable=desirable,
        mismatched_log_ratios=mismatched.double(),
        return_stats=True,
    )
    for result in (out, expected):
        (result.loss - 0.01 * result.logps.sum()).backward()
    for name in ("loss", "losses", "logps", "ref_logps", "rewards", "reference_point"):
        mine, true = getattr(out, name), getattr(expected, name)
        torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=1e-5, msg=name)
    assert out.reference_point.item() == pytest.approx(3.5 / 3)
    assert torch.equal(out.lengths, expected.lengths) and out.lengths[3] == 0
    assert torch.equal(out.desirable, desirable)
    for mine, true in zip(out.token_stats, expected.token_stats, strict=True):
        torch.testing.assert_close(mine.double(), true.double(), rtol=1e-4, atol=1e-5)
    for name in ("hidden", "weight", "bias"):
        mine, true = ours[name].grad, truth[name].grad
        assert (mine is None) == (true is None)
        if true is not None:
            assert (mine.double() - true).norm() < 1e-5 * true.norm(), name
    assert out.plan.trains_head == trained and out.plan.trains_hidden


def test_kto_without_mismatched_pairs_has_a_reference_point_of_zero(backend, device):
    data = move(batch(), device)
    del data["reward_margins"]
    desirable = torch.ones(6, dtype=torch.bool, device=device)
    loss_fn = prefkern.FusedPreferenceLoss(KTO(), backend=backend)
    for values in (torch.zeros(0), torch.tensor([-3.0, 1.0])):
        out = loss_fn(**data, desirable=desirable, mismatched_log_ratios=values.to(device))
        assert out.reference_point == 0
        expected = torch.sigmoid(-0.1 * (out.logps - out.ref_logps))
        torch.testing.assert_close(out.losses, expected)


RESPONSES = {
    "desirable": torch.tensor([True, False] * 3),
    "mismatched_log_ratios": torch.zeros(2),
}
SUMS_ONLY = {
    "ref_hidden": None,
    "ref_weight": None,
    "ref_bias": None,
    "ref_logps": torch.zeros(6),
}


@pytest.mark.parametrize(
    ("objective", "change", "error", "message"),
    [
        (TDPO2(), SUMS_ONLY, ValueError, "TDPO2 needs the reference's distributions: .*not enough"),
        (WithNLL(TDPO1()), SUMS_ONLY, ValueError, "TDPO1 needs the reference's distributions"),
        (
            TDPO1(),
            {"ref_weight": torch.zeros(130, 16), "ref_bias": None},
            ValueError,
            "ref_weight has 130 vocabulary entries and weight 129: a divergence needs two",
        ),
        (MADPO(), {"reward_margins": None}, ValueError, "MADPO needs reward_margins, .*got None"),
        (WPO(MADPO()), {"reward_margins": None}, ValueError, "MADPO needs reward_margins"),
        (MADPO(), {"reward_margins": torch.zeros(6)}, ValueError, "reward_margins"),
        (MADPO(), {"reward_margins": [0.0] * 3}, TypeError, "reward_margins must be a tensor"),
        (KTO(), {}, ValueError, "KTO needs desirable, got None"),
        (
            KTO(),
            {"desirable": RESPONSES["desirable"]},
            ValueError,
            "KTO needs mismatched_log_ratios, got None",
        ),
        (
            KTO(),
            {**RESPONSES, "desirable": torch.ones(6)},
            TypeError,
            "desirable must be a bool tensor, got torch.float32",
        ),
        (KTO(), {**RESPONSES, "desirable": torch.ones(3).bool()}, ValueError, "desirable"),
        (
            KTO(),
            {**RESPONSES, "mismatched_log_ratios": torch.zeros(2, 1)},
            ValueError,
            "mismatched_log_ratios",
        ),
        (
            KTO(),
            {**RESPONSES, **SUMS_ONLY, "ref_logps": None},
            ValueError,
            "KTO needs a reference",
        ),
        (KTO(), {**RESPONSES, "labels": torch.zeros(54).long()}, ValueError, "labels"),
        (DPO(), RESPONSES, ValueError, "desirable was given, but DPO trains on pairs"),
        (
            DPO(),
            {"mismatched_log_ratios": torch.zeros(2)},
            ValueError,
            "mismatched_log_ratios was given, but DPO trains on pairs",
        ),
    ],
)
def test_what_an_objective_needs_is_asked_for(objective, change, error, message):
    with pytest.raises(error, match=message):
        prefkern.FusedPreferenceLoss(objective)(**{**batch(), **change})


def test_what_an_objective_has_no_use_for_is_left_alone(device):
    data = move(batch(), device)
    loss_fn = prefkern.FusedPreferenceLoss(SimPO())
    expected = loss_fn(**data)
    for name in ("ref_hidden", "ref_weight", "ref_bias", "reward_margins"):
        del data[name]
    assert torch.equal(loss_fn(**data).losses, expected.losses)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(5, 9, dtype=torch.int64), "hidden": torch.zeros(5, 9, 16)}, "2B"),
        ({"labels": torch.zeros(6, 8, dtype=torch.int64)}, "labels"),
        ({"labels": torch.full((6, 9), 129)}, "labels"),
        ({"ref_hidden": None, "ref_weight": None, "ref_bias": None}, "needs a reference"),
        ({"ref_weight": None, "ref_bias": None}, "without ref_weight"),
        ({"ref_hidden": None}, "without ref_hidden"),
        ({"ref_logps": torch.zeros(6)}, "not both"),
        (
            {"ref_hidden": None, "ref_weight": None, "ref_bias": None, "ref_logps": torch.zeros(3)},
            "ref_logps",
        ),
        ({"ref_hidden": torch.zeros(6, 8, 16)}, "ref_hidden"),
        ({"ref_weight": torch.zeros(129, 17)}, "ref_hidden"),
        ({"ref_weight": torch.zeros(128, 16), "ref_bias": None}, "128 rows and weight 129"),
        (
            {
                "ref_hidden": None,
                "ref_weight": None,
                "ref_bias": None,
                "ref_logps": torch.zeros(6, device="meta"),
            },
            "ref_logps is on meta",
        ),
        (
            {"ref_hidden": None, "ref_weight": None, "ref_bias": None, "ref_logps": [0.0] * 6},
            "ref_logps must be a tensor",
        ),
        ({"cu_seqlens": torch.tensor([0, 1, 2])}, "packed"),
        ({"softcap": 0.0}, "softcap"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {**batch(), **change}
    with pytest.raises((TypeError, ValueError), match=message):
        prefkern.FusedPreferenceLoss(OBJECTIVES["dpo"])(**arguments)


@pytest.mark.parametrize(
    ("cu_seqlens", "error", "message"),
    [
        (torch.tensor([0, 3, 9]), ValueError, "rise from 0"),
        (torch.tensor([1, 3, 10]), ValueError, "rise from 0"),
        (torch.tensor([0, 11, 10]), ValueError, "rise from 0"),
        (torch.tensor([0, 2, 4, 10]), ValueError, "2B"),
        (torch.tensor([0.0, 3.0, 10.0]), TypeError, "int32"),
        ([0, 3, 10], TypeError, "int32"),
    ],
)
def test_bad_cu_seqlens(cu_seqlens, error, message):
    hidden, weight = torch.randn(10, 4), torch.randn(7, 4)
    labels = torch.zeros(10, dtype=torch.int64)
    with pytest.raises(error, match=message):
        prefkern.FusedPreferenceLoss(OBJECTIVES["dpo"])(
            hidden, weight, labels, ref_logps=torch.zeros(2), cu_seqlens=cu_seqlens
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "adadpo"}, "objective"),
        ({"ignore_index": 1.5}, "ignore_index"),
        ({"workspace_mb": 0}, "workspace_mb"),
        ({"backend": "cuda"}, "backend"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        prefkern.FusedPreferenceLoss(**{"objective": objectives.build("dpo"), **options})


SHARED = [
    (packed, trained, backend)
    for packed in (False, True)
    for trained in (False, True)
    for backend in BACKENDS
]


# Under the interpreter one test of a shared head is enough, `test_equal_models_through_a_shared_head`.
@pytest.mark.parametrize(("packed", "trained", "backend"), SHARED)
@pytest.mark.long(backend="triton")
def test_a_shared_head_is_read_once(packed, trained, backend, device, monkeypatch):
    """Policy and reference through one head: one call, the numbers of two."""
    monkeypatch.setattr(call, "run", spied := Spy(call.run))
    hidden, ref_hidden = torch.randn(2, 4, 9, 16, device=device)
    weight, bias = torch.randn(300, 16, device=device), torch.randn(300, device=device)
    labels = torch.randint(300, (4, 9), device=device)
    labels[1, 3:] = -100
    keywords = {}
    if packed:
        hidden, ref_hidden, labels = (x.flatten(0, 1) for x in (hidden, ref_hidden, labels))
        keywords["cu_seqlens"] = torch.arange(5, dtype=torch.int32, device=device) * 9
    results = []
    for ref_weight, ref_bias in ((weight, bias), (weight.clone(), bias), (weight, bias.clone())):
        h, w = hidden.clone().requires_grad_(), weight
        if trained:
            w = weight.clone().requires_grad_()
            ref_weight = w if ref_weight is weight else ref_weight
        calls = len(spied.calls)
        out = prefkern.FusedPreferenceLoss(DPO(0.1), workspace_mb=SMALL, backend=backend)(
            h, w, labels, bias, ref_hidden, ref_weight, ref_bias, **keywords
        )
        out.loss.backward()
        shares = ref_weight is w and ref_bias is bias
        assert len(spied.calls) - calls == (1 if shares else 2)
        # Whether in one call or two: D, and log-probs of both.
        assert out.plan.forward_operations == 3 * 2 * 30 * 16 * 300
        assert out.ref_chosen_logps.grad_fn is None
        results.append((out.losses, out.ref_chosen_logps, h.grad, w.grad))
    for others in results[1:]:
        for mine, true in zip(results[0], others, strict=True):
            if mine is not None:
                torch.testing.assert_close(mine, true, rtol=1e-5, atol=1e-6)


def test_another_view_of_the_same_memory_is_another_head(device):
    """Two heads that begin at one place, with rows of different strides, share nothing."""
    memory = torch.randn(600, 16, device=device)
    weight, ref_weight = memory[:300], memory[::2]
    assert weight.data_ptr() == ref_weight.data_ptr() and weight.shape == ref_weight.shape
    hidden, labels = torch.randn(4, 9, 16, device=device), torch.randint(300, (4, 9), device=device)
    loss_fn = prefkern.FusedPreferenceLoss(DPO(0.1), backend="torch")
    found, expected = (
        loss_fn(hidden, weight, labels, ref_hidden=hidden, ref_weight=x)
        for x in (ref_weight, ref_weight.clone())
    )
    assert torch.equal(found.losses, expected.losses)
    assert not torch.equal(found.chosen_logps, found.ref_chosen_logps)


@pytest.mark.long(backend="triton")
def test_equal_models_through_a_shared_head(backend, device):
    """At step 0 the loss is ln 2 in float32, to the last bit."""
    hidden = torch.randn(4, 9, 16, device=device, requires_grad=True)
    weight = torch.randn(300, 16, device=device)
    labels = torch.randint(300, (4, 9), device=device)
    out = prefkern.FusedPreferenceLoss(DPO(0.1), workspace_mb=SMALL, backend=backend)(
        hidden, weight, labels, ref_hidden=hidden.detach().clone(), ref_weight=weight
    )
    assert torch.equal(out.chosen_logps, out.ref_chosen_logps)
    assert torch.equal(out.losses, torch.full_like(out.losses, math.log(2)))


class Spy:
    def __init__(self, function) -> None:
        self.function = function
        self.calls = []

    def __call__(self, *args, **keywords):
        self.calls.append(args)
        return self.function(*args, **keywords)


@pytest.mark.parametrize("name", ["shared head", "own head", "tdpo", "tdpo and statistics"])
@pytest.mark.parametrize("trained", [False, True])
def test_the_plan_of_an_output_is_what_was_done(trained, name):
    """The plan's operations are the counted ones, including the reference's, in one call or two."""
    hidden, ref_hidden = torch.randn(4, 9, 16), torch.randn(4, 9, 12)
    weight, ref_weight = torch.randn(300, 16), torch.randn(300, 12)
    if name == "shared head":
        ref_hidden, ref_weight = torch.randn(4, 9, 16), weight
    labels = torch.randint(300, (4, 9))
    labels[1, 3:] = -100
    objective = {"tdpo": TDPO2(0.1), "tdpo and statistics": WPO(TDPO2(0.1))}.get(name, DPO(0.1))
    loss_fn = prefkern.FusedPreferenceLoss(objective, workspace_mb=0.02, backend="torch")
    hidden.requires_grad_()
    weight.requires_grad_(trained)
    with Meter() as meter:
        out = loss_fn(hidden, weight, labels, ref_hidden=ref_hidden, ref_weight=ref_weight)
        out.loss.backward()
    assert out.plan.operations == meter.operations
    assert prefkern.last_plan() == out.plan
    assert out.plan.ref_hidden_size == ref_hidden.shape[-1]
    # A pass over both heads folds the statistics, too: nothing is done twice. In units of one
    # product with a head's width; what is kept of a token is not computed again.
    own, ref, kept = 2 * 300 * 16, 2 * 300 * ref_hidden.shape[-1], out.plan.kept_tokens
    pairs = "tdpo" in name
    done = 30 * ((4 if trained else 3 if pairs else 2) * own + ref) - kept * own
    if pairs and trained:
        done += (30 - kept) * ref
    assert out.plan.operations == done
