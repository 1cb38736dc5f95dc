"""How far tiles may be from float64, token by token and element by element: derived, not chosen.

To first order in the unit roundoff u (2^-24 where tiles are float32). A sum of n terms in any order is
off by sqrt(n) u of the sum of their sizes, up to a constant (Higham and Mary 2019), here 1/4: with it
the worst of thousands of draws comes to half of a bound.

- A logit: `d = u (sqrt(H) / 4 + 2) (sum_i |h_i W_vi| + |b_v|) |scale| / temperature`, of which a token
  takes the largest over its words. The 2 are the additions and products of the transform.
- A log-prob. `d logp / d z_v = [v = y] - p_v`, whose absolute values sum to 2 (1 - p_y), so that
  logits move it by `2 (1 - p_y) d` and the sum of V exponentials by `(1 - p_y) (sqrt(V) / 4 + 4) u`; what is
  then done to it, by `4 u |logp|`. A label's own column that were subtracted rather than left out,
  or a p rounded before 1 is taken from it, costs u / (1 - p_y) times as much.
- A gradient. `D_i = c sum_v e_v t_v W_vi` with e_y = 1 - p_y and e_v = -p_v: each factor is off by
  `e = 4 d + 2 (sqrt(V) / 4 + 4) u` of itself, a softcap's slope t = 1 - tanh^2 by `2 d / cap + 4 u`
  absolutely, so that the error is within `c (e + ...) sum_v |e_v W_vi|`: the sum of absolute values,
  since words may cancel. For the head's gradient the sum is over tokens.
- What is given in a half dtype is rounded once more.

Float64, the truth, is off by the same with u = 2^-53 but for the (1 - p_y): its own log_softmax
subtracts. That is added, and matters where 1 - p_y is below 1e-8.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from prefkern import reference

# Below this float32 has no digits to keep.
LEAST = 1e-36
TRUTH = 2.0**-50


@dataclass
class TokenBounds:
    """Of M tokens: what their numbers may be off by, and what gradients are made of."""

    logit: Tensor  # (M,) d
    logps: Tensor  # (M,)
    shares: Tensor  # (M, V) |e_v|, the truth
    relative: Tensor  # (M,) what a share is off by, of itself
    scale: float  # c
    floor: float  # what the truth's own shares are off by, absolutely
    unit: float  # u

    def of_states(self, grad: Tensor, weight: Tensor) -> Tensor:  # (M,), (V, R) -> (M, R)
        """Of a gradient of the states that met this weight."""
        size = weight.double().abs()
        error = self.relative.unsqueeze(1) * (self.shares @ size) + self.floor * size.sum(0)
        return self.scale * grad.double().abs().unsqueeze(1) * error + LEAST

    def of_words(self, grad: Tensor, states: Tensor) -> Tensor:  # (M,), (M, R) -> (V, R)
        """Of a gradient of the weight that these states met; of a bias, that met ones."""
        pushed = self.scale * grad.double().abs()
        relative = self.relative + math.sqrt(len(grad)) / 4 * self.unit
        error = self.shares * (pushed * relative).unsqueeze(1) + self.floor * pushed.unsqueeze(1)
        return error.T @ states.double().abs() + LEAST


def token_bounds(
    hidden: Tensor,  # (M, H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (M,), a word for each
    bias: Tensor | None = None,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    lora_hidden: Tensor | None = None,  # (M, R)
    lora_weight: Tensor | None = None,  # (V, R)
    unit: float = 2.0**-24,
) -> TokenBounds:
    """Of the truth about these tokens, which takes logits in memory."""
    hidden, weight = hidden.double(), weight.double()
    V, width = weight.shape
    sizes = hidden.abs() @ weight.abs().T
    extra = {}
    if lora_hidden is not None and lora_weight is not None:
        extra = {"lora_hidden": lora_hidden.double(), "lora_weight": lora_weight.double()}
        sizes = sizes + lora_hidden.double().abs() @ lora_weight.double().abs().T
        width += lora_weight.shape[1]
    if bias is not None:
        bias = bias.double()
        sizes = sizes + bias.abs()
    c = abs(logit_scale) / temperature
    z = reference.logits(
        hidden, weight, bias, logit_scale=logit_scale, softcap=softcap, temperature=temperature,
        **extra,
    )  # fmt: skip
    label_logit = z.gather(1, labels.unsqueeze(1))
    others = z.scatter(1, labels.unsqueeze(1), -math.inf)
    # 1 - p_y without the difference.
    rest = (others - label_logit).exp().sum(1)
    miss = rest / (1 + rest)
    miss = torch.where(rest.isinf(), 1.0, miss)
    logps = torch.where(rest.isinf(), label_logit[:, 0] - z.logsumexp(1), -torch.log1p(rest))
    size = c * sizes.amax(1)
    if softcap is not None:
        # tanh's own rounding is of the cap.
        size = size + softcap / temperature
    logit = unit * (math.sqrt(width) / 4 + 2) * size
    many = math.sqrt(V) / 4 + 4
    # A difference of two logits, before exp, is rounded as well: it is no larger than both.
    bound = miss * (2 * logit + many * unit) + 4 * unit * logps.abs()
    relative = 4 * logit + 2 * many * unit
    if softcap is not None:
        relative = relative + 2 * logit * temperature / softcap + 4 * unit
    shares = z.softmax(1).scatter(1, labels.unsqueeze(1), miss.unsqueeze(1))
    floor = TRUTH * (1 + (size.max().item() if len(size) else 0))
    return TokenBounds(logit, bound + floor, shares, relative, c, floor, unit)
