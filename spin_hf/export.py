"""A finished classifier as one graph of any batch size and length: ONNX, and what ``torch.export.save`` writes."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from .modeling_spin import NotCalibratedError, SpinForSequenceClassification

_PROTOBUF_BYTES = 2**31 - 2**26  # a file of ONNX holds less than 2 GiB; heavier weights go beside it


class ExportError(ValueError):
    """This classifier can't become one graph."""


def export_program(
    model: SpinForSequenceClassification, *, token_type_ids: bool | None = None, strict: bool = False
) -> ExportedProgram:
    """The graph of a classifier as PyTorch has it, which ``torch.export.save`` writes.

    Args:
        model: calibrated; goes into eval.
        token_type_ids: take these as an input, too. By default only where the classifier reads pairs of texts and the
            backbone tells their tokens apart; for single texts they are 0, which is what the backbone takes without.
        strict: as ``torch.export.export`` has it.

    Returns:
        A program whose ``module()`` is called as the model is, by ``input_ids``, ``attention_mask`` and, if asked for,
        ``token_type_ids``, each ``(batch, tokens)`` int64 and padded on either side. Any batch and length that the
        backbone takes.

    Raises:
        NotCalibratedError: for a model that could not be used.
        ExportError: where the rows of a batch run apart from each other, long texts are read in windows, weights are
            offloaded, or the backbone's code can't be made one graph (Mamba's, or for ONNX that of routed experts).
    """
    model = _uncompiled(model)
    inputs = _example(model, token_type_ids)
    shapes = {name: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for name in inputs}
    with torch.no_grad(), _telling_what_fails(model):
        return torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=strict)


def export_onnx(
    model: SpinForSequenceClassification, path: str | PathLike[str], *, token_type_ids: bool | None = None
) -> Path:
    """Write a classifier as ONNX. Needs the extra: ``pip install "spin_hf[onnx]"``.

    The file has the inputs of :func:`export_program` and one output, ``logits`` ``(batch, num_labels)`` float32. Its
    weights are in the backbone's dtype, float32 or float16.

    Args:
        model: calibrated; goes into eval.
        path: of the file. Weights of 2 GiB and more lie beside it, in ``<path>.data``.
        token_type_ids: as in :func:`export_program`.

    Raises:
        ImportError: without onnx and onnxscript.
        NotADirectoryError: where the folder of the file is missing.
        NotCalibratedError, ExportError: as :func:`export_program` does; also for a bfloat16 backbone.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f'{" and ".join(missing)} is missing. Run: pip install "spin_hf[onnx]"')
    if not Path(path).parent.is_dir():
        raise NotADirectoryError(f"{Path(path).parent} is no folder, so {Path(path).name} can't be written there.")
    model = _uncompiled(model)
    inputs = _example(model, token_type_ids)
    if model.spin.backbone.dtype == torch.bfloat16:
        raise ExportError(
            "onnxruntime lacks most operations in bfloat16, so it could not load the file. Give another precision: "
            "export_onnx(model.float(), ...), or model.half()."
        )
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    with torch.no_grad(), _telling_what_fails(model):
        torch.onnx.export(
            model,
            (),
            path,
            kwargs=inputs,
            input_names=list(inputs),
            output_names=["logits"],
            dynamic_shapes={name: {0: "batch", 1: "tokens"} for name in inputs},
            dynamo=True,
            external_data=weights > _PROTOBUF_BYTES,
            verbose=False,
        )
    return Path(path)


def _uncompiled(model: Any) -> SpinForSequenceClassification:
    """The classifier inside of what ``torch.compile(model)`` gives."""
    inner: SpinForSequenceClassification = getattr(model, "_orig_mod", model)
    return inner


@contextmanager
def _telling_what_fails(model: SpinForSequenceClassification) -> Iterator[None]:
    """Name the backbone that no graph can be made of: the exporter's message tells of its own insides, over pages."""
    try:
        yield
    except RuntimeError as error:  # which all of the exporters' are
        raise ExportError(
            f"{type(model.spin.backbone).__name__} could not be made one graph; the exporter's own words stand above. "
            "Most often the code goes by the sizes or values of its inputs, or an operation is missing in ONNX. Serve "
            "the model itself."
        ) from error


def _example(model: SpinForSequenceClassification, token_type_ids: bool | None) -> dict[str, Tensor]:
    """Inputs to trace with: their sizes stand for any, so they are neither 0 nor 1 nor alike."""
    if not model.calibrated:
        raise NotCalibratedError("This model was never calibrated; run spin_calibrate before exporting it.")
    backbone: Any = model.spin.backbone
    if model.config.batching != "padded":
        raise ExportError(
            f"{type(backbone).__name__} takes batches that are {model.config.batching.replace('_', ' ')}, so its rows "
            "can't run in one graph. Serve the model itself."
        )
    if model.config.windows:
        raise ExportError(
            "This classifier reads long texts in windows, as many as a text needs, which is no one graph. Serve the "
            "model itself, or calibrate without windows."
        )
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise ExportError("Some weights are offloaded. Load the classifier without device_map first.")
    takes = "token_type_ids" in model.spin._takes
    if token_type_ids and not takes:
        raise ExportError(f"{type(backbone).__name__} takes no token_type_ids. Leave token_type_ids out.")
    model.eval()
    device = next(model.parameters()).device
    ids = torch.zeros(3, 7, dtype=torch.int64, device=device)
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids).tril(4)}
    if takes and (bool(model.config.text_pairs) if token_type_ids is None else token_type_ids):
        found["token_type_ids"] = torch.zeros_like(ids)
    return found
