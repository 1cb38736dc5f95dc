"""Hugging Face models: reads their output heads, and runs their forward with a loss as the head.

In reading order: `heads` (the tensors of a head and of its adapter), `transform` (what a model does
to its logits), `head_forward` (a model's forward without its head), `scoring` (`token_logprobs`,
`preference_outputs`) and `packing`. The other files prepare and check a model before training:
`loading`, `vocabulary`, `positions`, `adapters`, `own_reference`, `liger`, `routers`.
"""

from prefkern.models.head_forward import forward_with_head, head_forward
from prefkern.models.heads import HeadInputs, find_head, unwrap
from prefkern.models.scoring import (
    IGNORE_INDEX,
    align_labels,
    preference_outputs,
    token_logprobs,
)
from prefkern.models.transform import HeadTransform, candidate_transforms, head_transform

__all__ = [
    "IGNORE_INDEX",
    "HeadInputs",
    "HeadTransform",
    "align_labels",
    "candidate_transforms",
    "find_head",
    "forward_with_head",
    "head_forward",
    "head_transform",
    "preference_outputs",
    "token_logprobs",
    "unwrap",
]
