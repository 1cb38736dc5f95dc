"""Statistics and draws of objectives: alone, resumed, and on two ranks of unequal batches."""

from __future__ import annotations

import copy
import itertools
import math
import operator
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from prefkern import Pairs
from prefkern.objectives import (
    BCO,
    DPO,
    IPO,
    KTO,
    TPO,
    WPO,
    Adaptive,
    AlphaDPO,
    BetaDPO,
    Examples,
    Mixture,
    WithNLL,
)
from prefkern.objectives.running import RunningStatistics, gather
from support.ranks import run_on_two_ranks

BATCHES = [
    torch.randn(size, generator=torch.Generator().manual_seed(size)) * size + 3
    for size in (4, 1, 7, 1, 2)
]


def pairs_with_gaps(gaps: torch.Tensor) -> Pairs:
    """Pairs of one token each with the given gaps, DPO's and alpha-DPO's."""
    zeros = torch.zeros_like(gaps)
    ones = torch.ones_like(gaps)
    return Pairs(gaps.clone().requires_grad_(), zeros, zeros, zeros, ones, ones)


def by_hand(
    batches: list[torch.Tensor], momentum: float, start: tuple[float, float] | None
) -> list[tuple[float, float]]:
    """The running first two moments, and from them mean and variance after each step.

    Without a start, their sum of weights is divided out (the bias correction).
    """
    first, second = (0.0, 0.0) if start is None else (start[0], start[1] + start[0] ** 2)
    total = 0.0 if start is None else 1.0
    found = []
    for batch in batches:
        x = batch.double().numpy()
        first = momentum * first + (1 - momentum) * np.mean(x)
        second = momentum * second + (1 - momentum) * np.mean(x**2)
        total = momentum * total + (1 - momentum)
        mean = first / total
        found.append((mean, second / total - mean**2))
    return found


@pytest.mark.parametrize("start", [None, (0.5, 4.0)], ids=["corrected", "from a start"])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.999])
def test_statistics_are_the_running_moments(momentum, start):
    mean, variance = start or (0.0, 0.0)
    statistics = RunningStatistics(momentum, mean, variance, bias_corrected=start is None)
    expected = by_hand(BATCHES, momentum, start)
    for step, (batch, (mean, variance)) in enumerate(zip(BATCHES, expected, strict=True)):
        statistics.update(batch)
        assert statistics.mean.item() == pytest.approx(mean, rel=1e-12)
        assert statistics.variance.item() == pytest.approx(variance, rel=1e-11)
        assert statistics.batches.item() == step + 1


def test_a_momentum_of_1_is_the_mean_of_all_batches():
    statistics = RunningStatistics(1.0)
    for step, batch in enumerate(BATCHES):
        statistics.update(batch)
        means = [x.double().mean() for x in BATCHES[: step + 1]]
        squares = [x.double().square().mean() for x in BATCHES[: step + 1]]
        mean = sum(means) / len(means)
        torch.testing.assert_close(statistics.mean, mean, rtol=1e-14, atol=0)
        variance = sum(squares) / len(squares) - mean**2
        torch.testing.assert_close(statistics.variance, variance, rtol=1e-12, atol=0)


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.9, 0.9999, 1.0])
def test_the_first_batch_is_its_own_mean_and_variance(momentum):
    statistics = RunningStatistics(momentum)
    statistics.update(BATCHES[0])
    assert statistics.mean == BATCHES[0].double().mean()
    variance = BATCHES[0].double().var(correction=0)
    torch.testing.assert_close(statistics.variance, variance, rtol=1e-14, atol=0)


def test_without_momentum_only_the_last_batch_counts():
    statistics = RunningStatistics(0.0)
    for batch in BATCHES:
        statistics.update(batch)
        assert statistics.mean.item() == pytest.approx(batch.double().mean().item(), rel=1e-6)
        variance = batch.double().var(correction=0).item()
        assert statistics.variance.item() == pytest.approx(variance, rel=1e-5, abs=1e-10)


def test_batches_of_one_pair_add_up_to_a_spread():
    statistics = RunningStatistics(0.999)
    generator = torch.Generator().manual_seed(5)
    for x in 3 + 2 * torch.randn(2000, generator=generator):
        statistics.update(x[None])
        if statistics.batches == 1:
            assert statistics.variance == 0
    assert statistics.mean.item() == pytest.approx(3, abs=0.3)
    assert statistics.variance.item() == pytest.approx(4, abs=0.6)


def test_a_mean_far_from_0_leaves_the_variance_its_digits():
    """A running second moment in float32 would cancel to noise here."""
    statistics = RunningStatistics(0.9)
    for batch in BATCHES:
        statistics.update(batch.double() * 1e-2 + 1e4)
    expected = RunningStatistics(0.9)
    for batch in BATCHES:
        expected.update(batch.double() * 1e-2)
    torch.testing.assert_close(statistics.variance, expected.variance, rtol=0.05, atol=0)


# Of a first batch of one, the z-score is 0.
@pytest.mark.parametrize("sizes", [(1, 4), (4, 1, 3)])
def test_alpha_dpo_scores_by_what_it_has_seen(sizes):
    objective = AlphaDPO(2.0, 0.5, 0.25, momentum=0.8)
    seen = []
    for size in sizes:
        batch = BATCHES[2][:size] * (len(seen) + 1)
        seen.append(batch)
        losses = objective(pairs_with_gaps(batch)).losses
        mean, variance = by_hand(seen, 0.8, None)[-1]
        z = (batch.double() - mean) / math.sqrt(variance) if variance > 1e-12 else 0 * batch
        expected = torch.nn.functional.softplus(-(2.0 * batch - 0.5 - 0.25 * 2.0 * z))
        torch.testing.assert_close(losses.double(), expected.double(), rtol=1e-5, atol=1e-6)


STATEFUL = {
    "alphadpo": lambda: AlphaDPO(momentum=0.7),
    "bco": BCO,
    "adabco": lambda: BCO(adaptive=Adaptive()),
    "betadpo": lambda: BetaDPO(momentum=0.7, keep=0.5),
    "wpo of nll of betadpo": lambda: WPO(WithNLL(BetaDPO(momentum=0.7, keep=0.5)), alignment=False),
}


@pytest.mark.parametrize("name", STATEFUL)
def test_evaluation_moves_nothing(name):
    objective = STATEFUL[name]()
    for batch in BATCHES[:2]:
        objective(pairs_with_gaps(batch))
    before = copy.deepcopy(objective.state_dict())
    objective.eval()
    pairs = pairs_with_gaps(BATCHES[2])
    result = objective(pairs)
    first = result.losses
    objective(pairs_with_gaps(BATCHES[0]))
    assert torch.equal(objective(pairs_with_gaps(BATCHES[2])).losses, first)
    kept = objective.metrics(pairs, result).get("beta_dpo/kept")
    assert (kept is None) == ("betadpo" not in name) and (kept is None or (kept == 1).all())
    after = objective.state_dict()
    assert before.keys() == after.keys() and len(after) >= 3
    assert all(
        torch.equal(value, after[key]) if isinstance(value, torch.Tensor) else value == after[key]
        for key, value in before.items()
    )


@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.parametrize("after", [0, 1, 3])
def test_restored_continues_as_if_uninterrupted(name, after, tmp_path):
    batches = [*BATCHES, *BATCHES]
    uninterrupted = STATEFUL[name]()
    expected = [uninterrupted(pairs_with_gaps(batch)).losses for batch in batches]
    first = STATEFUL[name]()
    for batch in batches[:after]:
        first(pairs_with_gaps(batch))
    # Through a file, as a checkpoint goes.
    torch.save(first.state_dict(), tmp_path / "state.pt")
    restored = STATEFUL[name]()
    restored.load_state_dict(torch.load(tmp_path / "state.pt"))
    torch.rand(3)  # the draws are of a seed of their own
    for batch, losses in zip(batches[after:], expected[after:], strict=True):
        assert torch.equal(restored(pairs_with_gaps(batch)).losses, losses)


def kept_by(objective: BetaDPO, gaps: torch.Tensor) -> torch.Tensor:
    pairs = pairs_with_gaps(gaps)
    return objective.metrics(pairs, objective(pairs))["beta_dpo/kept"].bool()


def test_draws_follow_the_seed():
    gaps = BATCHES[2]

    def draws(seed: int) -> list[list[bool]]:
        objective = BetaDPO(keep=0.5)
        objective.manual_seed(seed)
        return [kept_by(objective, gaps).tolist() for _ in range(12)]

    assert draws(1) == draws(1) != draws(2)
    assert len({tuple(draw) for draw in draws(1)}) > 1
    assert BetaDPO().seed == 0
    restarted = BetaDPO(keep=0.5)
    first = kept_by(restarted, gaps)
    kept_by(restarted, gaps)
    restarted.manual_seed(0)
    restarted.statistics = BetaDPO().statistics
    assert torch.equal(kept_by(restarted, gaps), first)


@pytest.mark.parametrize("keep", [0.01, 0.29, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("size", [1, 3, 4, 100])
def test_a_share_is_kept_and_the_mean_is_over_it(keep, size):
    objective = BetaDPO(0.1, m=0.02, keep=keep)
    gaps = torch.randn(size, generator=torch.Generator().manual_seed(1))
    pairs = pairs_with_gaps(gaps)
    result = objective(pairs)
    kept = objective.metrics(pairs, result)["beta_dpo/kept"].bool()
    # 0.29 of 100 is 29, though 0.29 * 100 is 28.999... in floating point.
    assert kept.sum() == max(math.floor(round(keep * size, 9)), 1)
    h0 = 0.9 * 0.0 + 0.1 * gaps.mean()
    beta = 0.1 * (1 + 0.02 * (gaps[kept].mean() - h0))
    torch.testing.assert_close(result.beta_chosen, beta.expand(size))
    losses = torch.nn.functional.softplus(-beta * gaps)
    torch.testing.assert_close(result.losses.mean(), losses[kept].mean())
    assert (result.losses[~kept] == 0).all()
    (gradient,) = torch.autograd.grad(result.losses.sum(), pairs.chosen_logps)
    assert ((gradient != 0) == kept).all()


def test_pairs_are_drawn_in_proportion_to_their_density():
    """Inclusion frequencies of 2 of 4 against the sequential draw without replacement, enumerated."""
    gaps = torch.tensor([-1.5, 0.0, 0.75, 2.5])
    objective = BetaDPO(keep=0.5, momentum=0.9)
    # Held where they are, so that all draws are of one distribution.
    objective.statistics.update = lambda values: None
    objective.statistics.mean.fill_(0.5)
    objective.statistics.variance.fill_(1.44)
    weights = torch.exp(-0.5 * (gaps - 0.5).square() / 1.44).tolist()
    expected = torch.zeros(4)
    for a, b in itertools.permutations(range(4), 2):
        chance = weights[a] / sum(weights) * weights[b] / (sum(weights) - weights[a])
        expected[a] += chance
        expected[b] += chance
    count = 3000
    found = torch.stack([kept_by(objective, gaps) for _ in range(count)]).float().mean(0)
    # Four standard deviations of a frequency.
    assert ((found - expected).abs() < 4 * (expected * (1 - expected) / count).sqrt()).all()
    assert expected.max() - expected.min() > 0.4  # so that equal weights would have failed


def test_kept_is_told_when_losses_cannot():
    """The loss does not show it: a kept pair may have a loss of 0, one left out an NLL term."""
    gaps = torch.tensor([5e4, 4e4, 3e4, 2e4])
    inner = BetaDPO(1.0, m=0.0, keep=0.5)
    objective = WithNLL(inner)
    pairs = pairs_with_gaps(gaps)
    result = objective(pairs)
    assert (inner(pairs).losses == 0).all()
    inner.manual_seed(0)
    kept = objective.metrics(pairs, objective(pairs))["beta_dpo/kept"]
    assert kept.sum() == 2 and (result.losses != 0).all()


def test_beta_does_not_fall_below_its_floor():
    objective = BetaDPO(0.1, m=5.0, momentum=0.0, beta_min=0.02)
    objective.eval()
    low = objective(pairs_with_gaps(torch.full((3,), -50.0)))
    assert (low.beta_chosen == torch.tensor(0.02)).all() and (low.beta_rejected == 0.02).all()
    high = objective(pairs_with_gaps(torch.full((3,), 10.0)))
    torch.testing.assert_close(high.beta_chosen, torch.full((3,), 0.1 * (1 + 5.0 * 10)))
    torch.testing.assert_close(high.chosen_rewards, high.beta_chosen * 10)


def test_kto_without_mismatched_pairs_has_a_reference_point_of_0():
    examples = Examples(
        torch.tensor([-1.0, -3.0]), torch.tensor([True, False]), torch.zeros(2), torch.zeros(0)
    )
    assert KTO()(examples).reference_point == 0


# Two ranks

GAPS = [torch.tensor([0.3, -2.0, 4.0, 1.0, 0.5]), torch.tensor([2.0, 2.5, -1.0, 7.0, 3.0])]
MISMATCHED = torch.tensor([3.0, -1.0, 0.25, 5.0, -0.5])
# Where one rank's part of each ends; the other has the rest. Unequal, and the other way round.
CUTS = [2, 4]


def everything(part) -> dict[str, torch.Tensor]:
    """A small run of each objective; `part(values, step)` is this process's part of a batch."""
    found: dict[str, torch.Tensor] = {}
    makes = {
        "alphadpo": lambda: AlphaDPO(2.0, 0.5, 0.25),
        "bco": lambda: BCO(0.3),
        "bco, momentum": lambda: BCO(0.3, momentum=0.6),
        "adabco": lambda: BCO(0.3, adaptive=Adaptive("policy", 0.1)),
        "betadpo": lambda: BetaDPO(0.1, m=0.3, keep=1.0),
        "betadpo, a share": lambda: BetaDPO(0.1, m=0.3, keep=0.6),
    }
    for name, make in makes.items():
        objective = make()
        for step, gaps in enumerate(GAPS):
            result = objective(pairs_with_gaps(part(gaps, step)))
            found[f"{name}: losses {step}"] = result.losses.detach()
            found[f"{name}: beta {step}"] = result.beta_chosen
            for key, value in objective.state_dict().items():
                if isinstance(value, torch.Tensor):
                    found[f"state of {name}: {key} {step}"] = value.clone()
        objective.eval()
        # No rank waits for another here: evaluation may end at different times.
        if part(GAPS[0], 0).shape[0] != 2:
            objective(pairs_with_gaps(GAPS[0]))
    values = part(MISMATCHED, 0)
    examples = Examples(values, values > 0, torch.zeros_like(values), values)
    kto = KTO()
    found["kto: losses 0"] = kto(examples).losses
    found["state of kto: z0"] = kto(examples).reference_point
    everyone, mine = gather(part(GAPS[0], 0))
    found["state of gather"] = everyone
    found["gathered: own 0"] = everyone[mine]
    return found


def _part(rank: int):
    def part(values: torch.Tensor, step: int) -> torch.Tensor:
        return values[: CUTS[step]] if rank == 0 else values[CUTS[step] :]

    return part


def test_two_ranks_are_one_process_on_the_joined_batch(tmp_path):
    run_on_two_ranks(__file__, str(tmp_path))
    expected = everything(lambda values, step: values)
    zero, one = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert zero.keys() == one.keys() == expected.keys()
    for name, value in expected.items():
        if name.startswith("state of"):
            torch.testing.assert_close(zero[name], value, rtol=1e-6, atol=0, msg=name)
            assert torch.equal(zero[name], one[name]), name
        else:
            joined = torch.cat([zero[name], one[name]])
            torch.testing.assert_close(joined, value, rtol=1e-6, atol=0, msg=name)
    assert (expected["betadpo, a share: losses 1"] == 0).sum() == 2


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    torch.save(everything(_part(rank)), Path(sys.argv[1]) / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", STATEFUL)
def test_what_overflowed_leaves_statistics_alone(name, bad):
    """After a step that a gradient scaler skips, later steps are as without it."""
    clean, spoilt = (STATEFUL[name]() for _ in range(2))
    for objective in (clean, spoilt):
        objective(pairs_with_gaps(BATCHES[0]))
    spoilt(pairs_with_gaps(torch.full((3,), bad)))
    mixed = torch.cat([BATCHES[2], torch.tensor([bad])])
    losses = spoilt(pairs_with_gaps(mixed)).losses
    expected = clean(pairs_with_gaps(BATCHES[2])).losses
    for mine, true in zip(spoilt.buffers(), clean.buffers(), strict=True):
        torch.testing.assert_close(mine, true)
    # With a share kept, another pair changes the draw.
    if "betadpo" not in name:
        torch.testing.assert_close(losses[:-1], expected)


def test_equal_gaps_have_no_spread_whatever_their_rounding():
    objective = AlphaDPO(gamma=4.0, alpha=0.5)
    for _ in range(5):
        pairs = pairs_with_gaps(torch.full((3,), 0.1, dtype=torch.float64))
        objective(pairs)
        assert (objective.margin(pairs) == 4.0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_statistics_keep_their_dtype(dtype):
    objective = AlphaDPO()
    objective(pairs_with_gaps(BATCHES[0]))
    before = [buffer.clone() for buffer in objective.buffers()]
    objective.to(dtype)
    assert all(map(torch.equal, before, objective.buffers()))
    assert objective.to("meta").statistics.mean.is_meta


@pytest.mark.parametrize("name", STATEFUL)
def test_statistics_follow_the_batch(name):
    """A loss that was not moved: in training, and first in evaluation or in inference mode."""
    for first in ("training", "evaluation", "inference"):
        objective = STATEFUL[name]()
        objective.train(first == "training")
        with torch.inference_mode(first == "inference"):
            pairs = pairs_with_gaps(torch.empty(4, device="meta"))
            assert objective(pairs).losses.is_meta
        moved = [*objective.buffers()]
        assert len(moved) == 3 and all(buffer.is_meta for buffer in moved)
        # They stay there, and training may go on.
        objective.train()
        objective(pairs_with_gaps(torch.empty(4, device="meta")))
        assert all(map(operator.is_, objective.buffers(), moved))


def test_statistics_follow_the_batch_under_torch_compile():
    objective = WithNLL(AlphaDPO())
    compiled = torch.compile(objective, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert compiled(pairs_with_gaps(torch.empty(4, device="meta"))).losses.is_meta
    assert all(buffer.is_meta for buffer in objective.buffers())


CHANGES_LOSSES = {
    "an NLL": lambda: WithNLL(DPO(0.3)),
    "a mixture": lambda: Mixture([DPO(0.3), IPO(0.2)], [0.7, 0.3]),
    "weights": lambda: WPO(DPO(0.3), alignment=False),
    "gold": lambda: TPO(0.3, tpo_alpha=0.5),
}


@pytest.mark.parametrize("name", CHANGES_LOSSES)
def test_losses_that_another_makes_are_compiled(name):
    """torch 2.11 cannot return what `_replace` of a named tuple makes."""
    objective = CHANGES_LOSSES[name]()
    gaps = torch.randn(5, generator=torch.Generator().manual_seed(2))
    pairs = replace(pairs_with_gaps(gaps), gold_logps=-gaps.exp(), gold_lengths=torch.ones(5))
    expected = objective(pairs)
    compiled = torch.compile(objective, backend="aot_eager", fullgraph=True)
    for found, true in zip(compiled(pairs), expected, strict=True):
        torch.testing.assert_close(found, true)


def test_float64_is_scored_in_float64():
    """Also with gaps far from 0, for which a mean in float32 would lose all digits."""
    generator = torch.Generator().manual_seed(9)
    for far in (0.0, 1e5):
        objective = AlphaDPO(2.0, 0.5, 0.25)
        gaps = torch.randn(7, generator=generator, dtype=torch.float64)
        pairs = replace(pairs_with_gaps(gaps), ref_chosen_logps=torch.full_like(gaps, -far))
        losses = objective(pairs).losses
        z = (gaps - gaps.mean()) / gaps.std(correction=0)
        expected = torch.nn.functional.softplus(-(2.0 * gaps - 0.5 - 0.25 * 2.0 * z))
        # 1e5 leaves 11 digits of a gap.
        torch.testing.assert_close(losses, expected, rtol=1e-9 if far else 1e-13, atol=0)


def test_statistics_of_a_float32_checkpoint_are_taken():
    objective = AlphaDPO()
    objective(pairs_with_gaps(BATCHES[0]))
    state = objective.state_dict()
    old = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    restored = AlphaDPO()
    restored.load_state_dict(old)
    assert restored.statistics.mean.dtype == torch.float64
    assert restored.statistics.mean == old["statistics.mean"].double()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", STATEFUL)
def test_a_loss_is_not_recomputed_by_other_statistics(name, use_reentrant):
    """Activation checkpointing around it raises; evaluation, which moves nothing, may."""
    objective = STATEFUL[name]()

    def loss(chosen):
        # Something to recompute, whatever the objective keeps.
        pairs = pairs_with_gaps(BATCHES[0])
        return objective(replace(pairs, chosen_logps=chosen.sin().exp())).losses.sum()

    leaf = BATCHES[0].clone().requires_grad_()
    checkpointed = checkpoint(loss, leaf, use_reentrant=use_reentrant)
    with pytest.raises(RuntimeError, match="Checkpoint the model, not the loss"):
        checkpointed.backward()
    assert all(m.batches == 1 for m in objective.modules() if isinstance(m, RunningStatistics))
    objective.eval()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    checkpoint(loss, leaf, use_reentrant=use_reentrant).backward()
    assert torch.equal(leaf.grad, expected)


@pytest.mark.parametrize(
    "state",
    [None, {}, {"seed": 1}, {"seed": "1", "draws": 0}, {"seed": 0, "draws": True}, [0, 0]],
    ids=str,
)
def test_a_state_of_draws_that_is_none(state):
    objective = BetaDPO()
    objective.manual_seed(7)
    with pytest.raises(TypeError, match="BetaDPO's state must have|must be an int, got"):
        objective.load_state_dict({**objective.state_dict(), "_extra_state": state})
    assert (objective.seed, objective.draws) == (7, 0)


@pytest.mark.parametrize("seed", ["x", 1.7, None, True])
def test_a_seed_that_is_none(seed):
    with pytest.raises(TypeError, match="seed must be an int, got"):
        BetaDPO().manual_seed(seed)
