"""ONNX Runtime as a Python-based Triton backend, for servers that have no onnxruntime backend of their own.

The server of `nvidia-pytriton` is one of them. It runs the same repository unchanged: the backend's folder holds a
model.py that imports this class. It runs only inside the server and on the CPU, and knows the settings that our
repositories use.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils

from higen.backends.sessions import session_options

__all__ = ["TritonPythonModel"]


class TritonPythonModel:
    """The class that Triton's Python backend calls: one session for each instance of a model."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the graph."""
        config = json.loads(args["model_config"])
        threads = config.get("parameters", {}).get("intra_op_thread_count")
        options = session_options(None if threads is None else int(threads["string_value"]))
        file = config.get("default_model_filename") or "model.onnx"
        path = Path(args["model_repository"], args["model_version"], file)
        self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._batched = config["max_batch_size"] > 0
        self._inputs = [value.name for value in self._session.get_inputs()]
        self._outputs = [value.name for value in self._session.get_outputs()]

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Run the requests that the dynamic batcher has put together as one batch. If the model does not batch, run
        each separately.
        """
        given = [
            {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self._inputs}
            for request in requests
        ]
        if self._batched:
            return self._answers(given)
        return [answer for one in given for answer in self._answers([one])]

    def _answers(self, given: list[dict[str, Any]]) -> list[Any]:
        """Run several requests in one call, with their rows concatenated."""
        together = given[0]
        if len(given) > 1:
            together = {name: np.concatenate([inputs[name] for inputs in given]) for name in self._inputs}
        try:
            outputs = self._session.run(self._outputs, together)
        except Exception as error:  # ONNX Runtime's errors share no base but Exception
            failed = pb_utils.TritonError(f"ONNX Runtime: {error}")
            return [pb_utils.InferenceResponse(error=failed) for _ in given]
        parts: Iterable[Sequence[Any]] = [outputs]
        if len(given) > 1:
            ends = np.cumsum([len(next(iter(inputs.values()))) for inputs in given])
            parts = zip(*(np.split(output, ends[:-1]) for output in outputs), strict=True)
        return [
            pb_utils.InferenceResponse(
                [pb_utils.Tensor(n, np.ascontiguousarray(p)) for n, p in zip(self._outputs, part, strict=True)]
            )
            for part in parts
        ]

    def finalize(self) -> None:
        """Free the session."""
        del self._session
