"""What is remembered of a tokenizer, so that another one is noticed before it predicts nonsense."""

from __future__ import annotations

import hashlib
import json
import warnings
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from .errors import TokenizerMismatchError


class Vocabulary(NamedTuple):
    """Number of tokens, highest id, and SHA-256 of tokens and ids."""

    size: int
    highest: int
    digest: str


_known: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, Vocabulary]] = WeakKeyDictionary()
_SAMPLE = ("Spin a long Yarn, naïvely: 42 times!", "Then rest.")


def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """What is known of a tokenizer's vocabulary. Reckoned once, and anew when tokens were added: it costs more than a
    short text's prediction.
    """
    length, known = _known.get(tokenizer, (None, None))
    if known is None or length != len(tokenizer):
        tokens = tokenizer.get_vocab()
        known = Vocabulary(len(tokens), max(tokens.values(), default=0), _sha256(sorted(tokens.items())))
        _known[tokenizer] = (len(tokenizer), known)
    return known


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Vocabulary (its size and SHA-256), special tokens, and the ids of a sample pair (SHA-256).

    The sample tells of lower-casing, splitting, and which special tokens are put where. The pad token is left out,
    since padding is masked.
    """
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    special.pop("pad_token", None)
    vocabulary = vocabulary_of(tokenizer)
    return {
        "size": vocabulary.size,
        "vocabulary": vocabulary.digest,
        "special_tokens": special,
        "sample": _sha256(list(tokenizer(*_SAMPLE)["input_ids"])),
    }


def check_same_tokenizer(tokenizer: PreTrainedTokenizerBase, known: dict[str, Any] | None) -> None:
    """Compare a tokenizer with the one a classifier was calibrated with; ``known`` is from its config.

    Another way of splitting or of placing special tokens only warns, since versions of a tokenizer's code may differ.

    Raises:
        TokenizerMismatchError: for another vocabulary, whose ids mean other tokens.
    """
    if known is None:
        return
    found = tokenizer_fingerprint(tokenizer)
    advice = 'Load the one saved beside the classifier: AutoTokenizer.from_pretrained("the classifier\'s folder").'
    if found["vocabulary"] != known.get("vocabulary"):
        raise TokenizerMismatchError(
            f"The vocabulary of this tokenizer ({found['size']:,} tokens) is not the one that the classifier was "
            f"calibrated with ({known.get('size'):,} tokens), so that its ids mean other tokens. {advice}"
        )
    before = known.get("special_tokens", {})
    names = sorted({*before, *found["special_tokens"]})
    differ = [
        f"{name} is {found['special_tokens'].get(name)!r}, was {before.get(name)!r}"
        for name in names
        if found["special_tokens"].get(name) != before.get(name)
    ]
    if not differ and found["sample"] != known.get("sample"):
        differ = ["it splits or frames a sample text in another way (lower-casing, special tokens added or not)"]
    if differ:
        warnings.warn(
            f"This tokenizer is not as it was when the classifier was calibrated: {'; '.join(differ)}. {advice}",
            stacklevel=3,
        )


def _sha256(values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
