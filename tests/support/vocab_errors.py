"""What ranks of `support.vocab_ranks` saw, against one process."""

from __future__ import annotations

import torch
from torch import Tensor

from support.logprobs import relative
from support.vocab_ranks import PARTS, Case, Seen, outcome


def joined(parts: list[Seen], name: str) -> Tensor:
    """A gradient as one process has it: of the rows of all ranks, or of states, equal on all."""
    gradients = [part.gradients[name] for part in parts]
    if name in PARTS:
        return torch.cat(gradients)
    assert_bitwise(gradients)
    return gradients[0]


def assert_bitwise(values: list[Tensor]) -> None:
    """Ranks have the same numbers; a NaN is the same as a NaN."""
    for value in values:
        torch.testing.assert_close(value, values[0], rtol=0, atol=0, equal_nan=True)


def assert_exact(parts: list[Seen], case: Case) -> None:
    """Values and gradients are those of one process, to float64's rounding; equal on all ranks."""
    whole = outcome(case)
    for name, value in whole.values.items():
        mine = [part.values[name] for part in parts]
        assert_bitwise(mine)
        torch.testing.assert_close(mine[0], value, rtol=1e-12, atol=1e-12, equal_nan=True)
    assert parts[0].gradients.keys() == whole.gradients.keys()
    for name, gradient in whole.gradients.items():
        mine = joined(parts, name)
        assert torch.equal(mine.isfinite(), gradient.isfinite()), name
        gradient, mine = gradient.nan_to_num(0, 0, 0), mine.nan_to_num(0, 0, 0)
        # A gradient that cancels is not known better than its terms.
        error = (mine - gradient).norm()
        assert error <= 1e-12 * gradient.norm() + 1e-15, (name, error / gradient.norm())


def assert_as_accurate(parts: list[Seen], case: Case) -> None:
    """In a dtype that rounds the errors are those of one process, or a little more or less."""
    one, truth = outcome(case), outcome(case, torch.float64)
    for name, true in truth.values.items():
        mine = [part.values[name] for part in parts]
        assert_bitwise(mine)
        if true.dtype == torch.bool:
            assert torch.equal(mine[0], one.values[name])
        else:
            error, of_one = relative(mine[0], true), relative(one.values[name], true)
            assert error <= 1.5 * of_one + 1e-7, (name, error, of_one)
    for name, true in truth.gradients.items():
        gradient = joined(parts, name)
        assert gradient.dtype == one.gradients[name].dtype
        error, of_one = relative(gradient, true), relative(one.gradients[name], true)
        assert error <= 1.5 * of_one + 1e-7, (name, error, of_one)
