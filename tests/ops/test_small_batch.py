"""A batch of a few tokens: the launches on a device, against those of the textbook loss."""

from __future__ import annotations

from collections import Counter
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import prefkern
from prefkern.objectives import DPO
from prefkern.ops import call

kernels = pytest.importorskip("prefkern_kernels")

# Operators of torch that start nothing on a device: views, and memory without content.
STARTS_NOTHING = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "empty", "empty_like",
    "expand", "new_empty", "select", "slice", "split", "t", "transpose", "unbind", "unsqueeze",
    "squeeze", "view",
}  # fmt: skip


class Started(TorchDispatchMode):
    """Counts the operators that start something."""

    def __init__(self) -> None:
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        out = func(*args, **(kwargs or {}))
        # Nor does a copy of nothing: `once.anchors`.
        is_empty = name == "clone" and not out.numel()
        self.count[name] += name not in STARTS_NOTHING and not is_empty
        return out


class Uninterpreted:
    """The kernels; each launch counts once, and not the interpreter's operators in it."""

    def __getattr__(self, name):
        value = getattr(kernels, name)

        def call(*args, **keywords):
            with _disable_current_modes():
                return value(*args, **keywords)

        return call if callable(value) else value


def textbook(hidden, weight, labels, ref_logps):
    """DPO on logits in memory."""
    logits = hidden @ weight.t()
    logps = logits.float().log_softmax(-1)
    logps = logps.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    chosen, rejected = (logps * (labels != -100)).sum(-1).chunk(2)
    ref_chosen, ref_rejected = ref_logps.chunk(2)
    delta = 0.1 * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return -torch.nn.functional.logsigmoid(delta).mean()


@pytest.mark.parametrize(("trained", "more"), [(False, 2), (True, 9)])
def test_few_launches(trained, more, device):
    """As few as the textbook's, except for its two casts of bf16 logits."""
    hidden = torch.randn(4, 32, 64, device=device, requires_grad=True)
    weight = torch.randn(1000, 64, device=device, requires_grad=trained)
    labels = torch.randint(1000, (4, 32), device=device)
    labels[:, :8] = -100
    ref_logps = torch.randn(4, device=device) - 100
    loss_fn = prefkern.FusedPreferenceLoss(DPO(0.1), backend="triton")
    pair_loss = Uninterpreted().pair_loss
    kernels.launches.clear()
    with (
        mock.patch.object(call, "tile_operations", lambda *_: Uninterpreted()),
        mock.patch.object(kernels, "pair_loss", pair_loss),
        Started() as fused,
    ):
        out = loss_fn(hidden, weight, labels, ref_logps=ref_logps)
        out.loss.backward()
    with Started() as eager:
        loss = textbook(hidden, weight, labels, ref_logps)
        loss.backward()
    torch.testing.assert_close(out.loss, loss)
    # One tile: every kernel once.
    assert set(kernels.launches.values()) == {1}
    assert fused.count["mm"] + fused.count["addmm"] == (3 if trained else 2)
    ours = sum(fused.count.values()) + sum(kernels.launches.values())
    assert ours <= sum(eager.count.values()) + more, (fused.count, eager.count)
