"""Objectives that look at a whole batch: BCO's shift and AOT's sorting, against TRL and on ranks."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prefkern import Pairs
from prefkern.objectives import (
    AOT,
    BCO,
    DPO,
    WPO,
    Adaptive,
    AOTUnpaired,
    Mixture,
    Objective,
    SimPO,
    WithNLL,
)
from prefkern.objectives.running import counted_once
from support.ranks import run_on_two_ranks
from support.trl_loss import trl_batch

F = torch.nn.functional


def drawn(size: int, seed: int = 0) -> Pairs:
    """Pairs of responses of up to 40 tokens, whose sums differ as those of different prompts do."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 40, (2, size), generator=generator)
    reference = -1.5 * lengths * torch.rand(2, size, generator=generator, dtype=torch.float64)
    drift = 6 * torch.randn(2, size, generator=generator, dtype=torch.float64)
    policy = [x.requires_grad_() for x in reference + drift]
    return Pairs(*policy, *reference, *lengths)


def slopes(losses: torch.Tensor, pairs: Pairs) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(losses.sum(), [pairs.chosen_logps, pairs.rejected_logps])


def part_of(pairs: Pairs, rows: slice) -> Pairs:
    """These rows, as leaves of their own."""
    values = {name: x[rows] for name, x in vars(pairs).items() if x is not None}
    for name in ("chosen_logps", "rejected_logps"):
        values[name] = values[name].detach().requires_grad_()
    return Pairs(**values)


# Against TRL


def trl(loss_type: str, pairs: Pairs, beta: float, label_smoothing: float) -> torch.Tensor:
    """TRL's mean loss of a batch, from its trainer: each response is one token."""
    pytest.importorskip("trl")
    tokens = torch.cat([pairs.chosen_logps, pairs.rejected_logps])[:, None]
    reference = torch.cat([pairs.ref_chosen_logps, pairs.ref_rejected_logps])
    # The losses are of log-ratios; and no token may have a probability above 1.
    tokens, reference = tokens - 64, reference - 64
    options = {"beta": beta, "label_smoothing": label_smoothing}
    return trl_batch(tokens, torch.ones_like(tokens).bool(), reference, {loss_type: 1.0}, **options)


TRLS = {
    "aot": AOT,
    "aot_unpaired": AOTUnpaired,
    "bco_pair": lambda beta, _: BCO(beta, reward_shift=False),
}


@pytest.mark.parametrize("size", [1, 2, 9, 64])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("name", TRLS)
def test_a_batch_is_trls(name, smoothing, size):
    for seed in range(3):
        pairs = drawn(size, seed)
        losses = TRLS[name](0.3, smoothing)(pairs).losses
        expected = trl(name, pairs, 0.3, smoothing)
        torch.testing.assert_close(losses.mean(), expected, rtol=1e-13, atol=0)
        for mine, theirs in zip(slopes(losses / size, pairs), slopes(expected, pairs), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("adaptive", [None, Adaptive(), Adaptive("policy", 0.1, None, 1.5)])
@pytest.mark.parametrize("momentum", [1.0, 0.6])
def test_bco_shifts_by_the_running_mean(momentum, adaptive):
    """As TRL did before 1.16: the batch's mean reward is merged before the batch is scored."""
    objective = BCO(0.3, momentum=momentum, adaptive=adaptive)
    total = weights = 0.0
    for step, size in enumerate((5, 1, 8)):
        pairs = drawn(size, step)
        betas = torch.stack(DPO(0.3, adaptive=adaptive)(pairs)[1:3])
        rewards = betas * torch.stack(
            [
                (pairs.chosen_logps - pairs.ref_chosen_logps).detach(),
                (pairs.rejected_logps - pairs.ref_rejected_logps).detach(),
            ]
        )
        kept = momentum if momentum < 1 else 1.0
        new = 1 - momentum if momentum < 1 else 1.0
        total, weights = kept * total + new * rewards.mean(), kept * weights + new
        delta = total / weights
        leaf = rewards.clone().requires_grad_()
        expected = F.softplus(delta - leaf[0]) + F.softplus(leaf[1] - delta)
        result = objective(pairs)
        torch.testing.assert_close(result.losses, expected, rtol=1e-12, atol=0)
        (slope,) = torch.autograd.grad(expected.sum(), leaf)
        for mine, true in zip(slopes(result.losses, pairs), betas * slope, strict=True):
            torch.testing.assert_close(mine, true, rtol=1e-12, atol=0)
        assert torch.equal(torch.stack(result[1:3]), betas)
        torch.testing.assert_close(result.chosen_rewards, rewards[0])
        assert (objective.metrics(pairs, result)["bco/delta"] - delta).abs().max() < 1e-12
        assert objective.metrics(pairs, result)["bco/delta"].shape == (size,)


def test_bco_without_a_shift_keeps_no_statistics():
    objective = BCO(reward_shift=False)
    pairs = drawn(4)
    assert objective.metrics(pairs, objective(pairs)) == {}
    assert objective.state_dict() == {}


def test_bcos_shift_follows_a_beta_that_is_changed_later():
    changed, built = BCO(0.1), BCO(0.3)
    for objective in (changed, built):
        objective(drawn(6))
    changed.beta = 0.3
    pairs = drawn(5, 1)
    assert torch.equal(changed(pairs).losses, built(pairs).losses)


# AOT


@pytest.mark.parametrize("adaptive", [None, Adaptive(), Adaptive("policy", 0.02, None, 1.5)])
@pytest.mark.parametrize("cls", [AOT, AOTUnpaired])
def test_of_one_pair_it_is_dpo(cls, adaptive):
    for seed in range(4):
        pairs = drawn(1, seed)
        mine, dpo = (each(0.2, 0.1, adaptive=adaptive)(pairs) for each in (cls, DPO))
        for value, expected in zip(mine, dpo, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
        gradients = (slopes(each.losses, pairs) for each in (mine, dpo))
        for slope, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(slope, expected, rtol=1e-11, atol=0)


@pytest.mark.parametrize("adaptive", [None, Adaptive()])
@pytest.mark.parametrize("cls", [AOT, AOTUnpaired])
def test_the_order_of_pairs_does_not_matter(cls, adaptive):
    pairs = drawn(12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    shuffled = part_of(pairs, order)
    results = [cls(adaptive=adaptive)(each) for each in (pairs, shuffled)]
    for value, other in zip(*results, strict=True):
        torch.testing.assert_close(value[order], other, rtol=1e-13, atol=0)
    gradients = [slopes(r.losses, p) for r, p in zip(results, (pairs, shuffled), strict=True)]
    for slope, other in zip(*gradients, strict=True):
        torch.testing.assert_close(slope[order], other, rtol=1e-12, atol=0)


@pytest.mark.parametrize("adaptive", [None, Adaptive()])
@pytest.mark.parametrize("cls", [AOT, AOTUnpaired])
def test_float32_pairs_are_compared_in_float64(cls, adaptive):
    """Sums of thousands of nats: float32 differences would be wrong by 1e-3."""
    wide = drawn(9)
    far = torch.linspace(-4e4, -2e4, 9).double()
    values = {
        name: x.detach() + far if name.endswith("logps") else x
        for name, x in vars(wide).items()
        if x is not None
    }
    narrow = {n: x.float() if x.is_floating_point() else x for n, x in values.items()}
    exact = {n: x.double() if x.is_floating_point() else x for n, x in narrow.items()}
    mine, true = (cls(adaptive=adaptive)(Pairs(**each)) for each in (narrow, exact))
    assert mine.losses.dtype == torch.float32
    torch.testing.assert_close(mine.losses.double(), true.losses, rtol=3e-7, atol=0)


@pytest.mark.parametrize("cls", [AOT, AOTUnpaired])
def test_gradcheck(cls):
    pairs = drawn(5)

    def losses(chosen, rejected):
        moved = replace(pairs, chosen_logps=chosen, rejected_logps=rejected)
        return cls(0.2, 0.1)(moved).losses

    inputs = (pairs.chosen_logps, pairs.rejected_logps)
    assert torch.autograd.gradcheck(losses, inputs)
    assert torch.autograd.gradgradcheck(losses, inputs)


@pytest.mark.parametrize("cls", [AOT, AOTUnpaired])
def test_equal_policy_and_reference_have_the_loss_of_none(cls):
    """AOT's margins are then the reference's, whatever they are; AOTUnpaired's ratios are 0."""
    pairs = drawn(7)
    same = replace(
        pairs,
        ref_chosen_logps=pairs.chosen_logps.detach(),
        ref_rejected_logps=pairs.rejected_logps.detach(),
    )
    losses = cls(0.3)(same).losses
    torch.testing.assert_close(losses, torch.full_like(losses, 2).log(), rtol=1e-15, atol=0)


def test_in_a_mixture():
    pairs = drawn(6)
    mixed = Mixture([AOT(0.3), BCO(0.3)], [0.5, 2.0])
    expected = 0.5 * AOT(0.3)(pairs).losses + 2.0 * BCO(0.3)(pairs).losses
    torch.testing.assert_close(mixed(pairs).losses, expected)
    with pytest.raises(ValueError, match="use_weighting .WPO. weighs pairs"):
        WPO(Mixture([DPO(), AOT()]))
    # If a number is missing, no statistics have moved.
    late = Mixture([BCO(0.3), SimPO()])
    with pytest.raises(ValueError, match="SimPO needs chosen_lengths"):
        late(replace(pairs, chosen_lengths=None))
    assert late.parts[0].statistics.batches == 0


# Two ranks

SIZES = [(2, 5), (4, 1), (3, 3), (1, 6)]


def makes() -> dict[str, Objective]:
    return {
        f"{cls.__name__} {adaptive} {wrapped}": WithNLL(made) if wrapped else made
        for cls in (AOT, AOTUnpaired)
        for adaptive in (None, Adaptive(), Adaptive("ratio", 0.1, None, 2.0))
        for wrapped in (False, True)
        for made in [cls(0.3, 0.1, adaptive)]
    } | {"BCO": BCO(0.3)}


def run(part) -> dict[str, torch.Tensor]:
    """Results and gradients of each objective; `part(pairs, sizes)` is this process's part."""
    found = {}
    for name, objective in makes().items():
        for step, sizes in enumerate(SIZES):
            pairs = part(drawn(sum(sizes), step), sizes)
            result = objective(pairs)
            for field, value in result._asdict().items():
                found[f"{name}, {step}: {field}"] = value.detach()
            for side, slope in zip("wl", slopes(result.losses, pairs), strict=True):
                found[f"{name}, {step}: slope {side}"] = slope
    return found


def shared() -> dict[str, torch.Tensor]:
    """On ranks that hold parts of the same sequences, and so the same pairs."""
    group = torch.distributed.group.WORLD if torch.distributed.is_initialized() else None
    with counted_once(group, None):
        return run(lambda pairs, sizes: pairs)


def of_rank(rank: int):
    def part(pairs: Pairs, sizes: tuple[int, int]) -> Pairs:
        return part_of(pairs, slice(sizes[0]) if rank == 0 else slice(sizes[0], None))

    return part


def test_two_ranks_are_one_process_on_the_joined_batch(tmp_path):
    run_on_two_ranks(__file__, str(tmp_path))
    expected = run(lambda pairs, sizes: pairs)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert ranks[0].keys() == ranks[1].keys() == expected.keys()
    for name, value in expected.items():
        joined = torch.cat([rank[name] for rank in ranks])
        torch.testing.assert_close(joined, value, rtol=1e-12, atol=1e-14, msg=name)
    # Alone, the ranks' batches would have given other losses.
    alone = torch.cat([AOT(0.3, 0.1)(of_rank(r)(drawn(7), SIZES[0])).losses for r in range(2)])
    assert not torch.allclose(alone, expected["AOT None False, 0: losses"])
    for rank in range(2):
        found = torch.load(tmp_path / f"shared{rank}.pt")
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-14, msg=name)


@pytest.mark.parametrize("cls", [AOT, AOTUnpaired])
def test_evaluation_asks_no_other_rank(cls, monkeypatch):
    """Ranks may end at different times. So a batch is that of the rank, whatever it is."""

    def everywhere(values):
        raise AssertionError("a collective")

    monkeypatch.setattr("prefkern.objectives.aot.gather", everywhere)
    objective = cls()
    with pytest.raises(AssertionError, match="a collective"):
        objective(drawn(6))
    losses = objective.eval()(drawn(6)).losses
    monkeypatch.undo()
    assert torch.equal(losses, objective.train()(drawn(6)).losses)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    torch.save(run(of_rank(rank)), Path(sys.argv[1]) / f"rank{rank}.pt")
    torch.save(shared(), Path(sys.argv[1]) / f"shared{rank}.pt")
    torch.distributed.destroy_process_group()
