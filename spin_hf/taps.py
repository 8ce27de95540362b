"""Where activations are read: finding blocks and FFN neurons in a backbone by structure, and the hooks that read them.

Nothing here knows a model by name. A *block list* is an ``nn.ModuleList`` of equal modules; a block's *FFN down
projection* is a linear layer that ends in the model's hidden size and is fed by a linear layer of its own width. Where
structure can't tell, both can be given by hand, as dotted names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Kind = Literal["hidden", "ffn", "norm"]

_ATTENTION = re.compile("att", re.IGNORECASE)  # covers attn, attention, SelfAttention; a name hint, see find_layout


class TapError(RuntimeError):
    """A tap was not found, or was not read exactly once."""


class Tap(NamedTuple):
    """One place where activations are read. ``str(tap)`` is its name in configs and results, such as ``ffn.3``.

    ``hidden.0`` is the input of the first block (the embeddings), ``hidden.b`` the output of block ``b``, ``ffn.b`` the
    neurons of block ``b`` (the input of its down projection) and ``norm.b`` the final norm's output after the last
    block ``b``.
    """

    kind: Kind
    block: int

    def __str__(self) -> str:
        return f"{self.kind}.{self.block}"

    @classmethod
    def parse(cls, name: str) -> Tap:
        kind, _, block = name.partition(".")
        if kind not in ("hidden", "ffn", "norm") or not block.isdigit():
            raise TapError(f"{name!r} is not a tap. A tap reads like 'hidden.0', 'ffn.3' or 'norm.12'.")
        return cls(kind, int(block))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Layout:
    """Dotted names of the places where a backbone can be tapped. Stored in the config, so it is searched for once.

    ``blocks`` is the block list inside the backbone, ``ffn`` the down projection inside a block (or ``None``), ``norm``
    the final norm inside the backbone (or ``None``).
    """

    blocks: str
    ffn: str | None
    norm: str | None

    def to_dict(self) -> dict[str, str | None]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, str | None]) -> Layout:
        return cls(str(values["blocks"]), values["ffn"], values["norm"])

    def block_list(self, backbone: nn.Module) -> nn.ModuleList:
        """The backbone's blocks. Raises :class:`TapError` where there are none under that name."""
        found = _submodule(backbone, self.blocks)
        if not isinstance(found, nn.ModuleList) or not len(found):
            raise TapError(
                f"{type(backbone).__name__} has no list of blocks at {self.blocks!r}. "
                f'Lists found: {_describe(_module_lists(backbone))}. Name one with blocks="...".'
            )
        return found

    def down_projection(self, block: nn.Module) -> nn.Module | None:
        return None if self.ffn is None else _submodule(block, self.ffn)

    def taps(self, backbone: nn.Module) -> list[Tap]:
        """Every tap of the backbone, from the embeddings up."""
        blocks = self.block_list(backbone)
        found = [Tap("hidden", 0)]
        for number, block in enumerate(blocks, 1):
            if self.down_projection(block) is not None:
                found.append(Tap("ffn", number))
            found.append(Tap("hidden", number))
        if self.norm is not None:
            found.append(Tap("norm", len(blocks)))
        return found


def find_layout(backbone: nn.Module, *, blocks: str | None = None, ffn: str | None = None) -> Layout:
    """Find blocks, FFN down projections and the final norm of a backbone by structure.

    Blocks: the longest ``nn.ModuleList`` of modules of one class that is not itself inside a block. Down projection: of
    the block's linear layers outside attention (modules with ``att`` in their name: structure alone cannot tell an
    attention output from a down projection where heads are wider than the model), the last that maps some width to the
    hidden size and whose width another linear layer produces from the hidden size, plainly or doubled by a gate.

    Args:
        backbone: any ``PreTrainedModel`` without a task head.
        blocks: dotted name of the block list, instead of searching.
        ffn: dotted name of the down projection inside a block, instead of searching.

    Raises:
        TapError: if nothing fits; the message lists the candidates.
    """
    lists = _module_lists(backbone)
    if blocks is None:
        if not lists:
            raise TapError(
                f"No blocks found in {type(backbone).__name__}: it holds no nn.ModuleList of equal modules. "
                f"Its parts: {', '.join(name for name, _ in backbone.named_children())}. "
                'Name the list of its transformer layers with blocks="encoder.layers".'
            )
        blocks = max(lists, key=lambda name: len(lists[name]))
    layout = Layout(blocks, None, _final_norm(backbone, blocks))
    first = layout.block_list(backbone)[0]
    if ffn is not None:
        if _submodule(first, ffn) is None:
            candidates = [name for name, module in first.named_modules() if _shape(module)]
            raise TapError(
                f"The blocks of {type(backbone).__name__} have no module {ffn!r}. "
                f'Linear layers in a block: {", ".join(candidates)}. Name one of them with ffn="...".'
            )
        return Layout(blocks, ffn, layout.norm)
    return Layout(blocks, _find_ffn(first, _hidden_size(backbone)), layout.norm)


class _Recording:
    """What one forward reads: the callback, and how often each tap was seen."""

    def __init__(self, read: Callable[[Tap, Tensor], None]) -> None:
        self.read = read
        self.seen: dict[Tap, int] = {}


# One recording at a time in each thread and task. Hooks look it up here, so that they hold no reference to a model:
# copies and threads stay right, and calls outside a recording (checkpoint recomputation) are ignored.
_recording: ContextVar[_Recording | None] = ContextVar("spin_hf_recording", default=None)


@contextmanager
def record(taps: Sequence[Tap], read: Callable[[Tap, Tensor], None]) -> Iterator[None]:
    """Call ``read(tap, activations (batch, tokens, width))`` for each tap of the forward run inside the context.

    Raises:
        TapError: after the forward, if a tap was read twice or not at all.
    """
    recording = _Recording(read)
    token = _recording.set(recording)
    try:
        yield
    finally:
        _recording.reset(token)
    for tap in taps:
        count = recording.seen.get(tap, 0)
        if count != 1:
            raise TapError(
                f"Tap {tap} was read {count} times in one forward, not once. The module is skipped, or shared and "
                "called again; name the right modules with blocks= and ffn=, or leave this kind out with kinds=."
            )


def attach(backbone: nn.Module, layout: Layout, taps: Sequence[Tap]) -> list[RemovableHandle]:
    """Put a reading hook on each tap. Idle outside :func:`record`. Returns the handles.

    Raises:
        TapError: for a tap the backbone does not have.
    """
    available = layout.taps(backbone)
    missing = [str(tap) for tap in taps if tap not in available]
    if missing:
        raise TapError(
            f"{type(backbone).__name__} has no {', '.join(missing)}. It has: {', '.join(map(str, available))}."
        )
    blocks = layout.block_list(backbone)
    handles = []
    for tap in taps:
        if tap == Tap("hidden", 0):
            handles.append(blocks[0].register_forward_pre_hook(_ReadInput(tap), with_kwargs=True))
        elif tap.kind == "ffn":
            down = layout.down_projection(blocks[tap.block - 1])
            assert down is not None  # layout.taps lists only blocks that have one
            handles.append(down.register_forward_pre_hook(_ReadInput(tap), with_kwargs=True))
        elif tap.kind == "hidden":
            handles.append(blocks[tap.block - 1].register_forward_hook(_ReadOutput(tap)))
        else:
            norm = _submodule(backbone, str(layout.norm))
            assert norm is not None
            handles.append(norm.register_forward_hook(_ReadOutput(tap)))
    return handles


class _Read:
    def __init__(self, tap: Tap) -> None:
        self.tap = tap

    def _deliver(self, value: Any) -> None:
        recording = _recording.get()
        if recording is None:
            return
        if not isinstance(value, Tensor) or value.dim() != 3:
            found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise TapError(f"Tap {self.tap} should see activations (batch, tokens, width), but it saw {found}.")
        recording.seen[self.tap] = recording.seen.get(self.tap, 0) + 1
        if not torch.is_grad_enabled():
            recording.read(self.tap, value)
            return
        # Inside a checkpointed block: what reading saves for backward is not recomputed, so the checkpoint must not
        # count it. Detached, since a graph that holds its own output would never be freed.
        with torch.autograd.graph.saved_tensors_hooks(Tensor.detach, _as_it_is):
            recording.read(self.tap, value)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


class _ReadInput(_Read):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._deliver(args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None)))


class _ReadOutput(_Read):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._deliver(output[0] if isinstance(output, (tuple, list)) else output)


def _submodule(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None


def _module_lists(backbone: nn.Module) -> dict[str, nn.ModuleList]:
    """Lists of modules of one class with weights, leaving out those inside a block of another."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in backbone.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            alike = len({type(item) for item in module}) == 1
            if alike and any(True for _ in module[0].parameters()):
                found[name] = module
    return found


def _describe(lists: dict[str, nn.ModuleList]) -> str:
    return ", ".join(f"{name} ({len(items)} x {type(items[0]).__name__})" for name, items in lists.items()) or "none"


def _shape(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear-like module: ``nn.Linear`` and quantised kin, or transformers' ``Conv1D``."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    if hasattr(module, "nx") and hasattr(module, "nf"):
        return int(module.nx), int(module.nf)  # type: ignore[arg-type]
    return None


def _find_ffn(block: nn.Module, hidden_size: int) -> str | None:
    linear = {
        name: shape
        for name, module in block.named_modules()
        if (shape := _shape(module)) is not None and not _ATTENTION.search(name)
    }
    produced = {out for into, out in linear.values() if into == hidden_size}
    fits = [
        name
        for name, (into, out) in linear.items()
        if out == hidden_size and (into in produced - {hidden_size} or 2 * into in produced)
    ]
    if not fits:  # an FFN as wide as the model: the last of at least two square layers
        square = [name for name, shape in linear.items() if shape == (hidden_size, hidden_size)]
        fits = square if len(square) > 1 else []
    return fits[-1] if fits else None


def _hidden_size(backbone: nn.Module) -> int:
    config = backbone.config.get_text_config()  # type: ignore[union-attr,operator]
    size = getattr(config, "hidden_size", None)
    if size is None:
        raise TapError(
            f"The config of {type(backbone).__name__} names no hidden_size, so its FFN can't be recognised. "
            'Name the down projection inside a block with ffn="...".'
        )
    return int(size)


def _final_norm(backbone: nn.Module, blocks: str) -> str | None:
    """The norm that stands beside the block list and after it."""
    parent_name, _, own_name = blocks.rpartition(".")
    siblings = (
        list(backbone.get_submodule(parent_name).named_children()) if parent_name else list(backbone.named_children())
    )
    names = [name for name, _ in siblings]
    if own_name not in names:
        return None
    for name, module in siblings[names.index(own_name) + 1 :]:
        if "norm" in type(module).__name__.lower() and "emb" not in name:  # BART lists its embeddings' norm last
            return f"{parent_name}.{name}" if parent_name else name
    return None


def tap_width(backbone: nn.Module, layout: Layout, tap: Tap) -> int:
    """Number of neurons of a tap."""
    if tap.kind != "ffn":
        return _hidden_size(backbone)
    down = layout.down_projection(layout.block_list(backbone)[tap.block - 1])
    shape = _shape(down) if down is not None else None
    if shape is None:
        raise TapError(f'Tap {tap} is not a linear layer, so its width is unknown. Name one with ffn="...".')
    return shape[0]


def model_device(module: nn.Module) -> torch.device:
    """The device of the first parameter, where inputs go."""
    return next(module.parameters()).device
