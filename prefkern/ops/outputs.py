"""The results of the operator: plain named values, shared by the fused path and the oracle.

Results are float32, or float64 for float64 inputs.

Dimensions, here and everywhere: N scored tokens, B pairs, S = 2B sequences, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TokenStats(NamedTuple):
    """Per-token statistics of the next-token distribution, each of the labels' shape.

    `logps` is differentiable; the other three are statistics for logging and carry no gradient.
    Tokens that are not scored hold 0 (False).
    """

    logps: Tensor  # float32, log p(label), nats
    entropy: Tensor  # float32, -sum_v p_v log p_v, nats
    mean_logit: Tensor  # float32, mean of the transformed logits over the vocabulary
    is_top1: Tensor  # bool, the label is the argmax (the first one, if logits tie)


class TokenKL(NamedTuple):
    """Per-token log-probs and divergence of a policy from a reference, each of the labels' shape.

    `logps` and `kl` are differentiable in the policy's tensors; `ref_logps` carries no gradient.
    Tokens that are not scored hold 0.
    """

    logps: Tensor  # float32, log p(label) of the policy, nats
    ref_logps: Tensor  # float32, log r(label) of the reference, nats
    kl: Tensor  # float32, sum_v r_v (log r_v - log p_v) over the vocabulary, nats, >= 0
