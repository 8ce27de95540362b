"""Backbones with random weights in the shapes of real ones: time and size don't depend on what the weights say."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from transformers import AutoModel, BertConfig, GPT2Config, LlamaConfig, PreTrainedModel

from spin_hf import SpinForSequenceClassification
from spin_hf.attention import ATTENTION
from spin_hf.features import FeatureGroup
from spin_hf.spin_model import SpinModel
from spin_hf.taps import Tap, tap_width

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
    "minilm": BertConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12),
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
        # A copy: the model that is cut to fewer blocks says so in its config.
        return AutoModel.from_config(copy.deepcopy(SHAPES[shape]), dtype=dtype, attn_implementation=attention).eval()


def make_classifier(
    model: SpinForSequenceClassification,
    depth: int,
    *,
    keep: int,
    count: int = 50,
    poolings: Sequence[str] = ("max", "mean"),
    kinds: Sequence[str] = ("ffn", "hidden"),
) -> SpinForSequenceClassification:
    """Have it read ``count`` random neurons of each tap up to ``depth``, each pooling, and run ``keep`` blocks."""
    spin, draw = model.spin, torch.Generator().manual_seed(0)
    taps = sorted((tap for tap in spin.taps if tap.block <= depth and tap.kind in kinds), key=lambda t: (t[1], t[0]))
    groups = []
    for tap in taps:
        for pooling in poolings:
            query = _query(spin, draw) if pooling == ATTENTION else None
            groups.append(FeatureGroup(tap, pooling, _chosen(spin, tap, count, draw), query))
    size = sum(len(group.neurons) for group in groups)
    spin.set_features(groups, torch.zeros(size), torch.ones(size), depth=keep)
    model.set_head(torch.randn(2, size, generator=draw) / size**0.5, torch.zeros(2))
    return model.eval()


def _query(spin: SpinModel, draw: torch.Generator) -> torch.Tensor:
    """Of token weights, which weigh the states between blocks."""
    width = spin.backbone.config.hidden_size
    return torch.randn(width, generator=draw) / width**0.5


def _chosen(spin: SpinModel, tap: Tap, count: int, draw: torch.Generator) -> torch.Tensor:
    width = tap_width(spin.backbone, spin.layout, tap)
    return torch.randperm(width, generator=draw)[:count].sort().values
