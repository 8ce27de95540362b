"""A tiny config of any model type: its own defaults, made small by rules that go by the names of fields."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

BLOCKS = 4
VOCABULARY = 64

# The first rule whose pattern matches a field's whole name gives its value, where the default is a number above it.
_RULES: list[tuple[str, int]] = [
    (r"(pad|mask)_(token_id|index)", 0),
    (r"(bos|cls|decoder_start)_(token_id|index)", 2),
    (r"(eos|sep|eod)_(token_id|index)", 3),
    (r".*_token_(id|index)", VOCABULARY - 1),
    (r"(src_|tgt_|decoder_|entity_)?vocab_size(_per_layer_input|_base)?", VOCABULARY),
    (r"(unpadded|pronunciation|shape|char|t2u)_vocab_size|.*_vocab_size_base|.*_group_vocab", VOCABULARY),
    (r"(tag|subs)_pad_id", 0),
    # blocks
    (r"(num_hidden|num|n|((num|speech|t2u)_)?(en|de)coder)_layers?", BLOCKS),
    (r"num_layers_per_stack|num_self_attends_per_block", BLOCKS),
    (r"num_sparse_(en|de)coder_layers|num_kv_shared_layers|max_window_layers|n_layers_per_attn_res_block", 2),
    (r".*_layer_period|.*_layer_interval|sliding_window_pattern|.*_every_n_layers|layer_group_size|.*_sparse_step", 2),
    (r".*_layer_offset|first_k_dense_replace|num_dense_layers|num_(mtp|nextn_predict|adapter)_layers", 1),
    # experts
    (r"(num|n)_(routed_|local_)?experts|moe_num_experts", 4),
    (r"num_experts_per_tok|moe_topk|moe_k|top_k_experts", 2),
    (r"n_group|topk_group|.*shared_experts|o_groups|zero_expert_num", 1),
    (r"expert_capacity", 64),
    # widths
    (r"(hidden|embedding|input_embedding|output_embedding|attention_hidden|prediction_head|d)_(size|model)", 32),
    (r"(n_embd|emb_dim|embedding_dim|dim|d_latents|dim_model|lru_width|word_embed_proj_dim|entity_emb_size)", 32),
    (r"(pronunciation|shape|lang|unit|spkr)_embed_dim|embedding_rank|router_hidden_size|xpath_unit_hidden_size", 32),
    (r".*(intermediate|ffn_hidden|feed_forward)_size(_mlp)?|n_inner|hidden_dim|.*ffn_dim|d_ff|dff|dim_ff|d_inner", 48),
    (r"(intra_bottleneck|hidden_size_per_layer_input|backbone_hidden)_size|true_hidden_size", 16),
    (r".*rank|d_rel|rel_extent|hc_lowrank", 8),
    # attention
    (r"index_n_heads", 16),
    (r".*key_value_heads|num_kv_heads|linear_num_key_heads", 2),
    (r".*heads?|heads_per_ngram", 4),
    (r".*head_dim|d_kv|d_head|dim_head|kv_channels|attention_head_size|.*_headdim|rotary_dim", 8),
    # lengths
    (r".*(sliding|attention|keep|local_attention|window)_(window|size|window_len|window_size)|local_attention", 4),
    (r"(block|chunk|global_block|mamba_chunk|attention_chunk|patch)_size|.*_chunk_length|local_radius|mem_len", 4),
    (r"(index_topk|index_block_size|index_topk_blocks|index_local_blocks|segment_means_seq_len|num_landmarks)", 4),
    (r".*position_embeddings|n_positions|n_ctx|max_seq_len|.*_length|.*_(source|target)_positions", VOCABULARY),
    (r"(num|max)_(2d|rel).*|max_xpath.*|.*(num|hash)_buckets|.*max_distance|(rel|rel_2d)_pos_bins", VOCABULARY),
    # state spaces
    (r".*state_size|.*d_state|.*(n_groups|ngroups)", 4),
    (r"mamba_d_ssm", 64),
    (r"(coordinate|shape)_size", 8),
]  # fmt: skip
_COMPILED = [(re.compile(pattern), value) for pattern, value in _RULES]


def tiny_config(model_type: str, by_hand: Mapping[str, Mapping[str, Any]] | None = None) -> PreTrainedConfig:
    """A config of ``model_type`` with 4 blocks of width 32 or so.

    Args:
        model_type: a key of ``CONFIG_MAPPING``.
        by_hand: for some model types, nested ones too, values instead of those that the rules give.
    """
    return _tiny(CONFIG_MAPPING[model_type], model_type, by_hand or {})


def _tiny(config_class: type[PreTrainedConfig], name: str, by_hand: Mapping[str, Mapping[str, Any]]) -> Any:
    defaults = _defaults(config_class)
    values = {name: _tiny(found, found.model_type or name, by_hand) for name, found in _nested(config_class).items()}
    if not dataclasses.is_dataclass(config_class):  # of an older transformers, which takes dicts alone
        values = {name: nested.to_dict() for name, nested in values.items()}
    for field, default in defaults.items():
        if isinstance(default, int) and not isinstance(default, bool):
            values[field] = _shrunk(field, default)
    if "kv_lora_rank" in defaults:  # keys and values come from one latent, for each of the heads
        values["num_key_value_heads"] = values["num_attention_heads"]
    values.update(by_hand.get(name, {}))
    return config_class(**values)


def _defaults(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """The fields of a config and their defaults."""
    if dataclasses.is_dataclass(config_class):
        return {field.name: field.default for field in dataclasses.fields(config_class)}
    parameters = inspect.signature(config_class.__init__).parameters
    return {name: parameter.default for name, parameter in parameters.items()}


def _nested(config_class: type[PreTrainedConfig]) -> dict[str, type[PreTrainedConfig]]:
    """The classes of the configs that one of a class holds by default."""
    names = [name for name in _defaults(config_class) if name in config_class.sub_configs]
    if not names:
        return {}
    default = config_class()
    found = {name: getattr(default, name) for name in names}
    return {name: type(value) for name, value in found.items() if isinstance(value, PreTrainedConfig)}


def _shrunk(name: str, value: int) -> int:
    small = next((small for pattern, small in _COMPILED if pattern.fullmatch(name)), value)
    is_id = name.endswith(("_id", "_index"))
    return small if is_id and value >= 0 else min(small, value)
