"""The named sizes of `prefkern bench`.

A shape is N scored tokens in 2B sequences of equal length, a hidden size and a vocabulary size.
Suite "operator" has exactly these tokens. Suite "loss" has rows that are twice as long, as in a
padded batch of pairs: a quarter of each row is prompt and a quarter is padding, both not scored.

`SWEEP` names the shape that suite "operator" also runs with fewer tokens, for the pictures of time
and memory against tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Shape:
    """2B sequences that together have N scored tokens."""

    name: str
    pairs: int  # B
    tokens: int  # N
    hidden_size: int  # H
    vocab_size: int  # V
    softcap: float | None = None
    spread: float = 2.0  # standard deviation of a token's logits

    def __post_init__(self) -> None:
        if self.tokens % (4 * self.pairs):
            raise ValueError(f"{self.name}: {self.tokens} tokens do not fill {self.pairs} pairs")

    @property
    def length(self) -> int:
        """The number of scored tokens of one sequence."""
        return self.tokens // (2 * self.pairs)

    @property
    def nhv(self) -> int:
        return self.tokens * self.hidden_size * self.vocab_size

    def with_tokens(self, tokens: int) -> Shape:
        """The same head with another number of scored tokens."""
        if tokens == self.tokens:
            return self
        return replace(self, name=f"{self.name} N={tokens}", tokens=tokens)


QUICK = [Shape("tiny", 2, 32, 64, 1000)]
CPU = [
    Shape("SmolLM2-135M", 4, 512, 576, 49152),
    Shape("odd vocabulary", 2, 256, 128, 50257, softcap=30.0),
    Shape("spread 2", 2, 2048, 512, 8192),
    Shape("spread 5", 2, 2048, 512, 8192, spread=5.0),
]
GPU = [
    Shape("Llama-3-8B", 4, 16384, 4096, 128256),
    Shape("Qwen3-0.6B", 4, 16384, 1024, 151936),
    Shape("Gemma-3-270M", 4, 16384, 640, 262144),
    Shape("Gemma-2-9B", 2, 8192, 3584, 256000, softcap=30.0),
    Shape("long context", 1, 32768, 4096, 128256),
]
KNOWN = {shape.name: shape for shape in QUICK + CPU + GPU}
SWEEP = {"tiny": [16], "SmolLM2-135M": [64, 128, 256], "Llama-3-8B": [2048, 8192]}


def default_shapes(is_gpu: bool, quick: bool) -> list[Shape]:
    return QUICK if quick else GPU if is_gpu else CPU


def swept(shape: Shape) -> list[Shape]:
    """The shape with fewer tokens, for each count in `SWEEP`; empty for other shapes."""
    return [shape.with_tokens(tokens) for tokens in SWEEP.get(shape.name, [])]
