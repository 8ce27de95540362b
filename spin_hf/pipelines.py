"""A text-classification pipeline that sorts texts by length before it batches them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from transformers import TextClassificationPipeline

from .calibration.extraction import pad, plan_batches
from .prediction import MOST_PADDING

_AT_ONCE = 4096  # texts that are sorted together
_BATCH_TOKENS = 4096  # padded tokens of a batch, as predict() has them


class SpinTextClassificationPipeline(TextClassificationPipeline):
    """``pipeline("text-classification", model, pipeline_class=SpinTextClassificationPipeline)``.

    Answers as the stock pipeline does, in the order of the texts, and takes the same arguments and inputs: a text, a
    list, a generator, a ``Dataset``. But texts are tokenized together and batched with others of about their length: of
    a stream 4,096 at a time. Without ``batch_size`` a batch holds up to 4,096 tokens and hardly any padding; with it,
    so many texts. ``num_workers`` is not needed. Other classifiers are served too if they have a pad token.
    """

    def get_iterator(
        self,
        inputs: Any,
        num_workers: int,
        batch_size: int,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> Iterator[Any]:
        """The answers, in the order of the texts."""
        # A Dataset of torch may end by its length alone.
        rest = iter(inputs) if hasattr(inputs, "__iter__") else (inputs[i] for i in range(len(inputs)))
        while some := list(islice(rest, _AT_ONCE)):
            encoded = self._encode(some, preprocess_params)
            lengths = [len(ids) for ids in encoded["input_ids"]]
            answers: list[Any] = [None] * len(some)
            for rows in _plan(lengths, batch_size):
                batch = {
                    name: pad([column[row] for row in rows], (self.tokenizer.pad_token_id or 0) * (name == "input_ids"))
                    for name, column in encoded.items()
                }
                logits = self.forward(batch, **forward_params)["logits"]
                for place, row in enumerate(rows):
                    answers[row] = self.postprocess({"logits": logits[place : place + 1]}, **postprocess_params)
            yield from answers

    def _encode(self, inputs: list[Any], options: dict[str, Any]) -> dict[str, list[list[int]]]:
        """Columns of the tokenizer, a list for each text; the mask among them, since padding is added here."""
        options = {"return_attention_mask": True, **options}
        if all(isinstance(each, str) for each in inputs):
            return dict(self.tokenizer(inputs, **options))
        if all(isinstance(each, dict) and each.keys() == inputs[0].keys() for each in inputs):
            return dict(self.tokenizer(**{name: [each[name] for each in inputs] for name in inputs[0]}, **options))
        found = [self.preprocess(each, **options) for each in inputs]
        return {name: [each[name][0].tolist() for each in found] for name in found[0]}


def _plan(lengths: list[int], batch_size: int) -> list[list[int]]:
    """Rows of each batch, the longest texts first; ``batch_size`` 1, the stock pipeline's default, leaves it to us."""
    if batch_size <= 1:
        return plan_batches(lengths, _BATCH_TOKENS, most_padding=MOST_PADDING)
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
