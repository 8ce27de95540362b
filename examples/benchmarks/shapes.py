"""Backbones with random weights in the shapes of real ones: time and size don't depend on what the weights say."""

from __future__ import annotations

import torch
from transformers import AutoModel, GPT2Config, LlamaConfig, PreTrainedModel

SHAPES = {
    "llama-1b": LlamaConfig(  # Llama 3.2 1B
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=4096,
    ),
    "gpt2-xl": GPT2Config(n_embd=1600, n_layer=48, n_head=25),
    "tiny": LlamaConfig(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    ),
}


def make(shape: str, *, dtype: torch.dtype, device: str, attention: str = "sdpa") -> PreTrainedModel:
    """A backbone of one of the :data:`SHAPES`, its weights drawn with seed 0."""
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModel.from_config(SHAPES[shape], dtype=dtype, attn_implementation=attention).eval()
