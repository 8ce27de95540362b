"""The hooks that read activations: each tap once in a forward, by whatever model, copy or thread runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .layout import Form as Form
from .layout import Layout as Layout
from .layout import Tap as Tap
from .layout import TapError as TapError
from .layout import tap_width as tap_width


class _Recording:
    """What one forward reads: the callback, how often each hook was called, and how often each tap was seen.

    A context: the forward runs inside.
    """

    def __init__(
        self, taps: Sequence[Tap], read: Callable[[Tap, Tensor], None], shape: tuple[int, int] | None, form: Form
    ) -> None:
        self.taps, self.read, self.shape, self.form = taps, read, shape, form
        self.calls: dict[_Read, int] = {}
        self.seen: dict[Tap, int] = dict.fromkeys(taps, 0)

    def __enter__(self) -> None:
        global _traced
        if torch.compiler.is_dynamo_compiling():
            _traced = self
        else:
            self.token = _recording.set(self)

    def __exit__(self, error: type[BaseException] | None, *args: object) -> None:
        global _traced
        if torch.compiler.is_dynamo_compiling():
            _traced = None
        else:
            _recording.reset(self.token)
        if error is None:
            self._check()

    def _check(self) -> None:
        for tap in self.taps:
            if self.seen[tap] != 1:
                raise TapError(
                    f"Tap {tap} was read {self.seen[tap]} times in one forward, not once. The module is skipped, or "
                    "shared and called again; name the right modules with blocks= and ffn=, or leave this kind out "
                    "with kinds=. Where torch.compile takes the backbone in parts, it forgets hooks: compile the whole "
                    "with fullgraph=True, or set torch._dynamo.config.skip_nnmodule_hook_guards = False before."
                )


# One recording at a time in each thread and task. Hooks look it up here, so that they hold no reference to a model:
# copies and threads stay right, and calls outside a recording (checkpoint recomputation) are ignored.
_recording: ContextVar[_Recording | None] = ContextVar("spin_hf_recording", default=None)

# The same for a forward that torch.compile traces, which follows no ContextVar. It is never set outside of a trace: an
# assignment to a global takes effect when the traced code ends, and by then it is None again.
_traced: _Recording | None = None


def record(
    taps: Sequence[Tap],
    read: Callable[[Tap, Tensor], None],
    *,
    shape: tuple[int, int] | None = None,
    form: Form = Form(),  # noqa: B008 - frozen
) -> AbstractContextManager[None]:
    """Call ``read(tap, activations (batch, tokens, width))`` for each tap of the forward run inside the context.

    Args:
        taps: that have hooks, see :func:`attach`.
        read: is called once for each of them.
        shape: ``(batch, tokens)`` of the forward.
        form: of the backbone's activations; see :meth:`Layout.form`.

    Raises:
        TapError: after the forward, if a tap was read twice or not at all.
    """
    return _Recording(taps, read, shape, form)


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
    calls: dict[nn.Module, int] = {}
    for tap in taps:
        module, reads_input = layout.hooked(backbone, tap)
        call, calls[module] = layout.call(backbone, tap)
        hooks.setdefault((module, reads_input), {})[call] = tap
    return [
        module.register_forward_pre_hook(_ReadInput(by_call, calls[module]), with_kwargs=True)
        if reads_input
        else module.register_forward_hook(_ReadOutput(by_call, calls[module]))
        for (module, reads_input), by_call in hooks.items()
    ]


def remove_hooks(backbone: nn.Module) -> None:
    """Take the reading hooks off a copy of a backbone, which came with it."""
    for hooks in _all_hooks(backbone):
        for key in [key for key, hook in hooks.items() if isinstance(hook, _Read)]:
            del hooks[key]


def is_read(backbone: nn.Module) -> bool:
    """Whether a classifier was calibrated on this backbone: its hooks stay when it is gone."""
    return any(isinstance(hook, _Read) for hooks in _all_hooks(backbone) for hook in hooks.values())


def _all_hooks(backbone: nn.Module) -> Iterator[dict[int, Any]]:
    for module in backbone.modules():
        yield from (module._forward_hooks, module._forward_pre_hooks)


class _Read:
    """Delivers a module's activations to the recording, each call to its own tap.

    A call beyond the number of blocks that share the module counts as another one of its last tap. With ``calls=0``
    the last call is the tap: a final norm may have been used before, for the embeddings, say.
    """

    def __init__(self, by_call: dict[int, Tap], calls: int) -> None:
        self.by_call, self.calls = by_call, calls

    def _deliver(self, value: Any) -> None:
        if not torch.compiler.is_dynamo_compiling():
            recording = _recording.get()
            if recording is not None:
                self._count(recording, value)
        elif _traced is not None:
            self._count(_traced, value)
        else:
            self._deliver_outside(value)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _deliver_outside(self, value: Any) -> None:
        """Break the graph, where a part of the backbone is compiled alone: what records it lies outside."""
        self._deliver(value)

    def _count(self, recording: _Recording, value: Any) -> None:
        number = recording.calls.get(self, 0) + 1
        recording.calls[self] = number
        if not self.calls:
            recording.seen[self.by_call[1]] = 0
            self._read(recording, self.by_call[1], value)
        elif number > self.calls:
            last = self.by_call[max(self.by_call)]
            recording.seen[last] = recording.seen.get(last, 0) + 1
        elif number in self.by_call:
            self._read(recording, self.by_call[number], value)

    def _read(self, recording: _Recording, tap: Tap, value: Any) -> None:
        if isinstance(value, Tensor):
            value = recording.form.by_token(value, recording.shape)
        if not isinstance(value, Tensor) or value.dim() != 3:
            found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise TapError(f"Tap {tap} should see activations (batch, tokens, width), but it saw {found}.")
        recording.seen[tap] = recording.seen.get(tap, 0) + 1
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
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
