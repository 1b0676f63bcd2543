"""The Triton model `higen`: a decoupled model of the Python backend, built on `Service`. Works only in the server."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from higen.bundle import Bundle
from higen.engines.triton.backend import TritonBackend
from higen.engines.triton.interface import Field, inputs
from higen.engines.triton.service import Event, Limits, Meter, Service
from higen.errors import Cancelled, HigenError, RequestError, RetryLater
from higen.pipeline import Pipeline

__all__ = ["TritonPythonModel"]


class TritonPythonModel:
    """The class that Triton's Python backend calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the manifest and tokenizer in the folder `model` beside model.py."""
        parameters = json.loads(args["model_config"])["parameters"]
        limits = Limits.from_json(parameters["limits"]["string_value"])
        folder = Path(args["model_repository"], args["model_version"], "model")
        bundle = Bundle.open(folder)
        self._fields = inputs(bundle.manifest)
        backend = TritonBackend(bundle.manifest, json.loads(parameters["stages"]["string_value"]))
        self._service = Service(Pipeline(bundle, backend), backend, limits, _meter(bundle.manifest.name))

    def execute(self, requests: Sequence[Any]) -> None:
        """Start the requests; they answer from their own threads."""
        for request in requests:
            self._service.accept(_inputs(request, self._fields), _Reply(request))

    def finalize(self) -> None:
        """End open requests with RetryLater, because the server unloads the model."""
        self._service.close()


def _inputs(request: Any, fields: Sequence[Field]) -> dict[str, np.ndarray[Any, Any]]:
    """The given inputs, and unknown names, which the HTTP server passes separately, so that they are refused."""
    found = {field.name: pb_utils.get_input_tensor_by_name(request, field.name) for field in fields}
    strange = [name for name in json.loads(request.parameters() or "{}") if not name.startswith("triton_")]
    return {name: np.array(tensor.as_numpy()) for name, tensor in found.items() if tensor is not None} | {
        name: np.array([], dtype=np.object_) for name in strange
    }


class _Reply:
    """A request's response sender. The server crashes if a sender is used after its final response, even to ask whether
    the request was cancelled. So each use holds the lock, and there is no use after the final response.
    """

    def __init__(self, request: Any) -> None:
        self._sender = request.get_response_sender()
        self._lock = threading.Lock()
        self._open = True

    def send(self, event: Event) -> None:
        tensors = [pb_utils.Tensor(name, array) for name, array in event.items()]
        with self._lock:
            self._sender.send(pb_utils.InferenceResponse(output_tensors=tensors))

    def finish(self) -> None:
        with self._lock:
            self._open = False
            self._sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def fail(self, error: HigenError) -> None:
        told = pb_utils.TritonError(f"{type(error).__name__}: {error}", _code(error))
        with self._lock:
            self._open = False
            self._sender.send(
                pb_utils.InferenceResponse(error=told), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
            )

    def cancelled(self) -> bool:
        with self._lock:
            return self._open and bool(self._sender.is_cancelled())


class _Counters(Meter):
    """Adds a service's numbers to the server's own Prometheus metrics."""

    def __init__(self, model: str) -> None:
        """Raises pb_utils.TritonModelException if the server keeps no metrics."""
        self._lock = threading.Lock()
        self._families: list[Any] = []  # kept, because they must outlive their metrics
        self._model = model
        self._active = self._gauge("higen_requests_active", "Requests that are running")
        self._waiting = self._gauge("higen_requests_waiting", "Requests that wait for a slot")
        self._frames = self._family("higen_frames_total", "Frames sent", "COUNTER").Metric(labels={"name": model})
        ended = self._family("higen_requests_total", "Requests that have ended, by outcome", "COUNTER")
        self._outcomes = {
            outcome: ended.Metric(labels={"name": model, "outcome": outcome})
            for outcome in ("done", "refused", "full", "cancelled", "failed")
        }

    def load(self, active: int, waiting: int) -> None:
        with self._lock:
            self._active.set(active)
            self._waiting.set(waiting)

    def ended(self, outcome: str) -> None:
        with self._lock:
            self._outcomes[outcome].increment(1)

    def frames(self, count: int) -> None:
        with self._lock:
            self._frames.increment(count)

    def _gauge(self, name: str, about: str) -> Any:
        return self._family(name, about, "GAUGE").Metric(labels={"name": self._model})

    def _family(self, name: str, about: str, kind: str) -> Any:
        families = pb_utils.MetricFamily
        family = families(name=name, description=about, kind=getattr(families, kind))
        self._families.append(family)
        return family


def _meter(model: str) -> Meter:
    """Prometheus counters, or a `Meter` that drops everything if the server was started without metrics."""
    try:
        return _Counters(model)
    except Exception as error:  # TritonModelException: the server adds it to pb_utils after this module is imported
        pb_utils.Logger.log_info(f"no metrics of {model}: {error}")
        return Meter()


def _code(error: HigenError) -> Any:
    """Triton's error code. TritonError is looked up here, because the server adds it after this module is imported."""
    codes = pb_utils.TritonError
    kinds = {RequestError: codes.INVALID_ARG, RetryLater: codes.UNAVAILABLE, Cancelled: codes.CANCELLED}
    return next((code for kind, code in kinds.items() if isinstance(error, kind)), codes.INTERNAL)
