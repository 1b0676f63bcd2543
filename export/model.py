"""A model directory to a model directory with graphs: export, parity gate, manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

from higen.backends.torch import TorchBackend
from higen.bundle import Bundle, add_files, graph_file
from higen.errors import BackendError, RequestError
from higen.export.graphs import OPSET, example_inputs, export_stage, sizes_for
from higen.stages import STAGES, dimensions

__all__ = ["TOLERANCE", "Parity", "check_graph", "export_model"]

TOLERANCE = 2e-5
"""Largest difference between graph and torch stage, relative to the largest output (both compute in float32)."""


@dataclass(frozen=True)
class Parity:
    """Largest difference of a stage's graph from its torch module at one shape, relative to the largest output."""

    stage: str
    shape: str
    error: float

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance."""
        return self.error <= TOLERANCE

    def as_json(self) -> dict[str, str | float]:
        """JSON-ready values."""
        return {"stage": self.stage, "shape": self.shape, "error": self.error}


def shapes(bundle: Bundle) -> Iterator[dict[str, int]]:
    """Sizes the tracer did not see: B = F (an exporter's favourite mistake), a single sample, the model's own."""
    multiple, defaults = bundle.config.unet.size_multiple, bundle.config.defaults
    yield {"B": 3, "F": 3, "N": 2, "H": 2 * multiple, "W": 4 * multiple}
    yield {"B": 1, "F": 8, "N": 1, "H": 4 * multiple, "W": 2 * multiple}
    yield {"B": 2, "F": 7, "N": 4, "H": 4 * multiple, "W": 4 * multiple}
    factor = bundle.config.autoencoder.factor
    own = {"H": defaults.height // factor, "W": defaults.width // factor}
    if own["H"] * own["W"] * defaults.frames <= 4096:  # the released model's takes minutes on a CPU
        yield {"B": 1, "F": defaults.frames, "N": 2, **own}


def check_graph(bundle: Bundle, backend: TorchBackend, name: str, graph: Path) -> Iterator[Parity]:
    """Run a graph on ONNX Runtime's CPU provider against the torch stage, at every shape of `shapes`."""
    stage, fixed = STAGES[name], dimensions(bundle.config)
    symbols = {symbol for tensor in stage.inputs for symbol in tensor.shape}
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    for i, free in enumerate(shapes(bundle)):
        sizes = sizes_for(bundle, free)
        inputs = example_inputs(stage, sizes, seed=i + 1)
        ours = session.run(list(stage.graph_outputs), {key: value.numpy() for key, value in inputs.items()})
        theirs = backend.run(name, **inputs)
        errors = [
            float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-6))
            for a, b in zip(ours, (backend.to_numpy(value) for value in theirs.values()), strict=True)
        ]
        seen = {key: n for key, n in sizes.items() if key in symbols and key not in fixed}
        yield Parity(name, " ".join(f"{key}={n}" for key, n in seen.items()), max(errors))


def export_model(
    bundle: Bundle,
    stages: Sequence[str] = tuple(STAGES),
    opset: int = OPSET,
    on_parity: Callable[[Parity], None] | None = None,
) -> Bundle:
    """Write the graph of each stage into the model's folder, each only after it passed the parity gate.

    A graph is written aside and moved; the manifest is updated last, so that an interrupted export leaves the model
    as it was and can be run again. Raises RequestError for an unknown stage, BackendError where the gate fails.
    """
    unknown = [name for name in stages if name not in STAGES]
    if unknown:
        raise RequestError(f"stages={unknown}: of {', '.join(STAGES)}")
    backend = TorchBackend(bundle, "cpu", "float32")
    passed = []
    for name in stages:
        aside = bundle.path / f".{graph_file(name)}.part"
        try:
            export_stage(bundle, backend, name, aside, opset)
            for parity in check_graph(bundle, backend, name, aside):
                if on_parity is not None:
                    on_parity(parity)
                if not parity.passed:
                    raise BackendError(
                        f"{name} at {parity.shape}: the graph differs by {parity.error:.1e}, allowed is {TOLERANCE:.0e}"
                    )
            aside.replace(bundle.path / graph_file(name))
            passed.append(graph_file(name))
        finally:
            aside.unlink(missing_ok=True)
    return add_files(bundle, passed)
