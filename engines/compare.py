"""Stages of one backend against those of another, through Polygraphy's comparator, on inputs of a real run."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from higen.backends.base import Backend
from higen.backends.onnx import OnnxBackend
from higen.backends.recorder import CallRecorder
from higen.backends.tensorrt import TensorrtBackend
from higen.bundle import QUANTIZED, Bundle, check_precision
from higen.errors import MissingExtra, ModelError, RequestError
from higen.pipeline import DECODE_CHUNK, Pipeline
from higen.stages import STAGES

__all__ = ["Row", "compare", "tolerance_of"]

TOLERANCES = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 1e-1}


def tolerance_of(precision: str) -> float:
    """Largest difference that a precision is allowed, relative to the largest output."""
    return 0.3 if precision in QUANTIZED else TOLERANCES[precision]


@dataclass(frozen=True)
class Row:
    """An output compared over all calls; differences are absolute, `allowed` follows from the largest output."""

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
    stages: Sequence[str] = tuple(STAGES),
    prompt: str | None = None,
    steps: int = 4,
    tolerance: float | None = None,
) -> list[Row]:
    """Compare ONNX Runtime's float32 stages with those of backend `other` ("onnx" or "tensorrt") in a precision.

    The inputs are those of a whole video of `prompt`; the encoder's are its first frames. Raises RequestError,
    ModelError (a precision that the model was never quantised to), MissingExtra, and what the backends raise where a
    graph or an engine cannot be used.
    """
    if other not in ("onnx", "tensorrt"):
        raise RequestError(f"with={other!r}: 'onnx' or 'tensorrt'")
    if other == "onnx" and precision == "fp32":
        raise RequestError(
            "precision='fp32': ONNX Runtime would be compared with itself; fp16, say, or another backend"
        )
    check_precision(precision)
    if missing := bundle.not_quantized(precision):
        raise ModelError(missing)
    allowed = tolerance_of(precision) if tolerance is None else tolerance
    comparator = _polygraphy()
    second: Backend = (
        TensorrtBackend(bundle, precision=precision) if other == "tensorrt" else OnnxBackend(bundle, "cpu", precision)
    )
    recorder = CallRecorder(bundle, stages)
    try:
        for stage in stages:  # what is not there is said before the video is made
            second.prepare(stage)
        with Pipeline(bundle, recorder) as pipeline:
            known = bundle.config.prompts[0] if bundle.config.prompts else "a dog runs on the beach"
            video = pipeline(prompt or known, steps=steps, progress=False)
            if "vae_encoder" in stages:  # a video from text encodes no image
                pixels = video.frames[:DECODE_CHUNK].astype(np.float32).transpose(0, 3, 1, 2) / 127.5 - 1.0
                recorder.run("vae_encoder", pixels=np.ascontiguousarray(pixels))
            return [
                row
                for stage in stages
                for row in _compare_stage(comparator, stage, recorder, second, recorder.calls[stage], allowed)
            ]
    finally:
        second.close()


def _polygraphy() -> Any:
    """Polygraphy's comparator module. It asks the environment once which TensorRT to load, and must load none."""
    os.environ.setdefault("POLYGRAPHY_AUTOINSTALL_DEPS", "0")
    try:
        import polygraphy.comparator
    except ImportError as error:
        raise MissingExtra("polygraphy", "compare", "higen-export compare") from error
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = {"": G_LOGGER.CRITICAL}
    return polygraphy.comparator


def _runner(name: str, stage: str, backend: Backend) -> Any:
    from polygraphy.backend.base import BaseRunner

    outputs = [tensor.name for tensor in STAGES[stage].outputs]

    class StageRunner(BaseRunner):  # type: ignore[misc]
        def get_input_metadata_impl(self) -> Any:
            from polygraphy.common import TensorMetadata

            metadata = TensorMetadata()
            for tensor in STAGES[stage].inputs:
                shape = [n if isinstance(n, int) else None for n in tensor.shape]
                metadata.add(tensor.name, np.dtype(tensor.dtype), shape)
            return metadata

        def infer_impl(self, feed_dict: Mapping[str, Any]) -> dict[str, Any]:
            start = time.perf_counter()
            found = backend.run(stage, **feed_dict)
            arrays = {key: backend.to_numpy(found[key]) for key in outputs}
            self.inference_time = time.perf_counter() - start
            return arrays

    return StageRunner(name)


def _compare_stage(
    comparator: Any, stage: str, first: Backend, second: Backend, calls: Sequence[Mapping[str, Any]], allowed: float
) -> list[Row]:
    runners = [_runner("expected", stage, first), _runner("found", stage, second)]
    results = comparator.Comparator.run(runners, data_loader=[dict(call) for call in calls])
    peaks = {
        tensor.name: max(float(np.abs(result[tensor.name]).max()) for result in results["expected"])
        for tensor in STAGES[stage].outputs
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
                stage,
                name,
                len(all_of),
                max(float(r.max_absdiff) for r in all_of),
                float(np.mean([r.mean_absdiff for r in all_of])),
                limits[name],
                all(bool(r) for r in all_of),
            )
        )
    return rows
