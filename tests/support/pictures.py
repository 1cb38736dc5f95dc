"""Models that see, each built tiny with its processor, and drawn pictures with captions.

The pictures are a circle, a square or a triangle in one of four colours. Their sizes differ, so that
families with patches by size have different numbers of tokens. Nothing is downloaded: processors
are made of Pillow's image processors and the tokenizer of `tiny`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import datasets
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from support import tiny
from support.family_table import drawn
from support.versions import PIL_IDEFICS

BETA = 0.1
COLOURS = ["red", "green", "blue", "yellow"]
SHAPES = ["circle", "square", "triangle"]
_WORDS = ["what", "is", "this", "which", "shape", "a", "and", "one", "it", "look", "at"]
_MARKS = {
    "Qwen": ["<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>"],
    "Llava": ["<image>", "<video>"],
    "Gemma": ["<start_of_image>", "<image_soft_token>", "<end_of_image>"],
    "Idefics": [
        *("<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>"),
        *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)),
    ],
}
_TEMPLATE = (
    "{%% for m in messages %%}<{{ m['role'] }}> "
    "{%% for block in m['content'] %%}"
    "{%% if block['type'] == 'image' %%}%s {%% else %%}{{ block['text'] }} {%% endif %%}"
    "{%% endfor %%}<eos> {%% endfor %%}"
    "{%% if add_generation_prompt %%}<assistant> {%% endif %%}"
)
_TEXT = {**tiny.SIZES, "max_position_embeddings": 256}
_CLIP = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
_QWEN = {
    "depth": 2,
    "hidden_size": 16,
    "out_hidden_size": 32,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer that splits at spaces and line breaks; marks of pictures are special."""
    marks = _MARKS[kind]
    words = [*tiny.SPECIAL, *_WORDS, *COLOURS, *SHAPES]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    built = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    built.add_special_tokens({"additional_special_tokens": [*marks, *tiny.SPECIAL[3:]]})
    return built


@dataclass(frozen=True)
class Family:
    """A family that sees: how its tiny model and its processor are made."""

    name: str  # of its config class, without "Config"
    kind: str  # of its marks
    placeholder: str  # of a picture, in a text prompt
    rendered: str  # of a picture, in the chat template
    config: Callable[[Any], dict[str, Any]]
    processor: Callable[[Any], Any]
    # Inputs that its batches have, beside `pixel_values`.
    inputs: tuple[str, ...] = ()
    text: dict[str, Any] = field(default_factory=dict)
    # Parts of a model whose gradients a run must reach, by what their names contain.
    parts: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name

    def make(self, seed: int = 0) -> tuple[nn.Module, Any]:
        """A random model, and a processor."""
        its_tokenizer = tokenizer(self.kind)
        processor = self.processor(its_tokenizer)
        processor.chat_template = _TEMPLATE % self.rendered
        config = getattr(transformers, f"{self.name}Config")(
            text_config={**_TEXT, **self.text}, **self.config(its_tokenizer)
        )
        config.initializer_range = config.text_config.initializer_range = 0.2
        torch.manual_seed(seed)
        model = transformers.AutoModelForImageTextToText.from_config(config)
        return drawn(model.eval(), seed), processor


def _pil(module: str, name: str) -> Any:
    found = pytest.importorskip(f"transformers.models.{module}.image_processing_pil_{module}")
    return getattr(found, name)


def _without_video(kind: type) -> type:
    """A processor's class that needs no video processor: those need torchvision."""

    class WithoutVideo(kind):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor":
                return type(None)
            return super().check_argument_for_proper_class(argument_name, argument)

    WithoutVideo.__name__ = WithoutVideo.__qualname__ = kind.__name__
    return WithoutVideo


def _id(its_tokenizer: Any, mark: str) -> int:
    return its_tokenizer.convert_tokens_to_ids(mark)


def _qwen_config(vision: dict[str, Any]) -> Callable[[Any], dict[str, Any]]:
    names = ("vision_start", "image", "video", "vision_end")
    return lambda its: {
        "vision_config": {**_QWEN, **vision},
        **{
            f"{name}_token_id": _id(its, mark)
            for name, mark in zip(names, _MARKS["Qwen"], strict=True)
        },
    }


def _qwen_processor(name: str) -> Callable[[Any], Any]:
    def make(its: Any) -> Any:
        images = _pil("qwen2_vl", "Qwen2VLImageProcessorPil")(
            patch_size=4,
            temporal_patch_size=2,
            merge_size=2,
            size={"shortest_edge": 64, "longest_edge": 512},
        )
        return _without_video(getattr(transformers, name))(images, its, None)

    return make


def _llava_processor(its: Any) -> Any:
    images = _pil("llava_onevision", "LlavaOnevisionImageProcessorPil")(
        size={"height": 8, "width": 8}, image_grid_pinpoints=[[8, 8], [8, 16], [16, 8], [16, 16]]
    )
    return _without_video(transformers.LlavaOnevisionProcessor)(
        images,
        its,
        None,
        num_image_tokens=4,
        vision_feature_select_strategy="full",
    )


def _gemma_processor(its: Any) -> Any:
    for name, mark in zip(("boi", "image", "eoi"), _MARKS["Gemma"], strict=True):
        setattr(its, f"{name}_token", mark)
        setattr(its, f"{name}_token_id", _id(its, mark))
    images = _pil("gemma3", "Gemma3ImageProcessorPil")(size={"height": 8, "width": 8})
    return transformers.Gemma3Processor(images, its, image_seq_length=4)


def _idefics_processor(its: Any) -> Any:
    images = _pil("idefics3", "Idefics3ImageProcessorPil")(
        size={"longest_edge": 16}, max_image_size={"longest_edge": 8}
    )
    return transformers.Idefics3Processor(images, its, image_seq_len=1)


FAMILIES = [
    Family(
        "Qwen2_5_VL",
        "Qwen",
        "<|vision_start|> <|image_pad|> <|vision_end|>",
        "<|vision_start|> <|image_pad|> <|vision_end|>",
        _qwen_config({"window_size": 16, "fullatt_block_indexes": [0]}),
        _qwen_processor("Qwen2_5_VLProcessor"),
        ("image_grid_thw", "mm_token_type_ids"),
        {"rope_parameters": _MROPE},
        ("visual.blocks", "visual.merger", "language_model"),
    ),
    Family(
        "Qwen3VL",
        "Qwen",
        "<|vision_start|> <|image_pad|> <|vision_end|>",
        "<|vision_start|> <|image_pad|> <|vision_end|>",
        _qwen_config({"deepstack_visual_indexes": [0], "num_position_embeddings": 16}),
        _qwen_processor("Qwen3VLProcessor"),
        ("image_grid_thw", "mm_token_type_ids"),
        {"rope_parameters": {**_MROPE, "mrope_interleaved": True}},
        ("visual.blocks", "visual.merger", "deepstack_merger", "language_model"),
    ),
    Family(
        "LlavaOnevision",
        "Llava",
        "<image>",
        "<image>",
        lambda its: {
            "vision_config": {
                "model_type": "siglip_vision_model",
                "vision_use_head": False,
                **_CLIP,
            },
            "image_token_id": _id(its, "<image>"),
            "video_token_id": _id(its, "<video>"),
            "image_grid_pinpoints": [[8, 8], [8, 16], [16, 8], [16, 16]],
            "vision_feature_select_strategy": "full",
        },
        _llava_processor,
        ("image_sizes",),
        {"model_type": "qwen2"},
        ("vision_tower", "multi_modal_projector", "image_newline", "language_model"),
    ),
    Family(
        "Gemma3",
        "Gemma",
        "<start_of_image>",
        "<start_of_image>",
        lambda its: {
            "vision_config": _CLIP,
            "mm_tokens_per_image": 4,
            "boi_token_index": _id(its, "<start_of_image>"),
            "image_token_index": _id(its, "<image_soft_token>"),
            "eoi_token_index": _id(its, "<end_of_image>"),
        },
        _gemma_processor,
        ("token_type_ids",),
        {"final_logit_softcapping": 0.5, "sliding_window": 8},
        ("vision_tower", "multi_modal_projector", "language_model"),
    ),
    *(
        Family(
            name,
            "Idefics",
            "<image>",
            "<image>",
            lambda its: {
                "vision_config": _CLIP,
                "scale_factor": 2,
                "image_token_id": _id(its, "<image>"),
            },
            _idefics_processor,
            ("pixel_attention_mask",),
            {"model_type": "llama"},
            ("vision_model", "connector", "text_model"),
        )
        for name in ("Idefics3", "SmolVLM")
    ),
]


QWEN, LLAVA, GEMMA, IDEFICS = (FAMILIES[at] for at in (0, 2, 3, 4))


def picture(colour: str, shape: str, width: int = 16, height: int = 16) -> Image.Image:
    """A shape that fills most of a picture."""
    made = Image.new("RGB", (width, height), "white")
    box = (2, 2, width - 3, height - 3)
    pen = ImageDraw.Draw(made)
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "square":
        pen.rectangle(box, fill=colour)
    else:
        pen.polygon([(2, height - 3), (width - 3, height - 3), (width // 2, 2)], fill=colour)
    return made


def rows(family: Family, count: int, seed: int = 0, chats: bool = False) -> list[dict[str, Any]]:
    """Pairs: a picture or two, the right caption and that of another picture.

    The texts end with the end token, which TRL's collator of pictures does not add.
    """
    draw = random.Random(seed)
    made = []
    for at in range(count):
        pictures = 2 if at % 3 == 2 else 1
        sizes = [(draw.choice([8, 16, 24]), draw.choice([8, 16])) for _ in range(pictures)]
        seen = [(draw.choice(COLOURS), draw.choice(SHAPES)) for _ in sizes]
        wrong = [(draw.choice(COLOURS), draw.choice(SHAPES)) for _ in sizes]
        question = draw.choice(["what is this", "which shape is it", "look at this"])
        right, other = (
            " and ".join(f"a {colour} {shape}" for colour, shape in each) for each in (seen, wrong)
        )
        if right == other:
            other = "which one"
        if at % 2:
            other = f"it is {other}"
        row: dict[str, Any] = {
            "images": [picture(*each, *size) for each, size in zip(seen, sizes, strict=True)]
        }
        if chats:
            row |= {
                "prompt": [{"role": "user", "content": question}],
                "chosen": [{"role": "assistant", "content": right}],
                "rejected": [{"role": "assistant", "content": other}],
            }
        else:
            marks = " ".join([family.placeholder] * pictures)
            row |= {
                "prompt": f"{marks} {question}",
                "chosen": f" {right} <eos>",
                "rejected": f" {other} <eos>",
            }
        made.append(row)
    return made


def dataset(family: Family, count: int, seed: int = 0, chats: bool = False) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows(family, count, seed, chats))


def seen_alone(
    model: nn.Module, processor: Any, row: dict[str, Any], side: str
) -> torch.Tensor:  # a scalar
    """A response's log-prob sum from the model's own logits: one row, from its own processor."""
    if isinstance(row["prompt"], str):
        texts = [row["prompt"], row["prompt"] + row[side]]
    else:
        question, answer = row["prompt"][0]["content"], row[side][0]["content"]
        blocks = [{"type": "image"}] * len(row["images"]) + [{"type": "text", "text": question}]
        asked = [{"role": "user", "content": blocks}]
        said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        texts = [
            processor.apply_chat_template(asked, add_generation_prompt=True),
            processor.apply_chat_template([*asked, said]),
        ]
    given = {"images": [row["images"]]} if row["images"] else {}
    asked_ids, inputs = (
        processor(text=[text], return_tensors="pt", add_special_tokens=False, **given)
        for text in texts
    )
    ids = inputs["input_ids"]
    logps = model(**inputs).logits[0, :-1].double().log_softmax(-1)
    picked = logps.gather(-1, ids[0, 1:, None])[:, 0]
    return picked[asked_ids["input_ids"].shape[1] - 1 :].sum()


def sums(model: nn.Module, processor: Any, rows: list[dict[str, Any]]) -> torch.Tensor:  # (2B,)
    """The sums of the chosen responses, then of the rejected ones, one row at a time."""
    return torch.stack(
        [seen_alone(model, processor, row, side) for side in ("chosen", "rejected") for row in rows]
    )


def dpo(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    chosen, rejected = (policy - reference).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def worst(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest difference, by each gradient's own size or a thousandth of the largest one."""
    assert ours.keys() == theirs.keys()
    least = 1e-3 * max(gradient.abs().max() for gradient in theirs.values())
    return max(
        ((ours[n] - g).abs().max() / g.abs().max().clamp(min=least)).item()
        for n, g in theirs.items()
    )


def lora() -> Any:
    """An adapter of the language model alone, by names that all families have."""
    import peft

    pattern = r".*(language_model|text_model).*\.(q_proj|v_proj|down_proj)"
    return peft.LoraConfig(r=4, target_modules=pattern, init_lora_weights=False)


def skip_unless_idefics_loads() -> None:
    """Of the families here, Idefics alone needs no video processor, and so no torchvision."""
    if PIL_IDEFICS.is_too_old and find_spec("torchvision") is None:
        pytest.skip(PIL_IDEFICS.reason)
