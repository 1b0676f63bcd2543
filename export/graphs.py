"""A stage to an ONNX graph: traced from the torch module that runs it, named by the stage table.

Exporter facts that this relies on (torch 2.13, onnxscript 0.7): `optimize=False` keeps the parameters' names, so that
initializers can point into the safetensors files; the optimiser without folding then removes what tracing left.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnxscript.optimizer import optimize_ir

from higen.bundle import Bundle
from higen.errors import BackendError, RequestError
from higen.export.weights import point_into, stored_tensors
from higen.stages import STAGES, Stage, dimensions

__all__ = ["example_inputs", "export_stage", "sizes_for", "static_sizes"]

LARGEST_INLINE = 4096
"""A graph holds no tensor of more bytes than this."""

PREFIXES = {"text_encoder": "encoder.", "vae_decoder": "autoencoder.", "vae_encoder": "autoencoder."}
"""What a stage's module puts before the names in its weights file."""

TRACED = {"B": 2, "F": 5, "N": 3}
"""Sizes the tracer sees; all differ, so that no two axes are taken for one."""


def example_inputs(stage: Stage, sizes: Mapping[str, int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random inputs of a stage for these sizes: tokens and timesteps as int64 from 0 to 4, all else normal."""
    random = torch.Generator().manual_seed(seed)
    inputs = {}
    for tensor in stage.inputs:
        shape = [n if isinstance(n, int) else sizes[n] for n in tensor.shape]
        if tensor.dtype == "int64":
            inputs[tensor.name] = torch.randint(0, 5, shape, generator=random)
        else:
            inputs[tensor.name] = torch.randn(shape, generator=random)
    return inputs


def export_stage(
    bundle: Bundle,
    module: torch.nn.Module,
    name: str,
    output: Path,
    opset: int,
    precision: str = "fp32",
    static: Mapping[str, int] | None = None,
) -> None:
    """Write the graph of a stage's module to `output`, a file in the model's own folder.

    Batch, frames, height and width are dynamic, or those of `static`. Raises BackendError where tracing fails or a
    large tensor would end up in the graph.
    """
    stage, multiple = STAGES[name], bundle.config.unet.size_multiple
    fixed = {**dimensions(bundle.config), **_static_symbols(bundle, name, static)}
    sizes = sizes_for(bundle, {**TRACED, "H": 2 * multiple, "W": 3 * multiple, **(static or {})})
    model = _trace(stage, module, sizes, set(fixed), opset)
    optimize_ir(model, should_fold=_is_bookkeeping)
    _clean(model.graph, stage)
    stored = stored_tensors(bundle.file(bundle.weights(name, precision), verify=False))
    weights = {PREFIXES.get(name, "") + key: tensor for key, tensor in stored.items()}
    point_into(model.graph, weights, bundle.path)
    large = [k for k, v in model.graph.initializers.items() if k not in weights and _bytes(v) > LARGEST_INLINE]
    if large:
        raise BackendError(f"{name}: the graph would hold the tensors {large[:10]} itself")
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    ir.save(model, output)


def static_sizes(bundle: Bundle, shape: str) -> dict[str, int]:
    """Sizes of B, F, H and W for "BxFxHxW" with H and W in pixels: "1x32x256x448".

    Raises RequestError for anything else and for sizes that the model cannot have.
    """
    factor, step = bundle.config.autoencoder.factor, bundle.config.unet.size_multiple
    try:
        batch, frames, height, width = (int(part) for part in shape.split("x"))
    except ValueError:
        raise RequestError(f"static={shape!r}: samples, frames, height and width, as in 1x32x256x448") from None
    if batch < 1 or not 1 <= frames <= bundle.config.max_frames:
        raise RequestError(f"static={shape!r}: at least 1 sample and 1 to {bundle.config.max_frames} frames")
    if height < 1 or width < 1 or height % (factor * step) or width % (factor * step):
        raise RequestError(f"static={shape!r}: height and width are multiples of {factor * step} pixels")
    return {"B": batch, "F": frames, "H": height // factor, "W": width // factor}


def _static_symbols(bundle: Bundle, name: str, static: Mapping[str, int] | None) -> dict[str, int]:
    """What `static` fixes in a stage. The pipeline itself varies the conditioner's frames (1, then all) and the text
    encoder's and the conditioner's samples (1 for the empty prompt), as well as the images decoded at a time.
    """
    if static is None or name in ("text_encoder", "conditioner"):
        return {}
    return {key: n for key, n in sizes_for(bundle, {**TRACED, **static}).items() if key != "N"}


def sizes_for(bundle: Bundle, free: Mapping[str, int]) -> dict[str, int]:
    """A size for every symbol of the stage table: those the model fixes, `free`, and the pixels of its H and W."""
    factor = bundle.config.autoencoder.factor
    return {**dimensions(bundle.config), **free, "Y": free["H"] * factor, "X": free["W"] * factor}


def _bytes(value: ir.Value) -> int:
    return 0 if value.const_value is None else value.const_value.nbytes


def _is_bookkeeping(node: ir.Node) -> bool:
    """Whether a node computes small whole numbers from constants: an axis to reduce, say, which TensorRT wants as an
    initializer. Weights are never folded: they would move into the graph.
    """
    return all(
        value is not None
        and value.const_value is not None
        and value.const_value.dtype == ir.DataType.INT64
        and value.const_value.size <= 16
        for value in node.inputs
    )


def _trace(stage: Stage, module: torch.nn.Module, sizes: Mapping[str, int], fixed: set[str], opset: int) -> ir.Model:
    inputs = example_inputs(stage, sizes)
    dynamic = [
        {i: torch.export.Dim.DYNAMIC for i, n in enumerate(t.shape) if isinstance(n, str) and n not in fixed}
        for t in stage.inputs
    ]
    with _quiet():
        try:
            program = torch.onnx.export(
                module,
                tuple(inputs.values()),
                dynamo=True,
                optimize=False,
                opset_version=opset,
                input_names=[t.name for t in stage.inputs],
                output_names=list(stage.graph_outputs),
                dynamic_shapes=tuple(dynamic),
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise BackendError(f"{stage.name}: PyTorch could not export it: {error}") from error
    if program is None:
        raise BackendError(f"{stage.name}: PyTorch exported nothing")
    return program.model


def _clean(graph: ir.Graph, stage: Stage) -> None:
    """Name the axes by the stage table; drop the tracer's inner shapes, which name others, and its notes."""
    for value, tensor in [
        *zip(graph.inputs, stage.inputs, strict=True),
        *zip(graph.outputs, stage.outputs, strict=True),
    ]:
        if value.shape is None:
            raise BackendError(f"{stage.name}.{tensor.name}: the exported graph does not know its shape")
        old = list(value.shape)
        value.shape = ir.Shape(
            [n if isinstance(n, int) else symbol for n, symbol in zip(old, tensor.shape, strict=True)]
        )
    kept = {*graph.inputs, *graph.outputs}
    for node in graph:
        node.metadata_props.clear()  # the tracer's stack of every node: machine paths, and most of the file
        for out in node.outputs:
            out.metadata_props.clear()
            if out not in kept and out.shape is not None and not out.shape.is_static():
                out.shape = None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's progress lines and its warnings about itself say nothing that a user can act on."""
    loggers: list[Any] = [logging.getLogger(n) for n in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
