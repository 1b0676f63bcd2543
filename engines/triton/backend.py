"""Runs stages by calls to other models of the same Triton server ("business logic scripting"). Works only inside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from higen.backends.base import Choice
from higen.engines.triton.interface import STOPPING
from higen.errors import BackendError, BackendUnavailable, RetryLater
from higen.manifest import Manifest
from higen.stages import Stage

__all__ = ["TritonBackend"]


class TritonBackend:
    """Runs each stage on the Triton model of the same name."""

    name = "triton"

    def __init__(self, manifest: Manifest, stages: Mapping[str, str]) -> None:
        """`stages`: the Triton backend of each stage that the repository has."""
        self._rows = {stage.name: stage for stage in manifest.all_stages if stage.name in stages}
        self._backends = dict(stages)
        # Ask for outputs in host memory: by default they stay where the stage ran, and GPU memory cannot be a numpy
        # array. The server adds these names to `pb_utils` after it has imported the model, so they are looked up here.
        self._memory = pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0)

    def prepare(self, stage: str) -> None:
        """Do nothing, because the server has loaded the stage. Raises BackendUnavailable for a stage that the
        repository lacks.
        """
        self._row(stage)

    def run(self, stage: str, /, **tensors: Any) -> Mapping[str, Any]:
        """Run a stage on host arrays. Raises BackendError with the server's message, RetryLater if it is stopping."""
        row = self._row(stage)
        request = pb_utils.InferenceRequest(
            model_name=stage,
            requested_output_names=list(row.graph_outputs),
            inputs=[pb_utils.Tensor(t.name, _sent(row, tensors[t.name])) for t in row.inputs],
            preferred_memory=self._memory,
        )
        response = request.exec()
        if response.has_error():
            message = response.error().message()
            raise (RetryLater if any(words in message for words in STOPPING) else BackendError)(f"{stage}: {message}")
        # Copies: the arrays are in memory shared with the server, which is freed with the response.
        return {
            out.name: np.array(pb_utils.get_output_tensor_by_name(response, name).as_numpy())
            for out, name in zip(row.outputs, row.graph_outputs, strict=True)
        }

    def to_numpy(self, tensor: Any) -> NDArray[Any]:
        """The array itself."""
        return np.asarray(tensor)

    def describe(self, stage: str) -> str:
        """Which of Triton's backends runs a stage. Raises BackendUnavailable."""
        return self._backends[self._row(stage).name]

    @property
    def choices(self) -> Mapping[str, Choice]:
        """Every stage of the repository: the server has loaded them all."""
        return {stage: Choice(stage, self.name, details=backend) for stage, backend in self._backends.items()}

    def choose(self, *stages: str) -> str:
        """The first of these stages that the repository has. Raises BackendUnavailable if it has none."""
        return next((stage for stage in stages if stage in self._rows), None) or self._row(stages[0]).name

    def close(self) -> None:
        """Nothing to free."""

    def _row(self, stage: str) -> Stage:
        if stage not in self._rows:
            raise BackendUnavailable(
                f"{stage}: the repository has only {', '.join(self._rows)}; write the repository again"
            )
        return self._rows[stage]


def _sent(row: Stage, array: Any) -> NDArray[Any]:
    """Triton tensors need an axis besides the batch axis: a step column [B] is sent as [B, 1] (config.py: reshape)."""
    sent = np.ascontiguousarray(array)
    return sent[..., None] if sent.ndim == int(row.batch) else sent
