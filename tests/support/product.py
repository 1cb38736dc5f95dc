"""The product with the fold in its epilogue: logits transforms, the truth in float64, and its bounds."""

from __future__ import annotations

import math

import torch

from prefkern.ops import fold_state

PLAIN = {"logit_scale": 1.0, "softcap": None, "temperature": 1.0}
TRANSFORMS = {
    "plain": PLAIN,
    "scaled": {"logit_scale": 0.25, "softcap": None, "temperature": 0.7},
    "negative": {"logit_scale": -0.5, "softcap": None, "temperature": 1.0},
    # What is left out of a sum must not come back as the cap's own lower end.
    "low softcap": {"logit_scale": 1.0, "softcap": 0.5, "temperature": 1.0},
    "softcap": {"logit_scale": 1.7, "softcap": 8.0, "temperature": 0.6},
}
# Half-precision products are exact in float32, and so is every logit but for its sum's rounding.
ACCURACY = {torch.bfloat16: 2e-6, torch.float16: 2e-6, torch.float32: 4e-6}


def truth(hidden, weight, bias, labels, logit_scale, softcap, temperature):
    """In float64: log-probs, 1 - p_label, label's logit and slope, logits."""
    z = hidden.double() @ weight.double().t()
    if bias is not None:
        z = z + bias.double()
    z = z * logit_scale
    slope = torch.ones_like(z)
    if softcap is not None:
        t = torch.tanh(z / softcap)
        z, slope = softcap * t, 1 - t * t
    z = z / temperature
    column = labels.unsqueeze(1)
    others = z.scatter(1, column, -math.inf).logsumexp(1)
    label = z.gather(1, column)[:, 0]
    # log sigmoid of the difference: no cancellation on either side.
    logps = -torch.nn.functional.softplus(others - label)
    miss = torch.sigmoid(others - label)
    return logps, miss, label, slope.gather(1, column)[:, 0], z


def assert_right(state, expected, tolerance, softcap) -> None:
    logps, miss, label, slope, z = expected
    # The error of a float32 logit of this size.
    scale = max(z.abs().max().item(), 1.0)
    folded = fold_state.finish(state)
    torch.testing.assert_close(folded.logps.double(), logps, rtol=4e-6, atol=tolerance * scale)
    torch.testing.assert_close(folded.miss.double(), miss, rtol=3 * tolerance * scale, atol=1e-37)
    torch.testing.assert_close(state.label_logit.double(), label, rtol=0, atol=tolerance * scale)
    if softcap is None:
        assert (state.label_slope == 1).all()
    else:
        torch.testing.assert_close(state.label_slope.double(), slope, rtol=1e-4, atol=1e-6)
