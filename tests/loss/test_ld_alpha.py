"""LD-DPO: tokens beyond the shorter response's length weigh `ld_alpha`, in policy and reference.

The truth is by hand, token by token, from logits in float64; then TRL's trainer; then special
cases.
"""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
import torch
import torch._dynamo.testing

import prefkern
from prefkern import FusedPreferenceLoss, objectives, reference
from prefkern.objectives import CPO, DPO, IPO, KTO, SFT, TDPO1, WPO, Adaptive, Mixture, WithNLL
from prefkern.ops import sequences
from support.machine import BACKENDS
from support.ranks import group_of_one
from support.trl_loss import Says, trl_output, trl_state

F = torch.nn.functional
B, T, H, V = 4, 11, 16, 129
TRANSFORM = {"logit_scale": 0.9, "softcap": 12.0, "temperature": 1.1}
IGNORED = -100


def batch() -> dict[str, torch.Tensor]:
    """Pairs whose chosen or rejected response is longer, whose lengths are equal, and an empty one."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(V, (2 * B, T), generator=generator)
    labels[:, :2] = IGNORED
    for row, first in ((0, 5), (1, 9), (4, 8), (5, 4), (7, 2)):
        labels[row, first:] = IGNORED
    # Turns in between that are not scored.
    labels[2, 4:6] = labels[6, 3] = IGNORED
    given = {"labels": labels}
    for name, shape in {
        "hidden": (2 * B, T, H), "weight": (V, H), "bias": (V,),
        "ref_hidden": (2 * B, T, H), "ref_weight": (V, H), "ref_bias": (V,),
    }.items():  # fmt: skip
        given[name] = torch.randn(shape, generator=generator) * (
            5 / H**0.5 if len(shape) == 3 else 1
        )
    return given


def leaves(given: dict, dtype=torch.float64, device: str = "cpu") -> dict:
    moved = {
        name: x.to(device, dtype if x.is_floating_point() else x.dtype, copy=True)
        for name, x in given.items()
    }
    for name in ("hidden", "weight", "bias"):
        moved[name].requires_grad_()
    return moved


def token_logps(given: dict, prefix: str = "") -> torch.Tensor:  # (2B, T)
    z = given[f"{prefix}hidden"] @ given[f"{prefix}weight"].T + given[f"{prefix}bias"]
    z = TRANSFORM["softcap"] * torch.tanh(z * TRANSFORM["logit_scale"] / TRANSFORM["softcap"])
    log_p = (z / TRANSFORM["temperature"]).log_softmax(-1)
    return log_p.gather(-1, given["labels"].clamp(min=0).unsqueeze(-1)).squeeze(-1)


def by_hand(given: dict, alpha: float) -> dict[str, torch.Tensor]:  # (2B,) each
    """Sums of policy and reference, token by token."""
    policy, other = token_logps(given), token_logps(given, "ref_").detach()
    scored = [(row != IGNORED).nonzero().flatten().tolist() for row in given["labels"]]
    sums = defaultdict(list)
    for row, places in enumerate(scored):
        shared = min(len(places), len(scored[(row + B) % (2 * B)]))
        for name, values in (("L", policy[row]), ("R", other[row])):
            first = sum((values[t] for t in places[:shared]), values.new_zeros(()))
            rest = sum((values[t] for t in places[shared:]), values.new_zeros(()))
            sums[name].append(first + alpha * rest)
            sums[f"{name} whole"].append(first + rest)
        sums["n"].append(torch.tensor(float(max(len(places), 1)), dtype=torch.float64))
    return {name: torch.stack(values) for name, values in sums.items()}


def textbook(name: str, s: dict[str, torch.Tensor]) -> torch.Tensor:  # (B,)
    w, l = slice(B), slice(B, None)
    rho = s["L"] - s["R"]
    per_token = s["L"] / s["n"]
    nll = -s["L whole"][w] / s["n"][w]
    if name == "dpo":
        return F.softplus(-0.3 * (rho[w] - rho[l]))
    if name == "adadpo":
        ratio = (rho[w] / s["n"][w] - rho[l] / s["n"][l]).detach().exp().clamp(max=2.0)
        return F.softplus(-0.3 * (ratio * rho[w] - rho[l]))
    if name == "ipo":
        return (rho[w] / s["n"][w] - rho[l] / s["n"][l] - 1.0).square()
    if name == "simpo":
        return F.softplus(-(2.0 * (per_token[w] - per_token[l]) - 0.5))
    if name == "cpo":
        return F.softplus(-0.3 * (s["L"][w] - s["L"][l])) + 0.7 * nll
    if name == "rpo":
        return F.softplus(-0.3 * (rho[w] - rho[l])) + 0.5 * nll
    means = s["L whole"].detach() / s["n"]
    return (means[w] + means[l]).exp() * F.softplus(-0.3 * (rho[w] - rho[l]))


OBJECTIVES = {
    "dpo": lambda: DPO(0.3),
    "adadpo": lambda: DPO(0.3, adaptive=Adaptive()),
    "ipo": lambda: IPO(0.5, length_normalized=True),
    "simpo": lambda: objectives.SimPO(2.0, 0.5),
    "cpo": lambda: CPO(0.3, 0.7),
    "rpo": lambda: WithNLL(DPO(0.3), 0.5),
    "wpo, unaligned": lambda: WPO(DPO(0.3), alignment=False),
}


def pair_launches() -> int:
    if "triton" not in BACKENDS:
        return 0
    import prefkern_kernels

    return prefkern_kernels.launches["pair_loss"]


def packed(given: dict) -> dict:
    """The same sequences end to end, each without one token of its prompt."""
    rows = {name: x for name, x in given.items() if name in ("hidden", "ref_hidden", "labels")}
    flat = {name: x[:, 1:].flatten(0, 1) for name, x in rows.items()}
    return {**given, **flat, "cu_seqlens": torch.arange(2 * B + 1) * (T - 1)}


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.long(backend="triton", name=[n for n in OBJECTIVES if n not in ("adadpo", "cpo")])
def test_value_and_gradient_from_logits(name, layout, alpha, backend, device):
    truth = leaves(batch())
    sums = by_hand(truth, alpha)
    expected = textbook(name, sums)
    expected.mean().backward()
    dtypes = [torch.float64, torch.float32] if backend == "torch" else [torch.float32]
    for dtype in dtypes:
        mine = leaves(batch(), dtype, device)
        given = packed(mine) if layout == "packed" else mine
        given = {n: x.to(device) for n, x in given.items()}
        loss_fn = prefkern.FusedPreferenceLoss(
            OBJECTIVES[name](), workspace_mb=1, backend=backend, ld_alpha=alpha
        )
        before = pair_launches()
        out = loss_fn(**given, **TRANSFORM)
        out.loss.backward()
        assert out.plan.backend == backend
        has_kernel = backend == "triton" and not name.startswith("wpo")
        assert pair_launches() - before == has_kernel
        rtol = 1e-11 if dtype == torch.float64 else 2e-6
        for side, value in (("L", (out.chosen_logps, out.rejected_logps)),
                            ("R", (out.ref_chosen_logps, out.ref_rejected_logps))):  # fmt: skip
            if side == "R" and not loss_fn.objective.needs_reference:
                continue
            found = torch.cat(value).double().cpu()
            torch.testing.assert_close(
                found, sums[side], rtol=rtol, atol=1e-5 if rtol > 1e-9 else 0
            )
        atol = 1e-5 if dtype == torch.float32 else 1e-13
        torch.testing.assert_close(out.losses.double().cpu(), expected, rtol=rtol, atol=atol)
        lengths = torch.cat([out.chosen_lengths, out.rejected_lengths]).cpu()
        assert torch.equal(lengths, (batch()["labels"] != IGNORED).sum(1))
        for part in ("hidden", "weight", "bias"):
            error = mine[part].grad.double().cpu() - truth[part].grad
            assert error.norm() <= max(rtol, 1e-12) * 10 * truth[part].grad.norm(), part


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_oracle_has_it_too(name):
    truth, mine = leaves(batch()), leaves(batch())
    expected = textbook(name, by_hand(truth, 0.4))
    expected.mean().backward()
    for given in (mine, packed(leaves(batch()))):
        out = reference.preference_loss(OBJECTIVES[name](), **given, **TRANSFORM, ld_alpha=0.4)
        torch.testing.assert_close(out.losses, expected, rtol=1e-12, atol=1e-14)
        # The push on a token of weight 1, NLL terms and all.
        fused = FusedPreferenceLoss(OBJECTIVES[name](), backend="torch", ld_alpha=0.4)
        other = fused(**given, **TRANSFORM)
        for side in ("chosen_gradients", "rejected_gradients"):
            pushes = getattr(out, side), getattr(other, side)
            torch.testing.assert_close(*pushes, rtol=1e-10, atol=1e-14)
    reference.preference_loss(OBJECTIVES[name](), **mine, **TRANSFORM, ld_alpha=0.4).loss.backward()
    for part in ("hidden", "weight", "bias"):
        torch.testing.assert_close(mine[part].grad, truth[part].grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    "loss_types", [{"sigmoid": 1.0}, {"ipo": 1.0}, {"sigmoid": 1.0, "sft": 0.5}]
)
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_a_batch_is_trls(loss_types, alpha):
    trainer = pytest.importorskip("trl.trainer.dpo_trainer").DPOTrainer
    given = batch()
    rows = [0, 4] if "sft" in loss_types else [0, 1, 2, 4, 5, 6]
    # TRL's NLL is a mean over a batch's tokens: compared on one pair. IPO counts tokens alike.
    given = {n: x[rows] if n in ("labels", "hidden", "ref_hidden") else x for n, x in given.items()}
    theirs = leaves(given)
    scored = theirs["labels"] != IGNORED
    tokens, other = (torch.where(scored, token_logps(theirs, p), 0.0) for p in ("", "ref_"))
    policy, other = (Says(trl_output(x, scored)).eval() for x in (tokens, other.detach()))
    state, inputs = trl_state(
        scored,
        loss_types,
        beta=0.5,
        ld_alpha=alpha,
        model=policy,
        precompute_ref_logps=False,
        ref_model=other,
    )
    expected = trainer._compute_loss(state, policy, inputs, return_outputs=False)
    expected.backward()
    objective = IPO(0.5, length_normalized=True) if "ipo" in loss_types else DPO(0.5)
    if "sft" in loss_types:
        objective = WithNLL(objective, 0.5)
    mine = leaves(given)
    loss_fn = prefkern.FusedPreferenceLoss(objective, backend="torch", ld_alpha=alpha)
    loss = loss_fn(**mine, **TRANSFORM).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for part in ("hidden", "weight", "bias"):
        torch.testing.assert_close(mine[part].grad, theirs[part].grad, rtol=1e-9, atol=1e-13)


# Special cases


def test_a_weight_of_1_is_no_weight(backend, device):
    given = {n: x.to(device) for n, x in batch().items()}
    plain, one = (
        prefkern.FusedPreferenceLoss(DPO(0.3), backend="torch", ld_alpha=alpha)(**given)
        for alpha in (None, 1.0)
    )
    for name in ("losses", "chosen_logps", "rejected_logps", "ref_chosen_logps"):
        torch.testing.assert_close(
            getattr(one, name), getattr(plain, name), rtol=2.4e-7, atol=0, msg=name
        )


def test_a_weight_of_0_leaves_tokens_out_even_impossible_ones():
    """A tail of probability 0 has a log-prob of -inf, and 0 times that is NaN."""
    logps = torch.tensor([-1.0, -2.0, -math.inf, -3.0, -4.0]).requires_grad_()
    parts = sequences.pair_parts(torch.tensor([0, 3, 5]))
    assert parts.tolist() == [0, 2, 3, 5, 5]
    weighed, whole = sequences.part_sums(logps, parts, 0.0)
    assert weighed.tolist() == [-3.0, -7.0] and whole.tolist() == [-math.inf, -7.0]
    weighed.sum().backward()
    assert logps.grad.tolist() == [1, 1, 0, 1, 1]


def test_sums_of_nothing():
    parts = sequences.pair_parts(torch.zeros(5, dtype=torch.int64))
    for sums in sequences.part_sums(torch.zeros(0), parts, 0.5):
        assert sums.tolist() == [0] * 4


def test_gradcheck():
    logps = torch.randn(9, dtype=torch.float64, requires_grad=True)
    # Of 3, 0, 2 and 4 tokens; a token at the end that belongs to none.
    offsets = torch.tensor([0, 3, 3, 5, 8])
    parts = sequences.pair_parts(offsets)

    def sums(values):
        return sequences.part_sums(values[:8], parts, 0.3)

    assert torch.autograd.gradcheck(sums, [logps])
    assert torch.autograd.gradgradcheck(sums, [logps])


def test_a_tokens_gradient_is_one_of_two_numbers_of_its_sequence():
    """And nothing else is computed for it: plan and passes are those of DPO."""
    plans = {}
    for alpha in (None, 0.4):
        given = leaves(batch(), torch.float32)
        given["weight"].requires_grad_(False), given["bias"].requires_grad_(False)
        loss_fn = prefkern.FusedPreferenceLoss(DPO(0.3), backend="torch", ld_alpha=alpha)
        out = loss_fn(**given)
        out.loss.backward()
        plans[alpha] = out.plan
    assert plans[None] == plans[0.4]
    # d logp / d hidden does not depend on the loss: the ratio of gradients is the coefficient's.
    logps = prefkern.linear_logprobs(
        given["hidden"], given["weight"], given["labels"], given["bias"], backend="torch"
    )
    (unit,) = torch.autograd.grad(logps.sum(), given["hidden"])
    scored = given["labels"] != IGNORED
    factor = (given["hidden"].grad * unit).sum(-1) / unit.square().sum(-1)
    pushes = torch.cat([out.chosen_gradients, out.rejected_gradients]) / B
    shared = torch.minimum(out.chosen_lengths, out.rejected_lengths).repeat(2)
    for row in range(2 * B):
        found = factor[row][scored[row]]
        n = int(shared[row])
        expected = torch.cat([pushes[row].expand(n), 0.4 * pushes[row].expand(len(found) - n)])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("name", ["adadpo", "rpo"])
def test_under_torch_compile(name, is_packed):
    torch._dynamo.reset()
    given = leaves(batch(), torch.float32)
    given = packed(given) if is_packed else given
    tensors = [given[n] for n in ("hidden", "weight", "bias")]
    loss_fn = prefkern.FusedPreferenceLoss(OBJECTIVES[name](), backend="torch", ld_alpha=0.4)
    compiled = torch.compile(loss_fn, fullgraph=True, backend="aot_eager")
    outs = [each(**given) for each in (loss_fn, compiled)]
    for field in ("losses", "chosen_logps", "rejected_logps", "ref_chosen_logps"):
        mine, true = (getattr(out, field) for out in outs)
        torch.testing.assert_close(mine, true, rtol=1e-6, atol=1e-6)
    roots = [
        torch.autograd.grad(out.loss, [x for x in tensors if x.is_leaf]) for out in reversed(outs)
    ]
    for mine, true in zip(*roots, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, True, "0.5"])
def test_a_weight_that_is_none(value):
    for make in (
        lambda: prefkern.FusedPreferenceLoss(DPO(), ld_alpha=value),
        lambda: reference.preference_loss(DPO(), **batch(), ld_alpha=value),
    ):
        with pytest.raises((TypeError, ValueError), match=r"^ld_alpha must be .*, got"):
            make()


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (KTO(), "ld_alpha is 0.5, and KTO has no pairs.*leave it out"),
        (WithNLL(TDPO1()), "ld_alpha is 0.5, and TDPO1's divergences are sums over all tokens"),
        (
            WithNLL(Mixture([DPO(), WPO(TDPO1())])),
            "ld_alpha is 0.5, and TDPO1's divergences are sums over all tokens",
        ),
    ],
)
def test_objectives_without_it(objective, message):
    with pytest.raises(ValueError, match=message):
        prefkern.FusedPreferenceLoss(objective, ld_alpha=0.5)


def test_sequences_over_several_ranks_do_not_take_it():
    with (
        group_of_one() as group,
        pytest.raises(ValueError, match="ld_alpha is 0.5, and with sequence_group"),
    ):
        prefkern.FusedPreferenceLoss(DPO(), sequence_group=group, ld_alpha=0.5)


if "triton" in BACKENDS:

    def test_the_pair_kernel_is_asked_once():
        import prefkern_kernels as kernels

        given = batch()
        for alpha in (None, 0.4):
            before = kernels.launches["pair_loss"]
            loss_fn = prefkern.FusedPreferenceLoss(DPO(0.3), backend="triton", ld_alpha=alpha)
            loss_fn(**given)
            assert kernels.launches["pair_loss"] - before == 1


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize(
    "objective", [CPO(), WithNLL(DPO(), 0.5), SFT()], ids=lambda x: repr(x)[:7]
)
def test_a_weight_of_1_pushes_as_none_does(objective, trains):
    """Every field of the output: the push on a response has its NLL term, too."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=generator) for shape in ((4, 6, 8), (16, 8)))
    labels = torch.randint(0, 16, (4, 6), generator=generator)
    labels[0, 3:] = labels[3, 2:] = -100
    outs = [
        FusedPreferenceLoss(objective, ld_alpha=alpha)(
            hidden.clone().requires_grad_(trains), weight, labels, ref_logps=torch.full((4,), -9.0)
        )
        for alpha in (None, 1.0)
    ]
    for name, expected in vars(outs[0]).items():
        if isinstance(expected, torch.Tensor):
            torch.testing.assert_close(getattr(outs[1], name), expected, msg=name)
    assert outs[1].chosen_gradients.abs().min() > 0.1
