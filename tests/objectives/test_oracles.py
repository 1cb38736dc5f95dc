"""The oracles against code and claims of others: TRL, Liger, AdaDPO's listing, the papers."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from support import listing
from support.oracles import (
    Adaptive,
    Pair,
    balance,
    betadpo_beta,
    coefficients,
    gradient,
    implicit_gap,
    kto_z0,
    madpo_c,
    madpo_weight,
    value_and_gradient,
    wpo_weight,
)
from support.trl_loss import Says, logits_of, per_token, trl_dpo, trl_output, trl_state
from support.versions import TRL_CONSTANTS

PAIRS = [
    Pair(-35.2, -41.7, -36.0, -40.1, 12, 15),
    Pair(-80.5, -20.25, -60.0, -30.0, 40, 9),
    Pair(-7.0, -7.5, -7.0, -7.5, 3, 3),
    Pair(-1200.0, -2600.0, -1500.0, -2400.0, 700, 900),
]
IDEAL = Adaptive(space="policy", exponent=1.0, clip=None)


@pytest.fixture(autouse=True)
def doubles():
    """EXO's smoothing, in both peers, is a tensor of the default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def leaves(pair):
    return (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in pair[:2])


def agree(got, expected, w, l):
    """Assert that the oracle's loss and slopes are those of a peer's loss, by autograd."""
    expected.backward()
    theirs = expected.item(), w.grad.item(), l.grad.item()
    assert got[:3] == pytest.approx(theirs, rel=1e-10, abs=1e-14)


# Peers see x, what beta multiplies, with the chosen one already scaled by beta_w / beta_l


def liger(kind: str, beta: float, **options):
    def call(x_w, x_l):
        module = pytest.importorskip(f"liger_kernel.chunked_loss.{kind}_loss")
        function = getattr(module, f"LigerFusedLinear{names[kind]}Function")
        # Only the number of its rows is read.
        return function.preference_loss_fn(x_w, x_l, torch.empty(2), beta=beta, **options)[0]

    names = {"dpo": "DPO", "cpo": "CPO", "orpo": "ORPO", "simpo": "SimPO"}
    return call


def trl_cpo(loss_type: str, beta: float, **options):
    def call(x_w, x_l):
        trainer = pytest.importorskip("trl.experimental.cpo.cpo_trainer").CPOTrainer
        state = SimpleNamespace(
            beta=beta,
            loss_type=loss_type,
            alpha=0.0,
            label_smoothing=0.0,
            accelerator=SimpleNamespace(device="cpu"),
            **options,
        )
        return trainer.cpo_loss(state, x_w[None], x_l[None])[0][0]

    return call


def rho(p, w, l):
    return w - p.R_w, l - p.R_l


def mean(p, w, l):
    return w / p.n_w, l / p.n_l


def mean_rho(p, w, l):
    return (w - p.R_w) / p.n_w, (l - p.R_l) / p.n_l


def logps(p, w, l):
    return w, l


def log_odds(p, w, l):
    return (x - torch.log1p(-x.exp()) for x in mean(p, w, l))


# objective, its options, what the peer sees, the peer, the weight of -L_w/n_w beside it
PEERS = [
    ("dpo", {"beta": 0.3}, rho, liger("dpo", 0.3), 0),
    ("dpo", {"beta": 0.3, "label_smoothing": 0.2}, rho, liger("cpo", 0.3, label_smoothing=0.2), 0),
    ("dpo", {"beta": 0.3, "rpo_alpha": 0.7}, rho, liger("dpo", 0.3), 0.7),
    ("hinge", {"beta": 0.03}, rho, liger("dpo", 0.03, loss_type="hinge"), 0),
    ("hinge", {"beta": 0.03}, rho, trl_cpo("hinge", 0.03), 0),
    (
        "robust",
        {"beta": 0.3, "label_smoothing": 0.2},
        rho,
        liger("dpo", 0.3, loss_type="robust", label_smoothing=0.2),
        0,
    ),
    ("ipo", {"tau": 0.2}, rho, trl_cpo("ipo", 0.2), 0),
    ("ipo", {"tau": 0.2, "length_normalized": True}, mean_rho, trl_cpo("ipo", 0.2), 0),
    ("cpo", {"beta": 0.3, "nll_weight": 0.5}, logps, liger("cpo", 0.3), 0.5),
    ("cpo", {"beta": 0.3}, logps, trl_cpo("sigmoid", 0.3), 1),
    (
        "cpo",
        {"beta": 0.3, "nll_weight": 0.0, "label_smoothing": 0.2},
        logps,
        liger("cpo", 0.3, label_smoothing=0.2),
        0,
    ),
    (
        "simpo",
        {"beta": 2.0, "gamma": 1.4, "label_smoothing": 0.2},
        mean,
        liger("simpo", 2.0, gamma=1.4, label_smoothing=0.2),
        0,
    ),
    (
        "exo",
        {"beta": 0.3, "label_smoothing": 0.01},
        rho,
        liger("dpo", 0.3, loss_type="exo_pair", label_smoothing=0.01),
        0,
    ),
    ("nca", {"beta": 0.3}, rho, liger("dpo", 0.3, loss_type="nca_pair"), 0),
    ("sppo", {"beta": 0.3}, rho, liger("dpo", 0.3, loss_type="sppo_hard"), 0),
    ("apozero", {"beta": 0.3}, rho, liger("dpo", 0.3, loss_type="apo_zero"), 0),
    ("apodown", {"beta": 0.3}, rho, liger("dpo", 0.3, loss_type="apo_down"), 0),
    (
        "discopop",
        {"beta": 0.03, "tau": 0.2},
        rho,
        liger("dpo", 0.03, loss_type="discopop", discopop_tau=0.2),
        0,
    ),
    ("lndpo", {"beta": 2.0}, mean_rho, liger("dpo", 2.0), 0),
    ("simpo", {"beta": 2.0, "gamma": 1.4}, mean, liger("simpo", 2.0, gamma=1.4), 0),
    ("simpo", {"beta": 2.0, "gamma": 1.4}, mean, trl_cpo("simpo", 2.0, simpo_gamma=1.4), 0),
    ("orpo", {"beta": 0.3, "nll_weight": 0.5}, log_odds, liger("cpo", 0.3), 0.5),
]
ADAPTIVE = [
    None,
    Adaptive(),
    Adaptive("policy", 0.05, 3.0, 1.5),
    Adaptive("ratio", (0.02, 0.01), None),
]


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("adaptive", ADAPTIVE)
@pytest.mark.parametrize("name, options, seen, peer, nll", PEERS)
def test_peers(name, options, seen, peer, nll, adaptive, pair):
    loss, g_w, g_l, beta_w, beta_l = value_and_gradient(name, pair, **options, adaptive=adaptive)
    w, l = leaves(pair)
    x_w, x_l = seen(pair, w, l)
    expected = peer(x_w * (beta_w / beta_l), x_l) - nll * w / pair.n_w
    agree((loss, g_w, g_l), expected, w, l)


@pytest.mark.parametrize("pair", PAIRS)
def test_liger_orpo(pair):
    """Liger's beta, and TRL's, multiplies -log sigmoid from outside; AdaDPO Table 3's is inside."""
    w, l = leaves(pair)
    agree(
        value_and_gradient("orpo", pair, beta=1.0, nll_weight=0.0),
        liger("orpo", 1.0)(*mean(pair, w, l)),
        w,
        l,
    )


# TRL's trainer, whole, on one pair: aot sorts a batch of one, so that it is cDPO; sft is the NLL.
TRL = [
    ({"sigmoid": 1.0}, "dpo", {"beta": 0.3}),
    ({"aot": 1.0}, "dpo", {"beta": 0.3, "label_smoothing": 0.2}),
    ({"sigmoid": 1.0, "sft": 0.7}, "dpo", {"beta": 0.3, "rpo_alpha": 0.7}),
    ({"robust": 1.0}, "robust", {"beta": 0.3, "label_smoothing": 0.2}),
    ({"hinge": 1.0}, "hinge", {"beta": 0.3}),
    ({"ipo": 1.0}, "ipo", {"tau": 0.3, "length_normalized": True}),
    ({"exo_pair": 1.0}, "exo", {"beta": 0.3, "label_smoothing": 0.2}),
    ({"nca_pair": 1.0}, "nca", {"beta": 0.3}),
    ({"sppo_hard": 1.0}, "sppo", {"beta": 0.3}),
    ({"apo_zero": 1.0}, "apozero", {"beta": 0.3}),
    ({"apo_down": 1.0}, "apodown", {"beta": 0.3}),
    ({"discopop": 1.0}, "discopop", {"beta": 0.3, "tau": 0.05}),
    ({"sft": 1.0}, "sft", {}),
    ({"sigmoid_norm": 1.0}, "lndpo", {"beta": 0.3}),
    # A margin of the reference alone, not normalised by statistics, is DPO on means.
    (
        {"sigmoid_norm": 1.0},
        "alphadpo",
        {
            "beta": 0.3,
            "gamma": 0.0,
            "alpha": 1.0,
            "mean": 0.0,
            "std": 1.0,
            "implicit_reference": "reference",
        },
    ),
]


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(
    "weighted, loss_types, name, options",
    # TRL refuses to weight aot, and 1.16 weights hinge in place, which autograd refuses.
    [(False, *case) for case in TRL]
    + [(True, *case) for case in TRL if not {"aot", "hinge"} & set(case[0])],
)
def test_trl_trainer(weighted, loss_types, name, options, pair):
    w, l = leaves(pair)
    smoothing = options.get("label_smoothing", 0.0)
    if name == "discopop":
        # TRL's exp(-delta) overflows beyond 709, where its weight vanishes.
        pair = pair._replace(L_w=max(pair.L_w, pair.R_w - 9), L_l=min(pair.L_l, pair.R_l + 9))
        w, l = leaves(pair)
    weight, share = 1.0, None
    if weighted:
        tokens, mask = per_token(pair, w.detach(), l.detach())
        share = torch.rand(tokens.shape, dtype=torch.float64)
        log_sum_sq = torch.logsumexp(2 * logits_of(tokens, mask, share), -1)
        rows = [
            list(zip(logp[: mask.sum()].tolist(), log_sum.tolist(), strict=False))
            for logp, log_sum, mask in zip(tokens, log_sum_sq, mask, strict=True)
        ]
        # TRL does not clamp.
        weight = wpo_weight(*rows, clamp=False)
    expected = trl_dpo(pair, w, l, loss_types, 0.3, share=share, label_smoothing=smoothing)
    agree(value_and_gradient(name, pair, **options, weight=weight), expected, w, l)


# The losses that TRL takes an f-divergence for; `sft` accepts one and ignores it.
DIVERGING = [
    ("sigmoid", "dpo", {"beta": 0.3}),
    ("sigmoid_norm", "lndpo", {"beta": 0.3}),
    ("hinge", "hinge", {"beta": 0.3}),
    ("ipo", "ipo", {"tau": 0.3, "length_normalized": True}),
    ("exo_pair", "exo", {"beta": 0.3, "label_smoothing": 0.2}),
    ("robust", "robust", {"beta": 0.3, "label_smoothing": 0.2}),
    ("discopop", "discopop", {"beta": 0.3, "tau": 0.05}),
]


@pytest.mark.parametrize("pair", [*PAIRS[:1], PAIRS[2], Pair(-9.0, -11.0, -10.5, -9.5, 3, 4)])
@pytest.mark.parametrize(
    "divergence",
    [("forward_kl", None), ("js_divergence", None), ("alpha_divergence", 0.5),
     ("alpha_divergence", 1.75), ("alpha_divergence", 1.0)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("loss_type, name, options", DIVERGING)
def test_trl_divergences(loss_type, name, options, divergence, pair):
    kind, alpha = divergence
    by_length = loss_type in ("sigmoid_norm", "ipo") and pair.n_w != pair.n_l
    if by_length and alpha != 1.0 and TRL_CONSTANTS.is_too_old:
        pytest.skip(TRL_CONSTANTS.reason)
    # TRL's alpha-divergence refuses float64.
    dtype = torch.float32 if kind == "alpha_divergence" else torch.float64
    w, l = (torch.tensor(v, dtype=dtype, requires_grad=True) for v in pair[:2])
    given = {"f_divergence_type": kind}
    if alpha is not None:
        given["f_alpha_divergence_coef"] = alpha
    smoothing = options.get("label_smoothing", 0.0)
    expected = trl_dpo(pair, w, l, {loss_type: 1.0}, 0.3, label_smoothing=smoothing, **given)
    expected.backward()
    if alpha == 1.0:
        # The limit.
        given = {}
    got = value_and_gradient(name, pair, **options, **given)
    exact = dtype == torch.float64
    theirs = expected.item(), w.grad.item(), l.grad.item()
    assert got[:3] == pytest.approx(
        theirs, rel=1e-10 if exact else 1e-4, abs=1e-14 if exact else 1e-6
    )


@pytest.mark.parametrize("pair", [PAIRS[0], PAIRS[2], Pair(-9.0, -11.0, -10.5, -9.5, 3, 4, h=-1.5)])
def test_omni_dpo(pair):
    """Peng et al.'s parts, by autograd: two weights, LN-DPO, and the NLL below the reference."""
    w, l = leaves(pair)
    mean_w, mean_l = mean(pair, w, l)
    logsigmoid = torch.nn.functional.logsigmoid
    learnt = torch.sigmoid(2.0 * (mean_w - mean_l) - 0.8)
    quality = 1 / (1 + math.exp(-0.7 * pair.h))
    d = 2.0 * ((mean_w - pair.R_w / pair.n_w) - (mean_l - pair.R_l / pair.n_l))
    below = max(math.copysign(1.0, pair.R_w - pair.L_w) * (pair.R_w != pair.L_w), 0.0)
    expected = -quality * (1 - learnt) ** 3 * logsigmoid(d) - 0.1 * below * mean_w
    options = {"beta": 2.0, "eta": 0.7, "tau": 0.8, "gamma": 3.0, "nll_weight": 0.1}
    agree(value_and_gradient("omnidpo", pair, **options), expected, w, l)


def test_wpo_weight_is_clamped_as_a_product():
    top, rare = (math.log(0.9), math.log(0.82)), (math.log(0.1), math.log(0.82))
    assert wpo_weight([top], [rare, rare]) == pytest.approx(0.9 * 0.1 / 0.82**2)
    assert wpo_weight([top], [top], clamp=False) == pytest.approx((0.9 / 0.82) ** 2)
    assert wpo_weight([top], [top]) == 1.0


@pytest.mark.parametrize("mismatched", [[2.0, 1.0], [-3.0, 1.0]])
@pytest.mark.parametrize("pair", PAIRS)
def test_kto(pair, mismatched):
    trainer = pytest.importorskip("trl.trainer.kto_trainer").KTOTrainer
    w, l = leaves(pair)
    tokens, mask = per_token(pair, w, l)
    state, batch = trl_state(
        mask,
        beta=0.3,
        loss_type="kto",
        calculate_KL=True,
        desirable_weight=1.3,
        undesirable_weight=0.8,
        _compute_kl_logps=lambda model, batch: torch.tensor(mismatched),
    )
    batch |= {
        "label": torch.tensor([True, False]),
        "ref_logps": torch.tensor(pair[2:4], dtype=torch.float64),
        "ref_KL_logps": torch.zeros(2),
    }
    output = trl_output(tokens, mask)
    # TRL takes the mean over examples.
    expected = 2 * trainer._compute_loss(state, Says(output), batch, return_outputs=False)
    options = {"beta": 0.3, "z0": kto_z0(mismatched)}
    got = value_and_gradient("kto", pair, **options, lambda_d=1.3, lambda_u=0.8)
    agree(got, expected, w, l)
    liger_kto = pytest.importorskip("liger_kernel.chunked_loss.kto_loss")
    for name, field in (("kto_desirable", 0), ("kto_undesirable", 1)):
        logp, ref = (torch.tensor(pair[i], dtype=torch.float64) for i in (field, field + 2))
        theirs = liger_kto.LigerFusedLinearKTOFunction.preference_loss_fn(
            logp, torch.tensor(field == 0), torch.empty(1), ref, beta=0.3, kl=options["z0"]
        )[0]
        assert value_and_gradient(name, pair, **options)[0] == pytest.approx(theirs.item(), 1e-10)


# The adaptive coefficient


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("clip", [2.0, 1.2])
def test_listing_1(pair, clip):
    pi = torch.tensor(pair[:2], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor(pair[2:4], dtype=torch.float64)
    lengths = torch.tensor(pair[4:6])
    loss = listing.listing_1(pi, ref, 0, 1, 0.05, clip, *lengths)
    loss.backward()
    got = value_and_gradient("dpo", pair, beta=0.05, adaptive=Adaptive(clip=clip))
    # The listing divides by float32 lengths, in float64.
    assert got[:3] == pytest.approx((loss.item(), *pi.grad.tolist()), rel=1e-10)


BALANCED = {
    "dpo": {"beta": 0.1},
    "robust": {"beta": 0.1, "label_smoothing": 0.1},
    "hinge": {"beta": 0.1},
    "ipo": {"tau": 0.1},
    "rdpo": {"beta": 0.1, "alpha": 0.02},
    "lndpo": {"beta": 2.0},
    "exo": {"beta": 0.1, "label_smoothing": 0.01},
    "discopop": {"beta": 0.1, "tau": 0.05},
    "cpo": {"beta": 0.1, "nll_weight": 0.0},
    "simpo": {"beta": 2.0, "gamma": 0.5},
    "orpo": {"beta": 0.1, "nll_weight": 0.0},
}


@pytest.mark.parametrize("k", [1.0, 2.5])
@pytest.mark.parametrize("pair", [Pair(-3.0, -4.5, -3.5, -4.0, 2, 3), Pair(-6, -2, -5, -4, 5, 2)])
@pytest.mark.parametrize("name", BALANCED)
def test_proposition_1(name, pair, k):
    options = BALANCED[name] | {"adaptive": IDEAL._replace(k=k)}
    if name == "orpo":
        # ORPO's P is per token: dL/dP = n dL/dL / P.
        g_w, g_l = gradient(name, pair, ("L_w", "L_l"), **options)
        P_w, P_l = math.exp(pair.L_w / pair.n_w), math.exp(pair.L_l / pair.n_l)
        got = abs(g_w * pair.n_w / P_w) / abs(g_l * pair.n_l / P_l)
    else:
        got = balance(name, pair, **options)
    assert got == pytest.approx(k, rel=1e-12)
    if name in ("dpo", "lndpo", "ipo", "rdpo", "robust", "hinge", "exo", "discopop"):
        # The ratio space balances dL/d(P/R) instead.
        options["adaptive"] = IDEAL._replace(space="ratio", k=k)
        reference = math.exp(pair.R_w - pair.R_l)
        assert balance(name, pair, **options) * reference == pytest.approx(k, rel=1e-12)


@pytest.mark.parametrize("odds, plain, stable", [(5, 0.2, 0.4), (10, 0.1, 0.2), (1.5, 1 / 1.5, 1)])
def test_a_6(odds, plain, stable):
    pair = Pair(-3.0 + math.log(odds), -3.0, -3.0, -3.1, 4, 7)
    assert balance("dpo", pair, beta=0.1) == pytest.approx(plain, rel=1e-12)
    clipped = IDEAL._replace(clip=2.0)
    assert balance("dpo", pair, beta=0.1, adaptive=clipped) == pytest.approx(stable, rel=1e-12)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("name", BALANCED)
def test_exponents(name, pair):
    def got(**adaptive):
        return value_and_gradient(name, pair, **BALANCED[name], adaptive=Adaptive(**adaptive))

    assert got(exponent=0.0, clip=None) == value_and_gradient(name, pair, **BALANCED[name])
    assert got(exponent=(0, 0)) == value_and_gradient(name, pair, **BALANCED[name])
    lengths = (1, 1) if name == "orpo" else (1 / pair.n_w, 1 / pair.n_l)
    assert got() == pytest.approx(got(exponent=lengths), rel=1e-12)
    x_w, x_l = pair.L_w / pair.n_w, pair.L_l / pair.n_l
    ratio = {
        "cpo": math.exp(x_w - x_l),
        "simpo": math.exp(x_w - x_l) * pair.n_w / pair.n_l,
        "lndpo": math.exp(x_w - pair.R_w / pair.n_w - x_l + pair.R_l / pair.n_l)
        * pair.n_w
        / pair.n_l,
        "orpo": math.exp(x_w - x_l) * math.expm1(x_w) / math.expm1(x_l),
    }.get(name, math.exp(x_w - pair.R_w / pair.n_w - x_l + pair.R_l / pair.n_l))
    beta = BALANCED[name].get("beta", 1.0)
    expected = (beta * 1.5 * min(ratio, 1.1), beta)
    assert got(clip=1.1, k=1.5)[3:] == pytest.approx(expected, rel=1e-12)


# Objectives without a peer


@pytest.mark.parametrize("pair", PAIRS)
def test_offsets(pair):
    """R-DPO and TDPO are SimPO's formula with other quantities: Liger's SimPO tests them."""
    with_kl = pair._replace(K_w=3.0, K_l=5.5)
    length = 0.02 * (pair.n_w - pair.n_l)
    cases = [
        ("rdpo", pair, {"alpha": 0.02}, length),
        ("tdpo1", with_kl, {}, 0.3 * 2.5),
        ("tdpo2", with_kl, {"alpha": 0.4}, 0.3 * 0.4 * 2.5),
    ]
    for name, p, options, gamma in cases:
        w, l = leaves(p)
        expected = liger("simpo", 0.3, gamma=gamma)(w - p.R_w, l - p.R_l)
        agree(value_and_gradient(name, p, beta=0.3, **options), expected, w, l)
    fields = ("L_w", "L_l", "K_w", "K_l")
    g_w, g_l, k_w, k_l = gradient("tdpo1", with_kl, fields, beta=0.3)
    assert (k_w, k_l) == pytest.approx((g_w, g_l), rel=1e-12)
    g_w, g_l, k_w, k_l = gradient("tdpo2", with_kl, fields, beta=0.3, alpha=0.4)
    assert (k_w, k_l) == pytest.approx((0.0, 0.4 * g_l), rel=1e-12)


@pytest.mark.parametrize("pair", PAIRS)
def test_alphadpo(pair):
    shared = {"beta": 2.0, "gamma": 1.4}
    plain = value_and_gradient("simpo", pair, **shared)
    assert value_and_gradient("alphadpo", pair, **shared, alpha=0, mean=1.0, std=2.0) == plain
    # One pair has no spread, hence no z-score.
    assert value_and_gradient("alphadpo", pair, **shared, alpha=0.3, mean=1.0, std=0.0) == plain
    for reference in ("ratio", "policy", "reference", "inverse_reference"):
        for scale_by_beta, s in ((True, 2.0), (False, 1.0)):
            z = (implicit_gap(pair, reference) - 0.1) / 0.5
            got = value_and_gradient(
                "alphadpo", pair, **shared, alpha=0.3, mean=0.1, std=0.5,
                implicit_reference=reference, scale_by_beta=scale_by_beta,
            )  # fmt: skip
            margin = value_and_gradient("simpo", pair, beta=2.0, gamma=1.4 + 0.3 * s * z)
            assert got == pytest.approx(margin, rel=1e-9)
    # All of the reference's own log ratio as margin, unnormalised: DPO.
    sums = {"alpha": 1.0, "mean": 0.0, "std": 1.0, "length_normalized": False}
    got = value_and_gradient(
        "alphadpo", pair, beta=0.3, gamma=0.0, **sums, implicit_reference="reference"
    )
    assert got == pytest.approx(value_and_gradient("dpo", pair, beta=0.3), rel=1e-12)


def test_implicit_references():
    pair = Pair(-6.0, -8.0, -9.0, -2.0, 3, 4)
    gaps = {"ratio": 2.5, "policy": 0.0, "reference": -2.5, "inverse_reference": 2.5}
    assert {name: implicit_gap(pair, name) for name in gaps} == gaps
    sums = {"ratio": 9.0, "policy": 2.0, "reference": -7.0, "inverse_reference": 7.0}
    assert {name: implicit_gap(pair, name, False) for name in sums} == sums


def test_betadpo():
    assert float(betadpo_beta(0.1, 0.6, 2.0, 0.5)) == pytest.approx(0.1 * 1.9)
    # MADPO's complaint: without a floor beta turns negative on hard batches.
    assert float(betadpo_beta(0.1, 0.6, -3.0, 0.0)) == 1e-3
    got = value_and_gradient("betadpo", PAIRS[0], beta=0.1, m=0.6, mean_gap=2.0, h0=0.5)
    assert got == pytest.approx(value_and_gradient("dpo", PAIRS[0], beta=0.19), rel=1e-12)


@pytest.mark.parametrize(
    "c_max, c_min, lam", [(2, None, 1), (4, None, 1), (3, 0.0, 0.5), (2, 0.6, 5)]
)
@pytest.mark.parametrize("tau", [2, 7])
def test_madpo_weight(tau, c_max, c_min, lam):
    def w(h, mode="full"):
        return float(madpo_weight(h, tau, c_max, c_min, lam, mode))

    def c(h):
        return float(madpo_c(h, tau, c_max, c_min, lam))

    floor = 1 / c_max if c_min is None else c_min
    assert c(tau) == pytest.approx(1, rel=1e-12)
    assert c(-1e4) == pytest.approx(c_max) and c(1e4) == pytest.approx(floor)
    # c(0) falls short of c_max by what is left of the transition at 0.
    left = (c_max - 1) / (1 - floor) * math.exp(-lam * tau)
    assert c_max - c(0) == pytest.approx((c_max - floor) * left / (1 + left))
    assert w(-tau) == w(-tau - 1e-9) == w(-1e4) == 1
    assert w(-tau + 1e-9) == pytest.approx(1, abs=1e-7)
    assert w(tau) == pytest.approx(1, abs=1e-12)
    assert w(0) == 1
    assert w(tau / 2) > 1 > w(-tau / 2) > 0
    assert 0 < w(tau + 1) < 1
    for h in (-tau - 1, -tau / 2, tau / 2, tau, tau + 1):
        assert w(h, "amplify") == (w(h) if abs(h) < tau else 1)
        assert w(h, "regularize") == (w(h) if abs(h) >= tau else 1)


@pytest.mark.parametrize("h", [-6.5, -3.0, -0.4, 0.0, 1.0, 6.5, 7.0, 9.0, 12.0])
def test_propositions_4_1_and_4_2(h):
    """The policy margin that minimises the loss expected over who wins, by bisection."""
    beta, madpo = 0.1, {"beta": 0.1, "tau": 7.0, "c_max": 2.0}
    win = 1 / (1 + math.exp(-h))

    def slope(margin):
        pair = Pair(margin / beta, 0.0, h=h)
        swapped = Pair(0.0, margin / beta, h=-h)
        return (
            win * gradient("madpo", pair, ("L_w",), **madpo)[0]
            + (1 - win) * (gradient("madpo", swapped, ("L_l",), **madpo)[0])
        )

    low, high = -30.0, 30.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    c = float(madpo_c(abs(h), 7.0, 2.0))
    if abs(h) < 7:
        assert low == pytest.approx(c * h, abs=1e-9)
    else:
        # 4.2: less than h, but not c h; at most log 2 less, for c >= 0.
        target = h + math.log((1 + math.exp(-h)) / (1 + math.exp(-c * h)))
        assert low == pytest.approx(target, abs=1e-9)
        assert h - math.log(2) < low <= h + 1e-9


def test_madpo_scales_dpo():
    pair = PAIRS[0]._replace(h=1.5)
    weight = float(coefficients("madpo", pair, beta=0.1, tau=7, c_max=2).weight)
    plain = value_and_gradient("dpo", pair, beta=0.1)
    got = value_and_gradient("madpo", pair, beta=0.1, tau=7, c_max=2)
    assert got[:3] == pytest.approx([weight * x for x in plain[:3]], rel=1e-12)
    assert weight > 1


# Where doubles give out


def test_extremes():
    def close(got, expected):
        assert got == pytest.approx(expected, rel=1e-12, abs=0)

    # The margin is 0.25 rho: exactly 700, then 1e4 either way.
    right, wrong = Pair(2800.0 - 1e4, 0.0, -1e4, 0.0), Pair(-4e4, 0.0, 0.0, 0.0)
    close(value_and_gradient("dpo", right, beta=0.25)[:2], (math.exp(-700), -math.exp(-700) / 4))
    close(value_and_gradient("dpo", wrong, beta=0.25)[:3], (1e4, -0.25, 0.25))
    assert value_and_gradient("dpo", Pair(4e4, 0.0), beta=0.25)[:3] == (0, 0, 0)
    # ORPO at a confident chosen response and a hopeless rejected one, and the other way.
    hopeful = Pair(-5e-12, -7e4, n_w=5, n_l=7)
    odds = -1e-12 - math.log(-math.expm1(-1e-12))
    close(value_and_gradient("orpo", hopeful, beta=1e-2)[:2], (1e-12, -0.2))
    loss, g_w, g_l, *_ = value_and_gradient("orpo", Pair(-7e4, -5e-12, n_w=7, n_l=5), beta=1.0)
    close((loss, g_w, g_l), (1e4 + odds + 1e4, -2 / 7, 0.2 / -math.expm1(-1e-12)))
    # Log ratios of 1e4: clipped, and past a double's range when not.
    far, near = Pair(-1e4, -2e4, -2e4, -2e4, 1, 1), Pair(-2e4, -1e4, -2e4, -2e4, 1, 1)
    unclipped = Adaptive(clip=None)
    assert value_and_gradient("dpo", far, beta=0.5, adaptive=Adaptive())[3] == 1.0
    assert value_and_gradient("dpo", far, beta=0.5, adaptive=unclipped)[3] == math.inf
    assert value_and_gradient("dpo", near, beta=0.5, adaptive=unclipped)[3] == 0.0
    # A coefficient of e^650, and a slope of e^-600 beside a loss of log 2.
    steep, flat = Pair(-1e4, -1e4 - 650, -1e4, -1e4), Pair(-1e4 - 600, -1e4, -1e4, -1e4)
    got = value_and_gradient("dpo", steep, beta=0.5, adaptive=unclipped)
    close((got[1], got[3]), (-0.5 * math.exp(650) / (1 + math.exp(325)), 0.5 * math.exp(650)))
    got = value_and_gradient("dpo", flat, beta=0.5, adaptive=unclipped)
    close(got[:3], (math.log(2), -0.25 * math.exp(-600), 0.25))


def test_added_nll():
    pair, weighted = PAIRS[0], {"beta": 0.3, "weight": 0.4, "rpo_alpha": 0.7}
    plain, nll = value_and_gradient("dpo", pair, beta=0.3)[0], 0.7 * 35.2 / 12
    for weight_nll, factor in ((True, 0.4), (False, 1.0)):
        loss = value_and_gradient("dpo", pair, **weighted, weight_nll=weight_nll)[0]
        assert loss == pytest.approx(0.4 * plain + factor * nll, rel=1e-12)
