"""Small random models of any class of transformers, for bench/families.py.

A config has its default values, but each size with a known name (`SIZES`) is small, also in nested
configs. `OWN` has what a class needs in addition.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from support import family_table

MOST_PARAMETERS = 150_000_000

_HIDDEN, _VOCAB = 32, 97
# The names of sizes in configs, and their small values; `OWN` has what a class needs in addition.
SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ("vocab_size", "text_vocab_size", "n_vocab", "vocab_size_per_layer_input"), _VOCAB
    ),
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
    # Transforms of the logits, with numbers that change them clearly.
    "logits_scaling": 8.0,
    "logit_scale": 0.0625,
    "lm_head_multiplier": 0.25,
    "output_multiplier": 0.25,
    **dict.fromkeys(("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"), 0.5),
    "unpadded_vocab_size": 95,
}

# What a class needs in addition: shapes that fit one another, and layers of each kind.
_LINEAR_AND_FULL = {"layer_types": ["linear_attention", "full_attention"] * 2}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
_OF_TEXT = {"text_config": {"rope_parameters": _MROPE}}
_HALF_ROTARY = {**_MROPE, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}
_COMPASS = {
    "layer_types": ["full_attention"] * 4,
    "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
}
_MAMBA_2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2}
OWN: dict[str, dict[str, Any]] = {
    "BailingHybridForCausalLM": {**_LINEAR_AND_FULL, "num_expert_group": 2},
    "BambaForCausalLM": {**_MAMBA_2, "attn_layer_indices": [1, 3]},
    "BltForCausalLM": {"encoder_hash_byte_group_vocab": 97},
    "CodeGenForCausalLM": {"rotary_dim": 4},
    "CohereCompassForCausalLM": _COMPASS,
    "ChameleonForConditionalGeneration": {
        "vocabulary_map": {"<image>": 90, "IMGIMGAZ": 91, "IMGIMGBZ": 92}
    },
    "DbrxForCausalLM": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8}},
    "Gemma3nForCausalLM": {
        "intermediate_size": [48] * 4,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 2]]},
    "GPTJForCausalLM": {"rotary_dim": 4},
    "GraniteMoeHybridForCausalLM": {**_MAMBA_2, "layer_types": ["mamba", "attention"] * 2},
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "KimiLinearForCausalLM": _LINEAR_AND_FULL,
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"] * 2},
    "Mamba2ForCausalLM": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "Mistral4ForCausalLM": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 2.0,
            "original_max_position_embeddings": 64,
            "llama_4_scaling_beta": 0.1,
        },
        "head_dim": 16,
    },
    "Qwen4ExpForCausalLM": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "ple_embed_dim": 32,
        "ngram_vocab_size_base": 97,
        "hc_lowrank": 8,
    },
    "ReformerModelWithLMHead": {
        "axial_pos_embds": False,
        "attention_head_size": 8,
        "attn_layers": ["local", "local"],
        "local_attn_chunk_length": 3,
    },
    "xLSTMForCausalLM": {"hidden_size": 128, "embedding_dim": 128, "num_heads": 2},
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
    "Granite4VisionForConditionalGeneration": {
        "deepstack_layer_map": [[0, 0], [1, 2]],
        "spatial_target_layers": [0, 1, 2, 3],
        "vision_config": {"hidden_size": 64},
        "downsample_rate": "1/2",
    },
    "HunYuanVLForConditionalGeneration": {
        "text_config": {"rope_parameters": {**_MROPE, "mrope_section": [1, 1, 1, 1]}}
    },
    "Glm4vMoeForConditionalGeneration": {"text_config": {"rope_parameters": _HALF_ROTARY}},
    "Cosmos3EdgeForConditionalGeneration": _OF_TEXT,
    "CohereCompassForConditionalGeneration": {"text_config": _COMPASS},
    "Glm5NextForConditionalGeneration": {"text_config": {"index_topk": 16}},
}


def small(config_class: Any, own: dict[str, Any]) -> Any:
    """A config in which every size with a known name is small."""
    default = config_class()
    options: dict[str, Any] = {}
    for name, value in default.to_dict().items():
        if name in SIZES:
            many = isinstance(value, list | tuple)
            options[name] = [SIZES[name]] * len(value) if many else SIZES[name]
    if "kv_lora_rank" in options:
        # Latent attention does not group heads.
        options["num_key_value_heads"] = options.get("num_attention_heads", 4)
    own = dict(own)
    for name in getattr(config_class, "sub_configs", {}):
        nested = getattr(default, name, None)
        if isinstance(nested, transformers.PreTrainedConfig):
            options[name] = small(type(nested), own.pop(name, {})).to_dict()
    return config_class(**{**options, **own})


def build(model_class: Any, own: dict[str, Any]) -> nn.Module:
    """A small random model of a class.

    Raises whatever its config or its constructor raises, and ValueError if the model is still
    large.
    """
    config = small(model_class.config_class, own)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size:,} parameters remain")
    torch.manual_seed(0)
    return family_table.drawn(model_class(config).eval().float())
