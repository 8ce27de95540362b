"""Where activations are read: finding blocks and FFN neurons in a backbone by structure, and the hooks that read them.

Nothing here knows a model by name. A *block list* is an ``nn.ModuleList`` of equal modules; a block's *FFN down
projection* is a linear layer that ends in the model's hidden size and is fed by a linear layer of its own width. Where
structure can't tell, both can be given by hand, as dotted names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace
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
    the final norm inside the backbone (or ``None``). ``calls`` says how many blocks in a row share one module of the
    list, as in ALBERT; block and module are told apart by the number of the call.
    """

    blocks: str
    ffn: str | None
    norm: str | None
    calls: int = 1

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Layout:
        return cls(values["blocks"], values["ffn"], values["norm"], values.get("calls", 1))

    def module_list(self, backbone: nn.Module) -> nn.ModuleList:
        """The modules of the blocks. Raises :class:`TapError` where there are none under that name."""
        found = _submodule(backbone, self.blocks)
        if not isinstance(found, nn.ModuleList) or not len(found):
            raise TapError(
                f"{type(backbone).__name__} has no list of blocks at {self.blocks!r}. "
                f'Lists found: {_describe(_module_lists(backbone))}. Name one with blocks="...".'
            )
        return found

    def depth(self, backbone: nn.Module) -> int:
        """Number of blocks that run."""
        modules = len(self.module_list(backbone))
        return modules if self.calls == 1 else config_field(backbone, "num_hidden_layers") or modules

    def module(self, backbone: nn.Module, block: int) -> nn.Module:
        """The module of a block, counted from 1."""
        return self.module_list(backbone)[(block - 1) // self.calls]

    def down_projection(self, backbone: nn.Module, block: int) -> nn.Module | None:
        return None if self.ffn is None else _submodule(self.module(backbone, block), self.ffn)

    def taps(self, backbone: nn.Module) -> list[Tap]:
        """Every tap of the backbone, from the embeddings up."""
        depth = self.depth(backbone)
        found = [Tap("hidden", 0)]
        for number in range(1, depth + 1):
            if self.down_projection(backbone, number) is not None:
                found.append(Tap("ffn", number))
            found.append(Tap("hidden", number))
        if self.norm is not None:
            found.append(Tap("norm", depth))
        return found

    def _hooked(self, backbone: nn.Module, tap: Tap) -> tuple[nn.Module, bool, int]:
        """For a tap its module, whether to read the module's input, and the number of the call."""
        if tap.kind == "norm":
            norm = _submodule(backbone, str(self.norm))
            assert norm is not None
            return norm, False, 1
        block = max(1, tap.block)
        module, call = self.module(backbone, block), (block - 1) % self.calls + 1
        if tap.kind == "hidden":
            return module, tap.block == 0, call
        down = self.down_projection(backbone, block)
        assert down is not None  # taps() lists only blocks that have one
        return down, True, call


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
    first = layout.module(backbone, 1)
    layout = replace(layout, calls=_calls_in_a_row(backbone, len(layout.module_list(backbone))))
    if ffn is not None:
        if _submodule(first, ffn) is None:
            candidates = [name for name, module in first.named_modules() if _shape(module)]
            raise TapError(
                f"The blocks of {type(backbone).__name__} have no module {ffn!r}. "
                f'Linear layers in a block: {", ".join(candidates)}. Name one of them with ffn="...".'
            )
        return replace(layout, ffn=ffn)
    return replace(layout, ffn=_find_ffn(first, _hidden_size(backbone)))


class _Recording:
    """What one forward reads: the callback, how often each hook was called, and how often each tap was seen."""

    def __init__(self, read: Callable[[Tap, Tensor], None]) -> None:
        self.read = read
        self.calls: Counter[_Read] = Counter()
        self.seen: Counter[Tap] = Counter()


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
        if recording.seen[tap] != 1:
            raise TapError(
                f"Tap {tap} was read {recording.seen[tap]} times in one forward, not once. The module is skipped, or "
                "shared and called again; name the right modules with blocks= and ffn=, or leave this kind out with "
                "kinds=."
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
    hooks: dict[tuple[nn.Module, bool], dict[int, Tap]] = {}
    for tap in taps:
        module, reads_input, call = layout._hooked(backbone, tap)
        hooks.setdefault((module, reads_input), {})[call] = tap
    return [
        module.register_forward_pre_hook(_ReadInput(by_call, layout.calls), with_kwargs=True)
        if reads_input
        else module.register_forward_hook(_ReadOutput(by_call, layout.calls))
        for (module, reads_input), by_call in hooks.items()
    ]


def remove_hooks(backbone: nn.Module) -> None:
    """Take the reading hooks off a copy of a backbone, which came with it."""
    for module in backbone.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, _Read)]:
                del hooks[key]


class _Read:
    """Delivers a module's activations to the recording, each call to its own tap.

    A call beyond the number of blocks that share the module counts as another one of its last tap.
    """

    def __init__(self, by_call: dict[int, Tap], calls: int) -> None:
        self.by_call, self.calls = by_call, calls

    def _deliver(self, value: Any) -> None:
        recording = _recording.get()
        if recording is None:
            return
        recording.calls[self] += 1
        number = recording.calls[self]
        if number > self.calls:
            recording.seen[self.by_call[max(self.by_call)]] += 1
        elif number in self.by_call:
            self._read(recording, self.by_call[number], value)

    def _read(self, recording: _Recording, tap: Tap, value: Any) -> None:
        if not isinstance(value, Tensor) or value.dim() != 3:
            found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise TapError(f"Tap {tap} should see activations (batch, tokens, width), but it saw {found}.")
        recording.seen[tap] += 1
        if not torch.is_grad_enabled():
            recording.read(tap, value)
            return
        # Inside a checkpointed block: what reading saves for backward is not recomputed, so the checkpoint must not
        # count it. Detached, since a graph that holds its own output would never be freed.
        with torch.autograd.graph.saved_tensors_hooks(Tensor.detach, _as_it_is):
            recording.read(tap, value)


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


def _calls_in_a_row(backbone: nn.Module, modules: int) -> int:
    """How many blocks share a module. The hint is the config's: ``num_hidden_groups`` modules for its blocks."""
    depth = config_field(backbone, "num_hidden_layers")
    if config_field(backbone, "num_hidden_groups") != modules or depth is None:
        return 1
    if depth % modules:
        raise TapError(
            f"{type(backbone).__name__} spreads {depth} blocks over {modules} groups unevenly, so that they can't be "
            "told apart. Use a backbone whose groups are of one size."
        )
    return depth // modules


def config_field(backbone: nn.Module, name: str) -> int | None:
    """A number from the config of the backbone's text part, or ``None``."""
    value: int | None = getattr(backbone.config.get_text_config(), name, None)  # type: ignore[union-attr,operator]
    return value


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
    down = layout.down_projection(backbone, tap.block)
    shape = _shape(down) if down is not None else None
    if shape is None:
        raise TapError(f'Tap {tap} is not a linear layer, so its width is unknown. Name one with ffn="...".')
    return shape[0]


def model_device(module: nn.Module) -> torch.device:
    """The device of the first parameter, where inputs go; of weights kept elsewhere, that which computes with them."""
    first = next(module.parameters()).device
    if first.type != "meta":
        return first
    for part in module.modules():  # accelerate's hooks bring the weights from memory or disk before each use
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return first
