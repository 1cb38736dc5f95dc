"""Build every causal LM of transformers tiny, and hold its log-probs against its own logits.

usage: python bench/families.py [--json FILE] [--page FILE] [NAME ...]

Each class of transformers' auto mappings for causal LMs and for image and text to text is built at
random with a hidden size of 32 or so, from its config's defaults with every size that has a known
name made small, nested configs included. `prefkern.token_logprobs` and its gradients, of all
parameters, are compared with log_softmax of the model's own logits, in float32 on text alone.

A class ends as one of
    agrees    its errors are within bounds
    refused   prefkern says why it will not; never a wrong number
    unread    the model itself does not run on text alone, or could not be built tiny by this script
    differs   a wrong number without an error: exit status 1
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]

import family_table

import prefkern
from prefkern.models import head_transform

# Largest errors of a value, in nats, and of a gradient, relative to its parameter's largest.
BOUNDS = {"value": 1e-4, "gradient": 1e-3}
MOST_PARAMETERS = 20_000_000

_HIDDEN, _WORDS = 32, 97
# What a size is called in configs, and what it becomes.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "text_vocab_size", "n_vocab", "vocab_size_per_layer_input"), _WORDS),
    **dict.fromkeys(
        (
            *("hidden_size", "d_model", "n_embd", "emb_dim", "embed_dim", "dim", "width"),
            *(
                "embedding_dim",
                "lru_width",
                "embedding_size",
                "mamba_d_ssm",
                "input_embedding_size",
            ),
            *("out_hidden_size", "projection_dim", "word_embed_proj_dim", "attention_hidden_size"),
            *("decoder_hidden_size", "hidden_dim", "output_dim", "text_hidden_size"),
        ),
        _HIDDEN,
    ),
    **dict.fromkeys(
        (
            *("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim"),
            *("ffn_hidden_size", "moe_intermediate_size", "shared_expert_intermediate_size"),
            *("intermediate_size_mlp", "dff", "expert_ffn_hidden_size", "feed_forward_size"),
            *("shared_intermediate_size", "moe_shared_expert_intermediate_size", "mlp_dim"),
            *("dense_intermediate_size", "block_ff_dim", "mlp_hidden_size"),
            "prefix_dense_intermediate_size",
        ),
        48,
    ),
    **dict.fromkeys(
        (
            *("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "depth"),
            *("encoder_layers", "num_blocks", "num_decoder_layers", "num_encoder_layers"),
        ),
        4,
    ),
    **dict.fromkeys(
        (
            *("num_attention_heads", "n_head", "num_heads", "n_heads", "decoder_attention_heads"),
            *("encoder_attention_heads", "num_decoder_attention_heads", "linear_num_value_heads"),
            *("num_encoder_attention_heads", "mamba_n_heads", "mamba_num_heads", "swa_num_heads"),
        ),
        4,
    ),
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads", "index_n_heads"), 2),
    **dict.fromkeys(
        (
            *("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "mamba_d_head"),
            *(
                "linear_key_head_dim",
                "linear_value_head_dim",
                "mamba_head_dim",
                "attention_head_dim",
            ),
            *("d_kv", "kv_channels", "index_head_dim", "global_head_dim", "swa_head_dim"),
        ),
        8,
    ),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "time_step_rank"), 16),
    **dict.fromkeys(
        (
            *("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
            "n_experts",
        ),
        4,
    ),
    **dict.fromkeys(
        (
            *("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token", "top_k_experts"),
            "n_group",
        ),
        2,
    ),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "topk_group", "mamba_n_groups"), 1),
    **dict.fromkeys(("first_k_dense_replace", "n_groups", "temporal_patch_size"), 1),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size", "mamba_chunk_size"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 128),
    **dict.fromkeys(("sliding_window", "attention_window_size", "attention_chunk_size"), 16),
    "index_topk": 8,
    "image_size": 8,
    "patch_size": 4,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
    "is_decoder": True,
}

# What a class needs besides: shapes that must fit one another, and layers of each kind.
_LINEAR_AND_FULL = {"layer_types": ["linear_attention", "full_attention"] * 2}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
_OF_TEXT = {"text_config": {"rope_parameters": _MROPE}}
_HALF_ROTARY = {**_MROPE, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}
_MAMBA_2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2}
OWN: dict[str, dict[str, Any]] = {
    "BailingHybridForCausalLM": _LINEAR_AND_FULL,
    "BambaForCausalLM": {**_MAMBA_2, "attn_layer_indices": [1, 3]},
    "BltForCausalLM": {"encoder_hash_byte_group_vocab": 97},
    "CodeGenForCausalLM": {"rotary_dim": 4},
    "CohereCompassForCausalLM": {"layer_types": ["full_attention"] * 4, "head_dim": 8},
    "DbrxForCausalLM": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4}},
    "Gemma3nForCausalLM": {
        "intermediate_size": [48] * 4,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "Gemma4ForCausalLM": {"final_logit_softcapping": 0.5},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 2]]},
    "GPTJForCausalLM": {"rotary_dim": 4},
    "GraniteMoeHybridForCausalLM": _MAMBA_2,
    "InklingForCausalLM": {"unpadded_vocab_size": 95},
    "Inkling2ForCausalLM": {"unpadded_vocab_size": 95},
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "KimiLinearForCausalLM": _LINEAR_AND_FULL,
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"] * 2},
    "Mamba2ForCausalLM": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "Mistral4ForCausalLM": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "ReformerModelWithLMHead": {
        "axial_pos_embds": False,
        "attention_head_size": 8,
        "attn_layers": ["local", "local"],
        "local_attn_chunk_length": 3,
    },
    "xLSTMForCausalLM": {"hidden_size": 128, "num_heads": 2},
    "XmodForCausalLM": {"default_language": "en_XX"},
    "Zamba2ForCausalLM": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "num_key_value_heads": 4,
    },
    "ZambaForCausalLM": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
    },
    "ZayaForCausalLM": {"num_experts_per_tok": 1},
    **dict.fromkeys(
        (
            *("PaddleOCRVLForConditionalGeneration", "Qwen2VLForConditionalGeneration"),
            *("Qwen2_5_VLForConditionalGeneration", "Glm46VForConditionalGeneration"),
            *("Glm4vForConditionalGeneration", "GlmOcrForConditionalGeneration"),
        ),
        _OF_TEXT,
    ),
    "Glm4vMoeForConditionalGeneration": {"text_config": {"rope_parameters": _HALF_ROTARY}},
    "Cosmos3EdgeForConditionalGeneration": _OF_TEXT,
    "CohereCompassForConditionalGeneration": {
        "text_config": {"layer_types": ["full_attention"] * 4, "head_dim": 8}
    },
    "Glm5NextForConditionalGeneration": {"text_config": {"index_topk": 16}},
}


@dataclass
class Row:
    model: str
    head: str  # which auto mapping
    status: str
    transform: str = ""
    value_error: float | None = None
    gradient_error: float | None = None
    why: str = ""


def small(config_class: Any, own: dict[str, Any]) -> Any:
    """A config with every size that has a known name made small."""
    default = config_class()
    options: dict[str, Any] = {}
    for name, value in default.to_dict().items():
        if name in SIZES:
            many = isinstance(value, list | tuple)
            options[name] = [SIZES[name]] * len(value) if many else SIZES[name]
    if "kv_lora_rank" in options:
        # Latent attention knows no groups of heads.
        options["num_key_value_heads"] = options.get("num_attention_heads", 4)
    own = dict(own)
    for name in getattr(config_class, "sub_configs", {}):
        nested = getattr(default, name, None)
        if isinstance(nested, transformers.PreTrainedConfig):
            options[name] = small(type(nested), own.pop(name, {})).to_dict()
    return config_class(**{**options, **own})


def build(model_class: Any, own: dict[str, Any]) -> nn.Module:
    """A class's model, small and drawn at random.

    Raises whatever its config or its constructor raises, and ValueError for one that stays large.
    """
    config = small(model_class.config_class, own)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size:,} parameters remain")
    torch.manual_seed(0)
    return family_table.drawn(model_class(config).eval().float())


def gradients(model: nn.Module, logps: torch.Tensor) -> dict[str, torch.Tensor]:
    weights = torch.randn(logps.shape, generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    (logps * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def measure(name: str, head: str) -> Row:
    """One class against its own logits."""
    row = Row(name, head, "unread")
    model_class = getattr(transformers, name)
    try:
        model = build(model_class, OWN.get(name, {}))
        ids, mask, labels = family_table.batch()
        expected = family_table.oracle(model, ids, mask, labels)
        theirs = gradients(model, expected)
    except Exception as error:
        row.why = reason(error)
        return row
    try:
        actual = prefkern.token_logprobs(model, ids, mask, labels)
        ours = gradients(model, actual)
        row.transform = str(head_transform(model))
    except Exception as error:
        row.status, row.why = "refused", reason(error)
        return row
    row.value_error = (actual - expected).abs().max().item()
    # Of one in which nothing but rounding remains, the model's largest is the measure.
    largest = max(gradient.abs().max().item() for gradient in theirs.values())
    row.gradient_error = max(
        ((ours[each] - theirs[each]).abs().max() / max(theirs[each].abs().max(), 1e-3 * largest)).item()
        if each in ours and each in theirs
        else float("inf")
        for each in ours.keys() | theirs.keys()
    )
    agrees = row.value_error <= BOUNDS["value"] and row.gradient_error <= BOUNDS["gradient"]
    row.status = "agrees" if agrees else "differs"
    return row


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def classes() -> dict[str, str]:
    """Every class of the auto mappings, once, and by which mapping it is found first."""
    mappings = {
        "causal LM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "image and text": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    }
    found: dict[str, str] = {}
    for head, names in mappings.items():
        for name in names.values():
            found.setdefault(name, head)
    return found


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path)
    args = parser.parse_args(argv)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = []
    for name, head in classes().items():
        if args.names and name not in args.names:
            continue
        row = measure(name, head)
        rows.append(row)
        print(f"{row.model:45} {row.status:8} {row.why}", flush=True)
    print(dict(Counter(row.status for row in rows)))
    return int(any(row.status == "differs" for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
