"""Settings of the tiny configs where no rule can give them: the fields hang together, or have no default."""

from __future__ import annotations

from typing import Any

_FULL, _LINEAR = "full_attention", "linear_attention"

BY_HAND: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", _FULL],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("sliding_attention", _FULL)
        },
    },
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 48},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "dots3_note_vision_encoder": {"num_hidden_layers": 42, "adapter_in_dim": 32, "adapter_out_dim": 32},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "esm": {"vocab_size": 64, "pad_token_id": 0, "mask_token_id": 1},
    "funnel": {"block_sizes": [2, 1, 1], "num_decoder_layers": 2, "d_inner": 48, "architectures": ["FunnelModel"]},
    "gemma4_text": {"layer_types": ["sliding_attention", _FULL] * 2},
    "gemma4_unified_text": {"layer_types": ["sliding_attention", _FULL] * 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"]},
    "head_config": {"audio_hidden_size": 32},  # of nemo_speechlm's diarization
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "layoutlmv3": {"coordinate_size": 5, "shape_size": 6},
    "lilt": {"hidden_size": 48},
    "lfm2_moe": {"layer_types": ["conv", _FULL, "conv", _FULL]},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "neomme": {"head_dim": 16, "layer_types": [_FULL, "sliding_attention", "sliding_attention", _FULL]},
    "olmo_hybrid": {"layer_types": [_LINEAR, _FULL, _LINEAR, _FULL]},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "reformer": {
        "hidden_size": 32,
        "axial_pos_shape": (8, 8),
        "axial_pos_embds_dim": (16, 16),
        "attn_layers": ["local", "lsh", "local", "lsh"],
        "num_buckets": 4,
        "hash_seed": 0,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 6, "layers_block_type": [_LINEAR, "hybrid", _LINEAR, "hybrid", _LINEAR, "hybrid"]},
    "zamba2": {"layers_block_type": [_LINEAR, "hybrid", _LINEAR, "hybrid"]},
}

# What transformers doesn't build from a config alone, or what reads no text by itself.
LEFT_OUT = {
    "musicgen": "AutoModel names the audio decoder, which takes codes of sound",
    "musicgen_melody": "AutoModel names the audio decoder, which takes codes of sound",
    "voxtral_realtime": "reads sound; transformers names a text model for it that it doesn't have",
}

# Why types that are in the population don't pass, in words for the table.
REASONS = {
    "blt": "reads bytes that a second model groups into patches; no tiny config of it runs",
    "fsmt": "its encoder is no PreTrainedModel, so it can't be built alone",
    "hrm_text": "runs two lists of blocks in a loop, so that no block is one place",
    "mllama": "skips its cross-attention blocks where there is no image, so that their taps are not read",
    "pegasus_x": 'runs each FFN for tokens and once more for global tokens; kinds=["hidden"] works',
    "squeezebert": "calls forward of its blocks without torch's hooks",
}

# Types whose blocks are an attention, a mixer or an FFN: two of the former have no FFN to tap.
WITHOUT_FFN = {"nemotron_h", "squeezebert"}

# Types without a norm tap whose output is not that of the last block, and what comes after it.
MORE_AFTER = {
    "bigbird_pegasus": "a final norm that has the name of one of embeddings",
    "funnel": "a decoder of its own",
}
