"""Tiny models, a tokenizer and texts, made in memory."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

from spin_hf import SpinForSequenceClassification
from spin_hf.attention import source
from spin_hf.exits import Exit
from spin_hf.features import FeatureGroup
from spin_hf.pooling import POOLINGS
from spin_hf.spin_model import SpinModel
from spin_hf.taps import Tap, tap_width

GOOD = ("good", "great", "lovely", "superb", "charming", "witty", "bright", "moving")
BAD = ("bad", "awful", "dull", "boring", "clumsy", "tired", "grim", "hollow")
NEUTRAL = tuple(
    [
        "the",
        "a",
        "film",
        "movie",
        "plot",
        "actor",
        "scene",
        "story",
        "it",
        "was",
        "is",
        "with",
        "and",
        "of",
        "in",
        "this",
        "that",
        "an",
        "end",
        "start",
        "music",
        "camera",
        "hour",
        "year",
        "script",
        "cast",
        "crew",
        "town",
        "river",
        "night",
        "day",
        "city",
        "house",
        "road",
        "train",
        "letter",
    ]
)
VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *GOOD, *BAD, *NEUTRAL)
EVERY_POOLING = ("attention", *POOLINGS)
SIZE = 64  # ids and positions that every backbone here takes


def make_tokenizer() -> hf.PreTrainedTokenizerFast:
    """One token per word, ``[CLS] text [SEP]`` or ``[CLS] text [SEP] pair [SEP]``."""
    ids = {word: index for index, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=SIZE,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def make_sentiment_rows(count: int = 80, seed: int = 0) -> dict[str, list]:
    """Texts of neutral words and one to three words of the label's sentiment; the labels alternate."""
    choose = random.Random(seed)
    texts = []
    for row in range(count):
        words = choose.choices(NEUTRAL, k=choose.randint(2, 9))
        words += choose.choices(GOOD if row % 2 else BAD, k=choose.randint(1, 3))
        choose.shuffle(words)
        texts.append(" ".join(words))
    return {"text": texts, "label": [row % 2 for row in range(count)]}


_SMALL = {
    "vocab_size": SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": SIZE,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
_GROUPED = {**_SMALL, "num_key_value_heads": 2}

CONFIGS: dict[str, Callable[[], hf.PreTrainedConfig]] = {
    "bert": lambda: hf.BertConfig(**_SMALL),
    "albert": lambda: hf.AlbertConfig(**_SMALL, embedding_size=16),
    "distilbert": lambda: hf.DistilBertConfig(
        vocab_size=SIZE, dim=32, n_layers=3, n_heads=4, hidden_dim=48, max_position_embeddings=SIZE
    ),
    "roberta": lambda: hf.RobertaConfig(
        **{**_SMALL, "max_position_embeddings": SIZE + 1, "type_vocab_size": 2, "num_hidden_layers": 4}
    ),
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=SIZE, n_embd=32, n_layer=4, n_head=4, n_inner=48, n_positions=SIZE, bos_token_id=2, eos_token_id=3
    ),
    "llama": lambda: hf.LlamaConfig(**_GROUPED),
    "gemma": lambda: hf.GemmaConfig(**_GROUPED, head_dim=12),
    "qwen3": lambda: hf.Qwen3Config(
        **{**_GROUPED, "num_hidden_layers": 4},
        head_dim=12,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=2,
    ),
    "t5": lambda: hf.T5Config(
        vocab_size=SIZE, d_model=32, num_layers=3, num_heads=4, d_kv=8, d_ff=48, decoder_start_token_id=0
    ),
}


def make_backbone(name: str, *, seed: int = 0, **config: object) -> hf.PreTrainedModel:
    """A random backbone, in eval. Its weights are large enough for padding or dtype mistakes to show in the logits.

    Args:
        name: a key of ``CONFIGS``.
        seed: of the weights.
        **config: fields of its config to set otherwise.
    """
    made = CONFIGS[name]()
    for field, value in config.items():
        setattr(made, field, value)
    auto = hf.AutoModelForTextEncoding if made.is_encoder_decoder else hf.AutoModel
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = auto.from_config(made)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


def calibrated(
    backbone: hf.PreTrainedModel,
    *,
    taps: Sequence[str] | None = None,
    poolings: Sequence[str] = EVERY_POOLING,
    count: int = 3,
    depth: int | None = None,
    seed: int = 0,
    **kwargs: object,
) -> SpinForSequenceClassification:
    """Wrap a backbone and give it random features and a random head.

    Args:
        backbone: used as it is, not copied.
        taps: names of the taps to read; all up to ``depth`` by default.
        poolings: for each tap.
        count: neurons per tap and pooling.
        depth: blocks to keep; all by default.
        seed: of the choice.
        **kwargs: for ``from_backbone``.
    """
    model = SpinForSequenceClassification.from_backbone(backbone, **kwargs)
    spin = model.spin
    depth = depth or spin.depth
    generator = torch.Generator().manual_seed(seed)
    chosen = [tap for tap in spin.taps if tap.block <= depth] if taps is None else list(map(Tap.parse, taps))
    groups = [
        FeatureGroup(
            tap,
            pooling,
            torch.randperm(tap_width(spin.backbone, spin.layout, tap), generator=generator)[:count].sort().values,
            random_query(spin, tap, generator) if pooling == "attention" else None,
        )
        for tap in sorted(chosen, key=lambda tap: (tap.block, tap.kind))
        for pooling in sorted(poolings)
    ]
    features = sum(len(group.neurons) for group in groups)
    mean = torch.randn(features, generator=generator)
    scale = torch.rand(features, generator=generator) + 0.5
    labels = model.config.num_labels
    weight, bias = torch.randn(labels, features, generator=generator), torch.randn(labels, generator=generator)
    spin.set_features(groups, mean, scale, depth=depth)
    model.set_head(weight / features**0.5, bias)
    return model


def random_query(spin: SpinModel, tap: Tap, generator: torch.Generator) -> Tensor:
    """That tells tokens apart, but leaves none alone."""
    width = tap_width(spin.backbone, spin.layout, source(tap))
    return 2 * torch.randn(width, generator=generator) / width**0.5


def with_exits(model: SpinForSequenceClassification, *, count: int = 5, seed: int = 1) -> SpinForSequenceClassification:
    """Give a classifier random exits: two for each depth, the first of them with every other feature of the second."""
    spin, generator = model.spin, torch.Generator().manual_seed(seed)
    groups = []
    for tap in sorted(spin.taps, key=lambda tap: (tap.block, tap.kind)):
        for pooling in ("attention", "max", "mean"):
            neurons = torch.randperm(tap_width(spin.backbone, spin.layout, tap), generator=generator)[:count]
            query = random_query(spin, tap, generator) if pooling == "attention" else None
            groups.append(FeatureGroup(tap, pooling, neurons.sort().values, query))
    blocks = torch.tensor([group.tap.block for group in groups for _ in group.neurons])
    exits = []
    for depth in range(1, spin.depth + 1):
        for step in (2, 1):
            columns = (blocks <= depth).nonzero()[:, 0][::step]
            weight = torch.randn(model.config.num_labels, len(columns), generator=generator) / len(columns) ** 0.5
            bias = torch.randn(model.config.num_labels, generator=generator)
            exits.append(Exit(depth, 1 / step, 0.5, 1.0 + depth / 7, columns, weight, bias))
    mean, scale = torch.randn(len(blocks), generator=generator), torch.rand(len(blocks), generator=generator) + 0.5
    model.set_exits(groups, mean, scale, exits)
    return model


def make_batch(rows: int = 4, tokens: int = 9, *, seed: int = 0) -> dict[str, Tensor]:
    """Right-padded ids and mask of rows of different lengths; the first row is full, the last has one token."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.linspace(tokens, 1, rows).long()
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    ids = torch.randint(4, SIZE, (rows, tokens), generator=generator)
    return {"input_ids": ids * mask, "attention_mask": mask}
