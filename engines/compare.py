"""Compares the stages of two backends with Polygraphy, on the inputs of a real run."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from higen.backends.base import Backend
from higen.backends.onnx import OnnxBackend
from higen.backends.options import Options
from higen.backends.tensorrt import TensorrtBackend
from higen.bundle import Bundle, graph_file
from higen.errors import MissingExtra, ModelError, RequestError
from higen.precision import precision_named
from higen.stages import Stage
from higen.trial import known_prompts, record

__all__ = ["Row", "compare"]


@dataclass(frozen=True)
class Row:
    """An output compared over all calls. All differences are absolute; `allowed` scales with the largest output."""

    stage: str
    output: str
    calls: int
    largest: float
    mean: float
    allowed: float
    passed: bool

    def as_json(self) -> dict[str, Any]:
        """JSON-ready values."""
        return dict(vars(self))


def compare(
    bundle: Bundle,
    other: str,
    precision: str,
    stages: Sequence[str] | None = None,
    prompt: str | None = None,
    steps: int = 4,
    tolerance: float | None = None,
) -> list[Row]:
    """Compare ONNX Runtime's float32 stages with the stages of backend `other` ("onnx" or "tensorrt") in `precision`.

    The inputs are recorded while a whole video of `prompt` is made. Stages that this video does not use get further
    videos: with or without guidance, or from a picture. `stages`: None means all that have a float32 graph. Raises
    RequestError, ModelError (a precision that the model was never quantised to), MissingExtra, and the backends' errors
    for a graph or an engine that cannot be used.
    """
    if other not in ("onnx", "tensorrt"):
        raise RequestError(f"with={other!r}: 'onnx' or 'tensorrt'")
    if other == "onnx" and precision == "fp32":
        raise RequestError(
            "precision='fp32': ONNX Runtime would be compared with itself; choose fp16 or another backend"
        )
    row = precision_named(precision)
    if missing := bundle.not_quantized(precision):
        raise ModelError(missing)
    known = (*bundle.manifest.stage_names, *bundle.manifest.variants)
    names = tuple(stages) if stages is not None else tuple(n for n in known if graph_file(n) in bundle.files) or known
    if unknown := [name for name in names if name not in known]:
        raise RequestError(f"stages={unknown}: known are {', '.join(known)}")
    comparator = _polygraphy()
    if other == "tensorrt":
        second: Backend = TensorrtBackend(bundle, Options(precision=precision))
    else:
        second = OnnxBackend(bundle, Options(device="cpu", precision=precision))
    first = OnnxBackend(bundle, Options(device="cpu", precision="fp32"))
    try:
        for name in names:  # a missing graph or engine raises before the video is made
            second.prepare(name)
        calls = record(bundle, names, [prompt] if prompt else known_prompts(bundle.manifest), steps=steps)
        allowed = row.compared if tolerance is None else tolerance
        return [
            made
            for name in names
            if calls[name]
            for made in _compare_stage(comparator, bundle.manifest.stage(name), first, second, calls[name], allowed)
        ]
    finally:
        first.close()
        second.close()


def _polygraphy() -> Any:
    """Polygraphy's comparator module. It decides once, on import, which TensorRT to load; here it must load none."""
    os.environ.setdefault("POLYGRAPHY_AUTOINSTALL_DEPS", "0")
    try:
        import polygraphy.comparator
    except ImportError as error:
        raise MissingExtra("polygraphy", "compare", "higen-export compare") from error
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = {"": G_LOGGER.CRITICAL}
    return polygraphy.comparator


def _runner(name: str, stage: Stage, backend: Backend) -> Any:
    from polygraphy.backend.base import BaseRunner

    outputs = [tensor.name for tensor in stage.outputs]

    class StageRunner(BaseRunner):  # type: ignore[misc]
        def get_input_metadata_impl(self) -> Any:
            from polygraphy.common import TensorMetadata

            metadata = TensorMetadata()
            for tensor in stage.inputs:
                shape = [n if isinstance(n, int) else None for n in tensor.shape]
                metadata.add(tensor.name, np.dtype(tensor.dtype), shape)
            return metadata

        def infer_impl(self, feed_dict: Mapping[str, Any]) -> dict[str, Any]:
            start = time.perf_counter()
            found = backend.run(stage.name, **feed_dict)
            arrays = {key: backend.to_numpy(found[key]) for key in outputs}
            self.inference_time = time.perf_counter() - start
            return arrays

    return StageRunner(name)


def _compare_stage(
    comparator: Any, stage: Stage, first: Backend, second: Backend, calls: Sequence[Mapping[str, Any]], allowed: float
) -> list[Row]:
    runners = [_runner("expected", stage, first), _runner("found", stage, second)]
    results = comparator.Comparator.run(runners, data_loader=[dict(call) for call in calls])
    peaks = {
        tensor.name: max(float(np.abs(result[tensor.name]).max()) for result in results["expected"])
        for tensor in stage.outputs
    }
    limits = {name: allowed * peak for name, peak in peaks.items()}
    judge = comparator.SimpleCompareFunc(atol=limits, rtol=0.0, check_error_stat="max")
    (result,) = comparator.Comparator.compare_accuracy(results, compare_func=judge)
    ((_, found),) = result.items()
    rows = []
    for name in peaks:
        all_of = [call[name] for call in found]
        rows.append(
            Row(
                stage.name,
                name,
                len(all_of),
                max(float(r.max_absdiff) for r in all_of),
                float(np.mean([r.mean_absdiff for r in all_of])),
                limits[name],
                all(bool(r) for r in all_of),
            )
        )
    return rows
