"""A tokenizer as of a chat model: ChatML's template, and a token for each word with its space."""

from __future__ import annotations

import json
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROLES = "system\nuser\nassistant\n"


def tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer that knows the words of some texts."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = {word for text in (*texts, ROLES) for word, _ in split.pre_tokenize_str(text)}
    vocabulary = {word: at for at, word in enumerate(["<unk>", *sorted(words)])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = split
    backend.decoder = decoders.ByteLevel()
    built = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    built.chat_template = TEMPLATE
    return built


def texts_of(lines: str) -> list[str]:
    """The texts of JSONL."""

    def inside(value: object) -> list[str]:
        if isinstance(value, dict):
            return [text for item in value.values() for text in inside(item)]
        if isinstance(value, list):
            return [text for item in value for text in inside(item)]
        return [value] if isinstance(value, str) else []

    return [text for line in lines.splitlines() for text in inside(json.loads(line))]
