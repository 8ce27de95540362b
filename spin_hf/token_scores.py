"""Scores of tokens by queries: on a GPU the states are read once and as they are, since that is all that it takes."""

from __future__ import annotations

import functools
import importlib.util
import warnings

import torch
from torch import Tensor

from .modes import is_exporting


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
    learns = torch.is_grad_enabled() and (values.requires_grad or queries.requires_grad)
    traced = torch.jit.is_tracing()  # type: ignore[attr-defined]  # a trace would miss the kernel
    return values.stride(-1) == 1 and not learns and not traced and has_triton()


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed and can compile, for which it needs a C compiler; warns where it can't."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:  # the import too, or transformers would ask for Triton as it loads this code from a folder
        from triton.runtime import driver

        driver.active.get_current_target()
    except Exception as error:  # whatever went wrong: all works without, if slower
        warnings.warn(
            f"Triton can't compile kernels here ({error}), so that plain operations of torch are used, which read "
            "activations and features up to three times as often. It needs a C compiler, such as gcc.",
            stacklevel=2,
        )
        return False
    return True
