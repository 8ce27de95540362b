"""The model types that read text, from transformers' own mappings."""

from __future__ import annotations

import pytest
from transformers.models.auto import modeling_auto

MAPPINGS = ("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SEQUENCE_CLASSIFICATION")


def model_types() -> list[str]:
    """Every model type that one of the mappings names."""
    names = (getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES") for mapping in MAPPINGS)
    return sorted({model_type for mapping in names for model_type in mapping})


def needs(model_type: str) -> pytest.MarkDecorator:
    """Skip a test where this version of transformers does not know a type yet."""
    return pytest.mark.skipif(model_type not in modeling_auto.MODEL_MAPPING_NAMES, reason="a newer model type")
