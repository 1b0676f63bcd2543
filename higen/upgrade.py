"""Upgrades a model directory from manifest version 1 to 2, and gives deliberately edited tables a valid seal.

Weights and graphs are not changed. A graph made before version 2 may take other inputs than its stage's row. Python can
still run it; other runtimes and new engines need a new export. The report has the commands for these exports.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from higen.bundle import Bundle, GraphInput, graph_file
from higen.errors import IntegrityError, ModelError
from higen.families import upgraded_version_1, version_1_inputs
from higen.manifest import Manifest
from higen.manifest_file import VERSION, Opened, read_manifest, rewrite
from higen.paths import given_path
from higen.precision import PRECISIONS, QUANTIZED
from higen.stages import Stage
from higen.staging import sweep

__all__ = ["Export", "Upgrade", "upgrade"]

DTYPES = {"tensor(float)": "float32", "tensor(int64)": "int64", "FLOAT": "float32", "INT64": "int64"}
"""The names of input types in ONNX Runtime and in onnx."""


@dataclass(frozen=True)
class Export:
    """A graph that has to be made. `stale`: it exists, but takes other inputs than its stage's row.

    static   fixed sizes of B, F, H and W in the present graph, or in the guided one: "1x16x128x128", or ""
    """

    stage: str
    precision: str
    stale: bool
    static: str = ""


@dataclass(frozen=True)
class Upgrade:
    """What was done with a model directory, and what is left to do.

    before     the version of its manifest before the upgrade
    resealed   whether an edit of its tables was accepted
    exports    graphs to make again, or for the first time
    """

    path: Path
    before: int
    resealed: bool
    graphs: int
    exports: tuple[Export, ...]

    @property
    def commands(self) -> tuple[str, ...]:
        """The commands that make the missing and stale graphs, in the order in which to run them."""
        groups: dict[tuple[str, str], list[str]] = {}
        for export in sorted(self.exports, key=lambda e: e.precision in QUANTIZED):
            groups.setdefault((export.precision, export.static), []).append(export.stage)
        return tuple(self._command(*key, stages) for key, stages in groups.items())

    def _command(self, precision: str, static: str, stages: Iterable[str]) -> str:
        words = ["higen-export", "quantize" if precision in QUANTIZED else "onnx", str(self.path)]
        words += [] if precision == "fp32" else ["--precision", precision]
        words += ["--static", static] if static and precision not in QUANTIZED else []
        return shlex.join([*words, *(word for stage in stages for word in ("--stage", stage))])

    def as_lines(self) -> list[str]:
        """The report as text."""
        done = f"rewritten as version {VERSION}" if self.before < VERSION else f"of version {VERSION}"
        sealed = ", edit accepted and sealed" if self.resealed else ""
        lines = [f"{self.path}: manifest {done}{sealed}; {self.graphs} graphs and the weights are as they were"]
        stale = [f"{e.stage} ({e.precision})" for e in self.exports if e.stale]
        missing = [f"{e.stage} ({e.precision})" for e in self.exports if not e.stale]
        if stale:
            lines.append(
                "Python runs these graphs as they are; C++, Triton and new engines need them exported again, because "
                f"the inputs of a step have changed (t is float32, guidance is per frame): {', '.join(stale)}"
            )
        if missing:
            lines.append(
                f"No graph yet of steps with one branch, which halve the work at guidance 1: {', '.join(missing)}"
            )
        return [*lines, *(f"  {command}" for command in self.commands)]

    def as_json(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return {
            "model": str(self.path),
            "before": self.before,
            "version": VERSION,
            "resealed": self.resealed,
            "exports": [vars(export) for export in self.exports],
            "commands": list(self.commands),
        }


def upgrade(path: str | os.PathLike[str], reseal: bool = False) -> Upgrade:
    """Rewrite the manifest of a model directory as version 2, atomically, and report what is left to do.

    A directory of version 2 is not changed. `reseal`: accept edited tables, after every check except that of the seal.
    Raises ManifestError, IntegrityError (a file is truncated, altered or missing; an edit without `reseal`), ModelError
    (the folder cannot be written).
    """
    folder = given_path(path, "model")
    sweep(folder)
    before = read_manifest(folder, sealed=not reseal)
    if before.version < VERSION:
        bundle = Bundle.open(folder)  # checks that every file exists
        rewrite(folder, lambda opened: _rewritten(bundle, opened))
    elif reseal:
        rewrite(folder, lambda opened: opened, sealed=False)
    bundle = Bundle.open(folder)
    return Upgrade(
        folder, before.version, reseal and before.version == VERSION, len(bundle.graphs), tuple(_exports(bundle))
    )


def _rewritten(bundle: Bundle, opened: Opened) -> Opened:
    if opened.version == VERSION:  # another process has already upgraded it
        return opened
    manifest = upgraded_version_1(opened.manifest)
    stages = {graph_file(s.name, p): s for s in manifest.stages for p in (*PRECISIONS, *QUANTIZED)}
    names = [name for name in opened.files if name.endswith(".onnx")]
    graphs = {name: graph_inputs(bundle.file(name), stages.get(name)) for name in names}
    return replace(opened, manifest=manifest, graphs=graphs, version=VERSION)


def graph_inputs(graph: Path, stage: Stage | None) -> tuple[GraphInput, ...]:
    """The inputs of a graph file: from onnx, else from ONNX Runtime, else those that version 1 gave the stage's graph.

    Raises IntegrityError for a file that nothing on this machine can read.
    """
    declared = _declared(graph)
    if declared is None and stage is None:
        raise IntegrityError(f"{graph}: cannot be read here: pip install 'higen[export]', and try again")
    if declared is None:
        assert stage is not None
        return tuple(GraphInput(t.name, t.dtype, t.shape) for t in version_1_inputs(stage))
    return tuple(_input(graph, stage, *row) for row in declared)


Declared = list[tuple[str, str, list[int | str | None]]]
"""Name, type and sizes of each input."""


def _declared(graph: Path) -> Declared | None:
    try:
        import onnx
    except ImportError:
        return _declared_to_onnxruntime(graph)
    try:
        inputs = onnx.load(os.fspath(graph), load_external_data=False).graph.input
    except Exception as error:  # protobuf's errors have no common base except Exception
        raise IntegrityError(f"{graph}: not an ONNX graph: {error}") from error
    found: Declared = []
    for value in inputs:
        kind = value.type.tensor_type
        sizes = [d.dim_value if d.HasField("dim_value") else d.dim_param for d in kind.shape.dim]
        found.append((value.name, onnx.TensorProto.DataType.Name(kind.elem_type), sizes))
    return found


def _declared_to_onnxruntime(graph: Path) -> Declared | None:
    """None if ONNX Runtime is not installed, or cannot load the graph here (for example bfloat16 on a CPU)."""
    try:
        import onnxruntime as ort

        from higen.backends.sessions import session_options
    except ImportError:
        return None
    options = session_options(severity=4)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = ort.InferenceSession(os.fspath(graph), options, providers=["CPUExecutionProvider"])
    except Exception:  # ONNX Runtime's errors have no common base except Exception
        return None
    return [(value.name, value.type, list(value.shape)) for value in session.get_inputs()]


def _input(graph: Path, stage: Stage | None, name: str, kind: str, sizes: list[int | str | None]) -> GraphInput:
    if kind not in DTYPES:
        raise ModelError(f"{graph}: its input {name} is of {kind}; float32 and int64 are known")
    symbols = {t.name: t.shape for t in stage.inputs}.get(name, ()) if stage is not None else ()
    shape = tuple(n or (symbols[i] if i < len(symbols) else f"n{i}") for i, n in enumerate(sizes))
    return GraphInput(name, DTYPES[kind], shape)  # type: ignore[arg-type]


def _exports(bundle: Bundle) -> Iterable[Export]:
    """Graphs that take other inputs than their stage's row, and missing graphs of plain stages with a guided graph."""
    for stage in bundle.manifest.all_stages:
        for precision in (*PRECISIONS, *QUANTIZED):
            file = graph_file(stage.name, precision)
            if file in bundle.graphs:
                inputs = bundle.graphs[file]
                if not _fits(stage, inputs):
                    yield Export(stage.name, precision, stale=True, static=_static(bundle.manifest, stage, inputs))
            elif (other := _guided(bundle.manifest, stage.name)) is not None:
                inputs = bundle.graphs.get(graph_file(other.name, precision), ())
                if inputs:
                    yield Export(stage.name, precision, stale=False, static=_static(bundle.manifest, other, inputs))


def _guided(manifest: Manifest, plain: str) -> Stage | None:
    """The stage that does the step of `plain` with both branches of guidance."""
    pairs = [pair for loop in manifest.loops for pair in loop.pairs]
    names = [guided for guided, own in pairs if own == plain and guided is not None]
    return manifest.stage(names[0]) if names else None


def _fits(stage: Stage, inputs: tuple[GraphInput, ...]) -> bool:
    """Whether a graph takes the inputs of its stage's row; fixed sizes do not matter."""
    given = {row.name: (row.dtype, len(row.shape)) for row in inputs}
    return given == {t.name: (t.dtype, len(t.shape)) for t in stage.inputs}


def _static(manifest: Manifest, stage: Stage, inputs: tuple[GraphInput, ...]) -> str:
    """The fixed sizes of a graph in the form of `higen-export onnx --static`, or ""."""
    shapes = {t.name: t.shape for t in stage.inputs}
    sizes = {
        symbol: size
        for row in inputs
        for symbol, size in zip(shapes.get(row.name, ()), row.shape, strict=False)
        if symbol in ("B", "F", "H", "W") and isinstance(size, int)
    }
    if not {"B", "H", "W"} <= set(sizes):
        return ""
    frames, factor = sizes.get("F", manifest.sizes.frames[1]), manifest.sizes.factor
    return f"{sizes['B']}x{frames}x{sizes['H'] * factor}x{sizes['W'] * factor}"
