"""The pair kernel, twin of every objective that has its form: oracles, the torch class, extremes."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prefkern import objectives
from prefkern.loss import pairwise
from prefkern.loss.pairwise import Paired, Scores
from prefkern.objectives import MADPO, REGISTRY, WPO, AlphaDPO, Objective, WithNLL
from support.objective_cases import (
    BOUNDS,
    CASES,
    GROUPS,
    ORDINARY,
    Case,
    errors,
    evaluate_kernel,
    scores,
)

kernels = pytest.importorskip("prefkern_kernels")


def has_kernel(case: Case) -> bool:
    objective = case.make()
    return isinstance(objective, Objective) and objective.pair_kernel_options() is not None


KERNEL_CASES = {name: case for name, case in CASES.items() if has_kernel(case)}


def _form(case: Case) -> tuple:
    """The options that the kernel is compiled for, and which of its terms exist."""
    objective = case.make()
    options = objective.pair_kernel_options()
    present = ("margin", "length_penalty", "nll_weight", "shape", "gap_scale")
    weight = options.get("margin_weight") or {}
    return (
        options["score"],
        options["divergence"],
        options["link"],
        objective.needs_reference,
        options["ratio_space"],
        options["exponents"] is None,
        options["exponents"] == (0.0, 0.0),
        options["counts_lengths"],
        options["clip"] is None,
        options.get("gap"),
        options.get("gap_statistics") is None,
        options.get("gap_trains"),
        options.get("nll_below_reference"),
        weight.get("amplifies"),
        weight.get("damps"),
        *(bool(options.get(term)) for term in present),
    )


# One of each, where every setting of every objective would take a minute.
FORMS = list({_form(case): name for name, case in reversed(KERNEL_CASES.items())}.values())[::-1]


def test_what_has_a_kernel():
    """Named one by one, so that no objective drops out of the tests unnoticed."""
    assert {case.objective for case in KERNEL_CASES.values()} == {
        "dpo", "lndpo", "robust", "hinge", "ipo", "rdpo", "exo", "discopop", "nca", "sppo", "apozero",
        "apodown", "cpo", "orpo", "simpo", "sft", "tpo", "alphadpo", "madpo", "omnidpo", "nll",
    }  # fmt: skip
    nlls = {name for name in KERNEL_CASES if name.startswith("nll: ")}
    inner = ("dpo", "dpo: adaptive", "cpo", "cpo: adaptive", "alphadpo")
    assert nlls == {f"nll: {name}" for name in inner}
    without = {name for name, cls in REGISTRY.items() if name not in {*_names(KERNEL_CASES)}}
    assert without == {"betadpo", "bco", "aot", "aotunpaired", "tdpo1", "tdpo2", "kto"}
    assert objectives.build("sft", token_mean=True).pair_kernel_options() is None
    assert WPO(objectives.build("dpo")).pair_kernel_options() is None
    assert WithNLL(WPO(objectives.build("dpo"))).pair_kernel_options() is None


def _names(cases: dict[str, Case]) -> set[str]:
    return {case.objective for case in cases.values()}


def ask(case: Case, asked: Scores, backend: str) -> tuple[Paired, torch.Tensor]:
    """A backend's result, and its gradient at the tokens for given weights of the losses."""
    objective = case.make().to(asked.logps.device)
    assert isinstance(objective, Objective)
    before = kernels.launches["pair_loss"]
    out = pairwise.pair_loss(objective, asked, backend)
    assert kernels.launches["pair_loss"] - before == (backend == "triton")
    count = len(out.result.losses)
    weights = torch.linspace(0.25, 1.5, count, device=asked.logps.device)
    # A term of one's own on the log-probs, too.
    total = (out.result.losses * weights).sum() + 0.125 * out.pairs.rejected_logps.sum()
    (dlogps,) = torch.autograd.grad(total, asked.logps)
    return out, dlogps


def assert_twins(case: Case, asked: Scores, *, rtol: float, atol: float = 1e-30) -> Paired:
    mine, dmine = ask(case, asked, "triton")
    theirs, dtheirs = ask(case, asked, "torch")
    for actual, expected in (
        *zip(mine.result, theirs.result, strict=True),
        *zip(mine.gradients, theirs.gradients, strict=True),
        (mine.pairs.chosen_logps, theirs.pairs.chosen_logps),
        (mine.pairs.rejected_logps, theirs.pairs.rejected_logps),
        (dmine, dtheirs),
    ):
        assert actual.isfinite().all()
        torch.testing.assert_close(actual.detach(), expected.detach(), rtol=rtol, atol=atol)
    assert torch.equal(mine.pairs.chosen_lengths, theirs.pairs.chosen_lengths)
    assert torch.equal(mine.pairs.rejected_lengths, theirs.pairs.rejected_lengths)
    requires = [value.requires_grad for value in mine.result]
    assert requires == [True, False, False, False, False]
    assert not any(gradient.requires_grad for gradient in mine.gradients)
    return mine


@pytest.mark.parametrize("name", KERNEL_CASES)
@pytest.mark.long(name=[*KERNEL_CASES][1::2])
def test_against_the_oracle(name, device):
    """Value, gradient at the tokens and coefficients, to float32's accuracy, hard pairs included."""
    case = KERNEL_CASES[name]
    samples = [*ORDINARY[::2], *GROUPS["P near 1"], *GROUPS["P near 0"]]
    worst = errors(case, samples, evaluate_kernel(case, samples, device), torch.float32)
    assert all(error < BOUNDS[torch.float32] for error in worst), worst


def random_scores(objective: Objective, device: str) -> Scores:
    """More than a block of tokens; no tokens on one side or both; and lengths between."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.tensor([17, 1500, 0, 1, 0, 3, 5, 12, 0, 0])
    if objective.responses == 3:
        lengths = torch.cat([lengths, torch.tensor([4, 0, 1100, 1, 2])])
    logps = -2 * torch.rand(int(lengths.sum()), generator=generator)
    end = int(lengths[:10].sum())
    logps[end - 20 : end - 12] *= 1e-6  # a response that is nearly certain
    sums = torch.stack([part.sum() for part in logps.split(lengths.tolist())])
    ref = sums[:10] + 2 * torch.randn(10, generator=generator)
    return Scores(
        logps.to(device).requires_grad_(),
        torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(device),
        ref.to(device) if objective.needs_reference else None,
        torch.tensor([0.3, -2.0, 9.0, -30.0, 6.99]).to(device)
        if objective.needs_reward_margins
        else None,
        responses=objective.responses,
    )


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.long(name=[*FORMS][::2])
def test_is_the_torch_class_on_random_pairs(name, device):
    case = KERNEL_CASES[name]
    asked = random_scores(case.make(), device)
    # Sums of 1500 tokens are rounded once on both sides, and exponents of 1 exponentiate them.
    assert_twins(case, asked, rtol=5e-5, atol=1e-20)


@pytest.mark.parametrize("alpha", [0.0, 0.6])
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.long(name=[*FORMS][1::2])
def test_tokens_beyond_the_shorter_response_weigh_less(name, alpha, device):
    """With `ld_alpha` a token's gradient is one of two numbers of its sequence: one launch, too."""
    case = KERNEL_CASES[name]
    asked = dataclasses.replace(random_scores(case.make(), device), ld_alpha=alpha)
    mine = assert_twins(case, asked, rtol=5e-5, atol=1e-20)
    theirs, _ = ask(case, asked, "torch")
    for x, y in zip(mine.pairs.whole(), theirs.pairs.whole(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=0)


SIZES = [0.0, -1e-4, -30.0, -1e4]


# The interpreter says so of MADPO's weight where it is not taken.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.long(name=[*FORMS][1::2])
def test_extremes(name, device):
    """From nothing to saturation: log-ratios of 1e4, equal responses, margins without bound."""
    case = KERNEL_CASES[name]
    objective = case.make()
    rows = list(itertools.product(SIZES, SIZES))[::3] + [(-1e4, 0.0)]
    chosen, rejected = torch.tensor(rows).unbind(1)
    logps = torch.cat([chosen, rejected, chosen][: objective.responses]).to(device)
    count = len(rows)
    margins = itertools.islice(itertools.cycle([math.inf, -math.inf, 1e4, -1e4, 0.0]), count)
    asked = Scores(
        logps.requires_grad_(),
        torch.arange(len(logps) + 1, device=device),
        torch.zeros(2 * count, device=device) if objective.needs_reference else None,
        torch.tensor(list(margins), device=device) if objective.needs_reward_margins else None,
        responses=objective.responses,
    )
    assert_twins(case, asked, rtol=1e-5)


@pytest.mark.parametrize("name", ["dpo: adaptive", "orpo: plain", "madpo: plain"])
def test_one_pair(name, device):
    case = KERNEL_CASES[name]
    out = assert_twins(case, scores(ORDINARY[:1], device, case.make()), rtol=1e-5)
    assert out.result.losses.shape == (1,)


@pytest.mark.parametrize("name", ["dpo: adaptive", "simpo: plain", "orpo: plain", "madpo: plain"])
def test_no_tokens_at_all(name, device):
    case = KERNEL_CASES[name]
    offsets = torch.zeros(5, dtype=torch.int64, device=device)
    empty = torch.zeros(0, device=device, requires_grad=True)
    asked = Scores(empty, offsets, torch.zeros(4, device=device), torch.zeros(2, device=device))
    out = assert_twins(case, asked, rtol=1e-6)
    assert (out.result.losses > 0).all()


class Recorded(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[torch.dtype]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        name = func._schema.name.removeprefix("aten::")
        # Of no elements nothing is launched: `once.anchors`.
        if name != "clone" or tensors[0].numel():
            self.calls.append((name, [x.dtype for x in tensors]))
        return func(*args, **(kwargs or {}))


# Memory, copies of it (the interpreter's, of what a launch was given) and views of it.
NOT_ARITHMETIC = {"empty", "new_empty", "set_", "copy_", "split", "slice", "detach", "alias"}


@pytest.mark.parametrize("name", sorted({case.objective for case in KERNEL_CASES.values()}))
def test_one_launch_and_no_arithmetic_of_torch(name, device):
    """Between the tokens' log-probs and the losses only the kernel computes."""
    cases = [case for case in KERNEL_CASES.values() if case.objective == name]
    # A gold response's term is torch's: without one the kernel is all there is of TPO as well.
    case = next(case for case in cases if not case.make().needs_gold)
    objective = case.make().to(device)
    asked = scores(ORDINARY[:2], device, objective)
    before = dict(kernels.launches)
    with Recorded() as recorded:
        pairwise.pair_loss(objective, asked, "triton")
    after = dict(kernels.launches)
    assert after == {**before, "pair_loss": before.get("pair_loss", 0) + 1}
    computed = [
        (op, dtypes)
        for op, dtypes in recorded.calls
        # Lengths are differences of offsets.
        if op not in NOT_ARITHMETIC and not (op == "sub" and set(dtypes) == {torch.int64})
    ]
    assert not computed and recorded.calls


def test_the_record_sees_arithmetic():
    """The test above relies on this: in the torch path arithmetic is recorded."""
    case = KERNEL_CASES["dpo: plain"]
    with Recorded() as recorded:
        pairwise.pair_loss(case.make(), scores(ORDINARY[:2], "cpu", case.make()), "torch")
    assert {"mul", "log_sigmoid_forward"} <= {op for op, _ in recorded.calls}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("reference", ["ratio", "policy"])
def test_alpha_dpo_moves_its_statistics_as_in_torch(reference, wrapped, device):
    def make() -> tuple[AlphaDPO, Objective]:
        inner = AlphaDPO(2.5, 0.6, 0.2, implicit_reference=reference).to(device)
        return inner, WithNLL(inner, 0.3) if wrapped else inner

    (mine, my_objective), (theirs, their_objective) = make(), make()
    batches = (ORDINARY[:1], ORDINARY[:4], ORDINARY[3:])
    for step, samples in enumerate(batches):
        asked = scores(samples, device, mine)
        out = pairwise.pair_loss(my_objective, asked, "triton").result
        expected = pairwise.pair_loss(their_objective, asked, "torch").result
        torch.testing.assert_close(out.losses, expected.losses, rtol=1e-5, atol=0)
        assert mine.statistics.batches == step + 1
        for name, value in mine.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[name]), name
    # Evaluation reads them and moves nothing.
    before = {name: value.clone() for name, value in mine.state_dict().items()}
    asked = scores(ORDINARY[:2], device, mine)
    results = [
        pairwise.pair_loss(objective.eval(), asked, backend).result.losses
        for objective, backend in ((my_objective, "triton"), (their_objective, "torch"))
    ]
    torch.testing.assert_close(*results, rtol=1e-5, atol=0)
    assert all(torch.equal(value, before[name]) for name, value in mine.state_dict().items())


@pytest.mark.parametrize("outer", [True, False])
def test_statistics_follow_the_mode_of_the_module_that_has_them(outer, backend, device):
    """The mode of a wrapper has no effect: frozen inside stays frozen, and the reverse."""
    inner = AlphaDPO().to(device)
    objective = WithNLL(inner)
    for step, training in enumerate((True, False)):
        objective.train(outer)
        inner.train(training)
        pairwise.pair_loss(objective, scores(ORDINARY, device, inner), backend)
        assert inner.statistics.batches == 1, step


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("name", ["dpo: adaptive", "orpo: plain", "madpo: plain"])
def test_gradients_are_there_without_a_graph(name, grad, device):
    """Logged numbers depend neither on whether something trains nor on the backend."""
    case = KERNEL_CASES[name]
    objective = case.make()
    asked = scores(ORDINARY, device, objective)
    expected = pairwise.pair_loss(objective, asked, "torch").gradients
    for backend in ("triton", "torch"):
        with grad():
            out = pairwise.pair_loss(objective, asked, backend)
        assert out.result.losses.requires_grad == (grad is torch.enable_grad)
        for mine, true in zip(out.gradients, expected, strict=True):
            torch.testing.assert_close(mine.clone(), true, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("objective", "missing", "message"),
    [
        (objectives.build("dpo"), "ref_logps", "DPO needs ref"),
        (objectives.build("alphadpo"), "ref_logps", "AlphaDPO needs ref"),
        (MADPO(), "reward_margins", "MADPO needs reward_margins"),
        (MADPO(), "ref_logps", "MADPO needs ref"),
    ],
)
def test_what_is_missing_is_not_taken_for_0(objective, missing, message, backend, device):
    given = vars(scores(ORDINARY[:2], device)) | {missing: None}
    with pytest.raises(ValueError, match=message):
        pairwise.pair_loss(objective.to(device), Scores(**given), backend)


def test_a_margin_that_is_nan_is_seen(backend, device):
    """The weight must not be 1: a NaN margin must stay visible."""
    objective = objectives.MADPO()
    logps = torch.full((8,), -1.0, device=device)
    offsets = torch.arange(0, 9, 2, device=device)
    margins = torch.tensor([math.nan, 1.0], device=device)
    asked = Scores(logps, offsets, torch.zeros(4, device=device), margins)
    losses = pairwise.pair_loss(objective, asked, backend).result.losses
    assert losses.isnan().tolist() == [True, False]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_delta_that_overflows_is_no_nan(backend, device):
    """Hyper-parameters at their bounds and log-ratios of 1e4: a loss of 0 or infinity."""
    adaptive = objectives.Adaptive(exponent=1.0, clip=None, k=1e6)
    objective = objectives.DPO(1e6, adaptive=adaptive)
    logps = torch.tensor([1e4, -1e4, -1e4, 1e4], device=device)
    asked = Scores(logps, torch.arange(5, device=device), torch.zeros(4, device=device))
    losses = pairwise.pair_loss(objective, asked, backend).result.losses
    assert not losses.isnan().any() and losses[0] == 0


class _Launched(Exception):
    """Raised in place of a launch; holds its keywords."""


@pytest.mark.parametrize("wrap", [lambda objective: objective, WithNLL], ids=["plain", "nll"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_the_kernel_reads_statistics_where_the_batch_is(training, wrap, monkeypatch):
    """For a loss that was not moved; on meta, since a kernel reads no other device's memory."""

    def launch(*tensors, **options):
        raise _Launched(options)

    monkeypatch.setattr(kernels, "pair_loss", launch)
    objective = wrap(AlphaDPO()).train(training)
    offsets = torch.arange(0, 25, 6, device="meta")
    batch = Scores(torch.empty(24, device="meta"), offsets, torch.empty(4, device="meta"))
    with pytest.raises(_Launched) as launched:
        pairwise.pair_loss(objective, batch, "triton")
    (options,) = launched.value.args
    assert all(value.is_meta for value in options["gap_statistics"])
