"""Sums of sequences are added in float64 and rounded once, in every way to a loss."""

from __future__ import annotations

import math

import pytest
import torch

from prefkern.loss.pairwise import Scores, pair_loss
from prefkern.objectives import DPO
from prefkern.ops import compiled, sequences

LENGTHS = (60000, 1, 0, 50000)


@pytest.fixture
def batch(device) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
    """Log-probs of two pairs, where their sequences begin, and their sums to the last digit."""
    parts = [-torch.rand(length) for length in LENGTHS]
    for part in parts:
        # Added to what comes first, in float32 the others would be lost one by one.
        part[1024:] *= 1e-3
        part[:1024] *= 1e4
    logps = torch.cat(parts)
    exact = [torch.tensor(math.fsum(part.tolist())).item() for part in parts]
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0)
    return logps.to(device), offsets.to(device), exact


def test_sequence_sums_are_rounded_once(batch):
    logps, offsets, exact = batch
    assert sequences.sequence_sums(logps, offsets).tolist() == exact


def test_compiled_sums_are_float64s(batch):
    """Under torch.compile, sums are as exact as float64's."""
    logps, offsets, exact = batch
    assert compiled.sequence_sums(logps, offsets).tolist() == pytest.approx(exact, rel=1e-7)


def test_a_pair_s_sums_are_rounded_once(batch, backend):
    logps, offsets, exact = batch
    scores = Scores(logps, offsets, ref_logps=torch.zeros(4, device=logps.device))
    pairs = pair_loss(DPO(0.1), scores, backend).pairs
    assert [*pairs.chosen_logps.tolist(), *pairs.rejected_logps.tolist()] == exact
