"""Exports a stage to an ONNX graph: traces the torch module that runs it, with the names of the stage table.

Exporter facts that this relies on (torch 2.13, onnxscript 0.7): `optimize=False` keeps the parameters' names, so that
initializers can point into the safetensors files. The optimiser, run without folding, then removes what tracing left
behind.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch
from onnxscript import rewriter
from onnxscript.optimizer import fold_constants_ir
from onnxscript.rewriter.rules.common import slice_split_rule

from higen.bundle import Bundle
from higen.errors import BackendError
from higen.export.group_norms import with_instance_norms
from higen.export.shapes import example_inputs, fixed_sizes, traced_sizes
from higen.export.weights import point_into, stored_tensors
from higen.manifest import Manifest
from higen.stages import Stage

__all__ = ["export_stage"]

LARGEST_INLINE = 4096
"""Largest tensor, in bytes, that a graph file itself may hold."""


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

    The stage's free axes are dynamic, except those that `static` fixes (`shapes.fixed_sizes`). The module's parameters
    are named as in the weights file, with the module's `prefix` in front if it has one, and with other prefixes in
    place of those in its `replaced`. Raises BackendError if tracing fails or a large tensor would end up in the graph.
    """
    stage = bundle.manifest.stage(name)
    fixed = fixed_sizes(bundle.manifest, stage, static)
    inputs = example_inputs(bundle.manifest, stage, traced_sizes(bundle.manifest, stage, fixed))
    axes = _free_axes(bundle.manifest, stage, {*bundle.manifest.fixed, *fixed})
    with _rare_collections():
        model = _trace(stage, module, inputs, axes, opset)
        if precision == "fp32":  # the precision of the CPU
            with_instance_norms(model.graph)
        _optimize(model)
    _clean(model.graph, stage)
    stored = stored_tensors(bundle.file(bundle.weights(name, precision), verify=False))
    weights = {getattr(module, "prefix", "") + key: tensor for key, tensor in stored.items()}
    for theirs, ours in getattr(module, "replaced", {}).items():
        weights |= {ours + key.removeprefix(theirs): stored[key] for key in stored if key.startswith(theirs)}
    point_into(model.graph, weights, bundle.path)
    large = [k for k, v in model.graph.initializers.items() if k not in weights and _bytes(v) > LARGEST_INLINE]
    if large:
        raise BackendError(f"{name}: the graph file itself would contain the tensors {large[:10]}")
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    ir.save(model, output)


def _bytes(value: ir.Value) -> int:
    return 0 if value.const_value is None else value.const_value.nbytes


def _is_bookkeeping(node: ir.Node) -> bool:
    """Whether a node computes small integers from constants, such as a reduction axis, which TensorRT needs as an
    initializer. Weights are never folded, because they would move into the graph.
    """
    return all(
        value is not None
        and value.const_value is not None
        and value.const_value.dtype == ir.DataType.INT64
        and value.const_value.size <= 16
        for value in node.inputs
    )


def _free_axes(manifest: Manifest, stage: Stage, fixed: set[str]) -> list[dict[int, Any]]:
    """The dynamic axes of each input, as `torch.export` wants them.

    Each axis is declared a multiple of its step. Otherwise the tracer carries a rounded quotient for every halving of
    the picture, and spends most of its time comparing them.
    """
    multiple = manifest.sizes.multiple
    step = multiple // manifest.sizes.factor
    multiples = {"H": step, "W": step, "Y": multiple, "X": multiple}
    symbols = {n for t in stage.inputs for n in t.shape if isinstance(n, str) and n not in fixed}
    # If a stage has both, a pixel axis is tied to its latent axis.
    shared = {pixels: cells for pixels, cells in (("Y", "H"), ("X", "W")) if {pixels, cells} <= symbols}
    axes = {n: multiples.get(n, 1) * torch.export.Dim(f"size_{shared.get(n, n)}") for n in symbols}
    return [{i: axes[n] for i, n in enumerate(t.shape) if isinstance(n, str) and n in axes} for t in stage.inputs]


def _trace(
    stage: Stage, module: torch.nn.Module, inputs: Mapping[str, torch.Tensor], axes: list[dict[int, Any]], opset: int
) -> ir.Model:
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
                dynamic_shapes=_nested(module, axes),
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise BackendError(f"{stage.name}: PyTorch could not export it: {error}") from error
    if program is None:
        raise BackendError(f"{stage.name}: PyTorch exported nothing")
    return program.model


def _nested(module: torch.nn.Module, dynamic: list[Any]) -> tuple[Any, ...]:
    """The dynamic axes as `torch.export` wants them: the axes of `*args` in `forward` form their own tuple."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    if not parameters or parameters[-1].kind is not inspect.Parameter.VAR_POSITIONAL:
        return tuple(dynamic)
    named = len(parameters) - 1
    return (*dynamic[:named], tuple(dynamic[named:]))


RULES = rewriter.RewriteRuleSet([rule for rule in rewriter._DEFAULT_REWRITE_RULES if rule is not slice_split_rule])
"""The optimiser's default rules without the one that matches two nodes at once. That rule searches the whole graph for
every node, which takes most of an export's time, and it never matches here.
"""


def _optimize(model: ir.Model) -> None:
    """Like `onnxscript.optimizer.optimize_ir`, but with `RULES` and without folding weights."""
    passes.InlinePass()(model)
    for _ in range(2):  # one rule's result may let another rule match
        fold_constants_ir(model, onnx_shape_inference=True, should_fold=_is_bookkeeping)
        RULES.apply_to_model(model)
        for tidy in (passes.RemoveUnusedNodesPass, passes.RemoveUnusedFunctionsPass, passes.RemoveUnusedOpsetsPass):
            tidy()(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    for settle in (
        passes.LiftSubgraphInitializersToMainGraphPass,
        passes.DeduplicateInitializersPass,
        passes.CommonSubexpressionEliminationPass,
        passes.OutputFixPass,
        passes.NameFixPass,
    ):
        settle()(model)


def _clean(graph: ir.Graph, stage: Stage) -> None:
    """Name the axes as in the stage table. Drop the tracer's metadata and its inner shapes, which use other names."""
    rows = [(t.name, t.shape) for t in stage.inputs] + [(t.name, t.shape) for t in stage.outputs]
    for value, (name, shape) in zip((*graph.inputs, *graph.outputs), rows, strict=True):
        if value.shape is None:
            raise BackendError(f"{stage.name}.{name}: the exported graph does not know its shape")
        old = list(value.shape)
        value.shape = ir.Shape([n if isinstance(n, int) else symbol for n, symbol in zip(old, shape, strict=True)])
    kept = {*graph.inputs, *graph.outputs}
    for node in graph:
        node.metadata_props.clear()  # a stack trace for every node: local paths, and most of the file
        for out in node.outputs:
            out.metadata_props.clear()
            if out not in kept and out.shape is not None and not out.shape.is_static():
                out.shape = None


@contextlib.contextmanager
def _rare_collections() -> Iterator[None]:
    """Make Python's garbage collector run less often. A trace makes millions of objects that stay alive; scanning them
    again and again takes a tenth of an export's time.
    """
    before = gc.get_threshold()
    gc.set_threshold(100_000, 50, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's progress lines and internal warnings: a user cannot act on them."""
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
