"""Where a backbone can be tapped: the names of taps, and the places in its modules that they stand for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

Kind = Literal["hidden", "ffn", "norm"]


class TapError(RuntimeError):
    """A tap was not found, or was not read exactly once."""


class PositionsError(ValueError):
    """The backbone works on another number of positions than there are tokens, so that these can't be told apart."""


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


_STREAMS = ("hc_mult", "hc_count", "altup_num_inputs")


@dataclass(frozen=True)
class Form:
    """How a block's activations differ from ``(batch, tokens, width)``.

    Args:
        streams: residual streams that run side by side, ``(batch, tokens, streams, width)``; read as that many neurons.
        streams_first: the streams are the first dimension.
        tokens_first: ``(tokens, batch, width)``.
        prefix: positions before the text's that a model may put there.
    """

    streams: int = 1
    streams_first: bool = False
    tokens_first: bool = False
    prefix: int = 0

    def by_token(self, value: Tensor, shape: tuple[int, int] | None) -> Tensor:
        """As ``(batch, tokens, width)``, where it is one of the forms that are known.

        Args:
            value: activations.
            shape: ``(batch, tokens)`` of the forward.
        """
        if value.dim() == 4:
            value = (value.permute(1, 2, 0, 3) if self.streams_first else value).flatten(2)
        if value.dim() == 3 and self.tokens_first:
            value = value.transpose(0, 1)
        if shape is None:
            return value
        if value.dim() == 2 and value.shape[0] == shape[0] * shape[1]:  # experts take all tokens of a batch in one row
            return value.reshape(*shape, -1)
        if value.dim() == 3 and value.shape[1] > shape[1]:  # filled up to a multiple of the model's window, or prefixed
            start = self.prefix if value.shape[1] == self.prefix + shape[1] else 0
            return value[:, start : start + shape[1]]
        return value


@dataclass(frozen=True)
class Layout:
    """Dotted names of the places where a backbone can be tapped. Stored in the config, so it is searched for once.

    ``blocks`` is the block list inside the backbone and ``norm`` the final norm (or ``None``). ``ffn`` is the down
    projection inside a block: one name for all of them, or one for each block with ``None`` where a block has none; or
    ``None`` altogether; a name with ``*`` for the block's number is one inside the backbone. ``calls`` says how many
    blocks in a row share one module of the list, as in ALBERT.

    ``decoder`` is the second stack of an encoder-decoder that is read in both: its blocks count on after the encoder's.
    ``entry`` is needed where the parts of the blocks stand in lists beside each other, as in XLM: it names the list
    that begins a block, and ``blocks`` the one that ends it.
    """

    blocks: str
    ffn: str | tuple[str | None, ...] | None
    norm: str | None
    calls: int = 1
    decoder: Layout | None = None
    entry: str | None = None

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = {"blocks": self.blocks, "ffn": self.ffn, "norm": self.norm, "calls": self.calls}
        if isinstance(self.ffn, tuple):
            values["ffn"] = list(self.ffn)
        if self.entry is not None:
            values["entry"] = self.entry
        return values if self.decoder is None else {**values, "decoder": self.decoder.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Layout:
        ffn, decoder = values["ffn"], values.get("decoder")
        return cls(
            values["blocks"],
            tuple(ffn) if isinstance(ffn, list) else ffn,
            values["norm"],
            values.get("calls", 1),
            None if decoder is None else cls.from_dict(decoder),
            values.get("entry"),
        )

    @property
    def stacks(self) -> Literal["encoder", "both"]:
        """Which stacks of an encoder-decoder are read."""
        return "encoder" if self.decoder is None else "both"

    def module_list(self, backbone: nn.Module) -> nn.ModuleList:
        """The modules of the blocks. Raises :class:`TapError` where there are none under that name."""
        found = _submodule(backbone, self.blocks)
        if not isinstance(found, nn.ModuleList) or not len(found):
            raise TapError(
                f"{type(backbone).__name__} has no list of blocks at {self.blocks!r}. "
                f'Lists found: {describe_lists(backbone)}. Name one with blocks="...".'
            )
        return found

    def own_depth(self, backbone: nn.Module) -> int:
        """Number of blocks of the first stack."""
        modules = len(self.module_list(backbone))
        return modules if self.calls == 1 else self.config_field(backbone, "num_hidden_layers") or modules

    def depth(self, backbone: nn.Module) -> int:
        """Number of blocks that run."""
        return self.own_depth(backbone) + (0 if self.decoder is None else self.decoder.depth(backbone))

    def stack(self, backbone: nn.Module, block: int) -> tuple[Layout, int]:
        """The stack that a block belongs to, and the block's number there."""
        own = self.own_depth(backbone)
        return (self, block) if self.decoder is None or block <= own else (self.decoder, block - own)

    def module(self, backbone: nn.Module, block: int) -> nn.Module:
        """The module of a block, counted from 1."""
        stack, number = self.stack(backbone, block)
        return stack.module_list(backbone)[(number - 1) // stack.calls]

    def upward(self, backbone: nn.Module, block: int) -> list[nn.Module]:
        """The modules of the blocks from one on, counted from 1, and the final norms after them."""
        found = []
        for number in range(block, self.depth(backbone) + 1):
            stack, own = self.stack(backbone, number)
            found += [each[(own - 1) // stack.calls] for each in stack._lists(backbone)]
        reached = {id(stack): stack for stack, _ in (self.stack(backbone, block), self.stack(backbone, number))}
        return found + [backbone.get_submodule(stack.norm) for stack in reached.values() if stack.norm is not None]

    def _lists(self, backbone: nn.Module) -> list[nn.ModuleList]:
        """The list of blocks, or those that the parts of the blocks stand in."""
        blocks = self.module_list(backbone)
        if self.entry is None:
            return [blocks]
        beside = backbone.get_submodule(self.blocks.rpartition(".")[0]).children()
        return [each for each in beside if isinstance(each, nn.ModuleList) and len(each) == len(blocks)]

    def down_projection(self, backbone: nn.Module, block: int) -> nn.Module | None:
        """The module whose input is a block's neurons; ``None`` for a block without."""
        stack, number = self.stack(backbone, block)
        name = stack.ffn[(number - 1) // stack.calls] if isinstance(stack.ffn, tuple) else stack.ffn
        if name is not None and "*" in name:
            return _submodule(backbone, name.replace("*", str(number - 1)))
        return None if name is None else _submodule(self.module(backbone, block), name)

    def taps(self, backbone: nn.Module) -> list[Tap]:
        """Every tap of the backbone, from the embeddings up."""
        own, depth = self.own_depth(backbone), self.depth(backbone)
        found = [Tap("hidden", 0)]
        for number in range(1, depth + 1):
            if self.down_projection(backbone, number) is not None:
                found.append(Tap("ffn", number))
            found.append(Tap("hidden", number))
            if number in (own, depth) and self.stack(backbone, number)[0].norm is not None:
                found.append(Tap("norm", number))
        return found

    def config(self, backbone: nn.Module) -> Any:
        """The config of the stack: that of the innermost model around its blocks."""
        parts = self.blocks.split(".")
        for end in range(len(parts), -1, -1):
            config: Any = getattr(backbone.get_submodule(".".join(parts[:end])), "config", None)
            if hasattr(config, "get_text_config"):
                break
        return config.get_text_config()

    def config_field(self, backbone: nn.Module, name: str) -> int | None:
        """A number from the stack's config, or ``None``."""
        value: int | None = getattr(self.config(backbone), name, None)
        return value

    def hidden_size(self, backbone: nn.Module) -> int:
        """Width of the blocks' outputs. Raises :class:`TapError` where the config doesn't say."""
        size = self.config_field(backbone, "hidden_size")
        if size is None:
            raise TapError(
                f"The config of {type(backbone).__name__} names no hidden_size, so the width of its blocks is unknown. "
                "Give it the field: model.config.hidden_size = ..."
            )
        return int(size)

    def form(self, backbone: nn.Module) -> Form:
        """What the blocks' activations look like. The hints are fields of the config.

        ``hc_mult`` or ``hc_count`` (hyper-connections) and ``altup_num_inputs`` count residual streams, the latter's in
        front; ``prompt_length`` is the number of positions before the text; ``reuse_len``, of models with a memory of
        earlier segments (XLNet), goes with positions as the first dimension.
        """
        field = {name: self.config_field(backbone, name) or 0 for name in (*_STREAMS, "prompt_length")}
        streams = next((int(field[name]) for name in _STREAMS if field[name]), 1)
        return Form(
            streams,
            streams_first=bool(field["altup_num_inputs"]),
            tokens_first=hasattr(self.config(backbone), "reuse_len"),
            prefix=int(field["prompt_length"]),
        )

    def hooked(self, backbone: nn.Module, tap: Tap) -> tuple[nn.Module, bool]:
        """For a tap its module, and whether to read the module's input."""
        if tap.kind == "norm":
            norm = _submodule(backbone, str(self.stack(backbone, tap.block)[0].norm))
            assert norm is not None
            return norm, False
        if tap.block == 0 and self.entry is not None:
            return replace(self, blocks=self.entry, entry=None).module(backbone, 1), True
        if tap.kind == "hidden":
            return self.module(backbone, max(1, tap.block)), tap.block == 0
        down = self.down_projection(backbone, tap.block)
        assert down is not None  # taps() lists only blocks that have one
        return down, True

    def call(self, backbone: nn.Module, tap: Tap) -> tuple[int, int]:
        """Which call of its module a tap is, and how often that is called: once for each block that shares it."""
        if tap.kind == "norm":
            return 1, 0
        of_block = self.down_projection if tap.kind == "ffn" else self.module
        block = max(1, tap.block)
        module = of_block(backbone, block)
        shared = [number for number in range(1, self.depth(backbone) + 1) if of_block(backbone, number) is module]
        return shared.index(block) + 1, len(shared)


def _submodule(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None


def shape_of(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear-like module: ``nn.Linear`` and quantised kin, or transformers' ``Conv1D``."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    if hasattr(module, "nx") and hasattr(module, "nf"):
        return int(module.nx), int(module.nf)  # type: ignore[arg-type]
    return None


def tap_width(backbone: nn.Module, layout: Layout, tap: Tap) -> int:
    """Number of neurons of a tap."""
    if tap.kind == "norm":
        weight = getattr(layout.hooked(backbone, tap)[0], "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 1:
            return len(weight)
    if tap.kind != "ffn":
        stack = layout.stack(backbone, tap.block)[0]
        return stack.hidden_size(backbone) * (stack.form(backbone).streams if tap.kind == "hidden" else 1)
    down = layout.down_projection(backbone, tap.block)
    shape = None if down is None else shape_of(down)
    if shape is None:
        raise TapError(f'Tap {tap} is not a linear layer, so its width is unknown. Name one with ffn="...".')
    return shape[0]


def module_lists(backbone: nn.Module) -> dict[str, nn.ModuleList]:
    """Lists of modules with weights, leaving out those inside an item of another."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in backbone.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        nested = isinstance(module, nn.ModuleList) and any(isinstance(item, nn.ModuleList) for item in module)
        if isinstance(module, nn.ModuleList) and not (inside or nested) and any(True for _ in module.parameters()):
            found[name] = module
    return found


def describe_lists(backbone: nn.Module) -> str:
    """The lists of a backbone, for messages."""
    lists = module_lists(backbone).items()
    return ", ".join(f"{name} ({len(items)} x {type(items[0]).__name__})" for name, items in lists) or "none"
