"""Hugging Face models: what their heads are, and their forward with a loss in the head's place.

In reading order: `heads` (a head's tensors, an adapter's included), `transform` (what a model does to
its logits), `head_forward` (the model's forward without its head), `scoring` (`token_logprobs`,
`preference_outputs`), `packing`; then what a model is before it trains: `loading`, `vocabulary`,
`positions`, `adapters`, `liger`, `routers`.
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
