"""The named models of suite "step": real configs, and the batch that each is measured with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Model:
    """A config of transformers, and the size of the batch that it is measured with."""

    name: str
    kind: str  # the model type for AutoConfig.for_model
    config: dict[str, Any]
    pairs: int
    length: int

    @property
    def tokens(self) -> int:
        """The number of scored tokens: the second half of each of the 2B rows."""
        return self.pairs * self.length


_SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
_QWEN3_06B = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
_LLAMA32_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
_LLAMA3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
QUICK = [
    Model(
        "tiny model",
        "llama",
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "vocab_size": 500,
            "tie_word_embeddings": True,
        },
        2,
        8,
    )
]
CPU = [Model("SmolLM2, 2 layers", "llama", _SMOLLM2 | {"num_hidden_layers": 2}, 2, 128)]
GPU = [
    Model("Qwen3-0.6B model", "qwen3", _QWEN3_06B, 8, 1024),
    Model("Llama-3.2-1B model", "llama", _LLAMA32_1B, 8, 1024),
]
# The widths of Llama-3-8B, and so few layers that a step of full training fits in seconds.
STACK = Model("Llama-3-8B, 2 layers", "llama", _LLAMA3_8B | {"num_hidden_layers": 2}, 8, 1024)
KNOWN = {model.name: model for model in [*QUICK, *CPU, *GPU, STACK]}


def default_models(is_gpu: bool, quick: bool) -> list[Model]:
    return QUICK if quick else GPU if is_gpu else CPU
