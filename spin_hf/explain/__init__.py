"""Explanations of a classifier's answers: what each word, neuron and block of the backbone added to them."""

from .ablation import ablated, random_neurons, salient_neurons, tap_means
from .attribution import ExplanationError
from .cards import NeuronCard, NeuronCards, TextExample, WordExample, neuron_cards
from .explaining import explain, token_features
from .faithfulness import Erasures, IntegratedGradients, erasure, integrated_gradients, word_scores
from .result import Contributions, Explanation, Explanations, Feature, Neuron, View
from .words import Token, Word

__all__ = [
    "Contributions",
    "Erasures",
    "Explanation",
    "ExplanationError",
    "Explanations",
    "Feature",
    "IntegratedGradients",
    "Neuron",
    "NeuronCard",
    "NeuronCards",
    "TextExample",
    "Token",
    "View",
    "Word",
    "WordExample",
    "ablated",
    "erasure",
    "explain",
    "integrated_gradients",
    "neuron_cards",
    "random_neurons",
    "salient_neurons",
    "tap_means",
    "token_features",
    "word_scores",
]
