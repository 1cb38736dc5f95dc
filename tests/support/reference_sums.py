"""Runs that compute the reference's sums beforehand, the files they write, and the sums from logits."""

from __future__ import annotations

from pathlib import Path

import torch

from support import tiny
from support.training import trainer

PAIRS = 10


class Forwards:
    """Counts the rows that a model scores, its probe of one row aside; may die at one of them."""

    def __init__(self, model, dies_after: int | None = None):
        self.rows = 0
        self.dies_after = dies_after
        # Not the model: older PEFT calls the forward of the one inside itself, past its hooks.
        model.get_input_embeddings().register_forward_pre_hook(self._count)

    def _count(self, embeddings, args):
        count = len(args[0])
        if count == 1:
            return
        if self.dies_after is not None and self.rows + count > self.dies_after:
            raise KeyboardInterrupt
        self.rows += count


def precomputing(path: Path, reference=None, dies_after: int | None = None, **options):
    """A trainer that has computed, or found, the sums of its dataset, and the rows it scored."""
    reference = reference or tiny.model(seed=1)
    forwards = Forwards(reference, dies_after)
    options = {"per_device_eval_batch_size": 2, "count": PAIRS, **options}
    run = trainer(path, ref_model=reference, precompute_ref_log_probs=True, **options)
    return run, forwards.rows


def sums(dataset) -> torch.Tensor:
    return torch.tensor([dataset[name][:] for name in ("ref_chosen_logps", "ref_rejected_logps")])


def shards(path: Path) -> dict[str, Path]:
    return {file.stem: file for file in (path / "reference-sums").glob("*/*.safetensors")}


@torch.no_grad()
def sums_from_logits(model, rows) -> torch.Tensor:  # (2, B)
    """The sums from the model's own logits in float64, one response at a time."""

    def total(row, name):
        ids = torch.tensor([[*row["prompt_ids"], *row[name]]])
        logps = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        return logps.gather(-1, ids[0, 1:, None])[len(row["prompt_ids"]) - 1 :].sum()

    return torch.tensor(
        [[total(row, name) for row in rows] for name in ("chosen_ids", "rejected_ids")]
    )
