"""fp16 with a gradient scaler: gradients as in float32, and a step that overflows is skipped."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import prefkern
from prefkern.objectives import DPO, Adaptive
from support.machine import BACKENDS

B, T, H, V = 2, 6, 16, 130


class Model(nn.Module):
    """A body and a head in float32, and a loss in place of logits."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.body = nn.Linear(H, H)
        self.head = nn.Linear(H, V, bias=False)
        self.loss_fn = prefkern.FusedPreferenceLoss(
            DPO(0.5, adaptive=Adaptive()), backend=backend, workspace_mb=0.02
        )

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        hidden = 4 * torch.tanh(self.body(x))
        ref_logps = torch.full((2 * B,), -20.0, device=x.device)
        return self.loss_fn(hidden, self.head.weight, labels, ref_logps=ref_logps).loss


def gradients_of(model: Model) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp16_with_a_scaler(backend: str, device: str) -> None:
    """Training goes on as in float32 after the steps that a scale too large makes it skip."""
    torch.manual_seed(0)
    model = Model(backend).to(device)
    x = torch.randn(2 * B, T, H, device=device)
    labels = torch.randint(V, (2 * B, T), device=device)
    labels[:, :2] = -100
    model(x, labels).backward()
    expected = gradients_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    # Its gradients are beyond fp16's range, by far; a quarter at each step that is skipped.
    scaler = torch.amp.GradScaler(device, init_scale=2.0**24, backoff_factor=0.25)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    skipped = 0
    for _ in range(12):
        optimizer.zero_grad()
        with torch.autocast(device, dtype=torch.float16):
            loss = model(x, labels)
        assert loss.dtype == torch.float32 and loss.isfinite()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        found = gradients_of(model)
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() >= scale:
            break
        skipped += 1
        assert not all(gradient.isfinite().all() for gradient in found)
        for parameter, value in zip(model.parameters(), before, strict=True):
            assert torch.equal(parameter, value)
    assert 0 < skipped < 12
    for mine, true, parameter, value in zip(
        found, expected, model.parameters(), before, strict=True
    ):
        assert (mine - true).norm() < 2e-2 * true.norm()
        torch.testing.assert_close(parameter.detach(), value - 0.1 * mine)
    plan = prefkern.last_plan()
    assert plan is not None and plan.backend == backend
