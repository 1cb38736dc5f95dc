"""Model families, each built tiny, with the logits transform that must be read from its config.

A row has the name of a family, options of its config, and the expected transform. Softcaps are low
and scales are far from 1, so that a missed or misread transform cannot pass. `oracle` computes
log-probs from the model's own logits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from prefkern.models.transform import HeadTransform
from support import tiny

_PLAIN = HeadTransform()
_CAP = 0.5
_CAPPED = {"final_logit_softcapping": _CAP}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_MLA = {
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "num_key_value_heads": 4,
}
_MAMBA = {
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
DEEPSEEK = {
    **_MLA,
    **EXPERTS,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
# The sizes of its heads are multiples of 64.
_XLSTM = {"hidden_size": 128, "num_heads": 2, "num_blocks": 2, "output_logit_soft_cap": _CAP}

_INKLING = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "rel_extent": 16,
}

IMAGE = 90  # the token that stands for an image, or for a part of one
_CLIP = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
_QWEN = {
    "vision_config": {
        "depth": 1,
        "embed_dim": 16,
        "hidden_size": 32,
        "num_heads": 2,
        "patch_size": 4,
        "mlp_ratio": 2,
        "spatial_merge_size": 2,
        "temporal_patch_size": 1,
    },
    "image_token_id": IMAGE,
    "video_token_id": 91,
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
}
_QWEN_2_5 = {
    "hidden_size": 16,
    "out_hidden_size": 32,
    "intermediate_size": 24,
    "window_size": 16,
    "fullatt_block_indexes": [0],
}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}


@dataclass(frozen=True)
class Family:
    name: str  # name of its config class, without "Config"
    options: dict[str, Any] = field(default_factory=dict)
    transform: HeadTransform | None = _PLAIN  # None: versions of transformers differ
    text: dict[str, Any] | None = None  # options of the language model inside a vision model
    image: dict[str, list[int]] = field(default_factory=dict)  # input -> shape
    image_tokens: int = 4  # number of ids that stand for one image

    def __str__(self) -> str:
        flags = [f"{key}={value}" for key, value in self.options.items() if key.startswith("tie")]
        return "-".join([self.name, *flags])


FAMILIES = [
    Family("Llama"),
    Family("Llama", {"tie_word_embeddings": True}),
    Family("Mistral"),
    Family("Qwen2"),
    Family("Qwen2", {"tie_word_embeddings": True}),
    Family("Qwen3"),
    Family("Gemma"),
    Family("Gemma2", _CAPPED, HeadTransform(softcap=_CAP)),
    Family("Gemma2", {**_CAPPED, "tie_word_embeddings": False}, HeadTransform(softcap=_CAP)),
    Family("Gemma3Text", _CAPPED, HeadTransform(softcap=_CAP)),
    Family("Cohere", {"logit_scale": 0.0625}, HeadTransform(0.0625)),
    Family("Cohere2", {"logit_scale": 0.0625}, HeadTransform(0.0625)),
    Family("Granite", {"logits_scaling": 8.0}, HeadTransform(0.125)),
    Family(
        "GraniteMoe",
        {"logits_scaling": 8.0, "num_local_experts": 4, "num_experts_per_tok": 2},
        HeadTransform(0.125),
    ),
    # HyperCLOVA X multiplies by the value that Granite divides by.
    Family("HyperCLOVAX", {"logits_scaling": 0.5}, HeadTransform(0.5)),
    # MiniCPM3 divides before its head, so its logits need no scale.
    Family("MiniCPM3", {**_MLA, "dim_model_base": 16}),
    Family("FalconH1", {**_MAMBA, "lm_head_multiplier": 0.25}, HeadTransform(0.25)),
    Family("Phi"),  # a head with a bias
    Family("Phi3"),
    Family("GPT2"),
    Family("GPTNeoX"),
    Family("Olmo"),
    Family("Olmo2"),
    Family("Olmo3"),
    Family("Glm"),
    Family("Glm4"),
    Family("SmolLM3"),
    Family("StableLm"),
    Family("Mixtral", {"num_local_experts": 4}),
    Family("Qwen3Moe", {**EXPERTS, "num_experts": 4}),
    Family("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    Family("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    Family("Llama4Text", {"num_local_experts": 4, "intermediate_size_mlp": 32}),
    Family("DeepseekV3", DEEPSEEK),
    Family(
        "RecurrentGemma",
        {"logits_soft_cap": 0.25, "lru_width": 32, "num_hidden_layers": 3},
        HeadTransform(softcap=0.25),
    ),
    Family("xLSTM", _XLSTM, HeadTransform(softcap=_CAP)),
    # The model drops the logits of the rows that pad its head's vocabulary.
    Family(
        "Inkling2Text",
        {**_INKLING, "unpadded_vocab_size": 95, **_CAPPED},
        HeadTransform(softcap=_CAP, vocab_size=95),
    ),
    Family("NanoChat", _CAPPED, HeadTransform(softcap=_CAP)),
    Family("Mamba", {"state_size": 8}),
]

VISION = [
    Family(
        "Qwen2VL",
        _QWEN,
        text={"rope_parameters": _MROPE},
        image={"pixel_values": [16, 48], "image_grid_thw": [1, 4, 4]},
    ),
    Family(
        "Qwen2_5_VL",
        {**_QWEN, "vision_config": {**_QWEN["vision_config"], **_QWEN_2_5}},
        text={"rope_parameters": _MROPE},
        image={"pixel_values": [16, 48], "image_grid_thw": [1, 4, 4]},
    ),
    # With images Gemma 3 applies no softcap, whatever its text config says.
    Family(
        "Gemma3",
        {"vision_config": _CLIP, "mm_tokens_per_image": 4, "image_token_index": IMAGE},
        text=_CAPPED,
        image={"pixel_values": [1, 3, 8, 8]},
    ),
    Family(
        "Llava",
        {"vision_config": {"model_type": "clip_vision_model", **_CLIP}, "image_token_id": IMAGE},
        text={"model_type": "llama"},
        image={"pixel_values": [1, 3, 8, 8]},
    ),
    Family(
        "PaliGemma",
        {
            "vision_config": {
                "model_type": "siglip_vision_model",
                "vision_use_head": False,
                **_CLIP,
            },
            "image_token_id": IMAGE,
            "projection_dim": 32,
        },
        None,  # before transformers 5.2x it applies no softcap
        text={"model_type": "gemma2", **_CAPPED},
        image={"pixel_values": [1, 3, 8, 8]},
    ),
    Family(
        "Idefics3",
        {"vision_config": _CLIP, "scale_factor": 2, "image_token_id": IMAGE},
        text={"model_type": "llama"},
        image={"pixel_values": [1, 1, 3, 8, 8]},
        image_tokens=1,
    ),
    Family(
        "SmolVLM",
        {"vision_config": _CLIP, "scale_factor": 2, "image_token_id": IMAGE},
        text={"model_type": "llama"},
        image={"pixel_values": [1, 1, 3, 8, 8]},
        image_tokens=1,
    ),
]


def build(family: Family, seed: int = 0) -> nn.Module | None:
    """The family's tiny model with random parameters; None if transformers lacks the family."""
    if not hasattr(transformers, f"{family.name}Config"):
        return None
    if family.text is None:
        return drawn(tiny.model(family.name, seed, **family.options), seed)
    config = getattr(transformers, f"{family.name}Config")(
        text_config={**tiny.SIZES, **family.text}, **family.options
    )
    config.initializer_range = config.text_config.initializer_range = 0.2
    torch.manual_seed(seed)
    return drawn(transformers.AutoModelForImageTextToText.from_config(config).eval(), seed)


def drawn(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with noise on parameters that are all equal, such as 0 or 1: these hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.min() == parameter.max():
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """ids, mask and labels: 9, 6 and 4 tokens, padded on the right; the first two are prompt."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, IMAGE, (3, 9), generator=generator)
    mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3, [1] * 4 + [0] * 5])
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return ids.masked_fill(mask == 0, 0), mask, labels


def with_image(
    family: Family, ids: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """ids and labels with an image in the first row, and the model's further inputs for it."""
    picture = slice(1, 1 + family.image_tokens)
    ids, labels = ids.clone(), labels.clone()
    ids[0, picture], labels[0, picture] = IMAGE, -100
    generator = torch.Generator().manual_seed(0)
    inputs = {
        name: torch.randn(shape, generator=generator)
        for name, shape in family.image.items()
        if name == "pixel_values"
    }
    if "image_grid_thw" in family.image:
        inputs["image_grid_thw"] = torch.tensor([family.image["image_grid_thw"]])
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    return ids, labels, inputs


def oracle(
    model: nn.Module,
    ids: Tensor,
    mask: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    **inputs: Any,
) -> Tensor:
    """log_softmax of the model's own logits, gathered at the labels."""
    logits = model(input_ids=ids, attention_mask=mask, **inputs).logits[:, :-1].float()
    targets = labels[:, 1:]
    logps = (logits / temperature).log_softmax(-1)
    picked = logps.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return torch.where(targets == -100, 0.0, picked)
