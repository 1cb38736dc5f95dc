"""A transformers model whose rows are cut over two ranks, against one process with whole rows.

torch's context_parallel cuts the rows, in its load-balanced order. Its ring attention needs a GPU,
as DeepSpeed's Ulysses does. In its place is an attention of ours: each rank gathers the keys,
values and positions of all ranks. The model and its head are transformers' own.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from transformers import AttentionInterface

import prefkern
from prefkern import objectives
from prefkern.models import head_transform
from prefkern.models.routers import RouterLoss
from support import tiny
from support.ranks import group_of_one, run_on_two_ranks

T = 16
REF_LOGPS = torch.linspace(-30, -20, 4, dtype=torch.float64)
NAMES = ("adadpo", "simpo")


def batch() -> dict[str, Tensor]:
    torch.manual_seed(3)
    ids = torch.randint(5, tiny.VOCAB_SIZE, (4, T))
    labels = ids.clone()
    labels[:, :4] = -100
    # A short row: the rest is padding, which no token before it sees.
    ids[1, 9:], labels[1, 9:] = 0, -100
    return {"input_ids": ids, "labels": labels}


def seen_by(model: Any, given: dict[str, Tensor], group: Any) -> dict[str, Any]:
    found = {}
    for name in NAMES:
        model.zero_grad()
        loss_fn = prefkern.FusedPreferenceLoss(objectives.build(name), sequence_group=group)
        options = {} if name == "simpo" else {"ref_logps": REF_LOGPS}
        out = prefkern.preference_outputs(model, given, loss_fn, **options)
        out.loss.backward()
        found[name] = {
            "losses": out.losses.detach(),
            "gradients": {key: p.grad.clone() for key, p in model.named_parameters()},
        }
    return found


class _Gathered(torch.autograd.Function):
    """The parts of all ranks, one after the other."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:  # (B, heads, t, D) -> (B, heads, T, D)
        ctx.size = own.shape[2]
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own.contiguous())
        return torch.cat(parts, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        whole = grads[0].contiguous()
        dist.all_reduce(whole)
        return whole.split(ctx.size, 2)[dist.get_rank()]


POSITIONS = torch.arange(T)


def gathering_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    keys, values = _Gathered.apply(key), _Gathered.apply(value)
    repeats = query.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(repeats, 1) for x in (keys, values))
    own = POSITIONS.view(1, 1, -1, 1)
    is_seen = _Gathered.apply(own).view(1, 1, 1, -1) <= own
    # Products and softmax of our own: context_parallel replaces torch's attention.
    scores = (query @ keys.transpose(-1, -2) * scaling).masked_fill(~is_seen, -torch.inf)
    out = scores.softmax(-1) @ values
    return out.transpose(1, 2), None


def main(folder: Path) -> None:
    global POSITIONS
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    AttentionInterface.register("gathering", gathering_attention)
    model = tiny.model().double()
    # It looks at the model's head once, with a few tokens, which have no parts.
    head_transform(model)
    model.set_attn_implementation("gathering")
    whole = batch()
    given = {
        "input_ids": whole["input_ids"],
        "shift_labels": torch.nn.functional.pad(whole["labels"][:, 1:], (0, 1), value=-100),
        "position_ids": torch.arange(T).repeat(4, 1),
    }
    mesh = init_device_mesh("cpu", (2,))
    buffers = [*given.values()]
    with context_parallel(
        mesh, buffers=buffers, buffer_seq_dims=[1, 1, 1], no_restore_buffers={*buffers}
    ):
        POSITIONS = given["position_ids"][0]
        # Rank 0 has the first and the last quarter, rank 1 what is between.
        assert POSITIONS[[0, -1]].tolist() == ([0, 15], [4, 11])[dist.get_rank()]
        found = seen_by(model, given, mesh.get_group())
    torch.save(found, folder / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


def test_a_model_over_two_ranks(tmp_path):
    run_on_two_ranks(__file__, str(tmp_path))
    found = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    true = seen_by(tiny.model().double(), batch(), None)
    for name in NAMES:
        for each in found:
            torch.testing.assert_close(
                each[name]["losses"], true[name]["losses"], rtol=1e-9, atol=1e-9
            )
        for key, gradient in true[name]["gradients"].items():
            mine = sum(each[name]["gradients"][key] for each in found)
            assert gradient.norm() > 0
            assert (mine - gradient).norm() <= 1e-9 * gradient.norm(), (name, key)


@pytest.fixture
def loss_fn() -> Any:
    with group_of_one() as group:
        yield prefkern.FusedPreferenceLoss(objectives.DPO(), sequence_group=group)


def test_labels_that_are_not_shifted_are_refused(loss_fn):
    with pytest.raises(ValueError, match="batch must have shift_labels, got input_ids, labels"):
        prefkern.preference_outputs(tiny.model(), batch(), loss_fn, ref_logps=REF_LOGPS)


def test_packed_rows_and_routers_are_refused(loss_fn):
    given = {**batch(), "shift_labels": batch()["labels"]}
    model = tiny.model()
    packed = {**given, "cu_seqlens": torch.tensor([0, 8, 16])}
    with pytest.raises(ValueError, match="the bounds of sequences whose tokens other ranks hold"):
        prefkern.preference_outputs(model, packed, loss_fn, ref_logps=REF_LOGPS)
    with pytest.raises(
        ValueError, match=r"router_aux_loss_coef is 0\.1, and with a sequence_group"
    ):
        prefkern.preference_outputs(
            model, given, loss_fn, router_loss=replace(RouterLoss(), coefficient=0.1)
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
