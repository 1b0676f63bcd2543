"""An ONNX Runtime backend that records the inputs of stages, for calibration and comparison."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from higen.backends.onnx import OnnxBackend
from higen.backends.options import Options
from higen.bundle import Bundle

__all__ = ["CallRecorder"]


class CallRecorder(OnnxBackend):
    """Runs the float32 graphs on a CPU. `calls` has the inputs of every call of the recorded stages, in order."""

    def __init__(self, bundle: Bundle, stages: Collection[str]) -> None:
        super().__init__(bundle, Options(device="cpu", precision="fp32"))
        self.calls: dict[str, list[dict[str, NDArray[Any]]]] = {stage: [] for stage in stages}

    def run(self, stage: str, /, **tensors: Any) -> Mapping[str, Any]:
        """Run a stage; see `Backend.run`."""
        if stage in self.calls:
            self.calls[stage].append({name: np.array(self.to_numpy(value)) for name, value in tensors.items()})
        return super().run(stage, **tensors)
