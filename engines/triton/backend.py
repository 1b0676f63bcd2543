"""Stages as calls to the other models of the same Triton server ("business logic scripting"). Runs inside it only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from higen.errors import BackendError, RetryLater
from higen.stages import STAGES

__all__ = ["TritonBackend"]


_STOPPING = ("Server not ready", "has no available versions")
"""What Triton says of a stage while it stops; the code of these errors is the same as that of a failure."""


class TritonBackend:
    """Runs a stage on the model of the same name."""

    name = "triton"

    def __init__(self) -> None:
        # Where outputs are to lie: without a word they stay where a stage runs, and a GPU's are no numpy arrays. The
        # server adds these names to its module after it has imported the model.
        self._memory = pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0)

    def prepare(self, stage: str) -> None:
        """The server has loaded it."""

    def run(self, stage: str, /, **tensors: Any) -> Mapping[str, Any]:
        """Run a stage on host arrays. Raises BackendError with the server's words, RetryLater where it is stopping."""
        spec = STAGES[stage]
        request = pb_utils.InferenceRequest(
            model_name=stage,
            requested_output_names=list(spec.graph_outputs),
            inputs=[pb_utils.Tensor(t.name, _with_an_axis(np.ascontiguousarray(tensors[t.name]))) for t in spec.inputs],
            preferred_memory=self._memory,
        )
        response = request.exec()
        if response.has_error():
            message = response.error().message()
            raise (RetryLater if any(words in message for words in _STOPPING) else BackendError)(f"{stage}: {message}")
        # Copies: the arrays lie in memory that is shared with the server and ends with the response.
        return {
            out.name: np.array(pb_utils.get_output_tensor_by_name(response, name).as_numpy())
            for out, name in zip(spec.outputs, spec.graph_outputs, strict=True)
        }

    def to_numpy(self, tensor: Any) -> NDArray[Any]:
        """The array itself."""
        return np.asarray(tensor)

    def close(self) -> None:
        """Nothing to free."""


def _with_an_axis(array: NDArray[Any]) -> NDArray[Any]:
    """Triton has no tensors of a batch axis alone: a step column [B] goes as [B, 1] (config.py: reshape)."""
    return array[:, None] if array.ndim == 1 else array
