"""Explanations of a classifier's answers: what each word, neuron and block of the backbone added to them."""

from .attribution import ExplanationError
from .cards import NeuronCard, NeuronCards, TextExample, WordExample, neuron_cards
from .explaining import explain, token_features
from .result import Contributions, Explanation, Explanations, Feature, Neuron, View
from .words import Token, Word

__all__ = [
    "Contributions",
    "Explanation",
    "ExplanationError",
    "Explanations",
    "Feature",
    "Neuron",
    "NeuronCard",
    "NeuronCards",
    "TextExample",
    "Token",
    "View",
    "Word",
    "WordExample",
    "explain",
    "neuron_cards",
    "token_features",
]
