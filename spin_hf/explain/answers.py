"""What the page shows of one text: the answer, its words, and how the layers come to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..modeling_spin import SpinForSequenceClassification
from ..prediction import batches, encode_for, predict, probabilities_of
from .explaining import explain
from .heat import Heat, heat_of
from .page import render_part
from .result import Explanation

_MOST_LABELS = 5  # that bars are drawn for
_LONGEST = 20_000  # characters of a text whose words are coloured


@dataclass(frozen=True)
class Step:
    """What one exit says of a text: its depth, eta and size, and a number for each label."""

    depth: int
    eta: float
    neurons: int
    score: float
    values: tuple[float, ...]


@dataclass(frozen=True)
class Answer:
    """One text as a classifier reads it.

    Attributes:
        explanation: the parts of its logits.
        row: label, labels or value, and the scores, as ``predict`` gives them.
        steps: of every exit; none without exits.
        blocks: of the whole backbone that the classifier keeps.
    """

    explanation: Explanation
    row: dict[str, Any]
    steps: tuple[Step, ...]
    blocks: int

    @property
    def regression(self) -> bool:
        return "value" in self.row

    @property
    def values(self) -> tuple[float, ...]:
        """Probability of each label, or the number."""
        return tuple(map(float, self.explanation.probabilities))

    @property
    def label(self) -> str:
        """The label that words are shown for at first: the surest one."""
        return self.explanation.label

    @property
    def headline(self) -> str:
        """The answer in a few words."""
        if self.regression:
            return f"{self.row['value']:.4g}"
        if self.row.get("abstained"):
            return "not sure enough to say"
        return self.row["label"] if "label" in self.row else ", ".join(self.row["labels"]) or "none of the labels"

    def heat(self, label: str) -> Heat:
        """What the words add to one label."""
        return heat_of(self.explanation, label, longest=_LONGEST)

    def words_html(self, label: str) -> str:
        """The words with their colours, as HTML."""
        return render_part("answer.html.jinja", "words_of", self.heat(label))

    def layers_html(self, label: str) -> str:
        """How the answer grows from block to block, as HTML."""
        number = self.explanation.reading.label(label)
        by_block = self.explanation.by("block")
        parts = [(int(b), float(v)) for b, v in zip(by_block.keys, by_block.values[:, number], strict=True)]
        return render_part(
            "answer.html.jinja",
            "layers_of",
            label,
            self._leading(),
            self._by_depth(),
            parts,
            float(self.explanation.base[number]),
            self.regression,
            self.explanation.names,
        )

    def change_html(self, depth: float, eta: float, heat: Heat) -> str:
        """What another depth and eta would say, beside what the classifier says, and by which words, as HTML."""
        return render_part(
            "answer.html.jinja",
            "change_of",
            step_at(self.steps, depth, eta),
            heat,
            self.values,
            self._leading(),
            self.explanation.names,
            self.blocks,
            self.regression,
        )

    def _leading(self) -> list[int]:
        """The labels that bars are drawn for: the likeliest."""
        return list(map(int, np.argsort(-self.explanation.probabilities, kind="stable")[:_MOST_LABELS]))

    def _by_depth(self) -> list[Step]:
        """Of each depth the exit that keeps most, shallowest first."""
        best: dict[int, Step] = {}
        for step in sorted(self.steps, key=lambda step: step.eta):
            best[step.depth] = step
        return [best[depth] for depth in sorted(best)]


def step_at(steps: Sequence[Step], depth: float, eta: float) -> Step:
    """The exit that two sliders stand for: the deepest within the depth, of these the one that keeps most within eta.

    Where none is within, the next one above.
    """
    depths = sorted({step.depth for step in steps})
    at = max((d for d in depths if d <= depth), default=depths[0])
    own = sorted((step for step in steps if step.depth == at), key=lambda step: step.eta)
    return max((step for step in own if step.eta <= eta + 1e-9), key=lambda step: step.eta, default=own[0])


class Answerer:
    """A classifier with its tokenizer, ready to answer texts for the page.

    Args:
        model: a calibrated classifier.
        tokenizer: its own.
    """

    def __init__(self, model: SpinForSequenceClassification, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer

    @property
    def names(self) -> list[str]:
        """Of the labels."""
        return [self.model.config.id2label[i] for i in range(self.model.config.num_labels)]

    @property
    def pairs(self) -> bool:
        """Whether it reads pairs of texts."""
        return bool(self.model.config.text_pairs)

    @property
    def regression(self) -> bool:
        return bool(self.model.config.problem_type == "regression")

    @property
    def depths(self) -> list[int]:
        """Of the exits."""
        return sorted({entry["depth"] for entry in self.model.config.exits})

    @property
    def etas(self) -> list[float]:
        """Of the exits."""
        return sorted({entry["eta"] for entry in self.model.config.exits})

    def answer(self, text: str, pair: str | None = None, *, min_confidence: float | None = None) -> Answer:
        """Read one text, or a pair.

        Raises:
            CalibrationError: for a text that doesn't fit, as :func:`spin_hf.prediction.predict` does.
        """
        second = [pair or ""] if self.pairs else None
        row = predict(self.model, self.tokenizer, [text], second, min_confidence=min_confidence).row(0)
        (explanation,) = explain(self.model, self.tokenizer, [text], second)
        return Answer(explanation, row, self._steps(text, second), self.model.spin.depth)

    def heat_at(self, answer: Answer, depth: float, eta: float, label: str) -> Heat:
        """What the words of an answer's text add to a label by the exit that two sliders stand for."""
        number = answer.steps.index(step_at(answer.steps, depth, eta))
        text, pair = answer.explanation.text, answer.explanation.pair
        (found,) = explain(self.model, self.tokenizer, [text], None if pair is None else [pair], exit=number)
        return heat_of(found, label, longest=_LONGEST)

    @torch.no_grad()
    def _steps(self, text: str, second: list[str] | None) -> tuple[Step, ...]:
        """All exits, from one forward."""
        entries = self.model.config.exits
        if not entries:
            return ()
        encoded = encode_for(self.model, self.tokenizer, [text], second)
        ((_, batch),) = batches(self.model, self.tokenizer, encoded, 1)
        logits = self.model(**batch, output_exits=True).exit_logits[0].cpu()
        values = probabilities_of(logits, str(self.model.config.problem_type)).tolist()
        return tuple(
            Step(entry["depth"], entry["eta"], entry["num_features"], entry["score"], tuple(own))
            for entry, own in zip(entries, values, strict=True)
        )
