"""Finding blocks, FFN neurons and the final norm of a backbone by structure.

Nothing here knows a model by name. A *block list* is an ``nn.ModuleList`` of modules that are no layers themselves; a
block's *FFN down projection* is a linear layer that ends in the model's hidden size and is fed by a linear layer of its
own width. Some hints go by names that all of the field uses: ``att`` for attention, ``expert`` for routed experts, and
those of norms. Where structure can't tell, both places can be given by hand, as dotted names.
"""

from __future__ import annotations

import re
from dataclasses import replace

from torch import nn

from .layout import Layout, TapError, module_lists, shape_of
from .parts import Stacks

_ATTENTION = re.compile("att", re.IGNORECASE)  # covers attn, attention, SelfAttention
_ROUTED = re.compile(r"^(?!.*shared).*expert", re.IGNORECASE)  # each sees some of the tokens; shared ones see all
_OF_EMBEDDINGS = re.compile(r"norm_?emb")
_FINAL = re.compile(r"norm$|final_|layer_?norm$|ln_f$")


def find_layout(
    backbone: nn.Module, *, blocks: str | None = None, ffn: str | None = None, stacks: Stacks = "encoder"
) -> Layout:
    """Find blocks, FFN down projections and the final norm of a backbone by structure.

    Blocks: of all ``nn.ModuleList`` outside a block and outside parts for images or sound, the one that is as long as
    the config says, else the longest.

    Down projection: of a block's linear layers outside attention (modules with ``att`` in the name or class: structure
    alone cannot tell an attention output from a down projection where heads are wider than the model) and outside
    routed experts, the last that maps some width to the hidden size and whose width another linear layer produces from
    the hidden size, plainly or doubled by a gate. A block of a state-space model has no such layer; there it is the
    output projection of its mixer, whose width is a part of what the input projection gives.

    Args:
        backbone: any ``PreTrainedModel`` without a task head.
        blocks: dotted name of the block list, instead of searching.
        ffn: dotted name of the down projection inside a block, instead of searching.
        stacks: ``"both"`` to read the encoder and the decoder of an encoder-decoder.

    Raises:
        TapError: if nothing fits; the message lists the candidates.
    """
    if stacks == "both":
        if blocks or ffn:
            raise TapError('blocks= and ffn= name one stack. With stacks="both" leave them out.')
        names = {module: name for name, module in backbone.named_modules()}
        encoder, decoder = (
            find_layout(backbone, blocks=_find_blocks(backbone, inside=f"{names[stack]}.").blocks)
            for stack in (backbone.get_encoder(), backbone.get_decoder())  # type: ignore[operator]
        )
        return replace(encoder, decoder=decoder)
    layout = Layout(blocks, None, None) if blocks is not None else _find_blocks(backbone)
    if layout.entry is not None:
        return replace(layout, norm=_final_norm(backbone, layout.blocks), ffn=ffn or layout.ffn)
    modules = list(layout.module_list(backbone))
    layout = replace(layout, norm=_final_norm(backbone, layout.blocks), calls=_calls_in_a_row(backbone, layout))
    if ffn is not None:
        _check_ffn(backbone, modules, ffn)
        return replace(layout, ffn=ffn)
    found = tuple(_find_ffn(module, layout.hidden_size(backbone)) for module in modules)
    return replace(layout, ffn=found[0] if len(set(found)) == 1 else found)


def _check_ffn(backbone: nn.Module, blocks: list[nn.Module], ffn: str) -> None:
    """Refuse a down projection named by hand that no block has, or that is no linear layer in one that has it."""
    named = [module for block in blocks for name, module in block.named_modules() if name == ffn]
    if named and all(shape_of(module) for module in named):
        return
    candidates = dict.fromkeys(name for block in blocks for name, module in block.named_modules() if shape_of(module))
    problem = f"have a {type(named[0]).__name__} at {ffn!r}, no linear layer" if named else f"have no module {ffn!r}"
    raise TapError(
        f"The blocks of {type(backbone).__name__} {problem}. "
        f'Linear layers in a block: {", ".join(candidates)}. Name one of them with ffn="...".'
    )


def _find_blocks(backbone: nn.Module, inside: str = "") -> Layout:
    other = tuple(
        f"{name}."
        for name, module in backbone.named_modules()
        if name and getattr(module, "main_input_name", "input_ids") != "input_ids"
    )
    lists = {
        name: items
        for name, items in module_lists(backbone).items()
        if name.startswith(inside) and not name.startswith(other)
    }
    if not lists:
        raise TapError(
            f"No blocks found in {type(backbone).__name__}: it holds no nn.ModuleList of modules with weights. "
            f"Its parts: {', '.join(name for name, _ in backbone.named_children())}. "
            'Name the list of its transformer layers with blocks="encoder.layers".'
        )

    def fitness(name: str) -> tuple[bool, bool, int]:
        named = Layout(name, None, None).config_field(backbone, "num_hidden_layers")
        composed = any(True for _ in lists[name][0].children())  # not a list of embeddings or convolutions
        return composed, len(lists[name]) == named, len(lists[name])

    best = max(lists, key=fitness)
    if not _ATTENTION.search(type(lists[best][0]).__name__) or "layer" in type(lists[best][0]).__name__.lower():
        return Layout(best, None, None)
    # A list of attentions alone: the other parts of the blocks stand beside it, in the order in which they run.
    parent = best.rpartition(".")[0]
    beside = [name for name in lists if name.rpartition(".")[0] == parent and len(lists[name]) == len(lists[best])]
    layout = Layout(beside[-1], None, None, entry=best)
    found = {name: _find_ffn(lists[name][0], layout.hidden_size(backbone)) for name in beside}
    ffn = [f"{name}.*.{inner}" for name, inner in found.items() if inner]
    return replace(layout, ffn=ffn[-1] if ffn else None)


def _find_ffn(block: nn.Module, hidden_size: int) -> str | None:
    linear = {name: shape for name, module in _outside(block) if (shape := shape_of(module)) is not None}
    produced = {out for into, out in linear.values() if into == hidden_size}
    ends = {name: into for name, (into, out) in linear.items() if out == hidden_size}
    fits = [name for name, into in ends.items() if into in produced - {hidden_size} or 2 * into in produced]
    if not fits:  # an FFN as wide as the model: the last of at least two square layers
        square = [name for name, shape in linear.items() if shape == (hidden_size, hidden_size)]
        fits = square if len(square) > 1 else []
    if not fits:  # a mixer whose input projection gives states, gates and more at once
        widest = max(produced, default=0)
        fits = [name for name, into in ends.items() if hidden_size != into < widest]
    return fits[-1] if fits else None


def has_routed_experts(backbone: nn.Module, layout: Layout) -> bool:
    """Whether blocks have experts that see some of the tokens, so that no module is the FFN of a text's every token."""
    names = (name for block in layout.module_list(backbone) for name, _ in block.named_modules())
    return any(_ROUTED.search(name.rpartition(".")[2]) for name in names)


def _outside(block: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules of a block that are neither attention nor a routed expert, nor inside one."""
    left_out: list[str] = []
    found = []
    for name, module in block.named_modules():
        own = name.rpartition(".")[2]
        if any(name.startswith(f"{outer}.") for outer in left_out):
            continue
        if name and (_ATTENTION.search(own) or _ATTENTION.search(type(module).__name__) or _ROUTED.search(own)):
            left_out.append(name)
            continue
        found.append((name, module))
    return found


def _calls_in_a_row(backbone: nn.Module, layout: Layout) -> int:
    """How many blocks share a module. The hint is the config's: ``num_hidden_groups`` modules for its blocks."""
    modules = len(layout.module_list(backbone))
    depth = layout.config_field(backbone, "num_hidden_layers")
    if layout.config_field(backbone, "num_hidden_groups") != modules or depth is None:
        return 1
    if depth % modules:
        raise TapError(
            f"{type(backbone).__name__} spreads {depth} blocks over {modules} groups unevenly, so that they can't be "
            "told apart. Use a backbone whose groups are of one size."
        )
    return depth // modules


def _final_norm(backbone: nn.Module, blocks: str) -> str | None:
    """The norm beside the block list or a module around it: the first after it, or one before with a final one's name.

    The hint that a norm is one of embeddings is its name ending in them, as BART's, which lists it last.
    """
    inner = blocks
    while inner:
        parent, _, own = inner.rpartition(".")
        siblings = [name for name, _ in backbone.get_submodule(parent).named_children()]
        norms = [
            name
            for name in siblings
            if "norm" in type(backbone.get_submodule(f"{parent}.{name}".lstrip("."))).__name__.lower()
            and not _OF_EMBEDDINGS.search(name)
        ]
        found = [name for name in norms if siblings.index(name) > siblings.index(own)][:1]
        if inner == blocks:
            found = found or [name for name in norms if _FINAL.match(name)][-1:]
        if found:
            return f"{parent}.{found[0]}".lstrip(".")
        inner = parent
    return None
