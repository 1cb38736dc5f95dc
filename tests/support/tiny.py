"""Tiny models, a tiny tokenizer and random pairs, built in the process: nothing is downloaded.

Models have random weights, hidden size 32 and 97 vocabulary entries. The tokenizer splits at spaces
and knows the texts of `pairs`; its chat template has the quirks that the tests of data need.
"""

from __future__ import annotations

import random

import datasets
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

WORDS = ["good", "bad", "fine", "poor", "film", "plot", "actor", "is", "was", "the", "a", "very"]
SPECIAL = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>"]
VOCAB_SIZE = 97
CHAT_TEMPLATE = (
    # Like Llama's template, this one announces tools even for an empty list.
    "{% if tools is not none %}<unk> {% endif %}"
    "{% for tool in tools or [] %}<unk> {{ tool.keys() | join(' ') }} {{ tool['name'] }} {% endfor %}"
    "{% if greeting %}{{ greeting }} {% endif %}"
    "{% for m in messages %}"
    "{% if m['role'] == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
    "<{{ m['role'] }}> {{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}


def model(family: str = "Llama", seed: int = 0, **options):
    """A random causal LM of a family, hidden size 32, whose logits have a useful spread."""
    sizes = dict(SIZES)
    if family == "GPT2":
        sizes = {"vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": 2, "n_head": 4}
    if family in ("GPTNeoX", "Falcon"):
        sizes.pop("num_key_value_heads"), sizes.pop("head_dim")
    config = getattr(transformers, f"{family}Config")(**{**sizes, **options})
    config.initializer_range = 0.2
    torch.manual_seed(seed)
    built = AutoModelForCausalLM.from_config(config)
    return built.eval()


def tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer that splits at spaces, with one token for each word."""
    vocabulary = {token: i for i, token in enumerate(SPECIAL + WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    built = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    if chat:
        built.chat_template = CHAT_TEMPLATE
    return built


def pairs(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Pairs of random sentences of different lengths."""
    draw = random.Random(seed)

    def sentence(low: int, high: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(low, high)))

    return [
        {
            "prompt": sentence(2, 5),
            "chosen": f" {sentence(1, 7)} good",
            "rejected": f" {sentence(1, 7)} bad",
        }
        for _ in range(count)
    ]


def dataset(count: int, seed: int = 0) -> datasets.Dataset:
    return datasets.Dataset.from_list(pairs(count, seed))


def triples(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Pairs with a third, gold response of another length, under TRL's name."""
    others = pairs(count, seed + 1000)
    return [
        {**pair, "reference": f"{other['chosen']} the{other['rejected']}"}
        for pair, other in zip(pairs(count, seed), others, strict=True)
    ]


def triple_dataset(count: int, seed: int = 0) -> datasets.Dataset:
    return datasets.Dataset.from_list(triples(count, seed))
