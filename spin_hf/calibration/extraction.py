"""Texts through the backbone once, every tap pooled inside its hook, into the store."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..attention import ATTENTION, Queries, sources
from ..layout import PositionsError
from ..modeling_spin import SpinForSequenceClassification
from ..pooling import pool
from ..spin_model import SpinModel
from ..taps import Tap, model_device
from ..windows import Windows
from .behind import Arriving, Behind
from .errors import CalibrationError, EmptyTextError, PadTokenError, TokenizerMismatchError
from .fingerprint import vocabulary_of
from .halving import in_halves, is_out_of_memory, no_room
from .one_pass import TokenWeightsInOnePass, pool_prefix
from .store import FORMAT, FeatureStore
from .tokens import Tokens

_TEXTS_AT_ONCE = 1000  # a tokenizer's own record of a text takes a hundred bytes a token
_NO_LIMIT = 10**6  # tokenizers without a limit report an absurdly large one
_THREADS = min(8, os.cpu_count() or 1)  # that hash weights
_PIECE = 2**23  # values of a weight that a thread hashes at once: an embedding alone would keep the others waiting
_PROVENANCE = ("_name_or_path", "architectures", "dtype", "transformers_version")  # no feature depends on these


@dataclass(frozen=True)
class Encoded:
    """Token ids of every text, and how many texts were cut to ``max_length`` or are longer than a window."""

    input_ids: Sequence[list[int]]
    token_type_ids: Sequence[list[int]] | None
    max_length: int | None
    truncated: int
    windows: Windows | None = None

    @property
    def windowed(self) -> int:
        return 0 if self.windows is None else sum(length > self.windows.size for length in self.lengths)

    def samples(self, count: int) -> list[list[int]]:
        """Some of the longest texts, no longer than a window."""
        longest = np.argsort(-np.asarray(self.lengths), kind="stable")[:count].tolist()
        return [self.input_ids[row][: None if self.windows is None else self.windows.size] for row in longest]

    @functools.cached_property
    def lengths(self) -> list[int]:
        return self.input_ids.lengths if isinstance(self.input_ids, Tokens) else list(map(len, self.input_ids))


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: SpinForSequenceClassification) -> None:
    """Raise before any work if the tokenizer can't serve this model.

    Raises:
        TokenizerMismatchError: if it is no tokenizer, or has more tokens than the backbone has embeddings.
        PadTokenError: without a pad token.
    """
    if not hasattr(tokenizer, "pad_token_id"):
        found = "None" if tokenizer is None else f"a {type(tokenizer).__name__}"
        name = model.config.backbone_id or "the backbone's name"
        raise TokenizerMismatchError(
            f"The tokenizer is {found}. Pass the backbone's own: AutoTokenizer.from_pretrained({name!r})."
        )
    if tokenizer.pad_token_id is None:
        raise PadTokenError(
            "The tokenizer has no pad token, so texts of different lengths could not be batched. "
            "Padding is masked out, so any token will do: tokenizer.pad_token = tokenizer.eos_token"
        )
    rows = _embedding_rows(model.spin)
    highest = vocabulary_of(tokenizer).highest
    if rows is not None and highest >= rows:
        raise TokenizerMismatchError(
            f"The tokenizer's ids go up to {highest}, but the backbone embeds only {rows} tokens. "
            "Load tokenizer and backbone from the same place."
        )


def window(tokenizer: PreTrainedTokenizerBase, model: SpinForSequenceClassification) -> int | None:
    """Tokens that both the tokenizer and the backbone's positions allow, or ``None`` where neither sets a limit."""
    config = model.spin.backbone.config.get_text_config()
    limits = [tokenizer.model_max_length, getattr(config, "max_position_embeddings", None)]
    embeddings = getattr(getattr(model.spin.backbone, "embeddings", None), "position_embeddings", None)
    offset = getattr(embeddings, "padding_idx", None)  # RoBERTa's positions start behind its padding index
    if offset is not None and limits[1]:
        limits[1] -= offset + 1
    known = [int(limit) for limit in limits if limit and 0 < limit < _NO_LIMIT]
    return min(known) if known else None


def encode(
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    pairs: list[str] | None,
    max_length: int | None,
    windows: Windows | None = None,
) -> Encoded:
    """Tokenize, cutting at ``max_length`` tokens and counting the cuts; whole texts where they are read in windows.

    Raises:
        EmptyTextError: if no text has a token.
    """
    if windows is not None:
        max_length = None
    ids, types = Tokens(), Tokens()
    truncated, some = 0, False
    for first in range(0, len(texts), _TEXTS_AT_ONCE):
        part = texts[first : first + _TEXTS_AT_ONCE], None if pairs is None else pairs[first : first + _TEXTS_AT_ONCE]
        found = tokenizer(*part, truncation=False, verbose=False)
        longer = 0 if max_length is None else sum(len(row) > max_length for row in found["input_ids"])
        if longer:
            found = tokenizer(*part, truncation=True, max_length=max_length)
        truncated += longer
        some = some or any(map(len, found["input_ids"]))
        ids.extend(row or [tokenizer.pad_token_id] for row in found["input_ids"])
        types.extend(row or [0] for row in found.get("token_type_ids", ()))
    if not some:
        raise EmptyTextError("No text has a single token.")
    return Encoded(ids, types if len(types) else None, max_length, truncated, windows)


def plan_batches(
    lengths: Sequence[int], batch_tokens: int, batching: str = "padded", *, most_padding: float = float("inf")
) -> list[list[int]]:
    """Rows grouped by length, longest first, each batch within ``batch_tokens`` padded tokens (but at least one row).

    Args:
        lengths: tokens of each row.
        batch_tokens: most padded tokens of a batch.
        batching: see :mod:`spin_hf.batching`.
        most_padding: of a batch, as a share of its real tokens; few texts of many lengths would be mostly padding.

    A pure function of its arguments: resumed runs and other processes make the same batches, hence the same features.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    batches: list[list[int]] = []
    real = 0  # tokens of the last batch
    for row in order:
        longest = lengths[batches[-1][0]] if batches else 0
        together = batching == "padded" or (batching == "equal_length" and longest == lengths[row])
        padded, real = (len(batches[-1]) + 1) * longest if batches else 0, real + lengths[row]
        if batches and together and padded <= batch_tokens and padded - real <= most_padding * real:
            batches[-1].append(row)
        else:
            batches.append([row])
            real = lengths[row]
    return batches


def fingerprint(model: SpinModel, encoded: Encoded, taps: Sequence[Tap], poolings: Sequence[str], budget: int) -> str:
    """Hash of all that the features depend on but how texts are put in batches, which is for :func:`cache.key_of`:
    tokens, weights, config, layout, taps, poolings, the batches' budget and dtype.
    """
    digest = hashlib.sha256()
    digest.update(repr((FORMAT, list(map(str, taps)), list(poolings), budget, str(model.backbone.dtype))).encode())
    settings = {name: value for name, value in model.backbone.config.to_dict().items() if name not in _PROVENANCE}
    digest.update(repr((model.layout, sorted(settings.items(), key=str))).encode())
    if encoded.windows is not None:
        digest.update(repr(encoded.windows).encode())
    weights = model.backbone.state_dict()
    digest.update(repr([(name, tuple(weight.shape)) for name, weight in weights.items()]).encode())

    def pieces() -> Iterator[Tensor]:
        for name, weight in weights.items():
            here = _offloaded(model.backbone, name) if weight.is_meta else weight.detach()
            if not here.is_contiguous():
                here = here.cpu()  # to be copied there
            yield from here.reshape(-1).split(_PIECE)

    def hashed(piece: Tensor) -> bytes:
        return hashlib.sha256(piece.cpu().view(torch.uint8).numpy().data).digest()

    # hashlib lets other threads run meanwhile. Weights that lie elsewhere are fetched one module at a time, which a
    # pool's map would not do: it takes all pieces before the first is hashed.
    offloaded = any(weight.is_meta for weight in weights.values())
    with ThreadPoolExecutor(_THREADS) as pool:
        for own in (map if offloaded else pool.map)(hashed, pieces()):
            digest.update(own)
    for rows in (encoded.input_ids, encoded.token_type_ids):
        digest.update(repr(None if rows is None else len(rows)).encode())
        if rows is not None:
            tokens = rows if isinstance(rows, Tokens) else Tokens(rows)
            digest.update(np.asarray(tokens.lengths, dtype=np.int64).data)
            digest.update(tokens.flat.data)
    return digest.hexdigest()


@torch.no_grad()
def extract(
    model: SpinModel,
    encoded: Encoded,
    store: FeatureStore,
    numbers: Sequence[int],
    pad_token_id: int,
    advance: Callable[[int], Any],
    queries: Mapping[Tap, Tensor] | None = None,
) -> None:
    """Compute some batches of the store's plan and write them there, each while the next ones are computed. One that
    does not fit the device's memory is read in halves, down to single texts; the store keeps how many parts it took.

    Args:
        numbers: of the batches.
        advance: called with the number of tokens of each finished batch.
        queries: of the token weights of each tap, if they are pooled by attention.

    Raises:
        CalibrationError: for windows or token weights on a backbone that works on other positions than its tokens; with
            the first batch.
        DeviceMemoryError: where a text does not fit the device's memory even alone.
        NonFiniteFeaturesError: naming the tap that produced NaN or infinity.
        OutputFolderError: where the disk is full.
    """
    lengths = encoded.lengths
    taps = list(store.widths)
    poolings = dict.fromkeys(taps, store.poolings)
    model.eval()
    device = model_device(model)

    reduce = pool if encoded.windows else pool_prefix  # windows pool some tokens in their middle
    here = Queries({tap: query.to(device) for tap, query in (queries or {}).items()})
    start = functools.partial(PooledWhole, reduce, store.poolings, here)

    def run(rows: Sequence[int]) -> Arriving[Tap]:
        batch = pad([encoded.input_ids[row] for row in rows], pad_token_id)
        mask = (torch.arange(batch.shape[1]) < torch.tensor([lengths[row] for row in rows])[:, None]).long()
        types = None
        if encoded.token_type_ids is not None:
            types = _sent(pad([encoded.token_type_ids[row] for row in rows], 0), device)
        batch, mask = _sent(batch, device), _sent(mask, device)
        try:
            pooled = model.read_taps(poolings, start, mask, batch, types, windows=encoded.windows)
        except PositionsError as error:
            raise CalibrationError(str(error)) from error
        except (RuntimeError, MemoryError) as error:
            if len(rows) == 1 and is_out_of_memory(error):
                raise no_room(lengths[rows[0]], device, error) from error
            raise
        return Arriving({tap: pooled[tap] for tap in taps})

    def write(number: int, parts: list[Arriving[Tap]]) -> int:
        found = [part.arrays() for part in parts]
        arrays = {tap: np.concatenate([part[tap] for part in found], 1) for tap in taps} if found[1:] else found[0]
        store.write(number, arrays, parts=len(parts))
        return sum(lengths[row] for row in store.batches[number])

    with (
        model.hooked(list(dict.fromkeys((*taps, *sources(poolings))))),
        closing(store),
        Behind(write, advance) as written,
    ):
        for number in numbers:
            written(number, in_halves(store.batches[number].tolist(), run))


class PooledWhole:
    """Pools all neurons of the taps, of one forward.

    Args:
        reduce: pools ``(rows, tokens, neurons)`` by a mask and the names of poolings.
        poolings: of each neuron.
        queries: of the taps' token weights; none unless ``attention`` is one of the poolings.
        mask: of the tokens to pool.
    """

    def __init__(
        self,
        reduce: Callable[[Tensor, Tensor, Sequence[str]], Tensor],
        poolings: Sequence[str],
        queries: Queries,
        mask: Tensor,
    ) -> None:
        self._reduce, self._poolings, self._mask = reduce, poolings, mask
        self._plain = [name for name in poolings if name != ATTENTION]
        self._wanted = {tap for taps in queries.served.values() for tap in taps}
        self._weights = TokenWeightsInOnePass(queries, mask)
        self._found: dict[Tap, list[Tensor]] = {}

    def read(self, tap: Tap, values: Tensor) -> None:
        self._weights.see(tap, values)
        if self._wanted and tap not in self._wanted:  # read for the token weights of others alone
            return
        found = list(self._reduce(values, self._mask, self._plain).unbind(1)) if self._plain else []
        if ATTENTION in self._poolings and tap in self._wanted:
            found.insert(self._poolings.index(ATTENTION), self._weights.pool([tap], [values])[0])
        self._found[tap] = found

    def finish(self) -> dict[Tap, list[Tensor]]:
        return self._found


def pad(rows: list[list[int]], value: int) -> Tensor:
    """Rows of ids as one tensor ``(rows, longest)``, filled on the right."""
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    found = np.full((len(rows), lengths.max()), value, dtype=np.int64)
    real = np.arange(found.shape[1]) < lengths[:, None]
    found[real] = np.fromiter(chain.from_iterable(rows), dtype=np.int64, count=lengths.sum())
    return torch.from_numpy(found)


def _sent(values: Tensor, device: torch.device) -> Tensor:
    """On the device, without waiting for what it does."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def _offloaded(backbone: nn.Module, name: str) -> Tensor:
    """A weight that a ``device_map`` keeps in memory or on disk between its uses."""
    from accelerate.utils import align_module_device

    owner, _, own = name.rpartition(".")
    module = backbone.get_submodule(owner)
    with align_module_device(module):
        weight: Tensor = getattr(module, own).detach().cpu()
    return weight


def _embedding_rows(model: SpinModel) -> int | None:
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)
    except NotImplementedError:  # a backbone that embeds in a way of its own
        return None
    return None if weight is None else int(weight.shape[0])
