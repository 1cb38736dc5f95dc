"""Conversations and trajectories, a tokenizer of bytes that shows each character, marked templates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<|im_start|>", "<|im_end|>"]
SIZE = 256 + len(SPECIAL)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def tokenizer(template: str = MARKED) -> PreTrainedTokenizerFast:
    """A token for each byte, and ChatML's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(SPECIAL + alphabet)}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    built = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<|im_end|>"
    )
    built.add_special_tokens({"additional_special_tokens": SPECIAL[1:2]})
    built.chat_template = template
    return built


def training_template(name: str) -> str:
    """A model's chat template with generation marks, as TRL has it."""
    trl = pytest.importorskip("trl")
    folder = Path(trl.__file__).parent / "chat_templates"
    return (folder / f"{name}_training.jinja").read_text()


def message(role: str, content: str, **more) -> dict:
    return {"role": role, "content": content, **more}


def pair(number: int = 0) -> dict:
    """A pair whose responses have turns of a user inside."""
    return {
        "prompt": [message("user", f"film {number}?")],
        "chosen": [
            message("assistant", "which"),
            message("user", "new é"),
            message("assistant", "good" * (1 + number % 3)),
        ],
        "rejected": [message("assistant", "bad" * (1 + number % 2))],
    }


def call(film: str) -> dict:
    return {"type": "function", "function": {"name": "rate", "arguments": {"film": film}}}


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "rate",
            "description": "The rating of a film.",
            "parameters": {"type": "object", "properties": {"film": {"type": "string"}}},
        },
    }
]


def trajectory() -> dict:
    """A prompt of several turns and tools; a response that calls one and reads its answer."""
    return {
        "prompt": [
            message("system", "Be brief."),
            message("user", "Is Alien good?"),
            message("assistant", "", tool_calls=[call("Alien")]),
            message("tool", "9 of ten"),
            message("assistant", "Yes, 9."),
            message("user", "And Gigli?"),
        ],
        "chosen": [
            message("assistant", "", tool_calls=[call("Gigli")]),
            message("tool", "2 of ten"),
            message("assistant", "No, 2."),
        ],
        "rejected": [message("assistant", "", tool_calls=[call("Alien")])],
        "tools": TOOLS,
    }


def _spoken(one: dict) -> dict:
    """A message as ShareGPT's rows have it, with LLaMA-Factory's calls of tools."""
    if one.get("tool_calls"):
        calls = [each["function"] for each in one["tool_calls"]]
        return {
            "from": "function_call",
            "value": json.dumps(calls[0] if len(calls) == 1 else calls),
        }
    speakers = {"user": "human", "assistant": "gpt", "tool": "observation", "system": "system"}
    return {"from": speakers[one["role"]], "value": one["content"]}


def spoken_trajectory() -> dict:
    """The trajectory as LLaMA-Factory's rows have it: the inner parts of the tools, as text."""
    row = trajectory()
    sides = {name: [*map(_spoken, row[name])] for name in ("chosen", "rejected")}
    tools = json.dumps([tool["function"] for tool in row["tools"]])
    return {"conversations": [*map(_spoken, row["prompt"])], **sides, "tools": tools}
