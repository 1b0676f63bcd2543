"""Quantises denoising graphs: they multiply in 8 or 4 bits and use the same weights files.

Ranges come from real denoising runs: every recorded call holds both guidance branches, and calls are taken from the
whole length of the loop. Measurements decide which layers are quantised: the error that each layer alone causes in a
step, the arithmetic that it saves, and the error of all chosen layers together. These are never quantised: the first
and the last layer on the path of the latents, layers off that path (embeddings of time and conditions), attention's own
products, norms, guidance and the solver.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray
from tqdm import tqdm

from higen.backends.sessions import session_options
from higen.bundle import Bundle, check_place, graph_file, put_file
from higen.errors import BackendError, ModelError, RequestError
from higen.export.interface import graph_inputs
from higen.export.layers import KINDS, Kind, Layer, quantizable
from higen.export.place import check_writable, writing
from higen.export.rounding import SWITCHES, Nodes, insert, insert_switched, rounded_once
from higen.precision import QUANTIZED, precision_named
from higen.staging import Staging
from higen.trial import record

__all__ = ["TOLERANCE", "Report", "check_graphs", "quantize", "record_calls", "with_graphs"]

CLIPS = (1.0, 0.8, 0.6, 0.4)
"""Fractions of the largest magnitude to try as an activation's range. The one with the least error is kept."""

TOLERANCE = 0.05
"""The largest allowed error (see `Report`) by default."""

ALONE = 2
"""Number of calls on which each layer alone is measured: those with the largest error if all layers are quantised."""

LEAST = 0.1
"""The smallest fraction of the layers that a quantised graph must compute in fewer bits to be worthwhile."""

RANKS = (2, 3)
"""TensorRT quantises a layer's input in blocks only if the tensor has one of these ranks."""

COMPUTED = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16}
"""The type of the scales in a graph, by the graph's precision."""

Calls = Sequence[Mapping[str, NDArray[Any]]]


@dataclass(frozen=True)
class Report:
    """The result of a quantisation: the layers chosen from the candidates, and the resulting error.

    `work` is the chosen layers' fraction of the candidates' multiplications. `error` compares a step's estimate of the
    clean latents with that of the float32 graph: the root mean square of the difference, divided by the root mean
    square of the float32 estimate, for the worst call.
    """

    stage: str
    precision: str
    chosen: int
    candidates: int
    work: float
    error: float
    kept: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {**vars(self), "kept": list(self.kept)}


def record_calls(
    bundle: Bundle,
    prompts: Sequence[str],
    steps: int,
    calls: int,
    stages: Sequence[str] | None = None,
    shown: bool = False,
    seconds: float | None = None,
    **sizes: int,
) -> dict[str, Calls]:
    """The inputs of `calls` calls of each denoising stage, spread evenly over the loops of videos of `prompts`. The
    videos are made with and without guidance, as the stages need it.

    stages     None: all that have a graph
    shown      with a progress bar
    seconds    recording ends after this time, as soon as every stage has a call; None: after the last video
    sizes      frames, width and height of the videos; default: the model's own

    Raises BackendError for a stage that no video runs.
    """
    names = with_graphs(bundle) if stages is None else stages
    found = record(bundle, names, prompts, shown, seconds, steps=steps, **sizes)
    if idle := [stage for stage in names if not found[stage]]:
        raise BackendError(f"{', '.join(idle)}: no video runs it, so there is nothing to calibrate on")
    return {stage: _spread(made, calls) for stage, made in found.items()}


def with_graphs(bundle: Bundle) -> tuple[str, ...]:
    """The denoising stages that have a float32 graph, or all denoising stages if none has one."""
    names = bundle.manifest.denoising
    return tuple(name for name in names if graph_file(name) in bundle.files) or names


def _spread(values: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the values, evenly spaced from the first to the last."""
    if len(values) <= count:
        return list(values)
    return [values[i] for i in np.linspace(0, len(values) - 1, count).round().astype(int)]


def check_graphs(bundle: Bundle, precision: str, stages: Sequence[str] | None = None) -> tuple[str, ...]:
    """The stages to quantise (None: all that have a graph), after a check that the graphs needed for it exist.

    Call it before minutes are spent on recording. Raises RequestError for an unknown precision or stage, ModelError if
    a graph is missing or a file that is not the model's has the name of a quantised graph, OutputError if the folder
    cannot be written.
    """
    check_writable(bundle)
    if precision not in QUANTIZED:
        raise RequestError(f"precision={precision!r}: one of {', '.join(map(repr, QUANTIZED))}")
    names = with_graphs(bundle) if stages is None else tuple(stages)
    if wrong := [stage for stage in names if stage not in bundle.manifest.denoising]:
        raise RequestError(f"stages={wrong}: known are {', '.join(bundle.manifest.denoising)}")
    listed = Bundle.open(bundle.path).files  # the current state
    for stage in names:
        for needed in ("fp32", precision_named(precision).base):
            if graph_file(stage, needed) not in bundle.files:
                raise ModelError(
                    f"{bundle.path}: no {graph_file(stage, needed)} (make it: higen-export onnx {bundle.path} "
                    f"--stage {stage} --precision {needed})"
                )
        check_place(bundle.path, listed, graph_file(stage, precision))
    return names


def quantize(
    bundle: Bundle,
    calls: Mapping[str, Calls],
    precision: str = "int8",
    stages: Sequence[str] | None = None,
    tolerance: float = TOLERANCE,
    on_report: Callable[[Report], None] = lambda _: None,
    shown: bool = False,
    seconds: float | None = None,
) -> Bundle:
    """Write the graph of each denoising stage in a quantised precision (precision.QUANTIZED).

    stages     None: all that have a graph
    calls      inputs to calibrate and to measure with, from `record_calls`
    tolerance  largest error (see `Report`) of a step; layers are dropped, the worst first, until the error is within it
    shown      with a progress bar
    seconds    time for measuring each layer alone, split equally between the stages; layers that are not measured in
               time, those with the least arithmetic, are not quantised. None: all layers are measured

    Raises what `check_graphs` raises, BackendError if no layer can be quantised within the tolerance, OutputError if a
    graph cannot be written.
    """
    names = check_graphs(bundle, precision, stages)
    until = float("inf") if seconds is None else time.monotonic() + seconds
    with writing(bundle) as place:
        for done, stage in enumerate(names):
            trial = _Trial(bundle, place, stage, calls[stage], precision)
            now = time.monotonic()
            choice = _choose(trial, tolerance, now + (until - now) / (len(names) - done), shown)
            bundle = _write(bundle, place, trial, precision, *choice, on_report)
    return bundle


def _write(
    bundle: Bundle,
    place: Staging,
    trial: _Trial,
    precision: str,
    chosen: Sequence[str],
    error: float,
    on_report: Callable[[Report], None],
) -> Bundle:
    stage, base = trial.stage, precision_named(precision).base
    model = ir.load(bundle.path / graph_file(stage, base))
    insert(model, chosen, trial.ranges, trial.kind)
    model.metadata_props.clear()  # they describe the graph that this one is made from
    aside = place.beside(graph_file(stage, precision))
    ir.save(model, aside)
    bundle = put_file(bundle, aside, graph_file(stage, precision), graph_inputs(aside))
    work = sum(trial.work[layer] for layer in chosen) / sum(trial.work.values())
    kept = tuple(sorted(set(trial.work) - set(chosen)))
    on_report(Report(stage, precision, len(chosen), len(trial.work), work, error, kept))
    return bundle


class _Trial:
    """A stage's float32 graph with a switch for each layer. It measures the error of a step for any choice of layers.

    ranges   largest magnitude of each layer's activation, by the name of its weight
    work     multiplications of each layer in a call
    """

    def __init__(self, bundle: Bundle, place: Staging, stage: str, calls: Calls, precision: str) -> None:
        self.stage, self.kind = stage, KINDS[precision.partition(".")[0]]
        self._bundle, self._place, self._calls = bundle, place, calls
        self.ranges, self.work = self._calibrate(self.kind)
        model = self._plain()
        scales = COMPUTED[precision_named(precision).base]
        self._names = insert_switched(model.graph, self.ranges, self.kind, scales)
        self._session = self._open(model)
        self._expected = [self._run(call, ()) for call in calls]

    def errors(self, chosen: Collection[str], calls: Sequence[int] | None = None) -> list[float]:
        """The error (see `Report`) with these layers quantised, for each of the calls (None: for all)."""
        numbers = range(len(self._calls)) if calls is None else calls
        return [_relative(self._run(self._calls[i], chosen), self._expected[i]) for i in numbers]

    def _run(self, call: Mapping[str, NDArray[Any]], chosen: Collection[str]) -> NDArray[np.float32]:
        """The estimate of the clean latents after a step."""
        switches = np.array([name in chosen for name in self._names])
        found: NDArray[np.float32] = self._session.run(None, {**call, SWITCHES: switches})[1]
        return found

    def _calibrate(self, kind: Kind) -> tuple[dict[str, float], dict[str, float]]:
        """Ranges and work. With one scale per tensor, the range with the least rounding error is found among CLIPS."""
        extents = self._measure(kind, _extent)
        if kind.in_blocks:
            extents = {name: found for name, found in extents.items() if found[0, 1] in RANKS}
        high = {name: max(float(found[:, 0].max()), 1e-6) for name, found in extents.items()}
        work = {name: float(found[:, 2].mean()) for name, found in extents.items()}
        if kind.in_blocks:
            return high, work

        def noise(nodes: Nodes, layer: Layer) -> list[ir.Value]:
            return [_noise(nodes, layer.activation, clip * high[layer.weight], kind, clip) for clip in CLIPS]

        noises = self._measure(kind, noise)
        return {name: high[name] * CLIPS[int(noises[name].mean(0).argmin())] for name in high}, work

    def _measure(self, kind: Kind, probe: Callable[[Nodes, Layer], list[ir.Value]]) -> dict[str, NDArray[np.float64]]:
        """The scalars that `probe` computes for each layer: {weight: [calls, scalars]}."""
        model = self._plain()
        probes = {
            layer.weight: probe(Nodes(model.graph, None, f"{layer.weight}.probe"), layer)
            for layer in quantizable(model.graph, kind)
        }
        first = len(model.graph.outputs)
        for value in (value for values in probes.values() for value in values):
            value.shape = ir.Shape([])
            model.graph.outputs.append(value)
        if not probes:
            raise BackendError(f"{self.stage}: has no layer that can be quantised to this precision")
        session = self._open(model)
        rows = np.array([[float(x) for x in session.run(None, dict(call))[first:]] for call in self._calls])
        stops = np.cumsum([len(values) for values in probes.values()])[:-1]
        return dict(zip(probes, np.split(rows, stops, axis=1), strict=True))

    def _plain(self) -> ir.Model:
        return ir.load(self._bundle.path / graph_file(self.stage))

    def _open(self, model: ir.Model) -> Any:
        """A session for a graph changed only for the trial. Its file lies next to the weights while it is loaded."""
        aside = self._place.beside(f"{self.stage}.calibration")
        try:
            ir.save(model, aside)
            return ort.InferenceSession(str(aside), session_options(), providers=["CPUExecutionProvider"])
        finally:
            aside.unlink(missing_ok=True)


def _extent(nodes: Nodes, layer: Layer) -> list[ir.Value]:
    """The largest magnitude and the rank of a layer's activation, and the layer's number of multiplications."""
    largest = nodes.add("ReduceMax", [nodes.add("Abs", [layer.activation], "size")], "largest", keepdims=0)
    shape = nodes.add("Shape", [layer.activation], "shape", ir.DataType.INT64)
    rank = nodes.add("Size", [shape], "rank", ir.DataType.INT64)
    count = nodes.add("Size", [layer.node.outputs[0]], "count", ir.DataType.INT64)
    weight = nodes.graph.initializers[layer.weight].shape
    assert weight is not None
    each = nodes.constant("each", np.int64(np.prod(weight.numpy()[1:])))
    return [largest, rank, nodes.add("Mul", [count, each], "work", ir.DataType.INT64)]


def _noise(nodes: Nodes, value: ir.Value, high: float, kind: Kind, clip: float) -> ir.Value:
    """Mean squared rounding error of a tensor with this range."""
    off = nodes.add("Sub", [value, rounded_once(nodes, value, high, kind, f"{clip}")], f"{clip}.off")
    return nodes.add("ReduceMean", [nodes.add("Mul", [off, off], f"{clip}.power")], f"{clip}.noise", keepdims=0)


def _choose(trial: _Trial, tolerance: float, until: float, shown: bool) -> tuple[list[str], float]:
    """The layers with which a step stays within the tolerance, and the step's error. Layers that save the most
    arithmetic for their error are chosen first. After `until` (monotonic clock), no further layer is measured alone.
    """
    names = sorted(trial.work, key=lambda name: -trial.work[name])
    together = trial.errors(names)
    if (error := max(together)) <= tolerance:
        return list(trial.work), error
    worst = np.argsort(together)[-ALONE:].tolist()
    least = max(round(LEAST * len(names)), 1)
    alone: dict[str, float] = {}
    for name in tqdm(names, desc=f"{trial.stage}, layers", disable=not shown):
        if time.monotonic() > until:
            break
        alone[name] = sum(error**2 for error in trial.errors([name], worst))
    if len(alone) < least:
        raise BackendError(
            f"{trial.stage}: there was time to measure {len(alone)} of {len(names)} layers, and {least} are needed: "
            "allow more minutes, or calibrate on fewer frames or a smaller size"
        )
    # The layers' errors are nearly independent, so their squares add up.
    ordered = sorted(alone, key=lambda name: alone[name] / trial.work[name])
    fits, over = least, len(names) if len(alone) == len(names) else len(alone) + 1  # all exceed the tolerance
    error = max(trial.errors(ordered[:fits]))
    if error > tolerance:
        raise BackendError(
            f"{trial.stage}: a tenth of its layers in fewer bits differs by {error:.2f}, allowed is {tolerance}"
        )
    while over - fits > max(1, len(names) // 50):
        middle = (fits + over) // 2
        if (found := max(trial.errors(ordered[:middle]))) <= tolerance:
            fits, error = middle, found
        else:
            over = middle
    return ordered[:fits], error


def _relative(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    return float(np.sqrt(((found - expected) ** 2).mean() / max(float((expected**2).mean()), 1e-12)))
