"""The parity gate: compares a graph on ONNX Runtime's CPU provider with the torch stage at shapes unused in tracing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from higen.backends.sessions import session_options
from higen.backends.torch import TorchBackend
from higen.bundle import Bundle
from higen.errors import BackendError
from higen.export.place import writing
from higen.export.precision import in_float32, rounded
from higen.export.shapes import checked_sizes, example_inputs
from higen.precision import PRECISIONS

__all__ = ["Parity", "Reference", "check_graph", "check_rounding", "references"]

LARGEST_ROUNDED = 100_000_000
"""`check_rounding` skips a network with more parameters than this."""


@dataclass(frozen=True)
class Parity:
    """Largest difference from the torch stage in float32 at one shape, relative to the largest output value.

    `way` says what was run: the "graph" itself, the "graph in float32" (`precision.in_float32`), or the
    "module" in PyTorch in the graph's precision. If `error` is None, it was not run here, and `note` says why.
    """

    stage: str
    shape: str
    error: float | None
    precision: str = "fp32"
    way: str = "graph"
    tolerance: float = PRECISIONS["fp32"].step
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance; also true if it was not measured."""
        return self.error is None or self.error <= self.tolerance

    def as_json(self) -> dict[str, str | float | bool | None]:
        """JSON-ready values. `error` is null if it is not finite (`passed` is false) or if nothing was run."""
        error = self.error if self.error is not None and math.isfinite(self.error) else None
        return {**vars(self), "error": error, "passed": self.passed}

    def as_line(self) -> str:
        """A line of the command's listing."""
        measured = "not run" if self.error is None else f"{self.error:.1e}"
        verdict = self.note if self.error is None else "ok" if self.passed else f"OVER {self.tolerance:.0e}"
        return f"{self.stage:<21} {self.precision:<6}{self.way:<18}{self.shape:<24}{measured:>9}  {verdict}"


@dataclass(frozen=True)
class Reference:
    """The expected outputs of a stage at one shape, in the table's order, for `example_inputs(stage, sizes, seed)`."""

    sizes: Mapping[str, int]
    seed: int
    outputs: Sequence[NDArray[np.float32]]


def references(
    backend: TorchBackend, name: str, precision: str = "fp32", static: Mapping[str, int] | None = None
) -> list[Reference]:
    """Run a torch stage in float32, with weights rounded to `precision`, at every shape of `shapes.checked_sizes`."""
    manifest = backend.bundle.manifest
    stage = manifest.stage(name)
    module = backend.module(name)
    if any(p.dtype != torch.float32 for p in module.parameters() if p.is_floating_point()):
        raise BackendError("a reference is computed in float32")
    rounded(module, precision)
    made = []
    for seed, sizes in enumerate(checked_sizes(manifest, stage, static), 1):
        outputs = backend.run(name, **example_inputs(manifest, stage, sizes, seed))
        made.append(Reference(sizes, seed, [backend.to_numpy(value) for value in outputs.values()]))
    return made


def check_rounding(low: TorchBackend, name: str, reference: Reference, precision: str) -> Parity:
    """Run a stage's module in PyTorch in `precision`, to find its rounding error and any overflow of an activation.

    ONNX Runtime's CPU provider cannot show these, because it computes much of a float16 graph in float32. A large
    network is skipped, because most CPUs compute in these types at less than 1 GFLOP/s.
    """
    parity = Parity(name, "", None, precision, "module", PRECISIONS[precision].step)
    if sum(p.numel() for p in low.module(name).parameters()) > LARGEST_ROUNDED:
        return replace(parity, note="left out: it takes PyTorch too long on a CPU")
    manifest = low.bundle.manifest
    outputs = low.run(name, **example_inputs(manifest, manifest.stage(name), reference.sizes, reference.seed))
    error = max(_difference(low.to_numpy(a), b) for a, b in zip(outputs.values(), reference.outputs, strict=True))
    return replace(parity, shape=_shape(low.bundle, name, reference), error=error)


def check_rules(graph: Path) -> None:
    """Run onnx's full check of a graph file, without its check of external weights. onnx refuses a weights file with
    hard links, which a Triton repository makes, and a copy of the file may be large. `point_into` ensures that each
    tensor lies within the weights file of its network. Raises onnx's own errors.
    """
    model = onnx.load(graph, load_external_data=False)
    inside = [t for t in model.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    outside = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    del model.graph.initializer[:]
    model.graph.initializer.extend(inside)
    model.graph.input.extend(onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in outside)
    onnx.checker.check_model(model, full_check=True)


def check_graph(
    bundle: Bundle, name: str, graph: Path, expected: Sequence[Reference], precision: str = "fp32"
) -> Iterator[Parity]:
    """Run a graph file of the model's folder with the inputs of every reference.

    A graph in fewer bits is checked twice: first a copy that computes in float32, which must agree as closely as
    float32 graphs do, then the graph itself, within its precision's tolerance. ONNX Runtime's CPU provider has few
    kernels for bfloat16; if it cannot run a graph, the second parity says so. Raises BackendError for a graph that is
    not valid ONNX, for example with an operator that does not accept its input's type. Without this check, such an
    error would stay hidden in a graph that cannot be run.
    """
    try:
        check_rules(graph)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BackendError(f"{name}: the graph is not valid ONNX: {error}") from error
    if precision == "fp32":
        yield from _run(bundle, name, graph, expected, Parity(name, "", None))
        return
    with writing(bundle) as place:
        copy = place.beside(f"{name}.float32")
        in_float32(graph, copy)
        yield from _run(bundle, name, copy, expected, Parity(name, "", None, precision, "graph in float32"))
    yield from _run(
        bundle, name, graph, expected, Parity(name, "", None, precision, tolerance=PRECISIONS[precision].step)
    )


def _run(bundle: Bundle, name: str, graph: Path, expected: Sequence[Reference], parity: Parity) -> Iterator[Parity]:
    stage = bundle.manifest.stage(name)
    options = session_options(severity=4)
    try:
        session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors have no other common base class
        if parity.precision == "bf16" and parity.way == "graph" and "NOT_IMPLEMENTED" in str(error):
            yield replace(parity, note="ONNX Runtime has no CPU kernels for it")
            return
        raise BackendError(f"{name}: ONNX Runtime cannot load the graph: {error}") from error
    for reference in expected:
        inputs = example_inputs(bundle.manifest, stage, reference.sizes, reference.seed)
        ours = session.run(list(stage.graph_outputs), {key: value.numpy() for key, value in inputs.items()})
        errors = [_difference(a, b) for a, b in zip(ours, reference.outputs, strict=True)]
        yield replace(parity, shape=_shape(bundle, name, reference), error=max(errors))


def _shape(bundle: Bundle, name: str, reference: Reference) -> str:
    symbols = bundle.manifest.stage(name).free(bundle.manifest.fixed)
    return " ".join(f"{key}={n}" for key, n in reference.sizes.items() if key in symbols)


def _difference(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    """Largest difference relative to the largest value of `theirs`. Infinite, so a failure, if `ours` is not finite."""
    if not np.isfinite(ours).all():
        return float("inf")
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-6))
