"""Scores of tokens by queries. On a GPU they take as long as it takes to read the states, if these are read once."""

from __future__ import annotations

import functools
import importlib.util
import warnings

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .modes import is_exporting

_LEAST_CAPABILITY = (7, 0)  # of an Nvidia GPU that Triton compiles for


def token_scores(values: Tensor, queries: Tensor, real: Tensor) -> Tensor:
    """``values @ query`` for each query, in float32: ``(queries, rows, tokens)``.

    Args:
        values: activations ``(rows, tokens, width)``.
        queries: ``(queries, width)`` float32, on the same device.
        real: ``(rows, tokens)``; what other tokens get is not defined.
    """
    compiling = torch.compiler.is_compiling()
    if values.is_cuda and compiling and not is_exporting():
        # The compiler joins these sums to what makes the values; a matrix product would first copy them to float32.
        return torch.stack([(values.float() * query).sum(-1) for query in queries])
    if values.is_cuda and not compiling and _by_kernel(values, queries):
        from .triton_scores import scores

        return scores(values, queries.contiguous(), real.to(values.device))
    return (values.float() @ queries.T).movedim(2, 0)


def _by_kernel(values: Tensor, queries: Tensor) -> bool:
    """Whether nothing follows torch's operations: a kernel is none."""
    if torch.is_grad_enabled() and (values.requires_grad or queries.requires_grad):
        return False
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False
    for given in (values, queries):
        if type(given) is not Tensor or torch._C._functorch.is_functorch_wrapped_tensor(given):
            return False
        if forward_ad.unpack_dual(given).tangent is not None:
            return False
    return values.stride(-1) == 1 and runs_triton(values.device)


@functools.cache
def runs_triton(device: torch.device) -> bool:
    """Whether kernels run there: on a GPU that Triton compiles for, where it is installed and finds a C compiler.

    Warns where a kernel was tried and failed.
    """
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        return False
    try:
        from .triton_scores import try_out

        try_out(device)
    except Exception as error:
        if "out of memory" in str(error).lower():  # which may pass
            raise
        warnings.warn(
            f"Triton can't run kernels on {device} ({error}), so that plain operations of torch are used, which read "
            "activations and features up to three times as often. It needs a C compiler, such as gcc.",
            stacklevel=2,
        )
        return False
    return True
