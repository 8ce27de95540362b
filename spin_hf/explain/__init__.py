"""Explanations of a classifier's answers: what each word, neuron and block of the backbone added to them."""

from .explaining import ExplanationError, explain, token_features
from .result import Contributions, Explanation, Explanations, Feature, Neuron, View
from .words import Token, Word

__all__ = [
    "Contributions",
    "Explanation",
    "ExplanationError",
    "Explanations",
    "Feature",
    "Neuron",
    "Token",
    "View",
    "Word",
    "explain",
    "token_features",
]
